"""On your own movie: what is found in it, and what each background costs, on one page.

    python examples/on_your_movie.py MOVIE [FOLDER] [--offset ADU] [--gain E_PER_ADU]

The truth is not known of a real movie. So each background is asked for what is known. One
in a hundred pixels is hidden, anywhere in the frames, by the mean of its neighbours: how
far is the background from what was there? And molecules of known light are added
("spikes"): how much of it does a fit find in what is left of the frames? The page is
NAME-on-your-movie.md in FOLDER (by default the current one), with a picture of each
channel. A movie of fewer than 30 frames gets a picture, and a line that says why not more.
It needs the extra `plots`, and `movies` for files.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxbkgd
from jaxbkgd import Channel
from jaxbkgd._calibration.blinking import molecule_residuals
from jaxbkgd._calibration.spikes import add_spikes, fitted_light, spread_spikes


# What backgrounds are compared on: so many frames and pixels in the middle of the movie.
MOST_FRAMES, MOST_PIX = 300, 256
HIDDEN_SHARE = 0.01
# A hidden pixel does not count if the frame around it is brighter than the background by so
# many deviations: there may be a molecule.
BRIGHT_DEVIATIONS = 2.0
CALIBRATED = "the calibrated one"

Frames = Float[np.ndarray, "frames height width"]
Hidden = Bool[np.ndarray, "frames height width"]


@dataclass(frozen=True)
class Score:
    """Of one background: the root mean square distance of hidden pixels from it, with its
    standard error in `errors`, and that part of it that is above the best background's; the
    mean distance; and the share of the light of added molecules that is kept, with its
    standard error, and the scatter of what a fit finds, as a share."""

    name: str
    hidden: float
    above_best: float
    above_best_std: float
    mean: float
    kept: float
    kept_std: float
    scatter: float


def hide_pixels(frames: Frames) -> tuple[Frames, Hidden]:
    """Frames in which some pixels have the mean of their four neighbours, and which."""
    is_hidden = np.random.default_rng(0).random(frames.shape) < HIDDEN_SHARE
    # Not two that are neighbours of each other, nor at the border.
    for axis in (1, 2):
        is_hidden &= ~np.roll(is_hidden, 1, axis)
    is_hidden[:, [0, -1]] = is_hidden[:, :, [0, -1]] = False
    steps = [(1, 1), (1, 2), (-1, 1), (-1, 2)]
    neighbours = np.mean([np.roll(frames, *step) for step in steps], axis=0)
    return np.where(is_hidden, neighbours, frames), is_hidden


def is_dark(frames: Frames) -> Hidden:
    """Where no molecule is, as far as these frames show."""
    residuals = frames - np.asarray(jaxbkgd.LocalMean()(frames).bkgds)
    filtered = np.asarray(molecule_residuals(residuals, 1))
    middle = np.median(filtered)
    # The lower half of them, where no molecules are.
    deviation = middle - np.quantile(filtered, 0.159)
    return filtered < middle + BRIGHT_DEVIATIONS * deviation


def scores(
    frames: Frames,
    estimators: dict[str, jaxbkgd.AbstractEstimator],
    light: float,
    on_frames: float,
    psf_sigma_pix: float,
) -> list[Score]:
    """Of each background. What is not finite is zero, and not asked for."""
    is_number = np.isfinite(frames)
    frames = np.where(is_number, frames, np.float32(0))
    hidden_frames, is_hidden = hide_pixels(frames)
    counts = is_hidden & is_number & is_dark(hidden_frames)
    spikes = spread_spikes(frames.shape, on_frames)
    spiked = np.asarray(add_spikes(frames, spikes, light, psf_sigma_pix))
    is_whole = spikes.shares > 0.5
    distances, fits = {}, {}
    for name, estimator in estimators.items():
        bkgds = np.asarray(estimator(hidden_frames).bkgds)
        distances[name] = (frames - bkgds)[counts].astype(float)
        residuals = [given - estimator(given).bkgds for given in (frames, spiked)]
        fits[name] = [
            np.asarray(fitted_light(of_each, spikes, psf_sigma_pix), float) / light
            for of_each in residuals
        ]
    best = min(distances, key=lambda name: np.mean(distances[name] ** 2))
    found = []
    for name, (before, after) in fits.items():
        squares = distances[name] ** 2
        above = squares - distances[best] ** 2
        above_std = np.std(above) / math.sqrt(len(above))
        root = math.sqrt(max(0.0, above.mean()))
        kept = (after - before).sum() / spikes.shares.sum()
        each = (after - before)[is_whole] - kept * spikes.shares[is_whole]
        errors = after[is_whole] / spikes.shares[is_whole]
        found.append(
            Score(
                name,
                hidden=math.sqrt(squares.mean()),
                above_best=root,
                above_best_std=math.sqrt(max(0.0, above.mean()) + above_std) - root,
                mean=float(distances[name].mean()),
                kept=float(kept),
                kept_std=float(np.std(each) / math.sqrt(max(1, len(each)))),
                scatter=float(1.4826 * np.median(np.abs(errors - np.median(errors)))),
            )
        )
    return found


def table(found: Sequence[Score], unit: str) -> str:
    rows = [
        ["background", f"hidden pixels ({unit})", f"above the best ({unit})"],
        ["---"] * 6,
    ]
    rows[0] += [f"mean ({unit})", "light kept", "scatter of a fit"]
    for score in found:
        above = "the best"
        if score.above_best > 0:
            above = f"{score.above_best:.2g} (+ {score.above_best_std:.1g})"
        kept = f"{score.kept:.1%} ± {max(0.001, score.kept_std):.1%}"
        row = [score.name, f"{score.hidden:.4g}", above, f"{score.mean:+.2g}", kept]
        rows.append([*row, f"{score.scatter:.1%}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(path: Path, frames: Frames, bkgds: Frames, unit: str) -> None:
    """A frame, its background, what is left of it, and the same of the mean over time."""
    middle = len(frames) // 2
    frame, bkgd = frames[middle], bkgds[middle]
    left = (frames - bkgds).mean(axis=0)
    height, width = frame.shape
    figure = Figure((9.0, 6.2 * min(2.0, height / width) + 1.0), dpi=80)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(2, 3)
    _show(grid[0, 0], f"frame {middle} ({unit})", frame)
    _show(grid[0, 1], "its background", bkgd, "viridis")
    _show(grid[0, 2], "what is left", frame - bkgd)
    _show(grid[1, 0], "mean over time", frames.mean(axis=0))
    _show(grid[1, 1], "what is left in the mean", left)
    grid[1, 2].plot(frames.mean((1, 2)), ".-", ms=3, lw=1, label="frames")
    grid[1, 2].plot(bkgds.mean((1, 2)), ".-", ms=3, lw=1, label="background")
    grid[1, 2].set(title=f"mean of each frame ({unit})", xlabel="frame")
    grid[1, 2].legend(frameon=False)
    figure.savefig(path, pil_kwargs={"optimize": True})


def _show(axes: Axes, title: str, image: np.ndarray, colours: str = "magma") -> None:
    low, high = np.nanpercentile(image, [0.5, 99.7])
    shown = axes.imshow(image, cmap=colours, vmin=low, vmax=high)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)


def about_channel(channel: Channel, camera: jaxbkgd.Camera, picture: Path) -> list[str]:
    """The lines of the page on a channel."""
    estimator, history = jaxbkgd.calibrate(channel, camera=camera, progress=False)
    unit = "e-" if camera.is_gain_known else "ADU"
    frames = _middle(channel, camera)
    shown = np.where(np.isfinite(frames), frames, np.float32(0))
    draw(picture, shown, np.asarray(estimator(shown).bkgds), unit)
    radii = ", ".join(f"{radius:.3g}" for radius in np.ravel(estimator.radii))
    kind = type(estimator).__name__
    lines = [f"![A frame, its background and what is left]({picture.name})", ""]
    if not history.findings:
        return [f"**{history.doubts[0]}.**", "", *lines]
    (findings,) = history.findings
    rows = {"estimator": f"{kind}, radii {radii} (frames, y px, x px)", **history.rows()}
    lines += [f"- **doubt**: {doubt}" for doubt in history.doubts]
    lines += [f"- **{name}**: {text}" for name, text in rows.items()]
    estimators = {
        CALIBRATED: estimator,
        "LocalMean()": jaxbkgd.LocalMean(),
        "SpatialMean(7)": jaxbkgd.SpatialMean(7.0),
        "TemporalMedian()": jaxbkgd.TemporalMedian(),
    }
    molecules = findings.molecules
    found = scores(
        frames, estimators, molecules.light, findings.on_frames, molecules.psf_sigma_pix
    )
    count, height, width = frames.shape
    made_on = (
        f"On {count} frames of {height} x {width} px in the middle of the movie, with "
        f"spikes of {molecules.light:.3g} {unit}:"
    )
    return [*lines, "", made_on, "", table(found, unit)]


def _middle(channel: Channel, camera: jaxbkgd.Camera) -> Frames:
    """Frames and pixels in the middle of a channel, in electrons if the gain is known."""
    most = MOST_FRAMES, MOST_PIX, MOST_PIX
    parts = tuple(
        slice(max(0, (length - size) // 2), max(0, (length - size) // 2) + size)
        for length, size in zip(channel.shape, most, strict=True)
    )
    gain = camera.known_gain("A page") if camera.is_gain_known else 1.0
    frames = gain * camera.above_offset(channel[parts].astype(np.float32))
    return np.asarray(frames, np.float32)


def write_page(source: Path, folder: Path, camera: jaxbkgd.Camera) -> Path:
    """The page of a movie; `MovieError` for what cannot be read."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{source.name}-on-your-movie.md"
    with jaxbkgd.open_movie(source) as movie:
        count, channels, height, width = movie.shape
        size = f"frames: {count}, channels: {channels}, {height} x {width} px"
        lines = [f"# {source.name}", "", f"{movie.format}; {size}, {movie.dtype}"]
        for number, channel in enumerate(movie.channels, 1):
            picture = path.with_name(f"{path.stem}-{number}.png")
            lines += ["", f"## Channel {number}", ""] if channels > 1 else [""]
            lines += about_channel(channel, camera, picture)
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("movie", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--offset", type=float, default=0.0, help="of the camera, in ADU")
    parser.add_argument("--gain", type=float, help="electrons per ADU, if it is known")
    options = parser.parse_args(arguments)
    camera = jaxbkgd.Camera(options.offset, options.gain)
    try:
        path = write_page(options.movie, options.folder, camera)
    except jaxbkgd.MovieError as error:
        sys.exit(str(error))
    print(path)
    return path


if __name__ == "__main__":
    main()
