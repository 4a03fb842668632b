"""Calibration accuracy: how close `jaxbkgd.calibrate` comes to the best radii there are.

    python examples/calibration_accuracy.py [FOLDER] [--scenes NAME ...] [--coverage]

It simulates a movie of each scene, finds its oracle (the radii that minimise the error to
the true background, in float64 and by code of its own), learns the radii without the
truth from three starts and with the truth from one, and writes calibration_accuracy.json,
.md and .png to FOLDER, by default the current one. With `--coverage` it simulates one
scene 30 times, counts how often the oracle lies within the learned radius' stated
uncertainty, and writes calibration_coverage.json. It needs the extra `plots`.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scenes import Movie, Scene, SCENES, simulated

import jaxbkgd


SMALLEST_PIX = 0.5
STARTS_PIX = (2.0, 7.0, 25.0)
USUAL_PIX = 7.0
COVERAGE_MOVIES = 30
# Half of the central interval that holds 99 % of a normal density, in sigmas.
CUT_SIGMAS = NormalDist().inv_cdf(0.995)
SCENES_BY_NAME = {scene.name: scene for scene in SCENES}


# The oracle, in float64 and without JAX.


@dataclass(frozen=True)
class Oracle:
    """The radii (y, x) with the smallest root-mean-square error, and that error."""

    radii_pix: tuple[float, float]
    rms_adu: float


def blur_matrix(radius_pix: float, size_pix: int) -> np.ndarray:
    """The smooth Gaussian taps as a matrix, whose edge pixels stand for all beyond."""
    sigma = radius_pix / 2
    cut = CUT_SIGMAS * sigma
    half = math.ceil(cut)
    edges = np.clip(np.arange(-half - 0.5, half + 1), -cut, cut) / (math.sqrt(2) * sigma)
    taps = np.diff([math.erf(edge) for edge in edges])
    matrix = np.zeros((size_pix, size_pix))
    pixels = np.arange(size_pix)
    for offset, tap in enumerate(taps / taps.sum(), start=-half):
        matrix[pixels, np.clip(pixels + offset, 0, size_pix - 1)] += tap
    return matrix


def mean_square_errors(
    movie: Movie, y_radii_pix: Sequence[float], x_radii_pix: Sequence[float]
) -> np.ndarray:
    """The error of the background at all pairs of radii: (y radii, x radii), ADU^2.

    With H the frames blurred along y, and B the truth, sum |H Gx^T - B|^2 is
    tr(Gx H^T H Gx^T) - 2 tr(Gx H^T B) + sum |B|^2, all frames in the products H^T H and
    H^T B. They cost as much as a blur, and then each x radius costs next to nothing.
    """
    height, width = movie.frames.shape[1:]
    # A constant passes the filter. Less of it leaves more digits for the rest.
    constant = movie.bkgds_adu.mean()
    frames = movie.frames - constant
    bkgds = (movie.bkgds_adu - constant).reshape(-1, width)
    along_x = [blur_matrix(radius, width) for radius in x_radii_pix]
    errors = np.empty((len(y_radii_pix), len(x_radii_pix)))
    for row, radius in zip(errors, y_radii_pix, strict=True):
        blurred = (blur_matrix(radius, height) @ frames).reshape(-1, width)
        of_blurred, of_both = blurred.T @ blurred, blurred.T @ bkgds
        row[:] = [
            np.vdot(blur @ of_blurred, blur) - 2 * np.vdot(blur.T, of_both)
            for blur in along_x
        ]
    return (errors + np.vdot(bkgds, bkgds)) / bkgds.size


def rms_error(movie: Movie, radii_pix: Sequence[float]) -> float:
    """The root-mean-square error of the background, in ADU."""
    y, x = radii_pix
    return float(np.sqrt(mean_square_errors(movie, [y], [x])[0, 0]))


def find_oracle(movie: Movie, bound_pix: float) -> Oracle:
    """The best radii on a grid of all pairs, then on ever finer ones around the best."""
    grid = np.geomspace(SMALLEST_PIX, bound_pix, 13)
    step = math.log(grid[1] / grid[0])
    best, mean_square = _best_of(movie, grid, grid)
    while step > 0.002:
        step /= 3
        is_at_edge = True
        while is_at_edge:
            centre = best
            factors = np.exp(step * np.arange(-3, 4))
            y, x = (np.unique(np.clip(r * factors, SMALLEST_PIX, bound_pix)) for r in best)
            best, mean_square = _best_of(movie, y, x)
            moves = np.abs(np.log(np.divide(best, centre)))
            is_at_edge = bool(np.any(moves > 2.5 * step))
    return Oracle(best, math.sqrt(mean_square))


def _best_of(
    movie: Movie, y_radii_pix: np.ndarray, x_radii_pix: np.ndarray
) -> tuple[tuple[float, float], float]:
    """The pair with the smallest error, and its mean square."""
    errors = mean_square_errors(movie, y_radii_pix.tolist(), x_radii_pix.tolist())
    y, x = np.unravel_index(np.argmin(errors), errors.shape)
    return (float(y_radii_pix[y]), float(x_radii_pix[x])), float(errors[y, x])


# Calibration beside the oracle.


@dataclass(frozen=True)
class Run:
    """One calibration; of what is listed, each channel has an entry, each pair is (y, x).

    `lag` is None where the objective was the truth. `excess_percent` is by how much the
    error at the learned radii is larger than the oracle's.
    """

    start_pix: float
    lag: int | None
    radii_pix: list[list[float]]
    radii_std_pix: list[list[float]]
    is_at_bound: list[list[bool]]
    is_converged: bool
    steps: int
    seconds: float
    excess_percent: list[float]


@dataclass(frozen=True)
class Outcome:
    """A scene's oracles and calibrations; of what is listed, each channel has an entry.

    `spread_percent` is how far apart the radii from different starts are at most, for
    either axis, as a share of their mean. `usual_excess_percent` is the excess error of
    7 px, which the reference gives to everyone.
    """

    scene: str
    oracles: list[Oracle]
    usual_rms_adu: list[float]
    usual_excess_percent: list[float]
    self_supervised: list[Run]
    supervised: Run
    spread_percent: list[float]


def calibrated(
    movies: Sequence[Movie],
    oracles: Sequence[Oracle],
    *,
    start_pix: float,
    bound_pix: float,
    is_supervised: bool = False,
) -> Run:
    """Learn the radii of all channels together, from one start."""
    started = time.perf_counter()
    truth = jaxbkgd.TruthLoss([movie.bkgds_adu.astype(np.float32) for movie in movies])
    estimator, history = jaxbkgd.calibrate(
        [movie.frames for movie in movies],
        jaxbkgd.SpatialMean(
            [(start_pix, start_pix)] * len(movies), max_radius_pix=bound_pix
        ),
        objective=truth if is_supervised else None,
        progress=False,
    )
    seconds = time.perf_counter() - started
    radii = np.asarray(estimator.radii_pix, np.float64).tolist()
    return Run(
        start_pix=start_pix,
        lag=None if is_supervised else history.lag,
        radii_pix=radii,
        radii_std_pix=np.asarray(history.radii_std, np.float64).tolist(),
        is_at_bound=np.asarray(history.is_at_bound).tolist(),
        is_converged=bool(history.is_converged),
        steps=len(history.losses),
        seconds=round(seconds, 2),
        excess_percent=[
            excess_percent(rms_error(movie, pair), oracle)
            for movie, oracle, pair in zip(movies, oracles, radii, strict=True)
        ],
    )


def excess_percent(rms_adu: float, oracle: Oracle) -> float:
    return 100 * (rms_adu / oracle.rms_adu - 1)


def evaluated(scene: Scene, *, size_pix: int, frame_count: int) -> Outcome:
    """Simulate the scene, find its oracles, and calibrate from all starts."""
    movies = simulated(scene, size_pix=size_pix, frame_count=frame_count)
    bound = scene.bound_pix
    oracles = [find_oracle(movie, bound) for movie in movies]
    usual = [rms_error(movie, (USUAL_PIX, USUAL_PIX)) for movie in movies]
    runs = [
        calibrated(movies, oracles, start_pix=start, bound_pix=bound)
        for start in STARTS_PIX
    ]
    learned = np.array([run.radii_pix for run in runs])
    spread = np.ptp(learned, axis=0) / learned.mean(axis=0)
    return Outcome(
        scene=scene.name,
        oracles=oracles,
        usual_rms_adu=usual,
        usual_excess_percent=list(map(excess_percent, usual, oracles)),
        self_supervised=runs,
        supervised=calibrated(
            movies, oracles, start_pix=USUAL_PIX, bound_pix=bound, is_supervised=True
        ),
        spread_percent=(100 * spread.max(axis=-1)).tolist(),
    )


@dataclass(frozen=True)
class Coverage:
    """How often oracles are within 1 and 2 stated deviations of the learned radii (y, x).

    `errors_in_stds` has learned - oracle, in stated deviations, for each movie.
    """

    movie_count: int
    within_1_std: list[int]
    within_2_std: list[int]
    oracle_radii_pix: list[tuple[float, float]]
    radii_pix: list[list[float]]
    radii_std_pix: list[list[float]]
    errors_in_stds: list[list[float]]


def covered(scene: Scene, *, size_pix: int, frame_count: int, movie_count: int) -> Coverage:
    """Calibrate movies of a scene of one channel, each with a background of its own."""
    oracles, runs = [], []
    for seed in range(movie_count):
        (movie,) = simulated(scene, size_pix=size_pix, frame_count=frame_count, seed=seed)
        oracles.append(find_oracle(movie, scene.bound_pix))
        runs.append(
            calibrated(
                [movie], oracles[-1:], start_pix=USUAL_PIX, bound_pix=scene.bound_pix
            )
        )
    best = np.array([oracle.radii_pix for oracle in oracles])
    radii = np.array([run.radii_pix[0] for run in runs])
    stds = np.array([run.radii_std_pix[0] for run in runs])
    errors = (radii - best) / stds
    return Coverage(
        movie_count=movie_count,
        within_1_std=(np.abs(errors) <= 1).sum(axis=0).tolist(),
        within_2_std=(np.abs(errors) <= 2).sum(axis=0).tolist(),
        oracle_radii_pix=[oracle.radii_pix for oracle in oracles],
        radii_pix=radii.tolist(),
        radii_std_pix=stds.tolist(),
        errors_in_stds=errors.tolist(),
    )


# The report.


@dataclass(frozen=True)
class Row:
    """What table and figure say of one channel of a scene."""

    name: str
    outcome: Outcome
    channel: int

    @property
    def usual_excess(self) -> float:
        return self.outcome.usual_excess_percent[self.channel]

    @property
    def learned_excess(self) -> float:
        """From the worst of the starts."""
        runs = self.outcome.self_supervised
        return max(run.excess_percent[self.channel] for run in runs)

    @property
    def supervised_excess(self) -> float:
        return self.outcome.supervised.excess_percent[self.channel]

    def cells(self) -> list[str]:
        channel, oracle = self.channel, self.outcome.oracles[self.channel]
        run = self.outcome.self_supervised[STARTS_PIX.index(USUAL_PIX)]
        learned = zip(
            run.radii_pix[channel],
            run.radii_std_pix[channel],
            run.is_at_bound[channel],
            strict=True,
        )
        return [
            self.name,
            ", ".join(f"{radius:.2f}" for radius in oracle.radii_pix),
            ", ".join(
                f"{radius:.2f} (bound)" if at_bound else f"{radius:.2f} ± {std:.2f}"
                for radius, std, at_bound in learned
            ),
            f"{self.outcome.spread_percent[channel]:.2f}",
            str(run.lag),
            f"{oracle.rms_adu:.3f}",
            # Between two points of the oracle's grid the error may be smaller still.
            f"{max(self.learned_excess, 0.0):.3f}",
            f"{max(self.supervised_excess, 0.0):.3f}",
            f"{self.usual_excess:.1f}",
        ]


HEADINGS = (
    "scene",
    "oracle y, x (px)",
    "learned y, x (px)",
    "spread (%)",
    "lag",
    "oracle's error (ADU)",
    "excess, learned (%)",
    "excess, with truth (%)",
    "excess, r = 7 (%)",
)


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    return [
        Row(
            outcome.scene + (f" {channel + 1}" if len(outcome.oracles) > 1 else ""),
            outcome,
            channel,
        )
        for outcome in outcomes
        for channel in range(len(outcome.oracles))
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """The excess error of 7 px, and of the radii that were learned, scene by scene."""
    figure = Figure((7, 1.2 + 0.24 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    smallest = 1e-3  # the oracle's grid resolves no less
    kinds = {
        "r = 7 px for everyone": ([row.usual_excess for row in rows], "s", "#888888"),
        "learned from the movie, worst of 3 starts": (
            *([row.learned_excess for row in rows], "o"),
            "#1b6ca8",
        ),
        "learned from the truth": (
            *([row.supervised_excess for row in rows], "x"),
            "#d95f02",
        ),
    }
    for label, (excess, marker, colour) in kinds.items():
        shown = np.maximum(excess, smallest)
        axes.plot(shown, places, marker, color=colour, ms=6, label=label)
    axes.axvline(2, color="#222222", lw=0.8, ls=":")
    axes.set(
        xscale="log",
        xlim=(0.8 * smallest, None),
        xlabel="error above that of the best radii (%)",
        yticks=places,
        yticklabels=[row.name for row in rows],
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.invert_yaxis()
    axes.grid(axis="y", lw=0.4)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)


def write_json(content: Any, path: Path) -> None:
    """JSON has neither infinity nor NaN, which a deviation can be: they become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    path.write_text(json.dumps(content, indent=1) + "\n")


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    path = folder / "calibration_accuracy.json"
    rows = rows_of(outcomes)
    write_json([asdict(outcome) for outcome in outcomes], path)
    path.with_suffix(".md").write_text(table(rows))
    draw(rows, path.with_suffix(".png"))


