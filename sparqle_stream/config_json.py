"""Configs as JSON: what a model's folder says about its shapes -> frozen dataclasses."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from sparqle_stream.errors import ModelError, SparqleError

if TYPE_CHECKING:
    from pathlib import Path


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as err:
        raise ModelError(f"cannot read {path}: {err}", hint="fetch or export it anew") from err


def config_from_json(cls: type[Any], raw: dict[str, Any], source: Path) -> Any:  # noqa: ANN401
    """A (nested) config dataclass from JSON; what is unknown or impossible is a ModelError."""
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls)}
    if unknown := sorted(raw.keys() - known.keys()):
        raise ModelError(
            f"{source}: unknown {cls.__name__} field {unknown[0]!r}",
            hint="the model may need a newer sparqle-stream",
        )
    values = {
        name: config_from_json(known[name], value, source)
        if is_dataclass(known[name])
        else (tuple(value) if isinstance(value, list) else value)
        for name, value in raw.items()
    }
    try:
        return cls(**values)
    except (SparqleError, TypeError) as err:
        raise ModelError(f"{source}: {err}", hint="the model's config is damaged") from err
