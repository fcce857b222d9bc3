"""What the paper states in numbers for the figures drawn here; nothing is read off its pictures.

"Scaling Diffusion Language Models via Adaptation from Autoregressive Models", arXiv 2410.17891. Its figures 2, 3, 5
and 6 (losses, and generative perplexity × distinct-2) come without numbers, so no point of theirs is drawn.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTime:
    """Seconds that one sequence took on the authors' machine."""

    length: int  # tokens
    attention: str
    diffusion: float  # DiffuLLaMA 7B; the number of steps T is not stated with the table
    autoregressive: float  # LLaMA2 7B with KV cache


# the table "Decoding speed", which belongs to Figure 4
DECODING_SPEED = (
    PublishedTime(512, "flash 2", 12.5, 9.2),
    PublishedTime(1024, "SDPA", 13.2, 16.3),
    PublishedTime(1024, "flash 2", 13.3, 17.5),
    PublishedTime(1024, "vanilla", 16.2, 17.2),
    PublishedTime(2048, "SDPA", 28.5, 29.5),
    PublishedTime(2048, "flash 2", 23.5, 35.7),
    PublishedTime(2048, "vanilla", 38.1, 32.8),
)
