"""Averaging radii: as users give them, checked, and as optimizers move them."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float


# Wider than any camera: beyond it a radius is a mistake, and taps fill the memory.
LARGEST_RADIUS_PIX = 1e5

_NUMBERS = (jnp.integer, jnp.floating)


def channel_radii(radii_pix: Any, unit: str = "pixels") -> Any:
    """Radii as an array (channels or 1, 2 or 1), a NumPy array where they are known.

    Accepts a number, a pair (y, x), or a sequence with a number or pair a channel; two
    numbers are a pair.
    """
    radii: Any = _stacked(radii_pix, unit)
    if radii.shape == (2,):
        radii = radii[None, :]
    elif radii.ndim < 2:
        radii = radii.reshape((-1, 1))
    if radii.size == 0 or radii.ndim != 2 or radii.shape[1] > 2:
        raise ValueError(
            "Radii must be a number, a (y, x) pair, or one of these for each channel, but "
            f"got {radii_pix!r}."
        )
    return radii


def _stacked(radii_pix: Any, unit: str) -> Any:
    if not isinstance(radii_pix, list | tuple):
        return _checked_radii(radii_pix, unit)
    entries = [_stacked(entry, unit) for entry in radii_pix]
    xp = jnp if any(map(is_traced, entries)) else np
    shapes = {entry.shape for entry in entries}
    if shapes == {(), (2,)}:
        # Numbers beside pairs.
        entries = [xp.broadcast_to(entry, (2,)) for entry in entries]
    elif len(shapes) != 1:
        raise ValueError(
            f"Each channel needs one radius or a (y, x) pair, but got {radii_pix!r}."
        )
    return xp.stack(entries)


def _checked_radii(radii_pix: Any, unit: str) -> Any:
    radii = radii_pix if is_traced(radii_pix) else np.asarray(radii_pix)
    is_number = any(jnp.issubdtype(radii.dtype, kind) for kind in _NUMBERS)
    if not is_number or isinstance(radii_pix, np.ma.MaskedArray):
        raise TypeError(
            f"A radius must be a number of {unit}, but got {radii_pix!r}; give a number, "
            "or a (y, x) pair of pixels."
        )
    if is_traced(radii):
        return radii
    if not np.all((radii > 0) & (radii <= LARGEST_RADIUS_PIX)):
        raise ValueError(
            f"A radius must be positive and at most {LARGEST_RADIUS_PIX:g} {unit}, but "
            f"got {radii_pix!r}."
        )
    # All kernels so small have one tap; in float32 the radius would round to zero.
    return np.maximum(radii.astype(np.float64), 1e-30)


def unbounded_radii(radii: Any, bounds: Any) -> Float[Array, "channels axes"]:
    """`logit(radius / bound)`, so that no number is beyond the bound or below zero."""
    xp = jnp if is_traced(radii) else np
    # In NumPy, and so in float64, where the radii are known: they come back exactly.
    return jnp.asarray(xp.log(radii / bounds) - xp.log1p(-radii / bounds))


def bounded_radii(
    unbounded: Float[Array, "channels axes"],
    bounds: Any,
    frozen: tuple[tuple[bool, ...], ...],
) -> Float[Array, "channels axes"]:
    """The radii that these numbers stand for; where frozen, without a derivative."""
    unbounded = jnp.where(np.array(frozen), lax.stop_gradient(unbounded), unbounded)
    share = jax.nn.sigmoid(unbounded)
    # Far out, the sigmoid rounds to 0 or 1.
    return bounds * jnp.clip(share, 1e-12, 1 - jnp.finfo(share.dtype).epsneg)


def frozen_mask(frozen: Any, shape: tuple[int, ...]) -> tuple[tuple[bool, ...], ...]:
    """A boolean for each radius of an array `(channels, axes)`."""
    rows = list(frozen) if isinstance(frozen, list | tuple | np.ndarray) else [frozen]
    if shape[0] == 1 and len(rows) > 1:
        rows = [rows]
    try:
        mask = np.stack([np.broadcast_to(row, shape[1]) for row in rows])
        mask = np.broadcast_to(mask, shape)
    except ValueError:
        mask = np.array(None)
    if mask.dtype != bool:
        raise ValueError(
            "frozen must be True or False, or have a row of these for each channel, as the "
            f"radii are, which have shape (channels, axes) {shape}, but is {frozen!r}."
        )
    return tuple(map(tuple, mask.tolist()))


def check_below(bound: float, radii: Any, name: str = "max_radius_pix") -> None:
    leaves = [leaf for leaf in jax.tree.leaves(radii) if not is_traced(leaf)]
    if any(np.max(leaf) > bound for leaf in leaves):
        raise ValueError(
            f"No radius may exceed what {name} allows, {bound:g}, but got {radii!r}; raise "
            f"{name}."
        )


def check_bound(max_radius: Any, name: str = "max_radius_pix") -> float:
    if is_traced(max_radius):
        raise TypeError(
            f"{name} sets the number of taps and must be static, but is traced; give a "
            "Python number."
        )
    bound = np.asarray(max_radius)
    if bound.dtype.kind not in "iuf" or bound.ndim:
        raise TypeError(f"{name} must be one number, but is {max_radius!r}.")
    if not 0 < bound <= LARGEST_RADIUS_PIX:
        raise ValueError(
            f"{name} must be positive and at most {LARGEST_RADIUS_PIX:g}, but is "
            f"{max_radius!r}."
        )
    return float(bound)


def check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, but is "
            f"{value!r}."
        )


def known(radii: np.ndarray | Array, bound_name: str = "max_radius_pix") -> np.ndarray:
    if is_traced(radii):
        raise ValueError(
            f"A traced radius needs {bound_name}, a static bound that sets the number of "
            "taps; give one, for example four times the radius that you expect."
        )
    return np.asarray(radii)


def is_traced(value: Any) -> bool:
    return isinstance(value, Tracer)
