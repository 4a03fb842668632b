"""In nanometres and photons: what each background costs a fit of molecules.

    python examples/localization_accuracy.py [FOLDER] [--movies 4] [--smoke]

It simulates movies, estimates their background in several ways, and fits molecules by
maximum likelihood in boxes of 7 x 7 px, with each background taken as known, and with a
free constant in its place. Molecules are in focus or, with astigmatic images, at any
height. The fit begins at the truth, and is of molecules that are alone and far from the
border: it is about backgrounds, not about detection. What it finds is compared with the
truth, and its errors with the bound of Cramer and Rao where the background is known. It
writes localization_accuracy.json, .md and, to `figures`, .png to FOLDER (by default the
current one); a run that was interrupted goes on. `--smoke` does it with one small movie. It
needs the extra `plots`, and for the median smlmlp.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from accuracy_report import LEARNED, USUAL
from background_accuracy import installed, MEAN, measured
from gaussian_fit import BOX_PIX, Fit
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from rivals import Estimator, MEDIAN
from scenes import Molecules, Movie, MOVING_SCENES, Scene, SCENES, simulated


PIXEL_NM = 100.0
# A molecule has the light of most of a frame, no other one within some pixels along y or x,
# and as many to the border.
LEAST_SHARE, ALONE_PIX = 0.8, 10.0
DEPTH_NM = 300.0
# With fewer photons no fit attains the bound in z, whatever background it is given.
PHOTONS_IN_DEPTH, DIM_PHOTONS = 2000.0, 300.0

_GIVEN = {scene.name: scene for scene in (*SCENES, *MOVING_SCENES)}
SCENES_2D = (
    replace(_GIVEN["scale-20"], name="ordinary"),
    replace(_GIVEN["cell-edge"], beyond_pix=8),
    _GIVEN["pulse"],
    replace(_GIVEN["scale-20"], name="dim", photons_per_frame=DIM_PHOTONS),
)
SCENES_3D = tuple(
    replace(
        scene,
        name=f"{scene.name} 3D",
        photons_per_frame=PHOTONS_IN_DEPTH,
        depth_nm=DEPTH_NM,
    )
    for scene in SCENES_2D[:3]
)

TRUE, FREE = "the truth", "a free constant"
GIVEN = (LEARNED, USUAL, MEAN, MEDIAN)
STYLES = {
    TRUE: "ok",
    LEARNED: "*C3",
    USUAL: "xC3",
    MEAN: "xk",
    MEDIAN: "sC1",
    FREE: "^C2",
}


@dataclass(frozen=True)
class Error:
    """Of one coordinate, in nm, or of photons, in percent: the mean error, the root mean
    square of errors about it, and of errors over their bound, beside its standard error;
    and how many times this is that of the fit with the true background."""

    bias: float
    scatter: float
    of_bound: float
    of_bound_std: float
    of_true: float
    of_true_std: float


@dataclass(frozen=True)
class Result:
    """Of the fits with one background in one scene; the background's error is its root mean
    square over all pixels, in electrons."""

    scene: str
    bkgd: str
    molecules: int
    bkgd_electrons: float
    position: Error
    photons: Error
    height: Error | None


@dataclass(frozen=True)
class Spots:
    """Molecules that are alone: the frame and the first row and column of their box, and
    their true parameters, as `Fit` has them."""

    frame: Int[np.ndarray, " molecules"]
    y: Int[np.ndarray, " molecules"]
    x: Int[np.ndarray, " molecules"]
    parameters: Float[np.ndarray, "molecules parameters"]

    def boxes(
        self, frames: Float[np.ndarray, "frames height width"]
    ) -> Float[np.ndarray, "molecules rows columns"]:
        steps = np.arange(BOX_PIX)
        rows, columns = (self.y[:, None] + steps)[:, :, None], (self.x[:, None] + steps)
        boxes = frames[self.frame[:, None, None], rows, columns[:, None]]
        return boxes.astype(np.float32)


def spots_of(molecules: Molecules, scene: Scene, size_pix: int) -> Spots:
    """The molecules of a scene that are fitted."""
    is_on = molecules.photons > 0
    is_good = molecules.photons >= LEAST_SHARE * scene.photons_per_frame
    for places in (molecules.y_pix, molecules.x_pix):
        is_good &= (places > ALONE_PIX) & (places < size_pix - 1 - ALONE_PIX)
    of_frames = zip(molecules.y_pix, molecules.x_pix, is_on, strict=True)
    is_good &= np.array([_is_alone(*of_frame) for of_frame in of_frames])
    y_pix, x_pix, photons = (
        of_each[is_good]
        for of_each in (molecules.y_pix, molecules.x_pix, molecules.photons)
    )
    y, x = (np.rint(places).astype(int) - BOX_PIX // 2 for places in (y_pix, x_pix))
    columns = [y_pix - y, x_pix - x, photons]
    if scene.depth_nm:
        columns.append(molecules.z_nm[is_good])
    return Spots(np.nonzero(is_good)[0], y, x, np.stack(columns, axis=1, dtype=np.float32))


def _is_alone(
    y_pix: Float[np.ndarray, " places"],
    x_pix: Float[np.ndarray, " places"],
    is_on: Bool[np.ndarray, " places"],
) -> Bool[np.ndarray, " places"]:
    """Whether no other molecule of the frame is near."""
    apart = [np.abs(places[:, None] - places) for places in (y_pix, x_pix)]
    is_near = (np.maximum(*apart) < ALONE_PIX) & is_on
    return is_near.sum(axis=1) == is_on


def fit_errors(
    scene: Scene, movies: Sequence[Movie], estimators: Sequence[Estimator]
) -> list[Result]:
    """With each background, and with a free constant, over all movies of a scene."""
    fit = Fit(is_astigmatic=scene.depth_nm > 0)
    errors: dict[str, list[np.ndarray]] = {}
    bkgd_errors: dict[str, list[float]] = {}
    truths, limits = [], []
    for movie in movies:
        assert movie.molecules is not None
        spots = spots_of(movie.molecules, scene, movie.frames.shape[1])
        boxes = spots.boxes(movie.electrons(movie.frames))
        truth = np.broadcast_to(movie.electrons(movie.bkgds_adu), movie.frames.shape)
        true_boxes, start = spots.boxes(truth), spots.parameters
        truths.append(start)
        limits.append(np.asarray(fit.bounds(start, true_boxes)))
        bkgds = {TRUE: truth}
        for estimator in estimators:
            bkgds[estimator.name] = measured(scene.name, movie, estimator)[1]
        for name, bkgd in bkgds.items():
            found = np.asarray(fit.fitted(start, spots.boxes(bkgd), boxes))
            errors.setdefault(name, []).append(found - start)
            squares = float(np.mean((bkgd - truth) ** 2))
            bkgd_errors.setdefault(name, []).append(squares)
        free = replace(fit, has_free_bkgd=True)
        level = true_boxes.mean((1, 2))[:, None]
        found = free.fitted(jnp.concatenate([start, level], 1), true_boxes, boxes)
        errors.setdefault(FREE, []).append(np.asarray(found)[:, :-1] - start)
        bkgd_errors.setdefault(FREE, []).append(np.nan)
    truth, limit = np.concatenate(truths), np.concatenate(limits)
    of_each = {name: np.concatenate(found) for name, found in errors.items()}
    return [
        Result(
            scene.name,
            name,
            len(truth),
            float(np.sqrt(np.mean(bkgd_errors[name]))),
            position=_error(found, of_each[TRUE], limit, [0, 1], PIXEL_NM),
            photons=_error(found, of_each[TRUE], limit, [2], 100 / truth[:, [2]]),
            height=_error(found, of_each[TRUE], limit, [3], 1.0)
            if scene.depth_nm
            else None,
        )
        for name, found in of_each.items()
    ]


def _error(
    found: Float[np.ndarray, "molecules parameters"],
    true: Float[np.ndarray, "molecules parameters"],
    limit: Float[np.ndarray, "molecules parameters"],
    columns: list[int],
    unit: float | Float[np.ndarray, "molecules 1"],
) -> Error:
    """From errors with a background, those with the true one, and bounds."""
    in_unit = found[:, columns] * unit
    square, true_square = (
        np.square(errors / limit)[:, columns].mean(axis=1, dtype=float)
        for errors in (found, true)
    )
    of_bound, of_true = np.sqrt([square.mean(), square.mean() / true_square.mean()])
    # The deviations of a molecule's part in each ratio.
    part = square / square.mean()
    stds = [np.std(of) for of in (part, part - true_square / true_square.mean())]
    of_bound_std, of_true_std = (
        ratio * std / (2 * np.sqrt(len(found)))
        for ratio, std in zip((of_bound, of_true), stds, strict=True)
    )
    scatter = np.sqrt(in_unit.var(axis=0).mean())
    numbers = in_unit.mean(), scatter, of_bound, of_bound_std, of_true, of_true_std
    return Error(*map(float, numbers))


def table(results: Sequence[Result]) -> str:
    """Means and scatters of errors, and their ratios to the bound and to those of the fit
    with the true background, with standard errors."""
    heads = ["scene", "background", "its error (e-)", "x, y (nm)", "over bound"]
    heads += ["over that of the truth", "photons (%)", "over bound", "z (nm)", "over bound"]
    rows = [heads, ["---"] * len(heads)]
    for result in results:
        row = [result.scene, result.bkgd]
        of_bkgd = result.bkgd_electrons
        row.append("" if np.isnan(of_bkgd) else f"{of_bkgd:.2f}")
        position = result.position
        row += [f"{position.bias:+.2f}, {position.scatter:.2f}"]
        row += [_with_std(position.of_bound, position.of_bound_std)]
        row += [_with_std(position.of_true, position.of_true_std)]
        for error in (result.photons, result.height):
            if error is not None:
                row.append(f"{error.bias:+.1f}, {error.scatter:.1f}")
                row.append(_with_std(error.of_bound, error.of_bound_std))
        rows.append(row + [""] * (len(heads) - len(row)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _with_std(value: float, std: float) -> str:
    return f"{value:.3f} ± {std:.3f}"


def draw(results: Sequence[Result], path: Path) -> None:
    """How far errors are above the bound, scene by scene."""
    scenes = list(dict.fromkeys(r.scene for r in results))
    kinds = {"x, y": "position", "photons": "photons", "z": "height"}
    figure = Figure((8.5, 1.6 + 0.32 * len(scenes)), dpi=90, layout="constrained")
    every_axes = figure.subplots(1, 3, sharey=True)
    for axes, (title, kind) in zip(every_axes, kinds.items(), strict=True):
        for name, style in STYLES.items():
            # What lies beyond 1 is what the fit loses.
            points = [
                (max(1e-3, error.of_bound - 1), scenes.index(r.scene))
                for r in results
                if r.bkgd == name and (error := vars(r)[kind]) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, ms=6, label=name)
        axes.axvline(0.02, color="0.7", lw=0.8, zorder=0)
        axes.set(xscale="log", xlabel="error over bound, less 1", title=title)
        axes.grid(axis="y", lw=0.4)
    every_axes[0].set_yticks(range(len(scenes)), scenes)
    every_axes[0].invert_yaxis()
    handles, labels = every_axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=8
    )
    figure.savefig(path, pil_kwargs={"optimize": True})


def show_accuracy(
    scenes: Sequence[Scene],
    folder: Path,
    *,
    size_pix: int,
    frame_count: int,
    movie_count: int,
) -> list[Result]:
    """Writes what is found, after each scene."""
    estimators = [estimator for estimator in installed() if estimator.name in GIVEN]
    estimators.sort(key=lambda estimator: GIVEN.index(estimator.name))
    made_on = f"{movie_count} movies of {frame_count} frames of {size_pix} x {size_pix} px"
    results = read(folder, made_on)
    for scene in scenes:
        if scene.name not in {result.scene for result in results}:
            movies = [
                simulated(
                    scene,
                    size_pix=size_pix,
                    frame_count=frame_count,
                    seed=scene.seed + number,
                )[0]
                for number in range(movie_count)
            ]
            found = fit_errors(scene, movies, estimators)
            print(table(found), flush=True)
            results += found
        write(results, made_on, folder)
    return results


def read(folder: Path, made_on: str) -> list[Result]:
    """What has been measured already."""
    path = folder / "localization_accuracy.json"
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if kept["made_on"] != made_on:
        was = kept["made_on"]
        raise SystemExit(f"{path} is of {was}, not of {made_on}; give another folder.")
    kinds = "position", "photons", "height"
    return [
        Result(**row | {kind: row[kind] and Error(**row[kind]) for kind in kinds})
        for row in kept["results"]
    ]


def write(results: Sequence[Result], made_on: str, folder: Path) -> None:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    kept = {"made_on": made_on, "results": [asdict(result) for result in results]}
    path = folder / "localization_accuracy.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    draw(results, folder / "figures" / "localization_accuracy.png")
    path.with_suffix(".md").write_text(page(results, made_on))


def page(results: Sequence[Result], made_on: str) -> str:
    """The page of the docs."""
    counts = [result.molecules for result in results]
    return f"""# In nanometres and photons

