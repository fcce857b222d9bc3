"""Every way to compute the loss is the plain one: values, and gradients of states, head and embeddings."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.model import loss
from pretrain.model.loss import VocabularyHead, select_loss


@settings(max_examples=60)
@given(
    st.integers(0, 40), st.integers(1, 70), st.integers(1, 9), st.booleans(), st.integers(0, 999), st.integers(1, 4000)
)
def test_each_way_equals_cross_entropy(tokens, vocabulary, width, bias, seed, chunk_bytes):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    offset = torch.randn(vocabulary, generator=generator) if bias else None
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator) * 100

    def found(compute) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, offset) if x is not None]
        total, nll = compute(*inputs[:2], inputs[2] if bias else None)
        return [total, nll, *torch.autograd.grad(3 * total, inputs)]

    def expected(h, w, b) -> tuple[torch.Tensor, torch.Tensor]:
        nll = F.cross_entropy(F.linear(h, w, b), targets, reduction="none")
        return (weights * nll).sum(), nll

    def of(how: str):
        def compute(h, w, b) -> tuple[torch.Tensor, torch.Tensor]:
            total, nll, predicted = select_loss(how, "cpu")(h, w, b, targets, weights)
            assert predicted is None and not nll.requires_grad
            return total, nll

        return compute

    largest = max(x.abs().max().item() for x in (hidden, weight, torch.ones(1)) if x.numel())
    term = 3 * max([1.0, *weights.tolist()]) * largest  # of the sums, which may cancel
    reference = found(expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_BYTES", chunk_bytes)
        for how in ("plain", "chunked"):
            for got, want in zip(found(of(how)), reference):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * term)


def test_a_shared_weight_gets_both_gradients():
    """A tied head: the embedding's gradient and the head's add up."""
    torch.manual_seed(0)
    weight, ids = torch.randn(50, 8), torch.randint(0, 50, (20,))
    gradients = []
    for how in ("plain", "chunked"):
        w = weight.clone().requires_grad_()
        total, *_ = select_loss(how, "cpu")(F.embedding(ids, w).tanh(), w, None, ids.roll(1), torch.ones(20))
        gradients.append(torch.autograd.grad(total, w)[0])
    torch.testing.assert_close(*gradients)


def test_huge_logits_stay_finite():
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]])
    total, *_ = select_loss("auto", "cpu")(hidden, weight, None, torch.tensor([1]), torch.ones(1))
    assert total.item() == pytest.approx(2e4)


@pytest.mark.parametrize("how", ["auto", "chunked", "plain"])
def test_without_gradients_none_are_kept_and_tokens_are_predicted(how, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 9 * 7)  # 7 positions at a time
    hidden, weight = torch.randn(30, 4), torch.nn.Parameter(torch.randn(9, 4))
    targets = torch.zeros(30, dtype=torch.long)
    with torch.no_grad():
        total, nll, predicted = select_loss(how, "cpu")(hidden, weight, None, targets, torch.ones(30))
    torch.testing.assert_close(nll.sum(), total)
    torch.testing.assert_close(nll, F.cross_entropy(hidden @ weight.T, targets, reduction="none").detach())
    assert torch.equal(predicted, (hidden @ weight.T).argmax(1)) and not total.requires_grad


def test_auto_is_chunked_and_what_cannot_be_had_is_refused():
    assert select_loss("auto", "cuda").func == select_loss("chunked", "cpu").func
    with pytest.raises(ValueError, match="'fast', expected auto, chunked, liger or plain"):
        select_loss("fast", "cpu")
    with pytest.raises(ValueError, match="loss=liger needs CUDA"):
        select_loss("liger", "cpu")


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_gives_logits_or_the_loss(bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 9, bias=bias)
    hidden, targets, weights = torch.randn(5, 4), torch.arange(5), torch.rand(5)
    logits = head(hidden)
    head.__class__ = VocabularyHead
    assert torch.equal(head(hidden), logits)
    total, nll, _ = head(hidden, select_loss("auto", "cpu"), targets, weights)
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(total, (weights * nll).sum())
