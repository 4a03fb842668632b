"""Train a detector through the background: how near does it come to the true one?

    python examples/train_detector.py [FOLDER] [--backgrounds NAME ...] [--seeds N ...]
        [--steps N] [--smoke]

A network looks for molecules in the signal-to-noise map that an estimator of the background
leaves (`detector.py`). Both are trained together, on movies that are simulated as they are
needed, each with an uneven background of its own, in steady or pulsed light. Backgrounds
that are calibrated, or true, are trained with for comparison: the same number of steps, on
the same movies, from the same network.

By default a `LocalMean` is calibrated and trained in pulsed light, which takes some minutes
on two cores. What is measured is kept in FOLDER, and not measured again: with
`--backgrounds all --seeds 0 1`, the table. A training that was interrupted goes on from
its last checkpoint. It writes train_detector.json and .md, and to the subfolder `figures`
train_detector.png. It needs the extra `cli`.
"""

import argparse
import functools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from detector import (
    asked,
    Detector,
    Found,
    found,
    GAIN_ELECTRONS_PER_ADU,
    loss,
    Molecules,
    Score,
    scored,
)
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from rich.progress import track

import jaxbkgd


SIZE_PIX = 64
# A step sees one movie, with a background of its own.
FRAMES = 48
# For calibration, and to be scored on.
CALIBRATION_MOVIES, LONG_MOVIES, LONG_FRAMES = 2, 8, 100
OFFSET_ADU = 100.0
# The light of successive frames, over and over, and how much it flickers: an activation
# pulse, or none.
LIGHTS = {"steady": ((1.0,), 0.0), "pulsed": ((1.35, 1.0, 1.0, 1.0), 0.015)}

# Radii are logarithms of a kind, and may be moved faster than weights.
WEIGHT_RATE, RADIUS_RATE = 5e-3, 0.05
STEPS, STEPS_PER_CHECKPOINT = 200, 100
SCORES = np.linspace(0.05, 0.95, 10)


# Movies.


class Movie(NamedTuple):
    """Frames in ADU above the camera's offset, and what they were made from."""

    frames: Float[Array, "frames height width"]
    background: jaxbkgd.Background
    molecules: Molecules


