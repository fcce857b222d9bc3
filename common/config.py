"""Settings as dataclasses, read from YAML and `key=value` overrides; unknown keys are errors.

In: a dataclass, a YAML file, a list of `a.b=value` strings. Out: an instance of the dataclass.
Precedence, lowest first: defaults in the dataclass, the YAML file, the command line.

    @dataclass
    class TrainConfig:
        steps: int = setting(1000, above=0)                       # bounds, checked by check_bounds
        max_minutes: float = setting(0.0, at_least=0, may_change=True)  # a resumed run may set another value
        times: str = setting("a", formerly="train.when")          # the old key still works
"""

import re
from collections.abc import Iterator
from dataclasses import Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError
from .files import write_atomically
from .log import log

T = TypeVar("T")
DOLLAR = "\ue000"  # stands for a $ that OmegaConf must not see: a character that no text has


def setting(
    default: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    may_change: bool = False,
    formerly: str | None = None,
) -> Any:
    """A dataclass field with its bounds, whether a resumed run may change it, and its former dotted name.

    A list or dict default, or a dataclass type, is made anew for each instance. Bounds hold for every
    element of a list; None is always within them.
    """
    metadata = {
        "bounds": (above, at_least, below, at_most),
        "may_change": may_change,
        "formerly": formerly,
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def load_config(
    schema: type[T], path: str | Path | None, overrides: list[str] | None = None, interpolate: bool = True
) -> T:
    """Read `path` over the defaults of `schema`, then apply `key=value` overrides (dots descend).

    With `interpolate` false `${...}` is text, such as part of a file's name, but for `${oc.env:NAME}`.
    Raises UserError for a missing file, YAML that does not parse, an unknown key, a value of the
    wrong type, or an override without `=`.
    """
    config = OmegaConf.structured(schema)
    renamed = dict(_renamed(schema))
    replaced = set(_of_any_type(schema))
    if path is not None:
        config = _merge_file(config, Path(path), renamed, interpolate)
    for override in overrides or []:
        _apply(config, override if interpolate else _hide_dollars(override), renamed, replaced)
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{path or 'configuration'}: no value for {', '.join(missing)}")
        found: Any = OmegaConf.to_object(config)
        return found if interpolate else _show_dollars(found)
    except OmegaConfBaseException as error:
        raise UserError(f"{path or 'configuration'}: {_describe(error)}") from None


def _hide_dollars(text: str) -> str:
    return re.sub(r"\$(?=\{(?!oc\.env:))", DOLLAR, text)


def _show_dollars(value: Any) -> Any:
    """`value` with the text that `_hide_dollars` was given, in all of its strings; an escaped `\\${` is `${`."""
    if isinstance(value, str):
        return value.replace("\\" + DOLLAR, "$").replace(DOLLAR, "$")
    if isinstance(value, list):
        return [_show_dollars(one) for one in value]
    if isinstance(value, dict):
        return {_show_dollars(key): _show_dollars(one) for key, one in value.items()}
    if is_dataclass(value):
        for f in fields(value):
            setattr(value, f.name, _show_dollars(getattr(value, f.name)))
    return value


def _merge_file(config: DictConfig, path: Path, renamed: dict[str, str], interpolate: bool) -> DictConfig:
    if not path.is_file():
        raise UserError(f"no configuration file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
        loaded = OmegaConf.create(text if interpolate else _hide_dollars(text))
        if not isinstance(loaded, DictConfig):
            raise UserError(f"{path}: expected `key: value` lines at the top level")
        for old, new in renamed.items():
            _move(loaded, old, new, path)
        return OmegaConf.merge(config, loaded)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_describe(error)}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from None


def _move(loaded: DictConfig, old: str, new: str, path: Path) -> None:
    """Give the value of a renamed key to its new name."""
    section, _, key = old.rpartition(".")
    holder = OmegaConf.select(loaded, section) if section else loaded
    if not isinstance(holder, DictConfig) or key not in holder:
        return
    if OmegaConf.select(loaded, new) is not None:
        raise UserError(f"{path}: both {old} and {new} are set; {old} is the old name, remove it")
    log.warning("%s: %s is now called %s", path, old, new)
    OmegaConf.update(loaded, new, holder.pop(key))


def _apply(config: DictConfig, override: str, renamed: dict[str, str], replaced: set[str]) -> None:
    """`key=value` into the configuration: a mapping adds to the one that is there, but to those in `replaced`."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r}: expected key=value, such as train.steps=100")
    if key in renamed:
        log.warning("%s is now called %s", key, renamed[key])
    try:
        value = OmegaConf.from_dotlist([f"value={text}"]).value
        key = renamed.get(key, key)
        OmegaConf.update(config, key, value, merge=key not in replaced)
    except OmegaConfBaseException as error:
        raise UserError(f"override {override!r}: {_describe(error)}") from None
    except (yaml.YAMLError, ValueError) as error:  # a key that descends into a list is no number
        raise UserError(f"override {override!r}: {_one_line(error)}") from None


def save_config(config: object, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back."""
    write_atomically(Path(path), OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def walk(config: object, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """(dotted name, field, value) of every setting that is not a section, in the order of the dataclasses."""
    for f in fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, value


def check_bounds(config: object) -> None:
    """Raise UserError for the first setting whose value lies outside the bounds of its field."""
    for name, f, value in walk(config):
        above, at_least, below, at_most = f.metadata.get("bounds", (None,) * 4)
        for v in value if isinstance(value, list | tuple) else [value]:
            if v is None or (
                (above is None or v > above)
                and (at_least is None or v >= at_least)
                and (below is None or v < below)
                and (at_most is None or v <= at_most)
            ):
                continue
            words = {"more than {}": above, "{} or more": at_least, "less than {}": below, "at most {}": at_most}
            expected = " and ".join(text.format(bound) for text, bound in words.items() if bound is not None)
            raise UserError(f"{name} is {value}, expected {expected}")


def fixed_settings(config: object) -> dict[str, Any]:
    """Dotted name to value of all settings that a resumed run must not change, in a form that YAML reads back."""
    found = {}
    for name, f, value in walk(config):
        section = getattr(type(config), "__dataclass_fields__", {}).get(name.partition(".")[0])
        if not f.metadata.get("may_change") and not (section and section.metadata.get("may_change")):
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _renamed(schema: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for f in fields(schema):
        if f.metadata.get("formerly"):
            yield f.metadata["formerly"], prefix + f.name
        if is_dataclass(f.type):
            yield from _renamed(f.type, f"{prefix}{f.name}.")


def _of_any_type(schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings that take values of several types, such as a name or a list of names."""
    for f in fields(schema):
        if is_dataclass(f.type):
            yield from _of_any_type(f.type, f"{prefix}{f.name}.")
        elif f.type is Any:
            yield prefix + f.name


def _describe(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None)
    schema: Any = getattr(error, "object_type", None)
    if type(error).__name__ in ("ConfigKeyError", "ConfigAttributeError") and is_dataclass(schema):
        return f"unknown key {key!r}; known here: {', '.join(f.name for f in fields(schema))}"
    return f"{key}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    """OmegaConf appends lines about its own types; a YAML error tells its place over several lines."""
    text = str(error).splitlines()[0] if isinstance(error, OmegaConfBaseException) else str(error).replace("\n", " ")
    return text.replace(DOLLAR, "$")
