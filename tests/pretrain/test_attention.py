import itertools
import math

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.model.attention import IMPLEMENTATIONS, Visibility, _attend, hashed_uniform, plan, resolve
from pretrain.model.modeling_diffullama import diffusion_class

FAMILIES = ["llama", "llama_tied", "gpt2", "qwen3", "mistral"]
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def documents_of(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def reference(q, k, v, visible: torch.Tensor) -> torch.Tensor:
    """Attention in fp64 with loops for the mask, as a textbook writes it; (B, H, L, D) -> (B, L, H, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(1, 2)


@settings(deadline=None, max_examples=60)
@given(
    lengths,
    st.sampled_from(["full", "causal", "bernoulli"]),
    st.booleans(),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.integers(0, 1000),
)
def test_attention_equals_the_dense_reference(lengths, form, isolated, heads, seed):
    """Forward and gradients, over lengths, documents, forms and grouped heads."""
    length, generator = sum(lengths), torch.Generator().manual_seed(seed)
    documents = documents_of(lengths) if isolated else None
    visibility = Visibility(form, 0.4, (seed, 3), documents)

    visible = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            u = hashed_uniform((seed, 3), torch.tensor(i), torch.tensor(j)).item()
            seen = {"full": True, "causal": j <= i, "bernoulli": j <= i or u < 0.4}[form]
            visible[i, j] = seen and (documents is None or documents[0, i] == documents[0, j])

    shapes = [(2, n, length, 8) for n in (heads[0], heads[1], heads[1])]
    mine = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    got, _ = _attend(None, *mine, None, attention_plan=plan(visibility, length, torch.device("cpu")))
    want = reference(*theirs, visible)
    torch.testing.assert_close(got, want)
    weights = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), mine), torch.autograd.grad((want * weights).sum(), theirs)
    ):
        torch.testing.assert_close(a, b)


def test_full_and_causal_build_no_mask():
    assert plan(Visibility("full"), 64, torch.device("cpu")).mask is None
    causal = plan(Visibility("causal"), 64, torch.device("cpu"))
    assert causal.mask is None and causal.causal


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_bernoulli_shows_its_share_of_the_future_and_all_of_the_past(ratio):
    mask = Visibility("bernoulli", ratio, (5, 9)).dense(300, "cpu")[0, 0]
    assert mask.tril().sum() == 300 * 301 / 2
    future = mask[torch.triu(torch.ones(300, 300, dtype=torch.bool), 1)].double()
    assert abs(future.mean().item() - ratio) <= 5 * math.sqrt(ratio * (1 - ratio) / len(future))


def test_bernoulli_is_a_function_of_seed_and_step():
    def draw(seed, step):
        return Visibility("bernoulli", 0.5, (seed, step)).dense(128, "cpu")

    assert torch.equal(draw(1, 2), draw(1, 2))
    for other in ((2, 1), (1, 3), (0, 3), (1 + 2**32, 2)):  # neither the sum of the pair nor its low bits are the key
        assert 0.4 < (draw(1, 2) != draw(*other)).double().triu(1).sum() / (128 * 127 / 2) < 0.6


def test_more_is_visible_as_the_ratio_grows():
    masks = [Visibility("bernoulli", r / 10, (1, 1)).dense(64, "cpu") for r in range(11)]
    assert all((a <= b).all() for a, b in itertools.pairwise(masks))


def model_of(family: str, base_dir):
    return diffusion_class(type(tiny_config(family))).from_pretrained(base_dir(family)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_equals_the_stock_model(family, base_dir):
    """To the bit: hidden state i is read as the prediction of token i + 1."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(base_dir(family)).eval()
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock(ids).logits
        for visibility in (Visibility("causal"), Visibility("bernoulli", 0.0)):
            logits = model_of(family, base_dir)(ids, visibility=visibility).logits
            torch.testing.assert_close(logits[:, 1:], expected[:, :-1], rtol=1e-5, atol=1e-5)
        assert torch.equal(
            model_of(family, base_dir)(ids, visibility=Visibility("causal")).logits[:, 1:], expected[:, :-1]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_full_sees_the_future_and_equals_bernoulli_at_one(family, base_dir):
    model = model_of(family, base_dir)
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] += 1
    with torch.no_grad():
        full = model(ids).logits
        assert (model(changed).logits - full)[0, 1].abs().max() > 1e-4
        at_one = model(ids, visibility=Visibility("bernoulli", 1.0, (3, 3))).logits
    torch.testing.assert_close(at_one, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["full", "causal"])
def test_packed_and_isolated_equals_each_document_alone(family, form, base_dir):
    model, parts = model_of(family, base_dir), [7, 12, 1, 10]
    ids = torch.randint(0, 300, (1, sum(parts)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in parts])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, visibility=Visibility(form, documents=documents_of(parts))).logits
        start = 0
        for n in parts:
            alone = model(ids[:, start : start + n], visibility=Visibility(form)).logits
            torch.testing.assert_close(packed[:, start + 1 : start + n], alone[:, 1:], rtol=1e-4, atol=1e-4)
            start += n


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


def test_a_window_shorter_than_the_row_is_refused():
    q = torch.zeros(1, 1, 9, 4)
    with pytest.raises(ValueError, match="rows of 9 tokens, but this model attends within 8"):
        _attend(None, q, q, q, None, attention_plan=plan(Visibility(), 9, q.device), sliding_window=8)


def test_backends():
    assert resolve("auto", "bernoulli") == resolve("sdpa", "none") == "sdpa"
    with pytest.raises(ValueError, match=r"model\.attention is 'flash'.*auto, sdpa"):
        resolve("flash", "bernoulli")


def test_a_causal_implementation_is_refused(base_dir):
    with pytest.raises(ValueError, match=f"attends causally; a diffusion model takes: {IMPLEMENTATIONS['sdpa']}"):
        diffusion_class(type(tiny_config("llama"))).from_pretrained(base_dir("llama"), attn_implementation="sdpa")
