"""Decoding on models whose joint distribution is known: a table of probabilities in place of a network."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pretrain.model.drawing import invert, warpers
from pretrain.model.generation import append_masks, decoding_arguments, generate
from pretrain.model.rules import ORDERS
from pretrain.model.sampling import Memory, allotted, blocks_of, states
from pretrain.model.settings import SamplingSettings

MASK, VOCABULARY = 4, 5
LAW = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05])


class Oracle:
    """A model whose prediction of each position is a given function of the ids (B, L), to logits (B, L, V)."""

    def __init__(self, predict, **config):
        self.config = SimpleNamespace(mask_token_id=MASK, **config)
        self.predict, self.calls, self.asked = predict, 0, 0

    def __call__(self, input_ids, logits_at, attention_mask=None):
        self.calls += 1
        self.asked += int(logits_at.sum())
        return SimpleNamespace(logits=self.predict(input_ids)[logits_at])


class Joint(Oracle):
    """A given law of `length` tokens of a vocabulary of 3 (0, 1, 2): its conditionals are exact for any masks."""

    def __init__(self, length: int, seed: int = 0):
        super().__init__(self.conditionals)
        weights = torch.rand((3,) * length, generator=rng(seed)) ** 3
        self.law, self.length = weights / weights.sum(), length
        self.texts = torch.tensor(list(itertools.product(range(3), repeat=length)))  # (3^n, n)

    def conditionals(self, ids):
        tokens = ids[:, 1:]  # the first is the start token
        fits = (tokens[:, None] == self.texts[None]) | (tokens[:, None] == MASK)
        weight = fits.all(-1) * self.law.flatten()  # (B, 3^n)
        shown = torch.nn.functional.one_hot(self.texts, VOCABULARY).float()  # (3^n, n, V)
        probability = torch.einsum("bt,tnv->bnv", weight, shown)
        first = torch.ones(len(ids), 1, VOCABULARY)
        return torch.cat([first, probability], dim=1).log()

    def of(self, prefix: dict[int, int]) -> torch.Tensor:
        """The law of the texts, given the tokens at some positions."""
        fits = torch.ones(len(self.texts), dtype=torch.bool)
        for position, token in prefix.items():
            fits &= self.texts[:, position] == token
        law = self.law.flatten() * fits
        return law / law.sum()


def fixed(law: torch.Tensor, **config) -> Oracle:
    return Oracle(lambda x: law.log().expand(*x.shape, VOCABULARY).clone(), **config)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(batch: int, length: int) -> torch.Tensor:
    x = torch.full((batch, length), MASK)
    x[:, 0] = 0
    return x


def run(model, x, generator=None, attention_mask=None, eos=None, **settings):
    return generate(
        model,
        x,
        attention_mask,
        return_dict_in_generate=True,
        generator=generator or rng(),
        eos_token_id=eos,
        settings=SamplingSettings(**settings),
    )


def probability_of(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The p-value of counts under their expectations, rare ones put together; 0 where something impossible came."""
    if counts[expected == 0].sum() > 0:
        return 0.0
    common = expected >= 5
    found = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*expected[common].double().tolist(), float(expected[~common].double().sum())]
    pairs = [(f, w) for f, w in zip(found, wanted) if w >= 1]
    share = sum(f for f, _ in pairs) / sum(w for _, w in pairs)
    return 1.0 if len(pairs) == 1 else chisquare([f for f, _ in pairs], [w * share for _, w in pairs]).pvalue


EXACT = [
    {"order": "random"},
    {"order": "margin"},
    {"order": "entropy"},
    {"order": "left_to_right"},
    {"order": "random", "block_length": 2},
    {"order": "entropy", "block_length": 3},
    {"order": "left_to_right", "block_length": 1},
    {"order": "entropy", "steps": 50},
    {"order": "random", "steps": 50},
    {"threshold": 1.0, "order": "entropy"},
    {"entropy_bound": 0.0},
]


