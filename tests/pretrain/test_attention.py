import itertools
import math

import pytest
import torch
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import murmur

from pretrain.model import attention
from pretrain.model.attention import AttentionPlan, _block_mask, attend, prepare_attention, select_backend
from pretrain.model.forms import Bernoulli, Block, Causal, Form, Full, Window
from pretrain.model.modeling_diffullama import diffusion_class
from pretrain.model.visibility import Segments, Visibility, positions

FAMILIES = ["llama", "llama_tied", "gpt2", "qwen3", "mistral"]
CPU = torch.device("cpu")
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)
widths = st.one_of(st.integers(0, 8), st.integers(0, 40))
seeds = st.integers(0, 1000)
HEADS = [(4, 4), (4, 2), (3, 1)]
EXAMPLES = [Full(), Causal(), Bernoulli(0.3, (1, 2)), Window(4), Block(4)]
by_window = st.one_of(st.just(Full()), st.just(Causal()), st.builds(Window, widths))
forms = st.one_of(
    by_window,
    st.builds(Block, widths.map(lambda width: width + 1)),
    st.builds(Bernoulli, st.sampled_from([0.4, 0.0, 0.7, 1.0]), st.tuples(seeds, st.just(3))),
)


def documents_of(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def seen(form: Form, i: int, j: int) -> bool:
    """Does position i of a document see position j, written by the definition of each form."""
    if isinstance(form, Bernoulli):
        return j <= i or murmur(form.key, i, j) < form.ratio
    if isinstance(form, Block):
        return j // form.width <= i // form.width
    if isinstance(form, Window):
        return j - i <= form.width
    return isinstance(form, Full) or j <= i


def visible(form: Form, rows: list[list[int]]) -> torch.Tensor:
    """(B, 1, L, L) of rows given by their documents' lengths, pair by pair."""
    total = sum(rows[0])
    found = torch.zeros(len(rows), 1, total, total, dtype=torch.bool)
    for b, parts in enumerate(rows):
        start = 0
        for n in parts:
            for i, j in itertools.product(range(n), range(n)):
                found[b, 0, start + i, start + j] = seen(form, i, j)
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


def assert_equals_the_reference(form: Form, rows: list[list[int]], isolated: bool, heads=(4, 2), seed: int = 0) -> None:
    """Forward and gradients of what a plan for the CPU computes."""
    total = sum(rows[0])
    documents = torch.cat([documents_of(row) for row in rows]) if isolated else None
    want_visible = visible(form, rows if isolated else [[total]] * len(rows))
    mine = [x.requires_grad_() for x in tensors(len(rows), heads, total, seed)]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    made = prepare_attention(Visibility(form, documents), len(rows), total, CPU, torch.float64)
    got, _ = attend(None, *mine, None, attention_plan=made)
    want = reference(*theirs, want_visible)
    torch.testing.assert_close(got, want)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), mine), torch.autograd.grad((want * weights).sum(), theirs)
    ):
        torch.testing.assert_close(a, b)


@settings(max_examples=150)
@given(lengths, forms, st.booleans(), st.sampled_from(HEADS), seeds)
def test_sdpa_equals_the_dense_reference(lengths, form, isolated, heads, seed):
    """Forward and gradients, over lengths, documents, forms, widths and grouped heads; dense and by document."""
    assert_equals_the_reference(form, [lengths, lengths[::-1]], isolated, heads, seed)


@pytest.mark.parametrize("parts", [[5, 6, 5], [15, 1]], ids=["by document", "dense"])
@pytest.mark.parametrize("form", [Bernoulli(0.4, (1, 2)), Bernoulli(0.0), Window(0), Block(1)], ids=str)
def test_isolated_documents_have_a_mask_or_are_causal_never_both(form, parts):
    """A mask excludes `is_causal`. A random form has a mask, and those that are causal at first may do without."""
    made = prepare_attention(Visibility(form, documents_of(parts)), 1, sum(parts), CPU, torch.float64)
    assert made.mask is None or not made.causal
    assert bool(made.bounds) == (parts == [5, 6, 5])
    assert_equals_the_reference(form, [parts], isolated=True)


def test_documents_are_taken_one_by_one_where_that_is_less_work():
    def bounds(parts):
        visibility = Visibility(Window(3), documents_of(parts))
        return prepare_attention(visibility, 1, sum(parts), CPU, torch.float32).bounds

    assert bounds([16, 16, 32]) == (0, 16, 32, 64) and bounds([60, 4]) == ()


def assert_flex_equals_the_reference(form: Form, rows: list[list[int]], isolated: bool, heads=(4, 2), seed: int = 0):
    """Forward only: FlexAttention has no gradients on a CPU."""
    total = sum(rows[0])
    documents = torch.cat([documents_of(row) for row in rows]) if isolated else None
    qkv = tensors(2, heads, total, seed, torch.float32)
    made = AttentionPlan("flex", block_mask=_block_mask(Visibility(form, documents), 2, total, CPU))
    got, _ = attend(None, *qkv, None, attention_plan=made)
    want = reference(*(x.double() for x in qkv), visible(form, rows if isolated else [[total]] * 2))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", EXAMPLES, ids=lambda form: form.name)
