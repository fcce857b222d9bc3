"""The loop of decoding on models whose joint distribution is known."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_laws import LAW, MASK, VOCABULARY, Joint, Oracle, fixed, probability_of, rng, run, start

from pretrain.model.generation import generate
from pretrain.model.rules import ORDERS
from pretrain.model.sampling import Memory, _Decoding, allotted, blocks_of, states
from pretrain.model.settings import SamplingSettings

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


def test_confidence_prefers_likely_tokens():
    """Why `confidence` is not among the exact: it looks at the token that was drawn. So do rules that rank by it."""
    model = Joint(4)
    for settings in ({"order": "confidence"}, {"threshold": 1.0}, {"factor": 0.0}):
        out = run(model, start(6000, 5), generator=rng(1), **settings)
        counts = torch.bincount((out.sequences[:, 1:] * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double()
        assert (out.nfe == 4).all() and probability_of(counts, model.of({}) * 6000) < 1e-6
        likely = model.of({}).log().nan_to_num(neginf=0.0)
        assert (counts / 6000 * likely).sum() > (model.of({}) * likely).sum(), "likelier texts than the law's"


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


def test_more_steps_than_masks_give_remasking_room():
    x = start(50, 9)
    model = fixed(torch.tensor([0.85, 0.05, 0.05, 0.05, 0.0]))
    plain = run(model, x, order="random")
    revised = run(model, x, order="random", steps=24, remasking=0.9)
    assert (plain.nfe == 8).all() and (revised.nfe <= 24).all() and revised.nfe.float().mean() > 8
    assert revised.confidence[:, 1:].mean() > plain.confidence[:, 1:].mean()


def test_remasking_is_of_the_current_block_alone():
    x = start(40, 13)
    for before, after in itertools.pairwise(run(fixed(LAW), x, block_length=4, remasking=0.9, steps=36).history):
        back = (before != MASK) & (after == MASK)
        for k in range(3):
            later_begun = (before[:, 1 + 4 * (k + 1) :] != MASK).any(1) if k < 2 else torch.zeros(40, dtype=torch.bool)
            assert not back[later_begun, 1 + 4 * k : 5 + 4 * k].any()


def test_the_verification_of_drafts_knows_no_mask_token():
    """Where the shadow would rather predict a mask, what is left of its probability counts."""
    model = fixed(LAW)
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


def test_drafts_are_what_the_model_would_write():
    """Of masks that were asked about, and not committed, the most likely token."""
    for settings in ({"order": "entropy"}, {"order": "margin"}, {"order": "confidence", "temperature": 0}):
        state = next(iter(states(fixed(LAW), start(1, 6), generator=rng(), settings=SamplingSettings(**settings))))
        assert state.masked.sum() == 4 and (state.draft[state.masked] == 0).all()
        assert torch.equal(state.draft[~state.masked], state.ids[~state.masked])


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
