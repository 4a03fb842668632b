"""A whole movie, from a file to a file: its radius is learned, its SNR map written.

    python examples/whole_movie.py [FOLDER]

It writes a simulated TIFF movie of 2 000 frames to FOLDER (by default the folder it runs
in), unless there is one from before, and estimates it on all cores: 330 MB in all. Ctrl-C
ends that; run it again, and it goes on. What it has written is read back, and drawn to
whole_movie.png. For a movie of your own, set `source`, offset and gain. It needs the
extras `movies` and `plots`, and takes half a minute on two cores.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import tifffile
from matplotlib.figure import Figure

import jaxbkgd


OFFSET_ADU, GAIN_ELECTRONS_PER_ADU = 100.0, 0.46


def main(
    folder: Path, frame_count: int = 2000, size_pix: int = 128
) -> tuple[jaxbkgd.SpatialMean, dict[str, jaxbkgd.MovieSummary]]:
    """The calibrated estimator, and what was done for each result."""
    source = folder / "movie.tif"
    if not source.exists():
        simulate(source, frame_count, size_pix)

    with jaxbkgd.open_movie(source) as movie:
        few = np.asarray(movie.channels[0][:200], np.float32) - OFFSET_ADU
    start = jaxbkgd.SpatialMean(7.0, max_radius_pix=30.0)
    estimator, _ = jaxbkgd.calibrate(few, start)
    print(f"radii (px)        {np.round(estimator.radii_pix[0], 2)}")

    summaries = {}
    for quantity in ("background", "snr"):
        summary = summaries[quantity] = jaxbkgd.estimate_movie(
            source,
            estimator,
            folder / f"{quantity}.ome.tif",
            quantity=quantity,
            camera=jaxbkgd.Camera(OFFSET_ADU, GAIN_ELECTRONS_PER_ADU),
            overwrite=True,
        )
        print(f"{quantity:16}  {summary.frames} frames in {summary.seconds:.1f} s")
    draw(source, folder)
    return estimator, summaries


def simulate(path: Path, frame_count: int, size_pix: int) -> None:
    """A movie that loses four tenths of its background."""
    movie, _ = jaxbkgd.simulate_movie(
        jax.random.key(0),
        frame_count=frame_count,
        height_pix=size_pix,
        width_pix=size_pix,
        molecules_per_frame=size_pix / 16,
        bkgd_remaining=0.6,
        gain_electrons_per_adu=GAIN_ELECTRONS_PER_ADU,
        offset_adu=OFFSET_ADU,
    )
    tifffile.imwrite(path, np.asarray(movie), photometric="minisblack")


def draw(source: Path, folder: Path) -> None:
    """One frame, and what was written of it; and the mean background of each frame."""
    figure = Figure((11, 2.7), dpi=85, layout="constrained")
    *image_axes, level_axes = figure.subplots(1, 4)
    titles = {
        source: "frame (ADU)",
        folder / "background.ome.tif": "background (ADU)",
        folder / "snr.ome.tif": "SNR",
    }
    for axes, (path, title) in zip(image_axes, titles.items(), strict=True):
        with jaxbkgd.open_movie(path) as movie:
            (image,) = movie.channels[0][:1]
        low, high = np.percentile(image, [0.5, 99.8])
        shown = axes.imshow(image, cmap="magma", vmin=low, vmax=high)
        figure.colorbar(shown, ax=axes)
        axes.set(title=title, xticks=[], yticks=[])
    with jaxbkgd.open_movie(folder / "background.ome.tif") as movie:
        (bkgds,) = movie.channels
        # A part at a time: the whole need not fit into memory.
        starts = range(0, len(bkgds), 100)
        levels = [bkgds[start : start + 100].mean((1, 2)) for start in starts]
    level_axes.plot(np.concatenate(levels), color="#1b6ca8", lw=1)
    level_axes.set(title="mean background (ADU)", xlabel="frame", ylim=(0, None))
    figure.savefig(folder / "whole_movie.png")
    print("wrote whole_movie.png")


if __name__ == "__main__":
    # Before JAX makes its first array: calls run side by side.
    jaxbkgd.one_thread_a_call()
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