@pytest.mark.parametrize("isolated", [False, True], ids=["rows", "documents"])
def test_flex_equals_the_dense_reference(form, isolated):
    assert_flex_equals_the_reference(form, [[5, 1, 8], [2, 6, 6]], isolated)


@pytest.mark.slow
@settings(max_examples=60)
@given(lengths, forms, st.booleans(), st.sampled_from(HEADS), seeds)
def test_flex_equals_the_dense_reference_always(lengths, form, isolated, heads, seed):
    """Over lengths, documents, forms, widths and grouped heads."""
    assert_flex_equals_the_reference(form, [lengths, lengths[::-1]], isolated, heads, seed)


def flash(cu_seqlens: list[int], window: tuple[int, int]) -> torch.Tensor:
    """(T, T) bool: what a varlen flash kernel shows, by its documentation."""
    total = cu_seqlens[-1]
    found = torch.zeros(total, total, dtype=torch.bool)
    for start, stop in itertools.pairwise(cu_seqlens):
        for i, j in itertools.product(range(start, stop), range(start, stop)):
            left, right = window
            found[i, j] = (left < 0 or i - j <= left) and (right < 0 or j - i <= right)
    return found


def kernel_by_its_documentation(query, key, value, cu_seqlens, cu_seqlens_k, longest, longest_k, scale, causal, window):
    """Varlen attention on (T, heads, D), as FlashAttention documents it."""
    assert torch.equal(cu_seqlens, cu_seqlens_k) and cu_seqlens.dtype == torch.int32
    assert longest == longest_k == int(cu_seqlens.diff().max())
    shown = flash(cu_seqlens.tolist(), (window[0], 0 if causal else window[1]))
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    assert scale is None
    return reference(q, k, v, shown)[0]


