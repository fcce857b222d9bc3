"""What the benchmarks train on: a tokenizer of their own and a small LLaMA, so that nothing is downloaded."""

import json
from pathlib import Path

from data_prep.config import PrepareConfig, SourceConfig
from data_prep.prepare import prepare

END = "<eos>"


def read_texts(files: list[str]) -> list[str]:
    """The field `text` of every line of JSONL files."""
    texts = []
    for name in files:
        with open(name, encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    return texts


def train_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> None:
    """Write a byte-level BPE of `vocabulary` tokens, trained on `texts`, in the manner of GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(folder)


def prepare_shards(files: list[str], tokenizer: Path, seq_len: int, validation_fraction: float, folder: Path) -> None:
    """Pack JSONL files into the shards of one source; does nothing where they are there already."""
    prepare(
        PrepareConfig(
            [SourceConfig("text", files)],
            str(tokenizer),
            seq_len=seq_len,
            output_dir=str(folder),
            validation_fraction=validation_fraction,
            num_workers=1,
        ),
        progress=False,
    )


def llama(width: int, intermediate: int, layers: int, heads: int, vocabulary: int, seq_len: int) -> dict:
    """`model.architecture` of a LLaMA whose head is tied to its embeddings."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
