"""Indexes of token files that do not fit their ids, documents too long to read, and special tokens among ids."""

import struct

import numpy as np
import pytest
from helpers import config, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from token_files import write_datatrove, write_megatron

from common.errors import UserError
from data_prep import documents, tokenizing
from data_prep.config import SourceConfig
from data_prep.imported import Decoder
from data_prep.inputs import tokens
from data_prep.inputs.document import Tally
from data_prep.inputs.listing import InputFile
from data_prep.prepare import prepare
from data_prep.work_list import Unit

WRITERS = {"megatron": write_megatron, "datatrove": write_datatrove}
DOCUMENTS = [list(range(10, 210)) for _ in range(50)]


def test_half_a_datatrove_file_of_4_bytes_is_no_file_of_2(tmp_path, tokenizer_dir):
    """Its size is that of a whole file of 2 bytes a token; its .metadata tells them apart."""
    path = write_datatrove(tmp_path / "ids", DOCUMENTS, dtype="u4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    manifest = prepare(config(tmp_path, tokenizer_dir, [path], max_damaged_files=1), progress=False)
    assert manifest and len(manifest.sources[0].damaged) == 1
    assert manifest.sources[0].documents == 25


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_cut_off_is_one_damaged_file_however_many_units_it_is_cut_into(tmp_path, tokenizer_dir, name):
    path = WRITERS[name](tmp_path / "ids", DOCUMENTS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    made = config(tmp_path, tokenizer_dir, [path], max_damaged_files=1, unit_mb=0.001, num_workers=1)
    manifest = prepare(made, progress=False)
    assert manifest and manifest.parts[0].units["s"] > 9
    assert len(manifest.sources[0].damaged) == 1 and manifest.sources[0].documents == 25


@pytest.mark.parametrize("name", WRITERS)
def test_bytes_after_the_last_document_are_named(tmp_path, tokenizer_dir, name):
    path = WRITERS[name](tmp_path / "ids", DOCUMENTS)
    path.write_bytes(path.read_bytes() + bytes(6))
    made = config(tmp_path, tokenizer_dir, [path], max_damaged_files=1, unit_mb=0.005)
    manifest = prepare(made, progress=False)
    assert manifest and manifest.parts[0].units["s"] > 1
    assert [line.partition(": ")[2] for line in manifest.sources[0].damaged] == [
        "it has 6 bytes after the last document of its index"
    ]
    assert manifest.sources[0].documents == 50


def test_sequences_of_no_document_are_an_error(tmp_path, tokenizer_dir):
    """A writer that ended no document after its last sequences."""
    path = write_megatron(tmp_path / "ids", DOCUMENTS, sentences=2)
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    (indices,) = struct.unpack_from("<Q", content, 26)
    struct.pack_into("<Q", content, 26, indices - 1)
    index.write_bytes(content[:-8])
    with pytest.raises(UserError, match="are sequences 0 to 98 of 100; the others are in no document"):
        prepare(config(tmp_path, tokenizer_dir, [path]), progress=False)


def test_sequences_with_a_gap_between_them_are_an_error(tmp_path, tokenizer_dir):
    """Otherwise every later document would have the ids that lie before its own."""
    path = write_megatron(tmp_path / "ids", DOCUMENTS)
    content = bytearray(path.with_suffix(".idx").read_bytes())
    pointer = 34 + 4 * len(DOCUMENTS) + 8 * 20  # of the 21st sequence
    struct.pack_into("<q", content, pointer, struct.unpack_from("<q", content, pointer)[0] + 2)
    path.with_suffix(".idx").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.idx is damaged: its sequences do not follow one another"):
        prepare(config(tmp_path, tokenizer_dir, [path]), progress=False)


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=8))
def test_a_stream_is_cut_after_every_end_and_nowhere_else(blocks):
    """No id is lost, also of a last document without an end."""
    records = ((np.array(block, np.int64), {}) for block in blocks)
    found = [ids.tolist() for ids, _ in tokens.split_at(records, frozenset([0, 4]))]
    assert [i for ids in found for i in ids] == [i for block in blocks for i in block]
    assert all(ids and not {0, 4}.intersection(ids[:-1]) for ids in found)
    assert all(ids[-1] in (0, 4) for ids in found[:-1])


@pytest.mark.parametrize("has_metadata", [True, False])
def test_a_datatrove_file_without_documents_has_none(tmp_path, tokenizer_dir, has_metadata):
    """As a task writes it that got no documents; the other files are read."""
    write_datatrove(tmp_path / "ids", DOCUMENTS)
    (tmp_path / "ids" / "001_x.ds").write_bytes(b"")
    (tmp_path / "ids" / "001_x.ds.index").write_bytes(b"")
    if has_metadata:
        (tmp_path / "ids" / "001_x.ds.metadata").write_text("gpt2|2\n0\n0.0 T")
    assert list(tokens.documents_in(str(tmp_path / "ids" / "001_x.ds"))) == []
    manifest = prepare(config(tmp_path, tokenizer_dir, [tmp_path / "ids"]), progress=False)
    assert manifest and manifest.sources[0].documents == 50 and not manifest.sources[0].damaged


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("block", [1 << 23, 1 << 8])
def test_a_document_that_is_too_long_is_not_read(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(tokens, "BLOCK_BYTES", block)
    rows = [[1] * 10, [2] * 3000, [3] * 20]
    path = str(WRITERS[name](tmp_path, rows))
    found = list(tokens._read_indexed(path, 0, -1, max_tokens=1000))
    assert found[1] is tokens.TOO_LONG_RECORD
    assert [found[i].tolist() for i in (0, 2)] == [rows[0], rows[2]]
    assert [ids.tolist() for ids in tokens._read_indexed(path, 0, -1)] == rows


@pytest.mark.parametrize("name", WRITERS)
def test_a_document_is_too_long_by_its_ids_or_by_its_text_and_is_counted(tmp_path, tokenizer, name):
    """Characters of several bytes count as such."""
    decoder = Decoder(tokenizing.spec_of(tokenizer), None, frozenset([tokenizer.eos_token_id]))
    fits, too_long = "the the the é本", "the the the é本!"  # 18 bytes and 19, in fewer ids
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (fits, too_long)]
    assert len(ids[1]) < len(fits.encode()) == len(too_long.encode()) - 1
    path = str(WRITERS[name](tmp_path, [*ids, [5] * 50, ids[0]]))
    tally = Tally()
    unit = Unit("s", 0, (InputFile(path, 0, ""),), 0, -1, 0)
    found = list(documents.read(unit, SourceConfig("s", [path]), tally, len(fits.encode()), decoder))
    assert [(document.text, document.ids.tolist()) for document in found] == [(fits, ids[0])] * 2
    assert tally.bad == {"longer than max_document_mb": 2}


def test_one_bos_and_one_eos_are_taken_off_and_others_are_of_the_document(tokenizer):
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    decoder = Decoder(tokenizing.spec_of(tokenizer), bos, frozenset([eos]))
    for ids, kept in (
        ([bos, bos, 5, eos, eos], [bos, 5, eos]),
        ([eos, 5, bos], [eos, 5, bos]),
        ([bos, eos], []),
        ([eos], []),
        ([], []),
    ):
        assert decoder.document(np.array(ids, np.int64), "here", 1000).ids.tolist() == kept


def test_special_tokens_among_ids_stay_and_are_counted(tmp_path, tokenizer_dir, tokenizer):
    """As many as in the texts; those at the ends are no part of the document."""
    eos, text = tokenizer.eos_token_id, f"one {tokenizer.eos_token} two " * 30
    ids = [[5, eos, 6, eos] * 50, [5, 6, eos] * 1, tokenizer.encode(text, split_special_tokens=True), [7] * 300]
    manifest = prepare(config(tmp_path / "i", tokenizer_dir, [write_megatron(tmp_path / "ids", ids)]), progress=False)
    assert manifest and manifest.sources[0].special_tokens == {tokenizer.eos_token: 2}
    texts = prepare(config(tmp_path / "t", tokenizer_dir, [write_jsonl(tmp_path / "a.jsonl", [text])]), progress=False)
    assert texts and texts.sources[0].special_tokens == {tokenizer.eos_token: 1}
    assert manifest.sources[0].tokens == sum(map(len, ids)) + np.sum([row[-1] != eos for row in ids])
