"""Cross-entropy of a vocabulary head without the logits of all tokens in memory.

In: hidden states at labelled positions, the head's weight, targets and the weight of each position. Out:
the weighted sum, each position's own loss and, in evaluation, its most likely token.
`torch.nn.functional.linear_cross_entropy` and most fused losses take no weight a position, which a
diffusion model needs: 1/t.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

CHUNK_BYTES = 64 << 20  # of fp32 logits held at once

# (hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) int64, weights (N,) fp32) →
# (sum of weights · nll, nll (N,) detached, predicted (N,) or None), nll in nats and fp32.
# nll equals cross_entropy(linear(hidden, weight, bias), targets, reduction="none"). predicted is the most likely
# token of each position; None while gradients are wanted, since it would cost time.
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
Loss = Callable[..., Result]


def select_loss(requested: str, device: torch.device | str) -> Loss:
    """The function for `model.loss`: auto | chunked | liger | plain. Raises ValueError where it cannot be had.

    `auto` is chunked: Liger's kernel computes logits twice when positions have weights of their own.
    Without gradients it is always chunked, which then also predicts.
    """
    if requested not in ("auto", "chunked", "liger", "plain"):
        raise ValueError(f"model.loss is {requested!r}, expected auto, chunked, liger or plain")
    if requested == "liger" and (torch.device(device).type != "cuda" or not importlib.util.find_spec("liger_kernel")):
        raise ValueError("model.loss=liger needs CUDA and the package liger-kernel; use auto")
    learns = torch.is_grad_enabled()
    if requested in ("auto", "chunked") or not learns:
        return partial(ChunkedLoss.apply, learns)
    return _plain if requested == "plain" else _liger


def _plain(hidden, weight, bias, targets, weights):
    nll = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")
    return (weights * nll).sum(), nll.detach(), None


def _liger(hidden, weight, bias, targets, weights):
    # by name: transformers refuses code from the Hub with an import statement for a package that is not installed
    liger = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    arguments = (hidden, weight, targets, bias, None, -100, 0.0, 0.0, "none", None, False, torch.float32)
    nll = liger.LigerFusedLinearCrossEntropyFunction.apply(*arguments)
    nll = nll[0] if isinstance(nll, tuple) else nll
    return (weights * nll).sum(), nll.detach(), None


class ChunkedLoss(torch.autograd.Function):
    """Logits of a chunk of positions at a time; their gradients are taken at once, while they are there."""

    @staticmethod
    def forward(ctx, learns, hidden, weight, bias, targets, weights) -> Result:
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        # without `learns` no gradient is wanted, whatever the tensors require
        need_hidden, need_weight, need_bias = (learns and needed for needed in ctx.needs_input_grad[1:4])
        grad_hidden: Any = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Any = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias: Any = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        predicted: Any = None if learns else torch.empty_like(targets)
        size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            states, target = hidden[part], targets[part, None]
            logits = F.linear(states, weight, bias).float()
            if learns:
                logits -= logits.amax(dim=1, keepdim=True)
            else:
                largest, predicted[part] = logits.max(dim=1)
                logits -= largest[:, None]
            chosen = logits.gather(1, target)
            total = logits.exp_().sum(dim=1, keepdim=True)
            nll[part] = (total.log() - chosen)[:, 0]
            if not learns:
                continue
            scale = weights[part, None].float()
            logits *= scale / total  # now the softmax, times the weight
            logits.scatter_add_(1, target, -scale)  # d loss / d logits
            if need_bias:
                grad_bias += logits.sum(dim=0)
            gradient = logits.to(weight.dtype)
            if need_hidden:
                torch.mm(gradient, weight, out=grad_hidden[part])
            if need_weight and weight.dtype == torch.float32:
                grad_weight.addmm_(gradient.T, states)
            elif need_weight:
                grad_weight += gradient.T @ states
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_weight, grad_bias) if g is not None))
        ctx.mark_non_differentiable(*(x for x in (nll, predicted) if x is not None))
        return (weights.float() * nll).sum(), nll, predicted

    @staticmethod
    def backward(ctx, grad_loss, *_) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        found = [next(saved) if needed else None for needed in ctx.needs_input_grad[1:4]]
        dtypes = (None, *ctx.dtypes)
        scaled = [None if g is None else g.mul_(grad_loss.to(g.dtype)).to(d or g.dtype) for g, d in zip(found, dtypes)]
        return None, *scaled, None, None


class VocabularyHead(torch.nn.Linear):
    """Lets a model's output embedding also return the loss.

    The loss is computed inside the module's forward, so that ZeRO-3 gathers its weight for the loss as it does
    for the logits.
    """

    def forward(self, hidden, loss: Loss | None = None, targets=None, weights=None) -> torch.Tensor | Result:
        if loss is None:
            return super().forward(hidden)
        return loss(hidden, self.weight, self.bias, targets, weights)
