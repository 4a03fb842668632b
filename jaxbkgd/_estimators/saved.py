"""Modules kept as JSON texts."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


_VERSION = 1


def saved(kind: str, fields: dict[str, Any]) -> str:
    """The JSON text of a module of the class `kind`."""
    return json.dumps(_header(kind) | fields, indent=2)


def saved_kind(text: str) -> Any:
    """The class of the module that a text holds, or None where it says none."""
    fields = _parsed(text)
    name = fields.get("format") if isinstance(fields, dict) else None
    return name.removeprefix("jaxbkgd.") if isinstance(name, str) else None


def saved_fields(kind: str, text: str, names: Sequence[str]) -> dict[str, Any]:
    """The fields `names` of a text that holds a module of the class `kind`."""
    fields = _parsed(text)
    expected = _header(kind)
    header = dict.fromkeys(expected)
    if isinstance(fields, dict):
        header = {name: fields.get(name) for name in expected}
    if header != expected:
        raise ValueError(
            f"It must be a JSON object with {expected}, but has {header}; if the version "
            "is a later one, update jaxbkgd."
        )
    return present(fields, names)


def present(fields: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"There is no {', '.join(missing)} in this JSON.")
    return {name: fields[name] for name in names}


def decimals(values: Any) -> Any:
    """Numbers, or lists of them, with no more digits than a number of their type has."""
    values = np.asarray(values)
    return [decimals(value) for value in values] if values.ndim else float(str(values))


def _header(kind: str) -> dict[str, Any]:
    return {"format": f"jaxbkgd.{kind}", "version": _VERSION}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"This is no JSON: {error}.") from error
