"""A folder that llama.cpp's own `convert_hf_to_gguf.py` takes, for `llama-diffusion-cli`. Not a verb.

llama.cpp knows masked diffusion models with the shift as "Dream", a bidirectional Qwen2 whose biases are optional. So
weights of LLaMA and Qwen2 need no change; config.json has to say Dream.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers.utils.hub import cached_file

from common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.model.reading import uses_shift

SHAPES = ("llama", "qwen2")

# llama-diffusion-cli puts every prompt through the chat template; this one leaves it as it is, to be continued
CONTINUE_THE_PROMPT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def reason_unsupported(config: Any) -> str | None:
    """Why llama.cpp's Dream graph would not compute what this model computes; None where it does."""
    heads = config.num_attention_heads
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in SHAPES:
        return f"its masked diffusion models have the shape of {' or '.join(SHAPES)}, and this is a {config.model_type}"
    if not uses_shift(config):
        return "its Dream models predict token i + 1 at position i, and this model was trained without the shift"
    if (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads != config.hidden_size:
        return f"heads × head_dim has to be hidden_size there, {config.hidden_size}"
    if rope != "default":
        return f"it does not apply rope_type={rope} to Dream models"
    if config.hidden_act != "silu":
        return f"its feed-forward layer has silu, and this model {config.hidden_act}"
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(config, name, False):
            return f"it has no {name} for Dream models"
    return None


def write_description(folder: Path, config: Any, tokenizer: Any, sentencepiece: Path | None) -> None:
    """Write config.json and the tokenizer as the converter wants them, with its `sentencepiece` model if it has one."""
    described = config.to_dict()
    for name in ("auto_map", "is_causal", "diffusion"):
        described.pop(name, None)
    described |= {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "mask_token_id": config.mask_token_id,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, tokenizer, sentencepiece)


def write_tokenizer(folder: Path, tokenizer: Any, sentencepiece: Path | None) -> None:
    """Write the tokenizer, and where it is one of SentencePiece also that file and the tokens appended to it."""
    ids = tokenizer("a").input_ids
    tokenizer.chat_template = CONTINUE_THE_PROMPT
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # said outright: where these are missing, the converter assumes what LLaMA's tokenizer does
    settings["add_bos_token"] = ids[0] == tokenizer.bos_token_id
    settings["add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if sentencepiece is not None:
        shutil.copyfile(sentencepiece, folder / "tokenizer.model")
        known = SentencePieceProcessor(model_file=str(sentencepiece)).vocab_size()
        appended = {token: i for token, i in tokenizer.get_added_vocab().items() if i >= known}
        (folder / "added_tokens.json").write_text(json.dumps(appended) + "\n", encoding="utf-8")


def sentencepiece_model(base: ModelConfig, tokenizer: Any) -> Path | None:
    """The base's tokenizer.model, from which alone the converter reads a SentencePiece vocabulary; None for others.

    Raises UserError where there is none and the vocabulary is SentencePiece's.
    """
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if not vocabulary.get("byte_fallback"):
        return None
    found = cached_file(
        base.base,
        "tokenizer.model",
        revision=base.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        raise UserError(f"llama.cpp needs the tokenizer.model of {base.base}, and it has none; add the file there")
    return Path(found)
