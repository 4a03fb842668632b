"""Other kernels in space than that of LocalMean, and what they would gain.

    python examples/kernels_tried.py [--draws 4]

It prints a table of root-mean-square errors in electrons. Of a movie of 300 frames without
molecules and in steady light, the mean over time is smoothed in space, by

- the Gaussian G, `2G - G*G` as in `LocalMean`, and `3G - 3G*G + G*G*G`, each with the
  radius that is best for that draw by the truth;
- `2G - G*G` with a radius for each pixel, that with which the first half of the movie
  predicts the second one best around there;
- Wiener's filter in the cosine transform, which repeats no edge but reflects it, with a
  spectrum learned from the movie: the product of its halves, as a function of the
  distance from zero that never rises;
- the same with the spectrum of the true background.

Errors are over the whole frame. It needs the extra `bench`.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Float
from scenes import Scene, SCENES, simulated
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter
from scipy.optimize import isotonic_regression


TRIED_SCENES = ("scale-6", "scale-20", "scale-40", "cell-edge")
RADII_PIX = 2.0 * np.geomspace(0.5, 16, 16)
# Of the neighbourhood in which a pixel's radius is chosen.
NEAR_PIX = 12.0
FRAME_COUNT, SIZE_PIX = 300, 128

Image = Float[np.ndarray, "height width"]


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))


def smooth(image: Image, radius_pix: float, order: int) -> Image:
    """The image under a kernel in which nothing below `order` is left of the moments: the
    mean, with that of what it leaves added again and again."""
    mean = np.zeros_like(image)
    for _ in range(order // 2):
        mean += gaussian_filter(image - mean, radius_pix / 2, mode="nearest", truncate=6)
    return mean


def best_by_truth(order: int, halves: Iterable[Image], truth: Image) -> Image:
    image = np.mean(list(halves), axis=0)
    means = [smooth(image, radius, order) for radius in RADII_PIX]
    return min(means, key=lambda mean: rms(mean - truth))


def local_radii(halves: Iterable[Image], _: Image) -> Image:
    first, second = halves
    means = np.array([smooth((first + second) / 2, radius, 4) for radius in RADII_PIX])
    losses = [
        gaussian_filter((smooth(seen, radius, 4) - other) ** 2, NEAR_PIX)
        for radius in RADII_PIX
        for seen, other in ((first, second), (second, first))
    ]
    pairs = np.array(losses).reshape(len(RADII_PIX), 2, *first.shape)
    best = np.argmin(np.sum(pairs, axis=1), axis=0)
    return np.take_along_axis(means, best[None], axis=0)[0]


def wiener(
    power_of: Callable[[Image, Image, Image], Image],
    halves: Iterable[Image],
    truth: Image,
) -> Image:
    """With the power of the background by the transforms of halves and truth."""
    first, second = (np.asarray(dctn(half, norm="ortho")) for half in halves)
    noise = np.mean((first - second) ** 2) / 4
    power = power_of(first, second, np.asarray(dctn(truth, norm="ortho")))
    y, x = np.indices(power.shape)
    distance = np.hypot(y, x)
    order = np.argsort(distance, axis=None)
    falling = isotonic_regression(power.ravel()[order], increasing=False).x
    power = np.empty(power.size)
    power[order] = np.maximum(falling, 0)
    gains = (power / (power + noise)).reshape(distance.shape)
    # The mean of the frame is known.
    gains[0, 0] = 1
    return np.asarray(idctn(gains * (first + second) / 2, norm="ortho"))


WAYS: dict[str, Callable[[Iterable[Image], Image], Image]] = {
    "G": partial(best_by_truth, 2),
    "order 4": partial(best_by_truth, 4),
    "order 6": partial(best_by_truth, 6),
    "order 4, a radius for each pixel": local_radii,
    "Wiener, learned": partial(wiener, lambda first, second, _: first * second),
    "Wiener, by the truth": partial(wiener, lambda _, __, truth: truth**2),
}


def errors_of(scene: Scene, seed: int) -> dict[str, float]:
    (movie,) = simulated(
        replace(scene, molecules_per_frame=0.0),
        size_pix=SIZE_PIX,
        frame_count=FRAME_COUNT,
        seed=seed,
    )
    frames = movie.electrons(movie.frames)
    truth = movie.electrons(movie.bkgds_adu).mean(0)
    halves = [half.mean(0) for half in np.split(frames, 2)]
    return {name: rms(way(halves, truth) - truth) for name, way in WAYS.items()}


def main(draws: int) -> None:
    print(f"| scene | {' | '.join(WAYS)} |")
    print(f"| --- |{' --: |' * len(WAYS)}")
    for scene in SCENES:
        if scene.name in TRIED_SCENES:
            found = [errors_of(scene, scene.seed + draw) for draw in range(draws)]
            means = [np.mean([errors[name] for errors in found]) for name in WAYS]
            numbers = " | ".join(f"{mean:.3f}" for mean in means)
            print(f"| {scene.name} | {numbers} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draws", type=int, default=4)
    main(parser.parse_args().draws)
