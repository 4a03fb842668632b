"""The grey opening of each frame: the background of `smlmlp.bkgd_spatial_opening`."""

import functools as ft
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from .._filter.kernels import Frames, Image
from .background import Background
from .base import AbstractEstimator
from .channels import working_dtype
from .checks import check_choice, is_known, is_traced
from .radii import channel_radii, rows_of_channels


OpeningNoise = Literal["simulated", "unit"]
Radii = tuple[float, float]


class SpatialOpening(AbstractEstimator):
    """The background of each frame: its grey opening by an ellipse, which is that of
    `smlmlp.bkgd_spatial_opening`.

    Structure smaller than the ellipse disappears. The level is that of the darkest pixels,
    below the background by a few deviations of the noise. Borders repeat the edge pixel. A
    NaN reaches the pixels whose ellipses cover it, and no others. Nothing is learned.
    """

    _radii: tuple[Radii, ...] = eqx.field(static=True)
    noise: OpeningNoise = eqx.field(static=True)

    _saved_names = ("radii_pix", "noise")

    def __init__(self, radii_pix: Any = 3.0, *, noise: OpeningNoise = "simulated"):
        """**Arguments:**

        - `radii_pix`: the half axes of the ellipse in pixels, static: a number, a `(y, x)`
            pair, or a sequence of these, as for [`jaxbkgd.SpatialMean`][].
        - `noise`: `"simulated"` for the noise factor of white Gaussian noise, measured in a
            simulated frame to within 1 %; `"unit"` for 1, which smlmlp gives.

        **Raises:** `TypeError` or `ValueError` for what is not as above.
        """
        check_choice("noise", noise, OpeningNoise)
        radii = channel_radii(radii_pix)
        if is_traced(radii):
            raise TypeError("Radii of an opening must be static; give Python numbers.")
        rows = np.broadcast_to(radii, (len(radii), 2)).tolist()
        self._radii = tuple((y, x) for y, x in rows)
        self.noise = noise

    @property
    def halo_frames(self) -> int:
        """0, since each frame is estimated by itself."""
        return 0

    @property
    def radii_pix(self) -> Float[np.ndarray, "channels 2"]:
        """The half axes (y, x) in pixels, a row a channel; one row serves all."""
        return np.array(self._radii)

    def estimate_stack(self, frames: Shaped[Array, "*batch height width"]) -> Background:
        """The background of one stack; see `__call__`."""
        (estimate,) = self._stack_functions(1)
        return estimate(frames)

    def _stack_functions(self, count: int) -> list[Callable[..., Background]]:
        rows = rows_of_channels(self._radii, count)
        return [ft.partial(self._estimate_channel, row) for row in rows]

    def _estimate_channel(self, radii: Radii, frames: Frames) -> Background:
        noise = 1.0 if self.noise == "unit" else _simulated_noise(radii)
        bkgds = _opening(frames, radii)
        return Background(bkgds, jnp.asarray(noise, bkgds.dtype))


@ft.partial(jax.jit, static_argnames="radii")
def _opening(frames: Frames, radii: Radii) -> Image:
    frames = frames.astype(working_dtype(frames))
    shape = frames.shape[-2:]
    offsets = _ellipse(radii, shape)

    # For a gradient, no more than one frame's minima and maxima are held.
    @jax.checkpoint
    def open_frame(frame):
        eroded = _chosen_near(jnp.minimum, offsets, frame)
        return _chosen_near(jnp.maximum, offsets, eroded)

    stack = frames.reshape(-1, *shape)
    in_turn = ft.partial(lax.map, open_frame)
    opened = lax.platform_dependent(stack, cpu=in_turn, default=jax.vmap(open_frame))
    return opened.reshape(frames.shape)


def _chosen_near(
    choose: Callable[[Array, Array], Array],
    offsets: Int[np.ndarray, "offsets 2"],
    frame: Float[Array, "height width"],
) -> Float[Array, "height width"]:
    """The least or largest of the pixels at the offsets from each one."""
    reach = offsets.max(axis=0)
    padded = jnp.pad(frame, [(size, size) for size in reach], mode="edge")

    def step(chosen, start):
        return choose(chosen, lax.dynamic_slice(padded, start, frame.shape)), None

    return lax.scan(step, frame, offsets + reach)[0]


def _ellipse(radii: Radii, shape: tuple[Any, ...]) -> Int[np.ndarray, "offsets 2"]:
    """The offsets (y, x) of the pixels in an ellipse, as far as frames of a shape go:
    beyond, edges are repeated."""
    sizes = [size if is_known(size) else np.inf for size in shape]
    y_reach, x_reach = (
        int(min(radius, size - 1)) for radius, size in zip(radii, sizes, strict=True)
    )
    y, x = np.ogrid[-y_reach : y_reach + 1, -x_reach : x_reach + 1]
    # In diameters, as smlmlp has it, so that the same pixels on the ellipse are inside.
    inside = (y / (2 * radii[0])) ** 2 + (x / (2 * radii[1])) ** 2 <= 1 / 4
    return np.argwhere(inside) - (y_reach, x_reach)


@ft.lru_cache(maxsize=64)
def _simulated_noise(radii: Radii) -> float:
    """The deviation of `noise - opening` over that of white Gaussian noise, for which
    there is no formula."""
    noise = np.random.default_rng(0).standard_normal((512, 512), np.float32)
    with jax.ensure_compile_time_eval():
        opened = np.asarray(_opening(jnp.asarray(noise), radii))
    return float(np.std(noise - opened) / np.std(noise))
