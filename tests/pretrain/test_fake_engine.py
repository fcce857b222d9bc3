"""The training loop in one process: DeepSpeed's engine replaced by one of thirty lines, all the rest real."""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_engine import FakeEngine, PlainDescent, checkpoints, described, incidents, numbers, same, weights
from helpers import ROOT
from independent import Row, annealed, corrupted, diffusion_loss, gradients, stock
from transformers import AutoTokenizer

from common.config import load_config
from common.errors import UserError
from pretrain import adapt, deepspeed_config, step, trainer
from pretrain.config import RunConfig
from pretrain.data import TrainData
from pretrain.objectives import OBJECTIVES, make_objective
from pretrain.optimization import learning_rate
from pretrain.runtime import evaluation
from pretrain.runtime.guards import Guard
from pretrain.runtime.metrics import read_metrics
from pretrain.runtime.stop import STOPPED, StopRequest
from pretrain.step import read_step, train_step

BOTH = pytest.mark.parametrize("objective", list(OBJECTIVES))


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def make(process_group, base_dir, corpus_dir, tmp_path, monkeypatch) -> Iterator[Callable[..., trainer.Trainer]]:
    """`make(name, **settings)`: a Trainer of the run tmp_path/name, as pretrain.main makes it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.delenv("RANK", raising=False)

    def made(name: str = "run", stage: int = 2, engine: type = FakeEngine, **settings) -> trainer.Trainer:
        values = {
            "run_dir": tmp_path / name,
            "model.base": base_dir("llama"),
            "data.path": corpus_dir,
            "annealing.steps": 4,
            "train.steps": 4,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 4,
            "optimizer.lr": 1e-3,
            "optimizer.warmup_steps": 2,
            "checkpoint.every": 0,
            "validation.rows": 2,
            "wandb.mode": "disabled",
            "guards.stall_minutes": 0,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        config = load_config(RunConfig, None, [f"{key}={value}" for key, value in values.items()])
        tokenizer = AutoTokenizer.from_pretrained(config.model.base)
        base = adapt.base_config(config.model, 32)
        mask = adapt.add_mask_token(tokenizer, config.model) if OBJECTIVES[config.objective].masks else None
        ds_config = deepspeed_config.resolve(ROOT / f"ds_configs/zero{stage}.json", config, "fp32", 32, 1)

        def build(config: RunConfig, base_config, mask_token_id: int | None, ds_config: dict) -> FakeEngine:
            model = adapt.load_model(config.model, base_config, mask_token_id, torch.float32, config.train.seed)
            return engine(model, config, ds_config)

        monkeypatch.setattr(trainer, "build_engine", build)
        return trainer.Trainer(config, base, tokenizer, mask, ds_config)

    yield made
    for number, handler in handlers.items():
        signal.signal(number, handler)


def changed_batches(monkeypatch, batches: range, change: Callable[[step.Batch, int], step.Batch]) -> None:
    """Apply `change(micro_batch, its place in the step)` to what is read of these batches."""

    def read(data, objective, step, rows: range, *rest):
        found = read_step(data, objective, step, rows, *rest)
        if rows.start // len(rows) in batches:
            found = [change(batch, place) for place, batch in enumerate(found)]
        return found

    monkeypatch.setattr(trainer, "read_step", read)


@BOTH
def test_a_run_writes_every_step_and_its_checkpoints(make, objective):
    run = make(objective=objective, train__steps=6, checkpoint__every=2, validation__every=3, annealing__form="window")
    assert run.run() == 0 and run.done == 6
    folder, lines = Path(run.config.run_dir), numbers(run)
    assert [line["step"] for line in lines] == list(range(7)) and checkpoints(run) == [4, 6]
    assert (folder / "checkpoints/latest").read_text() == "step_00000006"
    assert load_config(RunConfig, folder / "config.yaml") == run.config and (folder / "model/config.json").exists()
    held_out = run.objective.reported.held_out
    assert [line["step"] for line in lines if held_out in line] == [0, 3, 6]
    assert lines[0]["uniform_ce"] == pytest.approx(np.log(run.engine.module.config.vocab_size))
    assert lines[-1][held_out] < lines[0][held_out]
    if run.objective.reported.base:
        assert [line["step"] for line in lines if run.objective.reported.base in line] == [0]
        assert [line["anneal_ratio"] for line in lines[1:]] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        assert [line.get("right_context") for line in lines[1:]] == [8, 16, 23, None, None, None]  # of 31
    for k, line in enumerate(lines[1:]):
        assert line["tokens"] == (k + 1) * 8 * 32 and line["skipped_steps"] == 0 and not line["update_skipped"]
        assert line["lr"] == learning_rate(k, 6, run.config.optimizer) and line["grad_norm"] > 0
    assert run.engine.seen.lr == [lines[-1]["lr"]] * 2
    about = described(run, 6)
    assert about["step"] == 6 and about["tokens"] == 6 * 8 * 32 and sum(about["rows"].values()) == 48
    assert about["corpus_fingerprint"] == run.data.fingerprint and about["files"]["state.pt"]["bytes"] > 0


@BOTH
@pytest.mark.parametrize("stage", [0, 2])
def test_resumed_at_every_step_equals_never_stopped(make, objective, stage):
    settings = {"objective": objective, "stage": stage, "diffusion.time_sampling": "stratified"}
    whole = make("whole", **settings)
    assert whole.run() == 0 and checkpoints(whole) == [4]
    for done in range(1, 5):
        broken = make("broken", **settings, train__exit_interval=1)
        assert broken.done == done - 1 and broken.run() == 0 and broken.done == done
    assert numbers(broken) == numbers(whole) and same(weights(broken), weights(whole))
    assert described(broken, 4)["guard"] == described(whole, 4)["guard"]
    before = Path(broken.config.run_dir, "metrics.jsonl").read_bytes()
    again = make("broken", **settings, train__exit_interval=1)
    assert again.run() == 0 and Path(broken.config.run_dir, "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_reported(make, monkeypatch, stage, poison):
    """Batch 1 has a bad loss in its second pass: skipped, counted, its rows written down, and the run goes on."""

    def spoil(batch: step.Batch, place: int) -> step.Batch:
        bad = {**batch.tensors, "loss_weights": batch.tensors["loss_weights"] * poison}
        return replace(batch, tensors=bad) if place == 1 else batch

    changed_batches(monkeypatch, range(1, 2), spoil)
    run = make(stage=stage, checkpoint__every=1, checkpoint__keep=9)
    around = []

    def watched(engine, *rest):
        before = weights(run)
        metrics = train_step(engine, *rest)
        around.append(same(before, weights(run)))
        return metrics

    monkeypatch.setattr(trainer, "train_step", watched)
    assert run.run() == 0
    assert around == [False, True, False, False]
    lines = numbers(run)
    assert [line["update_skipped"] for line in lines[1:]] == [False, True, False, False]
    assert [line["skipped_steps"] for line in lines[1:]] == [0, 1, 1, 1]
    assert checkpoints(run) == [1, 3, 4]  # none of the skipped step
    assert all(np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"]) for line in (lines[1], *lines[3:]))
    (incident,) = incidents(run)
    assert incident["kind"] == "non-finite loss or gradient" and (incident["step"], incident["batches"]) == (2, [1, 1])
    assert incident["samples"] == [run.data.describe(n) for n in range(8, 16)]
    assert described(run, 4)["guard"]["skipped"] == 1


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_makes_no_update_though_its_gradient_is(make, monkeypatch, stage):
    run = make(stage=stage, train__steps=2, checkpoint__keep=0)
    losses, before = run.objective.losses, weights(run)

    def infinite(model, batch: step.Batch) -> step.Losses:
        found = losses(model, batch)
        return replace(found, loss=found.loss + torch.inf) if found.loss.requires_grad else found

    run.objective.losses = infinite
    assert run.run() == 0 and same(before, weights(run))
    assert [line["skipped_steps"] for line in numbers(run)[1:]] == [1, 2]


def test_too_many_such_steps_end_the_run(make, monkeypatch):
    def spoil(batch: step.Batch, place: int) -> step.Batch:
        return replace(batch, tensors={**batch.tensors, "loss_weights": batch.tensors["loss_weights"] * float("nan")})

    changed_batches(monkeypatch, range(1, 9), spoil)
    run = make(train__steps=9, checkpoint__every=1, guards__max_skipped_in_a_row=3)
    with pytest.raises(UserError, match="3 steps in a row had a non-finite loss or gradient, the last was step 4"):
        run.run()
    assert checkpoints(run) == [1] and [incident["step"] for incident in incidents(run)] == [2, 3, 4]


def hard(batch: step.Batch, place: int) -> step.Batch:
    """Wrong labels."""
    labels = batch.tensors["labels"]
    return replace(batch, tensors={**batch.tensors, "labels": torch.where(labels < 0, labels, (labels * 7 + 3) % 384)})


SPIKE = {"train.steps": 24, "checkpoint.keep": 99, "guards.spike_factor": 4, "optimizer.lr": 1e-2, "validation.rows": 0}


def test_after_a_rollback_the_run_is_one_that_never_saw_those_batches(make, monkeypatch):
    settings = {**SPIKE, "checkpoint.every": 10}
    with monkeypatch.context() as patch:
        without = classmethod(lambda cls, config, compared, state: cls(config, compared, left_out=[[18, 20]]))
        patch.setattr(Guard, "restored", without)
        expected = make("left_out", **settings)
        assert expected.run() == 0
    changed_batches(monkeypatch, range(18, 21), hard)
    run = make("rolled_back", **settings, guards__on_spike="rollback")
    assert run.run() == 0
    assert numbers(run) == numbers(expected) and same(weights(run), weights(expected))
    (incident,) = incidents(run)
    assert incident["kind"] == "loss spike" and incident["batches"] == [18, 20]
    assert incident["samples"] == [run.data.describe(n) for n in range(18 * 8, 21 * 8)]
    about = described(run, 24)
    assert about["guard"]["left_out"] == [[18, 20]] and about["guard"]["rollbacks"] == 1
    assert about["rows"] == described(expected, 24)["rows"] and sum(about["rows"].values()) == 27 * 8


def test_stopped_in_the_middle_of_a_spike_the_run_decides_alike(make, monkeypatch):
    """What the guard has seen is in the checkpoint: the third high step, after resuming, is the spike."""
    changed_batches(monkeypatch, range(18, 21), hard)
    settings = {**SPIKE, "checkpoint.every": 10, "guards.on_spike": "rollback"}
    expected = make("whole", **settings)
    assert expected.run() == 0
    run = make("stopped", **settings, train__exit_interval=20)
    assert run.run() == 0 and run.done == 20 and described(run, 20)["guard"]["above"] == 2
    again = make("stopped", **settings, train__exit_interval=20)
    assert again.done == 20 and again.run() == 0 and again.done == 24
    assert numbers(again) == numbers(expected) and same(weights(again), weights(expected))
    assert described(again, 24)["guard"] == described(expected, 24)["guard"]


def test_a_spike_that_is_only_warned_of_is_written_down_and_not_saved(make, monkeypatch):
    changed_batches(monkeypatch, range(18, 21), hard)
    run = make(**SPIKE, checkpoint__every=1)
    assert run.run() == 0
    assert [(i["kind"], i["step"], i["batches"]) for i in incidents(run)] == [("loss spike", 21, [18, 20])]
    assert [n for n in range(1, 25) if n not in checkpoints(run)] == [19, 20]  # while losses were too high
    assert described(run, 24)["guard"]["rollbacks"] == 0


def test_rollbacks_are_limited(make, monkeypatch):
    changed_batches(monkeypatch, range(18, 99), hard)
    run = make(**SPIKE, checkpoint__every=10, guards__on_spike="rollback", guards__max_rollbacks=0)
    with pytest.raises(UserError, match=r"steps 19 to 21 have losses .* after guards\.max_rollbacks=0 rollbacks"):
        run.run()
    assert checkpoints(run) == [10]


@pytest.mark.parametrize("request_", [StopRequest.CLOCK, StopRequest.SIGNAL])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(make, monkeypatch, request_):
    """The clock also validates. Continued, it is the run that was never stopped."""
    expected = make("whole")
    assert expected.run() == 0
    run = make("stopped")

    def step_and_ask(engine, *rest):
        if run.done == 1 and request_ == StopRequest.SIGNAL:
            signal.raise_signal(signal.SIGUSR1)
        if run.done == 1 and request_ == StopRequest.CLOCK:
            run.stop._deadline = 0.0
        return train_step(engine, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step_and_ask)
        assert run.run() == STOPPED == 75
    assert run.done == 2 and checkpoints(run) == [2]
    assert run.stop.reason == ("SIGUSR1" if request_ == StopRequest.SIGNAL else "train.max_minutes")
    assert ("val_nelbo" in numbers(run)[-1]) == (request_ == StopRequest.CLOCK)
    again = make("stopped")
    assert again.done == 2 and again.run() == 0 and same(weights(again), weights(expected))
    finished = [{k: v for k, v in line.items() if not k.startswith("val_")} for line in numbers(again)]
    assert finished == [{k: v for k, v in line.items() if not k.startswith("val_")} for line in numbers(expected)]


def test_the_clock_ends_a_run_and_a_stop_at_the_last_step_is_its_end(make):
    assert make("short", train__max_minutes=1e-9).run() == STOPPED
    run = make("done", train__max_minutes=1e-9, train__steps=1)
    assert run.run() == 0 and checkpoints(run) == [1]


def test_nothing_is_saved_or_validated_where_that_is_not_wanted(make):
    run = make(checkpoint__keep=0, checkpoint__every=1, validation__rows=0)
    assert run.run() == 0
    assert not (Path(run.config.run_dir) / "checkpoints").exists()
    assert not any(key.startswith("val_") for line in numbers(run) for key in line)


# --- the absolute size of the update


def expected_loss(objective: str, model, rows: list[Row], normalize_by: str = "masked") -> torch.Tensor:
    """Of the first step, computed anew."""
    if objective == "autoregressive":
        ids = torch.from_numpy(np.stack([row.ids for row in rows]))
        return model(ids, labels=ids).loss
    noised = [corrupted(row, 42) for row in rows]
    return diffusion_loss(model, noised, 384, lambda n: annealed(n, 0.25, (42, 0)), normalize_by=normalize_by)


def rows_of(data: TrainData, count: int) -> list[Row]:
    """The first rows of a run's order."""
    found = []
    for n in range(count):
        source, _, row = data.locate(n)
        ids, lengths = data.train[source].row(row)
        found.append(Row(n, ids.astype(np.int64), lengths.tolist()))
    return found


