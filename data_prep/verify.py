"""Is a corpus what its manifest says: sizes, checksums, every row."""

from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.files import sha256_of

from .shards import Manifest, Shard, ShardedRows, ShardReader, schema


def check(
    directory: str | Path,
    hashes: bool = True,
    contents: bool = False,
    progress: Callable[[Shard], object] | None = None,
) -> list[str]:
    """Compare a corpus with its manifest; returns one line per problem, naming the file. Empty when all is well.

    Sizes are always compared, sha256 with `hashes`, and every row's ids and lengths with `contents`.
    `progress` is called after each shard.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    problems = []
    for source in manifest.sources:
        if problem := source.token_mismatch():
            problems.append(problem)
        for shard in source.train + source.validation:
            problem = _check_shard(directory, manifest, shard, hashes, contents)
            if problem:
                problems.append(problem)
            if progress:
                progress(shard)
    return problems


def _check_shard(directory: Path, manifest: Manifest, shard: Shard, hashes: bool, contents: bool) -> str | None:
    path = directory / shard.file
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != shard.bytes:
        return f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}; truncated or replaced"
    if hashes and (found := sha256_of(path)) != shard.sha256:
        return f"{path}: sha256 {found[:12]}…, the manifest says {shard.sha256[:12]}…; the file was altered"
    if not contents:
        return None
    try:
        reader = ShardReader(path)
    except UserError as error:
        return str(error)
    expected = schema(manifest.seq_len, manifest.dtype, manifest.tokenizer["fingerprint"])
    if not reader.schema.equals(expected, check_metadata=True):
        return f"{path}: its schema differs from the manifest's seq_len, dtype or tokenizer"
    if reader.rows != shard.rows:
        return f"{path}: {reader.rows} rows, the manifest says {shard.rows}"
    rows = ShardedRows(directory, [shard])
    for index in range(len(rows)):
        ids, lengths = rows.row(index)
        total = int(lengths.sum())
        if total > manifest.seq_len or (total < manifest.seq_len and manifest.packing == "concat"):
            return f"{path}: row {index}: document lengths sum to {total}, expected {manifest.seq_len}"
        if (lengths == 0).any() or total == 0:
            return f"{path}: row {index}: a document of no tokens"
        if ids.max() >= manifest.tokenizer["vocab_size"]:
            return f"{path}: row {index}: token id {ids.max()} is outside the vocabulary"
    return None