# Kept, since all backgrounds are trained with on the same ones.
@functools.lru_cache(2 * STEPS)
def simulated(*seed: int, frame_count: int, light: str) -> Movie:
    """A movie whose background no other seed has."""
    rng = np.random.default_rng(seed)

    def between(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    movie, truth = jaxbkgd.simulate_movie(
        jax.random.key(rng.integers(2**31)),
        frame_count=frame_count,
        height_pix=SIZE_PIX,
        width_pix=SIZE_PIX,
        molecules_per_frame=6.0,
        photons_per_frame=400.0,
        photons_spread=0.3,
        bkgd_photons=between(20.0, 150.0),
        bkgd_contrast=between(0.2, 0.6),
        bkgd_length_scale_pix=between(5.0, 20.0),
        # As fast in short movies as in long ones.
        bkgd_remaining=between(0.7, 1.0) ** ((frame_count - 1) / (LONG_FRAMES - 1)),
        gain_electrons_per_adu=GAIN_ELECTRONS_PER_ADU,
        offset_adu=OFFSET_ADU,
    )
    events = (truth.y_pix, truth.x_pix, truth.photons, truth.is_on)
    molecules = Molecules(*(event.reshape(frame_count, -1) for event in events))
    cycle, flicker = LIGHTS[light]
    levels = np.resize(cycle, frame_count) * (1 + flicker * rng.normal(size=frame_count))
    # More light than in the darkest frame adds electrons: a sum of Poisson numbers is one.
    added = (levels / levels.min() - 1)[:, None, None] * np.asarray(truth.bkgds_adu)
    electrons = rng.poisson(added * GAIN_ELECTRONS_PER_ADU)
    frames = jnp.asarray(movie - OFFSET_ADU + electrons / GAIN_ELECTRONS_PER_ADU)
    background = jaxbkgd.Background(truth.bkgds_adu + added, jnp.float32(1))
    return Movie(frames, background, molecules)


# Seeds of one kind are no seeds of another.
def training_movie(seed: int, step: int, light: str) -> Movie:
    return simulated(0, seed, step, frame_count=FRAMES, light=light)


def long_movies(*seed: int, count: int, light: str) -> list[Movie]:
    return [simulated(*seed, i, frame_count=LONG_FRAMES, light=light) for i in range(count)]


# The backgrounds that are compared.


@functools.cache
def calibrated(rank: Literal[0, 1], light: str) -> jaxbkgd.AbstractEstimator:
    """One set of radii for all backgrounds, from movies without their truth."""
    movies = long_movies(1, count=CALIBRATION_MOVIES, light=light)
    estimator = jaxbkgd.LocalMean(illumination_rank=rank)
    return jaxbkgd.calibrate([movie.frames for movie in movies], estimator)[0]


@dataclass(frozen=True)
class Kind:
    """Where a background comes from: the estimator at first, and the light it is in;
    whether it is trained; and whether the truth takes its place."""

    first: Callable[[], jaxbkgd.AbstractEstimator]
    light: str
    is_trained: bool = False
    is_true: bool = False


def kinds_in(light: str) -> dict[str, Kind]:
    kinds = {}
    for rank in (0, 1):
        name = f"LocalMean of rank {rank}"
        first = functools.partial(calibrated, rank, light)
        kinds[f"{name}, calibrated"] = Kind(first, light)
        kinds[f"{name}, trained"] = Kind(first, light, is_trained=True)
    kinds["the true background"] = Kind(jaxbkgd.SpatialMean, light, is_true=True)
    return {f"{name}, {light} light": kind for name, kind in kinds.items()}


KINDS = kinds_in("steady") | kinds_in("pulsed")
TRAINED = "LocalMean of rank 1, trained, pulsed light"


# Training.


class State(eqx.Module):
    """All that a training needs to go on."""

    detector: Detector
    moments: optax.OptState
    step: Array
    losses: Float[Array, " steps"]


def optimizer(is_trained: bool, steps: int) -> optax.GradientTransformation:
    """Adam, at different rates for the estimator and the network."""

    def falling(rate: float) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(rate, steps, 0.01))

    def parts(detector: Detector) -> Detector:
        network = jax.tree.map(lambda _: "network", detector)
        estimator = jax.tree.map(lambda _: "estimator", detector.estimator)
        return eqx.tree_at(lambda detector: detector.estimator, network, estimator)

    radii = falling(RADIUS_RATE) if is_trained else optax.set_to_zero()
    rules: dict[Hashable, optax.GradientTransformation] = {
        "network": falling(WEIGHT_RATE),
        "estimator": radii,
    }
    return optax.partition(rules, parts)


def first_state(kind: Kind, seed: int, steps: int) -> State:
    detector = Detector(kind.first(), jax.random.key(seed))
    learned = eqx.filter(detector, eqx.is_inexact_array)
    return State(
        detector,
        optimizer(kind.is_trained, steps).init(learned),
        jnp.array(0),
        jnp.full(steps, jnp.nan, jnp.float32),
    )


def radii_of(estimator: Any) -> Float[Array, " axes"]:
    """(frames, y, x) or (y, x)."""
    return estimator.radii[0]


@eqx.filter_jit
def stepped(movie: Movie, state: State, is_trained: bool, is_true: bool) -> State:
    """One step later. Whether the background is trained, or true, is compiled in."""

    def movie_loss(detector: Detector):
        given = movie.background if is_true else None
        return loss(detector(movie.frames, given), movie.molecules)

    value, gradient = eqx.filter_value_and_grad(movie_loss)(state.detector)
    updates, moments = optimizer(is_trained, len(state.losses)).update(
        gradient, state.moments
    )
    return State(
        eqx.apply_updates(state.detector, updates),
        moments,
        state.step + 1,
        state.losses.at[state.step].set(value),
    )


