import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap

from tools.compare import main
from tools.evaluation.comparison import compare, labels, paired_interval, read_evaluations
from tools.evaluation.published import FAULTS, TABLE_1, TASKS


def write(folder: Path, tasks: dict[str, list[float]], metric: str = "accuracy", ids=None, docs=None, **about) -> Path:
    """Results as an evaluation writes them: the examples' scores of each task."""
    (folder / "samples").mkdir(parents=True)
    content: dict = {"model": f"models/{folder.name}", "kind": "masked_diffusion", "seed": 0, "settings": {}, **about}
    content["tasks"] = {}
    for task, scores in tasks.items():
        content["tasks"][task] = {
            metric: float(np.mean(scores)), "stderr": float(np.std(scores) / len(scores) ** 0.5), "n": len(scores),
            "metric": metric,
        }  # fmt: skip
        lines = [
            {"doc_id": number, "doc": {"text": doc}, "target": "", "answers": [], "metrics": {metric: score}}
            for number, doc, score in zip(ids or range(len(scores)), docs or map(str, range(len(scores))), scores)
        ]
        path = folder / "samples" / f"{task}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def run(tmp_path: Path, *folders: Path, flags: tuple[str, ...] = ()) -> tuple[int, Path]:
    output = tmp_path / "compared"
    return main([*map(str, folders), "--output", str(output), "--resamples", "500", *flags]), output


def one_error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def hits(seed: int, n: int = 60, share: float = 0.5) -> list[float]:
    return (np.random.default_rng(seed).random(n) < share).astype(float).tolist()


def test_two_equal_models_differ_by_nothing(tmp_path, capsys):
    a, b = (write(tmp_path / name, {"piqa": hits(0)}) for name in "ab")
    assert run(tmp_path, a, b)[0] == 0
    [difference] = compare(read_evaluations([a, b]), 500, 0).differences
    assert (difference.value, difference.low, difference.high, difference.verdict) == (0, 0, 0, "")
    assert "better" not in capsys.readouterr().out.replace("lower is better", "")


def test_the_difference_is_that_of_the_means_and_a_seed_gives_one_interval(tmp_path):
    first, later = hits(0, share=0.3), hits(1, share=0.8)
    folders = [write(tmp_path / name, {"piqa": scores}) for name, scores in zip("ab", (first, later))]
    found = [compare(read_evaluations(folders), 500, seed).differences[0] for seed in (3, 3, 4)]
    assert found[0] == found[1] and (found[0].low, found[0].high) != (found[2].low, found[2].high)
    assert found[0].value == pytest.approx(np.mean(later) - np.mean(first))
    assert found[0].verdict == "better" and found[0].low < found[0].value < found[0].high


@pytest.mark.parametrize(("metric", "verdict"), [("nelbo", "better"), ("perplexity", "better"), ("accuracy", "worse")])
def test_a_loss_is_better_when_it_is_lower(metric, verdict, tmp_path):
    a, b = (write(tmp_path / name, {"t": [x + s for x in hits(0)]}, metric) for name, s in (("a", 0.5), ("b", 0.2)))
    assert compare(read_evaluations([a, b]), 500, 0).differences[0].verdict == verdict


def test_intervals_cover_a_known_difference_as_often_as_they_say():
    """Scores of two models that share the examples' difficulty; the true difference is 0.3."""
    rng = np.random.default_rng(0)
    n, trials = 60, 300
    covered = 0
    for _ in range(trials):
        difficulty = rng.normal(size=n)
        first, later = difficulty + rng.normal(size=n), difficulty + 0.3 + rng.normal(size=n)
        _, low, high = paired_interval(first, later, np.ones(n), np.ones(n), 400, rng)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / trials <= 0.98  # 0.95 with a binomial's 3 standard errors, and few examples


def test_pairing_narrows_the_interval_of_correlated_scores():
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    later = first + 0.1 * rng.normal(size=200)
    _, low, high = paired_interval(first, later, np.ones(200), np.ones(200), 1000, rng)
    unpaired = bootstrap(
        (later, first), lambda b, a, axis: b.mean(axis) - a.mean(axis), vectorized=True, n_resamples=1000, rng=rng
    ).confidence_interval
    assert high - low < 0.2 * (unpaired.high - unpaired.low)


