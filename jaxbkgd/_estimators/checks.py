"""Checks of arguments. An error is one line: the value, the rule and the remedy."""

import math
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float


# Of an array with more numbers, an error shows the first that is wrong.
_SHOWN = 16


def is_traced(value: Any) -> bool:
    """Whether JAX is tracing `value`, so that it has no number yet."""
    return isinstance(value, Tracer)


def is_known(size: Any) -> bool:
    """Whether a size is a number, rather than a symbol of a program that is exported."""
    return isinstance(size, int)


def is_real_dtype(dtype: np.dtype, *, allows_bool: bool = False) -> bool:
    """Whether numbers of `dtype` are real, those of JAX's own dtypes included."""
    kinds = [jnp.integer, jnp.floating, *[jnp.bool_] * allows_bool]
    # To NumPy, a time difference is an integer.
    return any(jnp.issubdtype(dtype, kind) for kind in kinds) and dtype.kind != "m"


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises `ValueError` unless `value` is one of those of the type `Literal[...]`."""
    names = get_args(choices)
    # 1.0 and True are equal to 1.
    if not any(type(value) is type(name) and value == name for name in names):
        rule = ", ".join(map(repr, names))
        raise ValueError(f"{name} must be one of {rule}, but is {value!r}.")


def real_array(
    name: str,
    value: Any,
    *,
    minimum: float = 0.0,
    includes_minimum: bool = False,
    maximum: float = math.inf,
    unit: str = "",
) -> Float[np.ndarray, "..."]:
    """Finite numbers of any shape within the limits, as float64; `TypeError` for what is no
    number or array of numbers, `ValueError` for numbers beyond the limits."""
    try:
        numbers = np.asarray(value)
    except ValueError:
        # A ragged list.
        numbers = np.asarray(None)
    if not is_real_dtype(numbers.dtype) or isinstance(value, np.ma.MaskedArray):
        kind = f"a number of {unit}" if unit else "a number"
        text = repr(value)
        if numbers.size > _SHOWN:
            text = f"a {type(value).__name__} of {numbers.dtype}"
        raise TypeError(f"{name} must be {kind}, but is {text}.")
    numbers = numbers.astype(np.float64)
    is_above = (numbers >= minimum) if includes_minimum else (numbers > minimum)
    is_within = is_above & np.isfinite(numbers) & (numbers <= maximum)
    if not np.all(is_within):
        lower = "zero or positive and " if includes_minimum else "positive and "
        lower = f"at least {minimum:g} and " if minimum else lower
        lower = "" if minimum == -math.inf else lower
        upper = f"at most {maximum:g} {unit}".strip()
        if maximum == math.inf:
            upper = f"finite{unit and ', in ' + unit}"
        text = repr(value)
        if numbers.size > _SHOWN:
            first = tuple(np.argwhere(~is_within)[0].tolist())
            count = np.count_nonzero(~is_within)
            text = f"{numbers[first]:g} at {first}, the first of {count} such"
        raise ValueError(f"{name} must be {lower}{upper}, but is {text}.")
    return numbers


def checked_number(name: str, value: Any, **limits: Any) -> float:
    """One number; see `real_array`."""
    if np.ndim(value):
        raise TypeError(f"{name} must be one number, but is {value!r}.")
    return float(real_array(name, value, **limits))


def checked_count(name: str, value: Any, minimum: int = 1, remedy: str = "") -> int:
    """A whole number from `minimum` on."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or value < minimum:
        raise ValueError(
            f"{name} must be a whole number from {minimum} on, but is {value!r}"
            f"{remedy and '; ' + remedy}."
        )
    return int(value)
