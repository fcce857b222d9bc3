"""Small models of transformers' own architectures with random weights, and rows of different lengths for them."""

import torch
from helpers import tiny_config
from known_laws import rng  # noqa: F401, for those who use these models

from pretrain.model.modeling_diffullama import diffusion_class

MASK, VOCABULARY = 383, 384

FAMILIES = ["llama", "gpt2", "qwen3"]

PROMPTS = [[5, 9, 33], [7, 8], [4, 91, 55, 23, 17]]


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


def made_shallow(model):
    fewer = {"num_hidden_layers": 1, "n_layer": 1, "layer_types": None}
    config = type(model.config)(**{**model.config.to_dict(), **fewer})
    torch.manual_seed(5)
    return diffusion_class(type(config))._from_config(config, attn_implementation="diffullama").eval()


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
