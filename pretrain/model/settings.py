"""How text is decoded: the arguments of `diffusion_generate`, their limits, and which go together."""

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from .rules import BLIND, ORDERS


@dataclass(frozen=True)
class SamplingSettings:
    """How text is decoded. The names are those of `diffusion_generate` and of generation_config.json.

    A step commits the masks that come first by `order`, as many as share the rest among the steps left, and besides
    all that an adaptive rule takes (`threshold`, `factor` or `entropy_bound`).
    """

    steps: int | None = None  # the most model calls a row takes, but one a block; None: one a mask, so a token a step
    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int | None = None  # these three as in transformers' generate; None: all tokens
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    order: str | None = None  # of ORDERS; None: what the adaptive rule ranks by, else random (Algorithm 2)
    block_length: int | None = None  # masks are filled in blocks of so many, from left to right; None: all at once
    threshold: float | None = None  # Fast-dLLM: also all tokens that are more probable
    factor: float | None = None  # Fast-dLLM: also as many as their confidence allows
    entropy_bound: float | None = None  # also those whose entropies sum up to this, in nats
    kl_threshold: float | None = None  # KLASS: above `threshold` only where the prediction moved less, in nats
    verify_threshold: float | None = None  # WINO: drafts above `threshold` that fall below this are masks again
    remasking: float = 0.0  # committed tokens of confidence c become masks again with this probability × (1 − c)
    cache: str | None = None  # "window": between full passes only the block is computed, an approximation
    refresh_every: int | None = None  # with the cache: a full pass every so many steps of a block; None: its first
    compile: bool = False  # torch.compile the model: each length of text takes half a minute once, then less a step

    def __post_init__(self) -> None:
        for name, (good, expected) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not good(value):
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        adaptive = [name for name in ("threshold", "factor", "entropy_bound") if getattr(self, name) is not None]
        if len(adaptive) > 1:
            raise ValueError(f"{' and '.join(adaptive)} each say how many tokens a step commits; give one of them")
        for name in ("kl_threshold", "verify_threshold"):
            if getattr(self, name) is not None and self.threshold is None:
                raise ValueError(f"{name} goes with a threshold, which is not given")
        if self.kl_threshold is not None and self.verify_threshold is not None:
            raise ValueError("kl_threshold and verify_threshold do not go together")
        if self.verify_threshold is not None and (self.cache or self.remasking):
            raise ValueError(f"verify_threshold does not go with {'a cache' if self.cache else 'remasking'}")
        if self.refresh_every is not None and self.cache is None:
            raise ValueError("refresh_every is for a cache, and cache is None")
        if self.compile and self.verify_threshold is not None:
            raise ValueError("compile wants inputs that keep their shape, and verify_threshold changes it each step")

    @property
    def by(self) -> str:
        """The order, where none is given that of the adaptive rule."""
        if self.order is not None:
            return self.order
        if self.entropy_bound is not None:
            return "entropy"
        return "random" if self.threshold is None and self.factor is None else "confidence"

    @property
    def blind(self) -> bool:
        """Whether the masks of a step are chosen before the model is asked."""
        return self.by in BLIND and self.threshold is None and self.factor is None and self.entropy_bound is None

    @property
    def draws_last(self) -> bool:
        """Whether the masks of a step are chosen by their predictions alone, whatever token is drawn for them."""
        return self.by != "confidence" and self.threshold is None and self.factor is None

    @property
    def revises(self) -> bool:
        """Whether committed tokens of the current block may become masks again."""
        return self.remasking > 0 or self.verify_threshold is not None


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


LIMITS: dict[str, tuple[Any, str]] = {
    "steps": (lambda v: _whole(v) and v >= 1, "a number of steps from 1 on"),
    "temperature": (lambda v: _number(v) and 0 <= v < float("inf"), "0 or more"),
    "top_k": (lambda v: _whole(v) and v >= 0, "a number of tokens, 0 for all"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "a share above 0, up to 1"),
    "min_p": (_is_share, "a share from 0 to 1"),
    "repetition_penalty": (lambda v: _number(v) and 0 < v < float("inf"), "a number above 0"),
    "order": (lambda v: v in ORDERS, ", ".join(ORDERS)),
    "block_length": (lambda v: _whole(v) and v >= 1, "a number of masks from 1 on"),
    "threshold": (_is_share, "a probability from 0 to 1"),
    "factor": (lambda v: _number(v) and 0 <= v < float("inf"), "0 or more"),
    "entropy_bound": (lambda v: _number(v) and 0 <= v < float("inf"), "0 nats or more"),
    "kl_threshold": (lambda v: _number(v) and 0 <= v < float("inf"), "0 nats or more"),
    "verify_threshold": (_is_share, "a probability from 0 to 1"),
    "remasking": (lambda v: _number(v) and 0 <= v < 1, "a probability below 1"),
    "cache": (lambda v: v == "window", "None or 'window'"),
    "refresh_every": (lambda v: _whole(v) and v >= 1, "a number of steps from 1 on"),
    "compile": (lambda v: isinstance(v, bool), "True or False"),
}
NAMES = tuple(f.name for f in fields(SamplingSettings))