@pytest.mark.parametrize("settings", EXACT, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("given", [{}, {0: 1}, {1: 2, 3: 0}], ids=["free", "prefix", "gaps"])
def test_one_token_a_step_samples_the_joint_distribution(settings, given):
    """Chi-square at p = 1e-4 over all texts that are likely enough; one token a step has no independence to assume."""
    model, rows = Joint(4), 6000
    x = start(rows, 5)
    for position, token in given.items():
        x[:, position + 1] = token
    out = run(model, x, generator=rng(sum(given) + 1), **settings)
    assert torch.equal(out.nfe, torch.full((rows,), 4 - len(given))), "each call commits one token"
    counts = torch.bincount((out.sequences[:, 1:] * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double()
    assert probability_of(counts, model.of(given) * rows) > 1e-4


def test_many_at_once_do_not_sample_the_joint():
    """The chi-square above does see a wrong law: all four tokens in one step are taken as independent."""
    model = Joint(4)
    out = run(model, start(6000, 5), steps=1)
    counts = torch.bincount((out.sequences[:, 1:] * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    assert probability_of(counts, model.of({}) * 6000) < 1e-12


settings_drawn = st.fixed_dictionaries(
    {
        "order": st.sampled_from([*ORDERS, None]),
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 2.0]),
        "top_p": st.sampled_from([None, 0.5, 1.0]),
        "top_k": st.sampled_from([None, 2]),
        "steps": st.sampled_from([None, 1, 3, 12, 30]),
        "block_length": st.sampled_from([None, 1, 3, 100]),
        "repetition_penalty": st.sampled_from([None, 1.5]),
    }
)
adaptive = st.sampled_from(
    [{}, {"threshold": 0.3}, {"factor": 1.5}, {"entropy_bound": 1.0}, {"threshold": 0.3, "kl_threshold": 0.1},
     {"remasking": 0.5}]
)  # fmt: skip


@given(settings_drawn, adaptive, st.integers(0, 99))
def test_every_mask_is_filled_and_nothing_else_changes(settings, rule, seed):
    x = torch.randint(0, VOCABULARY, (3, 10), generator=rng(seed))
    x[:, 0] = 1
    masks = (x == MASK).sum(1)
    out = run(fixed(LAW), x, generator=rng(seed), **settings, **rule)
    assert not (out.sequences == MASK).any()
    assert torch.equal(out.sequences[x != MASK], x[x != MASK])
    assert torch.equal(out.step_of >= 0, x == MASK) and torch.equal(out.confidence.isfinite(), x == MASK)
    torch.testing.assert_close(out.tokens_per_forward * out.nfe, masks.float())
    per_block = settings["block_length"] or 100
    blocks = -(-masks // per_block)
    allowed = torch.maximum(masks if settings["steps"] is None else torch.tensor(settings["steps"]), blocks)
    if settings["steps"] is not None and not rule:
        allowed = torch.minimum(allowed, masks.clamp(min=0)) if settings["order"] not in (None, "random") else allowed
    assert (out.nfe <= allowed).all()
    for before, after in itertools.pairwise([x, *out.history]):
        assert torch.equal(after[x != MASK], x[x != MASK])
        if not rule.get("remasking"):
            assert torch.equal(after[before != MASK], before[before != MASK]), "what is committed stays"


def test_a_seed_gives_one_text():
    draw = [run(fixed(LAW), start(2, 30), steps=5, generator=rng(seed)).sequences for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0][0], draw[0][1]), "rows have seeds of their own"
    torch.manual_seed(5)
    first = generate(fixed(LAW), start(1, 30))
    torch.manual_seed(5)
    assert torch.equal(first, generate(fixed(LAW), start(1, 30)))


def test_random_order_reveals_one_kth_of_the_masks():
    """Eq. 4 with T equal steps: at step k a masked token is revealed with probability 1/k."""
    steps, length = 5, 40_001
    history = run(fixed(LAW), start(1, length), steps=steps).history
    left = length - 1
    for k, x in zip(range(steps, 0, -1), history, strict=True):
        now = int((x == MASK).sum())
        assert abs((left - now) / left - 1 / k) < 5 * (1 / k * (1 - 1 / k) / left) ** 0.5 + 1e-9
        left = now
    assert left == 0


def test_random_order_asks_only_about_what_it_commits():
    model = fixed(LAW)
    run(model, start(3, 21), steps=7)
    assert model.asked == 60 and model.calls <= 7


def test_each_order_goes_its_way():
    """Probability, margin and entropy rank four positions differently; a fifth is a tie, which the left one wins."""
    laws = torch.tensor(
        [[0.50, 0.49, 0.005, 0.005], [0.46, 0.18, 0.18, 0.18], [0.40, 0.395, 0.2, 0.005], [0.46, 0.18, 0.18, 0.18]]
    )  # fmt: skip
    logits = torch.full((1, 5, VOCABULARY), -1e4)
    logits[0, 1:, :4] = laws.log()
    model = Oracle(lambda x: logits.expand(len(x), -1, -1).clone())
    expected = {
        "confidence": [1, 2, 4, 3],
        "margin": [2, 4, 1, 3],
        "entropy": [1, 3, 2, 4],
        "left_to_right": [1, 2, 3, 4],
    }
    for order, places in expected.items():
        step_of = run(model, start(1, 5), order=order, temperature=0).step_of[0]
        assert step_of[places].tolist() == [0, 1, 2, 3], order


def test_steps_are_shared_over_blocks_and_masks():
    assert allotted(torch.tensor([[4, 4, 2], [1, 0, 0]]), 5).tolist() == [[2, 2, 1], [5, 1, 1]]
    assert allotted(torch.tensor([[4, 4, 2]]), None).tolist() == [[4, 4, 2]]
    assert allotted(torch.tensor([[4, 4, 2]]), 2).tolist() == [[1, 1, 1]], "a block takes at least one"
    history = run(fixed(LAW), start(1, 9), order="left_to_right", steps=3).history
    assert [int((x == MASK).sum()) for x in history] == [5, 2, 0]
    masks = torch.tensor([[False, True, True, False, True, True, True]])
    assert blocks_of(masks, 2).tolist() == [[-1, 0, 0, -1, 1, 1, 2]]
    assert blocks_of(masks, None).tolist() == [[-1, 0, 0, -1, 0, 0, 0]]


def test_a_block_is_filled_before_the_next_begins():
    out = run(fixed(LAW), start(4, 13), order="entropy", block_length=4, temperature=1.0)
    for block in range(3):
        assert set(out.step_of[:, 1 + 4 * block : 5 + 4 * block].flatten().tolist()) == set(
            range(4 * block, 4 + 4 * block)
        )


@pytest.mark.parametrize("seed", range(5))
def test_temperature_and_filters_are_those_of_transformers(seed):
    """The law of what is drawn is that of transformers' processors, applied to what the model says."""
    logits = torch.randn(1, 9, generator=rng(seed)) * 2
    named = {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.7}
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.7),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(6),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.1),
        ]
    )
    given = torch.tensor([[1, 3]])
    expected = theirs(given, logits.clone()).softmax(-1)[0]

    rows = 20_000
    x = torch.tensor([[1, 3, 8]]).repeat(rows, 1)

    class Said(Oracle):
        def __call__(self, input_ids, logits_at, attention_mask=None):
            return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 1)).expand(len(input_ids), -1).clone())

    model = Said(None)
    model.config.mask_token_id = 9
    x[:, 2] = 9
    out = run(model, x, generator=rng(seed), **named).sequences[:, 2]
    assert probability_of(torch.bincount(out, minlength=9), expected * rows) > 1e-4
    assert len(warpers(**named)) == 5 and len(warpers()) == 0
    assert len(warpers(0.0, top_k=5, repetition_penalty=1.2)) == 1, "the best token needs no filter but the penalty"


