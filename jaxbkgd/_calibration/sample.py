"""The part of a movie that a calibration looks at."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from .._estimators.camera import Camera
from .._estimators.channels import Channels, checked_frames
from .._movies.movie import Channel
from .blinking import Blinking, blinking_of, molecule_residuals, UnlearnableError
from .prediction_error import REGION_PIX
from .spikes import Spikes, spread_spikes


# Pixels of all windows and channels together, unless the fewest windows need more.
_SAMPLE_PIXELS, _MOST_WINDOWS, _FEWEST_WINDOWS = 2**25, 16, 8
# Size of a window for an estimator that sees several frames at a time.
_RUN_PIXELS, _SHORTEST_RUN_FRAMES = 2**24, 64
# For a search without gradients: runs of successive frames, spread over a movie that is
# much longer, and the pixels of all of them together, in tiles no narrower than this.
_RUN_FRAMES, _MOST_RUNS, _SEARCH_PIXELS, _TILE_PIX = 300, 3, 4_500_000, 96
_LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 150)
# The least share of pixels that count, and the largest one of frames that are blank.
_LEAST_SEEN, _MOST_BLANK = 0.1, 0.2
# A frame is dark below this share of the light that so many of all frames exceed both
# before and after it: one that has bleached is not, nor one beside a flash.
_LEAST_LIGHT, _LIT_FRAMES = 0.03, 0.05
# Frames in which the light changes little by bleaching.
_FLICKER_FRAMES = 17
# The mean of frames of light is more than this share of their standard deviation.
_LEAST_LEVEL = 0.02
# Fewer do not show what radii are good, nor how molecules fare.
FEWEST_FRAMES, FEWEST_PIXELS = 30, 16

_Frames = Float[Array, "frames height width"]
_Levels = Float[np.ndarray, " frames"]


class Window(NamedTuple):
    """Frames of all channels, and their places in the movie."""

    channels: Channels
    frame_indices: Int[Array, " frames"]


def draw_windows(
    channels: Any, cameras: Sequence[Camera], lag: int, sees_one_frame: bool
) -> list[Window]:
    """Windows of equal length, spread evenly: runs of frames as they are estimated, and
    partners `lag` later and twice that."""
    opened: list[Channel] = jax.tree.leaves(channels)
    frame_count = len(opened[0])
    # An estimator that sees several frames needs one to predict from beyond the lag.
    fewest = 2 * lag + (1 if sees_one_frame else 2)
    if lag and frame_count < fewest:
        raise ValueError(
            f"The movie has {frame_count} frames, but at least {fewest} are needed for a "
            f"lag of {lag} frames; give a longer movie, or a shorter lag."
        )
    frame_pixels = sum(math.prod(channel.shape[1:]) for channel in opened)
    most_frames = _SAMPLE_PIXELS // frame_pixels
    if sees_one_frame:
        # Many windows of a short run and its partners, which are one run if they overlap.
        first_count, share = frame_count - 2 * lag, most_frames // _MOST_WINDOWS
        fitting = max(share // 3, share - 2 * lag, 1)
        length = min(math.ceil(first_count / _MOST_WINDOWS), fitting)
        fitting = max(most_frames // (length + 2 * min(length, lag)), _FEWEST_WINDOWS)
        count = min(math.ceil(first_count / length), fitting, _MOST_WINDOWS)
        last, partners = first_count - length, [0, lag, 2 * lag] if lag else [0]
        if length > lag > 0:
            length, partners = length + 2 * lag, [0]
    else:
        # Few windows of one long run, since frames near its ends lack their neighbours.
        length = max(_RUN_PIXELS // frame_pixels, _SHORTEST_RUN_FRAMES, 4 * lag)
        length = min(length, frame_count)
        count = min(frame_count // length, max(most_frames // length, 1))
        last, partners = frame_count - length, [0]
    windows = []
    for start in np.linspace(0, last, count).round().astype(int).tolist():
        runs = [(start + later, start + later + length) for later in partners]
        indices = jnp.concatenate([jnp.arange(*run) for run in runs])
        frames = []
        for number, (channel, camera) in enumerate(zip(opened, cameras, strict=True), 1):
            name = f" of channel {number}" if len(opened) > 1 else ""
            frames.append(read_frames(channel, name, camera, runs))
        structured = jax.tree.unflatten(jax.tree.structure(channels), frames)
        windows.append(Window(structured, indices))
    return windows


class Sample(NamedTuple):
    """Runs of frames in parts of the field, for trying estimators on, without those that
    are dark, which show nothing.

    **Attributes:**

    - `runs`: the frames of all channels in each run.
    - `frame_indices`: their places in the movie.
    - `lit_shares`: the share of frames that are not dark, for each channel.
    - `dark_frames`: how many are, in the channel with the most.
    - `places`: where in regions of 16 x 16 px the tile of each channel begins in each run,
        and `regions` how many the field of each channel has.
    - `blinking`: how long the molecules of each channel stay on.
    - `lag`: frames that are so far apart share no molecules in any channel.
    - `unit`: of the frames, `"e-"` or `"ADU"`.
    - `read_noises`: of each channel in electrons, as far as they are known.
    """

    runs: Sequence[list[_Frames]]
    frame_indices: Sequence[list[Int[np.ndarray, " frames"]]]
    lit_shares: Sequence[float]
    dark_frames: int
    places: Sequence[list[tuple[int, int]]]
    regions: Sequence[tuple[int, int]]
    blinking: Sequence[Blinking]
    lag: int
    unit: str
    read_noises: Sequence[float]

    @property
    def spikes(self) -> list[Spikes]:
        """Molecules to add to each channel, that are on for as long as its own."""
        return [
            spread_spikes(frames.shape, blinking.on_frames)
            for frames, blinking in zip(self.runs[0], self.blinking, strict=True)
        ]

    def of_channel(self, number: int) -> "Sample":
        return self._replace(
            runs=[[channels[number]] for channels in self.runs],
            frame_indices=[[of_run[number]] for of_run in self.frame_indices],
            lit_shares=[self.lit_shares[number]],
            places=[[of_run[number]] for of_run in self.places],
            regions=[self.regions[number]],
            blinking=[self.blinking[number]],
            read_noises=[self.read_noises[number]],
        )


def draw_sample(
    channels: Sequence[Channel],
    masks: Sequence[Channel | None],
    cameras: Sequence[Camera],
    *,
    keeps_dark: bool = False,
) -> Sample:
    """Frames as light, in electrons where the gain is known, as it is of all cameras or of
    none, else in ADU; pixels that a mask leaves out are NaN. For an estimator that is
    given, dark frames stay. `UnlearnableError` for a movie of which nothing can be
    learned."""
    if len(channels[0]) < FEWEST_FRAMES:
        raise UnlearnableError(
            f"the movie has {len(channels[0])} frames, too few to learn radii from: "
            f"give {FEWEST_FRAMES} or more"
        )
    runs, starts, places = _draw_runs(channels, masks, cameras)
    lit = [
        [np.arange(len(frames)) if keeps_dark else lit_frames(frames) for frames in of]
        for of in zip(*runs, strict=True)
    ]
    drawn = len(runs) * len(runs[0][0])
    shares = [sum(map(len, of)) / drawn for of in lit]
    counts = [min(len(of[run]) for of in lit) for run in range(len(runs))]
    # Runs that are mostly dark are left out, and the others have one length.
    fewest = max(FEWEST_FRAMES, max(counts) / 2)
    kept = [run for run, count in enumerate(counts) if count >= fewest]
    if max(counts) < FEWEST_FRAMES:
        raise UnlearnableError(
            f"only {max(counts)} of {len(runs[0][0])} frames are not dark: give a movie "
            f"with {FEWEST_FRAMES} of these or more"
        )
    lengths = [min(len(of[run]) for run in kept) for of in lit]
    frame_indices, lit_runs = [], []
    for run in kept:
        of_run = [of[run][:length] for of, length in zip(lit, lengths, strict=True)]
        frame_indices.append([starts[run] + frames for frames in of_run])
        lit_runs.append([f[of] for f, of in zip(runs[run], of_run, strict=True)])
    runs, places = lit_runs, [places[run] for run in kept]
    regions = [
        (-(-height // REGION_PIX), -(-width // REGION_PIX))
        for _, height, width in (channel.shape for channel in channels)
    ]
    for run in runs:
        for frames in run:
            _check_learnable(frames)
    blinking = [_blinking_of(frames) for frames in runs[0]]
    # One of few, for which programs may have been compiled. A frame is compared with others
    # as far away on both sides.
    lag = next(n for n in _LAGS if n >= max(of.lag for of in blinking))
    lag = min(lag, min(map(len, runs[0])) // 3)
    unit = "e-" if cameras[0].is_gain_known else "ADU"
    dark = round(drawn * (1 - min(shares)))
    squares = [jnp.mean(jnp.square(c.read_noise_electrons)) for c in cameras]
    return Sample(
        runs,
        frame_indices,
        shares,
        dark,
        places,
        regions,
        blinking,
        lag,
        unit,
        [float(square) ** 0.5 for square in squares],
    )


def _blinking_of(frames: _Frames) -> Blinking:
    """How long molecules stay on, after each frame is scaled to the slow course of the
    light: frames differ by more where it flickers."""
    levels, window = _levels(frames), np.ones(_FLICKER_FRAMES)
    count = np.convolve(np.ones(len(levels)), window, "same")
    slow = np.convolve(levels, window, "same") / count
    is_lit = levels > _LEAST_LIGHT * slow
    gains = is_lit * slow / np.where(is_lit, levels, 1)
    even = jnp.nan_to_num(frames) * jnp.asarray(gains, frames.dtype)[:, None, None]
    return blinking_of(molecule_residuals(even, 1))


def _levels(frames: _Frames) -> _Levels:
    levels = np.nan_to_num(np.asarray(jnp.nanmean(frames, axis=(1, 2)), np.float64))
    return np.maximum(levels, 0)


def lit_frames(frames: _Frames) -> Int[np.ndarray, " lit"]:
    """The frames of a run that are not dark."""
    levels = _levels(frames)
    count = max(1, round(_LIT_FRAMES * len(levels)))

    def exceeded(levels: _Levels) -> _Levels:
        """By `count` of the frames up to each one; 0 where there are fewer."""
        found = np.zeros(len(levels))
        for n in range(count, len(levels) + 1):
            found[n - 1] = np.partition(levels[:n], n - count)[n - count]
        return found

    usual = np.minimum(exceeded(levels), exceeded(levels[::-1])[::-1])
    is_dark = levels < _LEAST_LIGHT * usual
    # Also at the ends, where there are no brighter ones on one side.
    return np.flatnonzero(levels > np.max(levels[is_dark], initial=-1))


def _check_learnable(frames: _Frames) -> None:
    height, width = frames.shape[1:]
    if min(height, width) < FEWEST_PIXELS:
        raise UnlearnableError(
            f"frames of {height} x {width} px have no room for molecules: give "
            f"{FEWEST_PIXELS} x {FEWEST_PIXELS} or more"
        )
    share = float(np.isfinite(frames).mean())
    if share < _LEAST_SEEN:
        raise UnlearnableError(
            f"only {share:.0%} of the pixels count, and the others are masked or not "
            f"finite: give a movie and a mask that leave {_LEAST_SEEN:.0%} or more"
        )
    is_changing, blank, mean, std = map(float, _statistics(frames))
    if not is_changing:
        raise UnlearnableError("nothing changes from frame to frame: give a movie of light")
    if blank > _MOST_BLANK:
        raise UnlearnableError(
            f"{blank:.0%} of the frames are blank: choose the others, as with frames="
        )
    if not mean > _LEAST_LEVEL * std:
        raise UnlearnableError(
            "without the camera's offset, frames are zero on average or below: give "
            "the offset as it is, and frames of which no background was subtracted"
        )


@jax.jit
def _statistics(
    frames: _Frames,
) -> tuple[Bool[Array, ""], Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Whether any pixel changes, the share of blank frames, mean and standard deviation."""
    lows, highs = (f(frames, axis=(1, 2)) for f in (jnp.nanmin, jnp.nanmax))
    is_changing = jnp.any(jnp.nanmax(frames, axis=0) > jnp.nanmin(frames, axis=0))
    return is_changing, jnp.mean(lows == highs), jnp.nanmean(frames), jnp.nanstd(frames)


