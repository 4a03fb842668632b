"""What a result depends on, to the bit: a later run goes on with a draft only if all of it
is the same."""

import copyreg
import functools as ft
import hashlib
import importlib.metadata
import inspect
import pickle
import types
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .._estimators.base import AbstractEstimator
from .._movies.movie import Channel, Movie, MovieError
from .compute import Output


class Sources:
    """The movies that a call reads, as they are when this is made.

    A file whose time alone has changed since is the same: its content is compared, by size
    and by frames from all of it.
    """

    def __init__(self, movies: Sequence[Movie]) -> None:
        self.states = {movie: movie.opened_state or movie.state() for movie in movies}
        self.content = ft.cache(_content)
        for movie, state in self.states.items():
            # The content of a movie that cannot change is needed only for settings.
            if state is not None:
                self.content(movie)

    def check(self) -> None:
        """Refuses a movie that has changed, and warns of one whose time has."""
        for movie, before in self.states.items():
            try:
                if movie.state() == before:
                    continue
                is_same = _content(movie) == self.content(movie)
            except (OSError, MovieError):
                is_same = False
            if not is_same:
                raise MovieError(
                    f"{movie.name}: has changed since it was opened; begin anew once it is "
                    "whole (resume=False, in the command line --fresh)"
                )
            warn_of_new_time(movie)


def warn_of_new_time(movie: Movie) -> None:
    warnings.warn(
        f"{movie.name}: its time of modification has changed, but not its size nor the "
        "frames that were compared; the result is kept",
        UserWarning,
        stacklevel=2,
    )


def _content(movie: Movie) -> list[Any]:
    return [movie.fingerprint(), *[p.stat().st_size for p in movie.paths if p.is_file()]]


def settings_of(
    sources: Sources,
    channels: Sequence[Channel],
    weights: Sequence[Channel | None],
    estimator: AbstractEstimator,
    output: Output,
    chunk_frames: int,
) -> dict[str, Any]:
    """In terms of JSON. `states` alone may differ where a draft is gone on with."""
    content = sources.content
    return {
        "source": [[content(c.movie), c.index, list(map(int, c.box))] for c in channels],
        "weights": [None if w is None else content(w.movie) for w in weights],
        "states": [sources.states[channel.movie] for channel in channels],
        "estimator": identity(estimator),
        "quantity": output.quantity,
        "dtype": output.dtype,
        "offsets": list(output.offsets),
        "gains": list(output.gains),
        "chunk_frames": chunk_frames,
        "version of jaxbkgd": installed_version(),
        "version of jax": jax.__version__,
        "device": jax.local_devices()[0].device_kind,
        "64-bit mode": jax.config.read("jax_enable_x64"),
    }


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The names of the settings that differ, with their values if these are short."""
    parts = []
    for name in sorted((before | now).keys() - {"states"}):
        if before.get(name) != now.get(name):
            is_short = name not in ("source", "weights", "estimator")
            values = f" {before.get(name)}, not {now.get(name)}" if is_short else ""
            parts.append(f"{name}{values}")
    return "; ".join(parts)


def identity(estimator: AbstractEstimator) -> str:
    """A hash of all that an estimator holds, which is the same in every process.

    Arrays count by their content, objects by their class and state, functions by their
    name, code, defaults and closure; addresses in memory do not count.

    **Raises:**

    `TypeError` for an estimator with a field that has no such description, as a lock.
    """
    try:
        return hashlib.sha256(repr(_described(estimator, ())).encode()).hexdigest()
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise TypeError(
            f"{type(estimator).__name__} holds something that another run could not "
            f"recognise ({error}), so that it could not be resumed; let it hold arrays, "
            "numbers, functions and what can be pickled, or write to an array"
        ) from error


def _described(value: Any, around: tuple[int, ...]) -> Any:
    """`around`: addresses of the objects that hold this one, in which it may come again."""
    if id(value) in around:
        return "again", around.index(id(value))
    describe = ft.partial(_described, around=(*around, id(value)))
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return repr(value)
        case jax.Array() | np.ndarray() | np.generic():
            array = np.asarray(value)
            if array.dtype != object:
                content = hashlib.sha256(array.tobytes()).hexdigest()
                return "array", str(array.dtype), array.shape, content
            return "array", array.shape, [describe(entry) for entry in array.flat]
        case type():
            return f"{value.__module__}.{value.__qualname__}"
        case types.ModuleType():
            return value.__name__
        case list() | tuple():
            return describe(type(value)), [describe(entry) for entry in value]
        case set() | frozenset():
            return describe(type(value)), sorted(repr(describe(entry)) for entry in value)
        case dict():
            pairs = [(describe(key), describe(entry)) for key, entry in value.items()]
            return describe(type(value)), sorted(pairs, key=repr)
        case types.CodeType():
            names = value.co_names, value.co_varnames, value.co_freevars
            return value.co_code.hex(), names, [describe(c) for c in value.co_consts]
        case types.FunctionType():
            name = f"{value.__module__}.{value.__qualname__}"
            held = [cell.cell_contents for cell in value.__closure__ or ()]
            defaults = value.__defaults__, value.__kwdefaults__
            return name, describe(value.__code__), describe(defaults), describe(held)
    # A function that JAX or functools has wrapped counts as that function.
    if callable(value) and (wrapped := inspect.unwrap(value)) is not value:
        return describe(type(value)), describe(wrapped)
    reduce = copyreg.dispatch_table.get(type(value))
    parts = value.__reduce_ex__(4) if reduce is None else reduce(value)
    if isinstance(parts, str):
        return describe(type(value)), getattr(value, "__module__", None), parts
    # Iterators over the entries of lists and dictionaries.
    fixed, entries = parts[:3], parts[3:5]
    held = [None if entry is None else list(entry) for entry in entries]
    return describe(type(value)), describe(fixed), describe(held)


def installed_version() -> str:
    """The version of this package, which may run from a folder that is not installed."""
    try:
        return importlib.metadata.version("jaxbkgd")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
