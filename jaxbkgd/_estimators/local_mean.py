"""The local mean over time, y and x, in which molecules count less."""

import functools as ft
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from .._filter.kernels import half_width
from .base import (
    as_frames,
    Background,
    Channels,
    is_sequence,
    joined,
    map_channels,
    Prediction,
    working_dtype,
)
from .checks import check_choice, is_known, is_traced
from .radii import bound_of, channel_radii, check_below, frozen_mask, unbounded_radii
from .radii_estimator import RadiiEstimator
from .saved import require_names, rounded, with_fields
from .smoothing import (
    doubled,
    EdgeFrames,
    halved,
    ratio,
    Smoothing,
    smoothing_kernels,
    SmoothingKernels,
)
from .soft_clip import photon_variance, SoftClip, squared_noise


# Below this total weight under a kernel, there is nothing to be the mean of.
_LEAST_TOTAL_WEIGHT = 1e-6

# A gain in electrons per ADU, and a read noise in electrons.
Camera = tuple[Any, Any]

# The share of the background below which a deviation is rounding, not noise.
_ROUNDING = 1e-5

_SAVED_CLIP_NAMES = (
    "threshold",
    "softness",
    "rounds",
    "molecule_radius_pix",
    "gains",
    "read_noise_electrons",
)


class LocalMean(RadiiEstimator):
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

    clip: SoftClip | None
    max_radius_pix: float = eqx.field(static=True)
    max_radius_frames: float = eqx.field(static=True)
    edge_frames: EdgeFrames = eqx.field(static=True)
    skips_nan: bool = eqx.field(static=True)

    takes_weights: ClassVar[bool] = True
    can_predict: ClassVar[bool] = True
    radius_units: ClassVar[tuple[str, ...]] = ("frames", "px", "px")
    _saved_names = (
        "radius_frames",
        "radii_pix",
        "clip",
        "max_radius_pix",
        "max_radius_frames",
        "edge_frames",
        "skips_nan",
        "frozen",
    )

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
        if not isinstance(skips_nan, bool):
            raise TypeError(f"skips_nan must be True or False, but is {skips_nan!r}.")
        pix = channel_radii(radii_pix)
        frames = channel_radii(_column(radius_frames), "frames")
        if frames.shape[1] != 1:
            raise ValueError(
                "radius_frames must be a number, or one for each channel, but is "
                f"{radius_frames!r}."
            )
        self.max_radius_pix = bound_of(pix, max_radius_pix)
        self.max_radius_frames = bound_of(frames, max_radius_frames, "max_radius_frames")
        check_below(np.nextafter(self.max_radius_pix, 0), radii_pix)
        check_below(
            np.nextafter(self.max_radius_frames, 0), radius_frames, "max_radius_frames"
        )
        count = max(len(pix), len(frames))
        if not {len(pix), len(frames)} <= {1, count}:
            raise ValueError(
                f"There are radii in pixels for {len(pix)} channels, but in frames for "
                f"{len(frames)}; give a number for all, or one for each channel."
            )
        xp = jnp if is_traced(pix) or is_traced(frames) else np
        columns = [xp.broadcast_to(part, (count, part.shape[1])) for part in (frames, pix)]
        radii = xp.concatenate(columns, 1)
        bounds = np.array(self.max_radii[: radii.shape[1]])
        self.unbounded_radii = unbounded_radii(radii, bounds)
        is_clip = clip is None or isinstance(clip, SoftClip)
        self.clip = clip if is_clip else SoftClip(clip)
        self.edge_frames = edge_frames
        self.skips_nan = skips_nan
        self.frozen = frozen_mask(frozen, radii.shape)
        self.kernels = None

    @property
    def max_radii(self) -> tuple[float, float, float]:
        """The bounds of the radii (frames, y, x)."""
        return self.max_radius_frames, self.max_radius_pix, self.max_radius_pix

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
        kernels = self._bounded_kernels() if self.kernels is None else self.kernels
        rounds = 0 if self.clip is None else self.clip.rounds
        return (1 + rounds) * max(channel.time.half_width for channel in kernels)

    @property
    def molecule_radius_pix(self) -> float | None:
        """That of the clip."""
        return None if self.clip is None else self.clip.molecule_radius_pix

    def predict(self, channels: Channels, gap_frames: int) -> Prediction:
        """The background, and two predictions of each frame that have not seen it.

        In `near`, the frames nearer than `gap_frames` are replaced by those at that
        distance on either side; in `far`, by those one frame farther away, which the
        difference of `near` from the background has not seen either. At the ends of the
        movie there is one side only, whatever `edge_frames` is. With a clip, the frame
        counts a little in the weights of others. The clip gets no gradient.

        See [`jaxbkgd.AbstractEstimator`][] for the arguments.
        """
        frames = map_channels(as_frames, channels)
        stacks = frames if is_sequence(frames) else [frames]
        count = min(stack.shape[-3] if stack.ndim > 2 else 1 for stack in stacks)
        gap_frames = operator.index(gap_frames)
        if not 1 <= gap_frames <= (count - 2) // 2:
            raise ValueError(
                f"A gap of {gap_frames} frames needs at least {2 * gap_frames + 2} frames, "
                f"but there are {count}; give a longer movie, or a shorter gap, of 1 or "
                "more."
            )
        gaps = (0, gap_frames, gap_frames + 1)
        # A movie does not tell how faint its molecules may be.
        module = with_fields(self, clip=lax.stop_gradient(self.clip))
        kernels = self.kernels or self._bounded_kernels()
        estimates = module._stack_functions(len(stacks), kernels)
        backgrounds = joined(
            map_channels(
                lambda frames, estimate: estimate(frames, gaps=gaps),
                frames,
                estimates if is_sequence(frames) else estimates[0],
            )
        )
        bkgds, near, far = (
            map_channels(operator.itemgetter(which), backgrounds.bkgds)
            for which in range(3)
        )
        return Prediction(Background(bkgds, backgrounds.noise_corrections), near, far)

    def _kernels_for(self, radii: Sequence[float], *, is_bound: bool) -> SmoothingKernels:
        return smoothing_kernels(radii, is_bound=is_bound)

    def _stack_functions(
        self, count: int, kernels: tuple[SmoothingKernels, ...] | None = None
    ) -> list[Callable[..., Background]]:
        functions = super()._stack_functions(count, kernels)
        cameras = [None] * count if self.clip is None else self.clip.cameras(count)
        return [
            ft.partial(function, camera=camera)
            for function, camera in zip(functions, cameras, strict=True)
        ]

    def _estimate_channel(
        self,
        frames: Shaped[Array, "*batch height width"],
        *,
        radii: Float[Array, "3"],
        kernels: SmoothingKernels,
        camera: Camera | None,
        weights: Shaped[Array, "..."] | None = None,
        gaps: tuple[int, ...] = (0,),
    ) -> Background:
        smoothing = Smoothing(radii, kernels, self.edge_frames)
        return _estimate(
            smoothing, self.clip, camera, gaps, self.skips_nan, frames, weights
        )

    def _saved_fields(self) -> dict[str, Any]:
        clip = None
        if self.clip is not None:
            clip = {name: getattr(self.clip, name) for name in _SAVED_CLIP_NAMES}
            clip |= {name: rounded(clip[name]) for name in ("threshold", "softness")}
        return super()._saved_fields() | {"clip": clip}

    @classmethod
    def _restored(cls, fields: dict[str, Any]) -> "LocalMean":
        clip = fields["clip"]
        if clip is not None:
            clip = SoftClip(**require_names(clip, _SAVED_CLIP_NAMES))
        return super()._restored(fields | {"clip": clip})


