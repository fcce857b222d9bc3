"""Which records a source wants: conditions on their columns, and a Python hook.

    filters: {score: ">= 3", language: [en, de], licence: "!= unknown", meta.year: 2020}
    filter: my_filters:is_prose          # def is_prose(record: dict) -> bool, in my_filters.py

A condition is a comparison (>= <= > < == !=), a list of values, or one value. A record without the column passes
no comparison, and `<` and its like pass no value of another type than theirs.
"""

import hashlib
import importlib
import operator
import os
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import UserError

from .files import describe

if TYPE_CHECKING:
    from ..config import SourceConfig

COMPARISONS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
EXPECTED = "expected a value, a list of values, or a comparison such as '>= 3' or '!= unknown'"
Test = Callable[[Any], bool]


def value_at(record: Any, key: str, missing: Any = None) -> Any:
    """The value of a key such as `meta.licence`: dots descend into nested records, unless a key is written so."""
    if isinstance(record, dict) and key in record:
        return record[key]
    for part in key.split("."):
        if not isinstance(record, dict) or part not in record:
            return missing
        record = record[part]
    return record


def compile_filters(filters: dict[str, Any]) -> dict[str, Test]:
    """For each column the test that its value must pass. Raises UserError for a filter that means nothing."""
    return {key: _compile(key, wanted) for key, wanted in filters.items()}


def _compile(key: str, wanted: Any) -> Test:
    if not isinstance(key, str) or not key:
        raise UserError(f"filters has the key {key!r}, expected the name of a column")
    if isinstance(wanted, list):
        if not wanted or not all(_is_value(value) for value in wanted):
            raise UserError(f"filters.{key} is {wanted}, expected a list of one or more values")
        for value in wanted:
            found = _comparison(value) if isinstance(value, str) else None
            if found and (" " in value or NUMBER.fullmatch(found[1])):
                raise UserError(f"filters.{key} has {value!r} in a list, expected values; a comparison stands alone")
        return lambda value: any(_equal(value, one) for one in wanted)
    if not _is_value(wanted):
        raise UserError(f"filters.{key} is {wanted!r}, {EXPECTED}")
    if not isinstance(wanted, str):
        return lambda value: _equal(value, wanted)
    found = _comparison(wanted)
    if found is None:
        if wanted.lstrip().startswith(("=", "<", ">", "!")):
            raise UserError(f"filters.{key} is {wanted!r}, {EXPECTED}; a value that begins so goes into a list")
        return lambda value: _equal(value, wanted)
    return _comparing(*found)


def _comparison(text: str) -> tuple[str, str] | None:
    """The operator and the operand of a text such as ">= 3"; None for one that is no comparison."""
    found = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([^\s<>=!].*?)\s*", text, re.DOTALL)
    return (found[1], found[2]) if found else None


def _comparing(sign: str, operand: str) -> Test:
    compare = COMPARISONS[sign]
    number = (float(operand) if re.search("[.eE]", operand) else int(operand)) if NUMBER.fullmatch(operand) else None
    if sign in ("==", "!="):
        wanted = [operand] if number is None else [operand, number]
        is_equality = sign == "=="
        return lambda value: value is not None and any(_equal(value, one) for one in wanted) == is_equality
    if number is None:
        return lambda value: isinstance(value, str) and compare(value, operand)
    return lambda value: _is_number(value) and compare(value, number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _equal(value: Any, wanted: Any) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def load_hook(name: str) -> Callable[[dict], bool]:
    """The function that `module:function` names; modules of the current folder are found, as by `python -m`.

    Raises UserError where there is none.
    """
    module, _, path = name.partition(":")
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise UserError(f"filter is {name!r}, expected module:function, such as my_filters:is_prose")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        hook = reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:
        raise UserError(f"filter {name} cannot be imported: {type(error).__name__}: {describe(error)}") from error
    if not callable(hook):
        raise UserError(f"filter {name} is a {type(hook).__name__}, expected a function of a record")
    return hook


def call_hook(hook: Callable[[dict], bool], name: str, record: dict, path: str) -> bool:
    """What the hook says about a record of the file `path`. Raises UserError where it fails, or gives no bool."""
    try:
        wanted = hook(record)
    except Exception as error:
        raise UserError(f"{path}: filter {name} raised {type(error).__name__}: {describe(error)}") from error
    if not isinstance(wanted, bool | np.bool_):
        raise UserError(f"{path}: filter {name} returned {type(wanted).__name__}, expected True or False")
    return bool(wanted)


def hook_source(source: "SourceConfig") -> str:
    """The sha256 of the file that holds the source's hook, "" without one. What that file imports is not in it."""
    if not source.filter:
        return ""
    load_hook(source.filter)
    file = getattr(sys.modules[source.filter.partition(":")[0]], "__file__", None)
    if not file:
        raise UserError(f"filter {source.filter} is in no file, expected a function of a module that you wrote")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def recipe(source: "SourceConfig") -> dict:
    """What decides which records pass: equal recipes pass the same ones. For JSON."""
    return {"filters": source.filters, "filter": source.filter, "hook_source": hook_source(source)}


def check(source: "SourceConfig") -> None:
    """Raise UserError for filters that mean nothing, and a hook that cannot be imported."""
    compile_filters(source.filters)
    hook_source(source)
