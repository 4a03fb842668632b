"""Train a detector through the background: are radii that it learns better ones?

    python examples/train_detector.py [FOLDER] [--backgrounds NAME ...] [--seeds N ...]
        [--steps N] [--smoke]

A network looks for molecules in the signal-to-noise map that an estimator of the background
leaves (`detector.py`). Both are trained together, on movies that are simulated as they are
needed, each with an uneven background of its own. Backgrounds that are fixed, calibrated,
or true are trained with for comparison: the same number of steps, on the same movies, from
the same network.

By default radii are trained from 7 px, which takes two minutes on two cores. What is
measured is kept in FOLDER, and not measured again: with `--backgrounds all --seeds 0 1 2`,
the table. A training that was interrupted goes on from its last checkpoint. It writes
train_detector.json and .md, and to the subfolder `figures` train_detector.png. It needs the
extra `cli`.
"""

import argparse
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
# A step sees two movies, each with its own background.
MOVIES, FRAMES = 2, 24
# For calibration, and to be scored on.
LONG_MOVIES, LONG_FRAMES = 8, 100
MAX_RADIUS_PIX, MAX_RADIUS_FRAMES = 30.0, 20.0
OFFSET_ADU = 100.0

# Radii are logarithms of a kind, and may be moved faster than weights.
WEIGHT_RATE, RADIUS_RATE = 5e-3, 0.2
STEPS_PER_CHECKPOINT = 100
SCORES = np.linspace(0.05, 0.95, 10)


# Movies.


class Movie(NamedTuple):
    """Frames in ADU above the camera's offset, and what they were made from."""

    frames: Float[Array, "frames height width"]
    background: jaxbkgd.Background
    molecules: Molecules


def simulated(*seed: int, frame_count: int) -> Movie:
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
    background = jaxbkgd.Background(truth.bkgds_adu, jnp.float32(1))
    events = (truth.y_pix, truth.x_pix, truth.photons, truth.is_on)
    molecules = Molecules(*(event.reshape(frame_count, -1) for event in events))
    return Movie(movie - OFFSET_ADU, background, molecules)


# Seeds of one kind are no seeds of another.
def training_movies(seed: int, step: int) -> Movie:
    movies = [simulated(0, seed, step, i, frame_count=FRAMES) for i in range(MOVIES)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *movies)


def calibration_movies(seed: int) -> list[Movie]:
    return [simulated(1, seed, i, frame_count=LONG_FRAMES) for i in range(LONG_MOVIES)]


def held_out_movies(seed: int) -> list[Movie]:
    return [simulated(2, seed, i, frame_count=LONG_FRAMES) for i in range(LONG_MOVIES)]


# The backgrounds that are compared.


def calibrated(
    estimator: jaxbkgd.AbstractEstimator, seed: int
) -> jaxbkgd.AbstractEstimator:
    """One set of radii for all backgrounds, from movies without their truth."""
    movies = [movie.frames for movie in calibration_movies(seed)]
    return jaxbkgd.calibrate(movies, estimator)[0]


def spatial(radius_pix: float = 7.0, **settings: Any) -> jaxbkgd.SpatialMean:
    return jaxbkgd.SpatialMean(radius_pix, max_radius_pix=MAX_RADIUS_PIX, **settings)


def over_time() -> jaxbkgd.LocalMean:
    return jaxbkgd.LocalMean(
        7.0, 5.0, max_radius_pix=MAX_RADIUS_PIX, max_radius_frames=MAX_RADIUS_FRAMES
    )


@dataclass(frozen=True)
class Kind:
    """Where a background comes from: the estimator at first, by the seed; whether it is
    trained; and whether the truth takes its place."""

    first: Callable[[int], jaxbkgd.AbstractEstimator]
    is_trained: bool = False
    is_true: bool = False


TRAINED = "r trained from 7 px"
KINDS = {
    "r = 7 px, separable noise": Kind(lambda seed: spatial(noise="separable")),
    "r = 7 px": Kind(lambda seed: spatial()),
    "r calibrated": Kind(lambda seed: calibrated(spatial(), seed)),
    TRAINED: Kind(lambda seed: spatial(), is_trained=True),
    "r trained from 2 px": Kind(lambda seed: spatial(2.0), is_trained=True),
    "r trained from 25 px": Kind(lambda seed: spatial(25.0), is_trained=True),
    "LocalMean calibrated": Kind(lambda seed: calibrated(over_time(), seed)),
    "LocalMean trained": Kind(lambda seed: over_time(), is_trained=True),
    "the true background": Kind(lambda seed: spatial(), is_true=True),
}


