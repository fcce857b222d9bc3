"""Token ids of others as input: they give the shards that their texts would have given, or a clear error."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED, config, digest, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_files import write_columns, write_datatrove, write_mds, write_megatron

from common.errors import UserError
from data_prep import shards, tokenizing, verify
from data_prep.config import SourceConfig
from data_prep.deduplication import deduplicate
from data_prep.estimate import estimate
from data_prep.imported import text_decoder
from data_prep.inputs import tokens
from data_prep.prepare import merge, prepare

FORMATS = {
    "megatron": write_megatron,
    "megatron_int32_sentences": partial(write_megatron, dtype="i4", sentences=3),
    "datatrove": write_datatrove,
    "datatrove_4_bytes": partial(write_datatrove, dtype="u4"),
    "mds": write_mds,
    "mds_bytes": partial(write_mds, encoding="bytes"),
    "mds_any_gz": partial(write_mds, encoding="ndarray", suffix=".gz"),
    "mds_zstd": partial(write_mds, suffix=".zstd"),
    "parquet": write_columns,
    "arrow": partial(write_columns, kind="arrow"),
    "jsonl": partial(write_columns, kind="jsonl"),
    "dataset": partial(write_columns, kind="dataset"),
}
OF_COLUMNS = ("parquet", "arrow", "jsonl", "dataset")


def shard_bytes(out: Path) -> dict[str, str]:
    return {name: sha for name, sha in digest(out).items() if name.endswith(".arrow")}


def import_of(folder: Path, tokenizer_dir: Path, path: Path, name: str, **more):
    made = config(folder, tokenizer_dir, [path], **more)
    if name in OF_COLUMNS:
        made.sources[0].tokens_field = "input_ids"
    return made


def check_same(folder: Path, name: str, tokenizer_dir: Path, texts: list[str], ids: list[list[int]], **more) -> None:
    """The import of `ids` has the shards and the counts of the texts."""
    from_texts = prepare(config(folder / "texts", tokenizer_dir, [write_jsonl(folder / "a.jsonl", texts)], **more),
                         progress=False)  # fmt: skip
    path = FORMATS[name](folder / "ids", ids)
    imported = prepare(import_of(folder / "import", tokenizer_dir, path, name, **more), progress=False)
    assert from_texts and imported
    one, other = from_texts.sources[0], imported.sources[0]
    assert shard_bytes(folder / "import" / "out") == shard_bytes(folder / "texts" / "out")
    for key in ("documents", "characters", "bytes", "tokens", "dropped_tokens", "padding", "filtered", "bad"):
        assert getattr(one, key) == getattr(other, key), key
    assert one.validation and imported.tokenizer["engine"] == "imported"
    assert not verify.check(folder / "import" / "out", contents=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("more", [{}, {"packing": "best_fit", "deduplicate": "exact", "add_bos": True}], ids=str)
def test_imported_ids_give_the_shards_of_their_texts(tmp_path, tokenizer_dir, tokenizer, tales, name, more):
    """With BOS and EOS at some documents' ends, and without; duplicates; documents that are filtered out."""
    texts = [*tales[:40], *tales[5:8], "a naïve café — 本 👩", "xy"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    given = [[bos] * (n % 3 == 0) + row + [eos] * (n % 2 == 0) for n, row in enumerate(ids)]
    check_same(tmp_path, name, tokenizer_dir, texts, given, validation_fraction=0.2, **more)


@pytest.mark.parametrize("boundaries", ["record", "eos"])
def test_a_separator_at_the_end_is_no_part_of_the_document(tmp_path, tokenizer_dir, tokenizer, tales, boundaries):
    """Like an EOS there: it is put on again, once. It ends the documents of a stream, too."""
    more = {"separator": tokenizer.bos_token, "validation_fraction": 0.2, "packing": "best_fit"}
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id] for text in tales[:30]]
    if boundaries == "eos":
        stream = [i for row in ids for i in row]
        ids = [stream[start : start + 100] for start in range(0, len(stream), 100)]
    path = write_columns(tmp_path / "ids", ids)
    made = import_of(tmp_path / "import", tokenizer_dir, path, "parquet", **more)
    made.sources[0].boundaries = boundaries
    prepare(made, progress=False)
    texts = write_jsonl(tmp_path / "a.jsonl", tales[:30])
    prepare(config(tmp_path / "texts", tokenizer_dir, [texts], **more), progress=False)
    assert shard_bytes(tmp_path / "import" / "out") == shard_bytes(tmp_path / "texts" / "out")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real tokenizers are not in ../shared")
