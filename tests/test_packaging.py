"""The wheel holds everything a user runs, and runs without this checkout."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

COMMANDS = ("demo", "export", "figures", "generate", "health", "import_checkpoint")  # of tools


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(tracked, cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
    for name in listed:  # a clean copy: building leaves folders behind
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    outcome = subprocess.run(command, text=True, capture_output=True, check=False, timeout=300)
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return next(folder.glob("*.whl"))


def test_the_wheel_is_complete(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern in ("common/**/*", "data_prep/**/*", "pretrain/**/*", "tools/*", "ds_configs/*.json"):
        for path in ROOT.glob(pattern):
            if path.is_file() and path.suffix in (".py", ".yaml", ".json", ".jsonl", ".typed"):
                assert str(path.relative_to(ROOT)) in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_it_runs_from_site_packages(wheel, tmp_path):
    """A dry run, the help page of every command, and whatever the console scripts are to call."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")

    def python(*arguments: str) -> str:
        outcome = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            text=True, capture_output=True, check=False, timeout=300,
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        return outcome.stdout

    printed = python("-m", "pretrain.main", "--config", "pretrain/configs/diffugpt_s.yaml", "--dry_run")
    assert "124.4M parameters" in printed
    modules = ["data_prep", "pretrain.main", *(f"tools.{name}" for name in COMMANDS)]
    script = str(ROOT / "tests/scripts/help_pages.py")
    pages = json.loads(python(script, json.dumps([f"-m {m}" for m in modules])).splitlines()[-1])
    assert all(page["code"] == 0 and "usage:" in page["page"] for page in pages.values()), pages
    (entry_points,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    called = [line.split(" = ")[1] for line in entry_points.read_text().splitlines() if " = " in line]
    assert len(called) == 6
    program = "import importlib, sys; print([callable(getattr(importlib.import_module(m), f)) for m, f in {}])"
    assert python("-c", program.format([c.split(":") for c in called])).strip() == str([True] * len(called))