def test_a_repetition_penalty_knows_given_and_found_tokens_but_no_masks():
    """Greedy, strong penalty: every token appears once before any twice."""
    x = start(1, 4)
    out = run(fixed(LAW), x, order="left_to_right", temperature=0, repetition_penalty=100.0).sequences
    assert sorted(out[0].tolist()) == [0, 1, 2, 3]


def test_confidence_is_that_of_the_model_before_temperature():
    out = run(fixed(LAW), start(1, 400), temperature=3.0, top_k=2, order="left_to_right")
    law = LAW[:4] / LAW[:4].sum()
    torch.testing.assert_close(out.confidence[0, 1:], law[out.sequences[0, 1:]])
    assert set(out.sequences[0, 1:].tolist()) == {0, 1}


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=6), st.floats(0, 1, exclude_max=True))
def test_inversion_takes_the_token_at_which_the_cumulative_probability_passes(values, uniform):
    logits = torch.tensor([values])
    cumulative = logits.double().softmax(-1).cumsum(-1)[0]
    token = int(invert(logits, torch.tensor([uniform], dtype=torch.float64)))
    assert cumulative[token] >= uniform - 1e-6 and (token == 0 or cumulative[token - 1] <= uniform + 1e-6)
    logits[0, 0] = logits[0, -1] = -torch.inf
    if len(values) > 2:
        for extreme in (0.0, 1 - 2**-53):
            assert 0 < int(invert(logits, torch.tensor([extreme], dtype=torch.float64))) < len(values) - 1


