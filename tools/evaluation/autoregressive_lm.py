"""Autoregressive models of transformers, as lm-eval asks them: through its own `hf`.

In a gap such a model continues what stands before it, with as many tokens as a diffusion model has masks.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from common.errors import UserError

from ..decoding import continuation as tokens_of
from .answers import Answers
from .harness import GENERATED, Asked, Evaluated, cut, encode_pair, seed_of, text_of
from .likelihood import Score


class AutoregressiveLM(Evaluated):
    """A causal model of transformers, asked through lm-eval's own `hf`."""

    kind = "autoregressive"

    def __init__(
        self, model: Any, tokenizer: Any, answers: Answers, seed: int = 0, batch_size: int = 32, progress: bool = True
    ):
        super().__init__(answers, batch_size, model.device, progress)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is made already
        make: Any = HFLM
        self.hf: Any = make(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.hf.tok_decode = self._decode
        self.hf.model.generation_config = GenerationConfig(pad_token_id=self.hf.tokenizer.pad_token_id)
        self.tokenizer, self.seed = tokenizer, seed

    def _decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """hf's, which would drop the space before the first word of what is written."""
        if isinstance(tokens, int) or not skip_special_tokens:
            return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text_of(list(tokens), self.tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.hf.eot_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.hf.prefix_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.hf.tok_encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        return self.hf._loglikelihood_tokens(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self.hf.loglikelihood_rolling(requests, disable_tqdm=True)

    def size(self, asked: Asked) -> tuple[int, int]:
        return len(asked.context) + len(asked.continuation), 1

    def score(self, asked: Sequence[Asked]) -> list[Score]:
        pairs = [encode_pair(self, a.context, a.continuation) for a in asked]
        for a, (context, target) in zip(asked, pairs):
            if len(target) > self.hf.max_length:
                raise UserError(f"{len(target)} tokens are to be scored, but the model takes {self.hf.max_length}")
            if len(context) + len(target) > self.hf.max_length + 1:
                self.truncated.add(a.key)
        requests = [((a.context, a.continuation), c, t) for a, (c, t) in zip(asked, pairs)]
        found = self._loglikelihood_tokens(requests)
        return [Score(float(value), 0.0, len(t), bool(same)) for (value, same), (_, t) in zip(found, pairs)]

    def write(self, asked: Sequence[Asked]) -> list[str]:
        """Drawn texts one at a time, each from its own seed, so that no text depends on its batch.

        Those without a context too: hf decides by the first of a batch whether all get a start token.
        """
        alone = [a for a in asked if a.temperature or not a.context]
        found = {}
        for group in [[a for a in asked if a not in alone], *([a] for a in alone)]:
            if group and group[0].temperature:
                torch.manual_seed(seed_of(group[0], self.seed))
            texts = self.hf.generate_until([self._request(a) for a in group], disable_tqdm=True) if group else []
            found |= {a.key: cut(text, a.until) for a, text in zip(group, texts, strict=True)}
        return [found[a.key] for a in asked]

    def _request(self, asked: Asked) -> Instance:
        budget = self._budget(asked)
        if budget >= self.hf.max_length:
            raise UserError(
                f"{budget} tokens are to be written, but the model takes {self.hf.max_length}; see --max_gen_toks"
            )
        if len(self.tok_encode(asked.context)) + budget > self.hf.max_length:
            self.truncated.add(asked.key)
        how: dict[str, Any] = {"until": list(asked.until), "do_sample": False, "max_gen_toks": budget}
        if asked.temperature:
            how |= {"do_sample": True, "temperature": asked.temperature, "top_k": 0}
        context = asked.context or self.tokenizer.decode([self.prefix_token_id])
        return Instance("generate_until", {}, (context, how), 0)

    def _budget(self, asked: Asked) -> int:
        """Tokens to write: in a gap as many as stood there, or as the authors counted, its characters."""
        if asked.middle is None:
            return asked.max_tokens or GENERATED
        if asked.faulty:
            return max(1, len(asked.middle))
        return max(1, len(tokens_of(asked.middle, self.tokenizer)))