def _draw_runs(
    channels: Sequence[Channel], masks: Sequence[Channel | None], cameras: Sequence[Camera]
) -> tuple[list[Any], list[int], list[Any]]:
    """Runs of frames as light, each of another part of the field, where they begin in the
    movie, and where these parts begin. Pixels that a mask leaves out are NaN."""
    frame_count = len(channels[0])
    length = min(frame_count, _RUN_FRAMES)
    count = min(max(round(frame_count / length / 1.5), 1), _MOST_RUNS)
    last, runs, places = frame_count - length, [], []
    starts = np.linspace(0, last, count).round().astype(int).tolist()
    for number, start in enumerate(starts):
        parts, begins = [], []
        for channel, mask, camera in zip(channels, masks, cameras, strict=True):
            share = (number + 0.5) / count
            tile = _tile(_field(channel, mask), count * length, share)
            parts.append(_read_tile(channel, mask, camera, tile, start, start + length))
            begins.append(tuple(part.start // REGION_PIX for part in tile))
        runs.append(parts)
        places.append(begins)
    return runs, starts, places


def _field(channel: Channel, mask: Channel | None) -> tuple[slice, slice]:
    """The lines and columns that hold all that a mask leaves, from a region on."""
    fields = []
    for axis, length in ((1, channel.shape[1]), (0, channel.shape[2])):
        kept = np.arange(length)
        if mask is not None and (is_left := (mask[0] > 0).any(axis=axis)).any():
            kept = np.flatnonzero(is_left)
        fields.append(slice(kept[0] // REGION_PIX * REGION_PIX, kept[-1] + 1))
    return fields[0], fields[1]


def _tile(
    field: tuple[slice, slice], frame_count: int, share: float
) -> tuple[slice, slice]:
    """A part of the field that begins at a region, as large as the sample may be, this
    share of the way through."""
    side = max(math.isqrt(_SEARCH_PIXELS // frame_count), _TILE_PIX)
    size = [lines.stop - lines.start for lines in field]
    height, width = (min(side, length) for length in size)
    # A field that is narrow along one axis leaves more for the other one.
    height, width = min(size[0], side**2 // width), min(size[1], side**2 // height)
    y, x = (
        lines.start + int(share * (whole - part)) // REGION_PIX * REGION_PIX
        for lines, whole, part in zip(field, size, (height, width), strict=True)
    )
    return slice(y, y + height), slice(x, x + width)


def _read_tile(
    channel: Channel,
    mask: Channel | None,
    camera: Camera,
    tile: tuple[slice, slice],
    start: int,
    stop: int,
) -> _Frames:
    # Whole frames are read, of which few are held.
    step = max(1, _SEARCH_PIXELS // math.prod(channel.shape[1:]))
    chunks, camera = [], camera.cropped(*tile)
    light_of = camera.electrons if camera.is_gain_known else camera.above_offset
    for first in range(start, stop, step):
        run = slice(first, min(first + step, stop))
        frames = light_of(channel[run][:, *tile].astype(np.float32))
        if mask is not None:
            weights = mask[run if len(mask) > 1 else slice(1)][:, *tile]
            frames = np.where(weights > 0, frames, np.nan)
        chunks.append(np.where(np.isfinite(frames), frames, np.nan))
    return jnp.asarray(np.concatenate(chunks))


def read_frames(
    channel: Channel, name: str, camera: Camera, runs: list[tuple[int, int]]
) -> Shaped[Array, "frames height width"]:
    """The frames of runs (start, stop) as they are estimated, all finite; an error calls
    the channel `name`."""
    frames = np.concatenate([checked_frames(channel[slice(*run)]) for run in runs])
    # In NumPy: JAX itself would raise where it is set to find NaNs.
    is_finite = np.isfinite(frames)
    if not is_finite.all():
        frame, y, x = np.argwhere(~is_finite)[0]
        index = np.concatenate([np.arange(*run) for run in runs])[frame]
        raise ValueError(
            f"Frame {index}{name} holds {frames[frame, y, x]} at y = {y}, x = {x}, and "
            "calibration needs finite frames; replace such pixels, for example by their "
            "neighbours' median, or leave these frames out."
        )
    return camera.even_light(jnp.asarray(frames))
