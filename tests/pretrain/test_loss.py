"""Every way to compute the loss is the plain one: values, and gradients of states, head and embeddings."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.model import loss


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 40), st.integers(1, 70), st.integers(1, 9), st.booleans(), st.integers(0, 999), st.integers(1, 4000)
)
def test_chunked_equals_plain(tokens, vocabulary, width, bias, seed, chunk_bytes):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    offset = torch.randn(vocabulary, generator=generator) if bias else None
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator) * 100
    results = []
    before, loss.CHUNK_BYTES = loss.CHUNK_BYTES, chunk_bytes
    try:
        for how in ("plain", "chunked"):
            inputs = [x.clone().requires_grad_() for x in (hidden, weight, offset) if x is not None]
            total, nll, *_ = loss.linear_cross_entropy(*inputs[:2], inputs[2] if bias else None, targets, weights, how)
            results.append([total, nll, *torch.autograd.grad(3 * total, inputs)])
    finally:
        loss.CHUNK_BYTES = before
    largest = max(x.abs().max().item() for x in (hidden, weight, torch.ones(1)) if x.numel())
    term = 3 * max([1.0, *weights.tolist()]) * largest  # of the sums, which may cancel
    for plain, chunked in zip(*results):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5 * term)
    assert not results[1][1].requires_grad


def test_a_shared_weight_gets_both_gradients():
    """A tied head: the embedding's gradient and the head's add up."""
    torch.manual_seed(0)
    weight, ids = torch.randn(50, 8), torch.randint(0, 50, (20,))
    gradients = []
    for how in ("plain", "chunked"):
        w = weight.clone().requires_grad_()
        total, *_ = loss.linear_cross_entropy(F.embedding(ids, w).tanh(), w, None, ids.roll(1), torch.ones(20), how)
        gradients.append(torch.autograd.grad(total, w)[0])
    torch.testing.assert_close(*gradients)


def test_huge_logits_stay_finite():
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]])
    total, *_ = loss.linear_cross_entropy(hidden, weight, None, torch.tensor([1]), torch.ones(1))
    assert total.item() == pytest.approx(2e4)


def test_without_gradients_none_are_kept():
    hidden, weight = torch.randn(30, 4), torch.nn.Parameter(torch.randn(9, 4))
    with torch.no_grad():
        targets = torch.zeros(30, dtype=torch.long)
        total, nll, predicted = loss.linear_cross_entropy(hidden, weight, None, targets, torch.ones(30))
    torch.testing.assert_close(nll.sum(), total)
    assert torch.equal(predicted, (hidden @ weight.T).argmax(1))
