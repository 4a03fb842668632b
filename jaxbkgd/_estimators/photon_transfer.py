"""A camera's offset, gain and read noise, measured by photon transfer."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .checks import checked_number


_Map = Float[np.ndarray, "height width"]

# Pixels that are read at a time.
_CHUNK_PIXELS = 2**23
_FEWEST_FRAMES = 10
# A pixel whose light is a smaller share of that of the others does not respond.
_LEAST_RESPONSE = 0.1
# A frame with a smaller share of the light of most was not, or not wholly, exposed.
_LEAST_LIGHT = 0.5
# The read noise in electrons of a pixel that must not count.
_DEAD_ELECTRONS = 1e4
# Shares beyond which the user is told: of the variance beside the line, and of the gain.
_MOST_BESIDE_LINE, _MOST_GAIN_STD = 0.05, 0.1
# The share of dark pixels that may be 0, and by which two measures of the noise differ.
_MOST_CUT, _MOST_SHARED = 0.05, 0.5
# Times that quarters of the field scatter by more than their errors, as a mean square. In
# 29 simulated movies it was at most 3.5, and 30 in a real one with lasers in turns.
_MOST_EXCESS = 8.0
# Of a movie alone: pairs of frames, pixels of a tile, times at which tiles are looked at,
# and the deviations beyond which a difference is a molecule.
_PAIRS, _TILE_PIX, _TIMES, _DEVIATIONS = 300, 16, 10, 3.0
# The variance of a normal number within three deviations.
_TRIMMED_VARIANCE = 0.97334


class CameraReport(NamedTuple):
    """A measured camera, `Camera(*report[:3])`, and its errors.

    **Attributes:** numbers, or maps `(height, width)`.

    - `offset_adu`, `gain_electrons_per_adu`, `read_noise_electrons`: those of a
        [`jaxbkgd.Camera`][].
    - `offset_std_adu`, `gain_std`, `read_noise_std_electrons`: their standard
        errors.
    - `levels_adu`, `variances_adu2`: the mean above the offset and the variance above that
        in the dark, for each brightness or tile. They lie on a line whose slope is one over
        the gain.
    - `doubts`: reasons not to believe the report, and what to do about them.
    """

    offset_adu: _Map | float
    gain_electrons_per_adu: _Map | float
    read_noise_electrons: _Map | float
    offset_std_adu: _Map | float
    gain_std: _Map | float
    read_noise_std_electrons: _Map | float
    levels_adu: Float[np.ndarray, " levels"]
    variances_adu2: Float[np.ndarray, " levels"]
    doubts: tuple[str, ...]


def measure_camera(
    dark: Any, bright: Sequence[Any] = (), *, gain: float | None = None
) -> CameraReport:
    """The maps of a camera, from frames in the dark and in a steady light of one or several
    brightnesses.

    The variance of each pixel rises with its mean, by one over the gain (photon transfer:
    Janesick, Photon Transfer, SPIE 2007; pixel by pixel: Huang et al., Nat. Methods 10,
    653, 2013). The light may be uneven and may flicker; frames taken before the shutter
    opens are left out. The gain of one pixel is known less well than the mean of all
    pixels, and is shrunk towards it accordingly (empirical Bayes).

    **Arguments:**

    - `dark`, `bright`: arrays (frames, height, width) in ADU, or objects that are sliced as
        such, like a channel of [`jaxbkgd.open_movie`][]; `bright` is a list of these.
    - `gain`: electrons per ADU, if there are only dark frames.

    **Raises:** `ValueError` for fewer than 10 frames, frames of different sizes or with
    pixels that are not finite, and for frames without light, or whose light saturates the
    camera.

    ```python
    >>> import numpy as np
    >>> import jaxbkgd
    >>> rng = np.random.default_rng(0)
    >>> dark, *bright = (
    ...     100 + 2 * rng.poisson(level, (200, 16, 16)) for level in (4, 40, 400)
    ... )
    >>> report = jaxbkgd.measure_camera(dark, bright)
    >>> bool(abs(report.gain_electrons_per_adu.mean() - 0.5) < 0.02)
    True

    ```
    """
    stacks = [dark, *bright]
    for number, stack in enumerate(stacks):
        name = f"bright {number}" if number else "dark"
        _check_stack(name, stack, np.shape(dark)[1:])
    offset, dark_variance = _moments("dark", dark)
    offset_std = np.sqrt(dark_variance / len(dark))
    if not bright:
        doubts = _cut_doubts(dark)
        return _dark_report(offset, dark_variance, offset_std, len(dark), gain, doubts)
    if gain is not None:
        raise ValueError("The gain is measured by bright frames; give those, or the gain.")
    moments = [
        _moments(f"bright {number}", stack, offset)
        for number, stack in enumerate(bright, 1)
    ]
    light = np.stack([mean - offset for mean, _ in moments])
    excess = np.stack([variance for _, variance in moments]) - dark_variance
    levels = np.median(light, axis=(1, 2))
    variances = np.median(excess, axis=(1, 2))
    if levels.max() <= 5 * np.median(offset_std):
        raise ValueError(
            f"Bright frames are {levels.max():.3g} ADU above the dark ones, which is no "
            "light; give brighter ones, after the dark ones."
        )
    for number, (level, variance) in enumerate(zip(levels, variances, strict=True), 1):
        if level < -5 * np.median(offset_std):
            what = f"bright {number}: is darker than the dark frames by {-level:.4g} ADU"
            raise ValueError(f"{what}; give the dark ones first.")
        if level > 5 * np.median(offset_std) and variance <= 0:
            raise ValueError(
                f"bright {number}: at {level:.4g} ADU above the offset it varies no more "
                "than the dark frames: it is saturated; leave it out."
            )
    is_dead = light[levels.argmax()] < _LEAST_RESPONSE * levels.max()
    counts = [len(stack) - 1 for stack in stacks]
    slope, slope_std = _slopes(light, excess, np.median(dark_variance), counts, is_dead)
    gain_map, read_noise = 1 / slope, np.sqrt(dark_variance) / slope
    read_noise_std = read_noise * np.hypot(slope_std / slope, 1 / math.sqrt(2 * counts[0]))
    read_noise = np.where(is_dead, _DEAD_ELECTRONS, read_noise)
    doubts = _line_doubts(levels, variances * np.median(gain_map))
    doubts += _cut_doubts(dark)
    if is_dead.any():
        doubts.append(
            f"{is_dead.sum()} pixels do not respond to light; their read noise is set to "
            f"{_DEAD_ELECTRONS:g} electrons, so that they do not count"
        )
    return CameraReport(
        offset,
        gain_map,
        read_noise,
        offset_std,
        slope_std / slope**2,
        read_noise_std,
        levels,
        variances,
        tuple(doubts),
    )


def measure_gain(
    frames: Any, *, offset_adu: float | None = None, read_noise_electrons: float = 0.0
) -> CameraReport:
    """One gain and offset of a camera, from a movie alone.

    The variance of the difference of successive frames is measured in tiles of 16 x 16 px,
    without smooth changes and molecules that appear. Minus that of the read noise, it rises
    linearly with the mean: it is zero at the offset, and the slope is one over the gain.
    For an EMCCD, the result is the gain that [`jaxbkgd.Camera`][] takes: half the electrons
    per ADU.

    The quarters of the field are also measured one by one. If they scatter by more than
    their errors, as where molecules flicker, the stated errors are larger by the same
    factor.

    **Arguments:**

    - `frames`: an array (frames, height, width) in ADU, or an object that is sliced as
        such.
    - `offset_adu`: the offset, if it is known. It makes the gain certain even in even
        light.
    - `read_noise_electrons`: the read noise.

    **Raises:** `ValueError` for fewer than 10 frames, and frames under 32 x 32 px. It is
    also raised where no two successive frames hold light, the variance does not rise with
    the mean, or the offset comes out above the darkest parts.
    """
    _check_stack("The movie", frames, np.shape(frames)[1:])
    read_noise = checked_number(
        "read_noise_electrons", read_noise_electrons, includes_minimum=True
    )
    if offset_adu is not None:
        offset_adu = checked_number("offset_adu", offset_adu, minimum=-math.inf, unit="ADU")
    if min(np.shape(frames)[1:]) < 2 * _TILE_PIX:
        raise ValueError(f"The movie has frames of {np.shape(frames)[1:]} px; give larger.")
    means, variances, quarters, excess_share = _tile_moments(frames)
    slope, zero, covariance = _line_through(means, variances, offset_adu)
    # The variance is zero at the offset less the read noise.
    fixed = offset_adu
    if offset_adu is not None and read_noise:
        for _ in range(4):
            zero = fixed = offset_adu - read_noise**2 * slope
            slope, _, covariance = _line_through(means, variances, fixed)
    if not slope > 0 or not math.isfinite(slope):
        raise ValueError(
            "The variance does not rise with the mean: all parts are about as bright, or a "
            "program has changed the movie; give the camera's offset, or a raw movie."
        )
    slopes, excess = _slopes_of_quarters(means, variances, quarters, fixed, slope)
    covariance = covariance * max(1.0, excess)
    gain, gain_std = 1 / slope, math.sqrt(covariance[0, 0]) / slope**2
    offset = zero + read_noise**2 * slope if offset_adu is None else offset_adu
    offset_std = math.sqrt(covariance[1, 1])
    darkest = np.percentile(means, 5)
    if offset_adu is None and offset > darkest + 3 * offset_std:
        raise ValueError(
            f"The offset comes out as {offset:.4g} ADU, but the darkest parts of the movie "
            f"have {darkest:.4g}: the movie is not raw, or its read noise is not "
            f"{read_noise:g} electrons; take dark and bright frames."
        )
    doubts = []
    if excess_share > _MOST_SHARED:
        doubts.append(
            "the noise of neighbouring pixels is alike, so that the movie is not raw: take "
            "dark and bright frames"
        )
    if excess > _MOST_EXCESS:
        gains = sorted(1 / slopes)
        doubts.append(
            f"the quarters of the field have gains from {gains[0]:.3g} to {gains[-1]:.3g}: "
            "molecules flicker, or the movie is not raw; take dark and bright frames"
        )
    if gain_std > _MOST_GAIN_STD * gain:
        doubts.append(
            f"the gain is known to {gain_std / gain:.0%} only, since all parts of the "
            "movie are about as bright: give the offset, or dark and bright frames"
        )
    if not read_noise:
        wrong = "offset is too low: by 5.6 ADU for 1.6 electrons at 0.46 electrons per ADU"
        if offset_adu is not None:
            wrong = "gain is too low: by 5 % for 1.6 electrons in a light of 50"
        doubts.append(f"the read noise is not known, by which the {wrong}; give it")
    dark = read_noise**2 * slope**2
    return CameraReport(
        offset,
        gain,
        read_noise,
        offset_std,
        gain_std,
        0.0,
        means - offset,
        variances - dark,
        tuple(doubts),
    )


def _check_stack(name: str, stack: Any, size: tuple[int, ...]) -> None:
    shape = np.shape(stack)
    if len(shape) != 3 or shape[1:] != size or shape[0] < _FEWEST_FRAMES:
        rule = f"(frames, height, width) with {_FEWEST_FRAMES} frames or more"
        of_dark = f", and {size} px as the dark frames" if name.startswith("b") else ""
        opened = (
            "; open a file by jaxbkgd.open_movie(path).channels[0]" if not shape else ""
        )
        raise ValueError(f"{name}: has the shape {shape}; give {rule}{of_dark}{opened}.")


def _moments(name: str, stack: Any, offset: _Map | None = None) -> tuple[_Map, _Map]:
    """The mean and the variance of each pixel. With an offset, the light of each frame is
    made that of their mean first; frames of a shutter that was not open are left out."""
    count = len(stack)
    step = max(1, _CHUNK_PIXELS // math.prod(np.shape(stack)[1:]))
    chunks = [slice(start, start + step) for start in range(0, count, step)]
    scales, is_lit = np.ones(count), np.ones(count, bool)
    if offset is not None:
        levels = [np.mean(np.asarray(stack[c], float) - offset, (1, 2)) for c in chunks]
        light = np.concatenate(levels)
        _check_finite(name, light)
        is_lit = np.abs(light) >= _LEAST_LIGHT * np.abs(np.median(light))
        scales = light[is_lit].mean() / np.where(light == 0, np.inf, light)
    first = np.asarray(stack[0], float)
    total, squares = np.zeros_like(first), np.zeros_like(first)
    for chunk in chunks:
        frames = np.asarray(stack[chunk], float)[is_lit[chunk]]
        if offset is not None:
            frames = offset + (frames - offset) * scales[chunk][is_lit[chunk], None, None]
        with np.errstate(invalid="ignore"):
            total += (frames - first).sum(axis=0)
            squares += np.square(frames - first).sum(axis=0)
    _check_finite(name, squares)
    count = np.count_nonzero(is_lit)
    mean = total / count
    return first + mean, (squares - count * mean**2) / (count - 1)


def _check_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: has pixels that are not finite; give frames without.")


def _dark_report(
    offset: _Map,
    variance: _Map,
    offset_std: _Map,
    count: int,
    gain: float | None,
    doubts: list[str],
) -> CameraReport:
    if gain is None:
        raise ValueError("Dark frames do not tell the gain; give it, or bright frames.")
    gain = checked_number("gain", gain, unit="electrons per ADU")
    noise = gain * np.sqrt(variance)
    noise_std, none = noise / math.sqrt(2 * (count - 1)), np.zeros(0)
    errors = offset_std, 0.0, noise_std
    return CameraReport(offset, gain, noise, *errors, none, none, tuple(doubts))


def _slopes(
    light: Float[np.ndarray, "levels height width"],
    excess: Float[np.ndarray, "levels height width"],
    dark_variance: float,
    counts: Sequence[int],
    is_dead: Any,
) -> tuple[_Map, _Map]:
    """One over the gain of each pixel, and its standard error: weighted least squares
    through the origin, drawn towards the mean of all pixels. Variances are chi-squared."""
    typical = np.median(excess, axis=(1, 2)) + dark_variance
    weights = (1 / typical**2)[:, None, None]
    total = (weights * light**2).sum(axis=0)
    raw = (weights * light * excess).sum(axis=0) / np.where(is_dead, np.inf, total)
    mean = np.median(raw[~is_dead])
    variances = dark_variance + mean * np.maximum(light, 0)
    of_levels = np.array(counts[1:])[:, None, None]
    noise = np.square(weights * light * variances) * 2 / of_levels
    of_dark = np.square((weights * light).sum(axis=0) * dark_variance) * 2 / counts[0]
    square_std = (noise.sum(axis=0) + of_dark) / np.where(is_dead, np.inf, total**2)
    # Of most pixels: a few may be unlike all others.
    near = np.abs(raw - mean) < 5 * np.sqrt(np.median(square_std[~is_dead])) + 0.2 * mean
    near &= ~is_dead
    mean = raw[near].mean()
    spread = max(raw[near].var() - square_std[near].mean(), 0.0)
    share = spread / (spread + square_std + 1e-12 * mean**2)
    slope = np.where(is_dead, mean, mean + share * (raw - mean))
    of_all = square_std[near].mean() / near.sum()
    std = np.sqrt(share * square_std + np.square(1 - share) * of_all)
    return np.clip(slope, 0.2 * mean, 5 * mean), std


def _cut_doubts(dark: Any) -> list[str]:
    share = np.mean(np.asarray(dark[:_FEWEST_FRAMES]) == 0)
    if share <= _MOST_CUT:
        return []
    return [
        f"{share:.0%} of the dark pixels are 0, at which the camera cuts its noise: the "
        "offset is too high and the read noise too low; raise the camera's offset"
    ]


def _line_doubts(levels: np.ndarray, electrons: np.ndarray) -> list[str]:
    """What lies beside the line."""
    beside = electrons / levels - 1
    return [
        f"at {level:.4g} ADU above the offset the variance is {off:+.0%} off the line: it "
        "is saturated, or the light was not steady; leave it out"
        for level, off in zip(levels, beside, strict=True)
        if abs(off) > _MOST_BESIDE_LINE
    ]


def _slopes_of_quarters(
    means: np.ndarray,
    variances: np.ndarray,
    quarters: np.ndarray,
    zero: float | None,
    slope: float,
) -> tuple[Float[np.ndarray, "4"], float]:
    """One over the gain in each quarter of the field, and the mean square of how far these
    are from that of all, in units of their standard errors."""
    fits = [
        _line_through(means[quarters == quarter], variances[quarters == quarter], zero)
        for quarter in range(4)
    ]
    slopes = np.array([of_quarter for of_quarter, _, _ in fits])
    squares = np.array([covariance[0, 0] for _, _, covariance in fits])
    # One of the four is not free, since their mean is nearly that of all.
    return slopes, float(np.sum((slopes - slope) ** 2 / squares) / 3)


def _tile_moments(frames: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """The mean and the variance in ADU of tiles at several times, which quarter of the
    field each is in, and the share by which the variance by steps along x is larger than
    that by second differences along y and x, as which it is alike in raw frames."""
    count = len(frames)
    starts = np.unique(np.linspace(0, count - 2, _PAIRS).astype(int))
    height, width = (n // _TILE_PIX * _TILE_PIX for n in np.shape(frames)[1:])
    lines, columns = height // _TILE_PIX, width // _TILE_PIX
    of_line, of_column = np.arange(lines) >= lines // 2, np.arange(columns) >= columns // 2
    quarter = np.ravel(2 * of_line[:, None] + of_column)
    means, variances, quarters, shares = [], [], [], []
    for group in np.array_split(starts, min(_TIMES, len(starts))):
        pairs = np.stack([np.asarray(frames[s : s + 2], float) for s in group.tolist()])
        pairs = pairs[:, :, :height, :width]
        # Lost frames are blank, or NaN.
        is_there = np.isfinite(pairs).any((2, 3)) & (np.ptp(pairs, (2, 3)) != 0)
        pairs = pairs[is_there.all(axis=1)]
        if not len(pairs):
            continue
        change = pairs[:, 1] - pairs[:, 0]
        steps = np.pad(np.diff(change), [(0, 0), (0, 0), (0, 1)], "edge")
        # Blind to what is smooth, and 36 times the variance of a pixel.
        for axis in (1, 2):
            widths = [(0, 0)] * 3
            widths[axis] = (1, 1)
            change = np.pad(np.diff(change, 2, axis), widths, "edge")
        change /= math.sqrt(2 * 36)
        levels, changes = _tiles(pairs.mean(axis=1)), _tiles(change)
        is_known = np.isfinite(levels).all(axis=1) & np.isfinite(changes).all(axis=1)
        means.append(levels[is_known].mean(axis=1))
        variances.append(_trimmed_variance(changes[is_known]))
        of_steps = _trimmed_variance(_tiles(steps / 2)[is_known])
        shares.append(np.median(of_steps / np.maximum(variances[-1], 1e-30)) - 1)
        quarters.append(quarter[is_known])
    if not means:
        raise ValueError(
            "No two successive frames are there, since others are blank or not finite; "
            "give a movie without these."
        )
    means, variances, quarters = map(np.concatenate, (means, variances, quarters))
    return means, variances, quarters, float(np.median(shares))


def _tiles(images: np.ndarray) -> np.ndarray:
    """The pixels of each tile of all images, (tiles, pixels)."""
    count, height, width = images.shape
    shape = count, height // _TILE_PIX, _TILE_PIX, width // _TILE_PIX, _TILE_PIX
    tiles = np.moveaxis(images.reshape(shape), (1, 3), (0, 1))
    return tiles.reshape(shape[1] * shape[3], -1)


def _trimmed_variance(values: np.ndarray) -> np.ndarray:
    """Of normal numbers, of which some are far off."""
    variance = np.square(1.4826 * np.median(np.abs(values), axis=1))
    for _ in range(3):
        limits = _DEVIATIONS**2 * variance[:, None]
        squares = np.where(values**2 <= limits, values**2, np.nan)
        variance = np.nanmean(squares, axis=1) / _TRIMMED_VARIANCE
    return variance


def _line_through(
    means: np.ndarray, variances: np.ndarray, zero: float | None
) -> tuple[float, float, np.ndarray]:
    """The slope and the zero of the variance over the mean, and their covariance from the
    scatter of tiles about the line."""
    is_light = (variances > 0) & (means > (-np.inf if zero is None else zero))
    means, variances = means[is_light], variances[is_light]
    if len(means) < 3:
        return math.nan, math.nan, np.full((2, 2), np.nan)
    columns = [means - (zero or 0.0), np.ones_like(means)][: 2 if zero is None else 1]
    design, fitted = np.stack(columns, axis=1), np.full_like(means, variances.mean())

    def fit() -> tuple[np.ndarray, np.ndarray]:
        # Variances scatter in proportion to themselves.
        scaled = design / fitted[:, None]
        inverse = np.linalg.pinv(scaled.T @ scaled)
        return inverse @ scaled.T @ (variances / fitted), inverse

    for _ in range(4):
        fitted = np.maximum(design @ fit()[0], 0.1 * variances)
    parameters, inverse = fit()
    left = (variances - design @ parameters) / fitted
    covariance = inverse * np.sum(left**2) / (len(left) - len(parameters))
    slope = float(parameters[0])
    if zero is not None:
        return slope, zero, np.diag([covariance[0, 0], 0.0])
    # The zero is -intercept / slope.
    jacobian = np.array([[1, 0], [parameters[1] / slope**2, -1 / slope]])
    return slope, float(-parameters[1] / slope), jacobian @ covariance @ jacobian.T
