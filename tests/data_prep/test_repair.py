"""Bad shards are made again to the bytes that the manifest says, from the same inputs, or nothing is touched."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, digest, write_jsonl

from common.config import save_config
from common.errors import UserError
from data_prep import engines, shards, verify, work_list, worker
from data_prep import repair as repairing
from data_prep.__main__ import main
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.deduplication import deduplicate
from data_prep.prepare import merge, prepare
from data_prep.repair import repair

SETTINGS = {
    "best_fit": {"packing": "best_fit"},
    "concat": {"packing": "concat", "shard_mb": 1},
    "without duplicates": {"packing": "concat", "deduplicate": "exact"},
}


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(8))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit of a token id, in a file of the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_config(folder: Path, tokenizer_dir: Path, texts: list[str], **settings) -> PrepareConfig:
    """Two sources of several units; the second repeats documents of the first."""
    folder.mkdir(exist_ok=True)
    parts = {"a": texts[:120], "b": texts[100:200] + texts[:20]}
    sources = []
    for name, part in parts.items():
        (folder / name).mkdir()
        for number in range(3):
            write_jsonl(folder / name / f"{number}.jsonl", part[number::3])
        sources.append(SourceConfig(name, [str(folder / name)]))
    return PrepareConfig(
        sources, str(tokenizer_dir), output_dir=str(folder / "out"),
        **{"seq_len": 64, "unit_mb": 0.02, "num_workers": 1, "validation_fraction": 0.2, **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_dir, tales):
    """`made(name, folder)`: a copy in `folder` of a finished corpus with SETTINGS[name], and its configuration."""
    root = tmp_path_factory.mktemp("made")
    configs: dict[str, PrepareConfig] = {}

    def make(name: str, folder: Path) -> PrepareConfig:
        if name not in configs:
            configs[name] = make_config(root / name, tokenizer_dir, tales, **SETTINGS[name])
            prepare(configs[name], progress=False)
        shutil.copytree(root / name, folder, dirs_exist_ok=True)
        return moved(configs[name], folder)

    return make


def moved(config: PrepareConfig, folder: Path) -> PrepareConfig:
    sources = [SourceConfig(source.name, [str(folder / source.name)]) for source in config.sources]
    return PrepareConfig(**{**vars(config), "sources": sources, "output_dir": str(folder / "out")})


def shard_paths(config: PrepareConfig, split: str = "*") -> list[Path]:
    return sorted(Path(config.output_dir).glob(f"*/{split}-*.arrow"))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("harm", [delete, truncate, empty, flip])
def test_bad_shards_get_their_bytes_again(made, tmp_path, name, harm):
    """Those of training and validation, in several units of both sources; every file of the folder is as before."""
    config = made(name, tmp_path)
    out = Path(config.output_dir)
    expected = digest(out)
    bad = [shard_paths(config, "train")[1], shard_paths(config, "train")[-1], shard_paths(config, "validation")[-1]]
    assert {path.parent.name for path in bad} == {"a", "b"}
    for path in bad:
        harm(path)
    assert verify.check(out)
    found = repair(config, progress=False)
    assert digest(out) == expected
    assert found.is_finished
    assert {(unit.source, unit.index) for unit in found.units} == {
        (path.parent.name, shards.unit_of(path.name)) for path in bad
    }
    for path in bad:
        assert any(str(path) in problem for problem in found.problems)
    assert not repair(config, progress=False).problems
    assert not list(out.glob(".*"))


def test_a_deleted_folder_of_a_source_comes_again_with_two_processes(made, tmp_path):
    config = made("without duplicates", tmp_path)
    expected = digest(Path(config.output_dir))
    shutil.rmtree(Path(config.output_dir) / "b")
    repair(PrepareConfig(**{**vars(config), "num_workers": 2}), progress=False)
    assert digest(Path(config.output_dir)) == expected


def test_a_good_corpus_is_left_alone(made, tmp_path):
    """Also the files in it that are no part of it, and the times of its files."""
    config = made("concat", tmp_path)
    out = Path(config.output_dir)
    (out / "a" / "train-00000-009.arrow").write_bytes(b"stale")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert repair(config, progress=False) == repairing.Found(True, [], [])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("harm", [delete, truncate, flip])
@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_units_of_an_unfinished_corpus_are_forgotten_and_made_again(tmp_path, tokenizer_dir, tales, harm, dedup):
    """Between the tasks and merge: merge does not write a manifest of what is not there."""
    whole = make_config(tmp_path / "whole", tokenizer_dir, tales, deduplicate=dedup)
    prepare(whole, progress=False)
    config = make_config(tmp_path / "parts", tokenizer_dir, tales, deduplicate=dedup)
    deduplicate(config, progress=False)
    for task in range(2):
        prepare(config, progress=False, task=task, num_tasks=2)
    bad = [shard_paths(config, "train")[2], shard_paths(config, "validation")[0]]
    for path in bad:
        harm(path)
    if harm is not flip:  # which takes reading all
        with pytest.raises(UserError, match=r"(missing|bytes).*data_prep repair CONFIG") as error:
            merge(config)
        assert any(str(path) in str(error.value) for path in bad)
        assert not (Path(config.output_dir) / "manifest.json").exists()
    (Path(config.output_dir) / ".work" / "b-00001.json").write_text('{"train": [')
    found = repair(config, dry_run=True, progress=False)
    again = repair(config, progress=False)
    assert found == again
    assert not again.is_finished
    expected = {(path.parent.name, shards.unit_of(path.name)) for path in bad} | {("b", 1)}
    assert {(unit.source, unit.index) for unit in again.units} == expected
    assert len(again.problems) == 3
    with pytest.raises(UserError, match=r"units are not made yet"):
        merge(config)
    for task in range(2):
        prepare(config, progress=False, task=task, num_tasks=2)
    merge(config)
    mine, others = digest(Path(config.output_dir)), digest(Path(whole.output_dir))
    assert {name: mine[name] for name in mine if name.endswith((".arrow", "manifest.json"))} == {
        name: others[name] for name in others if name.endswith((".arrow", "manifest.json"))
    }


@pytest.mark.parametrize("harm", [delete, truncate, lengthen])
def test_prepare_and_merge_see_that_a_finished_corpus_is_not_whole(made, tmp_path, harm):
    config = made("concat", tmp_path)
    path = shard_paths(config)[1]
    harm(path)
    for verb in (lambda: prepare(config, progress=False), lambda: merge(config)):
        with pytest.raises(UserError, match=r"run `python -m data_prep repair CONFIG`") as error:
            verb()
        assert str(path) in str(error.value)


def test_prepare_in_one_process_sees_a_shard_that_was_deleted_before_its_end(tmp_path, tokenizer_dir, tales):
    config = make_config(tmp_path / "c", tokenizer_dir, tales)
    for task in range(2):
        prepare(config, progress=False, task=task, num_tasks=2)
    shard_paths(config)[0].unlink()
    with pytest.raises(UserError, match=r"is missing; run `python -m data_prep repair CONFIG`"):
        prepare(config, progress=False)


def test_changed_inputs_are_refused_and_nothing_is_replaced(made, tmp_path):
    """Of the same size, with and without another time: the checksums decide. Units of other files are repaired."""
    config = made("concat", tmp_path)
    out = Path(config.output_dir)
    expected = digest(out)
    first, last = shard_paths(config, "train")[0], shard_paths(config, "train")[-1]
    first.unlink()
    last.unlink()
    changed = tmp_path / "a" / "0.jsonl"
    content = changed.read_bytes()
    about = changed.stat()
    changed.write_bytes(content.replace(b"the", b"THE"))
    for keep_time in (False, True):
        if keep_time:
            os.utime(changed, ns=(about.st_atime_ns, about.st_mtime_ns))
        with pytest.raises(UserError, match=r"a unit 0 .*hold something else now.*a/0\.jsonl"):
            repair(config, progress=False)
        missing = {str(first.relative_to(out))}
        assert digest(out) == {name: value for name, value in expected.items() if name not in missing}
    changed.write_bytes(content)
    repair(config, progress=False)
    assert digest(out) == expected


@pytest.mark.parametrize("harm", [delete, truncate])
def test_inputs_that_are_gone_or_have_another_size_are_refused(made, tmp_path, harm):
    config = made("concat", tmp_path)
    out = Path(config.output_dir)
    shard_paths(config, "train")[0].unlink()
    before = digest(out)
    harm(tmp_path / "a" / "0.jsonl")
    with pytest.raises(UserError, match=r"a/0\.jsonl (is gone|has \d+ bytes now),.*as they were"):
        repair(config, progress=False)
    assert digest(out) == before


def test_a_file_of_the_corpus_does_not_stand_in_for_another_one(tmp_path, tokenizer_dir, tales):
    """One that is gone is named, although another folder has a file of its name and size."""
    for folder, texts in (("a", tales[:30]), ("b", tales[29::-1])):
        (tmp_path / "in" / folder).mkdir(parents=True)
        write_jsonl(tmp_path / "in" / folder / "x.jsonl", texts)
    source = SourceConfig("s", [str(tmp_path / "in")])
    config = PrepareConfig(
        [source], str(tokenizer_dir), seq_len=64, output_dir=str(tmp_path / "out"), num_workers=1, engine="tokenizers"
    )
    prepare(config, progress=False)
    shard_paths(config)[0].unlink()
    (tmp_path / "in" / "a" / "x.jsonl").unlink()
    with pytest.raises(UserError, match=r"in/a/x\.jsonl is gone, and the paths of source s name no other file"):
        repair(config, progress=False)


def test_inputs_with_other_times_or_in_another_folder_will_do(made, tmp_path):
    """A copy of the corpus and its inputs, whose old place is no more, repairs as the first one did."""
    config = made("without duplicates", tmp_path / "one")
    for path in (tmp_path / "one").glob("?/*.jsonl"):
        os.utime(path, ns=(1, 1))
    expected = digest(Path(config.output_dir))
    shard_paths(config)[0].unlink()
    repair(config, progress=False)
    assert digest(Path(config.output_dir)) == expected
    shutil.move(tmp_path / "one", tmp_path / "two")
    config = moved(config, tmp_path / "two")
    flip(shard_paths(config)[3])
    repair(config, progress=False)
    assert digest(Path(config.output_dir)) == expected


def test_inputs_at_their_old_place(tmp_path, tokenizer_dir, tales):
    """Written again with the same content, or as another file of the same name elsewhere in the paths."""
    config = make_config(tmp_path, tokenizer_dir, tales)
    prepare(config, progress=False)
    expected = digest(Path(config.output_dir))
    path = shard_paths(config, "train")[0]
    file = tmp_path / "a" / "0.jsonl"
    content = file.read_bytes()
    os.utime(file, ns=(1, 1))
    path.unlink()
    repair(config, progress=False)
    assert digest(Path(config.output_dir)) == expected
    path.unlink()
    file.write_bytes(content + b"\n")
    with pytest.raises(UserError, match=rf"a/0\.jsonl has {len(content) + 1} bytes now, it had {len(content)},"):
        repair(config, progress=False)
    (tmp_path / "a" / "deeper").mkdir()
    (tmp_path / "a" / "deeper" / "0.jsonl").write_bytes(content)
    repair(config, progress=False)
    assert digest(Path(config.output_dir)) == expected


def test_a_unit_of_a_later_part_is_found(made, tmp_path):
    """A corpus that grew has several lists of inputs, through which the units of a source are numbered on."""
    config = made("concat", tmp_path)
    out = Path(config.output_dir)
    whole = work_list.load(out / "inputs" / "000.json")
    halves = slice(0, 2), slice(2, None)
    for number, half in enumerate(halves):
        sources = [replace(source, units=source.units[half]) for source in whole.sources]
        replace(whole, sources=sources).save(out / "inputs" / f"{number:03d}.json")
    manifest = shards.Manifest.load(out)
    manifest.parts = [replace(manifest.parts[0], inputs=f"inputs/{number:03d}.json") for number in (0, 1)]
    manifest.save(out)
    expected = digest(out)
    for path in (shard_paths(config, "train")[0], shard_paths(config, "train")[-1]):
        path.unlink()
    repair(config, progress=False)
    assert digest(out) == expected


def test_the_reference_makes_what_the_reference_made(made, tmp_path, monkeypatch):
    """The manifest names it alone where the fast engine gave other ids."""
    config = made("concat", tmp_path)
    out = Path(config.output_dir)
    manifest = shards.Manifest.load(out)
    manifest.tokenizer["engine"] = "tokenizers 0.1"
    manifest.save(out)
    expected = digest(out)
    shard_paths(config)[0].unlink()
    monkeypatch.setattr(engines, "Gigatoken", SimpleNamespace(name="gigatoken"))
    repair(config, progress=False)
    assert digest(out) == expected


def test_other_shards_from_the_same_inputs_point_to_the_libraries(made, tmp_path):
    """As when pyarrow writes other bytes than the version that made the corpus."""
    config = made("concat", tmp_path)
    out = Path(config.output_dir)
    manifest = shards.Manifest.load(out)
    manifest.sources[0].train[0].sha256 = "0" * 64
    manifest.save(out)
    before = digest(out)
    with pytest.raises(UserError, match=r"times are the same.*another version of a library.*restore"):
        repair(config, progress=False)
    assert digest(out) == before


def test_a_repair_that_fails_in_the_middle_leaves_what_it_has_and_continues(made, tmp_path, monkeypatch):
    config = made("best_fit", tmp_path)
    out = Path(config.output_dir)
    expected = digest(out)
    bad = shard_paths(config, "train")[:4]
    for path in bad:
        flip(path)
    harmed = digest(out)
    made_again = []
    process_unit = worker.process_unit

    def fail(unit, *arguments):
        if len(made_again) == 2:
            raise OSError(28, "No space left on device")
        made_again.append(unit)
        return process_unit(unit, *arguments)

    monkeypatch.setattr(worker, "process_unit", fail)
    with pytest.raises(OSError, match="No space"):
        repair(config, progress=False)
    found = digest(out)
    assert found.keys() == expected.keys()
    assert all(found[name] in (expected[name], harmed[name]) for name in expected)
    monkeypatch.undo()
    left = repair(config, progress=False)
    assert len(left.units) < 4
    assert digest(out) == expected


@pytest.mark.slow
def test_a_killed_repair_leaves_the_corpus_no_worse_and_a_rerun_repairs(made, tmp_path):
    """kill -9 when it has begun to make units; what it left is removed by the next."""
    config = made("without duplicates", tmp_path)
    save_config(config, tmp_path / "config.yaml")
    out = Path(config.output_dir)
    expected = digest(out)
    for path in shard_paths(config):
        truncate(path)
    harmed = digest(out)
    command = [sys.executable, "-m", "data_prep", "repair", str(tmp_path / "config.yaml")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob(".repair/*/*.arrow*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
    found = digest(out)
    assert all(found[name] in (expected[name], harmed[name]) for name in expected)
    outcome = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=240)
    assert outcome.returncode == 0, outcome.stderr
    assert digest(out) == expected


def test_other_settings_are_refused(made, tmp_path):
    config = made("concat", tmp_path)
    shard_paths(config)[0].unlink()
    before = digest(Path(config.output_dir))
    with pytest.raises(UserError, match=r"other settings \(seq_len was 64 and is 32\)"):
        repair(PrepareConfig(**{**vars(config), "seq_len": 32}), progress=False)
    with pytest.raises(UserError, match=r"source b is not there any more"):
        repair(PrepareConfig(**{**vars(config), "sources": config.sources[:1]}), progress=False)
    assert digest(Path(config.output_dir)) == before


def test_mixture_weights_of_the_configuration_change_nothing(made, tmp_path):
    config = made("concat", tmp_path)
    expected = digest(Path(config.output_dir))
    shard_paths(config)[0].unlink()
    config.sources[0].weight = 5.0
    repair(config, progress=False)
    assert digest(Path(config.output_dir)) == expected


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"format": "diffullama-shards", "version": 2}', b"\xff"])
@pytest.mark.parametrize("file", ["manifest.json", "inputs/000.json"])
def test_without_a_readable_manifest_or_list_of_inputs_it_says_so(made, tmp_path, file, content):
    config = made("concat", tmp_path)
    path = Path(config.output_dir) / file
    path.unlink() if content is None else path.write_bytes(content)
    before = digest(Path(config.output_dir))
    with pytest.raises(UserError, match=file):
        repair(config, progress=False)
    assert digest(Path(config.output_dir)) == before


def test_a_manifest_that_kept_no_list_of_its_inputs_is_told_apart(made, tmp_path):
    """As of an earlier version, and of a rechunked corpus."""
    config = made("concat", tmp_path)
    out = Path(config.output_dir)
    manifest = shards.Manifest.load(out)
    manifest.parts = []
    manifest.save(out)
    assert not repair(config, progress=False).problems
    shard_paths(config)[0].unlink()
    with pytest.raises(UserError, match="kept no list of its inputs"):
        repair(config, progress=False)


def test_a_manifest_that_contradicts_itself_is_no_measure_of_shards(made, tmp_path):
    config = made("concat", tmp_path)
    out = Path(config.output_dir)
    manifest = shards.Manifest.load(out)
    manifest.sources[0].tokens += 1
    manifest.save(out)
    shard_paths(config)[0].unlink()
    before = digest(out)
    with pytest.raises(UserError, match=r"manifest\.json itself is wrong; restore it"):
        repair(config, progress=False)
    assert digest(out) == before


def test_two_processes_do_not_repair_at_once(made, tmp_path):
    config = made("concat", tmp_path)
    with repairing.lock(Path(config.output_dir), 0, 1), pytest.raises(UserError, match="another process"):
        repair(config, progress=False)


def test_on_the_command_line(made, tmp_path, capsys):
    """It names what is bad and what it made; exit codes: 0 when all is well at the end, 1 for what a dry run finds."""
    config = made("concat", tmp_path)
    save_config(config, tmp_path / "config.yaml")
    out = Path(config.output_dir)
    expected = digest(out)
    arguments = ["repair", str(tmp_path / "config.yaml"), "num_workers=1"]
    assert main(arguments) == 0
    assert "nothing to repair" in capsys.readouterr().out
    path = shard_paths(config, "validation")[-1]
    flip(path)
    harmed = digest(out)
    assert main([*arguments, "--dry_run"]) == 1
    assert digest(out) == harmed
    name = f"units {path.parent.name} {shards.unit_of(path.name)}"
    printed = capsys.readouterr().out
    assert f"to be made again: {name}" in printed
    assert f"{path}: sha256" in printed
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"repaired {path}" in printed
    assert f"repaired, by making again {name};" in printed
    assert digest(out) == expected
    path.unlink()
    assert main(["prepare", str(tmp_path / "config.yaml")]) == 2
    assert f"{path} is missing" in capsys.readouterr().err
