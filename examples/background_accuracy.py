"""Background accuracy: how close each estimator that is installed comes to the truth.

    python examples/background_accuracy.py [FOLDER] [--scenes NAME ...]
        [--estimators NAME ...]

It simulates a movie of each scene, and gives its frames, less the camera's offset, to
smlmlp (its temporal median, spatial mean, grey opening, and its pipeline of median and
mean), Source Extractor's mesh (sep), photutils, scikit-image's rolling ball, and ours.
Ours learn their radii from the movie, without the truth. Where others have a size to
choose, they get the one that is best for the scene, by the truth. It writes
background_accuracy.json and .md to FOLDER, by default the current one, and to its
subfolder `figures` background_accuracy.png and, of the errors in one scene,
background_maps.png. What the .json has already is not measured again, so that a run that
was interrupted goes on. It needs the extra `plots`.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rivals import Estimator, MEDIAN, RIVALS
from scenes import Movie, MOVING_SCENES, OTHER_SCENES, Scene, SCENES, simulated

import jaxbkgd


# A second channel tells nothing new of an estimator.
SCENES_BY_NAME = {
    scene.name: scene
    for scene in (*SCENES, *MOVING_SCENES, *OTHER_SCENES)
    if len(scene.lengths_pix) == 1
}

# The largest radius that the plain mean may learn.
MAX_RADIUS_PIX = 30.0

MAPPED_SCENE = "dense"
MAPPED_PIX = 56  # in the middle of the frame


# Our estimators.


def with_usual_mean(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "7 px", np.asarray(jaxbkgd.SpatialMean(7.0)(frames).bkgds)


def with_learned_mean(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    start = jaxbkgd.SpatialMean((7.0, 7.0), max_radius_pix=MAX_RADIUS_PIX)
    estimator, _ = jaxbkgd.calibrate(frames, start, progress=False)
    y, x = np.ravel(estimator.radii_pix)
    yield f"{y:.2f}, {x:.2f} px", np.asarray(estimator(frames).bkgds)


def _estimated(
    frames: np.ndarray, camera: jaxbkgd.Camera, estimator: jaxbkgd.AbstractEstimator
) -> np.ndarray:
    bkgds = np.empty(frames.shape, np.float32)
    jaxbkgd.estimate_movie(frames, estimator, bkgds, camera=camera, progress=False)
    return bkgds


def with_usual_local_mean(
    frames: np.ndarray, camera: jaxbkgd.Camera
) -> Iterator[tuple[str, np.ndarray]]:
    yield "30 frames, 7 px", _estimated(frames, camera, jaxbkgd.LocalMean())


def with_best_local_mean(
    frames: np.ndarray, camera: jaxbkgd.Camera
) -> Iterator[tuple[str, np.ndarray]]:
    estimator, history = jaxbkgd.calibrate(frames, camera=camera, progress=False)
    radii = ", ".join(f"{radius:.2f}" for radius in np.ravel(estimator.radii))
    # What it says of itself, to compare with the truth.
    stated = "; ".join(f"{found.error:.3f} e-" for found in history.findings)
    doubts = f"{len(history.doubts)} doubts"
    setting = f"{type(estimator).__name__}, {radii}; states {stated}, {doubts}"
    yield setting, _estimated(frames, camera, estimator)


USUAL = "SpatialMean, r = 7"
LEARNED = "SpatialMean, learned"
CLIPPED = "LocalMean, learned"

ESTIMATORS = (
    *RIVALS,
    Estimator(USUAL, "jaxbkgd", with_usual_mean, "xk"),
    Estimator(LEARNED, "jaxbkgd", with_learned_mean, "oC9"),
    Estimator(
        "LocalMean, as it is", "jaxbkgd", with_usual_local_mean, "xC3", knows_cameras=True
    ),
    Estimator(CLIPPED, "jaxbkgd", with_best_local_mean, "*C3", knows_cameras=True),
)

MAPPED_NAMES = (MEDIAN, USUAL, LEARNED, CLIPPED)


def installed() -> list[Estimator]:
    """The estimators that are here. Those that are not are named."""
    here = []
    for estimator in ESTIMATORS:
        if find_spec(estimator.package) is None:
            print(f"not installed, left out: {estimator.name} ({estimator.package})")
        else:
            here.append(estimator)
    return here


# Estimators beside the truth.


@dataclass(frozen=True)
class Result:
    """How far an estimator is from the true background of a scene.

    `rms_electrons` is the root-mean-square error over all pixels and frames, and
    `bias_percent` the mean of the error as a share of the local background. `setting` is
    what was chosen or learned.
    """

    scene: str
    estimator: str
    setting: str
    rms_electrons: float
    bias_percent: float


def measured(
    scene_name: str, movie: Movie, estimator: Estimator
) -> tuple[Result, np.ndarray]:
    """The result with the best setting, and its background in electrons."""
    gain, every = movie.gain_electrons_per_adu, estimator.every
    given = [np.subtract(movie.frames[::every], movie.offset_adu, dtype=np.float32)]
    level = 0.0
    if estimator.knows_cameras:
        given = [movie.frames[::every], movie.camera]
        level = movie.camera.offset_adu - movie.offset_adu
    truth = gain * (movie.bkgds_adu[::every] - movie.offset_adu)
    is_lit = truth > 0
    found = []
    for setting, bkgds_adu in estimator.estimate(*given):
        bkgds = gain * (bkgds_adu.astype(np.float64) + level)
        errors = bkgds - truth
        result = Result(
            scene=scene_name,
            estimator=estimator.name,
            setting=setting,
            rms_electrons=float(np.sqrt(np.mean(errors**2))),
            # Frames without light have no share.
            bias_percent=float(100 * np.mean(errors[is_lit] / truth[is_lit])),
        )
        found.append((result, bkgds))
    return min(found, key=lambda result_and_bkgds: result_and_bkgds[0].rms_electrons)


def evaluated(
    scene: Scene, estimators: Sequence[Estimator], *, size_pix: int, frame_count: int
) -> tuple[list[Result], dict[str, np.ndarray]]:
    """A result for each estimator, and the middle of a frame as each sees its background.

    The images have the names of estimators, and "frame" and "truth"; all are in electrons.
    """
    (movie,) = simulated(scene, size_pix=size_pix, frame_count=frame_count)
    start = max(0, (size_pix - MAPPED_PIX) // 2)
    middle = (frame_count // 2, *2 * [slice(start, start + MAPPED_PIX)])
    gain, offset = movie.gain_electrons_per_adu, movie.offset_adu
    images = {
        "frame": gain * (movie.frames[middle] - offset),
        "truth": gain * (movie.bkgds_adu[middle] - offset),
    }
    results = []
    for estimator in estimators:
        result, bkgds = measured(scene.name, movie, estimator)
        results.append(result)
        if estimator.every == 1:
            images[estimator.name] = bkgds[middle]
    return results, images


# The report.


def errors_by_scene(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Of each scene, the root-mean-square error of each estimator, in electrons; NaN where
    it has not been measured."""
    names = dict.fromkeys(result.estimator for result in results)
    errors = {result.scene: dict.fromkeys(names, np.nan) for result in results}
    for result in results:
        errors[result.scene][result.estimator] = result.rms_electrons
    return errors


