"""Cross-entropy of a vocabulary head without the logits of all tokens in memory.

In: hidden states at masked positions, the head's weight, targets and the weight of each position. Out:
the weighted sum, each position's own loss and, in evaluation, its most likely token.
`torch.nn.functional.linear_cross_entropy` and most fused losses take no weight a position, which a
diffusion model needs: 1/t.
"""

import importlib.util

import torch
import torch.nn.functional as F

CHUNK_BYTES = 64 << 20  # of fp32 logits held at once
LOSSES = ("chunked", "liger", "plain")


def choose(requested: str, device: torch.device) -> str:
    """The way for `model.loss`: auto | chunked | liger | plain. Raises ValueError where it cannot be had.

    `auto` is chunked: Liger's kernel computes logits twice when positions have weights of their own.
    """
    if requested == "auto":
        return "chunked"
    if requested not in LOSSES:
        raise ValueError(f"model.loss is {requested!r}; there are: auto, {', '.join(LOSSES)}")
    if requested == "liger" and (device.type != "cuda" or not importlib.util.find_spec("liger_kernel")):
        raise ValueError("model.loss=liger needs CUDA and the package liger-kernel; use auto")
    return requested


def linear_cross_entropy(
    hidden: torch.Tensor,  # (N, H)
    weight: torch.Tensor,  # (V, H)
    bias: torch.Tensor | None,  # (V,)
    targets: torch.Tensor,  # (N,) int64
    weights: torch.Tensor,  # (N,) fp32
    how: str = "chunked",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(sum of weights · nll, nll (N,) detached, predicted (N,)), nll in nats and fp32.

    nll equals `cross_entropy(linear(hidden, weight, bias), targets, reduction="none")`. `predicted` is the most
    likely token of each position; None where gradients are wanted, since it would cost time.
    """
    if how == "chunked" or not torch.is_grad_enabled():
        return _Chunked.apply(hidden, weight, bias, targets, weights, torch.is_grad_enabled())
    if how == "liger":
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        arguments = (hidden, weight, targets, bias, None, -100, 0.0, 0.0, "none", None, False, torch.float32)
        nll = LigerFusedLinearCrossEntropyFunction.apply(*arguments)
        nll = nll[0] if isinstance(nll, tuple) else nll
    else:
        nll = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")
    return (weights * nll).sum(), nll.detach(), None


class _Chunked(torch.autograd.Function):
    """Logits of a chunk of positions at a time; their gradients are taken at once, while they are there."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, learns):
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        # without `learns` no gradient is wanted, whatever the tensors require
        need_hidden, need_weight, need_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        predicted = None if learns else torch.empty_like(targets)
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
    def backward(ctx, grad_loss, *_):
        saved = iter(ctx.saved_tensors)
        found = [next(saved) if needed else None for needed in ctx.needs_input_grad[:3]]
        dtypes = (None, *ctx.dtypes)
        scaled = [None if g is None else g.mul_(grad_loss.to(g.dtype)).to(d or g.dtype) for g, d in zip(found, dtypes)]
        return *scaled, None, None, None


class VocabularyHead(torch.nn.Linear):
    """A model's own output embedding, which can also give the loss.

    It is a module, so that ZeRO-3 gathers its weight around the loss as around the logits.
    """

    def forward(self, hidden, targets=None, weights=None, how="chunked"):
        if targets is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, self.bias, targets, weights, how)
