"""Rules of the house, read off the source: who may import whom, how long things are, and what states its type."""

import ast
import sys
from pathlib import Path

import pytest
from helpers import ROOT

ROOMS = ("common", "data_prep", "pretrain", "tools", "benchmarks")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
LONGEST_FILE, LONGEST_FUNCTION = 400, 80  # lines
PLUMBING = ("step", "config", "data", "annealing", "model", "objectives")  # of pretrain: what an objective may know

every_file = pytest.mark.parametrize("path", FILES, ids=NAMES)


def module_name(path: Path) -> str:
    """The dotted name that other files import it by; of a package, the package's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.AST) -> set[str]:
    """Dotted names of all that a file imports, at its top or inside a function; `from a import b` is a.b."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def may_import(importer: str, name: str) -> bool:
    """Whether the module `importer` may import `name`, one of ours or a library."""
    ours = within(name, *ROOMS, "tests")
    if within(importer, "pretrain.model"):  # it ships with a checkpoint
        library = name.partition(".")[0] in ("torch", "transformers", *sys.stdlib_module_names)
        return within(name, "pretrain.model") or (not ours and library)
    if not ours:
        return True
    if within(importer, "common"):
        return within(name, "common")
    if within(importer, "data_prep"):
        return within(name, "common", "data_prep")
    if within(importer, "pretrain.objectives"):
        return within(name, "common", *(f"pretrain.{part}" for part in PLUMBING))
    if within(importer, "pretrain"):
        return within(name, "common", "data_prep", "pretrain")
    return within(name, *ROOMS)


def is_run(tree: ast.Module) -> bool:
    """Whether a file has a block for `__name__ == "__main__"`."""
    return any(isinstance(node, ast.If) and "__name__ == '__main__'" in ast.unparse(node.test) for node in tree.body)


def entry_points() -> set[str]:
    """Modules that are run; for all below the tools, those too, whether they are run or not."""
    found = {"data_prep.__main__", "pretrain.main"}
    for path in FILES:
        if path.is_relative_to(ROOT / "tools") or is_run(ast.parse(path.read_text(encoding="utf-8"))):
            found.add(module_name(path))
    return found


@every_file
def test_imports_go_down(path):
    """common ← data_prep ← pretrain ← tools; what ships knows torch and transformers alone."""
    importer = module_name(path)
    wrong = sorted(name for name in imports(path, ast.parse(path.read_text())) if not may_import(importer, name))
    assert not wrong, f"{importer} imports {', '.join(wrong)}"


@every_file
def test_no_library_code_imports_an_entry_point(path):
    importer, entries = module_name(path), entry_points()
    if within(importer, "tools", "benchmarks"):
        entries = {name for name in entries if within(name, "data_prep", "pretrain")}
    wrong = sorted(
        name
        for name in imports(path, ast.parse(path.read_text()))
        if within(name, *entries) and not within(name, importer)
    )
    assert not wrong, f"{importer} imports {', '.join(wrong)}, which is run and not imported"


def test_the_rule_sees_what_it_should():
    """Absolute, relative, inside a function, and `from package import module`."""
    path = ROOT / "pretrain/objectives/made_up.py"
    source = (
        "import os\nfrom .. import main\ndef f():\n    from ..runtime.guards import Guard\n    import tools.export\n"
    )
    assert imports(path, ast.parse(source)) == {"os", "pretrain.main", "pretrain.runtime.guards.Guard", "tools.export"}
    assert not may_import("pretrain.objectives.made_up", "pretrain.runtime.guards.Guard")
    assert not may_import("common.files", "pretrain.config.RunConfig") and not may_import(
        "pretrain.step", "tools.export"
    )
    assert not may_import("pretrain.model.forms", "numpy") and not may_import("pretrain.model.forms", "common.errors")
    assert not may_import("data_prep.shards", "pretrain.data") and may_import("pretrain.data", "data_prep.shards")
    assert {"pretrain.main", "data_prep.__main__", "tools.export"} <= entry_points()
    assert "common.cli" not in entry_points()
    assert len(FILES) > 40 and {name.partition("/")[0] for name in NAMES} == set(ROOMS)


@every_file
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= LONGEST_FUNCTION}
    assert not long, f"functions of more than {LONGEST_FUNCTION} lines: {long}"


def public_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """At the top of a file, and in its public classes, nested ones too; dunders but __init__ are for Python."""
    found = []

    def look(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                look(node.body)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                found.append(node)

    look(tree.body)
    return found


@every_file
def test_public_functions_state_what_they_return(path):
    functions = public_functions(ast.parse(path.read_text(encoding="utf-8")))
    silent = [f"{f.name} (line {f.lineno})" for f in functions if f.returns is None]
    assert not silent, f"no return annotation: {', '.join(silent)}"


@every_file
def test_assertions_say_what_is_wrong(path):
    asserts = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Assert)]
    assert not [node.lineno for node in asserts if node.msg is None], "lines with an assert that has no text"
