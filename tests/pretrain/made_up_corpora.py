"""Corpora that are a manifest alone: rows that are counted and placed, and never read."""

from pathlib import Path

from data_prep.shards import Manifest, Shard, SourceEntry

TOKENIZER = {
    "name": "t",
    "fingerprint": "f" * 64,
    "vocab_size": 384,
    "add_bos": False,
    "add_eos": True,
    "special_ids": {"bos": 1, "eos": 0, "pad": None},
    "engine": "tokenizers",
}


def shard(file: str, rows: int, seq_len: int) -> Shard:
    return Shard(file=file, rows=rows, tokens=rows * seq_len, documents=rows, bytes=1, sha256=file)


def made_up(
    folder: Path,
    rows: dict[str, int],
    weights: dict[str, float] | None = None,
    max_epochs: dict[str, float] | None = None,
    seq_len: int = 32,
    **tokenizer,
) -> str:
    """Write the manifest of a corpus with so many training rows a source, in two shards, and two validation rows."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for name, count in rows.items():
        entry = SourceEntry(name, (weights or {}).get(name, 1.0), max_epochs=(max_epochs or {}).get(name, 0))
        first = count // 3
        entry.train = [shard(f"{name}/train-{k}", part, seq_len) for k, part in enumerate((first, count - first))]
        entry.validation = [shard(f"{name}/validation-0", 2, seq_len)]
        sources.append(entry)
    about = TOKENIZER | tokenizer
    Manifest(seq_len, "uint16", "concat", about, corpus_hash="h", sources=sources).save(folder)
    return str(folder)
