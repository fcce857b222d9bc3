import json
import re

import pytest
from conftest import ROOT

from common.config import load_config, save_config
from common.errors import UserError
from data_prep.config import PrepareConfig, check_prepare
from pretrain import deepspeed_config
from pretrain.config import RunConfig, accumulation_steps, check_run, total_steps
from pretrain.main import main

RUNS = sorted((ROOT / "pretrain" / "configs").glob("*.yaml"))
ZERO = sorted((ROOT / "ds_configs").glob("*.json"))


def test_precedence_and_round_trip(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {steps: 7, seed: 5}\noptimizer: {lr: 1e-5}\n")
    config = load_config(RunConfig, tmp_path / "c.yaml", ["train.seed=9", "data.weights={a: 1, b: 2}"])
    assert (config.train.steps, config.train.seed, config.train.micro_batch_size) == (7, 9, 8)
    assert config.optimizer.lr == 1e-5 and config.data.weights == {"a": 1.0, "b": 2.0}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(RunConfig, tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {stpes: 3}", [], r"c\.yaml: unknown key 'train.stpes'; known here: steps, tokens"),
        ("trian: {}", [], "unknown key 'trian'; known here: run_dir, model"),
        ("train: {steps: many}", [], "'many' of type 'str' could not be converted to Integer"),
        ("annealing: {form: windoww}", [], "expected one of"),
        ("- a\n- b", [], "expected `key: value`"),
        ("a: [", [], "not valid YAML"),
        ("{}", ["train.stpes=3"], "override 'train.stpes=3': unknown key"),
        ("{}", ["train.steps"], "expected key=value"),
        ("{}", ["train.steps=x"], "could not be converted to Integer"),
    ],
)
def test_errors_name_file_and_key(tmp_path, text, overrides, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, tmp_path / "c.yaml", overrides)


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=0",
        "train.global_batch_size=0",
        "optimizer.lr=0",
        "optimizer.warmup_steps=-1",
        "diffusion.eps=0",
        "optimizer.min_lr_ratio=2",
        "validation.times=[0]",
        "annealing.steps=0",
        "train.tokens=-1",
    ],
)
def test_values_that_cannot_work(override):
    with pytest.raises(UserError, match=override.partition("=")[0].replace("[", r"\[")):
        check_run(load_config(RunConfig, None, [override]))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_ready_run_configurations(path, capsys):
    ranks = {"diffullama_7b": 16, "demo": 2}.get(path.stem, 8)
    check_run(load_config(RunConfig, path))
    assert main(["--config", str(path), "--dry_run", "--world_size", str(ranks)]) == 0
    page = capsys.readouterr().out
    expected = {
        "diffugpt_s": ["124.4M parameters", "131,072 tokens a step", "1,000,000 = 131.07B tokens"],
        "diffugpt_m": ["354.8M parameters", "1,310,720 tokens a step", "160,000 = 209.72B tokens"],
        "diffullama_7b": ["6,738.4M parameters", "60 × accumulation 4 × 16", "8,266 = 65.01B tokens", "1.5e-05"],
        "demo": ["2,048 tokens a step"],
    }
    for text in expected[path.stem]:
        assert text in page


def test_dry_run_of_a_batch_that_does_not_divide(capsys):
    assert main(["--config", str(RUNS[0]), "--dry_run", "--world_size", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: train.global_batch_size") and "try global_batch_size=12" in error


def test_memory_is_divided_by_stage():
    """Model states as in the ZeRO paper's Table 1: 16 bytes a parameter, then 4 + 12/N, 2 + 14/N, 16/N."""
    from transformers import AutoConfig

    from pretrain.plan import memory_per_rank

    config = load_config(RunConfig, None, ["train.global_batch_size=64", "train.micro_batch_size=1"])
    shape = AutoConfig.for_model("llama")
    found = {}
    for stage in range(4):
        ds = deepspeed_config.resolve(ROOT / f"ds_configs/zero{stage}.json", config, "bf16", 64, 64)
        memory = memory_per_rank(7_500_000_000, shape, config, ds, 16, 64)
        found[stage] = sum(memory[name] for name in ("weights", "gradients", "optimizer")) / 1e9
    assert [round(found[stage], 1) for stage in range(4)] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize("path", sorted((ROOT / "data_prep" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_data_configurations(path):
    check_prepare(load_config(PrepareConfig, path))


def test_rows_fit_the_models_they_are_for():
    for run, prep in (
        ("diffugpt_s", "fineweb_512"),
        ("diffugpt_m", "fineweb_1024"),
        ("diffullama_7b", "slimpajama_starcoder"),
    ):
        config = load_config(RunConfig, ROOT / f"pretrain/configs/{run}.yaml")
        corpus = load_config(PrepareConfig, ROOT / f"data_prep/configs/{prep}.yaml")
        assert config.data.path == corpus.output_dir and config.train.seq_len == corpus.seq_len
        assert corpus.tokenizer == config.model.base.replace("gpt2-medium", "gpt2")  # one tokenizer for all GPT-2


def test_accumulation_and_steps():
    config = load_config(RunConfig, None, ["train.global_batch_size=24", "train.micro_batch_size=2"])
    assert [accumulation_steps(config, ranks) for ranks in (1, 2, 3, 12)] == [12, 6, 4, 1]
    with pytest.raises(UserError, match=r"24 is not a multiple of train\.micro_batch_size 2 × 5 ranks = 10"):
        accumulation_steps(config, 5)
    config.train.steps, config.train.tokens = 100, 24 * 16 * 7 - 3
    assert total_steps(config, 16) == 7
    config.train.tokens = 10**9
    assert total_steps(config, 16) == 100


@pytest.mark.parametrize("path", ZERO, ids=lambda path: path.stem)
def test_auto_becomes_the_run_configurations_value(path):
    config = load_config(
        RunConfig, None, ["train.global_batch_size=24", "train.micro_batch_size=2", "optimizer.lr=0.5"]
    )
    resolved = deepspeed_config.resolve(path, config, "bf16", 64, 3)
    assert resolved["train_batch_size"] == 24 and resolved["gradient_accumulation_steps"] == 4
    assert resolved["optimizer"]["params"]["lr"] == 0.5 and resolved["bf16"]["enabled"] is True
    assert not re.search('"auto"', json.dumps(resolved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, but train.global_batch_size gives 24"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "optimizer.params.lr is 0.1, but optimizer.lr"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but model.dtype gives True"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove scheduler; optimizer.schedule"),
        ({"fp16": {"enabled": True}}, "remove fp16"),
        ({"flops_profiler": {"profile_step": "auto"}}, "nothing owns the \"auto\" of flops_profiler.profile_step"),
    ],
)  # fmt: skip
def test_contradictions_are_errors(tmp_path, change, message):
    content = json.loads((ROOT / "ds_configs/zero3.json").read_text()) | change
    (tmp_path / "ds.json").write_text(json.dumps(content))
    config = load_config(RunConfig, None, ["train.global_batch_size=24", "train.micro_batch_size=2"])
    with pytest.raises(UserError, match=message):
        deepspeed_config.resolve(tmp_path / "ds.json", config, "bf16", 64, 3)
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        deepspeed_config.resolve(tmp_path / "ds.json", config, "bf16", 64, 3)
