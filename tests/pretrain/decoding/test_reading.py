"""How decoding asks real models: full passes, the window cache, shadows that check drafts."""

import itertools

import pytest
import torch
from tiny_models import GAPS, MASK, PROMPTS, VOCABULARY, made, made_shallow, padded, rng
from transformers import DynamicCache

from pretrain.model.attention import AttentionPlan
from pretrain.model.cache import WindowCache
from pretrain.model.reading import Reader, window_of
from pretrain.model.rules import ORDERS


def test_logits_at_are_those_of_the_full_pass(model):
    ids, real = padded(GAPS, "left")
    at = (ids == MASK) & real.bool()
    everything = model(input_ids=ids, attention_mask=real).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=real, logits_at=at).logits, everything[at])


BY_RULE = [{"order": order} for order in ORDERS]
BY_RULE += [
    {"threshold": 0.3},
    {"entropy_bound": 1.0},
    {"order": "random", "steps": 5},
    {"remasking": 0.5, "steps": 15},
]


@pytest.mark.parametrize("settings", BY_RULE, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("block_length", [None, 2])
def test_a_cache_with_a_full_pass_every_step_is_no_cache_to_the_bit(model, settings, block_length):
    ids, real = padded(GAPS, "left")
    call = {"attention_mask": real, "return_dict_in_generate": True, "block_length": block_length, **settings}
    for seed in range(4):
        plain = model.diffusion_generate(ids, generator=rng(seed), **call)
        cached = model.diffusion_generate(ids, generator=rng(seed), cache="window", refresh_every=1, **call)
        assert torch.equal(plain.sequences, cached.sequences) and torch.equal(plain.nfe, cached.nfe)
        assert torch.equal(plain.confidence.nan_to_num(), cached.confidence.nan_to_num())


@pytest.mark.parametrize("order", ["random", "entropy"])
def test_a_block_begins_with_a_full_pass_whenever_the_model_is_first_asked(model, order):
    """Also where a step of Algorithm 2 commits nothing at first, and so asks nothing."""
    passes = []
    ids = torch.tensor([row + [MASK] * (14 - len(row)) for row in PROMPTS])
    act = model.forward
    for seed in range(12):
        stored: set[int] = set()  # rows whose keys and values the cache holds

        def spied(*args, stored=stored, **kwargs):
            cache = kwargs["past_key_values"]
            rows = set(cache.rows.tolist())
            passes.append("full" if cache.positions is None else "window")
            assert passes[-1] == "full" or rows <= stored, "a window over keys and values that were never stored"
            stored |= rows
            return act(*args, **kwargs)

        model.forward = spied
        try:
            model.diffusion_generate(
                ids, order=order, steps=5, cache="window", block_length=7, generator=rng(seed), eos_token_id=-1
            )  # fmt: skip
        finally:
            del model.forward
    assert set(passes) == {"full", "window"}


@pytest.mark.parametrize("cache", [{}, {"cache": "window"}, {"cache": "window", "refresh_every": 2}])
def test_the_first_token_of_a_block_is_committed_by_the_rule_like_any_other(model, cache):
    """The trap of a cache that takes a block's first token unchecked from the pass that refreshes it."""
    first = 0
    for seed in range(6):
        states = model.diffusion_states(
            torch.tensor([[5, 9, 33, *[MASK] * 12]]),
            order="entropy",
            block_length=4,
            threshold=0.6,
            eos_token_id=-1,
            generator=rng(seed),
            **cache,
        )
        for state in states:
            found = state.committed[0].nonzero().flatten()
            unsure = [int(k) for k in found if float(state.confidence[0, k]) <= 0.6]
            assert len(unsure) <= 1, "what is below the threshold is the one that is best by the order"
            assert ((found - 3) // 4).unique().numel() == 1, "one block at a time"
            begins = state.masked[0, 3:].view(3, 4).sum(1)[int(found[0] - 3) // 4] + len(found) == 4
            first += bool(begins and (found - 3).remainder(4).min() > 0)
    assert first > 0, "a block may well begin elsewhere than with its first token"


def test_temperature_0_takes_the_most_probable_token_whatever_else_is_set(model):
    ids = torch.tensor([[5, 9, 33, MASK, MASK, 7]])
    for seed in range(3):
        out = model.diffusion_generate(ids, order="left_to_right", temperature=0, generator=rng(seed), eos_token_id=-1)
        expected = ids.clone()
        for k in (3, 4):
            logits = model(input_ids=expected).logits[0, k]
            logits[MASK] = -torch.inf
            expected[0, k] = logits.argmax()
        assert torch.equal(out, expected)


def keys_and_values(model, ids: torch.Tensor) -> WindowCache:
    """A cache filled by a full pass."""
    cache = WindowCache(*ids.shape)
    model(input_ids=ids, past_key_values=cache)
    return cache


def test_a_window_pass_over_unchanged_tokens_gives_the_logits_of_a_full_pass(model):
    """Also for the first position of the window: row a − 1, which predicts it, is computed anew."""
    ids = torch.randint(0, 380, (2, 12), generator=rng())
    everything = model(input_ids=ids).logits
    cache = keys_and_values(model, ids)
    block = torch.zeros(2, 12, dtype=torch.bool)
    block[0, 4:8], block[1, 6:9] = True, True
    position, real = window_of(block, shift=True)
    assert position.tolist() == [[3, 4, 5, 6, 7], [5, 6, 7, 8, 8]] and real.tolist() == [
        [True] * 5,
        [True] * 4 + [False],
    ]
    cache.positions = position
    at = block.gather(1, position) & real
    found = model(input_ids=ids.gather(1, position), position_ids=position, past_key_values=cache, logits_at=at).logits
    torch.testing.assert_close(found, everything[block])


def test_a_window_pass_is_a_forward_with_the_rest_of_keys_and_values_held(model):
    """Against a dense computation: one layer's K and V outside the window are those of the old text.

    With a single layer all K and V outside the window depend on their own tokens alone, so holding them is exact.
    """
    one = made_shallow(model)
    ids = torch.randint(0, 380, (1, 12), generator=rng())
    cache = keys_and_values(one, ids)
    changed = ids.clone()
    changed[0, 5:8] = torch.tensor([1, 2, 3])
    block = torch.zeros(1, 12, dtype=torch.bool)
    block[0, 5:8] = True
    position, _ = window_of(block, shift=True)
    cache.positions = position
    found = one(
        input_ids=changed.gather(1, position),
        position_ids=position,
        past_key_values=cache,
        logits_at=block.gather(1, position),
    ).logits
    torch.testing.assert_close(found, one(input_ids=changed).logits[block])
    # and what the window has written stays for the next pass
    cache.positions = torch.tensor([[9, 10]])
    found = one(input_ids=changed[:, 9:11], position_ids=cache.positions, past_key_values=cache).logits
    torch.testing.assert_close(found[:, 1], one(input_ids=changed).logits[:, 10])


def test_row_a_minus_1_reacts_to_what_the_block_before_committed(model):
    """The trap of a cache that shifts inside the block: its first token must see the newest token before it."""
    ids = torch.tensor([[5, 9, 33, MASK, MASK, MASK, MASK]])
    reader = Reader(model, torch.ones_like(ids, dtype=torch.bool), cached=True)
    first = torch.tensor([[False, False, False, True, True, False, False]])
    second = torch.tensor([[False, False, False, False, False, True, True]])
    same = torch.tensor([0])
    reader.logits(ids, first, first, same)
    ids = ids.clone()
    ids[0, 3:5] = torch.tensor([50, 60])
    stale = reader.logits(ids, second, second, same)  # a window pass, never told of 50 at 3
    for changed in (61, 62):
        other = ids.clone()
        other[0, 4] = changed
        assert not torch.allclose(reader.logits(other, second, second, same)[0], stale[0], atol=1e-3)


def test_each_row_has_full_passes_of_its_own(model):
    """Calls are counted by row: the second row's new block makes no full pass for the first."""
    seen = []
    reader = Reader(model, torch.ones(2, 8, dtype=torch.bool), cached=True, refresh_every=3)
    full, window = reader._full, reader._window
    reader._full = lambda ids, at, rows: seen.append(("full", rows.tolist())) or full(ids, at, rows)
    reader._window = lambda ids, at, b, rows: seen.append(("window", rows.tolist())) or window(ids, at, b, rows)
    ids = torch.full((2, 8), MASK)
    ids[:, 0] = 1
    block = torch.zeros(2, 8, dtype=torch.bool)
    block[:, 2:4] = True
    for blocks in ([0, 0], [0, 0], [0, 1], [0, 1], [0, 1]):
        found = reader.logits(ids, block, block, torch.tensor(blocks))
        assert found.shape == (4, VOCABULARY)
    assert seen == [
        ("full", [True, True]),
        ("window", [True, True]),
        ("full", [False, True]),
        ("window", [True, False]),
        ("full", [True, False]),
        ("window", [False, True]),
        ("window", [True, True]),
    ]


def test_a_mixed_pass_keeps_each_rows_logits(model):
    """A full pass for one row beside a window pass for the other gives what each gives alone, in order."""
    ids = torch.randint(0, 380, (3, 12), generator=rng(2))
    block = torch.zeros(3, 12, dtype=torch.bool)
    block[0, 3:6], block[1, 4:8], block[2, 7:9] = True, True, True
    reader = Reader(model, torch.ones(3, 12, dtype=torch.bool), cached=True)
    reader.logits(ids, block, block, torch.tensor([0, 0, 0]))
    found = reader.logits(ids, block, block, torch.tensor([0, 1, 0]))  # the middle row alone has a new block
    torch.testing.assert_close(found, model(input_ids=ids).logits[block])
    at = block.clone()
    at[1] = False
    torch.testing.assert_close(reader.logits(ids, at, block, torch.tensor([0, 1, 0])), model(input_ids=ids).logits[at])


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_shadow_is_a_forward_in_which_one_token_is_hidden(family, shift):
    """WINO with the shift, written anew: for one draft, a dense mask over L + 1 rows, computed layer by layer alike."""
    model = made(family, shift)
    ids = torch.tensor([[5, 9, 33, 60, 70, MASK, 80]])
    length, j = 7, 4
    at, drafts = ids == MASK, torch.zeros_like(ids, dtype=torch.bool)
    drafts[0, [3, 4]] = True
    reader = Reader(model, torch.ones_like(ids, dtype=torch.bool))
    logits, checks = reader.logits_and_checks(ids, at, drafts)
    torch.testing.assert_close(logits, model(input_ids=ids).logits[at])  # shadows change nothing for the others

    origin = j - 1 if shift else j
    extra = ids[0, origin] if shift else torch.tensor(MASK)
    mask = torch.zeros(length + 1, length + 1, dtype=torch.bool)
    mask[:length, :length] = True
    mask[length] = True
    mask[length, [j, origin]] = False
    positions = torch.tensor([[*range(length), origin]])
    hidden = model.diffusion_backbone(
        input_ids=torch.cat([ids[0], extra[None]])[None],
        position_ids=positions,
        use_cache=False,
        attention_plan=AttentionPlan("sdpa", mask=mask[None, None]),
    ).last_hidden_state
    torch.testing.assert_close(checks[1], model.vocabulary_head()(hidden[0, length]))


def test_a_shadow_of_one_layer_does_not_know_its_token():
    """With one layer nothing can carry x_j around its mask: the check is the same whatever x_j is."""
    for family in ("llama", "gpt2"):
        one = made_shallow(made(family))
        one.config.mask_token_id, one.config.diffusion = MASK, {"shift": True}
        drafts = torch.zeros(1, 6, dtype=torch.bool)
        drafts[0, 4] = True
        reader = Reader(one, torch.ones(1, 6, dtype=torch.bool))
        checks = [
            reader.logits_and_checks(torch.tensor([[5, 9, 33, 60, token, MASK]]), ~drafts & False, drafts)[1]
            for token in (7, 200)
        ]
        torch.testing.assert_close(checks[0], checks[1])
        other = reader.logits_and_checks(torch.tensor([[5, 9, 33, 61, 7, MASK]]), ~drafts & False, drafts)[1]
        assert not torch.allclose(other, checks[0], atol=1e-3), "but it does know x_{j−1}, which it is a copy of"


def test_shadows_do_not_see_padding(model):
    row = [5, 9, 33, 60, 70, MASK, 80]
    checks = []
    for side, filler in (("left", 7), ("left", 11), ("right", 7)):
        ids, real = padded([row, [5, 9, 33, 60, 70, 71, 72, 73, 74]], side, filler)
        drafts = torch.zeros_like(ids, dtype=torch.bool)
        begin = int(real[0].argmax())
        drafts[0, [begin + 3, begin + 4]] = True
        at = torch.zeros_like(drafts)
        at[0, begin + 5] = True
        logits, found = Reader(model, real.bool()).logits_and_checks(ids, at, drafts)
        checks.append((logits, found))
    alone = torch.tensor([row])
    drafts = torch.zeros_like(alone, dtype=torch.bool)
    drafts[0, [3, 4]] = True
    expected = Reader(model, torch.ones_like(drafts)).logits_and_checks(alone, alone == MASK, drafts)
    for logits, found in checks:
        torch.testing.assert_close(logits, expected[0])
        torch.testing.assert_close(found, expected[1])


def test_wino_takes_back_what_is_unlikely_with_itself_hidden(model):
    """One step of it from the definition: the probability of each draft under its shadow, against the threshold."""
    ids = torch.tensor([[5, 9, 33, *[MASK] * 9]])
    confidence = next(iter(model.diffusion_states(ids, steps=1, temperature=0, eos_token_id=-1))).confidence[0, 3:]
    settings = {"threshold": float(confidence.sort().values[3]), "verify_threshold": 0.5, "temperature": 0}
    before, after = itertools.islice(model.diffusion_states(ids, eos_token_id=-1, **settings), 2)
    drafted = before.committed
    reader = Reader(model, torch.ones_like(drafted))
    _, checks = reader.logits_and_checks(before.ids, before.masked, drafted)
    checks[:, MASK] = -torch.inf
    probability = checks.softmax(-1).gather(1, before.ids[drafted][:, None])[:, 0]
    doubted = sorted((p, k) for k, p in zip(drafted[0].nonzero().flatten().tolist(), probability.tolist()) if p < 0.5)
    expected = {k for _, k in doubted[: int(drafted.sum()) - 1]}
    assert expected and set(after.revised[0].nonzero().flatten().tolist()) == expected
    assert after.confidence[0, sorted(expected)].isnan().all() and (after.ids[0, sorted(expected)] == MASK).all()


def test_wino_takes_back_and_ends(model):
    ids = torch.tensor([[5, 9, 33, *[MASK] * 12]])
    plain = model.diffusion_generate(ids, threshold=0.0, temperature=0, return_dict_in_generate=True)
    assert int(plain.nfe) == 1
    taken = model.diffusion_generate(
        ids, threshold=0.0, verify_threshold=1.0, temperature=0, return_dict_in_generate=True
    )
    left = [int((state == MASK).sum()) for state in taken.history]
    assert left[0] == 0 and int(taken.nfe) == 1, "nothing is masked after the first step: it is done"
    confidence = next(iter(model.diffusion_states(ids, steps=1, temperature=0))).confidence[0, 3:]
    half = float(confidence.median())
    taken = model.diffusion_generate(
        ids, threshold=half, verify_threshold=1.0, temperature=0, return_dict_in_generate=True
    )
    left = [int((state == MASK).sum()) for state in taken.history]
    pairs = list(itertools.pairwise(taken.history))
    assert left[-1] == 0 and all(masks <= 11 - step for step, masks in enumerate(left)), "t steps find t tokens or more"
    assert any(((a != MASK) & (b == MASK)).any() for a, b in pairs), "some come back"


def test_a_cache_of_another_kind_is_refused(model):

    with pytest.raises(TypeError, match="past_key_values is a DynamicCache, expected a WindowCache"):
        model(input_ids=torch.tensor([[1, 2]]), past_key_values=DynamicCache())
