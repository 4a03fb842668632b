"""The local mean over time, y and x, in which molecules count less."""

import functools as ft
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from .._filter.kernels import GapKernel, GaussianKernel, half_width, noise_factor
from .._filter.primitive import separable_filter, temporal_filter
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
from .saved import decimals, present, saved, saved_fields
from .soft_clip import photon_variance, SoftClip, squared_noise


EdgeFrames = Literal["renormalised", "repeated"]

# Where the weights under a kernel add up to less, there is nothing to be the mean of.
_LEAST_TOTAL_WEIGHT = 1e-6

# A gain in electrons per ADU, and a read noise in electrons.
Camera = tuple[Any, Any]

_REAL_KINDS = (bool, jnp.integer, jnp.floating)

# The share of the background below which a deviation is rounding, not noise.
_ROUNDING = 1e-5


# What a module is kept with, beside its radii and its clip, and what a clip is.
_SAVED_NAMES = (
    "max_radius_pix",
    "max_radius_frames",
    "edge_frames",
    "skips_nan",
    "frozen",
)
_SAVED_CLIP_NAMES = (
    "threshold",
    "softness",
    "rounds",
    "molecule_radius_pix",
    "gains",
    "read_noise_electrons",
)


class _Kernels(NamedTuple):
    """The static halves of one channel's kernels, and of those along y and x for frames
    with pixels of twice the size."""

    time: GaussianKernel
    y: GaussianKernel
    x: GaussianKernel
    halved_y: GaussianKernel
    halved_x: GaussianKernel


def _kernels(radii: Sequence[float], *, is_bound: bool) -> _Kernels:
    """For radii (frames, y, x), or for all below them."""
    frames, y, x = radii
    return _Kernels(
        *(
            GaussianKernel(half_width(radius, "smooth"), "smooth", is_bound=is_bound)
            for radius in (frames, y, x, y / 2, x / 2)
        )
    )


