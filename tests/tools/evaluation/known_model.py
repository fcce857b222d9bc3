"""A masked diffusion model whose joint distribution is known, and data sets of a few lines."""

import gzip
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from pretrain.model.generation import decoding_arguments, generate
from pretrain.model.sampling import states

WORDS = 3  # tokens 0, 1 and 2; the mask is 3, the end of a text 4
MASK, END, VOCABULARY = 3, 4, 5


class Known:
    """A law over `length` tokens after one token of context; its conditionals are exact for any masks."""

    def __init__(self, length: int, seed: int = 0):
        weights = np.random.default_rng(seed).gamma(0.7, 1.0, WORDS**length)
        self.law = torch.tensor(weights / weights.sum())
        self.texts = torch.tensor(list(itertools.product(range(WORDS), repeat=length)))
        self.config = SimpleNamespace(
            mask_token_id=MASK,
            bos_token_id=END,
            max_position_embeddings=64,
            model_type="known",
            diffusion={"shift": True},
        )
        self.generation_config = None
        self.device = torch.device("cpu")

    def __call__(self, input_ids, logits_at, attention_mask=None):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        first = real.argmax(dim=1)
        found = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, begin in enumerate(first.tolist()):
            ids = input_ids[row, begin + 1 : begin + 1 + self.texts.shape[1]]
            fits = ((ids == self.texts) | (ids == MASK)).all(dim=1)
            shown = torch.nn.functional.one_hot(self.texts, VOCABULARY).double()
            weight = torch.einsum("t,tnv->nv", self.law * fits, shown)
            found[row, begin + 1 : begin + 1 + len(ids)] = weight / weight.sum(-1, keepdim=True)
        return SimpleNamespace(logits=found[logits_at].log())

    def diffusion_states(self, input_ids, **kwargs):
        return states(self, **decoding_arguments(self, input_ids, **kwargs))

    def diffusion_generate(self, input_ids, **kwargs):
        return generate(self, **decoding_arguments(self, input_ids, **kwargs))

    @property
    def entropy(self) -> float:
        """In nats."""
        return float(torch.special.entr(self.law).sum())


class Digits:
    """A tokenizer of digits: "012" is the ids 0, 1 and 2; a dot is the end of a text."""

    eos_token_id = sep_token_id = bos_token_id = END
    pad_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [END if c == "." else int(c) for c in text]}

    def decode(self, ids, **_):
        return "".join("." if i == END else str(i) for i in ids)


SENTENCES = (
    "Once there was a fox.",
    "It lived in the wood.",
    "It was old and grey.",
    "One day it saw a bird.",
    "It ran.",
)


def tiny_data(folder: Path) -> Path:
    """A file for each task of Table 1 and Table 9."""
    folder.mkdir()
    code = {
        "task_id": "t/0", "entry_point": "f", "prompt": "def f(x):\n", "suffix": "    return y\n",
        "canonical_solution": "    y = x + 1\n", "test": "def check(g):\n    assert g(1) == 2\n",
    }  # fmt: skip
    passage = "the king had a son and a daughter , and the king loved his"
    endings = ["eats it.", "flies away to the sun.", "sleeps.", "is a fox."]
    meal = {"activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "endings": endings}
    chase = {"sentence": "The fox saw the hen so the _ ran away.", "option1": "fox", "option2": "hen"}
    answers = {"answerA": "full", "answerB": "very sad and blue", "answerC": "gone"}
    story = {f"InputSentence{i + 1}": SENTENCES[i] for i in range(4)}
    story |= {"RandomFifthSentenceQuiz1": SENTENCES[4], "RandomFifthSentenceQuiz2": "No.", "AnswerRightEnding": "1"}
    equation = {"passage": "", "options": ["(A)1", "(B)2", "(C)3", "(D)4"], "label": "B", "other": {"solution": "So."}}
    records = {
        "lambada_test": [{"text": f"{passage} {word}"} for word in ("son", "daughter", "wife")],
        "piqa_valid": [
            {"goal": f"eat {word}", "sol1": "use a spoon", "sol2": "use the wall and a hat", "label": n % 2}
            for n, word in enumerate(("soup", "bread", "corn"))
        ],
        "hellaswag_validation": [{"ind": n, **meal, "label": str(n)} for n in range(3)],
        "winogrande_valid": [*({**chase, "answer": str(n)} for n in (1, 2)), {**chase, "sentence": "?", "answer": "1"}],
        "social_i_qa_validation": [
            {"context": "Tom ate.", "question": "How is he?", **answers, "label": str(n)} for n in (1, 2, 3)
        ],
        "triviaqa_valid": [
            {"question": f"Who is {name}?", "answer": {"aliases": ["The king", name]}} for name in "abcdefgh"
        ],
        "gsm8k_test": [
            {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
            {"question": "2+2?", "answer": "#### 1,004"},
        ],
        "gsm8k_train": [{"question": "3+1?", "answer": "#### 4"}, {"question": "3+2?", "answer": "#### 5"}],
        "rocstories_cloze": [story] * 2,
        "humaneval_single_line": [code, {**code, "task_id": "t/1", "canonical_solution": "    y = x+1\n"}],
        "squad_sample": [{"context": "The fox is red.", "question": "Which colour?", "answers": ["red", "bright red"]}],
        "mawps_test": [{"question": "1 and 1 ?", "answer": "2.0"}, {"question": "1 and 2 ?", "answer": "3"}],
        "mawps_train": [{"original_text": f"{n} and 1 ?", "ans": n + 1.0} for n in range(5)],
        "sat_math": [{"question": f"x = {n} ?", **equation} for n in range(6)],
    }
    for name, lines in records.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if name.startswith("piqa"):
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder
