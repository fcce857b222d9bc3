"""Very long documents are read and tokenized in parts, which changes neither their ids nor their rows."""

import gzip
import subprocess
import sys

import pytest
from corpora import varied_documents
from helpers import ROOT, SHARED, config, digest, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import save_config
from data_prep import cutting, tokenizing, unit_builder
from data_prep.inputs import document, text
from data_prep.prepare import prepare


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl"])
def test_a_document_read_and_tokenized_in_parts_gives_the_same_bytes(
    tokenizer_dir, tales, tmp_path, monkeypatch, packing, kind
):
    path = tmp_path / f"book.{kind}"
    book = "\n\n".join([*tales[:40], *varied_documents(40_000, seed=1)])
    if kind == "jsonl":
        write_jsonl(path, [tales[70], book, tales[71], *tales[72:80]])
    else:
        path.write_bytes(book.encode() if kind == "txt" else gzip.compress(book.encode()))

    def made(name: str) -> dict[str, str]:
        settings = config(tmp_path / name, tokenizer_dir, [path], num_workers=1, packing=packing, add_bos=True)
        prepare(settings, progress=False)
        return digest(tmp_path / name / "out")

    whole = made("whole")
    monkeypatch.setattr(text, "LONG_FILE_BYTES", 5_000)
    for module in (text, document):
        monkeypatch.setattr(module, "BLOCK_BYTES", 999)
    monkeypatch.setattr(unit_builder, "LONG_CHARACTERS", 5_000)
    monkeypatch.setattr(unit_builder, "BATCH_CHARACTERS", 1_000)
    parts = []
    inner = cutting.cut_text
    monkeypatch.setattr(cutting, "cut_text", lambda *a: parts.append(list(inner(*a))) or iter(parts[-1]))
    assert made("parts") == whole
    assert len(parts[-1]) > 30 and max(map(len, parts[-1])) < 3_000


def test_a_long_document_is_held_out_by_its_text_as_a_short_one_is(tokenizer_dir, tales, tmp_path, monkeypatch):
    paths = [write_jsonl(tmp_path / "a.jsonl", tales[:20])]
    for number, tale in enumerate(tales[20:40]):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(tale, encoding="utf-8")
    found = []
    for name in ("short", "long"):
        made = config(tmp_path / name, tokenizer_dir, paths, num_workers=1, validation_fraction=0.4)
        assert prepare(made, progress=False).sources[0].validation
        found.append(digest(tmp_path / name / "out"))
        monkeypatch.setattr(text, "LONG_FILE_BYTES", 50)
        monkeypatch.setattr(unit_builder, "LONG_CHARACTERS", 50)
    assert found[0] == found[1]


def test_a_long_file_that_is_not_utf8_is_counted_as_bad(tokenizer_dir, tales, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONG_FILE_BYTES", 5_000)
    (tmp_path / "good.txt").write_text("\n".join(tales[:30]))
    (tmp_path / "bad.txt").write_bytes("\n".join(tales[:30]).encode() + b"\xff")
    (tmp_path / "cut.txt").write_bytes("\n".join(tales[:30]).encode() + "é".encode()[:1])
    settings = config(
        tmp_path, tokenizer_dir, [tmp_path / f"{n}.txt" for n in ("good", "bad", "cut")], max_bad_fraction=0.9,
        num_workers=1,
    )  # fmt: skip
    assert prepare(settings, progress=False).sources[0].bad == {"not UTF-8": 2}


TOKENIZERS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not SHARED.exists(), reason="the real tokenizers are not in ../shared"),
        ],
    )
    for name in ("gpt2", "llama2")
]


@pytest.mark.parametrize("name", ["small", *TOKENIZERS])
def test_a_text_cut_in_parts_has_the_ids_of_the_whole(name, tokenizer_dir, tales):
    folder = tokenizer_dir if name == "small" else SHARED / "data" / "tokenizers" / name
    spec = tokenizing.spec_of(tokenizing.load_tokenizer(str(folder)))
    pattern = cutting.find_cut_pattern(spec)
    reference = tokenizing.Reference(spec)
    assert pattern is not None
    documents = [*tales, *varied_documents(100_000, seed=2)]
    pieces = st.one_of(
        st.sampled_from(documents).map(lambda t: t[:400]), st.sampled_from(tokenizing.adversarial_texts(spec, 300))
    )
    texts = st.lists(pieces, max_size=8).map("\n".join).map(lambda t: t[:3_000])

    @settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
    @given(texts, st.integers(1, 200), st.integers(1, 50))
    def check(text, size, block):
        blocks = (text[i : i + block] for i in range(0, len(text), block))
        parts = list(cutting.cut_text(blocks, pattern, size))
        assert all(len(part) >= size for part in parts[:-1])
        assert reference.encode(parts)[0].tolist() == reference.encode([text])[0].tolist()

    check()


def test_texts_stay_whole_for_a_tokenizer_with_tokens_across_words(tokenizer):
    tokenizer = tokenizing.load_tokenizer(tokenizer.name_or_path)
    tokenizer.add_tokens(["new\nline", "a space"])
    assert cutting.find_cut_pattern(tokenizing.spec_of(tokenizer)) is None
    assert list(cutting.cut_text(iter(["a b\nc", "d e"]), None, 2)) == ["a b\ncd e"]


PEAK = """
import sys
from data_prep.__main__ import main
assert main(["prepare", sys.argv[1]]) == 0
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_document(tokenizer_dir, tales, tmp_path):
    """A text file of 250 MB peaks like one of 100 MB; its whole text and ids would take 600 MB more."""
    peaks = []
    for megabytes in (100, 250):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        story = "\n".join(tales[:100])
        with open(folder / "long.txt", "w") as file:
            for _ in range(megabytes * 10**6 // len(story)):
                file.write(story)
        save_config(
            config(folder, tokenizer_dir, [folder / "long.txt"], num_workers=1, seq_len=512), folder / "config.yaml"
        )
        command = [sys.executable, "-c", PEAK, str(folder / "config.yaml")]
        outcome = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=300)
        assert outcome.returncode == 0, outcome.stderr
        peaks.append(int(outcome.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 75, peaks
