"""The wheel holds everything a user runs, and runs without this checkout."""

import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


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
    outcome = subprocess.run(command, text=True, capture_output=True, check=False)
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return next(folder.glob("*.whl"))


def test_the_wheel_is_complete(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern in ("data_prep/**/*", "pretrain/**/*", "tools/*", "ds_configs/*.json"):
        for path in ROOT.glob(pattern):
            if path.is_file() and path.suffix in (".py", ".yaml", ".json", ".jsonl"):
                assert str(path.relative_to(ROOT)) in names
    assert not any(name.startswith("tests/") for name in names)


def test_it_runs_from_site_packages(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "pretrain.main", "--config", "pretrain/configs/diffugpt_s.yaml", "--dry_run"]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert outcome.returncode == 0 and "124.4M parameters" in outcome.stdout, outcome.stderr
    for module in ("data_prep", "tools.export", "tools.generate", "tools.figures", "tools.demo", "pretrain.main"):
        command = [sys.executable, "-m", module, "--help"]
        outcome = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
        assert outcome.returncode == 0 and "usage:" in outcome.stdout, outcome.stderr
