"""The verdict on a run: what is healthy is called so, and what is not, with the reason."""

import json
import random
import statistics

import pytest
import torch
from helpers import run
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pretrain import health
from pretrain.config import RunConfig
from pretrain.data import TrainData
from pretrain.model.modeling_diffullama import IGNORE
from pretrain.objectives import Autoregressive, MaskedDiffusion
from pretrain.runtime.metrics import read_metrics
from pretrain.step import read_rows
from tools import health as tool

REPORTED = MaskedDiffusion.reported


def run_of(steps: int = 200, fall: float = 2.0, **changes) -> list[dict]:
    """Metrics of a run whose losses fall by `fall` nats; t, and so the loss over all t, is random."""
    rng = random.Random(0)
    buckets = (0.25, 0.5, 0.75, 1)
    start = {f"val_masked_ce_to_t{b:g}": 6 + b for b in buckets} | {
        f"causal_masked_ce_to_t{b:g}": 5 + b for b in buckets
    }
    metrics = [{
        "step": 0, "tokens": 0, "val_masked_ce": 7.0, "causal_masked_ce": 6.0, "uniform_ce": 10.0, "val_accuracy": 0.05,
        "val_mask_share": 0.0, **start,
    }]  # fmt: skip
    for step in range(1, steps + 1):
        gone = fall * step / steps
        record = {
            "step": step, "tokens": 100 * step, "loss": rng.uniform(5, 20), "grad_norm": rng.uniform(1, 2),
            "anneal_ratio": min(1, 2 * step / steps), "skipped_steps": 0, "update_skipped": False, "step_seconds": 1.0,
            **{f"masked_ce_to_t{b:g}": 6 + b - gone + rng.gauss(0, 0.1) for b in buckets if rng.random() < 0.9},
        }  # fmt: skip
        if step % 20 == 0:
            held = {f"val_masked_ce_to_t{b:g}": 6 + b - gone + rng.gauss(0, 0.01) for b in buckets}
            record |= held | {
                "val_masked_ce": statistics.fmean(held.values()),
                "val_accuracy": 0.1,
                "val_mask_share": 0.0,
            }
        metrics.append(record | changes)
    return metrics


def test_a_run_that_learns_is_healthy_and_says_how_it_knows():
    found = health.assess(run_of(), 200, 0, REPORTED)
    assert not found.problems
    text = str(found)
    assert text.startswith("healthy: step 200 of 200") and "\n" not in text
    assert "AR base 7.00 read bidirectionally, 6.00 causally; uniform 10.00" in text and "accuracy 5.0% → 10.0%" in text


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        (run_of(fall=-1.0), "no better than before training"),
        (run_of(fall=0.3), "yet no better than the base read causally"),
        (run_of(fall=-1.0), "loss rises"),
        (run_of(val_mask_share=0.4), "40.0% of its predictions are the mask token itself"),
        (run_of(update_skipped=True), "the last step had a non-finite loss"),
        (run_of(skipped_steps=20), "20 steps had non-finite losses"),
        (run_of()[:100] + [m | {"grad_norm": 400.0} for m in run_of()[100:130]], "gradient norm has grown to 4e+02"),
        (run_of()[:1], "no step has finished"),
    ],
)
def test_what_is_wrong_is_named(metrics, reason):
    found = health.assess(metrics, 200, 0, REPORTED)
    assert any(reason in problem for problem in found.problems), found
    assert str(found).startswith("NOT healthy: ")


def test_before_the_warm_up_is_over_it_is_not_blamed_for_having_learnt_nothing():
    assert not health.assess(run_of(fall=0.0, skipped_steps=0)[:41], 200, 50, REPORTED).problems


@pytest.mark.slow
@settings(max_examples=50)
@given(st.floats(-3, 3), st.integers(6, 40), st.integers(0, 10**6))
def test_the_interval_covers_the_truth_about_as_often_as_it_says(slope, points, seed):
    rng = random.Random(seed)
    covered = 0
    for _ in range(200):
        x = sorted(rng.uniform(0, 1) for _ in range(points))
        found = health.trend(x, [slope * v + rng.gauss(0, 0.3) for v in x])
        covered += abs(found.change - slope * (x[-1] - x[0])) <= found.interval
    assert covered / 200 >= 0.87  # 95% less 5 standard errors


