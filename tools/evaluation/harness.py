"""What lm-evaluation-harness asks, answered by any of our models: remembered, in batches of like length, on ranks.

In: lm-eval's requests. Out: its answers, each also remembered with what the harness has no place for: standard errors
and numbers of tokens.
"""

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from common.errors import UserError

from .answers import Answers
from .likelihood import Score

GENERATED = 256  # tokens of a text where a task names no number; lm-eval's default
FAULTY = "_paper"  # how the names of tasks end that are scored as the authors' scripts do


@dataclass(frozen=True)
class Asked:
    """A request in our words."""

    context: str
    continuation: str = ""  # to be scored
    greedy: bool = True  # whether it is also to be said if greedy decoding gives it
    faulty: bool = False  # as the authors' scripts do
    max_tokens: int | None = None  # to be written
    until: tuple[str, ...] = ()  # ends a text
    temperature: float = 0.0
    suffix: str | None = None  # of a gap: what follows it
    middle: str | None = None  # … and what stood there: its number of tokens is given
    number: int = 0  # of a drawn text: the example's, and which of its texts

    @property
    def key(self) -> str:
        """The same for the same request, whoever asks."""
        return hashlib.sha256(json.dumps(asdict(self), ensure_ascii=False).encode()).hexdigest()[:24]


class Evaluated(TemplateLM):
    """A model that lm-eval can ask. Subclasses score and write a batch; what a request is worth is its `rows`."""

    kind: str  # "masked_diffusion" or "autoregressive"

    def __init__(self, answers: Answers, batch_size: int, device: torch.device, progress: bool = True):
        super().__init__()
        self.answers, self.batch_rows, self.progress = answers, batch_size, progress
        self.truncated: set[str] = set()  # keys of requests that were longer than the model takes
        self.only_compared: set[str | None] = set()  # tasks of choices, which do not ask for is_greedy
        self._device = device
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    @abstractmethod
    def score(self, asked: Sequence[Asked]) -> list[Score]:
        """The likelihood of each continuation."""

    @abstractmethod
    def write(self, asked: Sequence[Asked]) -> list[str]:
        """A text for each, until one of `until` or `max_tokens`."""

    @abstractmethod
    def size(self, asked: Asked) -> tuple[int, int]:
        """(a length to sort by, rows that a model reads)."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """lm-eval's: (log-likelihood in nats, whether greedy decoding gives the continuation)."""
        asked = [_to_score(r, r.task_name not in self.only_compared) for r in requests]
        found = self._answered(asked, self.score, "likelihoods")
        return [(Score(**a).value, Score(**a).is_greedy) for a in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """lm-eval's: a text for each request. A document with `infill` asks for what stands in its gap."""
        asked, drawn = [], Counter()
        for r in requests:
            one = self._to_write(r)
            if one.temperature:  # a number of its own, whatever ranks there are
                one = replace(one, number=1000 * (r.doc_id or 0) + drawn[r.task_name, r.doc_id])
                drawn[r.task_name, r.doc_id] += 1
            asked.append(one)
        return self._answered(asked, self.write, "texts")

    def _to_write(self, request: Instance) -> Asked:
        context, how = request.arguments[:2]
        gap = request.doc.get("infill") if isinstance(request.doc, dict) else None
        until = how.get("until") or ()
        if gap is not None:
            # the authors' instruction before code, which only autoregressive models got
            before = request.doc.get("instruction", "") if self.kind == "autoregressive" else ""
            context = before + gap["prefix"]
        lengths = [how[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if how.get(name)]
        return Asked(
            context,
            faulty=_is_faulty(request),
            max_tokens=lengths[0] if lengths else None,
            until=(until,) if isinstance(until, str) else tuple(until),
            temperature=float(how.get("temperature") or 0.0) if how.get("do_sample", True) else 0.0,
            suffix=None if gap is None else gap["suffix"],
            middle=None if gap is None else gap["middle"],
        )

    def _answered(self, asked: list[Asked], answer: Any, what: str) -> list[Any]:
        """The answers in the order of the requests; new ones are computed a batch at a time, long ones first."""
        missing = list({a.key: a for a in asked if a.key not in self.answers.known}.values())
        sizes = {a.key: self.size(a) for a in missing}
        missing.sort(key=lambda a: sizes[a.key], reverse=True)
        known = len(asked) - len(missing)
        rows = sum(rows for _, rows in sizes.values())
        shown = self.progress and self._rank == 0
        label = f"{what}, {known} of {len(asked)} known" if known else what
        with tqdm(total=rows, desc=label, unit="row", disable=not shown, dynamic_ncols=True) as bar:
            for batch in batches(missing, [sizes[a.key][1] for a in missing], self.batch_rows):
                found = answer(batch)
                plain = [asdict(a) if isinstance(a, Score) else a for a in found]
                self.answers.add({a.key: one for a, one in zip(batch, plain, strict=True)}, self.truncated)
                bar.update(sum(sizes[a.key][1] for a in batch))
        return [self.answers.known[a.key] for a in asked]

    # what lm-eval asks of a model on several ranks
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(world size, …)."""
        found = [torch.zeros_like(tensor) for _ in range(self._world_size)]
        dist.all_gather(found, tensor)
        return torch.stack(found)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks, on rank `dst`."""
        found: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


def _to_score(request: Instance, greedy: bool) -> Asked:
    context, continuation = request.arguments[:2]
    return Asked(context, continuation, greedy, _is_faulty(request))


def _is_faulty(request: Instance) -> bool:
    return (request.task_name or "").endswith(FAULTY)


def batches(items: Sequence[Asked], rows: Sequence[int], most: int) -> Iterator[list[Asked]]:
    """Neighbours together, as long as their rows are no more than `most`; one alone may have more."""
    batch: list[Asked] = []
    held = 0
    for item, count in zip(items, rows, strict=True):
        if batch and held + count > most:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += count
    if batch:
        yield batch


def encode_pair(lm: Evaluated, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(context, continuation) ids as lm-eval encodes them: together; no context is the prefix token.

    Raises UserError for an empty continuation.
    """
    if not continuation:
        raise UserError(f"there is nothing to score after {context[-60:]!r}")
    if context:
        return lm._encode_pair(context, continuation)
    ids = lm.tok_encode(continuation, add_special_tokens=False)
    if ids[:1] == [lm.prefix_token_id]:
        return ids[:1], ids[1:]
    return [lm.prefix_token_id], ids


def text_of(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of tokens in the middle of one; sentencepiece would drop the space before a first word."""
    anchor = tokenizer("\n", add_special_tokens=False)["input_ids"]
    plain: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode([*anchor, *ids], **plain)[len(tokenizer.decode(anchor, **plain)) :]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of `until`."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text


def seed_of(asked: Asked, seed: int) -> int:
    """The seed of a text: of the request and `seed`, whatever else is in the batch."""
    digest = hashlib.sha256(f"{seed}\n{asked.key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
