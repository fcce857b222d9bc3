"""Masked diffusion through the seam against its definition: the loss, held-out rows, the shift, what ships."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from independent import (
    VALIDATION,
    Corrupted,
    InOrder,
    Row,
    Source,
    annealed,
    assert_same_gradients,
    corrupted,
    diffusion_loss,
    gradients,
    made_up,
    random_numbers,
    stock,
    token_losses,
)
from masked import (
    LENGTH,
    MASK,
    ROWS,
    SEED,
    TIMES,
    WHOLE,
    batch_of,
    model_of,
    objective,
    times_of,
)

from common.config import load_config
from pretrain.config import RunConfig
from pretrain.data import TrainData
from pretrain.model.forms import Causal, Full
from pretrain.model.modeling_diffullama import IGNORE, diffusion_class
from pretrain.model.visibility import Visibility
from pretrain.objectives.masked_diffusion import MaskedDiffusion
from pretrain.step import mean, one_forward, read_rows, read_step

# --- the loss


def test_loss_is_the_authors_objective():
    """Their train.py, written anew: shift, 1/t, mean over masked tokens, from full logits."""
    batch, length, vocabulary = 4, 33, 50
    source = made_up([[length]] * batch, length, vocabulary)
    x0 = torch.from_numpy(np.stack([row.ids for row in source.rows]))
    logits = torch.randn(batch, length, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noised = [corrupted(row, SEED) for row in source.rows]
    t = torch.tensor([c.t for c in noised], dtype=torch.float64)
    masked = torch.from_numpy(np.stack([c.masked for c in noised]))

    # theirs
    loss_mask = masked[:, 1:]
    loss = torch.nn.CrossEntropyLoss(reduction="none")(
        logits[:, :-1].reshape(-1, vocabulary), x0[:, 1:].reshape(-1)
    ).reshape(batch, -1)
    loss = loss.masked_fill(~loss_mask, 0)
    theirs = (torch.reciprocal(t)[:, None] * loss).sum() / loss_mask.sum()

    # ours: only labelled positions, each with its weight
    tensors = batch_of(source).tensors
    rows, positions = (tensors["labels"] != IGNORE).nonzero(as_tuple=True)
    nll = -F.log_softmax(logits[rows, positions - 1], -1).gather(1, tensors["labels"][rows, positions][:, None])[:, 0]
    ours = (tensors["loss_weights"][rows, positions].double() * nll).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("times", TIMES)
def test_nelbo_of_a_known_distribution_is_its_entropy(times):
    """Independent tokens of a known law, predicted perfectly: E[(1/t) nll] over maskable tokens is the entropy."""
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    entropy = -(law * law.log()).sum().item()
    rows, length = 4000, 64
    rng = np.random.default_rng(1)
    source = Source([Row(n, rng.choice(4, length, p=law.numpy()), [length]) for n in range(rows)])
    settings = f"diffusion.time_sampling={times}", f"train.global_batch_size={rows}", "diffusion.normalize_by=maskable"
    batch = batch_of(source, *settings)
    labels = batch.tensors["labels"]
    nll = -law.log()[labels[labels != IGNORE]]
    nelbo = (batch.tensors["loss_weights"][labels != IGNORE] * nll).sum().item()
    assert nelbo == pytest.approx(entropy, rel=0.02)
    assert batch.counts["maskable"] == rows * (length - 1)


CASES = [
    # family, isolated, shift, normalize_by
    ("llama", False, True, "masked"),
    ("gpt2", False, True, "maskable"),
    ("qwen3", False, True, "masked"),
    ("llama_tied", True, True, "maskable"),
    ("gpt2", True, True, "masked"),
    ("llama", False, False, "masked"),
    ("gpt2", True, False, "maskable"),
]


@pytest.mark.parametrize(("family", "isolated", "shift", "normalize_by"), CASES)
def test_loss_and_gradients_are_those_of_the_definition(family, isolated, shift, normalize_by, base_dir):
    """During annealing, from noise drawn anew and the full logits of transformers' own model under the drawn mask.

    Without the shift hidden state i predicts token i, and a first token is masked too.
    """
    settings = "annealing.steps=4", f"diffusion.shift={str(shift).lower()}", f"diffusion.normalize_by={normalize_by}"
    source = made_up(ROWS, LENGTH, first=6)
    theirs, ours = stock(base_dir(family), mask=True), model_of(base_dir(family), *settings)
    batch = batch_of(source, *settings, step=1, isolated=isolated)
    found = one_forward(ours, batch)

    noised = [corrupted(row, SEED, shift=shift, isolated=isolated) for row in source.rows]
    assert any(c.masked[0] for c in noised) != shift

    def visible(length: int) -> torch.Tensor:
        return annealed(length, 0.5, (SEED, 1))

    expected = diffusion_loss(
        theirs, noised, MASK, visible, shift=shift, isolated=isolated, normalize_by=normalize_by
    )  # fmt: skip
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(found.loss, ours), gradients(expected, theirs))
    nll = torch.cat([token_losses(theirs, c, MASK, visible, shift, isolated) for c in noised])
    torch.testing.assert_close(found.nll, nll.detach(), rtol=1e-4, atol=1e-5)

    metrics = objective(*settings).metrics(batch.counts, objective(*settings).sums(batch, found))
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["masked_ce"] == pytest.approx(nll.mean().item(), rel=1e-5)
    t = np.concatenate([[c.t] * c.masked.sum() for c in noised])
    for high in (0.25, 0.5, 0.75, 1.0):
        inside = nll.detach().numpy()[(t > high - 0.25) & (t <= high)]
        if len(inside):
            assert metrics[f"masked_ce_to_t{high:g}"] == pytest.approx(inside.mean(), rel=1e-4)
        else:
            assert f"masked_ce_to_t{high:g}" not in metrics


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (2, 1), (3, 2)])
def test_micro_batches_and_ranks_add_up_to_the_global_batch(times, world_size, micro, base_dir):
    made = objective(f"diffusion.time_sampling={times}", "train.global_batch_size=6")
    source, ours = made_up(ROWS, LENGTH, first=6), model_of(base_dir("llama"))
    (whole,) = read_step(InOrder(source), made, 1, range(6, 12), isolated=True)
    expected = one_forward(ours, whole)
    parts = [
        part
        for rank in range(world_size)
        for part in read_step(InOrder(source), made, 1, range(6, 12), rank, world_size, micro, isolated=True)
    ]
    assert len(parts) == 6 // micro
    losses = [one_forward(ours, part) for part in parts]
    torch.testing.assert_close(sum(found.loss for found in losses), expected.loss)
    assert_same_gradients(gradients(sum(found.loss for found in losses), ours), gradients(expected.loss, ours))
    sums = sum(made.sums(part, found) for part, found in zip(parts, losses))
    torch.testing.assert_close(sums, made.sums(whole, expected))
    assert made.metrics(whole.counts, sums)["loss"] == pytest.approx(expected.loss.item(), rel=1e-6)


def test_a_batch_without_masks_has_no_loss(base_dir):
    ours = model_of(base_dir("llama"))
    batch = batch_of(made_up([[1], [1]], LENGTH))
    found = one_forward(ours, batch)
    assert found.loss.item() == 0 and batch.counts == {"labelled": 0, "maskable": 0}
    metrics = objective().metrics(batch.counts, objective().sums(batch, found))
    assert metrics == {"loss": 0.0, "masked_ce": 0.0}
    assert not any(gradient.any() for gradient in gradients(found.loss, ours).values())


# --- held-out rows


def held_out_rows(source: Source, total: int):
    rows = read_rows(source.places, source.numbers, isolated=False)
    rows.totals = [total] * len(source.rows)
    return rows


def held_out(row: Row, total: int, time: float | None = None) -> Corrupted:
    """Row i of N on the noise of (0, i): its time lies in the i-th of N equal parts of (eps, 1]."""
    maskable = np.arange(len(row.ids)) < sum(row.lengths)
    maskable[0] = False
    rng = random_numbers(0, row.number, VALIDATION)
    if time is None:
        time = 1e-3 + (1 - 1e-3) * (row.number + rng.random()) / total
    return Corrupted(row, time, maskable, (rng.random(len(row.ids)) < time) & maskable)


def test_held_out_noise_never_changes():
    source = made_up(ROWS, LENGTH)
    settings = ["train.seed=99", "diffusion.time_sampling=complementary", "annealing.form=window"]
    found = []
    for overrides in ([], settings):
        made = objective("validation.times=[0.5]", *overrides)
        found.append([m.batch for m in made.held_out(held_out_rows(source, 6), base=True)])
    for a, b in zip(*found, strict=True):
        assert a.form == b.form and a.counts == b.counts and not a.notes
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    at_all, at_half, causal = found[0]
    parts = np.floor((times_of(at_all) - 1e-3) / (1 - 1e-3) * 6)
    assert parts.tolist() == [0, 1, 2, 3, 4, 5]  # one in each equal part of (0, 1]
    assert set(times_of(at_half)) == {0.5} and at_all.form == at_half.form == Full() and causal.form == Causal()


@pytest.mark.parametrize("shift", [True, False])
def test_with_the_shift_alone_the_base_is_measured_and_only_when_asked(shift):
    made = objective(f"diffusion.shift={str(shift).lower()}")
    rows = held_out_rows(made_up(ROWS, LENGTH), 6)
    forms = [[m.batch.form for m in made.held_out(rows, base)] for base in (False, True)]
    assert forms == [[Full()], [Full(), Causal()] if shift else [Full()]]


def full(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool)


def causal(length: int) -> torch.Tensor:
    return full(length).tril()


@torch.no_grad()
def predictions(model, noised: Corrupted) -> np.ndarray:
    """(masked,) the most likely token at each masked position, read bidirectionally."""
    ids = torch.from_numpy(noised.ids(MASK))[None]
    logits = model(ids, attention_mask=torch.zeros(1, 1, LENGTH, LENGTH)).logits[0]
    return logits.argmax(-1).numpy()[np.flatnonzero(noised.masked) - 1]


@torch.no_grad()
def test_held_out_losses_are_those_of_the_definition(base_dir):
    source = made_up(ROWS, LENGTH)
    theirs, ours = stock(base_dir("llama"), mask=True), model_of(base_dir("llama"))
    noised = [held_out(row, 6) for row in source.rows]
    liked = predictions(theirs, noised[-1])[0]
    for model in (theirs, ours):  # a head that likes the mask, so that its predictions are there to be counted
        model.get_output_embeddings().weight[MASK] = 1.01 * model.get_output_embeddings().weight[liked]
    for c in noised:  # and some hits: what is masked is what will be predicted, since the input does not show it
        guesses = predictions(theirs, c)
        c.row.ids[np.flatnonzero(c.masked)[::3]] = np.where(guesses == MASK, 2, guesses)[::3]

    made, found = objective("validation.times=[0.3, 1.0]"), {}
    for measurement in made.held_out(held_out_rows(source, 6), base=True):
        found |= measurement.report(made.sums(measurement.batch, one_forward(ours, measurement.batch)))

    nll = [token_losses(theirs, c, MASK, full) for c in noised]
    causally = [token_losses(theirs, c, MASK, causal) for c in noised]
    guesses = np.concatenate([predictions(theirs, c) for c in noised])
    expected = {
        "val_nelbo": diffusion_loss(theirs, noised, MASK, full, normalize_by="maskable").item(),
        "val_masked_ce": torch.cat(nll).mean().item(),
        "causal_masked_ce": torch.cat(causally).mean().item(),
        "val_accuracy": (guesses == np.concatenate([c.row.ids[c.masked] for c in noised])).mean(),
        "val_mask_share": (guesses == MASK).mean(),
    }
    for time in (0.3, 1.0):
        losses = [token_losses(theirs, held_out(row, 6, time), MASK, full) for row in source.rows]
        expected[f"val_masked_ce_t{time:g}"] = torch.cat(losses).mean().item()
    for high in (0.25, 0.5, 0.75, 1.0):
        for name, losses in (("val_masked_ce", nll), ("causal_masked_ce", causally)):
            inside = [part for c, part in zip(noised, losses) if high - 0.25 < c.t <= high]
            expected[f"{name}_to_t{high:g}"] = torch.cat(inside).mean().item()
    assert 0 < expected["val_accuracy"] != expected["val_mask_share"] > 0
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


# --- without the shift, and what ships


def test_without_the_shift_hidden_state_i_predicts_token_i(base_dir):
    """forward's logits are those of the stock model at the same position, and with the shift of the one before."""
    theirs = stock(base_dir("llama"), mask=True)
    ids = torch.from_numpy(made_up([WHOLE, WHOLE], LENGTH).rows[0].ids)[None]
    with torch.no_grad():
        causal = theirs(ids).logits
        visibility = Visibility(Causal())
        unshifted = model_of(base_dir("llama"), "diffusion.shift=false")(ids, visibility=visibility).logits
        torch.testing.assert_close(unshifted, causal, rtol=1e-5, atol=1e-5)
        shifted = model_of(base_dir("llama"))(ids, visibility=visibility).logits
        torch.testing.assert_close(shifted[:, 1:], causal[:, :-1], rtol=1e-5, atol=1e-5)
        assert torch.equal(shifted[:, 0], shifted[:, 1])
        labels = ids.clone()
        loss = model_of(base_dir("llama"), "diffusion.shift=false")(ids, labels=labels, visibility=visibility).loss
        torch.testing.assert_close(loss, F.cross_entropy(causal[0], ids[0]))


