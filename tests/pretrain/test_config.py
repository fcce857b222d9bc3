import json
import re
import typing

import pytest
import torch
from helpers import ROOT

from common.config import check_bounds, fixed_settings, load_config, save_config, walk
from common.errors import UserError
from data_prep.config import PrepareConfig, check_prepare
from pretrain import adapt, deepspeed_config
from pretrain.config import RunConfig, accumulation_steps, check_run, total_steps
from pretrain.main import main
from pretrain.runtime import resume
from pretrain.runtime.resume import check_same_run

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
        ("trian: {}", [], "unknown key 'trian'; known here: run_dir, objective, model"),
        ("train: {steps: many}", [], "'many' of type 'str' could not be converted to Integer"),
        ("annealing: {schedule: linearly}", [], "expected one of"),
        ("objective: masked", [], "expected one of"),
        ("- a\n- b", [], "expected `key: value`"),
        ("a: [", [], "not valid YAML"),
        ("{}", ["train.stpes=3"], "override 'train.stpes=3': unknown key"),
        ("{}", ["train.steps"], "expected key=value"),
        ("{}", ["train.steps=x"], "could not be converted to Integer"),
        ("data: {path: [a, b]}", ["data.path.c=1"], "override 'data.path.c=1': invalid literal for int"),
    ],
)
def test_errors_name_file_and_key(tmp_path, text, overrides, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, tmp_path / "c.yaml", overrides)


# Every limit, as it is promised; a list's holds for each element, and null is always allowed.
POSITIVE = [
    "train.steps",
    "train.tokens",
    "train.global_batch_size",
    "train.micro_batch_size",
    "optimizer.lr",
    "guards.max_skipped_in_a_row",
    "guards.spike_steps",
    "diffusion.eps",
    "validation.times",
    "evaluation.draws",
]
NOT_NEGATIVE = [
    "train.seed",
    "train.exit_interval",
    "train.max_minutes",
    "annealing.steps",
    "optimizer.betas",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "optimizer.min_lr_ratio",
    "optimizer.decay_fraction",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "validation.every",
    "validation.rows",
    "guards.spike_factor",
    "guards.max_rollbacks",
    "guards.stall_minutes",
    "evaluation.every",
    "evaluation.limit",
    "evaluation.wait_minutes",
]
AT_MOST_ONE = ["optimizer.min_lr_ratio", "optimizer.decay_fraction", "validation.times"]
LIMITS = [
    *(("above", name, 0) for name in POSITIVE),
    *(("at_least", name, 0) for name in NOT_NEGATIVE),
    *(("at_most", name, 1) for name in AT_MOST_ONE),
    ("at_least", "annealing.stages", 1),
    ("at_least", "train.seq_len", 2),
    ("below", "diffusion.eps", 1),
    ("below", "optimizer.betas", 1),
]
KINDS = ("above", "at_least", "below", "at_most")
WORDS = {"above": "more than {}", "at_least": "{} or more", "below": "less than {}", "at_most": "at most {}"}


def replaced(name: str, value: object) -> RunConfig:
    """The default configuration with one other value, of whatever kind."""
    config = RunConfig()
    section, _, key = name.rpartition(".")
    setattr(getattr(config, section) if section else config, key, value)
    return config


def test_every_limit_is_one_of_these():
    found = [
        (kind, name, bound)
        for name, field, _ in walk(RunConfig())
        for kind, bound in zip(KINDS, field.metadata.get("bounds", ()))
        if bound is not None
    ]
    assert sorted(found) == sorted(LIMITS)


@pytest.mark.parametrize(("kind", "name", "bound"), LIMITS, ids=lambda value: str(value))
def test_a_value_beyond_its_limit_is_refused_and_its_edge_is_accepted(kind, name, bound):
    (field,) = [field for found, field, _ in walk(RunConfig()) if found == name]
    least = 1 if "int" in str(field.type) else 1e-6
    outside, edge = {
        "above": (bound, bound + least),
        "at_least": (bound - least, bound),
        "below": (bound, bound - least),
        "at_most": (bound + least, bound),
    }[kind]
    several = "list" in str(field.type)
    with pytest.raises(UserError, match=f"{re.escape(name)} is .*, expected .*{WORDS[kind].format(bound)}"):
        check_bounds(replaced(name, [0.5, outside] if several else outside))
    check_bounds(replaced(name, [0.5, edge] if several else edge))
    if "None" in str(field.type):
        check_bounds(replaced(name, None))


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


