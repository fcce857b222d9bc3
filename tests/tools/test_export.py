"""What trained is what ships: exported checkpoints against the engine that trained them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from held_out import held_out_nelbo
from helpers import ROOT, launch
from hub_server import environment
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config import load_config
from common.errors import UserError
from pretrain.config import RunConfig
from pretrain.runtime.metrics import read_metrics
from tools.export import export
from tools.export import main as export_main
from tools.generate import load
from tools.parity import fixed_batch
from tools.repository import push
from tools.trained import trained_weights

pytestmark = pytest.mark.slow

# Runs where this project cannot be imported, with nothing but transformers.
ALONE = """
import sys
for name in ("common", "pretrain", "data_prep", "tools"):
    sys.modules[name] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
path, ids, out = sys.argv[1:]
ids = torch.load(ids)
model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
other = AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(path)
shift = model.config.diffusion["shift"]
with torch.no_grad():
    logits = model(ids).logits
    assert torch.equal(logits, other(ids).logits)
    changed = ids.clone(); changed[:, -1] += 1
    assert not torch.equal(model(changed).logits[:, 2], logits[:, 2]), "not bidirectional"
    assert torch.equal(logits[:, 0], logits[:, 1]) == shift
stock = AutoModelForCausalLM.from_pretrained(path).eval()
assert type(stock).__module__.startswith("transformers.models."), "no code of the folder"
with torch.no_grad():
    rows, expected = (stock(ids).logits[:, :-1], logits[:, 1:]) if shift else (stock(ids).logits, logits)
stock_difference = (rows.float() - expected.float()).abs().max().item()
masked = ids.clone(); masked[:, 3:9] = tokenizer.mask_token_id
if not shift:
    masked[:, 0] = tokenizer.mask_token_id
filled = model.diffusion_generate(masked, steps=4, generator=torch.Generator().manual_seed(0))
assert not (filled == tokenizer.mask_token_id).any()
assert torch.equal(filled[:, 1:3], ids[:, 1:3]) and torch.equal(filled[:, 9:], ids[:, 9:])
assert tokenizer.mask_token_id == model.config.mask_token_id
assert model.generation_config.order == "left_to_right" and model.generation_config.do_sample
call = {"return_dict_in_generate": True, "temperature": 0, "eos_token_id": -1}
by_default, named = (model.diffusion_generate(masked, **call, **more) for more in ({}, {"order": "left_to_right"}))
assert torch.equal(by_default.step_of, named.step_of), "generation_config.json gives the defaults"
for more in ({"order": "random"}, {"cache": "window", "block_length": 3}, {"threshold": 0.1, "verify_threshold": 0.2}):
    assert not (model.diffusion_generate(masked, **more) == tokenizer.mask_token_id).any()
