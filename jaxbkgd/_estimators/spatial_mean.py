"""The local mean of each frame by itself: the background of `smlmlp.bkgd_spatial_mean`."""

import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from .._filter.engines import halo_lines
from .._filter.kernels import (
    GaussianKernel,
    half_width,
    noise_factor,
    NoiseKind,
    Truncation,
)
from .._filter.primitive import separable_filter
from .._filter.vectors import jit_in_full_width
from .base import AbstractEstimator, as_frames, Background, Channels, map_channels
from .radii import (
    bounded_radii,
    channel_radii,
    check_below,
    check_bound,
    check_choice,
    frozen_mask,
    is_traced,
    known,
    LARGEST_RADIUS_PIX,
    unbounded_radii,
)
from .saved import decimals, saved, saved_fields


# What a module is kept with, beside its radii.
_SAVED_NAMES = ("max_radius_pix", "truncation", "noise", "frozen")

# The static halves of one channel's kernels, (y, x).
KernelPair = tuple[GaussianKernel, GaussianKernel]


def spatial_mean(
    frames: Any,
    radius_pix: Any,
    *,
    max_radius_pix: int | float | None = None,
    truncation: Truncation = "hard",
) -> Float[Array, "*batch height width"]:
    """The background of each frame: its mean under a Gaussian of `sigma = radius / 2`.

    With "hard" truncation this is `smlmlp.bkgd_spatial_mean`, whose definition it
    follows; with "smooth" truncation it is continuous in the radius, for learning.
    Borders repeat the edge pixel. A NaN or an infinity reaches the pixels whose kernel
    covers it, and no others.

    **Arguments:**

    - `frames`: `(..., height, width)`, of any real dtype.
    - `radius_pix`: the averaging radius in pixels, a number or a `(y, x)` pair.
    - `max_radius_pix`: a static bound for the radius, which sets the number of taps. It
        is needed where the radius is traced (under `jax.jit` or `jax.grad`); otherwise
        the radius itself sets the number of taps.
    - `truncation`: `"hard"` or `"smooth"`.

    **Returns:**

    The background, of the shape of the frames and in their unit: float64 for float64
    frames, which JAX has in 64-bit mode only, and float32 for all others.

    **Raises:**

    `TypeError` or `ValueError` for frames that are not real or have fewer than two axes,
    a radius that is not positive and finite or exceeds its bound, and a traced radius
    without a bound.

    !!! example

        ```python
        >>> import jaxbkgd
        >>> import jax.numpy as jnp
        >>> frames = jnp.full((10, 64, 64), 100, jnp.uint16)
        >>> jaxbkgd.spatial_mean(frames, 7.0).shape
        (10, 64, 64)
        >>> jaxbkgd.spatial_mean(frames, (6.0, 10.0)).dtype
        dtype('float32')

        ```
    """
    frames = as_frames(frames)
    radii, kernels = _pair_and_kernels(radius_pix, max_radius_pix, truncation)
    return filtered(frames, radii, kernels)


def noise_correction(
    radius_pix: Any,
    *,
    max_radius_pix: int | float | None = None,
    truncation: Truncation = "hard",
    kind: NoiseKind = "exact",
) -> Float[Array, ""]:
    """The standard deviation of `frame - spatial_mean(frame)` over that of the frame, for
    noise that is independent from pixel to pixel, away from the borders. The formula is
    derived in [How it works](how-it-works.md#the-noise-factor).

    **Arguments:**

    - `radius_pix`, `max_radius_pix`, `truncation`: as in [`jaxbkgd.spatial_mean`][].
    - `kind`: `"exact"` is the norm of the residual's kernel, `||delta - g_y (x) g_x||`.
        `"separable"` is `||delta - g_y|| ||delta - g_x||`, the factor that
        `smlmlp.bkgd_spatial_mean` gives; it is too small (0.85 for 0.99 at 7 px).

    **Returns:**

    The factor, a scalar without unit, differentiable in the radius.

    **Raises:**

    As [`jaxbkgd.spatial_mean`][] does for the radius.

    !!! example

        ```python
        >>> import jaxbkgd
        >>> round(float(jaxbkgd.noise_correction(7.0)), 3)
        0.99
        >>> round(float(jaxbkgd.noise_correction(7.0, kind="separable")), 3)
        0.853

        ```
    """
    check_choice("kind", kind, NoiseKind)
    radii, kernels = _pair_and_kernels(radius_pix, max_radius_pix, truncation)
    return _noise(radii, kernels, kind)