# Training.


class State(eqx.Module):
    """All that a training needs to go on."""

    detector: Detector
    moments: optax.OptState
    step: Array
    losses: Float[Array, " steps"]
    radii: Float[Array, "steps axes"]


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
    detector = Detector(kind.first(seed), jax.random.key(seed))
    learned = eqx.filter(detector, eqx.is_inexact_array)
    radii = radii_of(detector.estimator)
    return State(
        detector,
        optimizer(kind.is_trained, steps).init(learned),
        jnp.array(0),
        jnp.full(steps, jnp.nan, jnp.float32),
        jnp.full((steps, len(radii)), jnp.nan, jnp.float32),
    )


def radii_of(estimator: Any) -> Float[Array, " axes"]:
    """(frames, y, x) or (y, x)."""
    is_local = isinstance(estimator, jaxbkgd.LocalMean)
    return (estimator.radii if is_local else estimator.radii_pix)[0]


@eqx.filter_jit(donate="all-except-first")
def stepped(movies: Movie, state: State, is_trained: bool, is_true: bool) -> State:
    """One step later. Whether the background is trained, or true, is compiled in."""

    def mean_loss(detector: Detector):
        def of_movie(movie: Movie):
            given = movie.background if is_true else None
            return loss(detector(movie.frames, given), movie.molecules)

        return jnp.mean(jax.vmap(of_movie)(movies))

    value, gradient = eqx.filter_value_and_grad(mean_loss)(state.detector)
    updates, moments = optimizer(is_trained, len(state.losses)).update(
        gradient, state.moments
    )
    return State(
        eqx.apply_updates(state.detector, updates),
        moments,
        state.step + 1,
        state.losses.at[state.step].set(value),
        state.radii.at[state.step].set(radii_of(state.detector.estimator)),
    )


def trained(name: str, seed: int, steps: int, folder: Path) -> State:
    """The state after all steps, from the last checkpoint there is."""
    kind, path = KINDS[name], folder / f"{name}, seed {seed}, {steps} steps.eqx"
    state = first_state(kind, seed, steps)
    if path.exists():
        state = eqx.tree_deserialise_leaves(path, state)
    for step in track(range(int(state.step), steps), f"{name}, seed {seed}"):
        movies = training_movies(seed, step)
        state = stepped(movies, state, kind.is_trained, kind.is_true)
        if (step + 1) % STEPS_PER_CHECKPOINT == 0 or step + 1 == steps:
            partial_path = path.with_suffix(".part")
            eqx.tree_serialise_leaves(partial_path, state)
            partial_path.replace(path)
    return state


# Scores.


@dataclass(frozen=True)
class Result:
    """How right a trained detector is about movies that it has not seen.

    `precisions` and `recalls` are those at `SCORES`, and `radii` those at each step.
    """

    background: str
    seed: int
    steps: int
    score: Mapping[str, float]
    precisions: Sequence[float]
    recalls: Sequence[float]
    radii: Sequence[Sequence[float]]


@eqx.filter_jit
def predicted(detector: Detector, movie: Movie, is_true: bool):
    return detector(movie.frames, movie.background if is_true else None)


def rows_of(detector: Detector, movie: Movie, is_true: bool, least: float = 0.5) -> Found:
    return found(predicted(detector, movie, is_true), least)


def result_of(name: str, seed: int, state: State) -> Result:
    """Of all held-out movies together."""
    shape_pix, is_true = (SIZE_PIX, SIZE_PIX), KINDS[name].is_true
    movies = held_out_movies(seed)
    molecules = Molecules(
        *map(jnp.concatenate, zip(*(movie.molecules for movie in movies), strict=True))
    )
    predictions = [predicted(state.detector, movie, is_true) for movie in movies]
    prediction = jax.tree.map(lambda *parts: jnp.concatenate(parts), *predictions)
    everything = found(prediction, SCORES[0])

    def at(least: float) -> Score:
        is_kept = everything.score >= least
        return scored(Found(*(row[is_kept] for row in everything)), molecules, shape_pix)

    curve = [at(least) for least in SCORES]
    return Result(
        name,
        seed,
        len(state.losses),
        at(0.5)._asdict(),
        [score.precision for score in curve],
        [score.recall for score in curve],
        np.round(np.asarray(state.radii), 3).tolist(),
    )


