"""Model FLOPs of a step, for MFU: what the mathematics needs, not what a kernel or recomputation spends."""

from typing import Any

import torch

# Dense bf16 FLOP/s by a part of the device's name, the longest match; from NVIDIA's data sheets (SXM).
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "GB200": 2250e12}


def step_flops(model: Any, tokens: int, labelled: int, length: int, share: float) -> float:
    """Forward and backward FLOPs of a step of `tokens` tokens, `labelled` of them with a loss, in rows of `length`.

    6 a token and weight of the blocks' matrices; 6 · hidden · vocabulary a labelled token, since only those meet
    the vocabulary; attention 12 · layers · width of all heads · length · `share` a token (scores and values, 2 FLOPs
    each, once forward and twice backward), where `share` of the pairs is visible: 1 when bidirectional, about 1/2
    when causal, so a bidirectional step needs more than a causal formula would count.
    """
    config = model.config
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = sum(
        getattr(p, "ds_numel", p.numel())
        for name, p in model.named_parameters()
        if id(p) not in embedding and len(getattr(p, "ds_shape", p.shape)) == 2 and "wpe" not in name
    )
    vocabulary = config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * heads * config.num_attention_heads * length * share
    return tokens * (6 * matrices + attention) + 6 * labelled * vocabulary


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s; None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = [part for part in PEAK if part in name]
    return PEAK[max(found, key=len)] if found else None
