"""Decoding with real models of transformers: batches, the shift, the window cache, WINO's shadows; tiny weights."""

import itertools
import re

import pytest
import torch
from helpers import tiny_config

from pretrain.model.cache import WindowCache
from pretrain.model.generation import decoding_arguments, settings_from
from pretrain.model.modeling_diffullama import diffusion_class
from pretrain.model.reading import Reader, window_of
from pretrain.model.rules import ORDERS
from pretrain.model.settings import SamplingSettings

MASK, VOCABULARY = 383, 384
FAMILIES = ["llama", "gpt2", "qwen3"]
PROMPTS = [[5, 9, 33], [7, 8], [4, 91, 55, 23, 17]]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return made(request.param)


def made(family: str, shift: bool = True):
    torch.manual_seed(3)
    config = tiny_config(family)
    config.mask_token_id, config.diffusion = MASK, {"shift": shift}
    built = diffusion_class(type(config))._from_config(config, attn_implementation="diffullama", dtype=torch.float32)
    with torch.no_grad():  # sharper predictions, so that a difference shows and thresholds are passed
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        head = built.get_output_embeddings().weight
        built.get_output_embeddings().weight = torch.nn.Parameter(head * 12)
    return built.eval()


def padded(rows: list[list[int]], side: str, filler: int = MASK) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask) of rows of different lengths, padded with a token that could be taken for real."""
    width = max(map(len, rows))
    ids, real = torch.full((len(rows), width), filler), torch.zeros(len(rows), width, dtype=torch.long)
    for k, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[k, place], real[k, place] = torch.tensor(row), 1
    return ids, real


GAPS = [p + [MASK] * n for p, n in zip(PROMPTS, (2, 4, 12))]  # the shortest first: it is done while others go on
GAPS[1] += [11, 12, MASK, MASK, 13]
SETTINGS = [
    {"order": "random"},
    {"order": "random", "steps": 3},
    {"order": "entropy", "block_length": 2},
    {"order": "left_to_right", "block_length": 3, "cache": "window"},
    {"order": "random", "steps": 4, "block_length": 6, "cache": "window"},
    {"order": "random", "steps": 4, "block_length": 6, "cache": "window", "refresh_every": 2},
    {"order": "confidence", "block_length": 3, "cache": "window", "refresh_every": 2, "threshold": 0.3},
    {"threshold": 0.2, "verify_threshold": 0.9},
    {"threshold": 0.2, "verify_threshold": 0.9, "block_length": 4},
    {"threshold": 0.2, "kl_threshold": 0.5, "repetition_penalty": 1.3},
    {"threshold": 0.1, "kl_threshold": 9.0, "block_length": 8, "cache": "window"},
    {"remasking": 0.9, "steps": 20, "order": "margin"},
    {"remasking": 0.9, "steps": 20, "order": "random", "block_length": 3},
    {"order": "entropy", "temperature": 0},
]
FEWER = ("threshold", "steps")  # settings by which some row takes another number of calls than it has masks


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize(("side", "filler"), [("left", MASK), ("right", 7)])
def test_a_text_is_the_same_alone_and_in_any_batch(model, settings, side, filler):
    """Its padding, its neighbours and its place in the batch change nothing: neither text nor number of calls."""
    again = {"return_dict_in_generate": True, "eos_token_id": [17, 20, 21, 22, 23], **settings}
    alone = [
        model.diffusion_generate(torch.tensor([row]), generator=[rng(k)], **again) for k, row in enumerate(GAPS)
    ]  # fmt: skip
    for places in ([0, 1, 2], [2, 0, 1]):
        ids, real = padded([GAPS[k] for k in places], side, filler)
        together = model.diffusion_generate(ids, attention_mask=real, generator=[rng(k) for k in places], **again)
        for place, k in enumerate(places):
            here = real[place].bool()
            assert torch.equal(together.sequences[place][here], alone[k].sequences[0])
            assert torch.equal(together.step_of[place][here], alone[k].step_of[0])
            assert together.nfe[place] == alone[k].nfe[0]
        assert torch.equal(together.sequences[real == 0], ids[real == 0]), "padding stays"
    for row, out in zip(GAPS, alone):
        given = torch.tensor(row) != MASK
        assert torch.equal(out.sequences[0][given], torch.tensor(row)[given])
    if any(name in settings for name in FEWER):
        assert any(int(out.nfe) != row.count(MASK) for row, out in zip(GAPS, alone)), "the rule did something"


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
    for seed in range(12):
        seen = {}

        def spied(*args, act=model.forward, seen=seen, **kwargs):
            cache = kwargs["past_key_values"]
            passes.append(cache.positions is None)
            for row, token in zip(cache.rows.tolist(), range(10)):
                assert cache.positions is None or row in seen, "a window over keys and values that were never stored"
                seen[row] = token
            return act(*args, **kwargs)

        ids = torch.tensor([row + [MASK] * (14 - len(row)) for row in PROMPTS])
        model.forward = spied
        try:
            model.diffusion_generate(
                ids, order=order, steps=5, cache="window", block_length=7, generator=rng(seed), eos_token_id=-1
            )  # fmt: skip
        finally:
            del model.forward
    assert any(passes) and not all(passes)


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


def made_shallow(model):
    fewer = {"num_hidden_layers": 1, "n_layer": 1, "layer_types": None}
    config = type(model.config)(**{**model.config.to_dict(), **fewer})
    torch.manual_seed(5)
    return diffusion_class(type(config))._from_config(config, attn_implementation="diffullama").eval()


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

    from pretrain.model.attention import AttentionPlan

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
    from transformers import DynamicCache

    with pytest.raises(TypeError, match="past_key_values is a DynamicCache, expected a WindowCache"):
        model(input_ids=torch.tensor([[1, 2]]), past_key_values=DynamicCache())


def test_unconditional_text_begins_with_the_start_token(model):
    out = model.diffusion_generate(max_new_tokens=6, generator=rng(), eos_token_id=-1)
    assert out.shape == (1, 7) and out[0, 0] == model.config.bos_token_id and not (out == MASK).any()
    ids, real = padded(PROMPTS, "right")
    out = model.diffusion_generate(ids, attention_mask=real, max_new_tokens=4, generator=[rng(k) for k in range(3)])
    alone = model.diffusion_generate(torch.tensor([PROMPTS[1]]), max_new_tokens=4, generator=[rng(1)])
    assert torch.equal(out[1, :6], alone[0])


def test_the_generation_config_gives_the_defaults(model):
    from transformers import GenerationConfig

    ids = torch.tensor([GAPS[2]])
    call = {"return_dict_in_generate": True, "eos_token_id": -1}
    torch.manual_seed(0)
    plain = model.diffusion_generate(ids, order="left_to_right", block_length=2, temperature=0, **call)
    config = GenerationConfig(order="left_to_right", block_length=2, do_sample=False, eos_token_id=3)
    assert torch.equal(plain.step_of, model.diffusion_generate(ids, generation_config=config, **call).step_of)
    greedy = model.diffusion_generate(ids, order="left_to_right", do_sample=False, **call)
    assert torch.equal(plain.sequences, greedy.sequences)
    arguments = decoding_arguments(model, ids, generation_config=config)
    assert arguments["eos_token_id"] == 3 and decoding_arguments(model, ids)["eos_token_id"] == 0
    assert decoding_arguments(model, ids, eos_token_id=-1)["eos_token_id"] == -1
    named, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    assert decoding_arguments(model, ids)["eos_token_id"] == model.config.eos_token_id == 0
    model.generation_config.eos_token_id = named
    config.max_new_tokens = 5
    assert decoding_arguments(model, generation_config=config)["input_ids"].shape == (1, 6)
    assert decoding_arguments(model, ids, generation_config=config)["input_ids"].shape == ids.shape


def test_a_rule_that_is_given_replaces_the_rules_of_the_defaults():
    from transformers import GenerationConfig

    defaults = GenerationConfig(
        threshold=0.9, verify_threshold=0.8, block_length=4, temperature=0.5, do_sample=True, top_p=0.9
    )
    assert settings_from(defaults, {}) == SamplingSettings(
        threshold=0.9, verify_threshold=0.8, block_length=4, temperature=0.5, top_p=0.9
    )
    kept = {"block_length": 4, "temperature": 0.5, "top_p": 0.9}
    assert settings_from(defaults, {"order": "random"}) == SamplingSettings(order="random", **kept)
    assert settings_from(defaults, {"factor": 1.0}) == SamplingSettings(factor=1.0, **kept)
    assert settings_from(defaults, {"threshold": None}) == SamplingSettings(**kept)
    assert settings_from(defaults, {"block_length": None, "temperature": None}).block_length is None
    cached = GenerationConfig(cache="window", refresh_every=3)
    assert settings_from(cached, {"cache": None}) == SamplingSettings()
    assert settings_from(cached, {"refresh_every": 5}) == SamplingSettings(cache="window", refresh_every=5)
    assert settings_from(cached, {"refresh_every": None}) == SamplingSettings(cache="window")
    calm = GenerationConfig(threshold=0.9, kl_threshold=0.1)
    assert settings_from(calm, {"order": "entropy"}) == SamplingSettings(order="entropy")
    greedy = GenerationConfig(do_sample=False)
    assert settings_from(greedy, {}).temperature == 0 and settings_from(greedy, {"temperature": 0.5}).temperature == 0.5
    assert settings_from(greedy, {}, do_sample=True).temperature == 1
    assert settings_from(None, {"compile": None, "remasking": None}) == SamplingSettings()


class Recorder:
    """What a streamer is told; `first` is what it takes for the prompt."""

    def __init__(self, drafts: bool = True):
        self.said, self.drafts, self.ended = [], [], False
        if drafts:
            self.put_draft = lambda tokens: self.drafts.append(tokens.tolist())

    def put(self, tokens):
        assert not self.ended
        self.said.append(tokens.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("settings", [{"order": "entropy"}, {"order": "left_to_right"}, {"remasking": 0.5, "steps": 9}])
def test_a_streamer_gets_each_token_once_from_the_left(model, settings):
    row = GAPS[1]
    recorder = Recorder()
    out = model.diffusion_generate(torch.tensor([row]), streamer=recorder, generator=rng(), **settings)
    assert recorder.ended and [t for part in recorder.said for t in part] == out[0].tolist()
    assert recorder.said[0] == row[: row.index(MASK)], "the prompt comes first, and alone"
    assert recorder.drafts and all(len(draft) <= len(row) for draft in recorder.drafts)
    if settings.get("remasking"):
        assert len(recorder.said) == 2, "what may be taken back is not said"
    silent = Recorder(drafts=False)
    again = model.diffusion_generate(torch.tensor([row]), streamer=silent, generator=rng(), **settings)
    assert torch.equal(again, out) and silent.said == recorder.said
    ids, real = padded([row, row + [5] * 4], "right", 7)
    padding = Recorder()
    model.diffusion_generate(ids[:1], attention_mask=real[:1], streamer=padding, generator=rng(), **settings)
    assert padding.said == recorder.said and padding.drafts == recorder.drafts, "padding is not said"
    with pytest.raises(ValueError, match="a streamer shows one row, and input_ids has 2"):
        model.diffusion_generate(torch.tensor([row, row]), streamer=recorder)


def test_the_streamer_of_transformers_prints_the_text(model, tokenizer, capsys):
    from transformers import TextDiffusionStreamer

    ids = torch.tensor([[*tokenizer("The Fox saw a")["input_ids"], *[MASK] * 5]])
    streamer = TextDiffusionStreamer(tokenizer, skip_special_tokens=True)
    out = model.diffusion_generate(ids, streamer=streamer, generator=rng(), eos_token_id=-1)
    printed = capsys.readouterr().out
    assert "\033[33m" in printed, "drafts are yellow"
    plain = re.sub(r"\0337.*?\0338\033\[J", "", printed, flags=re.DOTALL)
    assert plain.strip() == tokenizer.decode(out[0], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_text_and_keeps_its_shapes():
    """No more than three kinds of input: full passes without and with what is stored, and windows."""
    model = made("llama")
    before = set(model.state_dict())
    settings = {"order": "entropy", "temperature": 0, "block_length": 3, "eos_token_id": -1}
    two, one = torch.tensor([[5, 9, 33, *[MASK] * 7], [5, 9, *[MASK] * 2, 1, 2, 3, 4, 5, 6]]), [[5, 9, 33, *[MASK] * 7]]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for ids, extra in ((two, {}), (torch.tensor(one), {"cache": "window"})):
            plain = made("llama").diffusion_generate(ids, **settings, **extra)
            assert torch.equal(plain, model.diffusion_generate(ids, compile=True, **settings, **extra))
            torch._dynamo.reset()
    assert set(model.state_dict()) == before
    with pytest.raises(ValueError, match="compile with a cache is for one text at a time"):
        model.diffusion_generate(two, compile=True, cache="window")