CASES = [
    ("masked_diffusion", 8, 2, "masked"),
    ("masked_diffusion", 2, 0, "masked"),
    ("masked_diffusion", 1, 2, "maskable"),
    ("autoregressive", 8, 0, "masked"),
    ("autoregressive", 2, 2, "masked"),
]


@pytest.mark.parametrize(("objective", "micro", "stage", "normalize_by"), CASES)
def test_one_step_of_descent_is_the_learning_rate_times_the_gradient(
    make, base_dir, objective, micro, stage, normalize_by
):
    """Loss, gradient norm and parameters in absolute terms, for one pass and for several."""
    settings = {"optimizer.lr": 0.5, "optimizer.warmup_steps": 0, "optimizer.max_grad_norm": 0, "validation.rows": 0}
    run = make(
        objective=objective, stage=stage, engine=PlainDescent, train__steps=1, train__micro_batch_size=micro,
        diffusion__normalize_by=normalize_by, **settings,
    )  # fmt: skip
    before = weights(run)
    assert run.run() == 0
    theirs = stock(base_dir("llama"), mask=objective == "masked_diffusion")
    loss = expected_loss(objective, theirs, rows_of(run.data, 8), normalize_by)
    gradient = gradients(loss, theirs)
    line = numbers(run)[-1]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.nn.utils.get_total_norm(list(gradient.values())).item()
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    after = weights(run)
    for name, value in gradient.items():
        moved = (before[name] - after[name]) / 0.5
        torch.testing.assert_close(moved, value, rtol=1e-4, atol=1e-5 * norm)