@pytest.mark.parametrize("vocabulary", ["gpt2", "llama2"])
def test_imported_ids_of_real_tokenizers_give_the_shards_of_their_texts(tmp_path, tales, vocabulary):
    folder = SHARED / "data" / "tokenizers" / vocabulary
    tokenizer = tokenizing.load_tokenizer(str(folder))
    texts = [*tales[:200], "  two spaces", "été 本 👩\u200d👧 \x04 \u2028"]
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    check_same(tmp_path, "datatrove_4_bytes", folder, texts, ids, validation_fraction=0.1)


@pytest.mark.parametrize("name", ["megatron", "megatron_int32_sentences", "datatrove", "parquet"])
def test_a_file_cut_into_units_gives_every_document_once(tmp_path, tokenizer_dir, tokenizer, tales, name):
    """Each unit drops less than a row; all that is in rows is the documents in order."""
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in tales[:60]]
    path = FORMATS[name](tmp_path / "ids", ids)
    manifest = prepare(
        import_of(tmp_path, tokenizer_dir, path, name, unit_mb=0.005, packing="best_fit", validation_fraction=0),
        progress=False,
    )
    assert manifest and manifest.parts[0].units["s"] > 3
    rows = shards.ShardedRows(tmp_path / "out", manifest.sources[0].train)
    found: list[int] = []
    for i in range(len(rows)):
        row, lengths = rows.row(i)
        found += row[: lengths.sum()].tolist()
    assert manifest.sources[0].documents == 60
    assert sorted(found) == sorted(i for row in ids for i in row)


def test_token_files_beside_texts_give_the_same_bytes_in_tasks_and_in_one_process(
    tmp_path, tokenizer_dir, tokenizer, tales
):
    """Several units of both, equal documents of both: of those the first stays, whichever it is."""
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in tales[:40]]
    path = write_megatron(tmp_path / "ids", ids)
    texts = write_jsonl(tmp_path / "a.jsonl", tales[30:70])

    def settings_in(folder):
        made = config(folder, tokenizer_dir, [path], unit_mb=0.005, deduplicate="exact", num_workers=1)
        made.sources.append(SourceConfig("texts", [str(texts)]))
        return made

    imported, read = prepare(settings_in(tmp_path / "one"), progress=False).sources
    assert (imported.documents, read.documents, read.filtered) == (40, 30, {"duplicate": 10})
    tasks = settings_in(tmp_path / "tasks")
    deduplicate(tasks, progress=False)
    for task in (2, 0, 1):
        prepare(tasks, progress=False, task=task, num_tasks=3)
    merge(tasks, progress=False)
    assert digest(tmp_path / "tasks" / "out") == digest(tmp_path / "one" / "out")


def test_blocks_that_hold_several_documents_are_cut_at_eos(tmp_path, tokenizer_dir, tokenizer, tales):
    """Rows as run_clm.py makes them: documents run on from one to the next."""
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in tales[:40]]
    stream = [i for row in ids for i in row]
    blocks = [stream[start : start + 100] for start in range(0, len(stream), 100)]
    made = import_of(tmp_path / "blocks", tokenizer_dir, write_columns(tmp_path / "b", blocks), "parquet",
                     validation_fraction=0.2)  # fmt: skip
    made.sources[0].boundaries = "eos"
    prepare(made, progress=False)
    path = write_jsonl(tmp_path / "a.jsonl", tales[:40])
    prepare(config(tmp_path / "texts", tokenizer_dir, [path], validation_fraction=0.2), progress=False)
    assert shard_bytes(tmp_path / "blocks" / "out") == shard_bytes(tmp_path / "texts" / "out")