def trained(name: str, seed: int, steps: int, folder: Path) -> State:
    """The state after all steps, from the last checkpoint there is."""
    kind, path = KINDS[name], folder / f"{name}, seed {seed}, {steps} steps.eqx"
    state = first_state(kind, seed, steps)
    if path.exists():
        state = eqx.tree_deserialise_leaves(path, state)
    for step in track(range(int(state.step), steps), f"{name}, seed {seed}"):
        movie = training_movie(seed, step, kind.light)
        state = stepped(movie, state, kind.is_trained, kind.is_true)
        if (step + 1) % STEPS_PER_CHECKPOINT == 0 or step + 1 == steps:
            partial_path = path.with_suffix(".part")
            eqx.tree_serialise_leaves(partial_path, state)
            partial_path.replace(path)
    return state


# Scores.


@dataclass(frozen=True)
class Result:
    """How right a trained detector is about movies that it has not seen.

    `jaccards` are those at `SCORES`, and `radii` those after the training.
    """

    background: str
    seed: int
    steps: int
    score: Mapping[str, float]
    jaccards: Sequence[float]
    radii: Sequence[float]


@eqx.filter_jit
def predicted(detector: Detector, movie: Movie, is_true: bool):
    return detector(movie.frames, movie.background if is_true else None)


def result_of(name: str, seed: int, state: State) -> Result:
    """Of all held-out movies together."""
    shape_pix, is_true = (SIZE_PIX, SIZE_PIX), KINDS[name].is_true
    movies = long_movies(2, seed, count=LONG_MOVIES, light=KINDS[name].light)
    molecules = Molecules(
        *map(jnp.concatenate, zip(*(movie.molecules for movie in movies), strict=True))
    )
    predictions = [predicted(state.detector, movie, is_true) for movie in movies]
    prediction = jax.tree.map(lambda *parts: jnp.concatenate(parts), *predictions)
    everything = found(prediction, SCORES[0])

    def at(least: float) -> Score:
        is_kept = everything.score >= least
        return scored(Found(*(row[is_kept] for row in everything)), molecules, shape_pix)

    return Result(
        name,
        seed,
        len(state.losses),
        at(0.5)._asdict(),
        [at(least).jaccard for least in SCORES],
        radii_of(state.detector.estimator).tolist(),
    )


# The report.


def read(path: Path) -> list[Result]:
    """What has been measured already."""
    return [Result(**fields) for fields in json.loads(path.read_text())]


def table(results: Sequence[Result]) -> str:
    """The mean over seeds, and the standard deviation; also of Jaccard indices relative to
    those with the true background, seed by seed."""

    def spread(values: Sequence[float], digits: int = 3) -> str:
        if not values:
            return ""
        deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{deviation}"

    def jaccards(result: Result) -> np.ndarray:
        """At a threshold of 0.5, and at that of `SCORES` where it is largest."""
        return np.array([result.score["jaccard"], max(result.jaccards)])

    def key(result: Result) -> tuple[str, int]:
        return KINDS[result.background].light, result.seed

    titles = (
        "background, Jaccard at 0.5, relative, largest Jaccard, relative, RMSE (nm), radius"
    )
    rows = [titles.split(", "), ["---"] * 7]
    bounds = {key(r): jaccards(r) for r in results if KINDS[r.background].is_true}
    for name, kind in KINDS.items():
        mine = [result for result in results if result.background == name]
        if not mine:
            continue
        cells = [name]
        for which in range(2):
            values = {key(r): jaccards(r)[which] for r in mine}
            ratios = [values[k] / bounds[k][which] for k in values if k in bounds]
            cells += [spread([*values.values()]), "" if kind.is_true else spread(ratios)]
        cells.append(spread([r.score["rmse_nm"] for r in mine], 1))
        *frames, _, pix = np.mean([r.radii for r in mine], 0)
        radii = " and ".join([*(f"{r:.1f} frames" for r in frames), f"{pix:.1f} px"])
        rows.append([*cells, "" if kind.is_true else radii])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def write(results: Sequence[Result], state: State, name: str, folder: Path) -> None:
    """`state` is what the picture of found molecules is made with."""
    path = folder / "train_detector.json"
    path.write_text(json.dumps([asdict(result) for result in results]) + "\n")
    seeds = sorted({result.seed for result in results})
    path.with_suffix(".md").write_text(
        "# Training through the background\n\n"
        f"By `examples/train_detector.py`: {results[0].steps} steps of a movie of "
        f"{FRAMES} frames of {SIZE_PIX} px, scored on {LONG_MOVIES} of {LONG_FRAMES} "
        "frames that are held out, within 250 nm. Mean ± standard deviation of "
        f"{len(seeds)} seeds."
        "\n\n"
        f"{table(results)}"
    )
    (folder / "figures").mkdir(exist_ok=True)
    draw(results, state, name, folder / "figures" / "train_detector.png")


