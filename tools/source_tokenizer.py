"""Others' tokenizers, read without their code, with the mask that the model was trained on. Not a verb."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, Qwen2Tokenizer

from common.errors import UserError

from .decoding import why
from .layouts import Layout
from .source_folder import read_json

LEAST_SHARE = 0.9  # of the embedding's rows that a tokenizer has; the others are padding to round numbers
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files of a tokenizer."""
    return any((folder / name).exists() for name in FILES)


def load_tokenizer(folder: Path, layout: Layout, config: PretrainedConfig) -> Any:
    """The tokenizer of a folder; none of its code runs.

    Dream's class is code of its own and splits text as Qwen2's does, from the same files, so that class takes its
    place. Otherwise tokenizer_config.json says the class, or where it says none the model's `config`: transformers 5
    would let Qwen2's configuration overrule it, and add tokens. Raises UserError for a folder without tokenizer, and
    where the ids of added tokens would change.
    """
    if not has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer ({', '.join(FILES)}); name a folder that has it with --tokenizer")
    described = folder / "tokenizer_config.json"
    settings = read_json(described) if described.exists() else {}
    try:
        if settings.get("tokenizer_class") == "DreamTokenizer":
            tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        else:
            decides = PretrainedConfig() if settings.get("tokenizer_class") else config
            tokenizer = AutoTokenizer.from_pretrained(folder, config=decides, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = why(error)
        raise UserError(
            f"the tokenizer in {folder} cannot be loaded: {reason}; name another of {layout.name} with --tokenizer"
        ) from None
    for number, token in settings.get("added_tokens_decoder", {}).items():
        if tokenizer.convert_tokens_to_ids(token["content"]) != int(number):
            found = tokenizer.convert_tokens_to_ids(token["content"])
            raise UserError(
                f"{described}: {token['content']!r} is token {number}, but transformers reads it as {found}; "
                "name a folder with tokenizer.json with --tokenizer"
            )
    tokenizer.init_kwargs.pop("auto_map", None)  # which would ask for code that does not come along
    return tokenizer


def find_mask(
    layout: Layout, config: Mapping[str, Any], tokenizer: Any, rows: int, asked: int | None, where: Path
) -> int:
    """The mask's id, which all that name one must agree on; `tokenizer` gets it as its mask_token.

    `rows`: of the embedding; `asked`: the user's --mask_token_id, which overrules all others. Raises UserError for an
    id that is not known, differs or is no token.
    """
    if asked is None and layout.adds_mask:
        tokenizer.add_special_tokens({"mask_token": layout.adds_mask})
    named = {
        "config.json": config.get("mask_token_id"),
        "the tokenizer's mask_token": tokenizer.mask_token_id,
        f"the published {layout.name} of {rows} tokens": layout.masks.get(rows),
    }
    if asked is not None:
        named = {"--mask_token_id": asked}
    found = {name: number for name, number in named.items() if number is not None}
    if not found:
        raise UserError(
            f"{where}: the mask is not known: neither config.json nor the tokenizer names it, and no {layout.name} of "
            f"{rows} tokens was published; say which token it was trained with: --mask_token_id N"
        )
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{number} in {name}" for name, number in found.items())
        raise UserError(
            f"{where}: the mask is {listed}; say which it was trained with, --mask_token_id N, or name the right "
            "tokenizer with --tokenizer"
        )
    (source, mask), *_ = found.items()
    if len(tokenizer) > rows:
        raise UserError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, more than the {rows} rows of the embedding; name the "
            "model's own with --tokenizer"
        )
    if len(tokenizer) < LEAST_SHARE * rows:
        raise UserError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens for {rows} rows of the embedding, which is another "
            "model's; name the right one with --tokenizer"
        )
    if not 0 <= mask < len(tokenizer):
        raise UserError(
            f"{where}: the mask is {mask} in {source}, outside the vocabulary: the tokenizer has 0 to "
            f"{len(tokenizer) - 1}; correct it with --mask_token_id or --tokenizer"
        )
    if tokenizer.mask_token_id != mask:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask)
    return mask


def start_token_id(tokenizer: Any) -> int | None:
    """The token before a text that begins with a gap: bos, or the padding that dLLM takes without one, or eos."""
    ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in ids if number is not None), None)


def save_for_transformers_4(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that transformers 4.44 to 4.57 read too, which the code of other layouts was written for."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "tokenizer.json"
    if path.exists():
        backend = json.loads(path.read_text(encoding="utf-8"))
        merges = backend["model"].get("merges", [])
        if not any(" " in part for merge in merges for part in merge):  # the pairs' former spelling, "a b"
            backend["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
            path.write_text(json.dumps(backend, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
