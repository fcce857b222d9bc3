import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.model.attention import AttentionPlan, _block_mask, attend, choose, plan
from pretrain.model.modeling_diffullama import diffusion_class
from pretrain.model.visibility import Segments, Visibility, hashed_uniform, positions

FAMILIES = ["llama", "llama_tied", "gpt2", "qwen3", "mistral"]
CPU = torch.device("cpu")
FORMS = ["full", "causal", "bernoulli", "window", "block"]
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)
HEADS = [(4, 4), (4, 2), (3, 1)]


def documents_of(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def seen(form: str, i: int, j: int, ratio: float, width: int, key) -> bool:
    """Does position i of a document see position j, written by the definition of each form."""
    if form == "bernoulli":
        return j <= i or hashed_uniform(key, torch.tensor(i), torch.tensor(j)).item() < ratio
    if form == "block":
        return j // width <= i // width
    return {"full": True, "causal": j <= i, "window": j - i <= width}[form]


def visible(form: str, rows: list[list[int]], ratio: float, width: int, key) -> torch.Tensor:
    """(B, 1, L, L) of rows given by their documents' lengths, pair by pair."""
    total = sum(rows[0])
    found = torch.zeros(len(rows), 1, total, total, dtype=torch.bool)
    for b, parts in enumerate(rows):
        start = 0
        for n in parts:
            for i, j in itertools.product(range(n), range(n)):
                found[b, 0, start + i, start + j] = seen(form, i, j, ratio, width, key)
            start += n
    return found


def reference(q, k, v, visible: torch.Tensor) -> torch.Tensor:
    """Attention in fp64, as a textbook writes it; (B, H, L, D) -> (B, L, H, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(1, 2)


def tensors(batch: int, heads: tuple[int, int], length: int, seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, length, 8) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


@settings(deadline=None, max_examples=150)
@given(lengths, st.sampled_from(FORMS), st.booleans(), st.sampled_from(HEADS), st.integers(0, 1000), st.integers(1, 40))
def test_sdpa_equals_the_dense_reference(lengths, form, isolated, heads, seed, width):
    """Forward and gradients, over lengths, documents, forms, widths and grouped heads; dense and by document."""
    rows = [lengths, lengths[::-1]] if isolated else [[sum(lengths)]] * 2
    documents = torch.cat([documents_of(row) for row in rows]) if isolated else None
    visibility = Visibility(form, 0.4, width, (seed, 3), documents)
    want_visible = visible(form, rows, 0.4, width, (seed, 3))

    mine = [x.requires_grad_() for x in tensors(2, heads, sum(lengths), seed)]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    got, _ = attend(None, *mine, None, attention_plan=plan(visibility, 2, sum(lengths), CPU, torch.float64))
    want = reference(*theirs, want_visible)
    torch.testing.assert_close(got, want)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), mine), torch.autograd.grad((want * weights).sum(), theirs)
    ):
        torch.testing.assert_close(a, b)


def test_documents_are_taken_one_by_one_where_that_is_less_work():
    def bounds(parts):
        return plan(
            Visibility("window", width=3, documents=documents_of(parts)), 1, sum(parts), CPU, torch.float32
        ).bounds

    assert bounds([16, 16, 32]) == (0, 16, 32, 64) and bounds([60, 4]) == ()


@settings(deadline=None, max_examples=60)
@given(lengths, st.sampled_from(FORMS), st.booleans(), st.sampled_from(HEADS), st.integers(0, 1000), st.integers(1, 40))
def test_flex_masks_equal_the_dense_reference(lengths, form, isolated, heads, seed, width):
    """Forward only: FlexAttention has no gradients on a CPU."""
    rows = [lengths, lengths[::-1]] if isolated else [[sum(lengths)]] * 2
    documents = torch.cat([documents_of(row) for row in rows]) if isolated else None
    visibility = Visibility(form, 0.4, width, (seed, 3), documents)
    qkv = tensors(2, heads, sum(lengths), seed, torch.float32)
    made = AttentionPlan("flex", block_mask=_block_mask(visibility, 2, sum(lengths), CPU))
    got, _ = attend(None, *qkv, None, attention_plan=made)
    want = reference(*(x.double() for x in qkv), visible(form, rows, 0.4, width, (seed, 3)))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def flash(cu_seqlens: list[int], window: tuple[int, int]) -> torch.Tensor:
    """(T, T) bool: what a varlen flash kernel shows, by its documentation."""
    total = cu_seqlens[-1]
    found = torch.zeros(total, total, dtype=torch.bool)
    for start, stop in itertools.pairwise(cu_seqlens):
        for i, j in itertools.product(range(start, stop), range(start, stop)):
            left, right = window
            found[i, j] = (left < 0 or i - j <= left) and (right < 0 or j - i <= right)
    return found


@settings(deadline=None, max_examples=100)
@given(lengths, st.sampled_from(["full", "causal", "window"]), st.booleans(), st.integers(0, 40))
def test_what_flash_kernels_are_given_shows_the_same(lengths, form, isolated, width):
    """cu_seqlens and window_size, read as the kernels read them, against the dense mask."""
    rows, total = [lengths, lengths[::-1]] if isolated else [[sum(lengths)]] * 2, sum(lengths)
    documents = torch.cat([documents_of(row) for row in rows]) if isolated else None
    visibility = Visibility(form, 0.0, width, documents=documents)
    simple = visibility.simplified(total)
    window = (-1, {"full": -1, "causal": 0}.get(simple.form, simple.width))
    segments = Segments.of(simple, 2, total, CPU)
    assert segments.max_seqlen == max(map(max, rows)) and segments.cu_seqlens.dtype == torch.int32
    shown = flash(segments.cu_seqlens.tolist(), window)
    assert torch.equal(shown, torch.block_diag(*visible(form, rows, 0, width, (0, 0))[:, 0].float()).bool())


@given(lengths)
def test_positions_restart_with_each_document(lengths):
    expected = torch.cat([torch.arange(n) for n in lengths])
    assert torch.equal(positions(documents_of(lengths))[0], expected)


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_the_ends_of_each_form_are_causal_and_full(length):
    full, causal = torch.ones(length, length).bool(), torch.ones(length, length).bool().tril()
    for form, first, last in (("window", 0, max(length - 1, 1)), ("block", 1, max(length, 2))):
        assert torch.equal(Visibility(form, width=first).dense(length, "cpu")[0, 0], causal)
        assert torch.equal(Visibility(form, width=last).dense(length, "cpu")[0, 0], full)
        if length > 1:
            assert Visibility(form, width=first).simplified(length).form == "causal"
            assert Visibility(form, width=last - 1).simplified(length).form != "full"
        assert Visibility(form, width=last).simplified(length).form == "full"
    assert torch.equal(Visibility("bernoulli", 0.0).dense(length, "cpu")[0, 0], causal)
    assert torch.equal(Visibility("bernoulli", 1.0).dense(length, "cpu")[0, 0], full)


def test_full_and_causal_build_no_mask():
    assert plan(Visibility("full"), 2, 64, CPU, torch.float32).mask is None
    causal = plan(Visibility("window", width=0), 2, 64, CPU, torch.float32)
    assert causal.mask is None and causal.window == (-1, 0)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_bernoulli_shows_its_share_of_the_future_and_all_of_the_past(ratio):
    mask = Visibility("bernoulli", ratio, key=(5, 9)).dense(300, "cpu")[0, 0]
    assert mask.tril().sum() == 300 * 301 / 2
    future = mask[torch.triu(torch.ones(300, 300, dtype=torch.bool), 1)].double()
    assert abs(future.mean().item() - ratio) <= 5 * math.sqrt(ratio * (1 - ratio) / len(future))


def test_bernoulli_is_a_function_of_seed_and_step():
    def draw(seed, step):
        return Visibility("bernoulli", 0.5, key=(seed, step)).dense(128, "cpu")

    assert torch.equal(draw(1, 2), draw(1, 2))
    for other in ((2, 1), (1, 3), (0, 3), (1 + 2**32, 2)):  # neither the sum of the pair nor its low bits are the key
        assert 0.4 < (draw(1, 2) != draw(*other)).double().triu(1).sum() / (128 * 127 / 2) < 0.6


def test_the_hash_is_the_same_with_tensors_as_with_numbers():
    i, j = torch.arange(50)[:, None], torch.arange(50)[None]
    words = torch.tensor([2**40 + 7, 12])
    assert torch.equal(hashed_uniform(words, i, j), hashed_uniform((2**40 + 7, 12), i, j))


@pytest.mark.parametrize("form", ["bernoulli", "window", "block"])
def test_more_is_visible_as_annealing_goes_on(form):
    widths = [1, 2, 4, 8, 16, 32, 64]
    states = [Visibility(form, w / 64, w, (1, 1)).dense(64, "cpu") for w in widths]
    assert all((a <= b).all() and (a != b).any() for a, b in itertools.pairwise(states))


def model_of(family: str, base_dir):
    return diffusion_class(type(tiny_config(family))).from_pretrained(base_dir(family)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_equals_the_stock_model(family, base_dir):
    """To the bit: hidden state i is read as the prediction of token i + 1."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(base_dir(family)).eval()
    model = model_of(family, base_dir)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    causal = [Visibility("causal"), Visibility("bernoulli", 0.0), Visibility("window"), Visibility("block", width=1)]
    with torch.no_grad():
        expected = stock(ids).logits
        for visibility in causal:
            assert torch.equal(model(ids, visibility=visibility).logits[:, 1:], expected[:, :-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_of_annealing_are_bidirectional(family, base_dir):
    model = model_of(family, base_dir)
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] += 1
    with torch.no_grad():
        full = model(ids).logits
        assert (model(changed).logits - full)[0, 1].abs().max() > 1e-4
        for end in (Visibility("bernoulli", 1.0), Visibility("window", width=19), Visibility("block", width=20)):
            assert torch.equal(model(ids, visibility=end).logits, full)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [[7, 12, 1, 10], [28, 2]], ids=["by document", "dense"])
def test_packed_and_isolated_equals_each_document_alone(family, form, parts, base_dir):
    model = model_of(family, base_dir)
    ids = torch.randint(0, 300, (1, sum(parts)), generator=torch.Generator().manual_seed(0))
    visibility = Visibility(form, 0.3, 4, (1, 2))
    with torch.no_grad():
        documents = documents_of(parts)
        packed = model(
            ids, position_ids=positions(documents), visibility=replace(visibility, documents=documents)
        ).logits
        start = 0
        for n in parts:
            alone = model(ids[:, start : start + n], visibility=visibility).logits
            torch.testing.assert_close(packed[:, start + 1 : start + n], alone[:, 1:], rtol=1e-4, atol=1e-4)
            start += n


@pytest.mark.parametrize("width", [0, 1, 5])
def test_no_future_leaks_beyond_the_window(width, base_dir):
    """One layer: a change at position j changes no hidden state before j - width; and never another document."""
    config = tiny_config("llama")
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = diffusion_class(type(config))._from_config(config, attn_implementation="diffullama").eval()
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    documents = documents_of([10, 14])
    visibility = Visibility("window", width=width, documents=documents)
    with torch.no_grad():
        before = model(ids, visibility=visibility).logits
        for j in range(24):
            changed = ids.clone()
            changed[0, j] = 301
            moved = (model(changed, visibility=visibility).logits - before)[0, 1:].abs().amax(1) > 0  # by hidden state
            first = max(j - width, 0 if j < 10 else 10)
            last = 10 if j < 10 else 23
            assert not moved[:first].any() and not moved[last:].any()
            assert moved[first:last].all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, side, base_dir):
    model = model_of(family, base_dir)
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    pad, ones = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 12, dtype=torch.long)
    padded, mask = (torch.cat([pad, x] if side == "left" else [x, pad], dim=1) for x in (ids, ones))
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
        alone = model(ids).logits
    part = logits[:, 5:] if side == "left" else logits[:, :12]
    torch.testing.assert_close(part[:, 1:], alone[:, 1:], rtol=1e-4, atol=1e-4)


