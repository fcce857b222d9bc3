"""What a file is, by its name and by the files beside it.

In: names, local or remote. Out: `kind(path)` of a file that the user named, and `select(names)`, which of a folder's
files hold documents and why the others do not.
"""

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from common.errors import UserError

KINDS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".bin": "megatron",
    ".ds": "datatrove",
    ".mds": "mds",
}
OF_MDS = (".zstd", ".gz")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # of text kinds
PACKED = (*COMPRESSED, ".zstd", ".gzip", ".zip", ".br", ".lz4", ".snappy")  # what hides another suffix
SAVED_DATASET = ("dataset_info.json", "state.json")  # what a saved Hugging Face dataset holds beside its data
LISTED_SUFFIXES = 20  # others are counted together

StateFiles = Callable[[str], set[str] | None]  # a folder's state.json → the data files that it lists


def kind(path: str) -> str:
    """'jsonl', 'txt', 'parquet', 'arrow', 'megatron', 'datatrove' or 'mds', by the file's name.

    Raises UserError for other names.
    """
    plain, compressed = _split(path)
    found = KINDS.get(posixpath.splitext(plain)[1])
    if found is None:
        raise UserError(
            f"{path}: unknown kind of file; expected {' '.join(KINDS)}, text kinds also with {' '.join(COMPRESSED)}"
        )
    if compressed and not _may_be_compressed(found, compressed):
        raise UserError(f"{path}: {found} files compress inside; decompress it first")
    return found


def is_compressed(path: str) -> bool:
    return bool(_split(path)[1])


def index_of(path: str) -> str | None:
    """The file that says where the documents of a token file are, or None for a file that needs none."""
    lower = path.lower()
    if lower.endswith(".bin"):
        return path[:-4] + ".idx"
    return path + ".index" if lower.endswith(".ds") else None


def select(names: Iterable[str], state_files: StateFiles) -> tuple[list[str], dict[str, str]]:
    """(the files of documents among the names that a folder or pattern gave, the others by suffix or pattern).

    What belongs to a file of documents, such as the .idx of a .bin, is in neither. Raises UserError for a saved
    dataset of which files are missing.
    """
    names = list(names)
    present = set(names)
    known = {name: _known(name) for name in names}
    arrow_folders = {posixpath.dirname(name) for name in names if known[name] == "arrow"}
    listed = {
        folder: state_files(folder) for folder in arrow_folders if posixpath.join(folder, "state.json") in present
    }
    for folder, files in listed.items():
        missing = sorted(file for file in files or () if posixpath.join(folder, file) not in present)
        if missing:
            raise UserError(
                f"{folder}: its state.json lists {missing[0]}, which is not there; the dataset is incomplete"
            )
    mds_folders = _with_parents(posixpath.dirname(name) for name in names if known[name] == "mds")
    documents: list[str] = []
    ignored: dict[str, str] = {}
    for name in names:
        folder, base = posixpath.split(name)
        index = index_of(name)
        lists = listed.get(folder)
        if _belongs_to_another(name, present, arrow_folders, mds_folders):
            continue
        if fnmatchcase(base, "cache-*.arrow"):  # what `datasets` computed from the data
            ignored[name] = "cache-*.arrow"
        elif known[name] == "arrow" and lists is not None and base not in lists:
            ignored[name] = ".arrow that state.json does not list"
        elif base in SAVED_DATASET:
            ignored[name] = base
        elif known[name] is None:
            ignored[name] = _suffix(base)
        elif index and index not in present:
            ignored[name] = f"{_suffix(base)} without {'.idx' if index.endswith('.idx') else '.ds.index'}"
        else:
            documents.append(name)
    return documents, ignored


def shorten(ignored: Counter) -> dict[str, int]:
    """The most frequent suffixes, sorted by name; names with a number at the end would give one entry each."""
    kept = dict(sorted(ignored.items(), key=lambda item: (-item[1], item[0]))[:LISTED_SUFFIXES])
    others = ignored.total() - sum(kept.values())
    return dict(sorted(kept.items())) | ({"others": others} if others else {})


def _split(path: str) -> tuple[str, str]:
    """The file's name in lower case without, and the suffix of, its compression."""
    base = posixpath.basename(path).lower()
    if base.endswith(".mds.zstd"):  # .zstd is MosaicML's suffix alone
        return base.removesuffix(".zstd"), ".zstd"
    found = next((suffix for suffix in COMPRESSED if base.endswith(suffix)), "")
    return base.removesuffix(found), found


def _may_be_compressed(found: str, suffix: str) -> bool:
    return found in ("jsonl", "txt") or (found == "mds" and suffix in OF_MDS)


def _known(name: str) -> str | None:
    """Its kind, or None for what holds no documents that can be read."""
    plain, compressed = _split(name)
    found = KINDS.get(posixpath.splitext(plain)[1])
    return found if found and (not compressed or _may_be_compressed(found, compressed)) else None


def _belongs_to_another(name: str, present: set[str], arrow_folders: set[str], mds_folders: set[str]) -> bool:
    folder, base = posixpath.split(name)
    if base in SAVED_DATASET:
        return folder in arrow_folders
    if base == "index.json":
        return folder in mds_folders
    if base.endswith(".idx"):
        return name[:-4] + ".bin" in present or name[:-4] + ".BIN" in present
    plain, compressed = posixpath.splitext(name)
    if compressed in OF_MDS and plain.endswith(".mds"):  # the same rows as the decompressed file beside it
        return plain in present
    stem = next((name.removesuffix(s) for s in (".index", ".metadata", ".loss") if name.endswith(s)), "")
    return stem.lower().endswith(".ds") and stem in present


def _with_parents(folders: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for folder in folders:
        while folder not in found:
            found.add(folder)
            folder = posixpath.dirname(folder)
    return found


def _suffix(base: str) -> str:
    """The suffix of a name in lower case, with the one that a compression hides: `.csv.gz`."""
    stem, suffix = posixpath.splitext(base.lower())
    if suffix in PACKED:
        suffix = posixpath.splitext(stem)[1] + suffix
    return suffix or "no suffix"
