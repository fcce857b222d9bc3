"""Algorithm 2: from all masks to text in T steps; infilling is the same with fixed tokens around.

In: ids with mask tokens where text is wanted. Out: ids with none. Pure functions on tensors; the
model is anything with `forward(input_ids).logits`, where logits[:, i] predict token i.
"""

import torch

GREEDY_BELOW = 1e-4  # lower temperatures divide logits out of range; they take the most probable token


def uses_shift(config) -> bool:
    """Whether hidden state i predicts token i + 1, as the AR model taught it, and not token i itself."""
    return (getattr(config, "diffusion", None) or {}).get("shift", True)


@torch.no_grad()
def generate(
    model,
    input_ids: torch.Tensor,
    *,
    steps: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    order: str = "random",
    generator: torch.Generator | None = None,
    mask_token_id: int | None = None,
    return_history: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
    """Replace every mask token of `input_ids` (B, L) by a sample; other tokens stay.

    `steps` T: model calls (NFE), at most one a masked token in the "confidence" order.
    `order`: "random", Eq. 4: at step k of T … 1 each masked token is revealed with probability 1/k;
    "confidence": the most probable predictions first, equally many a step.
    `temperature` 0 (below 1e-4) takes the most probable token. `top_p` keeps the smallest set of tokens that holds
    that share of probability. With `return_history`, also the ids after each step.
    Raises ValueError for bad arguments, and with the shift for a mask token at the first position, which nothing
    predicts.
    """
    mask_token_id = model.config.mask_token_id if mask_token_id is None else mask_token_id
    if steps < 1 or temperature < 0 or not 0 < top_p <= 1 or order not in ("random", "confidence"):
        raise ValueError(
            f"steps={steps}, temperature={temperature}, top_p={top_p}, order={order!r}: expected steps >= 1, "
            "temperature >= 0, 0 < top_p <= 1, order 'random' or 'confidence'"
        )
    x = input_ids.clone()
    masked = x == mask_token_id
    if uses_shift(model.config) and masked[:, 0].any():
        raise ValueError("the first token is a mask, and nothing predicts it; put the start token in front")
    if order == "confidence":
        steps = min(steps, max(1, int(masked.sum(1).max())))
    history = []
    for k in range(steps, 0, -1):
        logits = model(input_ids=x).logits[masked].float()  # (masked, V)
        logits[:, mask_token_id] = -torch.inf  # a mask is not text
        token, confidence = sample(logits, temperature, top_p, generator)
        reveal = torch.zeros_like(masked)
        if order == "random":
            reveal[masked] = (
                torch.rand(len(token), generator=generator, device=_device(generator, x)).to(x.device) < 1 / k
            )
        else:
            score = torch.full(x.shape, -torch.inf, device=x.device)
            score[masked] = confidence
            count = -(-masked.sum(1) // k)  # (B,), rounded up: what is left is shared by the steps left
            rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            reveal = masked & (rank < count[:, None])
        proposal = x.clone()
        proposal[masked] = token
        x = torch.where(reveal, proposal, x)
        masked = masked & ~reveal
        if return_history:
            history.append(x)
        if not masked.any():
            break
    return (x, history) if return_history else x


def sample(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from filter(logits) (N, V): ids (N,) and their probability (N,), by which confidence is ranked."""
    if temperature < GREEDY_BELOW:
        confidence, token = logits.softmax(-1).max(-1)
        return token, confidence
    probability = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probability.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the token that crosses top_p stays
        probability = torch.zeros_like(probability).scatter(-1, index, ordered)
        probability /= probability.sum(-1, keepdim=True)
    if len(probability) == 0:
        return logits.new_zeros(0, dtype=torch.long), logits.new_zeros(0)
    device = _device(generator, logits)
    token = torch.multinomial(probability.to(device), 1, generator=generator).to(logits.device)
    return token[:, 0], probability.gather(-1, token)[:, 0]


def _device(generator: torch.Generator | None, like: torch.Tensor) -> torch.device:
    return like.device if generator is None else generator.device