class LocalMean(AbstractEstimator):
    """The mean of the frames under a Gaussian over time, y and x, in which molecules count
    less.

    It is `G(w f) / G(w)`, with frames f, weights w that clip molecules softly (see
    [`jaxbkgd.SoftClip`][]), and a separable Gaussian G whose standard deviations are half
    the radii, with the "smooth" truncation of [`jaxbkgd.spatial_mean`][]: a normalised
    convolution (Knutsson and Westin, CVPR 1993, 515). Borders repeat the edge pixel.

    The radii are learnable, and threshold and softness of the clip are. They are stored so
    that no step of an optimizer leaves their bounds.

    !!! example

        ```python
        >>> import jax
        >>> import jaxbkgd
        >>> frames, truth = jaxbkgd.simulate_movie(jax.random.key(0), frame_count=30)
        >>> background = jaxbkgd.LocalMean(7.0, 10.0)(frames - 100.0)
        >>> errors = background.bkgds - truth.bkgds_adu
        >>> bool(abs(errors.mean()) < 0.005 * truth.bkgds_adu.mean())
        True

        ```
    """

    takes_weights: ClassVar[bool] = True

    unbounded_radii: Float[Array, "channels axes"]
    clip: SoftClip | None
    max_radius_pix: float = eqx.field(static=True)
    max_radius_frames: float = eqx.field(static=True)
    edge_frames: EdgeFrames = eqx.field(static=True)
    skips_nan: bool = eqx.field(static=True)
    frozen: tuple[tuple[bool, ...], ...] = eqx.field(static=True)

    def __init__(
        self,
        radii_pix: Any = 7.0,
        radius_frames: Any = 10.0,
        *,
        clip: Any = 3.0,
        max_radius_pix: int | float | None = None,
        max_radius_frames: int | float | None = None,
        edge_frames: EdgeFrames = "renormalised",
        skips_nan: bool = False,
        frozen: Any = False,
    ):
        """**Arguments:**

        - `radii_pix`: the averaging radii in pixels: a number for all channels and both
            axes; a `(y, x)` pair for all channels; or a sequence with one number or pair
            for each channel. Two numbers are a pair, never two channels.
        - `radius_frames`: the averaging radius in frames, a number for all channels, or a
            sequence with one for each.
        - `clip`: a threshold in standard deviations of the noise, or a
            [`jaxbkgd.SoftClip`][]; `None` for a linear estimator that clips nothing.
        - `max_radius_pix`, `max_radius_frames`: static bounds that the radii stay below,
            which set the number of taps where the radii are learned. By default four times
            the largest of the radii; it must be given where the radii are traced.
        - `edge_frames`: `"renormalised"`, so that the first and the last frames are the
            mean of those there are, or `"repeated"`, as if the movie stood still before
            and after, which lets the noise of these two frames through, but is closer
            where the background rises or falls by a hundredth in a frame.
        - `skips_nan`: whether NaN and infinite pixels are left out as masked ones are.
            Otherwise they spread as far as the kernels and the rounds of clipping reach.
        - `frozen`: the radii to keep as they are, `True` for all of them, or a boolean for
            each: `(frames, y and x)`, or `(frames, y, x)` where pairs were given. With
            radii for several channels, a sequence with one of these for each.

        **Raises:**

        `TypeError` or `ValueError` for radii that are not positive and finite, are not
        below their bounds, or are traced without a bound.
        """
        check_choice("edge_frames", edge_frames, EdgeFrames)
        pix = channel_radii(radii_pix)
        frames = channel_radii(_column(radius_frames), "frames")
        pix_bound = _bound_of(pix, max_radius_pix, "max_radius_pix")
        frames_bound = _bound_of(frames, max_radius_frames, "max_radius_frames")
        check_below(np.nextafter(pix_bound, 0), radii_pix)
        check_below(np.nextafter(frames_bound, 0), radius_frames, "max_radius_frames")
        if frames.shape[1] != 1:
            raise ValueError(
                "radius_frames must be a number, or one for each channel, but is "
                f"{radius_frames!r}."
            )
        if not isinstance(skips_nan, bool):
            raise TypeError(f"skips_nan must be True or False, but is {skips_nan!r}.")
        xp = jnp if is_traced(pix) or is_traced(frames) else np
        count = max(len(pix), len(frames))
        if not {len(pix), len(frames)} <= {1, count}:
            raise ValueError(
                f"There are radii in pixels for {len(pix)} channels, but in frames for "
                f"{len(frames)}; give a number for all, or one for each channel."
            )
        radii = xp.concatenate(
            [xp.broadcast_to(part, (count, part.shape[1])) for part in (frames, pix)], 1
        )
        bounds = np.array([frames_bound, *[pix_bound] * pix.shape[1]])
        self.unbounded_radii = unbounded_radii(radii, bounds)
        is_clip = clip is None or isinstance(clip, SoftClip)
        self.clip = clip if is_clip else SoftClip(clip)
        self.max_radius_pix, self.max_radius_frames = pix_bound, frames_bound
        self.edge_frames = edge_frames
        self.skips_nan = skips_nan
        self.frozen = frozen_mask(frozen, radii.shape)

    @property
    def radii(self) -> Float[Array, "channels 3"]:
        """The averaging radii (frames, y, x), in frames and in pixels, a row a channel; one
        row serves all."""
        bounds = self.max_radii[: self.unbounded_radii.shape[1]]
        radii = bounded_radii(self.unbounded_radii, bounds, self.frozen)
        # Where y and x share a radius, there is one column for both.
        return radii[:, np.array([0, 1, 2]).clip(max=radii.shape[1] - 1)]

    @property
    def max_radii(self) -> Float[np.ndarray, "3"]:
        """Their bounds."""
        return np.array([self.max_radius_frames, *2 * [self.max_radius_pix]])

    @property
    def radii_pix(self) -> Float[Array, "channels 2"]:
        """The averaging radii (y, x) in pixels."""
        return self.radii[:, 1:]

    @property
    def radius_frames(self) -> Float[Array, " channels"]:
        """The averaging radius in frames."""
        return self.radii[:, 0]

    @property
    def halo_frames(self) -> int:
        """Frames that count on either side of one: what the kernels reach, once and again
        for each round of clipping."""
        return self._halo_frames(self._kernels())

    def __call__(self, channels: Channels, weights: Any = None) -> Background:
        """**Arguments:**

        - `channels`: one stack of frames `(..., frames, height, width)`, or a list or tuple
            of them, one a channel, of any shapes and real dtypes. A single frame is a
            movie of one; axes before `frames` are movies of their own, and no channels.
        - `weights`: how much a pixel counts, zero or positive, or booleans that are False
            for pixels to leave out (dead and hot pixels, what is outside of a region of
            interest, lost frames). Of a shape that broadcasts to that of the frames, as
            `(height, width)` or `(frames, 1, 1)`; for a list of channels, one for each.

        **Returns:**

        A [`jaxbkgd.Background`][] with the structure of `channels`, float64 for float64
        frames and float32 for all others. Pixels that are left out have a background, too.
        It is NaN where the weights under the kernel add up to less than a millionth. Frames
        in which, as in those around them, each pixel is next to one that is left out have
        no noise to be measured, and count as left out. The noise corrections hold away from
        the first and last frames and from pixels that are left out.

        **Raises:**

        `TypeError` or `ValueError` for channels or weights that are not as above, or are
        not as many as the module has radii for.
        """
        # Where the radii are known, there are no more taps than they need.
        is_known = not is_traced(self.unbounded_radii)
        kernels = self._known_kernels() if is_known else self._kernels()
        return self._estimated(kernels, channels, weights)

    def for_inference(self) -> AbstractEstimator:
        """The same, with taps for these radii and no others, also where it is compiled, and
        with a halo that is no longer than these need."""
        return _WithKnownRadii(self, self._known_kernels())

    def predicted(self, channels: Channels, gap_frames: int) -> tuple[Background, Any, Any]:
        """The background, and two predictions of each frame that have not seen it.

        In the first one, the frames nearer than `gap_frames` are replaced by those at that
        distance on either side, all else being equal; in the second one, by those one
        frame farther away, which the first one's difference from the background has not
        seen either. At the ends of the movie there is one side only, whatever `edge_frames`
        is. With a clip, the frame counts in the weights of others, a little. The clip gets
        no gradient.

        **Arguments:**

        - `channels`: as above, with at least `2 * gap_frames + 2` frames.
        - `gap_frames`: 1 or more.

        **Returns:**

        A [`jaxbkgd.Background`][], and two predictions in the structure of `channels`.

        **Raises:**

        `ValueError` for too few frames, or no gap.
        """
        frames = jax.tree.leaves(map_channels(as_frames, channels))
        count = min(stack.shape[-3] if stack.ndim > 2 else 1 for stack in frames)
        gap_frames = operator.index(gap_frames)
        if not 1 <= gap_frames <= (count - 2) // 2:
            raise ValueError(
                f"A gap of {gap_frames} frames needs at least {2 * gap_frames + 2} frames, "
                f"but there are {count}; give a longer movie, or a shorter gap, of 1 or "
                "more."
            )
        gaps = (0, gap_frames, gap_frames + 1)
        # No movie tells how faint a molecule may be.
        module = eqx.tree_at(
            lambda module: module.clip,
            self,
            lax.stop_gradient(self.clip),
            is_leaf=lambda leaf: leaf is None,
        )
        every = module._estimated(self._kernels(), channels, None, gaps)
        bkgds, prediction, farther = (
            map_channels(operator.itemgetter(which), every.bkgds) for which in range(3)
        )
        return Background(bkgds, every.noise_corrections), prediction, farther

    def to_json(self) -> str:
        """The module as a JSON text, to be kept in a file and read by `from_json`."""
        radii = np.asarray(self.radii)[:, : self.unbounded_radii.shape[1]]
        fields = {
            "radius_frames": decimals(radii[:, 0]),
            "radii_pix": decimals(radii[:, 1:]),
            "clip": None if self.clip is None else _clip_fields(self.clip),
        }
        return saved(
            "LocalMean", fields | {name: getattr(self, name) for name in _SAVED_NAMES}
        )

    @classmethod
    def from_json(cls, text: str) -> "LocalMean":
        """The module that `to_json` wrote as `text`. Names that it does not know are passed
        over.

        **Raises:**

        `ValueError` for a text that is no such module, or is of a later version.

        !!! example

            ```python
            >>> import jaxbkgd
            >>> text = jaxbkgd.LocalMean(5.0, 8.0).to_json()
            >>> jaxbkgd.LocalMean.from_json(text).radii.round(3).tolist()
            [[8.0, 5.0, 5.0]]

            ```
        """
        names = ("radius_frames", "radii_pix", "clip", *_SAVED_NAMES)
        fields = saved_fields("LocalMean", text, names)
        radii = [np.array(fields.pop(name)) for name in ("radii_pix", "radius_frames")]
        clip = fields.pop("clip")
        try:
            for name in ("max_radius_pix", "max_radius_frames"):
                check_bound(fields[name], name)
            if clip is not None:
                clip = SoftClip(**present(clip, _SAVED_CLIP_NAMES))
            return cls(*radii, clip=clip, **fields)
        except TypeError as error:
            raise ValueError(f"This JSON does not fit a module. {error}") from error

    def __repr__(self) -> str:
        if not isinstance(self.unbounded_radii, jax.Array) or is_traced(
            self.unbounded_radii
        ):
            return super().__repr__()
        radii = [[float(f"{r:.6g}") for r in row] for row in np.asarray(self.radii)]
        names = ("clip", *_SAVED_NAMES)
        rest = "".join(f", {name}={getattr(self, name)!r}" for name in names)
        return f"LocalMean(radii={radii}{rest})"

    def _kernels(self) -> tuple[_Kernels, ...]:
        """For any radii below the bounds."""
        return (_kernels(self.max_radii.tolist(), is_bound=True),)

    def _known_kernels(self) -> tuple[_Kernels, ...]:
        """For each row of radii."""
        with jax.ensure_compile_time_eval():
            rows = np.asarray(self.radii, np.float64)
        if not np.all(np.isfinite(rows)):
            return self._kernels()
        return tuple(_kernels(row, is_bound=False) for row in rows.tolist())

    def _halo_frames(self, kernels: tuple[_Kernels, ...]) -> int:
        rounds = 0 if self.clip is None else self.clip.rounds
        return (1 + rounds) * max(channel.time.half_width for channel in kernels)

    def _estimated(
        self,
        kernels: tuple[_Kernels, ...],
        channels: Channels,
        weights: Any,
        gaps: tuple[int, ...] = (0,),
    ) -> Background:
        """With an axis of gaps before the others, if there is more than one."""
        frames = map_channels(as_frames, channels)
        if weights is not None:
            weights = map_channels(_checked_weights, frames, weights)
        is_list = isinstance(frames, list | tuple)
        count = len(frames) if is_list else 1
        # What XLA computes of constants as it compiles is a bit off what it computes later.
        radii = lax.optimization_barrier(self.radii)
        if len(radii) not in (1, count):
            raise ValueError(
                f"This module has radii for {len(radii)} channels, but was given {count}; "
                "give a list with one stack for each channel."
            )
        cameras = [None] * count if self.clip is None else self.clip.cameras(count)
        if weights is None and is_list:
            weights = [None] * count
        estimates = [
            ft.partial(
                _estimated,
                _Smoothing(row, own, self.edge_frames),
                self.clip,
                camera,
                gaps,
                self.skips_nan,
            )
            for row, own, camera in zip(
                jnp.broadcast_to(radii, (count, 3)),
                kernels * (count // len(kernels)),
                cameras,
                strict=True,
            )
        ]
        backgrounds = map_channels(
            lambda frames, estimate, *weights: estimate(frames, *weights),
            frames,
            estimates if is_list else estimates[0],
            weights,
        )
        return Background(
            map_channels(lambda one: one.bkgds, backgrounds),
            map_channels(lambda one: one.noise_corrections, backgrounds),
        )


def _clip_fields(clip: SoftClip) -> dict[str, Any]:
    fields = {name: getattr(clip, name) for name in _SAVED_CLIP_NAMES}
    learned = {name: decimals(fields[name]) for name in ("threshold", "softness")}
    return fields | learned


class _WithKnownRadii(AbstractEstimator):
    """A module whose radii stay, so that it needs no taps for others."""

    takes_weights: ClassVar[bool] = True

    module: LocalMean
    kernels: tuple[_Kernels, ...] = eqx.field(static=True)

    @property
    def halo_frames(self) -> int:
        return self.module._halo_frames(self.kernels)

    def __call__(self, channels: Channels, weights: Any = None) -> Background:
        return self.module._estimated(self.kernels, channels, weights)


class _Smoothing(eqx.Module):
    """The Gaussian over time, y and x, of one channel."""

    radii: Float[Array, "3"]
    kernels: _Kernels = eqx.field(static=True)
    edge_frames: EdgeFrames = eqx.field(static=True)

    def halved(self) -> "_Smoothing":
        """For frames with pixels of twice the size."""
        halves = self.radii / np.array([1, 2, 2], self.radii.dtype)
        time, _, _, y, x = self.kernels
        return _Smoothing(halves, _Kernels(time, y, x, y, x), self.edge_frames)

    def __call__(
        self, images: Shaped[Array, "*batch frames height width"]
    ) -> Float[Array, "*batch frames height width"]:
        """The sum under the kernels, which is the mean away from the movie's ends."""
        return self.over_time(self._over_space(images))

    def mean(
        self,
        images: Shaped[Array, "*batch frames height width"],
        weights: Float[Array, "*batch frames height width"] | None,
    ) -> Float[Array, "*batch frames height width"]:
        """The mean, which is zero where the weights are."""
        (mean,) = self.means(images, weights, (0,))
        return mean

    def means(
        self,
        images: Shaped[Array, "*batch frames height width"],
        weights: Float[Array, "*batch frames height width"] | None,
        gaps: tuple[int, ...],
        is_finite: bool = True,
    ) -> list[Float[Array, "*batch frames height width"]]:
        """For each gap the mean in which the frames that are nearer are replaced by those
        at that distance."""
        if weights is None:
            sums = self._over_space(images, is_finite)
            totals = jnp.ones((images.shape[-3], 1, 1), self.radii.dtype)
            return [
                _ratio(self.over_time(sums, gap, is_finite), self.over_time(totals, gap))
                for gap in gaps
            ]
        # In one stack, so that there is one program to compile.
        both = self._over_space(jnp.stack([images * weights, weights]))
        return [_ratio(*self.over_time(both, gap)) for gap in gaps]

    def noise_correction(self) -> Float[Array, ""]:
        taps = [
            kernel.taps(radius)
            for kernel, radius in zip(self.kernels[:3], self.radii, strict=True)
        ]
        return noise_factor(taps, "exact")

    def _over_space(self, images, is_finite=True):
        return separable_filter(
            images, list(self.radii[1:]), self.kernels[1:3], is_finite=is_finite
        )

    def over_time(self, images, gap=0, is_finite=True):
        time = self.kernels.time
        # A repeated frame could be the one that is to be predicted.
        is_repeated = self.edge_frames == "repeated" and not gap
        edges = "repeated" if is_repeated else "empty"
        kernel = GapKernel(time, gap) if gap else time
        return temporal_filter(images, self.radii[0], kernel, edges, is_finite=is_finite)


@eqx.filter_jit
def _estimated(
    smoothing: _Smoothing,
    clip: SoftClip | None,
    camera: Camera | None,
    gaps: tuple[int, ...],
    skips_nan: bool,
    frames: Shaped[Array, "*batch height width"],
    weights: Any,
) -> Background:
    """Of one channel."""
    shape = frames.shape
    if frames.ndim == 2:
        frames = frames[None]
    dtype = jnp.float64 if frames.dtype == jnp.float64 else jnp.float32
    skips_nan = skips_nan and jnp.issubdtype(frames.dtype, jnp.floating)
    if clip is not None or jnp.issubdtype(frames.dtype, jnp.floating):
        # The filter converts other integers, a frame at a time.
        frames = frames.astype(dtype)
    smoothing = eqx.tree_at(lambda s: s.radii, smoothing, smoothing.radii.astype(dtype))
    clip = jax.tree.map(lambda parameters: parameters.astype(dtype), clip)
    if weights is not None:
        weights = weights.astype(dtype)
    if skips_nan:
        is_finite = jnp.isfinite(frames).astype(dtype)
        weights = is_finite if weights is None else weights * is_finite
    if weights is not None:
        weights = jnp.broadcast_to(weights, frames.shape)
        # Whatever stands there.
        frames = jnp.where(weights > 0, frames, 0).astype(dtype)
    correction = smoothing.noise_correction()
    if clip is None and weights is None:
        # The filter itself sees to what is not finite, a piece at a time.
        bkgds = [
            jnp.where(jnp.isfinite(bkgd), bkgd, jnp.nan).reshape(shape)
            for bkgd in smoothing.means(frames, None, gaps, is_finite=False)
        ]
        return Background(bkgds[0] if len(gaps) == 1 else jnp.stack(bkgds), correction)
    # Weighted, what is not finite would spread further than it has to.
    is_number = jnp.isfinite(frames)
    frames = jnp.where(is_number, frames, 0)
    if clip is None:
        bkgds = smoothing.means(frames, weights, gaps)
    else:
        noise: Any = camera
        if camera is None:
            noise = _noise_variance(smoothing.halved(), frames, weights)
            if weights is not None:
                # What has no noise to be clipped by is left out.
                is_known = jnp.isfinite(_doubled(noise, frames.shape))
                weights = jnp.where(is_known, weights, 0)
                noise = jnp.where(jnp.isfinite(noise), noise, 1)
        bkgds = _clipped_means(smoothing, clip, noise, gaps, frames, weights)
    if weights is not None:
        is_empty = smoothing(weights) <= _LEAST_TOTAL_WEIGHT
        bkgds = [jnp.where(is_empty, jnp.nan, bkgd) for bkgd in bkgds]
    spread = _spread(lax.stop_gradient(smoothing), clip, ~is_number, dtype)
    bkgds = [jnp.where(spread, jnp.nan, bkgd).reshape(shape) for bkgd in bkgds]
    return Background(bkgds[0] if len(gaps) == 1 else jnp.stack(bkgds), correction)


def _spread(
    smoothing: _Smoothing,
    clip: SoftClip | None,
    is_bad: Bool[Array, "*batch frames height width"],
    dtype: Any,
) -> Bool[Array, "*batch frames height width"]:
    """Where a background has anything of such pixels."""

    def spread_once(_, is_reached):
        if clip is not None:
            # As far as pixels are averaged, and a block of pixels reaches.
            reach = half_width(clip.molecule_radius_pix, "smooth") + 2
            window = (*(1 for _ in is_reached.shape[:-2]), 1 + 2 * reach, 1 + 2 * reach)
            strides = tuple(1 for _ in window)
            is_reached = lax.reduce_window(
                is_reached, False, lax.bitwise_or, window, strides, "SAME"
            )
        # More than rounding makes of nothing.
        return smoothing(is_reached.astype(dtype)) > _LEAST_TOTAL_WEIGHT / 10

    # A loop of no turn leaves them where they are.
    rounds = 0 if clip is None else clip.rounds
    turns = jnp.where(is_bad.any(), 1 + rounds, 0)
    return lax.fori_loop(0, turns, spread_once, is_bad)


def _clipped_means(
    smoothing: _Smoothing,
    clip: SoftClip,
    noise: Float[Array, "*batch frames half_height half_width"] | Camera,
    gaps: tuple[int, ...],
    frames: Float[Array, "*batch frames height width"],
    weights: Float[Array, "*batch frames height width"] | None,
) -> list[Float[Array, "*batch frames height width"]]:
    """All rounds but the last one are done on halved frames: what they give decides on
    weights, and need not be as fine as the background."""
    averaged = clip.averaged(frames if weights is None else frames * weights)
    if weights is not None:
        averaged = _ratio(averaged, clip.averaged(weights))
    shares, norms = (
        jnp.asarray(image, frames.dtype) for image in clip.averaging(*frames.shape[-2:])
    )
    halved = smoothing.halved()
    small_frames, small_weights = _halved(frames), None
    if weights is not None:
        small_weights = _halved(weights)
        small_frames = _ratio(_halved(frames * weights), small_weights)
    bkgd = halved.mean(small_frames, small_weights)
    small = (small_frames, small_weights, *map(_halved, (averaged, shares, norms)))
    # For a gradient, a round is done again: what it holds meanwhile is not kept.
    once = jax.checkpoint(ft.partial(_round, (0,)))

    def again(bkgd, _):
        (bkgd,) = once(halved, clip, *small, bkgd, noise)
        return bkgd, None

    bkgd, _ = lax.scan(again, bkgd, length=clip.rounds - 1)
    bkgd = _doubled(bkgd, frames.shape)
    if not isinstance(noise, tuple):
        noise = _doubled(noise, frames.shape)
    last = jax.checkpoint(ft.partial(_round, gaps))
    return last(smoothing, clip, frames, weights, averaged, shares, norms, bkgd, noise)


def _round(
    gaps: tuple[int, ...],
    smoothing: _Smoothing,
    clip: SoftClip,
    frames: Float[Array, "*batch frames height width"],
    weights: Float[Array, "*batch frames height width"] | None,
    averaged: Float[Array, "*batch frames height width"],
    shares: Float[Array, "height width"],
    norms: Float[Array, "height width"],
    bkgd: Float[Array, "*batch frames height width"],
    noise: Float[Array, "*batch frames height width"] | Camera,
) -> list[Float[Array, "*batch frames height width"]]:
    """The mean of frames whose molecules are clipped, given a background, and the variance
    of the noise or a camera."""
    variance = photon_variance(bkgd, noise) if isinstance(noise, tuple) else noise
    # Not smaller, since a derivative divides by its square.
    least = float(jnp.finfo(bkgd.dtype).tiny) ** 0.5
    variance = jnp.maximum(variance, (_ROUNDING * bkgd) ** 2 + least)
    clipped = clip.weights(averaged, bkgd, variance, norms)
    if weights is not None:
        clipped = jnp.where(weights > 0, weights * clipped, 0)
    bias = clip.noise_bias() * shares * jnp.sqrt(variance)
    return [mean - bias for mean in smoothing.means(frames, clipped, gaps)]


def _noise_variance(
    halved: _Smoothing,
    frames: Float[Array, "*batch frames height width"],
    weights: Float[Array, "*batch frames height width"] | None,
) -> Float[Array, "*batch frames half_height half_width"]:
    """Of a pixel, in halved frames."""
    if min(frames.shape[-2:]) < 3:
        raise ValueError(
            "Noise is measured in frames of 3 x 3 pixels or more, but these have the shape "
            f"{frames.shape}; give `gains`, as in clip=SoftClip(gains=1.0), or clip=None."
        )
    squares = squared_noise(frames)
    if weights is None:
        return halved.mean(_halved(squares), None)
    # What is next to a pixel that is left out is not noise alone. An edge pixel has the
    # noise of the one next to it.
    window = (*(1 for _ in frames.shape[:-2]), 3, 3)
    strides = tuple(1 for _ in window)
    least = lax.reduce_window(weights, jnp.inf, lax.min, window, strides, "VALID")
    widths = [*[(0, 0)] * (frames.ndim - 2), (1, 1), (1, 1)]
    is_noise = (jnp.pad(least, widths, "edge") > 0).astype(frames.dtype)
    both = jnp.stack([is_noise * squares, is_noise])
    sums, totals = halved(_halved(both))
    # Where there is none nearby, that of the frames; where there is none in these, unknown.
    all_sums, all_totals = halved.over_time(jnp.mean(both, (-2, -1), keepdims=True))
    overall = jnp.where(all_totals > 0, _ratio(all_sums, all_totals), jnp.nan)
    is_known = totals > _LEAST_TOTAL_WEIGHT
    return jnp.where(is_known, _ratio(sums, jnp.where(is_known, totals, 1)), overall)


def _ratio(sums, totals):
    """Zero where there is nothing in the totals."""
    is_empty = totals <= 0
    return jnp.where(is_empty, 0, sums / jnp.where(is_empty, 1, totals))


def _halved(
    images: Float[Array, "*batch height width"],
) -> Float[Array, "*batch half_height half_width"]:
    """The means of blocks of 2 x 2 pixels; of an odd line or column, the last one twice."""
    *batch, height, width = images.shape
    padding = [*[(0, 0)] * len(batch), (0, height % 2), (0, width % 2)]
    images = jnp.pad(images, padding, mode="edge")
    # Not a mean over axes, whose order XLA chooses by the number of frames.
    lines = images[..., ::2, :] + images[..., 1::2, :]
    return (lines[..., ::2] + lines[..., 1::2]) / 4


def _doubled(
    images: Float[Array, "*batch half_height half_width"], shape: tuple[int, ...]
) -> Float[Array, "*batch height width"]:
    """Frames of a shape, of blocks of 2 x 2 equal pixels."""
    images = jnp.repeat(jnp.repeat(images, 2, axis=-2), 2, axis=-1)
    return images[..., : shape[-2], : shape[-1]]


def _checked_weights(
    frames: Shaped[Array, "*batch height width"], weights: Any
) -> Shaped[Array, "..."] | None:
    if weights is None:
        return None
    is_masked = isinstance(weights, np.ma.MaskedArray)
    weights = weights if isinstance(weights, jax.Array) else np.asarray(weights)
    is_real = any(jnp.issubdtype(weights.dtype, kind) for kind in _REAL_KINDS)
    if is_masked or not is_real or weights.dtype.kind == "m":
        raise TypeError(
            "weights must be an array of real numbers or booleans, as numpy.load reads it "
            f"from a file, but are {'a masked one' if is_masked else weights.dtype}."
        )
    if isinstance(weights, np.ndarray) and weights.dtype.kind in "iu":
        # JAX would wrap 64-bit integers to 32 bits.
        weights = weights.astype(np.float64)
    weights = jnp.asarray(weights)
    try:
        fits = jnp.broadcast_shapes(weights.shape, frames.shape) == frames.shape
    except ValueError:
        fits = False
    # One for each frame would be taken for one for each column.
    if not fits or weights.ndim == 1:
        raise ValueError(
            f"weights have shape {weights.shape}, and must be one for each pixel, (height, "
            "width), for each frame, (frames, 1, 1), or for both, to go with frames of "
            f"shape {frames.shape}."
        )
    # In NumPy: within a trace, JAX would trace the comparison of known weights, too.
    known_weights = np.ones(1) if is_traced(weights) else np.asarray(weights)
    if not np.all((known_weights >= 0) & (known_weights < np.inf)):
        raise ValueError(
            "weights must be zero or positive, and finite, but some are not; give 0 for "
            "what is to be left out."
        )
    return weights


def _bound_of(radii: Any, bound: Any, name: str) -> float:
    """Four times the largest radius, if there is none."""
    if bound is None:
        bound = min(4 * float(np.max(known(radii, name))), LARGEST_RADIUS_PIX)
    return check_bound(bound, name)


def _column(radius_frames: Any) -> Any:
    """A radius for each channel, of which two are no pair."""
    if isinstance(radius_frames, list | tuple) or np.ndim(radius_frames) == 1:
        return [[radius] for radius in radius_frames]
    return radius_frames