@eqx.filter_jit
def _estimate(
    smoothing: Smoothing,
    clip: SoftClip | None,
    camera: Camera | None,
    gaps: tuple[int, ...],
    skips_nan: bool,
    frames: Shaped[Array, "*batch height width"],
    weights: Shaped[Array, "..."] | None,
) -> Background:
    """The background of one channel, with an axis of gaps before the others if there is
    more than one gap."""
    shape = frames.shape
    if frames.ndim == 2:
        frames = frames[None]
    dtype = working_dtype(frames)
    smoothing = eqx.tree_at(lambda s: s.radii, smoothing, smoothing.radii.astype(dtype))
    clip = jax.tree.map(lambda parameters: parameters.astype(dtype), clip)
    is_floating = jnp.issubdtype(frames.dtype, jnp.floating)
    if clip is not None or not jnp.issubdtype(frames.dtype, jnp.integer):
        # The filter converts other integers, a frame at a time.
        frames = frames.astype(dtype)
    if weights is not None:
        weights = jnp.broadcast_to(weights.astype(dtype), frames.shape)
    if skips_nan and is_floating:
        is_finite = jnp.isfinite(frames).astype(dtype)
        weights = is_finite if weights is None else weights * is_finite
    if weights is not None:
        # Pixels that are left out may hold anything.
        frames = jnp.where(weights > 0, frames, 0).astype(dtype)
    if clip is None and weights is None:
        # The filter itself sees to what is not finite, a piece at a time.
        means = smoothing.means(frames, None, gaps, is_finite=False)
        bkgds = [jnp.where(jnp.isfinite(mean), mean, jnp.nan) for mean in means]
    else:
        bkgds = _weighted_means(smoothing, clip, camera, gaps, frames, weights)
    bkgds = [bkgd.reshape(shape) for bkgd in bkgds]
    stacked = bkgds[0] if len(gaps) == 1 else jnp.stack(bkgds)
    return Background(stacked, smoothing.noise_correction())


