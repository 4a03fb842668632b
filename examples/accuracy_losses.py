"""What the error of a LocalMean beyond the limit is lost to, for background_accuracy.py.

Each experiment takes away one more cause, with the same draw of the background and the
radii that were learned from the movie with molecules.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from accuracy_bound import bound
from scenes import Movie, Scene, simulated

import jaxbkgd


LOSS_SCENES = ("uniform", "scale-6", "scale-20", "scale-40", "cell-edge", "dense")
# Of movies of 300, where what is learned ends at 120.
LONG_FRAMES = 600.0
# Photoelectrons of molecules from which on a pixel is left out.
MOLECULE_ELECTRONS = 1.0
SINGLE_FRAMES = 20
SINGLE_RADII_PIX = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)


def _electrons(movie: Movie) -> tuple[np.ndarray, np.ndarray]:
    """Frames, and their true background."""
    frames, bkgds = map(movie.electrons, (movie.frames, movie.bkgds_adu))
    return frames.astype(np.float32), bkgds.astype(np.float32)


def _rms(errors: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(errors, dtype=np.float64)))


def _inner(errors: np.ndarray) -> np.ndarray:
    """The half of the frame, along each axis, that is farthest from its borders."""
    margin = errors.shape[-1] // 4
    return errors[:, margin:-margin, margin:-margin]


def losses(
    scene: Scene, radii: tuple[float, float, float], *, size_pix: int, frame_count: int
) -> dict[str, float]:
    """Root-mean-square errors in electrons, with radii in frames, along y and along x."""
    learned_frames, *radii_pix = radii

    def errors(
        frames: np.ndarray,
        weights: Any = None,
        radius_frames: float = learned_frames,
        **settings: Any,
    ) -> np.ndarray:
        estimator = jaxbkgd.LocalMean(radii_pix, radius_frames, **settings)
        return np.asarray(estimator(frames, weights=weights).bkgds) - truth

    sizes = {"size_pix": size_pix, "frame_count": frame_count}
    (movie,) = simulated(scene, **sizes)
    (empty,) = simulated(replace(scene, molecules_per_frame=0.0), **sizes)
    frames, truth = _electrons(movie)
    without, _ = _electrons(empty)
    kept = np.asarray(movie.molecules_electrons < MOLECULE_ELECTRONS, np.float32)
    plain = errors(without, clip=None, illumination_rank=0)
    return {
        "as learned": _rms(errors(frames)),
        "600 frames": _rms(errors(frames, radius_frames=LONG_FRAMES)),
        "molecules left out": _rms(errors(frames, kept)),
        "no molecules": _rms(errors(without)),
        "no clip": _rms(errors(without, clip=None)),
        "steady light": _rms(plain),
        "inner half": _rms(_inner(plain)),
    }


def single_frame(scene: Scene, *, size_pix: int) -> dict[str, float]:
    """Of frames by themselves, without molecules: the limit, and the error of a LocalMean
    at the best radius by the truth."""
    empty = replace(scene, molecules_per_frame=0.0)
    (movie,) = simulated(empty, size_pix=size_pix, frame_count=SINGLE_FRAMES)
    frames, truth = _electrons(movie)
    errors = []
    for radius in SINGLE_RADII_PIX:
        estimator = jaxbkgd.LocalMean(radius, 0.0, clip=None, max_radius_pix=30.0)
        errors.append(_rms(np.asarray(estimator(frames).bkgds) - truth))
    of_first = replace(
        movie, frames=movie.frames[:1], bkgds_adu=movie.bkgds_adu[:1], molecules_electrons=0
    )
    limit = bound(scene, of_first)
    assert limit is not None
    return {"limit": limit.rms_electrons, "error": min(errors)}