@BOTH
@pytest.mark.parametrize(("ranks", "micro"), [(2, 2), (4, 1)])
def test_ranks_average_to_the_gradient_of_the_global_batch(make, base_dir, monkeypatch, objective, ranks, micro):
    """DeepSpeed averages gradients over ranks: the mean of what they have is the global batch's."""
    run = make(objective=objective, engine=PlainDescent, optimizer__max_grad_norm=0)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    made = make_objective(run.config, 384 if objective == "masked_diffusion" else None)
    run.engine.passes = 8 // ranks // micro
    found, loss = [], 0.0
    for rank in range(ranks):
        batches = read_step(run.data, made, 0, range(8), rank, ranks, micro)
        assert len(batches) == run.engine.passes
        loss += train_step(run.engine, made, batches, lr=0.0)["loss"]
        found.append(run.engine.seen.gradients)
    theirs = stock(base_dir("llama"), mask=objective == "masked_diffusion")
    expected = expected_loss(objective, theirs, rows_of(run.data, 8))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, value in gradients(expected, theirs).items():
        mean = sum(gradient[name] for gradient in found) / ranks
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


def test_the_largest_stop_request_counts(make, monkeypatch):
    """Ranks add up their requests by kind; the metrics say the largest of any."""
    run = make()
    batches = read_step(run.data, run.objective, 0, range(8), 0, 1, 4)
    for others, mine, expected in (([0], 0, 0), ([0, 1], 0, 1), ([2], 1, 2), ([0, 1], 2, 2)):

        def add(tensor: torch.Tensor, others: list[int] = others) -> None:
            for other in others:
                tensor[len(tensor) - 3 + other] += 1

        with monkeypatch.context() as patch:
            patch.setattr(dist, "all_reduce", add)
            assert train_step(run.engine, run.objective, batches, 0.0, lambda mine=mine: mine)["stop"] == expected