def _weighted_means(
    smoothing: Smoothing,
    clip: SoftClip | None,
    camera: Camera | None,
    gaps: tuple[int, ...],
    frames: Float[Array, "*batch frames height width"],
    weights: Float[Array, "*batch frames height width"] | None,
) -> list[Float[Array, "*batch frames height width"]]:
    """The means for each gap; NaN where there is nothing to be the mean of, and where a
    pixel that is not finite counts."""
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
                # Without a known noise, pixels cannot be clipped, and are left out.
                is_measured = jnp.isfinite(doubled(noise, frames.shape))
                weights = jnp.where(is_measured, weights, 0)
                noise = jnp.where(jnp.isfinite(noise), noise, 1)
        bkgds = _clipped_means(smoothing, clip, noise, gaps, frames, weights)
    if weights is not None:
        is_empty = smoothing(weights) <= _LEAST_TOTAL_WEIGHT
        bkgds = [jnp.where(is_empty, jnp.nan, bkgd) for bkgd in bkgds]
    is_reached = _reach(lax.stop_gradient(smoothing), clip, ~is_number, frames.dtype)
    return [jnp.where(is_reached, jnp.nan, bkgd) for bkgd in bkgds]


def _reach(
    smoothing: Smoothing,
    clip: SoftClip | None,
    is_bad: Bool[Array, "*batch frames height width"],
    dtype: Any,
) -> Bool[Array, "*batch frames height width"]:
    """Where the background depends on bad pixels."""

    def spread(_, is_reached):
        if clip is not None:
            # As far as the average over molecules and a block of 2 x 2 pixels reach.
            width = 2 * (half_width(clip.molecule_radius_pix, "smooth") + 2) + 1
            is_reached = _windowed(lax.bitwise_or, False, is_reached, width, "SAME")
        # More than rounding makes of zeros.
        return smoothing(is_reached.astype(dtype)) > _LEAST_TOTAL_WEIGHT / 10

    # Without bad pixels, the loop has no turn.
    rounds = 0 if clip is None else clip.rounds
    turns = jnp.where(is_bad.any(), 1 + rounds, 0)
    return lax.fori_loop(0, turns, spread, is_bad)


def _windowed(
    choose: Callable, initial: Any, images: Array, width: int, padding: str
) -> Array:
    """`choose` of the pixels in a square around each one."""
    window = (*[1] * (images.ndim - 2), width, width)
    return lax.reduce_window(images, initial, choose, window, (1,) * images.ndim, padding)