def test_padding_between_tokens_is_refused(base_dir):
    with pytest.raises(ValueError, match="attention_mask has zeros between tokens"):
        model_of("llama", base_dir)(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 0, 1]]))


def test_a_window_shorter_than_the_row_is_refused():
    q = torch.zeros(1, 1, 9, 4)
    with pytest.raises(ValueError, match="rows of 9 tokens, but this model attends within 8"):
        attend(None, q, q, q, None, attention_plan=plan(Visibility(), 1, 9, CPU, q.dtype), sliding_window=8)


def test_backends_are_chosen_by_form_device_and_type(monkeypatch):
    from pretrain.model import attention

    assert {choose("auto", form, "cpu", torch.float32) for form in FORMS} == {"sdpa"}
    for installed, flash_name in ((None, "varlen"), (print, "flash_attn")):
        monkeypatch.setattr(attention, "_flash_attn", lambda installed=installed: installed)
        assert [choose("auto", form, "cuda", torch.bfloat16) for form in FORMS] == [
            flash_name, flash_name, "flex", flash_name, "flex",
        ]  # fmt: skip
    assert [choose("auto", form, "cuda", torch.float32) for form in FORMS] == [
        "sdpa", "sdpa", "flex", "sdpa", "flex",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="needs bf16 or fp16, not float32; here flex, sdpa can"):
        choose("varlen", "full", "cuda", torch.float32)


def test_a_causal_implementation_is_refused(base_dir):
    with pytest.raises(ValueError, match="attends causally; a diffusion model takes 'diffullama'"):
        diffusion_class(type(tiny_config("llama"))).from_pretrained(base_dir("llama"), attn_implementation="sdpa")