by_stock = stock.generate(masked, custom_generate=path, trust_remote_code=True, **call).sequences
assert not (by_stock == tokenizer.mask_token_id).any() and torch.equal(by_stock[:, 9:], ids[:, 9:])
torch.save({"logits": logits, "filled": filled, "stock_difference": stock_difference}, out)
model.save_pretrained(out + ".again")
again = AutoModel.from_pretrained(out + ".again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(ids).logits, logits), "not the same after save_pretrained"
assert again.generation_config.order == "left_to_right"
"""


def alone(name: str, ids: torch.Tensor, folder: Path, settings: dict[str, str]) -> dict[str, Any]:
    """What the model of that name on the Hub computes in a process of its own."""
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-c", ALONE, name, str(folder / "ids.pt"), str(folder / "out.pt")]
    outcome = subprocess.run(command, cwd=folder, env=settings, text=True, capture_output=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return torch.load(folder / "out.pt")


# base, ZeRO stage, dtype, shift, an existing id as the mask
TRAINED = [
    ("llama", 3, "fp32", True, None),
    ("llama_tied", 3, "bf16", True, None),
    ("llama_padded", 1, "fp32", True, None),  # the mask has a row already; 391 rows are no multiple of anything
    ("gpt2", 2, "fp32", True, None),
    ("mistral", 1, "bf16", False, None),
    ("mistral", 2, "fp32", True, 17),
    ("qwen3", 0, "fp32", True, 17),
]


def name_of(case: tuple) -> str:
    family, stage, dtype, shift, mask = case
    return f"{family}-zero{stage}-{dtype}{'' if shift else '-no_shift'}{'' if mask is None else '-existing_mask'}"


@pytest.fixture(scope="module", params=TRAINED, ids=name_of)
def trained(request, tiny_run):
    family, stage, dtype, shift, mask = request.param
    settings = {"train.steps": 3, "model.dtype": dtype, "diffusion.shift": str(shift).lower()}
    settings |= {} if mask is None else {"model.mask_token_id": mask}
    arguments, folder = tiny_run(f"export_{name_of(request.param)}", family, stage=stage, **settings)
    outcome = launch(2, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return arguments, folder


def test_the_exported_model_is_the_trained_one(trained, hub, tmp_path):
    """Pushed, and pulled by a process that cannot import this project: its logits, to the bit; by transformers' own
    class, nearly; its held-out loss, the run's."""
    arguments, folder = trained
    ids = torch.randint(0, 384, (3, 32), generator=torch.Generator().manual_seed(5))
    torch.save(ids, tmp_path / "ids.pt")
    script = ["tests/scripts/trained_logits.py", str(tmp_path / "ids.pt"), str(tmp_path / "trained.pt")]
    outcome = launch(2, [*script, *arguments])
    assert outcome.returncode == 0, outcome.stderr[-3000:]

    exported = export(folder, tmp_path / "exported")
    push(exported, "team/model")
    out = alone("team/model", ids, tmp_path, environment(hub, tmp_path / "hf"))
    assert out["stock_difference"] < (1e-4 if out["logits"].dtype == torch.float32 else 0.1)
    assert torch.equal(out["logits"], torch.load(tmp_path / "trained.pt"))
    # in bf16 a row alone and in a batch round differently
    tolerance = 1e-5 if out["logits"].dtype == torch.float32 else 0.03
    assert read_metrics(folder)[-1]["val_nelbo"] == pytest.approx(held_out_nelbo(exported, folder), rel=tolerance)


def test_parameter_names_are_the_base_architectures(trained, tmp_path):
    """So the weights also load into the stock class, and continued adaptation starts from them."""
    _, folder = trained
    exported = export(folder, tmp_path / "exported")
    stock, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(stock).__module__.startswith("transformers.")
    config = json.loads((exported / "config.json").read_text())
    shift = load_config(RunConfig, folder / "config.yaml").diffusion.shift
    mask = load_config(RunConfig, folder / "config.yaml").model.mask_token_id
    assert config["mask_token_id"] == (384 if mask is None else mask) and config["diffusion"]["shift"] is shift
    assert config["diffusion"]["step"] == 3 and set(config["auto_map"]) == {"AutoModel", "AutoModelForMaskedLM"}
    card = (exported / "README.md").read_text()
    assert "library_name: transformers" in card and "| 3 |" in card and "3 steps, 768 tokens" in card
    assert ("there is no shift" in card) is not shift
    assert not list(exported.glob("*.bin")) and list(exported.glob("*.safetensors"))


@pytest.fixture(scope="module")
def small_run(tiny_run):
    arguments, folder = tiny_run("export_small", **{"train.steps": 2, "checkpoint.every": 1})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return folder


def test_step_zero_is_the_untrained_base(small_run, tmp_path, base_dir):
    exported = export(small_run, tmp_path / "zero", step=0)
    zero = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    base = AutoModelForCausalLM.from_pretrained(base_dir("llama")).state_dict()
    assert all(torch.equal(value[: len(base[name])], base[name]) for name, value in zero.items())
    two = AutoModelForCausalLM.from_pretrained(export(small_run, tmp_path / "two")).state_dict()
    assert not torch.equal(two["lm_head.weight"], zero["lm_head.weight"])
    assert read_metrics(small_run)[0]["val_nelbo"] == pytest.approx(held_out_nelbo(exported, small_run), rel=1e-5)


@pytest.mark.parametrize(("family", "stage"), [("llama", 0), ("llama", 3), ("gpt2", 3)])
def test_step_zero_of_a_new_model_has_the_weights_that_the_run_began_with(family, stage, tiny_run, tmp_path):
    settings = {"model.init": "random", "train.seed": 7, "train.steps": 1, "checkpoint.keep": 0}
    arguments, folder = tiny_run(f"export_random_{family}_{stage}", family, stage=stage, **settings)
    outcome = launch(1 if stage == 0 else 2, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    exported = export(folder, tmp_path / "zero", step=0)
    assert read_metrics(folder)[0]["val_nelbo"] == pytest.approx(held_out_nelbo(exported, folder), rel=1e-5)
    assert "A new model with the tokenizer of" in (exported / "README.md").read_text()


def test_an_older_step_and_another_dtype(small_run, tmp_path):
    one, two = (export(small_run, tmp_path / str(step), step=step) for step in (1, 2))
    assert json.loads((one / "config.json").read_text())["diffusion"]["step"] == 1
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert any(not torch.equal(a[name], b[name]) for name in a)
    exported = export(small_run, tmp_path / "half", dtype="bf16")
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    half = load_file(exported / "model.safetensors")
    assert all(torch.equal(half[name], b[name].bfloat16()) for name in b)


def test_written_in_several_files_it_is_the_same(trained, tmp_path):
    _, folder = trained
    whole = export(folder, tmp_path / "whole")
    parts = export(folder, tmp_path / "parts", max_shard_size="20KB")
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    read = [(name, tensor, file.name) for file in files for name, tensor in load_file(file).items()]
    expected = load_file(whole / "model.safetensors")
    assert sorted(name for name, *_ in read) == sorted(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor, _ in read)
    for file in files:  # a weight larger than a file has one to itself
        sizes = [tensor.nbytes for _, tensor, where in read if where == file.name]
        assert len(sizes) == 1 or sum(sizes) <= 20_000
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, _, file in read}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    _, info = AutoModelForCausalLM.from_pretrained(parts, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_checkpoint_of_another_shape_is_refused_before_anything_is_written(small_run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(small_run, other)
    config = json.loads((other / "model" / "config.json").read_text())
    (other / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \(385, 32\), expected \(400, 32\)"):
        export(other, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_whose_configuration_has_old_names(small_run, tmp_path):
    old = tmp_path / "run"
    shutil.copytree(small_run, old)
    text = (old / "config.yaml").read_text()
    assert "  time_sampling: independent" in text
    (old / "config.yaml").write_text(text.replace("  time_sampling:", "  times:"))
    a, b = (load_file(export(run, tmp_path / run.parent.name) / "model.safetensors") for run in (old, small_run))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_errors(small_run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty"):
        export(small_run, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="no checkpoint of step 7; it has step_00000001, step_00000002"):
        export(small_run, tmp_path / "x", step=7)
    with pytest.raises(UserError, match=r"config\.yaml not found"):
        export(tmp_path, tmp_path / "x")
    with pytest.raises(UserError, match="--max_shard_size is '4', expected a number and a unit"):
        export(small_run, tmp_path / "x", max_shard_size="4")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.tmp").exists()


def test_an_exported_model_can_be_adapted_further(small_run, tmp_path, tiny_run):
    """On the same shards, from the same weights, the mask's embedding among them."""
    exported = export(small_run, tmp_path / "exported")
    arguments, folder = tiny_run("further", **{"model.base": exported, "train.steps": 1})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert read_metrics(folder)[0]["val_nelbo"] == pytest.approx(read_metrics(small_run)[-1]["val_nelbo"], rel=1e-6)


def test_exports_with_the_former_class_name_load_with_this_projects_code(small_run, tmp_path):
    exported = export(small_run, tmp_path / "exported")
    config = json.loads((exported / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(config["auto_map"], "modeling_diffullama.DiffuLlamaForMaskedLM")
    (exported / "config.json").write_text(json.dumps(config))
    model, _ = load(str(exported))
    assert all(
        torch.equal(w, model.state_dict()[name]) for name, w in load_file(exported / "model.safetensors").items()
    )


def test_an_export_that_is_not_the_trained_model_is_not_kept(small_run, tmp_path, monkeypatch):
    """A weight that is changed on its way to the disk, in the trained dtype and in another."""
    from tools import export as module

    save = module.save_weights

    def change(weights, files, dtype, folder):
        save(weights, files, dtype, folder)
        (path,) = folder.glob("*.safetensors")
        tensors = load_file(path)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(module, "save_weights", change)
    for dtype in ("auto", "bf16"):
        with pytest.raises(UserError, match="the written weights are not the trained ones; nothing was kept"):
            export(small_run, tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_it_says_what_another_dtype_changes(small_run, tmp_path, caplog):
    caplog.set_level("INFO")
    export(small_run, tmp_path / "same")
    assert "parity: the exported logits are the trained ones, bit for bit" in caplog.text
    caplog.clear()
    export(small_run, tmp_path / "half", dtype="bf16")
    half, same = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("half", "same"))
    ids = fixed_batch(same.config, same.config.vocab_size)
    with torch.no_grad():
        difference = (half(ids).logits.float() - same(ids).logits).abs().max().item()
    said = float(re.search(r"differ by at most ([\d.e-]+)", caplog.text)[1])
    assert said == pytest.approx(difference, rel=0.1)


def test_an_export_killed_while_it_writes_leaves_nothing_under_its_name(small_run, tmp_path):
    """And the next one works. It is killed by itself, after its first file of weights."""
    program = (
        "import os, signal, sys; from tools import export, weights; save = weights.save_file\n"
        "def save_and_die(*a, **k): save(*a, **k); os.kill(os.getpid(), signal.SIGKILL)\n"
        "weights.save_file = save_and_die; export.export(sys.argv[1], sys.argv[2], max_shard_size='20KB')"
    )
    out = tmp_path / "out"
    outcome = subprocess.run([sys.executable, "-c", program, str(small_run), str(out)], check=False, cwd=ROOT)
    assert outcome.returncode == -9
    assert not out.exists() and not (tmp_path / "out.tmp" / "config.json").exists()
    assert export(small_run, out) == out and not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("stage", [0, 2])
def test_fp32_weights_of_a_bf16_run_are_the_optimizers(stage, tiny_run, tmp_path):
    settings = {"train.steps": 2, "model.dtype": "bf16"}
    arguments, folder = tiny_run(f"export_masters_{stage}", "gpt2", stage=stage, **settings)
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    whole = load_file(export(folder, tmp_path / "whole", dtype="fp32") / "model.safetensors")
    half = load_file(export(folder, tmp_path / "half") / "model.safetensors")
    assert all(torch.equal(whole[name].bfloat16(), half[name]) for name in whole)
    rounded = [name for name in whole if torch.equal(whole[name], half[name].float())]
    assert len(rounded) < len(whole) / 2, "these are not the optimizer's fp32 weights"


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_as_autoregressive_gives_the_base_back(family, tiny_run, base_dir, tmp_path):
    arguments, folder = tiny_run(f"export_back_{family}", family, **{"train.steps": 1})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    base = base_dir(family)
    before = export(folder, tmp_path / "before", step=0, target="autoregressive")
    assert (before / "config.json").read_text() == (base / "config.json").read_text()
    a, b = (load_file(path / "model.safetensors") for path in (before, base))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    assert AutoTokenizer.from_pretrained(before).mask_token is None and not list(before.glob("*.py"))
    assert (before / "generation_config.json").read_text() == (base / "generation_config.json").read_text()
    after = load_file(export(folder, tmp_path / "after", target="autoregressive") / "model.safetensors")
    trained = load_file(export(folder, tmp_path / "trained") / "model.safetensors")
    assert after.keys() == trained.keys()
    for name, weight in after.items():
        assert torch.equal(weight, trained[name][: len(weight)]) and weight.shape == b[name].shape
    card = (tmp_path / "after" / "README.md").read_text()
    assert "in its base's architecture" in card and "diffusion_generate" not in card


def test_a_new_model_has_no_base_to_give_back(tiny_run, tmp_path):
    arguments, folder = tiny_run("export_no_base", **{"model.init": "random", "train.steps": 1})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    with pytest.raises(UserError, match="began without a base"):
        export(folder, tmp_path / "out", target="autoregressive")


def test_the_card_says_how_it_was_made(small_run, tmp_path, base_dir, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    base = tmp_path / "a base"
    shutil.copytree(base_dir("llama"), base)
    front = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE.txt\n---\nA base\n"
    (base / "README.md").write_text(front)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"base: {base_dir('llama')}", f"base: {base}"))
    (run / "evaluation.md").write_text("| task | {accuracy} |\n| --- | --- |\n| piqa | 0.5 |\n")
    exported = export(run, tmp_path / "out", step=1)
    card = ModelCard.load(exported / "README.md")
    said = card.data.to_dict()
    assert (said["license"], said["license_name"], said["license_link"]) == ("other", "mine", "LICENSE.txt")
    assert "base_model" not in said and said["library_name"] == "transformers" and "diffusion" in said["tags"]
    assert said["pipeline_tag"] == "fill-mask"
    assert "| piqa | 0.5 |" in card.text and "{accuracy}" in card.text
    assert "| short | 3 |" in card.text and "| long | 1 |" in card.text, "the corpus"
    assert (
        "| learning rate |" in card.text and "annealed: bernoulli" in card.text and "1 steps, 256 tokens" in card.text
    )
    assert "| 2 | 512 |" not in card.text, "nothing of later steps"
    assert (exported / "loss.png").read_bytes()[1:4] == b"PNG" and "(loss.png)" in card.text
    assert "row i predicts token i + 1" in card.text and str(tmp_path) not in card.text
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in ModelCard.load(export(run, tmp_path / "odd") / "README.md").data.to_dict()


def test_where_it_may_be_written(small_run, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert (export(small_run, tmp_path / "link") / "config.json").exists()
    assert (tmp_path / "real" / "config.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        export(small_run, tmp_path / "file")
    with pytest.raises(UserError, match="--max_shard_size is '-1GB'"):
        export(small_run, tmp_path / "x", max_shard_size="-1GB")
    monkeypatch.chdir(tmp_path)
    assert (export(small_run, "new/../here") / "config.json").exists() and (tmp_path / "here").exists()
    with pytest.raises(SystemExit):
        export_main([str(small_run), "x", "--for", "nobody"])
    assert export_main([str(small_run), "x", "--for", "llama.cpp", "--as_autoregressive"]) == 2


def test_a_checkpoint_that_training_deletes_meanwhile(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    for file in (run / "checkpoints" / "step_00000002").glob("*model_states.pt"):
        with pytest.raises(UserError, match="holds no model"):
            file.unlink()
            trained_weights(file.parent, 3)
