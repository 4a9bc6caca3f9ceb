"""Configs of the training commands: TOML -> frozen dataclasses; what is unknown is an error."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from sparqle_stream.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


def read_config(cls: type[T], path: Path) -> T:
    """A config file -> `cls`; lists become tuples, tables the dataclasses of their fields.

    Raises ConfigError, with the file's name, for what cannot be read or does not fit.
    """
    return from_table(cls, read_table(path), path.name)


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file as it is. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise ConfigError(f"cannot read {path}: {err}", hint="see training/configs") from err


def from_table(cls: type[T], raw: dict[str, Any], where: str) -> T:
    """The same from a table that was read; `where` is named in errors."""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for name in raw:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown option {name}", hint=hint)
    lacking = [
        name
        for name, f in known.items()
        if name not in raw and f.default is MISSING and f.default_factory is MISSING
    ]
    if lacking:
        raise ConfigError(f"{where}: {', '.join(lacking)} missing", hint="see training/configs")
    return cls(**{name: _value(hints[name], value, where, name) for name, value in raw.items()})


def _value(kind: Any, value: Any, where: str, name: str) -> Any:  # noqa: ANN401 - typed by the dataclass
    is_table, is_list = is_dataclass(kind), get_origin(kind) is tuple
    wanted: Any = dict if is_table else list if is_list else get_args(kind) or kind
    is_whole = wanted is float and isinstance(value, int)
    is_stray_bool = isinstance(value, bool) and wanted in (int, float)
    if is_stray_bool or not (is_whole or isinstance(value, wanted)):
        what = "a table" if is_table else "a list" if is_list else getattr(kind, "__name__", kind)
        raise ConfigError(f"{where}: {name} = {value!r} is not {what}", hint="see training/configs")
    if is_table and isinstance(kind, type):
        return from_table(kind, value, where)
    if is_list:
        return tuple(_value(get_args(kind)[0], one, where, name) for one in value)
    return value
