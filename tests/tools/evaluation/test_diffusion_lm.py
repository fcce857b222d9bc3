"""Likelihoods and texts of diffusion models as lm-eval asks for them."""

import itertools
import math

import numpy as np
import pytest
import torch
from known_model import END, MASK, Digits, Known
from transformers import AutoModelForCausalLM

from pretrain.model.settings import SamplingSettings
from tools.decoding import load
from tools.evaluation.diffusion_lm import DiffusionLM, Likelihood
from tools.evaluation.harness import Answers, Asked

EVERY = ("nelbo", "mask_count")


def asked_by(model, tokenizer, tmp_path, name="mask_count", draws=32, seed=0, batch_size=32, **settings) -> DiffusionLM:
    answers = Answers(tmp_path / f"answers_{name}_{draws}_{seed}_{batch_size}_{len(settings)}")
    how = SamplingSettings(**{"order": "left_to_right", **settings})
    return DiffusionLM(model, tokenizer, answers, Likelihood(name, draws, seed), how, batch_size, progress=False)


@pytest.fixture
def tiny(tiny_checkpoint):
    return load(str(tiny_checkpoint), device="cpu")


@pytest.mark.parametrize("name", EVERY)
def test_a_known_law_has_its_probabilities_and_its_entropy(name, tmp_path):
    known = Known(4)
    lm = asked_by(known, Digits(), tmp_path, name)
    texts = ["".join(map(str, t.tolist())) for t in known.texts]
    scores = lm.score([Asked(".", text) for text in texts])
    # whatever the order of finding them, exact conditionals multiply to the joint: the bound is tight
    assert [s.value for s in scores] == pytest.approx(known.law.log().tolist(), rel=1e-5)
    assert sum(-s.value * p for s, p in zip(scores, known.law.tolist())) == pytest.approx(known.entropy, rel=1e-5)
    assert {s.stderr for s in scores} == {0.0} and {s.tokens for s in scores} == {4}


@pytest.mark.parametrize("name", [*EVERY, "dream"])
def test_drawn_likelihoods_are_a_known_laws_entropy_within_three_errors(name, tmp_path):
    known = Known(6, seed=1)
    lm = asked_by(known, Digits(), tmp_path, name, draws=16)
    scores = [lm.score([Asked(".", "".join(map(str, t.tolist())))])[0] for t in known.texts]
    law = known.law.numpy()
    mean = float((-np.array([s.value for s in scores]) * law).sum())
    error = math.sqrt(float(((np.array([s.stderr for s in scores]) * law) ** 2).sum()))
    assert error > 0
    assert mean == pytest.approx(known.entropy, abs=3 * error + 0.002 * known.entropy)  # eps of 0.001 cuts a little off


def over_all_orders(model, context: list[int], target: list[int], mask: int) -> float:
    """The bound by transformers' own class, one order of finding the tokens after the other; row i tells of i + 1."""
    totals = []
    for order in itertools.permutations(range(len(target))):
        ids = torch.tensor([[*context, *[mask] * len(target)]])
        total = 0.0
        for position in order:
            at = len(context) + position
            log_p = model(ids, use_cache=False).logits[0, at - 1].log_softmax(-1)
            total += float(log_p[target[position]])
            ids[0, at] = target[position]
        totals.append(total)
    return sum(totals) / len(totals)


@torch.no_grad()
def test_scores_equal_transformers_own_class_over_all_orders(tiny, tiny_checkpoint, tmp_path):
    model, tokenizer = tiny
    lm = asked_by(model, tokenizer, tmp_path)
    lengths = set()
    stock = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="eager")
    for context, continuation in (("The king", " had"), ("A fox and", " so"), ("", "ABC")):
        ids, target = lm._fitted(Asked(context, continuation))
        assert len(target) < 6
        lengths.add(len(target))
        score = lm.score([Asked(context, continuation)])[0]
        assert score.value == pytest.approx(over_all_orders(stock, ids, target, model.config.mask_token_id), rel=1e-4)
    assert len(lengths) > 1


def test_neither_batch_nor_neighbours_change_a_score_or_a_text(tiny, tmp_path):
    model, tokenizer = tiny
    asked = [
        Asked(c, t)
        for c in ("The king", "", "One day a fox met a")
        for t in (" had a golden son", " x", " and so on it went")
    ]
    texts = [Asked("Once", max_tokens=5, temperature=1.0, number=n) for n in range(3)] + [
        Asked("Once upon a time", max_tokens=9)
    ]
    texts += [Asked("The", suffix=" ran home.", middle=" dog")]
    together = asked_by(model, tokenizer, tmp_path, draws=8)
    alone = asked_by(model, tokenizer, tmp_path, draws=8, batch_size=1)
    for a, one in zip(asked, together.score(asked)):
        [other] = alone.score([a])
        assert one.value == pytest.approx(other.value, rel=1e-4) and one.is_greedy == other.is_greedy, a
    assert together.write(texts) == [alone.write([t])[0] for t in texts]
    drawn = together.write(texts)[:3]
    assert len(set(drawn)) == 3, "each number of a text has its own draw"


@pytest.mark.parametrize("order", ["left_to_right", "confidence"])
def test_is_greedy_says_what_greedy_decoding_gives(tiny, tmp_path, order):
    model, tokenizer = tiny
    lm = asked_by(model, tokenizer, tmp_path, order=order)
    context = lm.tok_encode("The king of the wood")
    ids = torch.tensor([[*context, *[model.config.mask_token_id] * 3]])
    given = model.diffusion_generate(ids, order=order, temperature=0, eos_token_id=-1)[0, len(context) :].tolist()
    others = [[*given[:2], given[2] + 1], [given[0] + 1, *given[1:]], [5, 6, 7]]
    assert lm._greedy_gives([(context, given), *((context, o) for o in others)]) == [True, False, False, False]
    pairs = [((("", ""), context, t)) for t in (given, others[0])]
    assert [same for _, same in lm._loglikelihood_tokens(pairs)] == [True, False]