def test_adaptive_rules_end_early_and_keep_to_their_rule():
    """Every position is surer, the more is known: p = 0.5, then 0.95."""

    def predict(x):
        sure = ((x != MASK).sum(1) > 3)[:, None, None]
        law = torch.where(sure, torch.tensor([0.95, 0.05, 0, 0, 0.0]), torch.tensor([0.5, 0.5, 0, 0, 0.0]))
        return law.log().expand(len(x), x.shape[1], VOCABULARY).clone()

    x = start(1, 11)
    for rule in ({"threshold": 0.9}, {"factor": 1.0}, {"entropy_bound": 0.6}):
        out = run(Oracle(predict), x, temperature=0, **rule)
        assert int(out.nfe) < 10 and out.tokens_per_forward > 10 / 9, rule
    out = run(Oracle(predict), x, temperature=0, threshold=0.9)
    # 3 tokens one at a time until 4 are known, then all others at once
    assert [(step == MASK).sum().item() for step in out.history] == [9, 8, 7, 0]


def test_klass_waits_for_two_calm_steps():
    """The prediction changes at the step with 3 known tokens: both steps after it have to be calm again."""

    def predict(x):
        known = (x != MASK).sum(1)
        law = torch.where(
            (known >= 3)[:, None, None], torch.tensor([0.95, 0.05, 0, 0, 0.0]), torch.tensor([0.05, 0.95, 0, 0, 0.0])
        )
        return law.log().expand(len(x), x.shape[1], VOCABULARY).clone()

    out = run(Oracle(predict), start(1, 11), temperature=0, threshold=0.9, kl_threshold=0.01)
    # known before each step: 1 (no past), 2 (calm once), 3 (changed), 4 (calm once), 5 (calm twice)
    assert [(step == MASK).sum().item() for step in out.history] == [9, 8, 7, 6, 0]


def test_calm_is_the_kl_divergence_from_the_step_before():
    """KL(p_t ‖ p_{t−1}), and not the other way round; of a position asked before, and asked in the step before."""
    before, now = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    forward = float((now[0] * (now[0] / before[0]).log()).sum())
    backward = float((before[0] * (before[0] / now[0]).log()).sum())
    assert forward < backward
    at = torch.tensor([[True, True, False]])
    for bound, calm in ((forward * 0.99, 0), ((forward + backward) / 2, 1)):
        memory = Memory(at.shape, bound, torch.device("cpu"))
        assert memory.see(before.log(), at).tolist() == [[0, 0, 0]]
        assert memory.see(now.log(), at).tolist() == [[calm, 1, 0]]
        shifted = torch.tensor([[False, True, True]])
        assert memory.see(now.log()[[1, 1]], shifted).tolist() == [[0, 2, 0]], "a new position has no past"
        assert memory.see(now.log(), at).tolist()[0][0] == 0, "nor has one that was not asked last time"


def test_klass_remembers_masks_of_blocks_to_come():
    """A prediction that has been calm before its block begins is committed at once when it does."""
    law = torch.tensor([0.95, 0.05, 0, 0, 0.0])
    out = run(fixed(law), start(1, 9), temperature=0, threshold=0.9, kl_threshold=0.01, block_length=4)
    assert [(step == MASK).sum().item() for step in out.history] == [7, 6, 4, 0]


def test_the_verification_of_drafts_knows_no_mask_token():
    """Where the shadow would rather predict a mask, what is left of its probability counts."""

    class Checked(Oracle):
        def __init__(self):
            super().__init__(lambda x: LAW.log().expand(*x.shape, VOCABULARY).clone())

    from pretrain.model.sampling import _Decoding

    model = Checked()
    settings = SamplingSettings(threshold=0.1, verify_threshold=0.5)
    x = start(1, 4)
    decoding = _Decoding(model, x, x >= 0, [rng()], torch.tensor([]), MASK, settings)
    drafted = torch.tensor([[False, True, True, False]])
    decoding.ids = torch.tensor([[0, 1, 1, MASK]])
    decoding.committed_before = torch.tensor([5])
    checks = torch.tensor([[0.0, 4.0, 0.0, 0.0, 9.0], [4.0, 0.0, 0.0, 0.0, 9.0]])
    decoding.reader.logits_and_checks = lambda ids, at, drafts: (None, checks)
    _, revised = decoding._ask_and_verify(x == MASK, drafted)
    assert revised.tolist() == [[False, False, True, False]]