# The report.


def read(path: Path) -> list[Result]:
    """What has been measured already."""
    return [Result(**fields) for fields in json.loads(path.read_text())]


def table(results: Sequence[Result]) -> str:
    """The mean over seeds, and the standard deviation."""
    lines = ["| background | Jaccard | recall | precision | RMSE (nm) | radius |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name in KINDS:
        mine = [result for result in results if result.background == name]
        if not mine:
            continue
        cells = []
        for score, digits in zip(Score._fields, (3, 3, 3, 1), strict=True):
            values = np.array([result.score[score] for result in mine])
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        radii = np.mean([result.radii[-1] for result in mine], 0)
        *frames, _, pix = radii
        cells.append(" and ".join([*(f"{r:.1f} frames" for r in frames), f"{pix:.1f} px"]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(results: Sequence[Result], state: State, name: str, folder: Path) -> None:
    """`state` is what the picture of found molecules is made with."""
    path = folder / "train_detector.json"
    path.write_text(json.dumps([asdict(result) for result in results]) + "\n")
    seeds = sorted({result.seed for result in results})
    path.with_suffix(".md").write_text(
        "# Training through the background\n\n"
        f"By `examples/train_detector.py`: {results[0].steps} steps of {MOVIES} movies of "
        f"{FRAMES} frames of {SIZE_PIX} px, scored on {LONG_MOVIES} of {LONG_FRAMES} "
        "frames that are held out, within 250 nm. Mean ± standard deviation of "
        f"{len(seeds)} seeds."
        "\n\n"
        f"{table(results)}"
    )
    (folder / "figures").mkdir(exist_ok=True)
    draw(results, state, name, folder / "figures" / "train_detector.png")


def draw(results: Sequence[Result], state: State, name: str, path: Path) -> None:
    """A frame with what was found, radii over training, and precision over recall."""
    figure = Figure((11, 3.6), dpi=75, layout="constrained")
    frame_axes, radius_axes, curve_axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])

    movie = simulated(2, 0, 0, frame_count=LONG_FRAMES)
    rows, index = rows_of(state.detector, movie, KINDS[name].is_true), LONG_FRAMES // 2
    frame_axes.imshow(movie.frames[index], cmap="gray")
    there = np.asarray(asked(movie.molecules, SIZE_PIX, SIZE_PIX)[index])
    truth = [np.asarray(axis[index])[there] for axis in movie.molecules[:2]]
    y_pix, x_pix = rows.place_pix[rows.frame == index].T
    frame_axes.plot(*truth[::-1], "o", mfc="none", mec="C2", ms=9, label="true")
    frame_axes.plot(x_pix, y_pix, "x", color="C3", ms=6, label="found")
    frame_axes.set_axis_off()
    frame_axes.set_title(f"one frame; {name}", fontsize=9)
    frame_axes.legend(loc="upper right", fontsize=7)

    for place, kind in enumerate(KINDS):
        mine = [result for result in results if result.background == kind]
        if not mine:
            continue
        colour, label = f"C{place}", kind
        for result in mine:
            radii = [radii[-1] for radii in result.radii]
            if KINDS[kind].is_trained:
                radius_axes.plot(radii, color=colour, lw=1, label=label)
            curve_axes.plot(
                result.recalls, result.precisions, color=colour, lw=1, label=label
            )
            label = None
    radius_axes.set(xlabel="step", ylabel="radius (px)", yscale="log")
    radius_axes.set_yticks([2, 5, 10, 20], labels=["2", "5", "10", "20"])
    radius_axes.set_yticks([], minor=True)
    radius_axes.set_title("radii that are trained", fontsize=9)
    curve_axes.set(xlabel="recall", ylabel="precision")
    curve_axes.set_title("held-out movies, within 250 nm", fontsize=9)
    curve_axes.legend(frameon=False, fontsize=7, loc="lower left")
    figure.savefig(path, pil_kwargs={"optimize": True})


def main(
    folder: Path,
    names: Sequence[str] = (TRAINED,),
    seeds: Sequence[int] = (0,),
    steps: int = 400,
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
    parser.add_argument("--steps", type=int, default=400)
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
