"""What README.md and the other pages say can be done: commands, settings, paths and Python, checked or run."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, run

from common.config import load_config, walk
from common.errors import UserError
from data_prep.config import PrepareConfig
from data_prep.shards import Manifest
from pretrain.config import RunConfig
from pretrain.model.settings import SamplingSettings
from tools.generate import rule_of

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ds_configs/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
LAUNCHERS = ("python", "torchrun", "deepspeed", "sbatch", "make", "pip", ".venv/bin/python", ".venv/bin/pre-commit")
MADE_BY_RUNS = ("runs", "data", "exports", "ranks", "checkpoints", "model", "dist", "hosts")  # paths that begin so
every_page = pytest.mark.parametrize("page", TEXTS)


@dataclass(frozen=True)
class Command:
    """A command line of a page, in parts."""

    page: str
    line: str
    program: str  # python, torchrun, …
    script: str  # a file, "-m MODULE", a target of make
    verb: str  # of a command with several, else ""
    flags: tuple[str, ...]  # of the script
    overrides: tuple[str, ...]  # key=value

    @property
    def asks(self) -> str:
        """What to ask for its help page."""
        return f"{self.script} {self.verb}".strip()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def lines_of(text: str) -> list[str]:
    """Command lines of ```bash blocks, of indented blocks and of `code`, without comments."""
    found = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    found += re.findall(r"^    (\S.*)$", prose, re.M)
    found += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    return [line.strip() for line in found]


def parsed(page: str, line: str) -> Command | None:
    """None for what is not a command, or names only a program."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if len(words) < 2 or words[0] not in LAUNCHERS:
        return None
    program, words = Path(words[0]).name, [word for word in words[1:] if word not in ("...", "…")]
    if program == "make":
        return Command(page, line, program, " ".join(word for word in words if "=" not in word), "", (), ())
    if program == "python" and words[0] == "-m":
        script, rest = f"-m {words[1]}", words[2:]
    else:
        places = [i for i, word in enumerate(words) if word.endswith((".py", ".sh"))]
        if not places:
            return None
        script, rest = words[places[0]], words[places[0] + 1 :]
    verb = rest[0] if rest and re.fullmatch(r"[a-z]+", rest[0]) else ""
    flags = tuple(word for word in rest if word.startswith("--"))
    overrides = tuple(word for word in rest if re.match(r"[a-z_.]+=", word) and word != "key=value")
    return Command(page, line, program, script, verb, flags, overrides)


FOUND = [
    command for page, text in TEXTS.items() for line in lines_of(text) if (command := parsed(page, line)) is not None
]
# llama.cpp's own scripts are there after `make llama-cpp` alone; test_llama_cpp.py runs them with these flags
COMMANDS = [command for command in FOUND if not command.script.startswith(".llama.cpp/")]
every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.line[:60]}")


def test_there_are_commands():
    """The readers above still find what they look for."""
    scripts = {command.script for command in COMMANDS}
    assert {"-m data_prep", "pretrain/main.py", "slurm/data_prep.sh", "-m tools.export", "test"} <= scripts
    assert len(COMMANDS) > 40
    assert any(command.flags for command in COMMANDS) and any(command.overrides for command in COMMANDS)


@every_command
def test_what_a_command_names_exists(command):
    if command.program == "make":
        for target in command.script.split():
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M), target
    elif command.script in ("-m tools.NAME", "-m pytest"):
        return
    elif command.script.startswith("-m "):
        module = ROOT / command.script.removeprefix("-m ").replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    else:
        assert (ROOT / command.script).exists()


@pytest.fixture(scope="module")
def help_pages() -> dict[str, dict]:
    others = (".sh", "pytest")  # have no help page of ours
    commands = [c for c in COMMANDS if (c.flags or c.verb) and c.program != "make" and not c.script.endswith(others)]
    asked = sorted({c.asks for c in commands})
    command = [sys.executable, "tests/scripts/help_pages.py", json.dumps(asked)]
    outcome = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True, timeout=300)
    return json.loads(outcome.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if (c.flags or c.verb) and c.script.endswith(".sh") is False and "pytest" not in c.script],
    ids=lambda c: f"{c.page}: {c.line[:60]}",
)
def test_its_flags_and_verb_are_those_of_its_help_page(help_pages, command):
    page = help_pages[command.asks]
    assert page["code"] == 0, page["page"]
    for flag in command.flags:
        assert re.search(rf"{flag.partition('=')[0]}\b", page["page"]), flag


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.overrides], ids=lambda c: f"{c.page}: {c.line[:60]}"
)  # fmt: skip
def test_its_settings_are_accepted(command):
    if "tools.generate" in command.script:  # the rules of --compare
        for rule in command.overrides:
            SamplingSettings(**rule_of(rule))
    elif "data_prep" in command.script:
        load_config(PrepareConfig, ROOT / "data_prep/configs/demo.yaml", [*command.overrides])
    else:
        load_config(RunConfig, None, [*command.overrides])


def known_settings() -> set[str]:
    """Every key of both configurations, sections too; and those that were renamed, which CHANGELOG.md names."""
    names = {name for name, _, _ in walk(RunConfig())} | set(PrepareConfig.__dataclass_fields__)
    names |= {f.metadata["formerly"] for _, f, _ in walk(RunConfig()) if f.metadata.get("formerly")}
    return names | {name.rpartition(".")[0] for name in names}


@every_page
def test_settings_in_the_text_exist(page):
    known = known_settings()
    if page.startswith("ds_configs"):  # which describes DeepSpeed's
        known |= {f"{k}.{sub}" for k, v in deepspeed_settings().items() if isinstance(v, dict) for sub in v}
    sections = "|".join(RunConfig.__dataclass_fields__)
    for key, value in re.findall(rf"`((?:{sections})\.\w+)(?:=([^`\s]+))?`", TEXTS[page]):
        if key.rpartition(".")[2] in ("py", "json", "md", "yaml", "sh"):
            continue
        assert key in known, key
        if value and value != "...":
            load_config(RunConfig, None, [f"{key}={value}"])


def deepspeed_settings() -> dict:
    """All keys of ds_configs."""
    found: dict = {}
    for path in (ROOT / "ds_configs").glob("*.json"):
        found |= json.loads(path.read_text())
    return found


@every_page
def test_links_lead_somewhere(page):
    """Files, and headings in them."""
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith(("http:", "https:")):
            continue
        path, _, heading = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        if heading:
            file = file / "README.md" if file.is_dir() else file
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


@every_page
def test_files_and_tests_in_the_text_exist(page):
    text = TEXTS[page]
    for name in set(re.findall(r"\btest_\w+\.py\b", text)):
        assert list((ROOT / "tests").rglob(name)), name
    text = re.sub(r"\bwrites [\w./]+", "", text)  # what a command makes
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for path in set(re.findall(r"(?<![\w/.])((?:\w[\w.-]*/)+[\w.-]*\w)", re.sub(r"https?://\S+", "", text))):
        first = path.partition("/")[0]
        if first in rooms and first not in MADE_BY_RUNS and not re.search(r"\b[A-Z]{2,}\b", path.removesuffix(".md")):
            assert (ROOT / path).exists(), path


@every_page
def test_python_parses(page):
    for block in blocks(TEXTS[page], "python"):
        ast.parse(block)


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory) -> Path:
    from tools.export import export

    arguments, folder = tiny_run("readme", **{"train.steps": 2})
    run(1, arguments)
    return export(folder, tmp_path_factory.mktemp("readme") / "exported")


@pytest.mark.slow
def test_the_first_python_block_fills_the_masks(exported, capsys, tmp_path):
    """In a process of its own, as a user would run it."""
    block = next(b for b in blocks(TEXTS["README.md"], "python") if "diffusion_generate" in b)
    program, places = re.subn(r'"runs/demo/step_\d+"', repr(str(exported)), block)
    assert places == 1
    outcome = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, check=False, timeout=120
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("The king had a") and " in his garden." in outcome.stdout
    assert "mask" not in outcome.stdout


@pytest.mark.slow
def test_any_arrow_tool_reads_shards(corpus_dir):
    """Each line of the block, where the tool it uses is installed; our own two are."""
    block = next(b for b in blocks(TEXTS["README.md"], "python") if "open_stream" in b)
    manifest = Manifest.load(corpus_dir)
    shard = corpus_dir / manifest.sources[0].train[0].file
    first, *lines = block.strip().splitlines()
    names = {"shard": str(shard)}
    assert ast.parse(first).body[0].targets[0].id == "shard"
    ran = 0
    for line in lines:
        tool = re.search(r"\b(datasets|polars|pyarrow|duckdb)\.", line)[1]
        try:
            names[tool] = importlib.import_module(tool)
        except ImportError:
            continue
        if tool == "pyarrow":
            importlib.import_module("pyarrow.ipc")
        exec(line, names)
        ran += 1
    assert ran >= 2 and names["rows"].num_rows == manifest.sources[0].train[0].rows
    assert set(names["rows"].column_names) == {"input_ids", "document_lengths", "last_continues"}


def test_a_setting_that_is_misspelt_would_be_seen():
    with pytest.raises(UserError, match="unknown key"):
        load_config(RunConfig, None, ["optimizer.learning_rate=1"])