def _clipped_means(
    smoothing: Smoothing,
    clip: SoftClip,
    noise: Float[Array, "*batch frames half_height half_width"] | Camera,
    gaps: tuple[int, ...],
    frames: Float[Array, "*batch frames height width"],
    weights: Float[Array, "*batch frames height width"] | None,
) -> list[Float[Array, "*batch frames height width"]]:
    """The means of clipped frames, given the variance of their noise or a camera. All
    rounds but the last are done on frames of half the size: their background decides on
    weights alone, and need not be as fine."""
    average = clip.molecule_average(frames if weights is None else frames * weights)
    if weights is not None:
        average = ratio(average, clip.molecule_average(weights))
    response = [
        jnp.asarray(image, frames.dtype)[(None,) * (frames.ndim - 2)]
        for image in clip.average_response(*frames.shape[-2:])
    ]
    small_frames, small_weights = halved(frames), None
    if weights is not None:
        small_weights = halved(weights)
        small_frames = ratio(halved(frames * weights), small_weights)
    small = smoothing.halved()
    bkgd = small.mean(small_frames, small_weights)
    small_images = (small_frames, small_weights, *map(halved, (average, *response)))
    # For a gradient, a round is done again, so that its intermediates are not kept.
    small_round = jax.checkpoint(ft.partial(_round, (0,)))

    def next_bkgd(bkgd, _):
        (bkgd,) = small_round(small, clip, *small_images, bkgd, noise)
        return bkgd, None

    if clip.rounds > 1:
        # A scan of no turn would not work under `jax.disable_jit`.
        bkgd, _ = lax.scan(next_bkgd, bkgd, length=clip.rounds - 1)
    bkgd = doubled(bkgd, frames.shape)
    if not isinstance(noise, tuple):
        noise = doubled(noise, frames.shape)
    last_round = jax.checkpoint(ft.partial(_round, gaps))
    return last_round(smoothing, clip, frames, weights, average, *response, bkgd, noise)


def _round(
    gaps: tuple[int, ...],
    smoothing: Smoothing,
    clip: SoftClip,
    frames: Float[Array, "*batch frames height width"],
    weights: Float[Array, "*batch frames height width"] | None,
    average: Float[Array, "*batch frames height width"],
    correlations: Float[Array, "*#batch #frames height width"],
    deviations: Float[Array, "*#batch #frames height width"],
    bkgd: Float[Array, "*batch frames height width"],
    noise: Float[Array, "*batch frames height width"] | Camera,
) -> list[Float[Array, "*batch frames height width"]]:
    """The means of frames that are clipped by their background of the round before."""
    variance = photon_variance(bkgd, noise) if isinstance(noise, tuple) else noise
    # Not smaller, since a derivative divides by its square.
    least = float(jnp.finfo(bkgd.dtype).tiny) ** 0.5
    variance = jnp.maximum(variance, (_ROUNDING * bkgd) ** 2 + least)
    clipped = clip.weights(average, bkgd, variance, deviations)
    if weights is not None:
        clipped = jnp.where(weights > 0, weights * clipped, 0)
    bias = clip.noise_bias() * correlations * jnp.sqrt(variance)
    return [mean - bias for mean in smoothing.means(frames, clipped, gaps)]


def _noise_variance(
    small: Smoothing,
    frames: Float[Array, "*batch frames height width"],
    weights: Float[Array, "*batch frames height width"] | None,
) -> Float[Array, "*batch frames half_height half_width"]:
    """The variance of the noise of a pixel, measured in the frames, in frames of half the
    size; NaN where none can be measured."""
    if any(is_known(size) and size < 3 for size in frames.shape[-2:]):
        raise ValueError(
            "Noise is measured in frames of 3 x 3 pixels or more, but these have the shape "
            f"{frames.shape}; give `gains`, as in clip=SoftClip(gains=1.0), or clip=None."
        )
    squares = squared_noise(frames)
    if weights is None:
        return small.mean(halved(squares), None)
    # Next to a pixel that is left out, squares are not of noise alone. An edge pixel has
    # the noise of the one next to it.
    least = _windowed(lax.min, jnp.inf, weights, 3, "VALID")
    widths = [*[(0, 0)] * (frames.ndim - 2), (1, 1), (1, 1)]
    is_noise = (jnp.pad(least, widths, "edge") > 0).astype(frames.dtype)
    both = jnp.stack([is_noise * squares, is_noise])
    sums, totals = small(halved(both))
    # Where there is none nearby, that of the whole frames.
    all_sums, all_totals = small.over_time(jnp.mean(both, (-2, -1), keepdims=True))
    overall = jnp.where(all_totals > 0, ratio(all_sums, all_totals), jnp.nan)
    is_measured = totals > _LEAST_TOTAL_WEIGHT
    return jnp.where(is_measured, ratio(sums, jnp.where(is_measured, totals, 1)), overall)


def _column(radius_frames: Any) -> Any:
    """A radius for each channel, of which two are no pair."""
    if isinstance(radius_frames, list | tuple) or np.ndim(radius_frames) == 1:
        return [[radius] for radius in radius_frames]
    return radius_frames
