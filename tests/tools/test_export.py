"""What trained is what ships: exported checkpoints against the engine that trained them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import launch

from common.errors import UserError
from pretrain.data import TrainData
from pretrain.telemetry import read_metrics
from tools.export import export

# Runs where this project cannot be imported, with nothing but transformers.
ALONE = """
import sys
for name in ("pretrain", "data_prep", "tools"):
    sys.modules[name] = None
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
path, ids, out = sys.argv[1:]
ids = torch.load(ids)
model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
other = AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(path)
with torch.no_grad():
    logits = model(ids).logits
    assert torch.equal(logits, other(ids).logits)
    changed = ids.clone(); changed[:, -1] += 1
    assert not torch.equal(model(changed).logits[:, 2], logits[:, 2]), "not bidirectional"
masked = ids.clone(); masked[:, 3:9] = tokenizer.mask_token_id
filled = model.diffusion_generate(masked, steps=4, generator=torch.Generator().manual_seed(0))
assert not (filled == tokenizer.mask_token_id).any()
assert torch.equal(filled[:, :3], ids[:, :3]) and torch.equal(filled[:, 9:], ids[:, 9:])
assert tokenizer.mask_token_id == model.config.mask_token_id
torch.save({"logits": logits, "filled": filled}, out)
model.save_pretrained(out + ".again")
again = AutoModel.from_pretrained(out + ".again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(ids).logits, logits), "not the same after save_pretrained"
"""


def alone(checkpoint: Path, ids: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    torch.save(ids, folder / "ids.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_HOME"] = str(folder / "hf")  # where transformers keeps the remote code
    command = [sys.executable, "-c", ALONE, str(checkpoint), str(folder / "ids.pt"), str(folder / "out.pt")]
    outcome = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return torch.load(folder / "out.pt")


TRAINED = [
    ("llama", 3, "fp32"),
    ("llama_tied", 3, "bf16"),
    ("gpt2", 2, "fp32"),
    ("mistral", 1, "bf16"),
    ("qwen3", 0, "fp32"),
]


@pytest.fixture(scope="module", params=TRAINED, ids=lambda p: f"{p[0]}-zero{p[1]}-{p[2]}")
def trained(request, tiny_run):
    family, stage, dtype = request.param
    arguments, folder = tiny_run(f"export_{family}", family, stage=stage, **{"train.steps": 2, "model.dtype": dtype})
    outcome = launch(2, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return arguments, folder


def test_the_exported_model_is_the_trained_one(trained, tmp_path):
    """Its logits, to the bit, in a process that cannot import this project; its held-out loss, the run's."""
    arguments, folder = trained
    ids = torch.randint(0, 384, (3, 32), generator=torch.Generator().manual_seed(5))
    torch.save(ids, tmp_path / "ids.pt")
    script = ["tests/scripts/trained_logits.py", str(tmp_path / "ids.pt"), str(tmp_path / "trained.pt")]
    outcome = launch(2, [*script, *arguments])
    assert outcome.returncode == 0, outcome.stderr[-3000:]

    out = alone(export(folder, tmp_path / "exported"), ids, tmp_path)
    assert torch.equal(out["logits"], torch.load(tmp_path / "trained.pt"))

    from tools.generate import load

    model, _ = load(str(tmp_path / "exported"))
    data = TrainData(arguments_value(arguments, "data.path"), 384, seed=0)
    weighted, count = 0.0, 0
    with torch.no_grad():
        for s in data.validation_samples(6):
            logits = model(torch.from_numpy(s.xt)[None]).logits[0].double()
            nll = -logits.log_softmax(-1)[torch.arange(32), torch.from_numpy(s.x0)]
            weighted, count = weighted + nll[torch.from_numpy(s.masked)].sum().item() / s.t, count + s.maskable.sum()
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.03  # in bf16 a row alone and in a batch round differently
    assert read_metrics(folder)[-1]["val_nelbo"] == pytest.approx(weighted / count, rel=tolerance)


def arguments_value(arguments: list[str], key: str) -> str:
    return next(a.partition("=")[2] for a in arguments if a.startswith(key + "="))


def test_parameter_names_are_the_base_architectures(trained, tmp_path, base_dir):
    """So the weights also load into the stock class, and continued adaptation starts from them."""
    from transformers import AutoModelForCausalLM

    _, folder = trained
    exported = export(folder, tmp_path / "exported")
    stock, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(stock).__module__.startswith("transformers.")
    config = json.loads((exported / "config.json").read_text())
    assert config["mask_token_id"] == 384 and config["diffusion"]["shift"] is True
    assert config["diffusion"]["step"] == 2 and set(config["auto_map"]) == {"AutoModel", "AutoModelForMaskedLM"}
    card = (exported / "README.md").read_text()
    assert "library_name: transformers" in card and "| 2 |" in card and "2 steps, 512 tokens" in card
    assert not list(exported.glob("*.bin")) and list(exported.glob("*.safetensors"))


@pytest.fixture(scope="module")
def small_run(tiny_run):
    arguments, folder = tiny_run("export_small", **{"train.steps": 2, "checkpoint.every": 1})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return folder


def test_step_zero_is_the_untrained_base(small_run, tmp_path, base_dir):
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(export(small_run, tmp_path / "zero", step=0)).state_dict()
    base = AutoModelForCausalLM.from_pretrained(base_dir("llama")).state_dict()
    assert all(torch.equal(value[: len(base[name])], base[name]) for name, value in exported.items())
    assert not torch.equal(
        AutoModelForCausalLM.from_pretrained(export(small_run, tmp_path / "two")).state_dict()["lm_head.weight"],
        exported["lm_head.weight"],
    )


def test_an_older_step_and_another_dtype(small_run, tmp_path):
    from safetensors.torch import load_file

    one, two = (export(small_run, tmp_path / str(step), step=step) for step in (1, 2))
    assert json.loads((one / "config.json").read_text())["diffusion"]["step"] == 1
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert any(not torch.equal(a[name], b[name]) for name in a)
    half = load_file(export(small_run, tmp_path / "half", dtype="bf16") / "model.safetensors")
    assert all(torch.equal(half[name], b[name].bfloat16()) for name in b)


def test_written_in_several_files_it_is_the_same(trained, tmp_path, monkeypatch):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    _, folder = trained
    whole = export(folder, tmp_path / "whole")
    monkeypatch.setattr("tools.export.SHARD_BYTES", 20_000)
    parts = export(folder, tmp_path / "parts")
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
    _, info = AutoModelForCausalLM.from_pretrained(parts, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_checkpoint_of_another_shape_is_refused_before_anything_is_written(small_run, tmp_path):
    import shutil

    other = tmp_path / "run"
    shutil.copytree(small_run, other)
    config = json.loads((other / "model" / "config.json").read_text())
    (other / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    with pytest.raises(UserError, match="does not fit the run's configuration"):
        export(other, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


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


def test_an_exported_model_can_be_adapted_further(small_run, tmp_path, tiny_run):
    """On the same shards, from the same weights, the mask's embedding among them."""
    exported = export(small_run, tmp_path / "exported")
    arguments, folder = tiny_run("further", **{"model.base": exported, "train.steps": 1})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert read_metrics(folder)[0]["val_nelbo"] == pytest.approx(read_metrics(small_run)[-1]["val_nelbo"], rel=1e-6)