def test_weights_are_those_of_the_means(tmp_path):
    """Rows with different numbers of tokens: the difference is of the means a token."""
    rng = np.random.default_rng(0)
    first, later, weights = rng.normal(size=50), rng.normal(size=50), rng.integers(1, 30, 50).astype(float)
    value, low, high = paired_interval(first, later, weights, weights, 1000, rng)
    assert value == pytest.approx(np.average(later, weights=weights) - np.average(first, weights=weights))
    assert low < value < high
    for name, scores in (("a", first), ("b", later)):
        folder = write(tmp_path / name, {"t": scores.tolist()}, "nelbo")
        path = folder / "samples/t.jsonl"
        lines = [json.loads(line) | {"weight": w} for line, w in zip(path.read_text().splitlines(), weights)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(read_evaluations([tmp_path / "a", tmp_path / "b"]), 500, 0).differences[0]
    assert found.value == pytest.approx(value)


def test_only_common_examples_are_compared_and_the_others_are_counted(tmp_path, capsys):
    a = write(tmp_path / "a", {"piqa": hits(0, 40)}, ids=range(40), docs=[f"d{i}" for i in range(40)])
    b = write(tmp_path / "b", {"piqa": hits(1, 30)}, ids=range(20, 50), docs=[f"d{i}" for i in range(20, 50)])
    assert run(tmp_path, a, b)[0] == 0
    [d] = compare(read_evaluations([a, b]), 500, 0).differences
    assert (d.n, d.only_first, d.only_later) == (20, 20, 10)
    assert d.value == pytest.approx(np.mean(hits(1, 30)[:20]) - np.mean(hits(0, 40)[20:]))
    assert "20 of a and 10 of b are left out" in " ".join(capsys.readouterr().out.split())


def test_other_data_under_the_same_ids_are_refused(tmp_path, capsys):
    a = write(tmp_path / "a", {"piqa": hits(0, 3)})
    b = write(tmp_path / "b", {"piqa": hits(0, 3)}, docs=["0", "another", "2"])
    code, output = run(tmp_path, a, b)
    error = one_error(capsys)
    assert code == 2 and "b/samples/piqa.jsonl: doc_id 1" in error and "not the same data" in error
    assert not list(output.glob("*"))


def test_what_cannot_be_compared_is_said(tmp_path):
    a = write(tmp_path / "a", {"piqa": hits(0), "lambada": hits(1), "siqa": hits(2)})
    b = write(tmp_path / "b", {"piqa": hits(0), "siqa": hits(2)}, settings={"num_fewshot": 5})
    c = write(tmp_path / "c", {"hellaswag": hits(0)})
    d = write(tmp_path / "d", {"piqa": hits(0)}, metric="accuracy_norm")
    content = json.loads((b / "results.json").read_text())
    content["tasks"]["piqa"]["note"] = "a faulty variant"
    (b / "results.json").write_text(json.dumps(content))
    (b / "samples/siqa.jsonl").unlink()
    comparison = compare(read_evaluations([a, b, c, d]), 500, 0)
    notes = "\n".join(comparison.notes)
    assert [(x.task, x.later) for x in comparison.differences] == [("piqa", "b")]
    for expected in (
        "c has no task in common with a", "siqa.jsonl is missing", "piqa of b: a faulty variant",
        "piqa: d has no accuracy,", "piqa: a has no accuracy_norm,", "settings.num_fewshot: None and 5",
    ):  # fmt: skip
        assert expected in notes


def test_bad_folders_are_one_line_errors(tmp_path, capsys):
    good = write(tmp_path / "good", {"piqa": hits(0)})
    (tmp_path / "empty").mkdir()
    other = write(tmp_path / "other", {"siqa": hits(0)})
    torn = write(tmp_path / "torn", {"piqa": hits(0)})
    text = (torn / "samples/piqa.jsonl").read_text()
    (torn / "samples/piqa.jsonl").write_text(text[:-20])
    twice = write(tmp_path / "twice", {"piqa": hits(0, 2)}, ids=[1, 1])
    damaged, no_metric, outside = (write(tmp_path / name, {"piqa": hits(0)}) for name in ("damaged", "no", "outside"))
    (damaged / "results.json").write_text('{"tasks": ')
    (no_metric / "results.json").write_text(json.dumps({"tasks": {"piqa": {"accuracy": 0.5}}}))
    both = {"tasks": {"../../x": {"accuracy": 0.5, "metric": "accuracy"}}}
    (outside / "results.json").write_text(json.dumps(both))
    for folders, expected in (
        ([tmp_path / "missing"], "cannot be read (No such file or directory); expected a finished"),
        ([tmp_path / "empty"], "cannot be read (No such file or directory); expected a finished"),
        ([good, other], "no model has a task in common"),
        ([good, torn], "samples/piqa.jsonl:60: expected JSON"),
        ([twice, good], "stands there twice"),
        ([good, damaged], "results.json is damaged"),
        ([no_metric], "does not say which `metric`"),
        ([outside, outside], "no name of a file"),
    ):
        assert run(tmp_path, *folders)[0] == 2 and expected in one_error(capsys)
    assert run(tmp_path, good, flags=("--resamples", "0"))[0] == 2 and "--resamples is 0" in one_error(capsys)
    assert run(tmp_path, good, flags=("--seed", "-1"))[0] == 2 and "--seed is -1" in one_error(capsys)


def test_folders_of_the_same_name_are_told_apart():
    paths = [Path("/x/a/results"), Path("/x/b/results"), Path("/x/c"), Path("/x/c")]
    assert labels(paths) == ["a/results", "b/results", "c", "c (2)"]


def test_files_of_others_stay_and_its_own_are_written_again(tmp_path, capsys):
    a = write(tmp_path / "a", {"piqa": hits(0)})
    code, output = run(tmp_path, a)
    before = (output / "compare.html").read_text()
    assert code == 0 and run(tmp_path, a)[0] == 0 and (output / "compare.html").read_text() == before
    (output / "compare.md").write_text("notes of my own")
    capsys.readouterr()
    assert run(tmp_path, a)[0] == 2 and "choose another --output" in one_error(capsys)
    assert (output / "compare.md").read_text() == "notes of my own"
    (tmp_path / "file").write_text("")
    for output, expected in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "x", "cannot be made")):
        assert main([str(a), "--output", str(output)]) == 2 and expected in one_error(capsys)