def show_accuracy(
    names: Sequence[str], folder: Path, *, size_pix: int, frame_count: int
) -> None:
    """What is done is written after each scene."""
    outcomes = []
    print(table([]), end="")
    for name in names:
        scene = SCENES_BY_NAME[name]
        outcomes.append(evaluated(scene, size_pix=size_pix, frame_count=frame_count))
        print(*table(rows_of(outcomes[-1:])).splitlines()[2:], sep="\n", flush=True)
        write(outcomes, folder)


def show_coverage(name: str, folder: Path, *, size_pix: int, frame_count: int) -> None:
    coverage = covered(
        SCENES_BY_NAME[name],
        size_pix=size_pix,
        frame_count=frame_count,
        movie_count=COVERAGE_MOVIES,
    )
    write_json(asdict(coverage), folder / "calibration_coverage.json")
    for std_count, (y, x) in enumerate((coverage.within_1_std, coverage.within_2_std), 1):
        print(
            f"{name}: of {coverage.movie_count} oracles, {y} in y and {x} in x are within "
            f"{std_count} stated deviation(s) of the learned radius"
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--scenes", choices=SCENES_BY_NAME, nargs="+", metavar="NAME")
    parser.add_argument("--size", type=int, help="of a frame, in pixels")
    parser.add_argument("--frames", type=int, help="of a movie")
    parser.add_argument(
        "--coverage", action="store_true", help="of the first scene alone, 30 times"
    )
    options = parser.parse_args()
    coverage = options.coverage
    options.scenes = options.scenes or (["scale-20"] if coverage else [*SCENES_BY_NAME])
    options.size = options.size or (128 if coverage else 256)
    options.frames = options.frames or (100 if coverage else 200)
    return options


if __name__ == "__main__":
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    sizes = {"size_pix": options.size, "frame_count": options.frames}
    if options.coverage:
        show_coverage(options.scenes[0], options.folder, **sizes)
    else:
        show_accuracy(options.scenes, options.folder, **sizes)