def test_the_shift_that_was_trained_is_shipped_and_obeyed(base_dir, tmp_path):
    """By the folder alone: forward, loss and sampling, which may then fill a first position."""
    ids = torch.from_numpy(made_up([WHOLE], LENGTH).rows[0].ids)[None]
    masked = torch.full((2, 8), MASK)
    for shift in (True, False):
        trained = model_of(base_dir("gpt2"), f"diffusion.shift={str(shift).lower()}", "diffusion.normalize_by=maskable")
        trained.save_pretrained(tmp_path / str(shift))
        written = json.loads((tmp_path / str(shift) / "config.json").read_text())
        assert written["diffusion"] == {
            "shift": shift, "eps": 1e-3, "normalize_by": "maskable", "start_token_id": 0,
        }  # fmt: skip
        assert written["mask_token_id"] == MASK
        loaded = diffusion_class(type(trained.config)).from_pretrained(tmp_path / str(shift)).eval()
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, trained(ids).logits)
            hidden = loaded.base_model(ids, attention_plan=plan_of(ids)).last_hidden_state
            by_position = loaded.get_output_embeddings()(hidden)
            torch.testing.assert_close(loaded(ids).logits[:, 1:], by_position[:, :-1] if shift else by_position[:, 1:])
        if shift:
            with pytest.raises(ValueError, match="put the start token in front"):
                loaded.diffusion_generate(masked)
            with pytest.raises(ValueError, match="which nothing predicts"):
                loaded(ids, labels=ids)
        else:
            out = loaded.diffusion_generate(masked, steps=3, generator=torch.Generator().manual_seed(0))
            assert out.shape == masked.shape and not (out == MASK).any()
            first = loaded(masked[:1]).logits[0, 0].detach()
            first[MASK] = -torch.inf
            greedy = loaded.diffusion_generate(masked[:1], steps=1, temperature=0)
            assert greedy[0, 0] == first.argmax()
            assert loaded(ids, labels=ids).loss.isfinite()


