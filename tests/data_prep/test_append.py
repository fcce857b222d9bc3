"""A corpus that grows: what is there keeps its bytes, and the whole has the rows of a corpus made at once."""

from collections import Counter
from pathlib import Path

import pytest
from helpers import config, digest, write_jsonl

from common.config import save_config
from common.errors import UserError
from data_prep import append as module
from data_prep import merging, shards, verify
from data_prep.__main__ import main
from data_prep.append import append
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.prepare import prepare
from data_prep.repair import repair


@pytest.fixture
def made(tmp_path, tokenizer_dir, tales):
    """`made(out, **settings)`: a corpus of source `s` with one file; `b.jsonl` and `c.jsonl` wait to be added."""
    for name, texts in (("a", tales[:40]), ("b", tales[30:70]), ("c", tales[70:90] + tales[:5])):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)

    def make(out: str, names: str = "a", **more) -> PrepareConfig:
        paths = [tmp_path / f"{name}.jsonl" for name in names]
        return config(tmp_path / out, tokenizer_dir, paths, **{"validation_fraction": 0.2, "unit_mb": 0.01, **more})

    return make


def with_source(settings: PrepareConfig, name: str = "c") -> PrepareConfig:
    """The configuration with a second source."""
    folder = Path(settings.sources[0].paths[0]).parent
    settings.sources.append(SourceConfig("other", [str(folder / f"{name}.jsonl")], weight=2.0, max_epochs=3.0))
    return settings


def row_counts(out: Path) -> dict[tuple[str, str], Counter]:
    """Of each source and split, how often it has which row."""
    found = {}
    for source in shards.Manifest.load(out).sources:
        for split in shards.SPLITS:
            rows = shards.ShardedRows(out, getattr(source, split))
            found[source.name, split] = Counter(
                (ids.tobytes(), lengths.tobytes()) for ids, lengths in (rows.row(i) for i in range(len(rows)))
            )
    return found


@pytest.mark.parametrize("more", [{}, {"packing": "best_fit", "add_bos": True}, {"deduplicate": "exact"}], ids=str)
def test_appended_equals_made_together_and_what_was_there_keeps_its_bytes(made, more):
    """A file to a source, then a source; documents that a part before has are dropped where that is asked."""
    prepare(made("grown", "a", **more), progress=False)
    out = Path(made("grown").output_dir)
    before = digest(out)
    append(made("grown", "ab", **more), progress=False)
    append(with_source(made("grown", "ab", **more)), progress=False)
    after = digest(out)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: sha for name, sha in before.items() if name != "manifest.json"
    }
    together = with_source(made("together", "ab", **more))
    prepare(together, progress=False)
    assert row_counts(out) == row_counts(Path(together.output_dir))
    one, other = shards.Manifest.load(out), shards.Manifest.load(together.output_dir)
    for a, b in zip(one.sources, other.sources, strict=True):
        for key in (
            "name",
            "weight",
            "max_epochs",
            "documents",
            "characters",
            "bytes",
            "tokens",
            "filtered",
            "padding",
        ):
            assert getattr(a, key) == getattr(b, key), key
    assert [list(part.units) for part in one.parts] == [["s"], ["s"], ["other"]]
    assert not verify.check(out, contents=True) and not (out / ".work").exists()


def test_again_adds_nothing_and_a_part_of_the_sources_is_enough(made, caplog):
    caplog.set_level("INFO", "diffullama")
    whole = with_source(made("grown"))
    prepare(made("grown"), progress=False)
    only_new = made("grown")
    only_new.sources = whole.sources[1:]
    append(only_new, progress=False)
    out = digest(Path(whole.output_dir))
    for settings in (only_new, whole):
        append(settings, progress=False)
        assert digest(Path(whole.output_dir)) == out and "nothing is added" in caplog.messages[-1]
    assert prepare(whole, progress=False)


@pytest.mark.parametrize("more", [{}, {"deduplicate": "exact"}], ids=["all", "exact"])
def test_tasks_and_a_merge_give_the_bytes_of_one_process(made, tmp_path, more):
    for name in ("one", "tasks"):
        prepare(made(name, **more), progress=False)
    append(with_source(made("one", "ab", **more)), progress=False)
    settings = with_source(made("tasks", "ab", **more))
    if more:
        with pytest.raises(UserError, match="deduplicate needs all documents"):
            append(settings, progress=False, task=0, num_tasks=2)
        for task in (1, 0):
            module.hash_share(settings, False, task, 2)
        module.hash_share(settings, False, 0, 1)
    for task in (1, 0):
        assert append(settings, progress=False, task=task, num_tasks=2) is None
    save_config(settings, tmp_path / "c.yaml")
    assert main(["merge", str(tmp_path / "c.yaml")]) == 0
    assert digest(tmp_path / "tasks" / "out") == digest(tmp_path / "one" / "out")


@pytest.mark.parametrize("moment", ["make_units", "finish", "manifest"])
def test_an_interrupted_append_leaves_the_corpus_as_it_was_and_continues(made, monkeypatch, moment):
    prepare(made("whole"), progress=False)
    prepare(made("grown"), progress=False)
    append(with_source(made("whole", "ab")), progress=False)
    out = Path(made("grown").output_dir)
    before = (out / "manifest.json").read_bytes()

    def killed(*_, **__):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        if moment == "make_units":
            patched.setattr(module, "make_units", killed)
        elif moment == "finish":
            patched.setattr(merging.shards.Manifest, "save", killed)
        else:
            patched.setattr(merging, "warn_without_validation", killed)
        with pytest.raises(RuntimeError, match="killed"):
            append(with_source(made("grown", "ab")), progress=False)
    assert ((out / "manifest.json").read_bytes() == before) == (moment != "manifest")
    assert not verify.check(out, contents=True)
    append(with_source(made("grown", "ab")), progress=False)
    assert digest(out) == digest(Path(made("whole").output_dir))


