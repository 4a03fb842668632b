"""Averaging radii: as users give them, checked, and as optimizers move them."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .checks import checked_number, is_real_dtype, is_traced, real_array


# Wider than any camera: beyond it a radius is a mistake, and taps fill the memory.
LARGEST_RADIUS_PIX = 1e5


def channel_radii(radii_pix: Any, unit: str = "pixels") -> Any:
    """Radii as an array (channels or 1, 2 or 1), a NumPy array where they are known, from a
    number, a pair (y, x), or a sequence with a number or pair a channel; two numbers are a
    pair."""
    radii: Any = _stack_radii(radii_pix, unit)
    if radii.ndim < 2:
        radii = radii.reshape((1, 2) if radii.shape == (2,) else (-1, 1))
    if radii.size == 0 or radii.ndim != 2 or radii.shape[1] > 2:
        rule = "Radii must be a number, a (y, x) pair, or one of these for each channel"
        raise ValueError(f"{rule}, but got {radii_pix!r}.")
    return radii


def _stack_radii(radii_pix: Any, unit: str) -> Any:
    if isinstance(radii_pix, list | tuple):
        entries = [_stack_radii(entry, unit) for entry in radii_pix]
        xp = jnp if any(map(is_traced, entries)) else np
        shapes = {entry.shape for entry in entries}
        if shapes == {(), (2,)}:
            entries = [xp.broadcast_to(entry, (2,)) for entry in entries]
        elif len(shapes) != 1:
            rule = "Each channel needs one radius or a (y, x) pair"
            raise ValueError(f"{rule}, but got {radii_pix!r}.")
        return xp.stack(entries)
    if is_traced(radii_pix) and is_real_dtype(radii_pix.dtype):
        return radii_pix
    radii = real_array("A radius", radii_pix, maximum=LARGEST_RADIUS_PIX, unit=unit)
    # All kernels so small have one tap; in float32 the radius would round to zero.
    return np.maximum(radii, 1e-30)


def unbounded_radii(radii: Any, bounds: Any) -> Float[Array, "channels axes"]:
    """`logit(radius / bound)`, so that no number is beyond the bound or below zero."""
    xp = jnp if is_traced(radii) else np
    # In NumPy, and so in float64, where the radii are known: they come back exactly.
    return jnp.asarray(xp.log(radii / bounds) - xp.log1p(-radii / bounds))


@ft.partial(jax.jit, static_argnames=("bounds", "frozen"))
def bounded_radii(
    unbounded: Float[Array, "channels stored"],
    bounds: tuple[float, ...],
    frozen: bool | tuple[tuple[bool, ...], ...],
) -> Float[Array, "channels axes"]:
    """The radii that these numbers stand for, one for each bound; the last number stands
    for y and x where they share a radius. Frozen ones have no derivative."""
    unbounded = jnp.where(np.array(frozen), lax.stop_gradient(unbounded), unbounded)
    share = jax.nn.sigmoid(unbounded)
    # Far out, the sigmoid rounds to 0 or 1.
    share = jnp.clip(share, 1e-12, 1 - jnp.finfo(share.dtype).epsneg)
    stored = unbounded.shape[1]
    radii = jnp.asarray([bounds[:stored]], share.dtype) * share
    return jnp.concatenate([radii, radii[:, -1:]], 1) if stored < len(bounds) else radii


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
        rule = f"a row of these for each channel, as radii of (channels, axes) {shape}"
        raise ValueError(f"frozen must be True or False, or {rule}, but is {frozen!r}.")
    return tuple(map(tuple, mask.tolist()))


def rows_of_channels(rows: Any, channel_count: int, name: str = "radii") -> list[Any]:
    """The row of each channel, of which one may serve all."""
    if len(rows) not in (1, channel_count):
        counts = f"{name} for {len(rows)} channels, but was given {channel_count}"
        raise ValueError(f"This module has {counts}; give a list with a stack for each.")
    return list(rows) * (channel_count // len(rows))


def bound_of(radii: Any, bound: Any, name: str = "max_radius_pix") -> float:
    """`bound`, or four times the largest of known radii if it is `None`."""
    if bound is None and is_traced(radii):
        raise ValueError(
            f"A traced radius needs {name}, a static bound that sets the number of taps; "
            "give one, for example four times the radius that you expect."
        )
    if bound is None:
        return min(4 * float(np.max(radii)), LARGEST_RADIUS_PIX)
    if is_traced(bound):
        raise TypeError(f"{name} must be static, but is traced; give a Python number.")
    return checked_number(name, bound, maximum=LARGEST_RADIUS_PIX)


def check_below(bound: float, radii: Any, name: str = "max_radius_pix") -> None:
    """Raises `ValueError` if a known radius exceeds the bound."""
    known = [leaf for leaf in jax.tree.leaves(radii) if not is_traced(leaf)]
    if any(np.max(radius) > bound for radius in known):
        raise ValueError(f"{name} is {bound:g}, but got {radii!r}; raise {name}.")
