"""The local mean over time, y and x, in which molecules count less."""

import dataclasses
import functools as ft
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from .._filter.kernels import GaussianKernel, half_width
from .background import Background, joined
from .base import Prediction
from .channels import as_frames, Channels, checked_weights, is_sequence, map_channels
from .checks import check_choice, checked_count, checked_number, is_traced
from .coarse_patterns import check_squares, checked_patterns, learned_patterns
from .light_model import estimate, LightModel
from .patterns import estimate_mixtures
from .radii import (
    bound_of,
    channel_radii,
    check_below,
    frozen_mask,
    rows_of_channels,
    unbounded_radii,
)
from .radii_estimator import RadiiEstimator
from .saved import require_names, shortest_numbers, with_fields
from .smoothing import (
    radius_in_blocks,
    Smoothing,
    smoothing_kernels,
    SmoothingKernels,
    usual_block_frames,
)
from .soft_clip import SoftClip


# Radii over which light is averaged, in frames. The kernel is short enough for a halo, and
# renormalised beyond.
_SMALLEST_LIGHT, _LARGEST_LIGHT = 0.1, 20.0
_LIGHT_KERNEL = GaussianKernel(
    half_width(_LARGEST_LIGHT, "smooth"), "smooth", is_bound=True
)

# Blocks on either side that a block is compared with: the more, the less noise.
_COMPARED_BLOCKS = 4
# How many patterns of light there are.
Rank = Literal[0, 1, 2, 3, 4, "auto"]

_SAVED_CLIP_NAMES = ("threshold", "softness", "rounds", "molecule_radius_pix")


