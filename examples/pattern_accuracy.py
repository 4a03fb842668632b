"""What several patterns of light gain and cost, for docs/pages/local-mean.md.

    python examples/pattern_accuracy.py

Root-mean-square errors, in electrons, of the background of simulated movies with one to
three patterns, at the best of some radii by the true background, in some five minutes.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np
from scenes import MOVING_SCENES, SCENES, simulated

import jaxbkgd


RANKS: tuple[Literal[1, 2, 3], ...] = 1, 2, 3
# Frames and pixels.
RADII = tuple(itertools.product((30.0, 60.0, 120.0), (3.0, 6.0, 9.0, 12.0)))
# The second pattern: electrons on average, in every fourth frame.
SECOND_ELECTRONS, EVERY = 21.0, 4


def movies(frame_count: int, size_pix: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Frames and their true background, in electrons."""
    scenes = {scene.name: scene for scene in (*SCENES, *MOVING_SCENES)}
    named = {
        "steady": scenes["scale-20"],
        "drifts by 20 px": dataclasses.replace(scenes["drift"], drift_pix=(14.0, -14.0)),
    }
    found = {}
    for name, scene in named.items():
        (movie,) = simulated(scene, size_pix=size_pix, frame_count=frame_count)
        found[name] = (
            np.float32(movie.electrons(movie.frames)),
            np.float32(movie.electrons(movie.bkgds_adu)),
        )
    frames, truth = found["steady"]
    # A beam that is centred on an edge of the frame.
    y, x = np.mgrid[:size_pix, :size_pix] / size_pix
    beam = np.exp(-((y - 0.5) ** 2 + x**2) / 0.3)
    second = np.zeros_like(truth)
    second[::EVERY] = SECOND_ELECTRONS * beam / beam.mean()
    photons = np.random.default_rng(0).poisson(second).astype(np.float32)
    found[f"a second pattern in every {EVERY}th frame"] = frames + photons, truth + second
    return found


def best_error(frames: np.ndarray, truth: np.ndarray, rank: Literal[1, 2, 3]) -> float:
    """That of the best radii."""
    errors = []
    for radius_frames, radius_pix in RADII:
        estimator = jaxbkgd.LocalMean(radius_pix, radius_frames, illumination_rank=rank)
        bkgds = np.asarray(estimator(frames).bkgds)
        errors.append(float(np.sqrt(np.mean(np.square(bkgds - truth)))))
    return min(errors)


def main(frame_count: int = 300, size_pix: int = 128) -> dict[str, list[float]]:
    """Prints a table, and gives its errors by the names of its rows."""
    print(f'| | {" | ".join(map(str, RANKS))} | "auto" takes |')
    errors = {}
    for name, (frames, truth) in movies(frame_count, size_pix).items():
        errors[name] = [best_error(frames, truth, rank) for rank in RANKS]
        learned = jaxbkgd.LocalMean(illumination_rank="auto").with_patterns(frames)
        assert learned.patterns is not None
        cells = [f"{error:.2f}" for error in errors[name]]
        print(f"| {name} | {' | '.join(cells)} | {len(learned.patterns[0])} |", flush=True)
    return errors


if __name__ == "__main__":
    main()