@pytest.mark.parametrize(("points", "quantile"), [(5, 3.182), (7, 2.571), (12, 2.228), (32, 2.042)])
def test_the_interval_is_students(points, quantile):
    """The textbook's standard error of a slope, times the 97.5% quantile of the printed table."""
    rng = random.Random(points)
    x = [float(i) for i in range(points)]
    y = [0.5 * v + rng.gauss(0, 1) for v in x]
    slope, intercept = statistics.linear_regression(x, y)
    residuals = sum((v - intercept - slope * u) ** 2 for u, v in zip(x, y))
    error = (residuals / (points - 2) / sum((u - statistics.fmean(x)) ** 2 for u in x)) ** 0.5
    found = health.trend(x, y)
    assert found.change == pytest.approx(slope * (points - 1))
    assert found.interval == pytest.approx(quantile * error * (points - 1), rel=5e-4)


def test_an_autoregressive_run_is_compared_with_step_0():
    """It has one loss, and no other reading of the base."""
    metrics = [{"step": 0, "tokens": 0, "val_loss": 5.0, "uniform_ce": 6.0, "val_accuracy": 0.1}]
    for step in range(1, 41):
        loss = 5 - step / 40
        metrics.append({"step": step, "tokens": 10 * step, "loss": loss, "val_loss": loss, "val_accuracy": 0.2})
    reported = Autoregressive.reported
    found = health.assess(metrics, 40, 0, reported)
    assert not found.problems and "held-out loss 4.00 (at step 0 5.00; uniform 6.00)" in str(found)
    assert reported.held_out == "val_loss" and "trend" not in str(found)
    for m in metrics[1:]:
        m["val_loss"] = 5.1
    assert "no better than before training" in str(health.assess(metrics, 40, 0, reported))


@pytest.mark.slow
def test_of_a_real_run_there_is_a_line_and_a_panel(tiny_run, capsys):
    arguments, folder = tiny_run(
        "health", **{"train.steps": 30, "validation.every": 5, "optimizer.warmup_steps": 5, "wandb.mode": "offline"}
    )
    assert "healthy: step 30 of 30" in run(1, arguments)
    assert tool.main([str(folder)]) == 0
    assert "healthy: step 30 of 30" in capsys.readouterr().out
    assert (folder / "health.png").stat().st_size > 10_000
    start, *_, last = read_metrics(folder)
    assert start["uniform_ce"] == pytest.approx(5.953, abs=1e-3)  # ln 385
    assert start["causal_masked_ce"] != start["val_masked_ce"] and 0 < last["val_accuracy"] < 1
    assert 0 < last["goodput"] < 1 and last["step_seconds"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:11]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"val_mask_share": 1.0}) + "\n" for line in lines))
    assert tool.main([str(folder), "--output", str(folder / "other.png")]) == 1
    assert "step 10 of 30" in capsys.readouterr().out and (folder / "other.png").exists()
    assert tool.main([str(folder.parent / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.slow
def test_references_are_the_base_read_causally(tiny_run, base_dir, corpus_dir):
    """By transformers itself, on the same rows and noise."""
    arguments, folder = tiny_run("references", **{"train.steps": 1})
    run(2, arguments)
    model = AutoModelForCausalLM.from_pretrained(base_dir("llama"))
    model.resize_token_embeddings(385, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data):
        weight[384] = weight[:384].mean(0)
    places = TrainData(str(corpus_dir), 42).held_out(6)
    rows = read_rows([(source, row) for source, row, *_ in places], [i for *_, i, _ in places], isolated=False)
    rows.totals = [total for *_, total in places]
    noised = MaskedDiffusion(RunConfig(), 384).batch(rows, None).tensors
    nll = 0.0
    for xt, labels in zip(noised["input_ids"], noised["labels"]):
        logits, labels = model(xt[None]).logits[0, :-1], labels[1:]
        nll += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE).item()
    masked = int((noised["labels"] != IGNORE).sum())
    assert read_metrics(folder)[0]["causal_masked_ce"] == pytest.approx(nll / masked, rel=1e-5)