def geometric_means(
    errors: Mapping[str, Mapping[str, float]], base: str
) -> dict[str, float]:
    """Of each estimator, the mean over scenes of its error as a ratio to the base's."""
    names = next(iter(errors.values()))
    return {
        name: float(
            np.exp(np.mean([np.log(row[name] / row[base]) for row in errors.values()]))
        )
        for name in names
    }


def table(results: Sequence[Result]) -> str:
    """Errors in electrons, the smallest of a scene in bold, and their means over scenes."""
    errors = errors_by_scene(results)
    names = list(next(iter(errors.values())))
    lines = [["scene", *names], ["---"] * (1 + len(names))]
    for scene, row in errors.items():
        best = np.nanmin([*row.values()])
        cells = (f"**{e:.2f}**" if e == best else f"{e:.2f}" for e in row.values())
        lines.append([scene, *cells])
    for base in (MEDIAN, USUAL):
        if base in names:
            ratios = geometric_means(errors, base).values()
            lines.append([f"mean ratio to {base}", *(f"{ratio:.2f}" for ratio in ratios)])
    return _markdown(lines)


def bias_table(results: Sequence[Result]) -> str:
    """Mean errors as shares of the local background, in percent."""
    biases = {(r.scene, r.estimator): r.bias_percent for r in results}
    errors = errors_by_scene(results)
    names = list(next(iter(errors.values())))
    lines = [["scene", *names], ["---"] * (1 + len(names))]
    for scene in errors:
        lines.append(
            [scene, *(f"{biases.get((scene, name), np.nan):+.2f}" for name in names)]
        )
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(results: Sequence[Result], path: Path) -> None:
    """The error of each estimator, scene by scene."""
    errors = errors_by_scene(results)
    places = range(len(errors))
    figure = Figure((8.5, 1.5 + 0.22 * len(errors)), dpi=80, layout="constrained")
    axes = figure.subplots()
    for estimator in ESTIMATORS:
        if estimator.name in next(iter(errors.values())):
            axes.plot(
                [row[estimator.name] for row in errors.values()],
                places,
                estimator.style,
                ms=6,
                label=estimator.name,
            )
    axes.set(
        xscale="log",
        xlabel="root-mean-square error of the background (e-)",
        yticks=places,
        yticklabels=list(errors),
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.invert_yaxis()
    axes.grid(axis="y", lw=0.4)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, pil_kwargs={"optimize": True})