After this page you know what an error of the background costs in a localization. Molecules
of simulated movies are fitted by maximum likelihood, with each background taken as known.
Their errors are divided by the Cramér-Rao bound for a known background, below which no fit
without bias scatters.

![Errors in x and y, photons and z over their bound, less 1, of each background in each
scene](figures/localization_accuracy.png)

Beyond the grey line, at 1.02, a background costs more than 2 %. {_headline(results)}

{table(results)}
In each cell, the mean error comes first and the scatter about it second; ± is the standard
error of a ratio. "Over that of the truth" compares the same molecules with the fit whose
background is true. There are {made_on} for each scene,
with {min(counts)} to {max(counts)} molecules that are fitted.

## What is seen

- A calibrated `LocalMean` is as good as the truth. The radii of `LocalMean()`, 7 px, are
  too large for the edge of the cell: calibrate.
- `SpatialMean` takes a quarter of each molecule's photons in 2D, and a third in 3D.
- smlmlp's median has the noise of 51 frames in each pixel, takes some of the molecule's
  light, and does not follow a pulse.
- A constant that is fitted in each box moves molecules where the background has a slope: by
  12 nm where it rises by 0.9 photons in a pixel.
- In the dim scene, no fit attains the bound of x and y, which is that of many photons.

## How it is made

