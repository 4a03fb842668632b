"""What a calibration says of itself: the error, what molecules keep, and what to doubt."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._estimators.base import AbstractEstimator
from .._estimators.soft_clip import squared_noise
from .evaluation import evaluate, Evaluation
from .molecules import find_molecules, Molecules, static_light
from .prediction_error import REGION_PIX
from .sample import Sample
from .spikes import add_spikes, fitted_light


# Deviations of the mean that an interval is wide.
_INTERVAL = 2.0
# Times that molecules which never go off must be seen.
_FEWEST_STATIC = 20
# Frames of a run in which molecules are looked for.
_FRAMES_WITH_MOLECULES = 64
# A molecule may lose so much of its light; those of the movie, which a finer background
# moves, more.
MOST_LOST, _LEAST_SPOTS_KEPT = 0.02, 0.9
# A frame or region is not explained if what is left of it scatters by more than noise does
# by so many deviations, and by more than this share of the noise of a pixel.
_DEVIATIONS, _LEAST_SHARE = 5.0, 0.1
# Shares of frames, of regions and of pixels beyond which the user is told.
_MANY_FRAMES, _MANY_REGIONS, _MANY_CLIPPED = 0.02, 0.05, 0.09
# The share of pixels that count as if they had a molecule by their noise alone, as in
# movies without molecules.
_CLIPPED_NOISE = 0.09
# Shares of the variance by photons and reading between which that of the frames is, if
# gain and offset are right; and squared electrons of reading that may not be known.
_LEAST_VARIANCE, _MOST_VARIANCE, _UNKNOWN_VARIANCE = 0.7, 1.5, 9.0

_Frames = Float[Array, "frames height width"]


class Findings(NamedTuple):
    """The findings of a calibration about one channel, in photoelectrons if the gain of its
    camera is known, else in ADU.

    **Attributes:**

    - `unit`: `"e-"` or `"ADU"`.
    - `error`: the root mean square error of the background, and `error_interval` its
        interval of 95 %, as measured. `least_error` is the part of it that the noise of the
        frames and the light of faint molecules make in any case, and `noise` the standard
        deviation of the noise of a pixel.
    - `level`: the mean background, and `expected_noise` what the noise of a pixel is by
        the camera's gain and read noise; NaN if the gain is not known.
    - `molecules`: those of the movie; `on_frames` is how long they stay on.
    - `kept`, `kept_std`: the share of its light that such a molecule keeps, and the
        standard error of that; `scatter` is the standard deviation of fitted light, as a
        share.
    - `spots_kept`: the light of molecules that never go off, over that left by the first
        radii of the search; 1 without such molecules.
    - `clipped_share`: the share of the pixels that molecules cover.
    - `unexplained_frames`: the frames in which the model leaves more than noise.
        `unexplained` is the mean over time of the residual in regions of 16 x 16 pixels, as
        a share of the noise of a pixel; NaN outside of the sample.
    """

    unit: str
    error: float
    error_interval: tuple[float, float]
    least_error: float
    noise: float
    level: float
    expected_noise: float
    molecules: Molecules
    on_frames: float
    kept: float
    kept_std: float
    spots_kept: float
    scatter: float
    clipped_share: float
    unexplained_frames: Int[np.ndarray, " frames"]
    frame_count: int
    unexplained: Float[np.ndarray, "rows columns"]

    @property
    def unexplained_share(self) -> float:
        """The share of the regions in which more than noise is left."""
        left = self.unexplained[np.isfinite(self.unexplained)]
        return float(np.mean(left > _LEAST_SHARE))

    def rows(self) -> dict[str, str]:
        """The findings in words."""
        unit = self.unit
        low, high = (max(self.least_error, limit) for limit in self.error_interval)
        error = f"{max(self.least_error, self.error):.2g} {unit} ({low:.2g} to {high:.2g})"
        seen = self.molecules
        light = f"{seen.light:.3g} {unit}"
        kept = (
            f"{self.kept:.1%} +- {max(_INTERVAL * self.kept_std, 0.001):.1%} of their light"
        )
        left = len(self.unexplained_frames)
        return {
            "error": (
                f"{error}; the background is {self.level:.3g} {unit}, and the noise of a "
                f"pixel {self.noise:.3g}"
            ),
            "molecules": (
                f"{seen.per_frame:.1f} a frame of {light}, on for {self.on_frames:.1f} "
                f"frames, sigma {seen.psf_sigma_pix:.2f} px; over {self.clipped_share:.0%} "
                "of the pixels"
            ),
            "they keep": f"{kept}; a fit scatters by {self.scatter:.0%}",
            "not explained": (
                f"{left} of {self.frame_count} frames that were looked at, "
                f"{self.unexplained_share:.0%} of the field"
            ),
        }

    @property
    def takes_molecules(self) -> bool:
        """Whether molecules, added ones or those of the movie, lose their light to the
        background."""
        return self.kept < 1 - MOST_LOST or self.spots_kept < _LEAST_SPOTS_KEPT

    def doubts(self) -> list[str]:
        """Reasons not to believe the findings, and what to do about them."""
        doubts = []
        by_light = self.expected_noise**2
        most = _MOST_VARIANCE * by_light + _UNKNOWN_VARIANCE
        if self.noise**2 > most or self.noise**2 < _LEAST_VARIANCE * by_light:
            doubts.append(
                f"the noise of a pixel is {self.noise:.3g} e-, where light of "
                f"{self.level:.3g} e- makes {self.expected_noise:.3g}: the gain, the "
                "offset or the read noise is wrong (of an EMCCD, give half of the gain), "
                "or the frames were filtered"
            )
        low, high = self.error_interval
        if high < 0:
            doubts.append(
                "the error comes out negative, so that frames are not independent as they "
                "must be; was the movie filtered or averaged over time? give the raw one "
                "(or has it several patterns of light?)"
            )
        elif low <= 0:
            doubts.append(
                "the error is too small to be measured: it is between "
                f"{self.least_error:.2g} {self.unit}, from noise and faint molecules, and "
                f"{max(self.least_error, high):.2g}"
            )
        if self.takes_molecules:
            kept = min(self.kept, self.spots_kept)
            doubts.append(
                f"molecules keep only {kept:.0%} of their light; give larger radii"
            )
        share = len(self.unexplained_frames) / self.frame_count
        if share > _MANY_FRAMES:
            frames = _describe_frames(self.unexplained_frames)
            doubts.append(
                f"the light of {share:.0%} of the frames is not explained ({frames}): part "
                "of the field changes by itself, or the camera's offset is not subtracted"
            )
        many = self.unexplained_share
        if many > _MANY_REGIONS:
            doubts.append(
                f"in {many:.0%} of the field more than noise is left: the background is "
                "finer than the radii there, or molecules never go off, whose light then "
                "counts in the error; see where, and mask that part"
            )
        if self.clipped_share > _MANY_CLIPPED:
            doubts.append(
                f"molecules cover {self.clipped_share:.0%} of the pixels, and their faint "
                "light is in the background; the error may be twice as large"
            )
        return doubts


def molecules_of(
    estimator: AbstractEstimator, sample: Sample, psf_sigma_pix: float | None = None
) -> list[Molecules]:
    """Those of each channel that stand out of the background by this estimator."""
    run = sample.runs[0]
    return [
        find_molecules(
            _residuals(frames, of)[:: _step(frames)], float(of.variance), psf_sigma_pix
        )
        for frames, of in zip(run, evaluate(estimator, run, sample.lag), strict=True)
    ]


def blinking_molecules(sample: Sample, psf_sigma_pix: float | None) -> list[Molecules]:
    """Those of each channel that stand out of the median over time."""
    found = []
    for frames in sample.runs[0]:
        residuals = (frames - jnp.median(frames, axis=0))[:: _step(frames)]
        variance = float(jnp.mean(squared_noise(frames)))
        found.append(find_molecules(residuals, variance, psf_sigma_pix))
    return found


def findings_of(
    estimator: AbstractEstimator, sample: Sample, molecules: Sequence[Molecules]
) -> list[Findings]:
    """What the sample shows of an estimator, for each channel with these molecules."""
    spiked = [
        [
            add_spikes(frames, spikes, of.light, of.psf_sigma_pix)
            for frames, spikes, of in zip(run, sample.spikes, molecules, strict=True)
        ]
        for run in sample.runs
    ]
    before = [evaluate(estimator, run, sample.lag) for run in sample.runs]
    after = [evaluate(estimator, run, sample.lag) for run in spiked]
    return [
        _channel_findings(
            sample.of_channel(number),
            [run[number] for run in before],
            [run[number] for run in after],
            [run[number] for run in spiked],
            of_channel,
        )
        for number, of_channel in enumerate(molecules)
    ]


def _residuals(frames: _Frames, evaluation: Evaluation) -> _Frames:
    return jnp.nan_to_num(frames - evaluation.bkgds)


def _step(frames: _Frames) -> int:
    """Between the frames in which molecules are looked for."""
    return max(1, len(frames) // _FRAMES_WITH_MOLECULES)


def _channel_findings(
    sample: Sample,
    before: Sequence[Evaluation],
    after: Sequence[Evaluation],
    spiked: Sequence[_Frames],
    molecules: Molecules,
) -> Findings:
    """From the evaluation of each run of a channel, without and with spikes."""
    runs, (spikes,) = [frames for (frames,) in sample.runs], sample.spikes
    shares, sigma_pix = spikes.shares, jnp.asarray(molecules.psf_sigma_pix, jnp.float32)
    squares = np.concatenate([np.asarray(e.squares, np.float64) for e in before])
    variance = float(np.mean([e.variance for e in before]))
    level = float(np.mean([e.level for e in before]))
    clipped = float(np.mean([e.clipped_share for e in before]))
    # What the molecules of the movie add to the background, by what the spikes add.
    bias = np.mean([float(b.level - a.level) for a, b in zip(before, after, strict=True)])
    added = np.sum(shares > 0.5) / len(before[0].bkgds)
    bias *= molecules.per_frame / added if added else 0.0
    square, std = squares.mean(), standard_error(squares)
    interval = [signed_root(square + sign * _INTERVAL * std + bias**2) for sign in (-1, 1)]
    noise_square = variance * before[0].noise_share

    def at_spikes(images: Iterable[Array]) -> Float[np.ndarray, "runs images"]:
        fits = [fitted_light(of_run, spikes, sigma_pix) for of_run in images]
        return np.asarray(fits, np.float64)

    # Spikes beside what is masked are not seen as a whole.
    is_seen = at_spikes(1.0 * ~jnp.isfinite(frames) for frames in runs) == 0
    own = at_spikes(map(_residuals, runs, before))[is_seen]
    found = at_spikes(map(_residuals, spiked, after))[is_seen]
    shares = np.broadcast_to(shares, is_seen.shape)[is_seen]
    found, kept = found / molecules.light, (found - own) / molecules.light
    kept_share, whole = kept.sum() / shares.sum(), shares > 0.5
    scatter = (found - shares)[whole] / shares[whole]
    kept_std = np.std((kept - shares * kept_share)[whole])
    residuals = _residuals(runs[0], before[0])[:: _step(runs[0])]
    is_static = molecules.static_light.size >= _FEWEST_STATIC
    ratios = static_light(residuals, molecules) / molecules.static_light
    spots_kept = np.median(ratios) if is_static else 1.0
    frames = []
    seen, left = np.zeros((2, *sample.regions[0]))
    for run, evaluation in enumerate(before):
        is_left, of_region = _find_unexplained(evaluation, variance)
        frames.append(sample.frame_indices[run][0][is_left])
        y, x = sample.places[run][0]
        part = slice(y, y + of_region.shape[0]), slice(x, x + of_region.shape[1])
        left[part] += of_region
        seen[part] += 1
    return Findings(
        unit=sample.unit,
        error=signed_root(max(square, noise_square) + bias**2),
        error_interval=(interval[0], interval[1]),
        least_error=math.sqrt(noise_square + bias**2),
        noise=math.sqrt(variance),
        level=level,
        expected_noise=(
            math.sqrt(max(level, 0.0) + sample.read_noises[0] ** 2)
            if sample.unit == "e-"
            else math.nan
        ),
        molecules=molecules,
        # Dark frames lie between those of the sample.
        on_frames=sample.blinking[0].on_frames / sample.lit_shares[0],
        kept=float(kept_share),
        kept_std=float(kept_std / math.sqrt(max(1, whole.sum()))),
        spots_kept=float(spots_kept),
        scatter=float(1.4826 * np.median(np.abs(scatter - np.median(scatter)))),
        clipped_share=max(0.0, (clipped - _CLIPPED_NOISE) / (1 - _CLIPPED_NOISE)),
        unexplained_frames=np.concatenate(frames),
        frame_count=sum(len(indices) for (indices,) in sample.frame_indices),
        unexplained=np.where(seen > 0, left / np.maximum(seen, 1), np.nan),
    )


def doubts_of(findings: Sequence[Findings]) -> list[str]:
    """Those of all channels."""
    doubts = []
    for number, of_channel in enumerate(findings, 1):
        name = f"channel {number}: " if len(findings) > 1 else ""
        doubts += [name + doubt for doubt in of_channel.doubts()]
    return doubts


def standard_error(squares: Float[np.ndarray, " blocks"]) -> float:
    """That of the mean of errors, each of which is a mean of products of two blocks: each
    product is in the errors of both."""
    return float(squares.std() * math.sqrt(2 / len(squares)))


def signed_root(square: float) -> float:
    """The square root, negative for a negative square."""
    return math.copysign(math.sqrt(abs(square)), square)


def _find_unexplained(
    evaluation: Evaluation, variance: float
) -> tuple[Bool[np.ndarray, " frames"], Float[np.ndarray, "rows columns"]]:
    """Which frames have more left between regions than noise, and what is left in each
    region on average, as a share of the noise of a pixel."""
    counts = np.asarray(evaluation.counts, np.float64)
    light = np.asarray(evaluation.light, np.float64)
    growth = np.clip(light / light.mean(), 0.1, None)[:, None, None]
    noise = variance * growth / np.maximum(counts, 1)
    is_seen = counts > REGION_PIX**2 / 8
    squares = np.where(is_seen, np.square(np.asarray(evaluation.excess)), 0)
    seen = np.maximum(is_seen.sum((1, 2)), 1)
    surplus = (squares - noise * is_seen).sum((1, 2)) / seen
    spread = np.sqrt(2 * (np.square(noise) * is_seen).sum((1, 2))) / seen
    least = variance * growth[:, 0, 0] * _LEAST_SHARE**2
    is_left = surplus > np.maximum(_DEVIATIONS * spread, least)
    weight = np.maximum(counts.sum(axis=0), 1)
    left = np.abs((evaluation.excess * counts).sum(axis=0)) / weight
    return is_left, left / math.sqrt(variance)


def _describe_frames(frames: Int[np.ndarray, " frames"]) -> str:
    """These frames, and whether they recur."""
    first = ", ".join(map(str, frames[:3].tolist()))
    steps = np.diff(frames)
    step = int(np.median(steps)) if len(steps) > 4 else 1
    if step > 1 and np.mean(steps == step) > 0.8:
        return f"every {step} from frame {frames[0]} on"
    return f"{first} and others" if len(frames) > 3 else f"{first}"