@pytest.mark.parametrize("wrong", [-1, 384, 70_001])
@pytest.mark.parametrize("name", ["megatron_int32_sentences", "parquet", "mds_bytes"])
def test_an_id_outside_the_vocabulary_names_the_file_and_writes_no_manifest(tmp_path, tokenizer_dir, name, wrong):
    path = FORMATS[name](tmp_path / "ids", [[5] * 300, [5, 6, wrong, 7] * 50])
    made = import_of(tmp_path, tokenizer_dir, path, name)
    with pytest.raises(UserError, match=rf"document 1: token 2 has the id {wrong}, but .* has ids from 0 to 383"):
        prepare(made, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists() and not list(tmp_path.glob("out/.work/s-*.json"))


@pytest.mark.parametrize("name", ["megatron", "datatrove", "mds"])
def test_a_file_without_its_index_or_with_a_broken_one_is_an_error(tmp_path, tokenizer_dir, name):
    path = FORMATS[name](tmp_path / "ids", [[5] * 300, [7] * 100])
    index = next(p for p in (tmp_path / "ids").iterdir() if p.suffix in (".idx", ".index", ".json"))
    data = path if path.is_file() else path / "shard.00000.mds"
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2 + 1])
    with pytest.raises(UserError, match=index.name):
        prepare(import_of(tmp_path / "cut", tokenizer_dir, data, name), progress=False)
    index.unlink()
    with pytest.raises(UserError, match=f"{index.name}|no file matches"):
        prepare(import_of(tmp_path / "none", tokenizer_dir, data, name), progress=False)


def test_texts_and_ids_in_one_folder_are_an_error(tmp_path, tokenizer_dir, tales):
    folder = write_megatron(tmp_path / "ids", [[5, 6, 7] * 100]).parent
    write_jsonl(folder / "a.jsonl", tales[:9])
    with pytest.raises(UserError, match="source s has texts and token files in one folder; make two sources of them"):
        prepare(config(tmp_path, tokenizer_dir, [folder], num_workers=1), progress=False)
    assert not list(tmp_path.glob("out/.work/s-*.json")) and not list(tmp_path.glob("out/s/*"))


@pytest.mark.parametrize("name", ["megatron", "datatrove", "mds"])
def test_a_file_that_is_cut_off_is_damaged(tmp_path, tokenizer_dir, name):
    """What could be read is kept, where that is allowed."""
    path = FORMATS[name](tmp_path / "ids", [list(range(10, 210)) for _ in range(50)])
    data = path if path.is_file() else next(path.glob("*.mds*"))
    data.write_bytes(data.read_bytes()[:-1])
    manifest = prepare(import_of(tmp_path, tokenizer_dir, data, name, max_damaged_files=1), progress=False)
    assert manifest and len(manifest.sources[0].damaged) == 1 and data.name in manifest.sources[0].damaged[0]
    assert manifest.sources[0].documents == 49


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["megatron", "datatrove", "mds"]), where=st.floats(0, 1), byte=st.integers(0, 255))
def test_an_altered_index_is_an_error_or_gives_ids(tmp_path_factory, name, where, byte):
    """No other exception, and no memory for what a damaged number asks."""
    folder = tmp_path_factory.mktemp("altered")
    path = FORMATS[name](folder, [[1, 2, 3], [4, 5, 6, 7]])
    index = next(p for p in folder.iterdir() if p.suffix in (".idx", ".index", ".mds"))
    content = bytearray(index.read_bytes())
    content[int(where * (len(content) - 1))] = byte
    index.write_bytes(content)
    read = tokens.read_mds if name == "mds" else lambda p, _: tokens._read_indexed(p, 0, -1)
    try:
        for ids in read(str(path if path.is_file() else path / "shard.00000.mds"), ""):
            assert ids.dtype == np.int64 and ids.ndim == 1
    except (UserError, EOFError):
        pass


