"""Backgrounds beside the truth of simulators that other people have written.

    python examples/other_simulators.py FOLDER

It reads the movies that `examples/simulator_movies.py` has made in FOLDER, NAME.npz, and
any others with the same arrays; estimates their background; and prints how far each is from
the truth, in electrons, and what calibration says of itself. It writes other_simulators.md,
and other_simulators.png with a frame of each movie, to FOLDER. It needs the extra `plots`,
and for the median smlmlp.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accuracy_report import LEARNED, Result, USUAL
from background_accuracy import installed, MEAN, measured
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rivals import BASIC, MEDIAN
from scenes import Movie

import jaxbkgd


GIVEN = (LEARNED, USUAL, MEAN, MEDIAN, "smlmlp median, best window", BASIC)


def read_movie(path: Path) -> Movie:
    with np.load(path) as arrays:
        camera = jaxbkgd.Camera(
            float(arrays["offset_adu"]),
            float(arrays["gain_electrons_per_adu"]),
            float(arrays["read_noise_electrons"]),
        )
        frames = arrays["frames"]
        return Movie(frames, np.broadcast_to(arrays["bkgds"], frames.shape), camera)


def errors_in(path: Path) -> tuple[list[Result], dict[str, np.ndarray]]:
    """Of each background of a movie, and images of the frame in the middle."""
    movie = read_movie(path)
    middle = len(movie.frames) // 2
    images = {
        "frame": movie.electrons(movie.frames[middle]),
        "true background": movie.electrons(movie.bkgds_adu[middle]),
    }
    found = []
    for estimator in installed():
        if estimator.name in GIVEN:
            result, bkgds = measured(path.stem, movie, estimator)
            found.append(result)
            print(
                f"{result.scene}, {result.estimator}: {result.rms_electrons:.3f} e-, "
                f"{result.bias_percent:+.2f} %; {result.setting}",
                flush=True,
            )
            if estimator.name == LEARNED:
                images[LEARNED] = bkgds[middle]
                images["its error"] = bkgds[middle] - images["true background"]
    return found, images


def table(results: Sequence[Result]) -> str:
    """Root-mean-square errors in electrons, with mean errors in percent of the local
    background."""
    names = list(dict.fromkeys(result.estimator for result in results))
    cells = {
        (r.scene, r.estimator): f"{r.rms_electrons:.2f} ({r.bias_percent:+.1f} %)"
        for r in results
    }
    rows = [["movie", *names], ["---"] * (1 + len(names))]
    for scene in dict.fromkeys(result.scene for result in results):
        rows.append([scene, *(cells.get((scene, name), "") for name in names)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(images: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    figure = Figure((9.0, 2.2 * len(images)), dpi=80, layout="constrained")
    rows = figure.subplots(len(images), 4, squeeze=False)
    for row, (scene, of_scene) in zip(rows, images.items(), strict=True):
        for axes, (name, image) in zip(row, of_scene.items(), strict=True):
            _show(axes, f"{scene}: {name}" if name == "frame" else name, image)
    figure.savefig(path, pil_kwargs={"optimize": True})


def _show(axes: Axes, title: str, image: np.ndarray) -> None:
    low, high = np.percentile(image, [0.5, 99.5])
    shown = axes.imshow(image, cmap="magma", vmin=low, vmax=high)
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)


def main(folder: Path) -> list[Result]:
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        sys.exit(f"{folder}: has no .npz; make some with examples/simulator_movies.py")
    results: list[Result] = []
    images = {}
    for path in paths:
        found, images[path.stem] = errors_in(path)
        results += found
    text = f"Errors of the background in e-, and its mean:\n\n{table(results)}"
    (folder / "other_simulators.md").write_text(text)
    draw(images, folder / "other_simulators.png")
    print(text)
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
