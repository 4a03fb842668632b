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

from .background import Background
from .base import AbstractEstimator
from .channels import working_dtype
from .checks import check_choice, is_known, is_traced
from .radii import channel_radii, check_channel_count


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

    _radii: tuple[Radii, ...] = eqx.field(static=True)
    noise: OpeningNoise = eqx.field(static=True)

    _saved_names = ("radii_pix", "noise")

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
        check_choice("noise", noise, OpeningNoise)
        radii = channel_radii(radii_pix)
        if is_traced(radii):
            raise TypeError(
                "The radii of an opening set the size of its ellipse and must be static, "
                "but are traced; give Python numbers."
            )
        rows = np.broadcast_to(radii, (len(radii), 2)).tolist()
        self._radii = tuple((y, x) for y, x in rows)
        self.noise = noise

    @property
    def radii_pix(self) -> Float[np.ndarray, "channels 2"]:
        """The half axes (y, x) in pixels, a row a channel; one row serves all."""
        return np.array(self._radii)

    @property
    def halo_frames(self) -> int:
        """0, since each frame is estimated by itself."""
        return 0

    def estimate_stack(self, frames: Shaped[Array, "*batch height width"]) -> Background:
        """The background of one stack; see `__call__`."""
        (estimate,) = self._stack_functions(1)
        return estimate(frames)

    def _stack_functions(self, count: int) -> list[Callable[..., Background]]:
        check_channel_count(len(self._radii), count)
        rows = self._radii * (count // len(self._radii))
        return [ft.partial(self._estimate_channel, row) for row in rows]

    def _estimate_channel(
        self, radii: Radii, frames: Shaped[Array, "*batch height width"]
    ) -> Background:
        noise = 1.0 if self.noise == "unit" else _simulated_noise(*radii)
        bkgds = _opened(frames, radii)
        return Background(bkgds, jnp.asarray(noise, bkgds.dtype))


@ft.partial(jax.jit, static_argnames="radii")
def _opened(
    frames: Shaped[Array, "*batch height width"], radii: Radii
) -> Float[Array, "*batch height width"]:
    frames = frames.astype(working_dtype(frames))
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
    radii: Float[np.ndarray, "2"], shape: tuple[Any, ...]
) -> Int[np.ndarray, "offsets 2"]:
    """The offsets (y, x) of the pixels in an ellipse, as far as frames of a shape go:
    beyond, edges are repeated."""
    reach = [
        min(int(radius), size - 1) if is_known(size) else int(radius)
        for radius, size in zip(radii, shape, strict=True)
    ]
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
        opened = np.asarray(_opened(jnp.asarray(noise), radii))
    return float(np.std(noise - opened) / np.std(noise))