class LocalMean(RadiiEstimator):
    """The mean of the frames under a kernel over time, y and x, in which molecules count
    less and each frame has a light of its own.

    The frames are `f_t = a_t R_t + molecules + noise`: the light `a_t` is free from frame
    to frame, since lasers flicker, pulse and bleach, and the background R in a light of one
    is smooth in space and slow in time. With weights w that clip molecules softly (see
    [`jaxbkgd.SoftClip`][]), and a separable Gaussian G whose standard deviations are half
    the radii, it is `a_t G(w f) / G(w a)`, the maximum-likelihood rate of Poisson counts
    under exposures a. By default, the mean of its residuals is added, which removes all
    errors of second order. Radii may then be twice those of a plain Gaussian.

    Frames must be above the camera's offset, so that twice the light is twice the frame.
    All smoothing works on sums over blocks of frames.

    Borders repeat the edge pixel. Radii, threshold and softness of the clip, and
    `illumination_radius_frames` are learnable, and no step of an optimizer leaves their
    bounds. `background.illumination` is the light.

    !!! example

        ```python
        >>> import jax
        >>> import jaxbkgd
        >>> frames, truth = jaxbkgd.simulate_movie(jax.random.key(0), frame_count=30)
        >>> background = jaxbkgd.LocalMean(7.0, 10.0)(frames - 100.0)
        >>> errors = background.bkgds - truth.bkgds_adu
        >>> bool(abs(errors.mean()) < 0.005 * truth.bkgds_adu.mean())
        True
        >>> background.illumination.shape
        (30,)

        ```
    """

    clip: SoftClip | None
    log_illumination_radius: Float[Array, ""]
    # Whole numbers, of which only the ratios matter: they are not learned by descent.
    patterns: tuple[Int[Array, "rank rows columns"], ...] | None
    max_radius_pix: float = eqx.field(static=True)
    max_radius_frames: float = eqx.field(static=True)
    illumination_rank: Rank = eqx.field(static=True)
    kernel_order: Literal[2, 4] = eqx.field(static=True)
    block_frames: int = eqx.field(static=True)
    skips_nan: bool = eqx.field(static=True)

    _optional_names = ("patterns",)
    takes_weights: ClassVar[bool] = True
    radius_units: ClassVar[tuple[str, ...]] = ("frames", "px", "px")
    _saved_names = (
        "radius_frames",
        "radii_pix",
        "clip",
        "illumination_rank",
        "kernel_order",
        "illumination_radius_frames",
        "block_frames",
        "max_radius_pix",
        "max_radius_frames",
        "skips_nan",
        "frozen",
    )

    def __init__(
        self,
        radii_pix: Any = 7.0,
        radius_frames: Any = 30.0,
        *,
        clip: Any = 3.0,
        illumination_rank: Rank = 1,
        patterns: Any = None,
        kernel_order: Literal[2, 4] = 4,
        illumination_radius_frames: Any = 10.0,
        block_frames: int | None = None,
        max_radius_pix: int | float | None = None,
        max_radius_frames: int | float | None = None,
        skips_nan: bool = False,
        frozen: Any = False,
    ):
        """**Arguments:**

        - `radii_pix`: the averaging radii in pixels: a number for all channels and both
            axes; a `(y, x)` pair for all channels; or a sequence with one number or pair
            for each channel. Two numbers are a pair, never two channels.
        - `radius_frames`: the averaging radius in frames, a number for all channels, or a
            sequence with one for each. With 0, each frame is estimated by itself.
        - `clip`: a threshold in standard deviations of the noise, or a
            [`jaxbkgd.SoftClip`][]; `None` to clip nothing.
        - `illumination_rank`: 1 for a light of each frame, 0 for a steady light, 2 to 4 for
            that many patterns of light, with a mixture of its own in each frame. `"auto"`
            takes as many patterns as the frames show.
        - `patterns`: with several patterns of light, the coarse ones that `with_patterns`
            learns: whole numbers (rank, rows, columns), or a sequence with these for each
            channel. By default each call learns them from its frames.
        - `kernel_order`: 2 for the Gaussian, or 4.
        - `illumination_radius_frames`: the radius over which the light is averaged where it
            is steady, from 0.1 to 20.
        - `block_frames`: the frames in a block. By default the power of two that is nearest
            to a quarter of the radius in frames, up to 16.
        - `max_radius_pix`, `max_radius_frames`: static bounds above all radii, which set
            the number of taps while radii are learned. By default four times the largest
            radius; required if the radii are traced.
        - `skips_nan`: whether NaN and infinite pixels are left out as masked ones are.
            Otherwise the background of all frames that see one is NaN.
        - `frozen`: the radii to keep as they are, `True` for all of them, or a boolean for
            each: `(frames, y and x)`, or `(frames, y, x)` where pairs were given. With
            radii for several channels, a sequence with one of these for each.

        **Raises:**

        `TypeError` or `ValueError` for radii that are not positive and finite, are not
        below their bounds, or are traced without a bound.
        """
        check_choice("illumination_rank", illumination_rank, Rank)
        check_choice("kernel_order", kernel_order, Literal[2, 4])
        if not isinstance(skips_nan, bool):
            raise TypeError(f"skips_nan must be True or False, but is {skips_nan!r}.")
        pix = channel_radii(radii_pix)
        given = jax.tree.leaves(radius_frames)
        sees_one_frame = bool(given) and not any(
            is_traced(r) or np.any(r != 0) for r in given
        )
        frames = channel_radii(1.0 if sees_one_frame else _column(radius_frames), "frames")
        if frames.shape[1] != 1:
            raise ValueError(
                "radius_frames must be a number, or one for each channel, but is "
                f"{radius_frames!r}."
            )
        if sees_one_frame and illumination_rank in (2, 3, 4):
            raise ValueError(
                f"illumination_rank is {illumination_rank}, but one frame does not show "
                "several patterns; give radius_frames above 0, or illumination_rank=1."
            )
        self.max_radius_pix = bound_of(pix, max_radius_pix)
        check_below(np.nextafter(self.max_radius_pix, 0), radii_pix)
        frames_bound = bound_of(frames, max_radius_frames or None, "max_radius_frames")
        check_below(np.nextafter(frames_bound, 0), frames, "max_radius_frames")
        count = max(len(pix), len(frames))
        if not {len(pix), len(frames)} <= {1, count}:
            raise ValueError(
                f"There are radii in pixels for {len(pix)} channels, but in frames for "
                f"{len(frames)}; give a number for all, or one for each channel."
            )
        xp = jnp if is_traced(pix) or is_traced(frames) else np
        columns = [xp.broadcast_to(part, (count, part.shape[1])) for part in (frames, pix)]
        radii = xp.concatenate(columns, 1)
        bounds = np.array([frames_bound, *[self.max_radius_pix] * pix.shape[1]])
        self.unbounded_radii = unbounded_radii(radii, bounds)
        self.max_radius_frames = 0.0 if sees_one_frame else frames_bound
        if block_frames is None:
            shortest = self.max_radius_frames / 4 if is_traced(frames) else np.min(frames)
            block_frames = 1 if sees_one_frame else usual_block_frames(float(shortest))
        self.block_frames = checked_count("block_frames", block_frames)
        self.clip = clip if clip is None or isinstance(clip, SoftClip) else SoftClip(clip)
        self.illumination_rank = illumination_rank
        self.patterns = checked_patterns(patterns, illumination_rank)
        self.kernel_order = kernel_order
        if not is_traced(illumination_radius_frames):
            checked_number(
                "illumination_radius_frames",
                illumination_radius_frames,
                minimum=_SMALLEST_LIGHT,
                includes_minimum=True,
                maximum=_LARGEST_LIGHT,
                unit="frames",
            )
        self.log_illumination_radius = jnp.log(
            jnp.asarray(illumination_radius_frames, float)
        )
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
    def illumination_radius_frames(self) -> Float[Array, ""]:
        """The radius in frames over which steady light is averaged."""
        limits = math.log(_SMALLEST_LIGHT), math.log(_LARGEST_LIGHT)
        return jnp.exp(jnp.clip(self.log_illumination_radius, *limits))

    @property
    def halo_frames(self) -> int:
        """The number of frames on either side that a background depends on: the reach of
        the kernels, once for the first background and again in each round of clipping."""
        kernels = self.kernels or self._bounded_kernels()
        radii = jnp.zeros(3)
        rank = self._largest_rank
        return max(self._model(radii, of_row, rank).halo_frames for of_row in kernels)

    @property
    def _largest_rank(self) -> int:
        if self.illumination_rank != "auto":
            return self.illumination_rank
        return max(map(len, self.patterns)) if self.patterns else 1

    @property
    def learns_patterns(self) -> bool:
        is_one = self.illumination_rank in (0, 1) or self.sees_one_frame
        return self.patterns is None and not is_one

    def with_patterns(
        self, channels: Channels, weights: Any = None, *, illumination: Any = None
    ) -> "LocalMean":
        """This estimator with coarse patterns of light, learned from frames. With these,
        parts of a movie give the same result as the whole movie.

        **Arguments:**

        - `channels`, `weights`: as in a call; some hundred successive frames are enough.
        - `illumination`: if it is known, how much of each pattern is in each frame, (rank,
            frames), such as a row of ones and a row for an activation pulse; or a list or
            tuple with these for each channel. By default, patterns are the mean and what it
            leaves: the principal components of squares of 16 x 16 px.

        **Raises:** `TypeError` or `ValueError` for arguments that do not fit, and within
        `jax.jit`.

        ```python
        >>> import jax
        >>> import jaxbkgd
        >>> frames, _ = jaxbkgd.simulate_movie(jax.random.key(0), frame_count=30)
        >>> estimator = jaxbkgd.LocalMean(illumination_rank="auto")
        >>> [len(patterns) for patterns in estimator.with_patterns(frames - 100.0).patterns]
        [1]

        ```
        """
        if self.illumination_rank in (0, 1):
            return self
        rank, skips_nan = self.illumination_rank, self.skips_nan

        def learned(frames: Any, mask: Any, light: Any) -> Any:
            mask = checked_weights(frames, mask)
            return learned_patterns(frames, mask, rank, skips_nan, light)

        frames = map_channels(as_frames, channels)
        if weights is None:
            weights = map_channels(lambda _: None, frames)
        light = illumination
        if not is_sequence(light) or not is_sequence(frames):
            light = map_channels(lambda _: illumination, frames)
        patterns = map_channels(learned, frames, weights, light)
        patterns = patterns if is_sequence(patterns) else [patterns]
        return with_fields(self, patterns=tuple(patterns))

    @property
    def sees_one_frame(self) -> bool:
        return self.max_radius_frames == 0

    @property
    def aligned_frames(self) -> int:
        """The frames in a block."""
        return self.block_frames

    @property
    def pixel_bytes(self) -> int:
        # As measured. Sums over blocks of few frames take more, and of several patterns.
        return (16 if self.block_frames >= 4 else 32) * max(1, self._largest_rank)

    @property
    def molecule_radius_pix(self) -> float | None:
        """That of the clip."""
        return None if self.clip is None else self.clip.molecule_radius_pix

    def predict(self, channels: Channels, gap_frames: int) -> Prediction:
        """The background, and two predictions of each frame that have not seen it.

        In `near`, blocks of frames with any frame nearer than `gap_frames` are replaced by
        the nearest other blocks on either side. `far` has not seen the next blocks either,
        so that frames can be compared with these: four where the movie is long enough, and
        one with several patterns.
        At the ends of the movie there is only one side. The light is that of the frame
        itself. With a clip, the frame counts a little in the weights of others. With a
        kernel of fourth order, it keeps about 1 % of its share of the background, and 5 %
        at the ends of the movie. The clip gets no gradient.

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
        # Blocks that are so far apart have no two frames that are nearer. They are shorter
        # where the movie is.
        gaps = {
            length: (gap_frames + length - 2) // length + 1
            for length in range(self.block_frames, 0, -1)
        }
        length = next(n for n, gap in gaps.items() if 2 * (gap + 1) * n <= count)
        gap = gaps[length]
        # Of several patterns, blocks are different mixtures.
        most = _COMPARED_BLOCKS if self.illumination_rank in (0, 1) else 1
        compared_blocks = min(most, count // (2 * length) - gap)
        # A movie does not tell how faint its molecules may be.
        module = with_fields(
            self,
            block_frames=length,
            kernels=None,
            clip=lax.stop_gradient(self.clip),
            log_illumination_radius=lax.stop_gradient(self.log_illumination_radius),
        )
        functions = module._stack_functions(len(stacks))
        functions = functions if is_sequence(frames) else functions[0]

        def estimate(frames: Any, function: Callable[..., Background]) -> Background:
            return function(frames, gaps=(gap, gap + compared_blocks))

        background = joined(map_channels(estimate, frames, functions))
        bkgds, near, far = (
            map_channels(operator.itemgetter(which), background.bkgds) for which in range(3)
        )
        background = dataclasses.replace(background, bkgds=bkgds)
        return Prediction(background, near, far, length, compared_blocks)

    def light_models(self, count: int) -> list[LightModel] | None:
        rank = self._largest_rank
        if rank > 1 or self.sees_one_frame:
            return None
        return [self._model(*row, rank) for row in self._rows(count)]

    def _kernels_for(self, radii: Sequence[float], *, is_bound: bool) -> SmoothingKernels:
        return smoothing_kernels(radii, self.block_frames, is_bound=is_bound)

    def _stack_functions(self, count: int) -> list[Callable[..., Background]]:
        functions = super()._stack_functions(count)
        if self.patterns is None:
            return functions
        patterns = rows_of_channels(self.patterns, count, "patterns")
        return [
            ft.partial(function, patterns=of_channel)
            for function, of_channel in zip(functions, patterns, strict=True)
        ]

    def _model(
        self, radii: Float[Array, "3"], kernels: SmoothingKernels, rank: int
    ) -> LightModel:
        in_blocks = radius_in_blocks(radii[0], self.block_frames)
        return LightModel(
            Smoothing(radii.at[0].set(in_blocks), kernels, self.kernel_order),
            self.clip,
            self.illumination_radius_frames,
            _LIGHT_KERNEL,
            rank,
            self.block_frames,
            self.skips_nan,
        )

    def _estimate_channel(
        self,
        frames: Shaped[Array, "*batch height width"],
        *,
        radii: Float[Array, "3"],
        kernels: SmoothingKernels,
        weights: Shaped[Array, "..."] | None = None,
        gaps: tuple[int, ...] = (),
        patterns: Int[Array, "rank rows columns"] | None = None,
    ) -> Background:
        rank: Any = self.illumination_rank
        if rank == "auto" and patterns is None and not self.sees_one_frame:
            patterns = learned_patterns(frames, weights, rank, self.skips_nan)
        if rank == "auto":
            rank = 1 if patterns is None or self.sees_one_frame else len(patterns)
        model = self._model(radii, kernels, rank)
        if rank < 2:
            return estimate(model, frames, weights, gaps)
        check_squares(frames.shape, rank, patterns)
        return estimate_mixtures(model, patterns, frames, weights, gaps)

    def _saved_fields(self) -> dict[str, Any]:
        clip = None
        if self.clip is not None:
            values = {name: getattr(self.clip, name) for name in _SAVED_CLIP_NAMES}
            clip = {name: shortest_numbers(value) for name, value in values.items()}
        return super()._saved_fields() | {"clip": clip}

    @classmethod
    def _restored(cls, fields: dict[str, Any]) -> "LocalMean":
        clip = fields["clip"]
        if clip is not None:
            clip = SoftClip(**require_names(clip, _SAVED_CLIP_NAMES))
        return super()._restored(fields | {"clip": clip})


def _column(radius_frames: Any) -> Any:
    """A radius for each channel, of which two are no pair."""
    if isinstance(radius_frames, list | tuple) or np.ndim(radius_frames) == 1:
        return [[radius] for radius in radius_frames]
    return radius_frames
