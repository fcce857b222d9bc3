"""From records as data sets publish them to the documents that tasks ask about. None: the record is left out."""

import re
from collections.abc import Sequence
from typing import Any

from common.errors import UserError

INSTRUCTION = "Complete the missing line of the following Python function.\n\n"
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"']))\s+")


def passage(record: dict) -> dict | None:
    """LAMBADA: a passage without a last word cannot be asked."""
    text = record["text"].strip()
    return {"text": text} if " " in text else None


def labelled(record: dict, label: str, choices: Sequence[str], first: int = 0) -> dict | None:
    """A question with its right choice, numbered from `first`; without one, or with an empty choice, it is left out."""
    number = str(record[label]).strip()
    if not number.isdigit() or not first <= int(number) < first + len(choices):
        return None
    return record if all(choice.strip() for choice in choices) else None


def hellaswag(record: dict) -> dict | None:
    """HellaSwag; its public test split has no labels."""
    return labelled(record, "label", record["endings"])


def piqa(record: dict) -> dict | None:
    """PIQA."""
    found = labelled(record, "label", (record["sol1"], record["sol2"]))
    return None if found is None else {**found, "label": int(found["label"])}


def social_i_qa(record: dict) -> dict | None:
    """Social IQa; its labels count from 1."""
    return labelled(record, "label", [record[f"answer{letter}"] for letter in "ABC"], first=1)


def winogrande(record: dict) -> dict | None:
    """WinoGrande: a sentence without its blank cannot be asked."""
    found = labelled(record, "answer", (record["option1"], record["option2"]), first=1)
    return found if "_" in record["sentence"] else None


def trivia(record: dict) -> dict:
    """TriviaQA: the question and all answers that count."""
    answer = record["answer"]
    if not isinstance(answer, dict) or not answer.get("aliases"):
        raise UserError(f"TriviaQA: {record['question']!r} has no answer.aliases")
    return {"question": record["question"].removesuffix("?"), "answer": {"aliases": list(answer["aliases"])}}


def gsm8k(record: dict) -> dict:
    """GSM8K: the number after #### is the answer."""
    number = float(record["answer"].rpartition("####")[2].strip().replace(",", ""))
    return {"question": record["question"], "answer": record["answer"], "number": number}


def gap(prefix: str, middle: str, suffix: str) -> dict[str, Any]:
    """What the model sees of a gap, and what stood in it."""
    return {"infill": {"prefix": prefix, "middle": middle, "suffix": suffix}}


def story(record: dict) -> dict | None:
    """ROCStories: the third of five sentences is to be found; of the cloze set the right ending is the fifth."""
    if "InputSentence1" in record:
        sentences = [record[f"InputSentence{i}"].strip() for i in range(1, 5)]
        sentences.append(record[f"RandomFifthSentenceQuiz{record['AnswerRightEnding']}"].strip())
    elif "text" in record:
        sentences = SENTENCE_END.split(record["text"].strip())
    else:
        raise UserError("ROCStories: a record has neither `text` nor `InputSentence1` to `InputSentence4`")
    if len(sentences) != 5:
        return None
    return gap(" ".join(sentences[:2]), " " + sentences[2], " " + " ".join(sentences[3:]))


def last_word(record: dict) -> dict | None:
    """LAMBADA as a gap at the end."""
    before, _, word = record["text"].strip().rpartition(" ")
    return None if not before else gap(before, " " + word, "")


def squad(record: dict) -> dict:
    """SQuAD: the longest answer gives the length."""
    answers = record["answers"]["text"] if isinstance(record["answers"], dict) else list(record["answers"])
    prompt = f"{record['context']}\nQuestion: {record['question']}\nAnswer:"
    return {**gap(prompt, " " + max(answers, key=len), ""), "answers": answers}


def code(record: dict) -> dict:
    """HumanEval infilling: a part of a function is to be found."""
    return {**record, **gap(record["prompt"], record["canonical_solution"], record["suffix"])}


def code_with_instruction(record: dict) -> dict:
    """… with the instruction that the authors gave to autoregressive models; the diffusion model sees none."""
    return {**code(record), "instruction": INSTRUCTION}


def mawps(record: dict) -> dict:
    """MAWPS in either of its forms."""
    names = (
        [n for n in ("question", "original_text") if n in record],
        [n for n in ("answer", "ans", "result") if n in record],
    )
    if not names[0] or not names[1]:
        raise UserError("MAWPS: a record has no `question` and `answer`, nor `original_text` and `ans`")
    number = str(record[names[1][0]])
    return {"question": record[names[0][0]], "answer": number.removesuffix(".0"), "number": float(number)}


def sat_math(record: dict) -> dict:
    """AGIEval's SAT-Math: options as they stand there, with their letters."""
    question = f"{record.get('passage') or ''}\n{record['question']}".strip()
    options = " ".join(record["options"])
    asked = f"Question: {question}\nOptions: {options}\n"
    last = chr(ord("A") + len(record["options"]) - 1)
    solution = str((record.get("other") or {}).get("solution") or "").replace("\n", " ")
    return {
        "problem": f"{asked}Answer: Among A through {last}, the answer is",
        "problem_in_steps": f"{asked}Explanation:",
        "solution": f"{solution} Therefore, the answer is {record['label']}.",
        "answer": record["label"],
    }
