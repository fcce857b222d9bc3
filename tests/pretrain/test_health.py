"""The verdict on a run: what is healthy is called so, and what is not, with the reason."""

import json
import random
import statistics

import pytest
from conftest import launch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import health
from pretrain.telemetry import read_metrics
from tools import health as tool


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
    found = health.assess(run_of(), 200)
    assert not found.problems
    text = str(found)
    assert text.startswith("healthy: step 200 of 200") and "\n" not in text
    assert "AR base 7.00 read bidirectionally, 6.00 causally; uniform 10.00" in text and "accuracy 5.0% → 10.0%" in text


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        (run_of(fall=-1.0), "no better than the base before training"),
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
    found = health.assess(metrics, 200)
    assert any(reason in problem for problem in found.problems), found
    assert str(found).startswith("NOT healthy: ")


def test_before_the_warm_up_is_over_it_is_not_blamed_for_having_learnt_nothing():
    assert not health.assess(run_of(fall=0.0, skipped_steps=0)[:41], 200, warmup=50).problems


@settings(deadline=None, max_examples=50)
@given(st.floats(-3, 3), st.integers(6, 40), st.integers(0, 10**6))
def test_the_interval_covers_the_truth_about_as_often_as_it_says(slope, points, seed):
    rng = random.Random(seed)
    covered = 0
    for _ in range(200):
        x = sorted(rng.uniform(0, 1) for _ in range(points))
        found = health.trend(x, [slope * v + rng.gauss(0, 0.3) for v in x])
        covered += abs(found.change - slope * (x[-1] - x[0])) <= found.interval
    assert covered / 200 >= 0.87  # 95% less 5 standard errors


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_student(freedom, quantile):
    """Against the printed table."""
    assert health.student(freedom) == pytest.approx(quantile, rel=0.012)


def test_of_a_real_run_there_is_a_line_and_a_panel(tiny_run, capsys):
    arguments, folder = tiny_run(
        "health", **{"train.steps": 30, "validation.every": 5, "optimizer.warmup_steps": 5, "wandb.mode": "offline"}
    )
    outcome = launch(1, arguments)
    assert outcome.returncode == 0 and "healthy: step 30 of 30" in outcome.stdout
    assert (folder / "health.png").stat().st_size > 10_000
    assert list(folder.glob("wandb/offline-run-*/files/media/images/health_*.png"))
    (folder / "health.png").unlink()
    assert tool.main([str(folder)]) == 0
    assert "healthy: step 30 of 30" in capsys.readouterr().out and (folder / "health.png").exists()
    start, *_, last = read_metrics(folder)
    assert start["uniform_ce"] == pytest.approx(5.953, abs=1e-3)  # ln 385
    assert start["causal_masked_ce"] != start["val_masked_ce"] and 0 < last["val_accuracy"] < 1
    assert 0 < last["goodput"] < 1 and last["step_seconds"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:11]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"val_mask_share": 1.0}) + "\n" for line in lines))
    assert tool.main([str(folder)]) == 1
    assert "step 10 of 30" in capsys.readouterr().out
    assert tool.main([str(folder.parent / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_references_are_the_base_read_causally(tiny_run, base_dir, corpus_dir):
    """By transformers itself, on the same rows and noise."""
    import torch
    from transformers import AutoModelForCausalLM

    from pretrain.data import TrainData

    arguments, folder = tiny_run("references", **{"train.steps": 1})
    assert launch(2, arguments).returncode == 0
    model = AutoModelForCausalLM.from_pretrained(base_dir("llama"))
    model.resize_token_embeddings(385, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data):
        weight[384] = weight[:384].mean(0)
    nll, masked = 0.0, 0
    for s in TrainData(str(corpus_dir), 384, seed=42).validation_samples(6):
        logits = model(torch.from_numpy(s.xt)[None]).logits[0, :-1]
        x0, chosen = torch.from_numpy(s.x0)[1:], torch.from_numpy(s.masked)[1:]
        nll += torch.nn.functional.cross_entropy(logits[chosen], x0[chosen], reduction="sum").item()
        masked += int(chosen.sum())
    assert read_metrics(folder)[0]["causal_masked_ce"] == pytest.approx(nll / masked, rel=1e-5)