def test_more_steps_than_masks_give_remasking_room():
    x = start(50, 9)
    model = fixed(torch.tensor([0.85, 0.05, 0.05, 0.05, 0.0]))
    plain = run(model, x, order="random")
    revised = run(model, x, order="random", steps=24, remasking=0.9)
    assert (plain.nfe == 8).all() and (revised.nfe <= 24).all() and revised.nfe.float().mean() > 8
    assert revised.confidence[:, 1:].mean() > plain.confidence[:, 1:].mean()


@pytest.mark.parametrize("order", ORDERS)
def test_an_end_of_text_ends_a_gap_at_the_end_of_a_row_alone(order):
    law = torch.tensor([0.3, 0.3, 0.2, 0.2, 0.0])
    eos = 3
    x = start(200, 21)
    x[100:, 20] = 1  # a suffix: the gap is not at the end
    out = run(fixed(law), x, order=order, eos=eos)
    plain = run(fixed(law), x, order=order)
    tail = out.sequences[:100, 1:]
    first = torch.where((tail == eos).any(1), (tail == eos).long().argmax(1), 20)
    for row, end in zip(tail.tolist(), first.tolist()):
        assert set(row[end:]) <= {eos}
    assert (out.nfe[:100] <= 20).all() and out.nfe[:100].float().mean() < 19.8
    assert (out.nfe[100:] == 19).all() and torch.equal(out.sequences[100:], plain.sequences[100:])
    cut = out.step_of[:100, 1:] < 0
    assert (cut.any(1) | (out.nfe[:100] == 20)).all()
    assert torch.equal(cut, out.confidence[:100, 1:].isnan())
    place = torch.arange(20)
    assert torch.equal(cut, place > first[:, None]), "the end itself was found; what follows was not"
    real = torch.ones(100, 26, dtype=torch.long)
    real[:, 21:] = 0
    padded = torch.cat([x[:100], torch.ones(100, 5, dtype=torch.long)], dim=1)
    again = run(fixed(law), padded, attention_mask=real, order=order, eos=eos)
    assert torch.equal(again.sequences[:, :21], out.sequences[:100]), "padding does not hide that a gap is at the end"
    assert (out.tokens_per_forward <= 1).all(), "what was cut off was not generated"


def test_an_end_of_text_waits_while_it_may_be_taken_back():
    out = run(fixed(LAW), start(300, 13), eos=3, order="random", block_length=4, remasking=0.9, steps=24)
    for state in out.history[:-1]:
        for k in range(3):  # a block that has masks has ended nothing
            has = (state[:, 1 + 4 * k : 5 + 4 * k] == MASK).any(1)
            assert (state[has, 5 + 4 * k :] == MASK).all()
    tail = out.sequences[:, 1:]
    ended = (tail == 3).any(1)
    assert ended.any()
    filled = (out.step_of[:, 1:] < 0).any(1)
    assert (ended | ~filled).all() and filled.any()


