"""Modules as JSON texts: a header with the class, and its fields."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .checks import is_traced


_Saved = TypeVar("_Saved", bound="SavedModule")


class SavedModule(eqx.Module):
    """A module that is saved as a JSON text and comes back from it. Fields may be `None`,
    booleans, numbers, strings, arrays, modules of this kind, and tuples of these; a list
    comes back as a tuple."""

    # The arguments of the constructor that are saved, which are attributes of the same
    # names. Without them, the fields are saved, and come back without the constructor.
    _saved_names: ClassVar[tuple[str, ...] | None] = None
    # Others, which are saved where they are not `None`.
    _optional_names: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> str:
        """This object as a JSON text, which `from_json` reads. `ValueError` for traced
        arrays, and `TypeError` for fields that JSON cannot hold."""
        return json.dumps(self, default=_encode, indent=2)

    @classmethod
    def from_json(cls: type[_Saved], text: str) -> _Saved:
        """What `to_json` of this class, or of one derived from it, wrote as `text`; names
        that the class does not know are passed over. `ValueError` or `TypeError` for a text
        that holds no such object, or one of a later version."""
        try:
            return _module(cls, json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"This is no JSON: {error}.") from error

    def _saved_fields(self) -> dict[str, Any]:
        if self._saved_names is None:
            return dict(vars(self))
        optional = [n for n in self._optional_names if getattr(self, n) is not None]
        fields = {name: getattr(self, name) for name in [*self._saved_names, *optional]}
        return {
            name: shortest_numbers(v) if _is_array(v) else v for name, v in fields.items()
        }

    @classmethod
    def _restored(cls: type[_Saved], fields: dict[str, Any]) -> _Saved:
        if cls._saved_names is not None:
            return cls(**fields)
        return with_fields(object.__new__(cls), **fields)

    def __repr__(self) -> str:
        if self._saved_names is None or not all(map(_is_array, jax.tree.leaves(self))):
            return super().__repr__()
        fields = {name: SavedModule._saved_fields(self)[name] for name in self._saved_names}
        texts = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        return f"{type(self).__name__}({texts})"


def with_fields(module: _Saved, **fields: Any) -> _Saved:
    """A copy of `module` with some fields replaced, which no constructor checks."""
    copy = object.__new__(type(module))
    for name, value in (vars(module) | fields).items():
        object.__setattr__(copy, name, value)
    return copy


def shortest_numbers(values: Any) -> Any:
    """Numbers, or nested tuples of them, with the digits that their dtype has."""
    values = np.asarray(values)
    if values.ndim:
        return tuple(map(shortest_numbers, values))
    is_floating = jnp.issubdtype(values.dtype, jnp.floating)
    return float(str(values)) if is_floating else values.item()


def require_names(fields: Any, names: Any) -> dict[str, Any]:
    """The entries `names` of an object in a JSON text."""
    if not isinstance(fields, dict):
        raise ValueError(f"A JSON object is needed, but there is {fields!r}.")
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"There is no {', '.join(missing)} in this JSON.")
    return {name: fields[name] for name in names}


def _is_array(value: Any) -> bool:
    """Whether these are numbers, rather than traced ones."""
    return isinstance(value, jax.Array | np.ndarray | np.generic) and not is_traced(value)


def _header(cls: type) -> dict[str, Any]:
    is_ours = cls.__module__.partition(".")[0] == "jaxbkgd"
    name = f"jaxbkgd.{cls.__name__}" if is_ours else f"{cls.__module__}.{cls.__qualname__}"
    return {"format": name, "version": 1}


def _encode(value: Any) -> Any:
    """As an object of JSON, what `json` has no type for."""
    if isinstance(value, SavedModule):
        return _header(type(value)) | value._saved_fields()
    if _is_array(value):
        numbers = np.asarray(value)
        return {"array": shortest_numbers(numbers), "dtype": numbers.dtype.name}
    if is_traced(value):
        raise ValueError("An array is traced; save outside of jax.jit and jax.grad.")
    remedy = "save the arrays with equinox.tree_serialise_leaves"
    raise TypeError(f"JSON cannot hold {value!r}; {remedy}.")


def _module(cls: type[Any], fields: Any) -> Any:
    """The module of the class `cls`, or of a derived one, that a JSON object holds."""
    header = {}
    if isinstance(fields, dict):
        header = {name: fields.get(name) for name in ("format", "version")}
    # Where a class was defined again, the later one.
    kinds = [kind for kind in _with_subclasses(cls) if _header(kind) == header]
    if not kinds:
        raise ValueError(
            f"It must be a JSON object with {_header(cls)}, or of a derived class, but has "
            f"{header}; import the module that defines the class, or update jaxbkgd if the "
            "version is a later one."
        )
    names = kinds[-1]._saved_names or [f.name for f in dataclasses.fields(kinds[-1])]
    optional = [name for name in kinds[-1]._optional_names if name in fields]
    fields = require_names(fields, [*names, *optional])
    return kinds[-1]._restored({name: _decode(value) for name, value in fields.items()})


def _with_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_decode, value))
    if isinstance(value, dict) and "format" in value:
        return _module(SavedModule, value)
    if isinstance(value, dict) and "array" in value:
        return jnp.asarray(np.array(value["array"], jnp.dtype(value["dtype"])))
    return value