`python examples/localization_accuracy.py docs/pages` makes all of this from the scenes of
[Accuracy](background_accuracy.md): `ordinary` is `scale-20` there, `dim` the same with
molecules of {DIM_PHOTONS:.0f} photons in place of 700.

- The fit (`examples/gaussian_fit.py`) is of boxes of {BOX_PIX} x {BOX_PIX} px, under
  Poisson noise with read noise (Huang et al., *Nat. Methods* 10, 653, 2013). The image is a
  Gaussian of 1.3 px, integrated over pixels of {PIXEL_NM:.0f} nm.
- In the scenes named 3D, molecules of {PHOTONS_IN_DEPTH:.0f} photons lie up to
  {DEPTH_NM:.0f} nm from the focus, and their images are astigmatic (Huang et al., *Science*
  319, 810, 2008). With 700 photons, no fit attains the bound in z.
- The fit begins at the truth. Only molecules count that are on for {LEAST_SHARE:.0%} of a
  frame or more, with no other one and no border within {ALONE_PIX:.0f} px.
"""


def _headline(results: Sequence[Result]) -> str:
    """What is found with our best background in the first scene."""
    for result in results:
        if result.bkgd == LEARNED:
            position, photons = (
                _with_std(error.of_bound, error.of_bound_std)
                for error in (result.position, result.photons)
            )
            return (
                f"In the scene *{result.scene}*, a calibrated `LocalMean` is at {position} "
                f"in x and y, and at {photons} in photons."
            )
    return ""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--movies", type=int, default=4, help="of each scene")
    parser.add_argument("--size", type=int, default=256, help="of a frame, in pixels")
    parser.add_argument("--frames", type=int, default=400, help="of a movie")
    parser.add_argument("--smoke", action="store_true", help="one small movie")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_options()
    sizes = (options.size, options.frames, options.movies)
    size_pix, frame_count, movie_count = (64, 40, 1) if options.smoke else sizes
    show_accuracy(
        SCENES_2D[:1] if options.smoke else (*SCENES_2D, *SCENES_3D),
        options.folder,
        size_pix=size_pix,
        frame_count=frame_count,
        movie_count=movie_count,
    )