class Tags(HTMLParser):
    """The names of all tags, and every address that a browser would ask for."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data", "action")]


def test_pages_escape_all_text_and_need_no_other_file(tmp_path):
    evil = "<script>alert(1)</script>"
    name = "<b>a|b"
    a = write(tmp_path / name, {"<i>t": hits(0)}, model=evil)
    b = write(tmp_path / "b", {"<i>t": hits(1, share=0.9)}, settings={evil: '"<img src=http://x>'})
    code, output = run(tmp_path, a, b, flags=("--paper",))
    assert code == 0
    page = (output / "compare.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not {"script", "i", "b", "img", "link", "iframe"} & set(tags.names) and not tags.addresses
    assert tags.names.count("svg") == 1 and "&lt;script&gt;" in page and "@import" not in page and "url(" not in page
    assert "<script" not in (output / "compare.md").read_text() and r"a\|b" in (output / "compare.md").read_text()


def test_scores_stand_in_percent_beside_the_published_ones_and_their_faults(tmp_path, capsys):
    a = write(tmp_path / "a", {"lambada": [1.0] + [0.0] * 7, "nelbo/all": [3.25, 3.75]})
    content = json.loads((a / "results.json").read_text())
    content["tasks"]["nelbo/all"] = {"nelbo": 3.5, "stderr": None, "n": 2, "metric": "nelbo"}
    (a / "results.json").write_text(json.dumps(content))
    code, output = run(tmp_path, a, flags=("--paper",))
    text = (output / "compare.md").read_text()
    assert code == 0 and "| 12.5 ± 11.7 (8) | 3.5000 (2) |" in text
    assert "| 45.0† |" in text and "counted each hit twice" in text and "| 23.3/5.5/21.2† |" in text
    assert "loads SQuAD" in text and "| 63.5 | 24.5 | 45.4 |" in text and "&lt;1" in text
    assert "DiffuLLaMA" in capsys.readouterr().out
    assert "DiffuLLaMA" not in (run(tmp_path, a)[1] / "compare.md").read_text()


def test_published_rows_are_complete():
    assert len(TABLE_1) == 9 and all(tuple(row.scores) == TASKS for row in TABLE_1) and set(FAULTS) <= set(TASKS)