def learnt(tiny_checkpoint, steps: int = 500):
    """A diffusion model that has learnt to count: token i is followed by i + 1, whatever is masked."""
    model, tokenizer = load(str(tiny_checkpoint), device="cpu")
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x0 = (torch.randint(10, 60, (16, 1)) + torch.arange(8)) % 50 + 10
        masked = torch.rand(16, 8) < torch.rand(16, 1).clamp(min=0.2)
        masked[:, 0] = False
        labels = x0.masked_fill(~masked, -100)
        loss = model(x0.masked_fill(masked, model.config.mask_token_id), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


@pytest.mark.slow
def test_without_the_shift_a_shifted_checkpoint_is_scored_far_worse(tiny_checkpoint, tmp_path):
    model, tokenizer = learnt(tiny_checkpoint)
    lm = asked_by(model, tokenizer, tmp_path)
    pair = [(("", ""), [20, 21, 22], [23, 24, 25])]
    [(right, greedy)] = lm._loglikelihood_tokens(pair)
    model.config.diffusion = {"shift": False}
    [(wrong, _)] = lm._loglikelihood_tokens(pair)
    assert right > -1 and greedy
    assert wrong < right - 5


def test_the_end_of_text_after_a_target_is_of_dreams_way_alone(tmp_path):
    """Its last token is never masked, and the model sees it."""
    seen = []

    class Watched(Known):
        def __call__(self, input_ids, logits_at, attention_mask=None):
            seen.append((input_ids.clone(), logits_at.clone()))
            return super().__call__(input_ids, logits_at, attention_mask)

    for name, tail in (("dream", [END]), ("mask_count", [])):
        seen.clear()
        asked_by(Watched(3), Digits(), tmp_path, name).score([Asked(".", "012", greedy=False)])
        assert all(ids[:, 4:].tolist() == [tail] * len(ids) and not at[:, 4:].any() for ids, at in seen)
        assert all((ids[:, :1] == END).all() and not at[:, 0].any() for ids, at in seen), "the context stays"
        assert all(((ids == MASK) == at).all() for ids, at in seen)


def test_the_authors_way_is_a_mean_at_their_temperature(tmp_path):
    flat = Known(3)
    flat.law = torch.full_like(flat.law, 1 / len(flat.law))
    lm = asked_by(flat, Digits(), tmp_path)
    [score] = lm.score([Asked(".", "012", greedy=False, faulty=True)])
    assert -math.log(3) * 1.001 < score.value < -0.7 * math.log(3), "a mean over tokens, less where nothing was masked"
    lm.model = Known(3)
    cold = []
    for lm.paper_temperature in (1.0, 0.5):
        cold.append(lm.score([Asked(".", "012", greedy=False, faulty=True)])[0].value)
    assert cold[0] != cold[1]


def test_texts_come_from_masks_after_the_context_or_in_the_gap(tiny, tmp_path):
    model, tokenizer = tiny
    lm = asked_by(model, tokenizer, tmp_path)
    mask = model.config.mask_token_id
    before, middle, after = (
        tokenizer("A fox")["input_ids"],
        tokenizer(" saw it")["input_ids"],
        tokenizer(" go.")["input_ids"],
    )
    ids = torch.tensor([[*before, *[mask] * len(middle), *after]])
    expected = model.diffusion_generate(ids, order="left_to_right", temperature=0)[0]
    [text] = lm.write([Asked("A fox", suffix=" go.", middle=" saw it")])
    assert text == tokenizer.decode(expected[len(before) : len(before) + len(middle)], skip_special_tokens=True)
    plain = model.diffusion_generate(torch.tensor([before]), max_new_tokens=6, order="left_to_right", temperature=0)[0]
    [text] = lm.write([Asked("A fox", max_tokens=6)])
    assert text == tokenizer.decode(plain[len(before) :], skip_special_tokens=True)
    [cut] = lm.write([Asked("A fox", max_tokens=6, until=(text[2:4],))])
    assert cut == text[: text.index(text[2:4])]


def test_what_is_too_long_loses_its_far_end_and_is_counted(tiny, tmp_path):
    model, tokenizer = tiny
    lm = asked_by(model, tokenizer, tmp_path)
    lm.max_length = 16
    long = "word " * 40
    one, two = Asked(long, " end"), Asked(long, suffix=long, middle=" x")
    assert lm.score([one])[0].value < 0 and len(lm.write([two])) == 1
    ids, begin, count = lm._with_masks(two)
    assert (
        len(ids) == 16 and ids[begin : begin + count] == [model.config.mask_token_id] * count and 0 < begin < 16 - count
    )
    assert lm.truncated == {one.key, two.key}


def test_a_text_as_a_whole_is_the_sum_of_its_windows(tmp_path):
    known = Known(4)
    lm = asked_by(known, Digits(), tmp_path)
    lm.max_length = 5

    class Request:
        args = ("0120",)

    [value] = lm.loglikelihood_rolling([Request()])
    index = [t.tolist() for t in known.texts].index([0, 1, 2, 0])
    assert value == pytest.approx(float(known.law[index].log()), rel=1e-5)


def test_a_prefix_stands_before_an_empty_context(tiny, tmp_path):
    model, tokenizer = tiny
    lm = asked_by(model, tokenizer, tmp_path)
    context, target = lm._fitted(Asked("", "The king"))
    assert context == [lm.prefix_token_id] and target == tokenizer("The king", add_special_tokens=False)["input_ids"]