def evaluated(n: int) -> dict:
    """A score of step n's checkpoint, as tools.evaluate_run writes it."""
    return {"checkpoint": "a", "tasks": {"piqa": {"score": n / 8}}}


def test_a_run_stopped_and_resumed_reports_each_score_once(make, caplog, monkeypatch):
    """Scores that come while it trains, and after its last step; training is the same."""
    monkeypatch.setattr(evaluation, "LOOK_SECONDS", 0.0)
    plain = make("plain")
    assert plain.run() == 0
    caplog.set_level("INFO")
    asked = {"evaluation__tasks": "piqa", "evaluation__every": 1, "evaluation__launch": False, "checkpoint__every": 1}
    for known in (0, 0, 1, 2, 3, 4, 4):  # the newest score at each launch; the last three have nothing left to train
        run = make(train__exit_interval=1, **asked)
        scores = {n: evaluated(n) for n in range(1, known + 1)}
        (run.evaluation.folder / "scores.json").write_text(json.dumps(scores))
        assert run.run() == 0
    assert numbers(run) == numbers(plain)
    assert [line.get("eval_piqa") for line in read_metrics(run.config.run_dir)] == [None, 1 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert [m for m in caplog.messages if "evaluated:" in m] == [
        f"step {n} evaluated: eval_piqa {n / 8:.4g}" for n in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("code", ["sys.exit(2)", "os.kill(os.getpid(), 9)"])
def test_an_evaluation_that_fails_does_not_touch_training(make, caplog, monkeypatch, tmp_path, code):
    monkeypatch.setattr(evaluation, "MODULE", "failing_evaluator")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "failing_evaluator.py").write_text(f"import os, sys\n{code}\n")
    plain, run = make("plain"), make(evaluation__tasks="piqa", evaluation__every=2, checkpoint__every=2)
    assert plain.run() == run.run() == 0
    run.wait_for_evaluation()
    assert numbers(run) == numbers(plain)
    (line,) = [m for m in caplog.messages if "the evaluating process" in m]
    assert f"training goes on without it, see {run.evaluation.log_path}" in line
