"""The tools on an autoregressive run: a plain model of transformers, a verdict and a figure without masks or times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from pretrain.data import TrainData
from pretrain.runtime.metrics import read_metrics
from tools import figures, generate, health
from tools.export import export

pytestmark = pytest.mark.slow

# Runs where this project cannot be imported, and no code beside the weights may run.
ALONE = """
import sys
for name in ("common", "pretrain", "data_prep", "tools"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path).eval()
assert type(model).__module__.startswith("transformers.models.")
ids = torch.load(ids)
with torch.no_grad():
    torch.save(model(ids).logits, out)
text = model.generate(ids[:1, :8], max_new_tokens=4, do_sample=False)
assert len(AutoTokenizer.from_pretrained(path).decode(text[0])) > 0
"""


@pytest.fixture(scope="module", params=[("llama", 3, "fp32"), ("gpt2", 1, "bf16")], ids=lambda p: p[0])
def run(request, tiny_run):
    """(arguments of pretrain/main.py, run folder) of a run on two ranks."""
    family, stage, dtype = request.param
    settings = {"objective": "autoregressive", "train.steps": 8, "model.dtype": dtype, "validation.every": 2}
    arguments, folder = tiny_run(f"autoregressive_{family}", family, stage=stage, **settings)
    outcome = launch(2, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return arguments, folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    return export(run[1], tmp_path_factory.mktemp("autoregressive") / "exported")


def test_the_export_is_the_trained_model(run, exported, tmp_path):
    """Its logits, in a process that has nothing but transformers. The engine's stand one position later: its
    `logits[:, i]` predict token i."""
    arguments, _ = run
    ids = torch.randint(0, 384, (3, 32), generator=torch.Generator().manual_seed(5))
    torch.save(ids, tmp_path / "ids.pt")
    script = ["tests/scripts/trained_logits.py", str(tmp_path / "ids.pt"), str(tmp_path / "trained.pt")]
    outcome = launch(2, [*script, *arguments])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(exported), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt")]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    trained, shipped = torch.load(tmp_path / "trained.pt"), torch.load(tmp_path / "out.pt")
    assert torch.equal(trained[:, 1:], shipped[:, :-1])


def test_the_export_is_a_plain_model(run, exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] in (["LlamaForCausalLM"], ["GPT2LMHeadModel"])
    assert config["vocab_size"] == 384 and config["use_cache"] is True
    assert not {"auto_map", "diffusion", "mask_token_id"} & set(config)
    assert not list(exported.glob("*.py"))
    assert AutoTokenizer.from_pretrained(exported).mask_token is None
    card = (exported / "README.md").read_text()
    assert "# An autoregressive language model" in card and "trust_remote_code" not in card and "diffusion" not in card
    assert "| 8 |" in card and "8 steps, 2,048 tokens" in card


def test_its_loss_is_the_one_that_training_reported(run, exported):
    arguments, folder = run
    path = next(a.partition("=")[2] for a in arguments if a.startswith("data.path="))
    model = AutoModelForCausalLM.from_pretrained(exported)
    rows = [source.row(row) for source, row, *_ in TrainData(path, seed=0).held_out(6)]
    total, count = 0.0, 0
    for ids, lengths in rows:
        real = torch.from_numpy(ids[: lengths.sum()].astype(int))[None]
        with torch.no_grad():
            total += model(input_ids=real, labels=real).loss.item() * (real.shape[1] - 1)
        count += real.shape[1] - 1
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.03
    assert read_metrics(folder)[-1]["val_loss"] == pytest.approx(total / count, rel=tolerance)


def test_step_zero_is_the_base(run, base_dir, tmp_path):
    _, folder = run
    exported = AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "zero", step=0))
    base = AutoModelForCausalLM.from_pretrained(base_dir(exported.config.model_type), dtype=exported.dtype)
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in base.state_dict().items())


def test_it_can_be_the_base_of_a_diffusion_run(run, exported, tiny_run, tmp_path):
    """Which begins with its weights and a mask token more."""
    settings = {"model.base": exported, "train.steps": 1, "checkpoint.keep": 0}
    arguments, folder = tiny_run(f"adapted_{run[1].name}", **settings)
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    adapted = export(folder, tmp_path / "adapted", step=0)
    assert json.loads((adapted / "config.json").read_text())["diffusion"]["shift"] is True
    base = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).state_dict()
    begun = AutoModelForCausalLM.from_pretrained(adapted).state_dict()
    assert all(torch.equal(value[: len(base[name])], base[name]) for name, value in begun.items())
    assert begun["lm_head.weight"].shape[0] == 385


def test_a_diffusion_export_can_be_trained_autoregressively(tiny_run, tmp_path):
    """Nothing of diffusion is left in what it ships: neither entry nor code."""
    arguments, diffusion = tiny_run("diffusion_first", **{"train.steps": 1})
    assert launch(1, arguments).returncode == 0
    base = export(diffusion, tmp_path / "diffusion")
    arguments, folder = tiny_run(
        "autoregressive_again", **{"objective": "autoregressive", "model.base": base, "train.steps": 1}
    )
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    again = export(folder, tmp_path / "again")
    assert not {"auto_map", "diffusion", "mask_token_id"} & set(json.loads((again / "config.json").read_text()))
    assert not list(again.glob("*.py"))
    with pytest.raises(UserError, match="cannot be compared"):
        figures.loss_figure([diffusion, folder], tmp_path / "both.png")


def test_generate_says_what_it_is(exported, capsys):
    assert generate.main([str(exported), "--length", "4"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "is an autoregressive model" in lines[0]


def test_health_and_figure(run, tmp_path, capsys):
    from PIL import Image

    _, folder = run
    assert health.main([str(folder)]) in (0, 1)
    verdict = capsys.readouterr().out
    assert "step 8 of 8" in verdict and "held-out loss" in verdict and "accuracy" in verdict
    assert figures.main(["loss", str(folder), "--output", str(tmp_path / "loss.png")]) == 0
    for picture in (folder / "health.png", tmp_path / "loss.png"):
        with Image.open(picture) as image:
            assert len(set(image.convert("L").resize((100, 100)).tobytes())) > 20
