"""The best estimator of a movie, found by trying radii, with no gradient."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .._estimators.local_mean import LocalMean, Rank
from .._estimators.radii_estimator import RadiiEstimator
from .._estimators.spatial_mean import SpatialMean
from .evaluation import evaluate
from .findings import standard_error
from .sample import Sample


# Radii (frames, y, x).
Radii = tuple[float, float, float]

# The axes of a line along which radii are tried, and the step of that.
_SCALE = (1, 2), 2**0.5
_TIME = (0,), 2.0
_Y = (1,), 2**0.5
_X = (2,), 2**0.5
# The shortest and the longest radius in frames, the frames in a block, and the bytes that a
# pixel takes while a movie is estimated: some, and more for each frame of radius.
_OVER_TIME = ((15.0, 120.0, 8, 0.0, 180.0), (1.875, 15.0, 1, 4500.0, 610.0))
# The share of the squared error that a step must save.
_LEAST_GAIN = 0.01
# The standard deviation of errors, as a multiple of that of most of them, that shows a
# few large ones.
_UNEVEN = 3.0
# Standard errors by which a squared error may be too low by chance.
_BY_CHANCE = 3.0
# Bounds in pixels, of which the larger one is used where the smaller one is reached, and
# the least radius, under which a pixel is hardly averaged with its neighbours.
_BOUNDS_PIX, _LEAST_PIX = (29.0, 81.0), 0.6
# Above, a radius is at its bound.
LARGEST_PIX = 56.0


class Structure(NamedTuple):
    """What is fixed while radii are tried: those in frames are from `shortest` to
    `longest`, sums are over blocks, and there are `rank` patterns of light. Without blocks,
    it is the mean over each frame."""

    shortest: float
    longest: float
    block_frames: int
    rank: Rank = 1

    @property
    def usual(self) -> Radii:
        """Those from which others are tried: the defaults, where they are allowed."""
        return min(max(30.0, self.shortest), self.longest), 7.0, 7.0

    def estimator(
        self, rows: Sequence[Radii], bound_pix: float | None, skips_nan: bool
    ) -> RadiiEstimator:
        """One with a row of radii for each channel."""
        pix = [row[1:] for row in rows]
        if not self.block_frames:
            return SpatialMean(pix, max_radius_pix=bound_pix)
        return LocalMean(
            pix,
            [row[0] for row in rows] if self.longest else 0.0,
            illumination_rank=self.rank,
            block_frames=self.block_frames,
            max_radius_pix=bound_pix,
            max_radius_frames=self.longest + 1 if self.longest else None,
            skips_nan=skips_nan,
        )


# For backgrounds that each frame alone shows.
EACH_FRAME, PLAIN = Structure(0.0, 0.0, 1), Structure(0.0, 0.0, 0)


def structures(most_bytes: float, rank: Any = 1) -> list[Structure]:
    """Those for slow backgrounds, for fast ones, and for each frame alone, with which a
    movie is estimated in so many bytes a pixel. Those with several patterns take windows,
    with some three times the memory for each."""
    found = []
    if rank > 1:
        most_bytes /= 3 * rank
    for shortest, longest, block_frames, some, per_radius in _OVER_TIME:
        longest = min(longest, (most_bytes - some) / per_radius)
        if longest >= shortest:
            found.append(Structure(shortest, longest, block_frames, rank))
    return [*found, EACH_FRAME, PLAIN]


class Trial(NamedTuple):
    """The squared errors of radii in each block of frames, the variance of noise, and the
    squared error that noise alone makes."""

    radii: Radii
    squares: Float[np.ndarray, " blocks"]
    variance: float
    least: float

    @property
    def loss(self) -> float:
        """The squared error. What is measured may be less than noise makes by chance. If it
        is far less, as with several patterns, it is too low for all radii, and compared."""
        measured = float(self.squares.mean())
        is_by_chance = measured > self.least - _BY_CHANCE * self.std
        return max(measured, self.least) if is_by_chance else measured

    @property
    def std(self) -> float:
        """The standard error of the loss."""
        return standard_error(self.squares)

    @property
    def is_uneven(self) -> bool:
        """Whether a few blocks have most of the error, as where the background moves."""
        deviations = np.abs(self.squares - np.median(self.squares))
        return bool(self.squares.std() > _UNEVEN * 1.4826 * np.median(deviations))


@dataclass
class ChannelSearch:
    """What has been tried on one channel."""

    sample: Sample
    skips_nan: bool
    report: Callable[[], None]
    trials: dict[Structure, dict[Radii, Trial]] = field(default_factory=dict)

    def estimator(self, structure: Structure, radii: Radii) -> RadiiEstimator:
        """For the sample: radii and blocks are shortened by the share of frames that are
        lit, since it lacks the dark ones."""
        (share,), (frames, y, x) = self.sample.lit_shares, radii
        bound_pix = next(b for b in _BOUNDS_PIX if max(y, x) < 0.98 * b)
        lit = structure._replace(
            longest=share * structure.longest,
            block_frames=math.ceil(share * structure.block_frames),
        )
        return lit.estimator([(share * frames, y, x)], bound_pix, self.skips_nan)

    def trial(self, structure: Structure, radii: Radii) -> Trial:
        tried = self.trials.setdefault(structure, {})
        if radii not in tried:
            estimator = self.estimator(structure, radii)
            lag, runs = self.sample.lag, self.sample.runs
            found = [evaluate(estimator, run, lag)[0] for run in runs]
            squares = np.concatenate([np.asarray(e.squares, np.float64) for e in found])
            variance = float(np.mean([e.variance for e in found]))
            least = variance * found[0].noise_share
            tried[radii] = Trial(radii, squares, variance, least)
            self.report()
        return tried[radii]

    def best(self, structure: Structure) -> Trial:
        """The lowest loss along each line in turn, from the usual radii on."""
        best = self.trial(structure, structure.usual)
        for line in (_SCALE, _TIME, _Y, _X):
            for is_up in (True, False):
                start = best
                while (
                    radii := _step_along(best.radii, line, is_up, structure)
                ) is not None:
                    trial = self.trial(structure, radii)
                    if trial.loss > best.loss - _LEAST_GAIN * abs(best.loss):
                        break
                    best = trial
                if best is not start:
                    break
        lowest: Radii = best.radii
        for line in (_TIME, _Y, _X):
            lowest = self._lowest(structure, best, line, lowest)
        return min(self.trial(structure, lowest), best, key=lambda trial: trial.loss)

    def _sides(
        self, structure: Structure, radii: Radii, line: Any
    ) -> tuple[Trial, Trial] | None:
        """What was tried on both sides of these radii."""
        moved = [_step_along(radii, line, is_up, structure) for is_up in (False, True)]
        low, high = (None if m is None else self.trials[structure].get(m) for m in moved)
        return None if low is None or high is None else (low, high)

    def _lowest(self, structure: Structure, best: Trial, line: Any, radii: Radii) -> Radii:
        """The bottom of the parabola through what was tried on both sides."""
        sides = self._sides(structure, best.radii, line)
        if sides is None:
            return radii
        low, high = (side.loss - best.loss for side in sides)
        shift = (low - high) / (2 * (low + high)) if low + high > 0 else 0.0
        (axis,), step = line
        factor = step ** min(max(shift, -0.5), 0.5)
        frames, y, x = (r * factor if i == axis else r for i, r in enumerate(radii))
        return frames, y, x

    def radii_std(self, structure: Structure, radii: Radii) -> list[float]:
        """The standard error of each radius, from the scatter of slopes between blocks of
        frames and the curvature; NaN where that was not seen."""
        nearest = min(
            self.trials[structure].values(),
            key=lambda t: sum(
                abs(math.log((a or 1) / (b or 1)))
                for a, b in zip(t.radii, radii, strict=True)
            ),
        )
        stds = []
        for axes, step in (_TIME, _Y, _X):
            sides = self._sides(structure, nearest.radii, (axes, step))
            std = math.nan
            if sides is not None:
                low, high = sides
                length = math.log(step)
                slopes = (high.squares - low.squares) / (2 * length)
                curvature = (high.loss + low.loss - 2 * nearest.loss) / length**2
                error = standard_error(slopes)
                std = radii[axes[0]] * error / curvature if curvature > 0 else math.inf
            stds.append(std)
        return stds


def _step_along(radii: Radii, line: Any, is_up: bool, structure: Structure) -> Radii | None:
    """One step along a line, if that is allowed."""
    axes, step = line
    factor = step if is_up else 1 / step
    frames, y, x = (
        round(radius * factor, 6) if axis in axes else radius
        for axis, radius in enumerate(radii)
    )
    is_within = structure.shortest <= frames <= structure.longest
    is_within &= min(y, x) >= _LEAST_PIX and max(y, x) < 0.98 * _BOUNDS_PIX[-1]
    return (frames, y, x) if is_within and (frames, y, x) != radii else None