@pytest.mark.parametrize("backend", ["flash_attn", "varlen"])
@settings(max_examples=50)
@given(lengths=lengths, form=by_window, isolated=st.booleans(), heads=st.sampled_from(HEADS), seed=seeds)
def test_what_flash_kernels_are_called_with_computes_the_same(backend, lengths, form, isolated, heads, seed):
    """The arguments of both packages, read as they document them, against the dense reference."""
    import torch.nn.attention.varlen as varlen

    def flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size):
        window = tuple(-1 if side is None else side for side in window_size)
        assert None not in window_size or unbounded is None
        return kernel_by_its_documentation(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window
        )

    def torchs(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, scale, window_size, enable_gqa):
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return kernel_by_its_documentation(
            q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, scale, False, window_size
        )

    rows, total = [lengths, lengths[::-1]] if isolated else [[sum(lengths)]] * 2, sum(lengths)
    documents = torch.cat([documents_of(row) for row in rows]) if isolated else None
    qkv = tensors(2, heads, total, seed)
    for unbounded in (-1, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_obstacle", lambda *_: None)
            patch.setattr(attention, "_flash_attn", lambda unbounded=unbounded: (flash_attn, unbounded))
            patch.setattr(varlen, "varlen_attn", torchs)
            made = prepare_attention(Visibility(form, documents), 2, total, CPU, torch.float64, backend)
            assert made.backend == backend and made.mask is None
            got, _ = attend(None, *qkv, None, attention_plan=made)
        torch.testing.assert_close(got, reference(*qkv, visible(form, rows)))


@settings(max_examples=100)
@given(lengths, by_window, st.booleans())
def test_what_flash_kernels_are_given_shows_the_same(lengths, form, isolated):
    """cu_seqlens and window_size, read as the kernels read them, against the dense mask."""
    rows, total = [lengths, lengths[::-1]] if isolated else [[sum(lengths)]] * 2, sum(lengths)
    documents = torch.cat([documents_of(row) for row in rows]) if isolated else None
    simple = Visibility(form, documents).simplified(total)
    segments = Segments.of(simple, 2, total, CPU)
    assert segments.max_seqlen == max(map(max, rows)) and segments.cu_seqlens.dtype == torch.int32
    shown = flash(segments.cu_seqlens.tolist(), simple.form.flash_window)
    assert torch.equal(shown, torch.block_diag(*visible(form, rows)[:, 0].float()).bool())


def assert_the_dense_mask_is_right(form: Form, rows: list[list[int]], isolated: bool) -> None:
    documents = torch.cat([documents_of(row) for row in rows]) if isolated else None
    mask = Visibility(form, documents).dense(sum(rows[0]), CPU)
    assert (mask is None) == (form == Full() and not isolated)
    if mask is not None:
        assert torch.equal(mask, visible(form, rows if isolated else [[sum(rows[0])]]))


@settings(max_examples=60)
@given(lengths, forms, st.booleans())
def test_the_dense_mask_is_what_the_definition_says(lengths, form, isolated):
    assert_the_dense_mask_is_right(form, [lengths, lengths[::-1]], isolated)


@pytest.mark.parametrize("isolated", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("form", EXAMPLES, ids=lambda form: form.name)
def test_each_form_in_a_row_of_documents(form, isolated):
    """One example of each, whatever the properties above happen to draw: by the dense mask and by SDPA."""
    for rows in ([[3, 9, 2], [7, 1, 6]], [[1, 13], [13, 1]]):  # taken one by one, and dense
        assert_the_dense_mask_is_right(form, rows, isolated)
        assert_equals_the_reference(form, rows, isolated)


@given(lengths)
def test_positions_restart_with_each_document(lengths):
    expected = torch.cat([torch.arange(n) for n in lengths])
    assert torch.equal(positions(documents_of(lengths))[0], expected)


def test_full_and_causal_build_no_mask():
    assert prepare_attention(Visibility(), 2, 64, CPU, torch.float32) == AttentionPlan("sdpa")
    for form in (Causal(), Window(0), Block(1), Bernoulli(0.0)):
        causal = prepare_attention(Visibility(form), 2, 64, CPU, torch.float32)
        assert causal.mask is None and causal.causal and not causal.bounds


def model_of(family: str, base_dir):
    return diffusion_class(type(tiny_config(family))).from_pretrained(base_dir(family)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_equals_the_stock_model(family, base_dir):
    """To the bit: hidden state i is read as the prediction of token i + 1."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(base_dir(family)).eval()
    model = model_of(family, base_dir)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    causal = [Visibility(form) for form in (Causal(), Bernoulli(0.0), Window(0), Block(1))]
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
        for end in (Bernoulli(1.0), Window(19), Block(20)):
            assert torch.equal(model(ids, visibility=Visibility(end)).logits, full)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", EXAMPLES, ids=lambda form: form.name)
@pytest.mark.parametrize("parts", [[7, 12, 1, 10], [28, 2]], ids=["by document", "dense"])
def test_packed_and_isolated_equals_each_document_alone(family, form, parts, base_dir):
    model = model_of(family, base_dir)
    ids = torch.randint(0, 300, (1, sum(parts)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        documents = documents_of(parts)
        packed = model(ids, position_ids=positions(documents), visibility=Visibility(form, documents)).logits
        start = 0
        for n in parts:
            alone = model(ids[:, start : start + n], visibility=Visibility(form)).logits
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
    visibility = Visibility(Window(width), documents)
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
        made = prepare_attention(Visibility(), 1, 9, CPU, q.dtype)
        attend(None, q, q, q, None, attention_plan=made, sliding_window=8)


def test_backends_are_selected_by_form_device_and_type(monkeypatch):
    assert {select_backend("auto", form, "cpu", torch.float32) for form in EXAMPLES} == {"sdpa"}
    for installed, flash_name in ((None, "varlen"), (print, "flash_attn")):
        monkeypatch.setattr(attention, "_flash_attn", lambda installed=installed: installed)
        assert [select_backend("auto", form, "cuda", torch.bfloat16) for form in EXAMPLES] == [
            flash_name, flash_name, "flex", flash_name, "flex",
        ]  # fmt: skip
    assert [select_backend("auto", form, "cuda", torch.float32) for form in EXAMPLES] == [
        "sdpa", "sdpa", "flex", "sdpa", "flex",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="needs bf16 or fp16, not float32; use flex, sdpa here, or auto"):
        select_backend("varlen", Full(), "cuda", torch.float32)
    with pytest.raises(ValueError, match=r"model\.attention=flash_attn cannot show the form 'block'; use flex, sdpa"):
        select_backend("flash_attn", Block(2), "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="flex needs CUDA, not cpu; use sdpa here"):
        select_backend("flex", Full(), "cpu", torch.float32)
    with pytest.raises(ValueError, match="'flash', expected auto, flash_attn, varlen, flex, sdpa"):
        select_backend("flash", Full(), "cpu", torch.float32)
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    with pytest.raises(ValueError, match="needs the package flash-attn: pip install flash-attn; use varlen"):
        select_backend("flash_attn", Full(), "cuda", torch.bfloat16)
    for form in EXAMPLES:
        assert select_backend("sdpa", form, "cuda", torch.bfloat16) == "sdpa"


def test_a_causal_implementation_is_refused(base_dir):
    with pytest.raises(ValueError, match="attends causally; a diffusion model takes 'diffullama'"):
        diffusion_class(type(tiny_config("llama"))).from_pretrained(base_dir("llama"), attn_implementation="sdpa")