def plan_of(ids: torch.Tensor):
    from pretrain.model.attention import prepare_attention

    return prepare_attention(Visibility(), *ids.shape, ids.device, torch.float32)


def test_the_start_token_is_what_the_corpus_begins_with():
    special = {"bos": 5, "eos": 9}
    found = [objective().shipped({"special_ids": special, "add_bos": bos})["diffusion"] for bos in (True, False)]
    assert [shipped["start_token_id"] for shipped in found] == [5, 9]


def test_a_mean_of_nothing_is_not_a_number(corpus_dir):
    """One held-out row at a tiny t may have no masked token; the run goes on, and the metric is null."""
    config = load_config(RunConfig, None, ["validation.times=[0.0001]"])
    objective = MaskedDiffusion(config, MASK)
    data = TrainData(str(corpus_dir), 3)
    places = data.held_out(1)[:1]
    rows = read_rows([(source, row) for source, row, *_ in places], [0], False)
    rows.totals = [1]
    zeros = torch.zeros(12, dtype=torch.float64)
    reports = [measurement.report(zeros) for measurement in objective.held_out(rows, base=True)]
    assert math.isnan(reports[1]["val_masked_ce_t0.0001"])
    assert mean(3.0, 2) == 1.5 and math.isnan(mean(3.0, 0))