def test_a_column_that_holds_no_ids_is_counted_by_reason(tmp_path, tokenizer_dir):
    lines = ['{"input_ids": [5, 6]}', '{"input_ids": "text"}', '{"input_ids": [1.5]}', '{"input_ids": null}', "{}"]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"input_ids": [' + "7, " * 200 + "8]}"]))
    made = import_of(tmp_path, tokenizer_dir, tmp_path / "a.jsonl", "jsonl", max_bad_fraction=0.9)
    manifest = prepare(made, progress=False)
    assert manifest and manifest.sources[0].documents == 2
    assert manifest.sources[0].bad == {"no field 'input_ids'": 1, "not a list of token ids": 3}


def test_a_dry_run_estimates_imported_tokens(tmp_path, tokenizer_dir, tokenizer, tales):
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in tales[:100]]
    made = import_of(tmp_path, tokenizer_dir, write_megatron(tmp_path / "ids", ids), "megatron")
    page = estimate(made)
    assert "all sources have token ids" in page
    rows = float(re.search(r"= ([\d,]+) rows", page)[1].replace(",", ""))  # type: ignore[index]
    assert rows == pytest.approx(sum(map(len, ids)) / 64, rel=0.1)


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
@pytest.mark.skipif(not SHARED.exists(), reason="the real tokenizers are not in ../shared")
def test_decoding_gives_the_text_of_its_ids(name, tales):
    tokenizer = tokenizing.load_tokenizer(str(SHARED / "data" / "tokenizers" / name))
    decode = text_decoder(tokenizing.spec_of(tokenizer))
    for text in [*tales[:50], *tokenizing.FRAGMENTS, "a  b\n\n c", "👩\u200d👧 é e\u0301"]:
        if text in ("▁", "</s>", "<s>", "<unk>", "<|endoftext|>"):  # ids that have another text
            continue
        assert decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("name", ["megatron", "datatrove", "mds", "parquet"])
@pytest.mark.parametrize(
    "wanted", [{"filters": {"score": ">= 3"}}, {"filter": "os.path:isdir"}], ids=["filters", "hook"]
)
def test_filters_on_records_without_columns_are_refused_before_anything_is_read(tmp_path, tokenizer_dir, name, wanted):
    """Each record would be left out. Columns have them, unless an EOS and not the record ends a document."""
    made = import_of(tmp_path, tokenizer_dir, FORMATS[name](tmp_path / "ids", [[5, 6, 7]]), name)
    for key, value in wanted.items():
        setattr(made.sources[0], key, value)
    if name == "parquet":
        made.sources[0].boundaries = "eos"
    message = "boundaries: eos" if name == "parquet" else r"ids\S* has token ids alone"
    with pytest.raises(UserError, match=rf"source s: {next(iter(wanted))} needs .*{message}"):
        prepare(made, progress=False)
    assert not list(tmp_path.glob("out/**/*.arrow"))


def test_tokens_that_were_added_to_the_vocabulary_are_decoded_too(tokenizer_dir):
    tokenizer = tokenizing.load_tokenizer(str(tokenizer_dir))
    before = len(tokenizer)
    tokenizer.add_tokens(["<|new|>", "naïve words"])
    text = "a <|new|> of naïve words, 本"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert max(ids) == before + 1
    assert text_decoder(tokenizing.spec_of(tokenizer))(ids) == text


def test_what_is_no_record_stands_between_two_documents():
    """Not within one: what is held before it ends there."""
    rows = [np.array([1, 2, 3]), None, np.array([4, 5, 0, 6]), "x", None]
    found = [ids.tolist() if isinstance(ids, np.ndarray) else ids
             for ids, _ in tokens.split_at(((ids, {}) for ids in rows), frozenset({0}))]  # fmt: skip
    assert found == [[1, 2, 3], None, [4, 5, 0], [6], "x", None]