def draw(results: Sequence[Result], state: State, name: str, path: Path) -> None:
    """A frame with what was found, and the Jaccard index over the threshold, of the first
    seed."""
    figure = Figure((11, 3.6), dpi=75, layout="constrained")
    frame_axes, *light_axes = figure.subplots(1, 1 + len(LIGHTS))

    (movie,) = long_movies(2, 0, count=1, light=KINDS[name].light)
    rows = found(predicted(state.detector, movie, KINDS[name].is_true))
    index = LONG_FRAMES // 2
    frame_axes.imshow(movie.frames[index], cmap="gray")
    there = np.asarray(asked(movie.molecules, SIZE_PIX, SIZE_PIX)[index])
    truth = [np.asarray(axis[index])[there] for axis in movie.molecules[:2]]
    y_pix, x_pix = rows.place_pix[rows.frame == index].T
    frame_axes.plot(*truth[::-1], "o", mfc="none", mec="C2", ms=9, label="true")
    frame_axes.plot(x_pix, y_pix, "x", color="C3", ms=6, label="found")
    frame_axes.set_axis_off()
    frame_axes.set_title(name, fontsize=9)
    frame_axes.legend(loc="upper right", fontsize=7)

    for light, axes in zip(LIGHTS, light_axes, strict=True):
        for place, kind in enumerate(kinds_in(light)):
            label = kind.removesuffix(f", {light} light")
            style = {"color": f"C{place}", "ls": "--" if KINDS[kind].is_true else "-"}
            for result in results:
                if (result.background, result.seed) == (kind, results[0].seed):
                    axes.plot(SCORES, result.jaccards, **style, label=label)
                    axes.legend(frameon=False, fontsize=7, loc="lower left")
        axes.set(xlabel="threshold", ylabel="Jaccard index", ylim=(0, 1))
        axes.set_title(f"{light} light, held-out movies", fontsize=9)
    figure.savefig(path, pil_kwargs={"optimize": True})


def main(
    folder: Path,
    names: Sequence[str] = (TRAINED,),
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
) -> list[Result]:
    """Trains and scores what has not been yet, and writes after each."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    path = folder / "train_detector.json"
    results = read(path) if path.exists() else []
    if any(result.steps != steps for result in results):
        raise SystemExit(f"{path} is of trainings of other lengths; give another folder.")
    done = {(result.background, result.seed) for result in results}
    shown: tuple[State, str] | None = None
    for seed in seeds:
        for name in names:
            if (name, seed) in done:
                continue
            state = trained(name, seed, steps, folder)
            results.append(result_of(name, seed, state))
            if shown is None or KINDS[name].is_trained:
                shown = state, name
            write(results, *shown, folder)
            print(name, f"seed {seed}", results[-1].score, flush=True)
    print("", table(results), sep="\n", end="")
    return results


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument(
        "--backgrounds",
        choices=["all", *KINDS],
        nargs="+",
        default=[TRAINED],
        metavar="NAME",
        help=f"all, or some of: {'; '.join(KINDS)}",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--smoke", action="store_true", help="only three steps, which find nothing"
    )
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_options()
    main(
        options.folder,
        [*KINDS] if "all" in options.backgrounds else options.backgrounds,
        options.seeds,
        3 if options.smoke else options.steps,
    )