def test_a_shard_of_any_part_is_repaired(made):
    prepare(made("grown"), progress=False)
    settings = with_source(made("grown", "ab"))
    append(settings, progress=False)
    out = Path(settings.output_dir)
    before = digest(out)
    for entry in shards.Manifest.load(out).sources:
        (out / entry.train[-1].file).unlink()
    repair(settings, progress=False)
    assert digest(out) == before


def test_the_corpus_comes_before_what_is_added_even_where_its_source_is_limited(made):
    """`a` ends with the ten documents that `b` begins with: those within a's max_tokens are dropped from b's."""
    settings = made("out", "a", deduplicate="exact", validation_fraction=0.0)
    settings.sources[0].max_tokens = 10**6  # a limit that all are within
    prepare(settings, progress=False)
    append(with_source(settings, "b"), progress=False)
    out = Path(settings.output_dir)
    limited, added = shards.Manifest.load(out).sources
    assert limited.documents == 40 and added.filtered == {"duplicate": 10} and added.documents == 30
    before = digest(out)
    (out / added.train[0].file).unlink()
    repair(settings, progress=False)
    assert digest(out) == before


def test_repair_drops_the_same_duplicates_although_an_earlier_source_has_them_too_by_now(made, tmp_path, tales):
    """Of equal documents that of the earlier part stays, even where the source it is in comes later."""
    write_jsonl(tmp_path / "d.jsonl", tales[75:110])  # 15 of them are in `other` already
    more = {"deduplicate": "exact", "num_workers": 1}
    prepare(with_source(made("grown", "a", **more)), progress=False)
    settings = with_source(made("grown", "ad", **more))
    manifest = append(settings, progress=False)
    out = Path(settings.output_dir)
    before = digest(out)
    assert manifest and manifest.sources[0].filtered == {"duplicate": 15}
    for entry in manifest.sources:
        (out / entry.train[-1].file).unlink()
    repair(settings, progress=False)
    assert digest(out) == before


def test_the_manifest_names_the_engines_of_every_part(made):
    """By which a repair knows whether the fast one made some of the shards."""
    more = {"engine": "tokenizers", "num_workers": 1}
    prepare(made("grown", "a", **more), progress=False)
    out = Path(made("grown").output_dir)
    manifest = shards.Manifest.load(out)
    now = manifest.tokenizer["engine"]
    manifest.tokenizer["engine"] = "gigatoken 0.1, imported"
    manifest.save(out)
    grown = append(made("grown", "ab", **more), progress=False)
    assert grown and grown.tokenizer["engine"] == f"gigatoken 0.1, imported, {now}"


def test_what_cannot_be_added_is_refused_and_nothing_changes(made, tales):
    with pytest.raises(UserError, match="no finished corpus to add to"):
        append(made("none"), progress=False)
    settings = made("grown")
    prepare(settings, progress=False)
    before = digest(Path(settings.output_dir))
    with pytest.raises(UserError, match="seq_len was 64 and is 32"):
        append(made("grown", "ab", seq_len=32), progress=False)
    write_jsonl(Path(settings.sources[0].paths[0]), tales[1:41])
    with pytest.raises(UserError, match=r"a\.jsonl was"):
        append(made("grown", "ab"), progress=False)
    assert digest(Path(settings.output_dir)) == before


def test_all_sources_are_needed_to_compare_what_is_added_with_all_of_the_corpus(made):
    prepare(made("grown", "a", deduplicate="exact", num_workers=1), progress=False)
    settings = with_source(made("grown", "a", deduplicate="exact", num_workers=1))
    settings.sources = settings.sources[1:]
    before = digest(Path(settings.output_dir))
    with pytest.raises(UserError, match=r"deduplicate: exact compares with all of .*: give its source s, too"):
        append(settings, progress=False)
    assert digest(Path(settings.output_dir)) == before


def test_a_source_that_ended_at_max_tokens_gets_no_files_and_others_do(made):
    def limited(names: str) -> PrepareConfig:
        settings = made("grown", names, num_workers=1)
        settings.sources[0].max_tokens = 3000
        return settings

    prepare(limited("a"), progress=False)
    with pytest.raises(UserError, match="source s ended at its max_tokens; add its new files as a source of another"):
        append(limited("ab"), progress=False)
    manifest = append(with_source(limited("a")), progress=False)
    assert manifest and manifest.sources[0].tokens <= 3000 and manifest.sources[1].tokens > 0


def test_what_was_begun_to_be_added_is_not_finished_by_another_configuration(made):
    """In other words: no part is made of two configurations."""
    prepare(made("grown", num_workers=1), progress=False)
    append(with_source(made("grown", "ab", num_workers=1)), progress=False, task=0, num_tasks=2)
    out = Path(made("grown").output_dir)
    before = {name: sha for name, sha in digest(out).items() if "lock" not in name}
    other_documents = with_source(made("grown", "ab"))
    other_documents.sources[1].min_characters = 50
    for settings in (other_documents, with_source(made("grown", "abc")), with_source(made("grown", "ab"), "b")):
        with pytest.raises(UserError, match="is being added to from other settings or files"):
            append(settings, progress=False)
    assert {name: sha for name, sha in digest(out).items() if "lock" not in name} == before
    assert append(with_source(made("grown", "ab", num_workers=1)), progress=False)
