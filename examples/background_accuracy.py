"""Background accuracy: how close each estimator that is installed comes to the truth, and
how close any could.

    python examples/background_accuracy.py [FOLDER] [--scenes NAME ...]
        [--estimators NAME ...] [--smoke]

It simulates a movie of each scene, and gives its frames, less the camera's offset, to the
estimators of `rivals.py` and to ours. Ours learn their radii from the movie, without the
truth. Where others have a size to choose, they get the one that is best for the scene, by
the truth. Beside them is the limit of `accuracy_bound.py`, and for some scenes what the
rest is lost to, by `accuracy_losses.py`.

It writes background_accuracy.json and .md to FOLDER, by default the current one, and to
its subfolder `figures` background_accuracy.png and, of the errors in one scene,
background_maps.png. What the .json has already is not measured again, so that a run that
was interrupted goes on; nor is background_maps.png drawn again. It takes about 50 minutes
on two cores, and half a minute with `--smoke`, of one small movie. It needs the extra
`bench`, and of smlmlp and arrlp, picassosr, sep, photutils and scikit-image uses what is
there.
"""

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from accuracy_bound import Bound, bound
from accuracy_losses import LOSS_SCENES, losses, single_frame
from accuracy_report import (
    draw_maps,
    LEARNED,
    read,
    Result,
    table,
    USUAL,
    write,
)
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


MEAN, LEARNED_MEAN = "SpatialMean, r = 7", "SpatialMean, learned"

ESTIMATORS = (
    *RIVALS,
    Estimator(MEAN, "jaxbkgd", with_usual_mean, "xk"),
    Estimator(LEARNED_MEAN, "jaxbkgd", with_learned_mean, "oC9"),
    Estimator(USUAL, "jaxbkgd", with_usual_local_mean, "xC3", knows_cameras=True),
    Estimator(LEARNED, "jaxbkgd", with_best_local_mean, "*C3", knows_cameras=True),
)

MAPPED_NAMES = (MEDIAN, MEAN, LEARNED_MEAN, LEARNED)


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


def measured(
    scene_name: str, movie: Movie, estimator: Estimator
) -> tuple[Result, np.ndarray]:
    """The result with the best setting, and its background in electrons."""
    camera, every = movie.camera, estimator.every
    frames = movie.frames[::every]
    # Where pixels differ, in electrons, in which even light is even.
    given = [np.asarray(camera.even_light(frames), np.float32)]
    if estimator.knows_cameras:
        given = [frames, camera]
    truth = movie.electrons(movie.bkgds_adu[::every])
    is_lit = truth > 0
    found = []
    for setting, bkgds in estimator.estimate(*given):
        above = bkgds if estimator.knows_cameras else camera.in_adu(bkgds)
        bkgds = movie.electrons(np.asarray(above, np.float64) + camera.offset_adu)
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
) -> tuple[list[Result], Bound | None, dict[str, np.ndarray]]:
    """A result for each estimator, the limit, and the middle of a frame as each sees its
    background.

    The images have the names of estimators, and "frame" and "truth"; all are in electrons.
    """
    (movie,) = simulated(scene, size_pix=size_pix, frame_count=frame_count)
    start = max(0, (size_pix - MAPPED_PIX) // 2)
    middle = (frame_count // 2, *2 * [slice(start, start + MAPPED_PIX)])
    images = {
        "frame": movie.electrons(movie.frames[middle]),
        "truth": movie.electrons(movie.bkgds_adu[middle]),
    }
    results = []
    for estimator in estimators:
        result, bkgds = measured(scene.name, movie, estimator)
        results.append(result)
        if estimator.every == 1:
            images[estimator.name] = bkgds[middle]
    return results, bound(scene, movie), images


# The run.


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
    here = installed()
    styles = {estimator.name: estimator.style for estimator in ESTIMATORS}
    sizes = {"size_pix": size_pix, "frame_count": frame_count}
    report = read(folder / "background_accuracy.json", (frame_count, size_pix, size_pix))
    maps = folder / "figures" / "background_maps.png"
    for scene_name in scene_names:
        scene = SCENES_BY_NAME[scene_name]
        done = {result.estimator for result in report.results if result.scene == scene_name}
        missing = [
            estimator.name
            for estimator in here
            if estimator.name in (estimator_names or [e.name for e in here])
            and estimator.name not in done
        ]
        is_mapped = scene_name == MAPPED_SCENE and not maps.exists()
        if is_mapped:
            # A picture needs all of them at once.
            missing += MAPPED_NAMES
        if not missing and scene_name in report.limits:
            continue
        chosen = [estimator for estimator in here if estimator.name in missing]
        found, limit, images = evaluated(scene, chosen, **sizes)
        report.results[:] = in_order([*report.results, *found])
        report.limits[scene_name] = limit
        write(report, styles, folder)
        if is_mapped:
            draw_maps(images, MAPPED_NAMES, maps)
        print(f"\n{scene_name}, limit {limit}")
        for result in found:
            error, bias = result.rms_electrons, result.bias_percent
            print(
                f"{result.estimator:32} {error:7.3f} e-  {bias:+7.2f} %  {result.setting}",
                flush=True,
            )
    # Also where all was done before, by another version of the page.
    write(report, styles, folder)
    print("", table(report), sep="\n", end="")


def show_losses(folder: Path, *, size_pix: int, frame_count: int) -> None:
    """What is lost to what, of scenes whose radii were learned."""
    report = read(folder / "background_accuracy.json", (frame_count, size_pix, size_pix))
    settings = {r.scene: r.setting for r in report.results if r.estimator == LEARNED}
    styles = {estimator.name: estimator.style for estimator in ESTIMATORS}
    for name in LOSS_SCENES:
        if not settings.get(name, "").startswith("LocalMean") or name in report.losses:
            continue
        scene = SCENES_BY_NAME[name]
        _, frames, y, x = settings[name].split(";")[0].split(", ")
        report.losses[name] = losses(
            scene,
            (float(frames), float(y), float(x)),
            size_pix=size_pix,
            frame_count=frame_count,
        )
        report.single_frames[name] = single_frame(scene, size_pix=size_pix)
        write(report, styles, folder)
        print(name, report.losses[name], report.single_frames[name], flush=True)


def show_smoke(folder: Path) -> None:
    """One small movie, without calibration, which takes the longest."""
    slow = (LEARNED, LEARNED_MEAN)
    show_accuracy(
        ["scale-20"],
        folder,
        size_pix=32,
        frame_count=24,
        estimator_names=[e.name for e in ESTIMATORS if e.name not in slow],
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
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
    parser.add_argument("--smoke", action="store_true", help="one small movie")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.smoke:
        show_smoke(options.folder)
    else:
        sizes = {"size_pix": options.size, "frame_count": options.frames}
        names = options.estimators
        show_accuracy(options.scenes, options.folder, estimator_names=names, **sizes)
        show_losses(options.folder, **sizes)
