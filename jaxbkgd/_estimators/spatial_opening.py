"""The grey opening of each frame: the background of `smlmlp.bkgd_spatial_opening`."""

import functools as ft
from collections.abc import Callable
from typing import Any, get_args, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from .base import AbstractEstimator, as_frames, Background, Channels, map_channels
from .radii import channel_radii


OpeningNoise = Literal["simulated", "unit"]

# One channel's radii (y, x).
Radii = tuple[float, float]


class SpatialOpening(AbstractEstimator):
    """The background of each frame: its grey opening by an ellipse, which is that of
    `smlmlp.bkgd_spatial_opening`.

    It is the maximum, over the ellipses that hold a pixel, of their minima: what is
    smaller than the ellipse disappears. Its level is that of the darkest pixels, below the
    background by a few deviations of the noise. Borders repeat the edge pixel. A NaN
    reaches the pixels whose ellipses cover it, and no others. Nothing is learned; the
    gradient with respect to the frames is that of minima and maxima.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import jaxbkgd
        >>> frames = jnp.full((10, 64, 64), 100.0).at[:, 20:25, 30:35].add(700.0)
        >>> background = jaxbkgd.SpatialOpening(3.0)(frames)
        >>> bool((background.bkgds == 100).all())
        True

        ```
    """

    radii_pix: tuple[Radii, ...] = eqx.field(static=True)
    noise: OpeningNoise = eqx.field(static=True)

    def __init__(self, radii_pix: Any = 3.0, *, noise: OpeningNoise = "simulated"):
        """**Arguments:**

        - `radii_pix`: the half axes of the ellipse in pixels: a number for all channels and
            both axes; a `(y, x)` pair for all channels; or a sequence with one number or
            pair for each channel. Two numbers are a pair, never two channels.
        - `noise`: `"simulated"` for the noise factor of white Gaussian noise, measured in a
            simulated frame to within 1 %; `"unit"` for 1, which smlmlp gives.

        **Raises:**

        `TypeError` or `ValueError` for radii that are not positive and finite, or are
        traced, and an unknown `noise`.
        """
        if noise not in get_args(OpeningNoise):
            raise ValueError(
                f"noise must be one of {get_args(OpeningNoise)}, but is {noise!r}."
            )
        radii = channel_radii(radii_pix)
        if isinstance(radii, Tracer):
            raise TypeError(
                "The radii of an opening set the size of its ellipse and must be static, "
                "but are traced; give Python numbers."
            )
        rows = np.broadcast_to(radii, (len(radii), 2)).tolist()
        self.radii_pix = tuple((y, x) for y, x in rows)
        self.noise = noise

    @property
    def halo_frames(self) -> int:
        """0, since each frame is estimated by itself."""
        return 0

    def __call__(self, channels: Channels) -> Background:
        """**Arguments:**

        - `channels`: one stack of frames `(..., height, width)`, or a list or tuple of
            them, one a channel.

        **Returns:**

        A [`jaxbkgd.Background`][] with the structure of `channels`, float64 for float64
        frames and float32 for all others.

        **Raises:**

        As [`jaxbkgd.SpatialMean`][] does for the channels.
        """
        is_list = isinstance(channels, list | tuple)
        count = len(channels) if is_list else 1
        if len(self.radii_pix) not in (1, count):
            raise ValueError(
                f"This module has radii for {len(self.radii_pix)} channels, but was given "
                f"{count}; give a list with one stack for each channel."
            )
        # Arrays, which are one each to map_channels.
        rows = [np.array(row) for row in self.radii_pix] * (count // len(self.radii_pix))
        radii = rows if is_list else rows[0]
        return Background(
            map_channels(_bkgd, channels, radii),
            map_channels(self._noise_correction, channels, radii),
        )

    def _noise_correction(self, _: Any, radii: Float[np.ndarray, "2"]) -> Array:
        is_unit = self.noise == "unit"
        return jnp.asarray(1 if is_unit else _simulated_noise(*radii.tolist()), float)


def _bkgd(
    channel: Any, radii: Float[np.ndarray, "2"]
) -> Float[Array, "*batch height width"]:
    frames = as_frames(channel)
    frames = frames.astype(jnp.promote_types(frames.dtype, jnp.float32))
    y, x = radii.tolist()
    return _opened(frames, (y, x))


@ft.partial(jax.jit, static_argnames="radii")
def _opened(
    frames: Float[Array, "*batch height width"], radii: Radii
) -> Float[Array, "*batch height width"]:
    shape = frames.shape[-2:]
    offsets = _ellipse(np.array(radii), shape)

    # For a gradient, no more than one frame's minima and maxima are held.
    @jax.checkpoint
    def open_frame(frame):
        eroded = _chosen_near(jnp.minimum, offsets, frame)
        return _chosen_near(jnp.maximum, offsets, eroded)

    return lax.map(open_frame, frames.reshape(-1, *shape)).reshape(frames.shape)


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


def _ellipse(
    radii: Float[np.ndarray, "2"], shape: tuple[int, ...]
) -> Int[np.ndarray, "offsets 2"]:
    """The offsets (y, x) of the pixels in an ellipse, as far as frames of a shape go:
    beyond, edges are repeated."""
    reach = np.minimum(radii.astype(int), np.array(shape) - 1)
    y, x = np.ogrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    # In diameters, as smlmlp has it, so that the same pixels on the ellipse are inside.
    diameters = 2 * radii
    inside = (y / diameters[0]) ** 2 + (x / diameters[1]) ** 2 <= 1 / 4
    return np.argwhere(inside) - reach


@ft.lru_cache(maxsize=64)
def _simulated_noise(*radii: float) -> float:
    """The deviation of `noise - opening` over that of white Gaussian noise, for which
    there is no formula."""
    noise = np.random.default_rng(0).standard_normal((512, 512), np.float32)
    with jax.ensure_compile_time_eval():
        opened = np.asarray(_bkgd(noise, np.array(radii)))
    return float(np.std(noise - opened) / np.std(noise))
