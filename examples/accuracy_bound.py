"""The limit: the least error that a background can have in a scene, for
background_accuracy.py.

Known to who would reach it: the law that the scene draws its background from, with all
its numbers; the light of each frame, but for what the scene draws of it; the camera; and
all molecules, whose light adds its photon noise and nothing else. Not known: the draw of
the field, its brightness, and the draws of light. No estimator has a smaller mean squared
error over such draws (van Trees, Detection, Estimation, and Modulation Theory I, 1968,
2.4.3, for the logarithm of the background; Bayesian Cramér-Rao bound).

With the logarithm u of a field of covariance K and Fisher information i of each of its
pixels in all frames, errors have at least the covariance (1 / K + i)^-1, and those of the
background b exp(u) are b times as large. Borders are as they are: nothing is periodic.

Some scenes have one fixed background, and no law to draw it from. For these it is the
error of the best linear filter for that very background, which is Wiener's with its own
spectrum, in cosines: a bound for filters, and not for all estimators.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scenes import Movie, OCTAVES, Scene
from scipy import fft, special


Kind = Literal["estimators", "filters"]


@dataclass(frozen=True)
class Bound:
    """The least root-mean-square error, and whether it is that of all estimators."""

    rms_electrons: float
    kind: Kind


def field_variances(field: Scene) -> list[tuple[float, float, float]]:
    """The variance of the logarithm of each factor of a scene's field, and its length
    scales along y and x."""
    ((y, x),) = field.lengths_pix
    octaves = OCTAVES if field.shape == "texture" else 1
    return [
        (math.log1p((field.bkgd_contrast / 2**k) ** 2), y / 2**k, x / 2**k)
        for k in range(octaves)
    ]


def covariance_eigenvalues(
    variances: list[tuple[float, float, float]], size_pix: int
) -> np.ndarray:
    """Those of the covariance of a field with an unknown level of deviation 1, but for
    values that are 1e-9 of the largest and less."""
    distances = np.subtract.outer(np.arange(size_pix), np.arange(size_pix))
    ones = np.ones((size_pix, size_pix))
    factors = [(1.0, ones, ones)]
    for variance, *lengths in variances:
        along_y, along_x = (np.exp(-((distances / length) ** 2) / 2) for length in lengths)
        factors.append((variance, along_y, along_x))
    # The covariance is a sum of Kronecker products of smooth matrices: few dimensions
    # along each axis hold all of it.
    bases = []
    for axis in (1, 2):
        values, vectors = np.linalg.eigh(sum(factor[axis] for factor in factors))
        bases.append(vectors[:, values > 1e-7 * values[-1]])
    y, x = bases
    covariance = sum(
        variance * np.kron(y.T @ along_y @ y, x.T @ along_x @ x)
        for variance, along_y, along_x in factors
    )
    return np.linalg.eigvalsh(covariance)


def mean_variance(eigenvalues: np.ndarray, information: float, size_pix: int) -> float:
    """The mean over pixels of the variance that information, the same in all pixels,
    leaves of a field."""
    variances = np.maximum(eigenvalues, 0)
    return float(np.sum(variances / (1 + information * variances)) / size_pix**2)


def multiplied_information(means: np.ndarray) -> np.ndarray:
    """The Fisher information of the mean of photons whose electrons were multiplied, each
    by an exponential number of mean one."""
    grid = np.geomspace(0.5, max(2.0, means.max()), 60)
    found = []
    for mean in grid:
        signal = np.linspace(1e-6, mean + 15 * math.sqrt(2 * mean) + 15, 4000)
        z = 2 * np.sqrt(mean * signal)
        density = np.exp(z - mean - signal) * np.sqrt(mean / signal) * special.ive(1, z)
        score = np.sqrt(signal / mean) * special.ive(0, z) / special.ive(1, z) - 1
        found.append(np.trapezoid(density * score**2, signal) + math.exp(-mean))
    return np.interp(means, grid, found)


def pixel_information(scene: Scene, movie: Movie) -> tuple[np.ndarray, np.ndarray]:
    """The background in electrons, and the Fisher information of each of its values."""
    bkgds = movie.electrons(movie.bkgds_adu)
    electrons = bkgds + movie.molecules_electrons
    if scene.camera == "EMCCD":
        return bkgds, multiplied_information(electrons)
    return bkgds, 1 / (electrons + np.square(movie.camera.read_noise_electrons))


def bound(scene: Scene, movie: Movie) -> Bound | None:
    """That of the scene; none where the shape of its background changes."""
    if scene.blob or scene.second or any(scene.drift_pix):
        return None
    size_pix = movie.frames.shape[-1]
    bkgds, information = pixel_information(scene, movie)
    if scene.shape in ("gradient", "cell", "waves"):
        return Bound(_filter_error(bkgds, information), "filters")
    variances = [] if scene.shape == "uniform" else field_variances(scene)
    # Of the logarithm: in each pixel, in all frames, and of each frame's light.
    relative = bkgds**2 * information
    eigenvalues = covariance_eigenvalues(variances, size_pix)
    of_field = mean_variance(eigenvalues, float(relative.sum(0).mean()), size_pix)
    of_light = 0.0
    if scene.flicker:
        of_light = 1 / (relative.sum((1, 2)) + scene.flicker**-2)
        # Their mean is the field's brightness.
        of_light *= 1 - 1 / len(bkgds)
    brightness = bkgds.mean((1, 2))
    return Bound(math.sqrt(np.mean(brightness**2 * (of_field + of_light))), "estimators")


def _filter_error(bkgds: np.ndarray, information: np.ndarray) -> float:
    # Steady scenes.
    spectrum = np.asarray(fft.dctn(bkgds[0], norm="ortho")) ** 2
    noise = 1 / information.sum(0).mean()
    return math.sqrt(np.mean(spectrum * noise / (spectrum + noise)))