class SpatialMean(AbstractEstimator):
    """[`jaxbkgd.spatial_mean`][] as a module whose radii are learned.

    The radii are its only inexact array, `unbounded_radii`, so that
    `equinox.filter_grad` and optax train them and nothing else. They are stored as
    `logit(radius / max_radius_pix)`, so that no step of an optimizer leaves the open
    interval from 0 to `max_radius_pix`. Below 0.39 px a smooth kernel has one tap, and no
    gradient leads out of there: start above 1 px.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import jaxbkgd
        >>> frames = jnp.full((10, 64, 64), 100.0)
        >>> background = jaxbkgd.SpatialMean(7.0)(frames)
        >>> background.bkgds.shape
        (10, 64, 64)
        >>> background.snr(frames, gains=2.0).shape
        (10, 64, 64)

        ```

    To replace the radii, take another module's with the same bound:

    !!! example

        ```python
        >>> import equinox as eqx
        >>> import jaxbkgd
        >>> module = jaxbkgd.SpatialMean(7.0)
        >>> other = jaxbkgd.SpatialMean(5.0, max_radius_pix=module.max_radius_pix)
        >>> where = lambda module: module.unbounded_radii
        >>> eqx.tree_at(where, module, where(other)).radii_pix.round(3).tolist()
        [[5.0, 5.0]]

        ```

    Saved by `to_json`, a module is whole. What `eqx.tree_serialise_leaves` saves are shares
    of `max_radius_pix`, to be loaded into a module with the same bound.
    """

    unbounded_radii: Float[Array, "channels axes"]
    max_radius_pix: float = eqx.field(static=True)
    truncation: Truncation = eqx.field(static=True)
    noise: NoiseKind = eqx.field(static=True)
    frozen: tuple[tuple[bool, ...], ...] = eqx.field(static=True)

    def __init__(
        self,
        radii_pix: Any = 7.0,
        *,
        max_radius_pix: int | float | None = None,
        truncation: Truncation = "smooth",
        noise: NoiseKind = "exact",
        frozen: Any = False,
    ):
        """**Arguments:**

        - `radii_pix`: the initial averaging radii in pixels: a number for all channels
            and both axes, which stay equal as they are learned; a `(y, x)` pair for all
            channels; or a sequence with one number or pair for each channel. Two
            numbers are a pair, never two channels.
        - `max_radius_pix`: a static bound above all radii. Where these are traced, it sets
            the number of taps, and so the cost. By default four times the largest initial
            radius.
        - `truncation`: `"smooth"`, or `"hard"` for the taps of smlmlp, whose gradient
            misses the jumps where a tap enters.
        - `noise`: the kind of noise factor; see [`jaxbkgd.noise_correction`][].
        - `frozen`: the radii that are not learned, whose gradient is zero: a boolean for
            all, a pair of them beside a pair of radii, or one or a pair for each channel.
            Weight decay [moves them all the same](faq.md#how-do-i-freeze-radii).

        **Raises:**

        `TypeError` or `ValueError` for radii that are not positive and finite, are not
        below the bound, or are traced without a bound.
        """
        check_choice("truncation", truncation, Truncation)
        check_choice("noise", noise, NoiseKind)
        radii = channel_radii(radii_pix)
        if max_radius_pix is None:
            max_radius_pix = min(4 * float(np.max(known(radii))), LARGEST_RADIUS_PIX)
        bound = check_bound(max_radius_pix)
        check_below(np.nextafter(bound, 0), radii_pix)
        self.unbounded_radii = unbounded_radii(radii, bound)
        self.max_radius_pix = bound
        self.truncation = truncation
        self.noise = noise
        self.frozen = frozen_mask(frozen, radii.shape)

    @property
    def halo_frames(self) -> int:
        """0, since each frame is estimated by itself."""
        return 0

    @property
    def radii_pix(self) -> Float[Array, "channels 2"]:
        """The averaging radii (y, x) in pixels, a row a channel; one row serves all."""
        radii = bounded_radii(self.unbounded_radii, self.max_radius_pix, self.frozen)
        return jnp.broadcast_to(radii, (radii.shape[0], 2))

    def __call__(self, channels: Channels) -> Background:
        """**Arguments:**

        - `channels`: one stack of frames `(..., height, width)`, or a list or tuple of
            them, one a channel, of any shapes and real dtypes.

        **Returns:**

        A [`jaxbkgd.Background`][] with the structure of `channels`.

        **Raises:**

        `TypeError` or `ValueError` for channels that are not as above, or are not as
        many as the module has radii for.
        """
        # Where the radii are known, there are no more taps than they need.
        is_known = not is_traced(self.unbounded_radii)
        kernels = self._known_kernels() if is_known else self._kernels()
        return self._filtered_with(kernels, channels)

    def for_inference(self) -> AbstractEstimator:
        """The same, with taps for these radii and no others, also where it is compiled."""
        return _WithKnownRadii(self, self._known_kernels())

    def _kernels(self) -> tuple[KernelPair, ...]:
        """For any radii below the bound."""
        kernel = _bounded_kernel(self.max_radius_pix, self.truncation)
        return ((kernel, kernel),)

    def _known_kernels(self) -> tuple[KernelPair, ...]:
        """A pair for each row of radii."""
        with jax.ensure_compile_time_eval():
            rows = np.asarray(self.radii_pix, np.float64)
        if not np.all(np.isfinite(rows)):
            return self._kernels()
        return tuple(_known_pair(row, self.truncation) for row in rows)

    def _filtered_with(
        self,
        kernels: tuple[KernelPair, ...],
        channels: Channels,
        spent: Channels | None = None,
    ) -> Background:
        """The background under the module's radii, by kernels that hold them."""
        frames = map_channels(as_frames, channels)
        is_list = isinstance(frames, list | tuple)
        count = len(frames) if is_list else 1
        # What XLA computes of constants as it compiles is a bit off what it computes later.
        radii = lax.optimization_barrier(self.radii_pix)
        if radii.shape[0] not in (1, count):
            raise ValueError(
                f"This module has radii for {radii.shape[0]} channels, but was given "
                f"{count}; give a list with one stack for each channel."
            )
        filters = [
            ft.partial(_background, radii=row, kernels=pair, noise=self.noise)
            for row, pair in zip(
                jnp.broadcast_to(radii, (count, 2)),
                kernels * (count // len(kernels)),
                strict=True,
            )
        ]
        backgrounds = map_channels(
            lambda frames, filter, spent: filter(frames, spent=spent),
            frames,
            filters if is_list else filters[0],
            [None] * count if is_list and spent is None else spent,
        )
        return Background(
            map_channels(lambda one: one.bkgds, backgrounds),
            map_channels(lambda one: one.noise_corrections, backgrounds),
        )

    def to_json(self) -> str:
        """The module as a JSON text, to be kept in a file and read by `from_json`."""
        radii = np.asarray(self.radii_pix)[:, : self.unbounded_radii.shape[1]]
        fields = {"radii_pix": decimals(radii)} | {
            name: getattr(self, name) for name in _SAVED_NAMES
        }
        return saved("SpatialMean", fields)

    @classmethod
    def from_json(cls, text: str) -> "SpatialMean":
        """The module that `to_json` wrote as `text`. Names that it does not know are passed
        over.

        **Raises:**

        `ValueError` for a text that is no such module, or is of a later version.

        !!! example

            ```python
            >>> import jaxbkgd
            >>> text = jaxbkgd.SpatialMean(5.0).to_json()
            >>> jaxbkgd.SpatialMean.from_json(text).radii_pix.round(3).tolist()
            [[5.0, 5.0]]

            ```
        """
        fields = saved_fields("SpatialMean", text, ("radii_pix", *_SAVED_NAMES))
        try:
            check_bound(fields["max_radius_pix"])
            # Rows, one a channel: two numbers in a list would be a pair.
            return cls(np.array(fields.pop("radii_pix")), **fields)
        except TypeError as error:
            raise ValueError(f"This JSON does not fit a module. {error}") from error

    def __repr__(self) -> str:
        if not isinstance(self.unbounded_radii, jax.Array) or is_traced(
            self.unbounded_radii
        ):
            return super().__repr__()
        radii = [[float(f"{r:.6g}") for r in row] for row in np.asarray(self.radii_pix)]
        return (
            f"SpatialMean(radii_pix={radii}, max_radius_pix={self.max_radius_pix}, "
            f"truncation={self.truncation!r}, noise={self.noise!r}, frozen={self.frozen}, "
            f"unbounded_radii={np.asarray(self.unbounded_radii).tolist()})"
        )


class _WithKnownRadii(AbstractEstimator):
    """A module whose radii stay, so that it needs no taps for others."""

    takes_donated: ClassVar[bool] = True

    module: SpatialMean
    kernels: tuple[KernelPair, ...] = eqx.field(static=True)

    @property
    def halo_frames(self) -> int:
        return self.module.halo_frames

    @property
    def halo_lines(self) -> int | None:
        """Of the widest kernel, see `jaxbkgd._filter.engines.halo_lines`."""
        return halo_lines(
            max(kernel.half_width for pair in self.kernels for kernel in pair)
        )

    def __call__(
        self, channels: Channels, *, donated: Channels | None = None
    ) -> Background:
        """As the module; over `donated`, backgrounds of such channels that are not needed any
        longer, it may write the new ones."""
        return self.module._filtered_with(self.kernels, channels, donated)


def _background(
    frames: Shaped[Array, "*batch height width"],
    radii: Float[Array, "2"],
    kernels: KernelPair,
    noise: NoiseKind,
    spent: Float[Array, "*batch height width"] | None,
) -> Background:
    """Of one channel."""
    bkgds = filtered(frames, radii, kernels, spent)
    return Background(bkgds, _noise(radii, kernels, noise))


@ft.partial(jit_in_full_width, static_argnames="kernels")
def filtered(
    frames: Shaped[Array, "*batch height width"],
    radii: Float[Array, "2"],
    kernels: KernelPair,
    spent: Float[Array, "*batch height width"] | None = None,
) -> Float[Array, "*batch height width"]:
    """The frames filtered with the kernels (y, x) at the radii (y, x)."""
    dtype = jnp.float64 if frames.dtype == jnp.float64 else jnp.float32
    if jnp.issubdtype(frames.dtype, jnp.floating):
        # Integers are converted in the filter, a frame at a time.
        frames = frames.astype(dtype)
    if spent is not None and spent.dtype != dtype:
        spent = None
    return separable_filter(frames, list(radii.astype(dtype)), kernels, spent=spent)


@ft.partial(jax.jit, static_argnames=("kernels", "kind"))
def _noise(
    radii: Float[Array, "2"],
    kernels: KernelPair,
    kind: NoiseKind,
) -> Float[Array, ""]:
    taps_y, taps_x = (
        kernel.taps(radius) for kernel, radius in zip(kernels, radii, strict=True)
    )
    return noise_factor([taps_y, taps_x], kind)


def _pair_and_kernels(radius_pix, max_radius_pix, truncation):
    """The radii (y, x) of one channel, and the static halves of their kernels."""
    check_choice("truncation", truncation, Truncation)
    radii = channel_radii(radius_pix)
    if radii.shape[0] != 1:
        raise ValueError(
            f"radius_pix must be a number or a (y, x) pair, but got {radius_pix!r}; "
            "`SpatialMean` takes radii for several channels."
        )
    if max_radius_pix is not None:
        bound = check_bound(max_radius_pix)
        check_below(bound, radius_pix)
        kernels = 2 * (_bounded_kernel(bound, truncation),)
    else:
        kernels = _known_pair(np.broadcast_to(known(radii), (1, 2))[0], truncation)
    return jnp.broadcast_to(jnp.asarray(radii, float), (1, 2))[0], kernels


def _known_pair(radii_pix: np.ndarray, truncation: Truncation) -> KernelPair:
    y, x = (
        GaussianKernel(half_width(radius, truncation), truncation) for radius in radii_pix
    )
    return y, x


def _bounded_kernel(bound: float, truncation: Truncation) -> GaussianKernel:
    return GaussianKernel(half_width(bound, truncation), truncation, is_bound=True)