def draw_maps(images: Mapping[str, np.ndarray], path: Path) -> None:
    """A frame, its background, and the errors of some estimators on one scale."""
    truth = images["truth"]
    errors = {name: images[name] - truth for name in MAPPED_NAMES if name in images}
    bound = np.percentile(np.abs(list(errors.values())), 99)
    panels = [
        ("frame (e-)", images["frame"], "magma", *np.percentile(images["frame"], [1, 99])),
        ("truth (e-)", truth, "magma", truth.min(), truth.max()),
        *(
            (f"error of {name} (e-)", error, "RdBu_r", -bound, bound)
            for name, error in errors.items()
        ),
    ]
    figure = Figure((8.5, 5.2), dpi=100, layout="constrained")
    every_axes = list(figure.subplots(2, 3).flat)
    for axes in every_axes:
        axes.set_axis_off()
    for axes, (title, image, colours, low, high) in zip(every_axes, panels, strict=False):
        colours = colormaps[colours].resampled(48)
        shown = axes.imshow(image, cmap=colours, vmin=low, vmax=high)
        figure.colorbar(shown, ax=axes, shrink=0.9)
        axes.set_title(title, fontsize=9)
    # Noise hardly compresses, but with few colours it is small enough.
    figure.savefig(path, pil_kwargs={"optimize": True})


def read(path: Path, movie_shape: tuple[int, int, int]) -> list[Result]:
    """What has been measured already."""
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if kept["movie_shape"] != list(movie_shape):
        raise SystemExit(
            f"{path} is of movies of {kept['movie_shape']}, not of {list(movie_shape)}; "
            "give another folder."
        )
    return [Result(**fields) for fields in kept["results"]]


def write(
    results: Sequence[Result], movie_shape: tuple[int, int, int], folder: Path
) -> None:
    path = folder / "background_accuracy.json"
    kept = {"movie_shape": movie_shape, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    frame_count, height_pix, width_pix = movie_shape
    path.with_suffix(".md").write_text(
        "# Accuracy of the background\n\n"
        f"On simulated movies of {frame_count} frames of {height_pix} x {width_pix} px, by "
        "`examples/background_accuracy.py`. [Figures of them](local-mean.md"
        "#how-close-each-comes) are on the page about the local mean over time.\n\n"
        f"## Root-mean-square error (e-)\n\n{table(results)}\n"
        f"## Mean error (% of the local background)\n\n{bias_table(results)}"
    )
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    draw(results, figures / "background_accuracy.png")


def in_order(results: Sequence[Result]) -> list[Result]:
    """By scene and estimator, the last one of each."""
    last = {(result.scene, result.estimator): result for result in results}
    places = [(scene, e.name) for scene in SCENES_BY_NAME for e in ESTIMATORS]
    return [last[place] for place in places if place in last]


def show_accuracy(
    scene_names: Sequence[str],
    folder: Path,
    *,
    size_pix: int,
    frame_count: int,
    estimator_names: Sequence[str] = (),
) -> None:
    """What is done is written after each scene. Without names, all estimators."""
    movie_shape = (frame_count, size_pix, size_pix)
    here = installed()
    results = read(folder / "background_accuracy.json", movie_shape)
    for scene_name in scene_names:
        done = {result.estimator for result in results if result.scene == scene_name}
        missing = [
            estimator.name
            for estimator in here
            if estimator.name in (estimator_names or [e.name for e in here])
            and estimator.name not in done
        ]
        if not missing:
            continue
        is_mapped = scene_name == MAPPED_SCENE
        if is_mapped:
            # A picture needs all of them at once.
            missing += MAPPED_NAMES
        found, images = evaluated(
            SCENES_BY_NAME[scene_name],
            [estimator for estimator in here if estimator.name in missing],
            size_pix=size_pix,
            frame_count=frame_count,
        )
        results = in_order([*results, *found])
        write(results, movie_shape, folder)
        if is_mapped:
            draw_maps(images, folder / "figures" / "background_maps.png")
        print(f"\n{scene_name}")
        for result in found:
            error, bias = result.rms_electrons, result.bias_percent
            print(
                f"{result.estimator:32} {error:7.3f} e-  {bias:+7.2f} %  {result.setting}",
                flush=True,
            )
    print("", table(results), sep="\n", end="")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument(
        "--scenes",
        choices=SCENES_BY_NAME,
        nargs="+",
        default=[*SCENES_BY_NAME],
        metavar="NAME",
    )
    parser.add_argument(
        "--estimators",
        choices=[estimator.name for estimator in ESTIMATORS],
        nargs="+",
        default=[],
        metavar="NAME",
    )
    parser.add_argument("--size", type=int, default=128, help="of a frame, in pixels")
    parser.add_argument("--frames", type=int, default=300, help="of a movie")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    show_accuracy(
        options.scenes,
        options.folder,
        size_pix=options.size,
        frame_count=options.frames,
        estimator_names=options.estimators,
    )