def test_settings_that_cannot_work_together():
    check_run(load_config(RunConfig, None, ["annealing.form=none", "annealing.steps=0"]))
    odd = ["diffusion.time_sampling=complementary", "train.global_batch_size=9"]
    with pytest.raises(UserError, match=r"global_batch_size is 9; .*complementary needs pairs"):
        check_run(load_config(RunConfig, None, odd))
    check_run(load_config(RunConfig, None, [odd[0], "train.global_batch_size=8"]))
    check_run(load_config(RunConfig, None, [*odd, "objective=autoregressive"]))  # which has no times
    with pytest.raises(UserError, match=r"eps is 0\.6; complementary times t and 1 - t need less than 0\.5"):
        check_run(load_config(RunConfig, None, [odd[0], "train.global_batch_size=8", "diffusion.eps=0.6"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tasks=piqa"], "evaluation.tasks is 'piqa', but evaluation.every is 0"),
        (["every=1000"], "evaluation.every is 1000, but evaluation.tasks names no task"),
        (["tasks=piqa", "every=1500"], "is 1500, expected a multiple of checkpoint.every, which is 1000; try"),
        (["tasks=piqa", "every=1000", "checkpoint.every=0"], "expected a multiple of checkpoint.every, which is 0"),
        (["tasks=piqa", "every=1000", "checkpoint.keep=0"], "checkpoint.keep is 0; set it to 1 or more"),
    ],
)
def test_an_evaluation_needs_tasks_and_checkpoints(settings, message):
    overrides = [text if text.startswith("checkpoint") else f"evaluation.{text}" for text in settings]
    for objective in ("masked_diffusion", "autoregressive"):
        with pytest.raises(UserError, match=re.escape(message)):
            check_run(load_config(RunConfig, None, [*overrides, f"objective={objective}"]))
    check_run(load_config(RunConfig, None, ["evaluation.tasks=lambada,piqa", "evaluation.every=2000"]))


def test_an_unknown_form_names_those_that_there_are():
    with pytest.raises(UserError, match="'windoww', expected one of none, bernoulli, window, block"):
        check_run(load_config(RunConfig, None, ["annealing.form=windoww"]))
    for form in ("none", "bernoulli", "window", "block"):
        check_run(load_config(RunConfig, None, [f"annealing.form={form}"]))


# What a resumed run may change: how it is computed, watched and saved, and where things are; not what is computed.
MAY_CHANGE = (
    "run_dir",
    "model.attention",
    "model.loss",
    "model.activation_checkpointing",
    "model.compile",
    "model.liger",
    "data.path",
    "data.verify",
    "train.micro_batch_size",
    "train.exit_interval",
    "train.max_minutes",
    "checkpoint",
    "validation",
    "evaluation",
    "guards",
    "wandb",
)


def another(field, value: object) -> object:
    """A value of the setting's type that is not this one."""
    options = [option for option in typing.get_args(field.type) if isinstance(option, str)]
    if options:
        return next(option for option in options if option != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return tuple(v / 2 for v in value)
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, 0.5]
    if isinstance(value, dict):
        return {**value, "x": 1}
    return "x" if "str" in str(field.type) else 7  # None before


def may_change(name: str) -> bool:
    return any(name == free or name.startswith(free + ".") for free in MAY_CHANGE)


def test_a_resumed_run_may_change_these_settings_and_no_others(tmp_path, monkeypatch):
    """Asked of the function that decides it, setting by setting, against a run in the folder."""
    before = replaced("run_dir", str(tmp_path))
    save_config(before, tmp_path / "config.yaml")
    check_same_run(before)
    read = load_config(RunConfig, tmp_path / "config.yaml")
    monkeypatch.setattr(resume, "load_config", lambda *_: read)  # once, and not for every setting
    for name, field, value in walk(before):
        config = replaced(name, another(field, value))
        if name == "run_dir":
            assert name not in fixed_settings(before)
            continue
        config.run_dir = str(tmp_path)
        if may_change(name):
            check_same_run(config)
        else:
            with pytest.raises(UserError, match=f"holds a run with {re.escape(name)}="):
                check_same_run(config)
    config.checkpoint.allow_changes = True
    check_same_run(config)
    assert {name for name, *_ in walk(before)} - set(fixed_settings(before)) == {
        name for name, *_ in walk(before) if may_change(name)
    }


def test_a_run_at_a_constant_rate_may_become_longer(tmp_path):
    save_config(load_config(RunConfig, None, ["optimizer.schedule=constant"]), tmp_path / "config.yaml")
    longer = [f"run_dir={tmp_path}", "train.steps=2000", "train.tokens=123"]
    check_same_run(load_config(RunConfig, None, ["optimizer.schedule=constant", *longer]))
    save_config(RunConfig(), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"holds a run with train\.steps=1000, but 2000 was asked for"):
        check_same_run(load_config(RunConfig, None, longer))


def test_a_setting_that_was_renamed_keeps_its_old_name(tmp_path, caplog):
    """With a warning that says the new one; both at once, in one file, are an error."""
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("diffusion: {times: stratified, eps: 0.01}\n")
    config = load_config(RunConfig, old)
    assert config.diffusion.time_sampling == "stratified" and config.diffusion.eps == 0.01
    assert f"{old}: diffusion.times is now called diffusion.time_sampling" in caplog.text
    caplog.clear()
    config = load_config(RunConfig, None, ["diffusion.times=complementary"])
    assert config.diffusion.time_sampling == "complementary"
    assert "diffusion.times is now called diffusion.time_sampling" in caplog.text
    caplog.clear()
    assert load_config(RunConfig, old, ["diffusion.time_sampling=independent"]).diffusion.time_sampling == "independent"
    save_config(config, new)
    caplog.clear()
    assert load_config(RunConfig, new) == config and not caplog.text
    new.write_text("diffusion: {times: stratified, time_sampling: independent}\n")
    with pytest.raises(UserError, match=r"both diffusion\.times and diffusion\.time_sampling are set"):
        load_config(RunConfig, new)
    new.write_text("diffusion: {times: sometimes}\n")
    with pytest.raises(UserError, match="expected one of"):
        load_config(RunConfig, new)


def test_a_run_of_an_older_version_is_the_same_run(tmp_path):
    """Its config.yaml has the old name."""
    config = load_config(RunConfig, None, [f"run_dir={tmp_path}", "diffusion.time_sampling=stratified"])
    save_config(config, tmp_path / "config.yaml")
    written = (tmp_path / "config.yaml").read_text().replace("time_sampling:", "times:")
    (tmp_path / "config.yaml").write_text(written)
    check_same_run(config)


# --- the model's shape


def test_another_base_with_a_ready_configuration(tmp_path, base_dir):
    """model.architecture is checked against the base; null on the command line takes the base's own."""
    (tmp_path / "c.yaml").write_text("model: {base: gpt2, architecture: {model_type: gpt2, n_embd: 768}}\n")
    other = f"model.base={base_dir('llama')}"
    config = load_config(RunConfig, tmp_path / "c.yaml", [other])
    with pytest.raises(UserError, match=r"has model_type='llama', but .* says 'gpt2'; .*model\.architecture=null"):
        adapt.base_config(config.model, 32)
    config = load_config(RunConfig, tmp_path / "c.yaml", [other, "model.architecture=null"])
    assert config.model.architecture is None
    assert adapt.base_config(config.model, 32).hidden_size == 32
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(RunConfig, tmp_path / "saved.yaml") == config


SHAPE = "{model_type: gpt2, n_embd: 16, n_layer: 3, n_head: 2, n_positions: 64, vocab_size: 390}"


def random_model(base, seed: int = 0, shape: str | None = SHAPE):
    overrides = [f"model.base={base}", "model.init=random", *([f"model.architecture={shape}"] if shape else [])]
    config = load_config(RunConfig, None, overrides)
    found = adapt.base_config(config.model, 32)
    adapt.check_fits(config, found, vocabulary=384)
    return adapt.load_model(config.model, found, 384, torch.float32, seed)


def test_a_new_model_has_the_shape_that_is_described_and_weights_of_the_seed(base_dir):
    model, again, other = (random_model(base_dir("llama"), seed) for seed in (1, 1, 2))
    assert type(model).__name__ == "DiffusionGPT2LMHeadModel" and model.config.n_layer == 3
    assert model.get_input_embeddings().weight.shape == (390, 16) and model.config.mask_token_id == 384
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
    ids = torch.randint(0, 384, (2, 16))
    labels = ids.clone()
    labels[:, 0] = -100
    model(ids, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_new_model_without_a_description_has_the_bases_shape_and_none_of_its_weights(base_dir):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_dir("llama"))
    model = random_model(base_dir("llama"), shape=None)
    for (name, new), old in zip(model.named_parameters(), base.parameters()):
        assert new.shape[1:] == old.shape[1:] and len(new) - len(old) == (len(old) == 384), name
        assert new.ndim == 1 or not torch.equal(new[: len(old)], old)


def test_a_vocabulary_that_is_too_small_is_refused(base_dir):
    with pytest.raises(
        UserError, match=r"vocab_size=300, but the tokenizer of .* has 384 tokens; give at least as many"
    ):
        random_model(base_dir("llama"), shape=SHAPE.replace("390", "300"))
    random_model(base_dir("llama"), shape=SHAPE.replace("390", "384"))


@pytest.mark.parametrize("shape", ["{n_embd: 16}", "{model_type: nonesuch}"])
def test_a_description_needs_a_known_model_type(base_dir, shape):
    with pytest.raises(UserError, match=r"model\.architecture has model_type=.*, which transformers does not know"):
        random_model(base_dir("llama"), shape=shape)


def test_a_diffusion_base_keeps_its_shift(base_dir):
    config = load_config(RunConfig, None, [f"model.base={base_dir('llama')}"])
    base = adapt.base_config(config.model, 32)
    adapt.check_fits(config, base, 384)
    base.diffusion = {"shift": False}
    with pytest.raises(UserError, match=r"was trained with diffusion\.shift=false; set the same"):
        adapt.check_fits(config, base, 384)
    config.diffusion.shift = False
    adapt.check_fits(config, base, 384)
    config.objective, base.diffusion = "autoregressive", {"shift": True}
    adapt.check_fits(config, base, 384)


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