def test_masks_are_appended_after_each_rows_last_token():
    ids = torch.tensor([[7, 7, 1, 2], [1, 2, 7, 7], [1, 2, 3, 5]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    out, real = append_masks(ids, mask, 2, MASK)
    assert real.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert [[t for t, r in zip(*row) if r] for row in zip(out.tolist(), real.tolist())] == [
        [1, 2, MASK, MASK],
        [1, 2, MASK, MASK],
        [1, 2, 3, 5, MASK, MASK],
    ]
    out, real = append_masks(ids[2:], None, 1, MASK)
    assert real is None and out.tolist() == [[1, 2, 3, 5, MASK]]


BAD = [
    ({"steps": 0}, "steps is 0, expected a number of steps from 1 on"),
    ({"steps": 2.5}, "steps is 2.5"),
    ({"temperature": -1}, "temperature is -1, expected 0 or more"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0}, "top_p is 0, expected a share above 0"),
    ({"top_k": -3}, "top_k is -3"),
    ({"order": "left"}, "order is 'left', expected random, confidence, margin, entropy, left_to_right"),
    ({"block_length": 0}, "block_length is 0"),
    ({"threshold": 1.5}, "threshold is 1.5, expected a probability"),
    ({"threshold": 0.9, "factor": 1.0}, "threshold and factor each say how many"),
    ({"kl_threshold": 0.1}, "kl_threshold goes with a threshold"),
    ({"verify_threshold": 0.9}, "verify_threshold goes with a threshold"),
    ({"threshold": 0.5, "verify_threshold": 0.9, "cache": "window"}, "does not go with a cache"),
    ({"remasking": 1.0}, "remasking is 1.0"),
    ({"cache": "prefix"}, "cache is 'prefix', expected None or 'window'"),
    ({"refresh_every": 3}, "refresh_every is for a cache"),
    ({"compile": 1}, "compile is 1"),
    ({"compile": True, "threshold": 0.5, "verify_threshold": 0.9}, "compile wants inputs that keep their shape"),
    ({"threshold": 0.5, "verify_threshold": 0.9, "remasking": 0.5}, "does not go with remasking"),
    ({"threshold": 0.5, "verify_threshold": 0.9, "kl_threshold": 0.5}, "do not go together"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        SamplingSettings(**change)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        decoding_arguments(fixed(LAW), start(1, 4), **change)


def test_what_each_setting_stands_for():
    """The order where none is given, and what a step may know before it asks."""
    orders = [({}, "random"), ({"threshold": 0.9}, "confidence"), ({"factor": 1.0}, "confidence")]
    orders += [({"entropy_bound": 1.0}, "entropy"), ({"threshold": 0.9, "order": "margin"}, "margin")]
    for chosen, order in orders:
        assert SamplingSettings(**chosen).by == order
    for chosen in ({}, {"order": "left_to_right"}, {"remasking": 0.1}):
        assert SamplingSettings(**chosen).blind
    for chosen in ({"order": "entropy"}, *({"order": "random", name: 1.0} for name in ("threshold", "factor"))):
        assert not SamplingSettings(**chosen).blind
    assert not SamplingSettings(order="left_to_right", entropy_bound=1.0).blind
    for chosen in ({"order": "confidence"}, {"threshold": 0.9, "order": "entropy"}, {"factor": 1.0, "order": "random"}):
        assert not SamplingSettings(**chosen).draws_last


def test_confidence_prefers_likely_tokens():
    """Why `confidence` is not among the exact: it looks at the token that was drawn. So do rules that rank by it."""
    model = Joint(4)
    for settings in ({"order": "confidence"}, {"threshold": 1.0}, {"factor": 0.0}):
        out = run(model, start(6000, 5), generator=rng(1), **settings)
        counts = torch.bincount((out.sequences[:, 1:] * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double()
        assert (out.nfe == 4).all() and probability_of(counts, model.of({}) * 6000) < 1e-6
        likely = model.of({}).log().nan_to_num(neginf=0.0)
        assert (counts / 6000 * likely).sum() > (model.of({}) * likely).sum(), "likelier texts than the law's"


def test_remasking_is_of_the_current_block_alone():
    x = start(40, 13)
    for before, after in itertools.pairwise(run(fixed(LAW), x, block_length=4, remasking=0.9, steps=36).history):
        back = (before != MASK) & (after == MASK)
        for k in range(3):
            later_begun = (before[:, 1 + 4 * (k + 1) :] != MASK).any(1) if k < 2 else torch.zeros(40, dtype=torch.bool)
            assert not back[later_begun, 1 + 4 * k : 5 + 4 * k].any()


def test_what_is_not_finite_is_said():
    for bad in (float("nan"), float("inf")):
        for temperature in (0, 1):
            with pytest.raises(ValueError, match="predictions are not finite"):
                run(
                    Oracle(lambda x, bad=bad: torch.full((*x.shape, VOCABULARY), bad)),
                    start(1, 4),
                    temperature=temperature,
                )


def test_odd_but_good_arguments():
    """Numbers of numpy, ids as tensors, whole temperatures, more steps than a long can count, nothing at all."""
    import numpy as np

    x = start(2, 6)
    plain = run(fixed(LAW), x, temperature=2.0, order="entropy")
    for ends in (torch.tensor(-1), torch.tensor([-1]), np.int64(-1), [-1], -1, None):
        out = run(fixed(LAW), x, temperature=np.int64(2), order="entropy", steps=2**62, eos=ends)
        assert torch.equal(out.sequences, plain.sequences) and torch.equal(out.nfe, plain.nfe)
    assert run(fixed(LAW), x, repetition_penalty=2, temperature=2, top_k=np.int64(3)).sequences.shape == x.shape
    masks = torch.tensor([[MASK, MASK, 0, 1]])
    assert torch.equal(generate(fixed(LAW), masks, torch.tensor([[0, 0, 1, 1]])), masks), "masks in padding are none"
    for shape in ((0, 4), (2, 0)):
        assert generate(fixed(LAW), torch.zeros(shape, dtype=torch.long)).shape == shape


def test_padding_does_not_count_towards_the_limit():
    model = fixed(LAW, max_position_embeddings=8)
    ids, real = torch.zeros(2, 8, dtype=torch.long), torch.tensor([[1] * 3 + [0] * 5, [1] * 6 + [0] * 2])
    assert decoding_arguments(model, ids, real, max_new_tokens=2)["input_ids"].shape == (2, 10)
    with pytest.raises(ValueError, match="9 tokens with the masks, but the model takes 8"):
        decoding_arguments(model, ids, real, max_new_tokens=3)


def test_unconditional_text_begins_with_the_start_token_that_the_model_names():
    model = fixed(LAW, diffusion={"start_token_id": 2}, bos_token_id=1)
    model.device = "cpu"
    assert decoding_arguments(model, max_new_tokens=3)["input_ids"].tolist() == [[2, MASK, MASK, MASK]]
    del model.config.diffusion["start_token_id"]
    assert decoding_arguments(model, max_new_tokens=3)["input_ids"].tolist() == [[1, MASK, MASK, MASK]]
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="no start token; begin with a token of your own"):
        decoding_arguments(model, max_new_tokens=3)


def test_drafts_are_what_the_model_would_write():
    """Of masks that were asked about, and not committed, the most likely token."""
    for settings in ({"order": "entropy"}, {"order": "margin"}, {"order": "confidence", "temperature": 0}):
        state = next(iter(states(fixed(LAW), start(1, 6), generator=rng(), settings=SamplingSettings(**settings))))
        assert state.masked.sum() == 4 and (state.draft[state.masked] == 0).all()
        assert torch.equal(state.draft[~state.masked], state.ids[~state.masked])


def test_unknown_arguments_and_shapes_are_refused():
    model = fixed(LAW, max_position_embeddings=8)
    with pytest.raises(TypeError, match="takes no num_beams, stepz"):
        decoding_arguments(model, start(1, 4), num_beams=4, stepz=3)
    with pytest.raises(ValueError, match="9 tokens with the masks, but the model takes 8"):
        decoding_arguments(model, start(1, 4), max_new_tokens=5)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        decoding_arguments(model, start(1, 4), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(rows, tokens\)"):
        decoding_arguments(model, start(1, 4)[0])
    with pytest.raises(ValueError, match="needs input_ids with masks, or max_new_tokens"):
        decoding_arguments(model)
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        list(states(model, start(3, 4), generator=[rng(), rng()]))


def test_a_mask_in_front_is_refused_unless_something_predicts_it():
    x = torch.tensor([[0, 0, MASK], [7, MASK, MASK]])
    padding = torch.tensor([[1, 1, 1], [0, 1, 1]])
    for diffusion in (None, {}, {"shift": True}):
        model = fixed(LAW, diffusion=diffusion)
        with pytest.raises(ValueError, match="the first token is a mask, and nothing predicts it; put the start"):
            generate(model, torch.full((1, 4), MASK))
        with pytest.raises(ValueError, match="the first token of row 1 is a mask"):
            generate(model, x, padding)
    model = fixed(LAW, diffusion={"shift": False})
    assert not (generate(model, torch.full((1, 4), MASK)) == MASK).any()


def test_nothing_to_fill_asks_nothing():
    model = fixed(LAW)
    out = run(model, torch.tensor([[0, 1, 2], [1, 1, 1]]))
    assert model.calls == 0 and out.nfe.tolist() == [0, 0] and out.sequences.tolist() == [[0, 1, 2], [1, 1, 1]]
