"""False positives as promised: local maxima of matched SNR maps above thresholds.

    python examples/false_positives.py [--smoke] [--out FOLDER]

It simulates each scene of the accuracy example without molecules, and counts the local
maxima of `matched_snr` above the thresholds for 0.1, 1 and 10 false positives a frame, and
in all scenes together for 0.01, with LocalMean and SpatialMean. Their radii are the largest
of some whose background has an error of its own, noise apart, of less than 0.05 in the SNR;
where none has, those of the least error. Then it simulates molecules, and compares their
recall with that of a threshold on the SNR of single pixels. It takes ten minutes on two
cores, and writes its tables between two markers in detection.md, in docs/pages or the
folder `--out`; with `--smoke`, of one small scene.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from detector import matched
from jaxtyping import Array, Bool, Float
from scenes import (
    Movie,
    MOVING_SCENES,
    OTHER_SCENES,
    PSF_SIGMA_PIX,
    Scene,
    SCENES,
    simulated,
)

import jaxbkgd


# False positives a frame; for the least one, scenes are taken together.
LEAST_RATE, RATES = 0.01, np.array([0.1, 1.0, 10.0])
LARGEST_ERROR = 0.05
BEGIN = "<!-- begin: written by false_positives.py -->"
END = "<!-- end: false_positives.py -->"


@dataclass(frozen=True)
class Size:
    """How much is simulated: movies of a scene, and of molecules of each brightness."""

    size_pix: int = 128
    frame_count: int = 300
    movies: int = 2
    scenes: tuple[Scene, ...] = (*SCENES, *MOVING_SCENES, *OTHER_SCENES)
    photons: tuple[float, ...] = (100.0, 150.0, 200.0, 300.0)
    radii_pix: tuple[float, ...] = (20.0, 14.0, 10.0, 7.0, 5.0, 3.0)
    radii_frames: tuple[float, ...] = (30.0, 10.0)


SMOKE = Size(64, 40, 1, (SCENES[14],), (150.0,), (7.0,), (30.0,))


def peaks(
    snr: Float[Array, "frames height width"],
) -> Bool[np.ndarray, "frames height width"]:
    """Which pixels are higher than their eight neighbours."""
    image = np.asarray(snr)
    height, width = image.shape[1:]
    around = np.pad(image, [(0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
    is_peak = np.ones(image.shape, bool)
    for y, x in np.ndindex(3, 3):
        if (y, x) != (1, 1):
            is_peak &= image > around[:, y : y + height, x : x + width]
    return is_peak


def even_light(movie: Movie) -> tuple[Array, Array, jaxbkgd.Camera]:
    """Frames and background as they are estimated, and the camera of these."""
    camera = movie.camera
    frames, bkgds = (
        camera.even_light(jnp.asarray(images, jnp.float32))
        for images in (movie.frames, movie.bkgds_adu)
    )
    return frames, bkgds, camera if camera.is_even else camera.of_electrons


def with_half_gain(movie: Movie) -> Movie:
    """An EMCCD doubles the variance, which is half as many electrons with the usual one."""
    camera = movie.camera
    gain, read_noise = camera.known_gain("A scene"), camera.read_noise_electrons
    halved = jaxbkgd.Camera(camera.offset_adu, gain / 2, read_noise / 2)
    return replace(movie, camera=halved)


def movies_of(scene: Scene, size: Size) -> Iterator[tuple[int, list[Movie]]]:
    """Of each channel, movies of the scene without molecules."""
    empty = replace(scene, molecules_per_frame=0.0)
    options = {"size_pix": size.size_pix, "frame_count": size.frame_count}
    seeds = [scene.seed + i for i in range(size.movies)]
    by_seed = [simulated(empty, **options, seed=seed) for seed in seeds]
    for channel, movies in enumerate(zip(*by_seed, strict=True)):
        of_camera = with_half_gain if scene.camera == "EMCCD" else lambda movie: movie
        yield channel, [of_camera(movie) for movie in movies]


Estimator = jaxbkgd.LocalMean | jaxbkgd.SpatialMean


def estimators(kind: type, size: Size) -> Iterator[tuple[Estimator, Estimator]]:
    """Each with one that clips nothing, whose error without noise is that of both."""
    for radius_pix in size.radii_pix:
        if kind is jaxbkgd.SpatialMean:
            yield jaxbkgd.SpatialMean(radius_pix), jaxbkgd.SpatialMean(radius_pix)
            continue
        for radius_frames in size.radii_frames:
            radii = radius_pix, radius_frames
            yield jaxbkgd.LocalMean(*radii), jaxbkgd.LocalMean(*radii, clip=None)


def own_error(movie: Movie, estimator: Estimator) -> float:
    """The root mean square of the error without noise, in the matched SNR."""
    _, truth, camera = even_light(movie)
    background = estimator(truth)
    error = background.bkgds - truth
    snr = jaxbkgd.matched_snr(
        error,
        truth,
        noise_correction=background.matched_noise(PSF_SIGMA_PIX).deviation,
        gain=camera.known_gain("An SNR"),
        read_noise_electrons=camera.read_noise_electrons,
        psf_sigma_pix=PSF_SIGMA_PIX,
        skewness_correction=0.0,
    )
    return float(jnp.sqrt(jnp.mean(snr**2)))


def fitting(movie: Movie, kind: type, size: Size) -> tuple[Estimator, float]:
    """The estimator of a kind for a scene, and its own error."""
    best = None
    for estimator, unclipped in estimators(kind, size):
        error = own_error(movie, unclipped)
        if best is None or error < best[1]:
            best = estimator, error
        if error < LARGEST_ERROR:
            break
    assert best is not None
    return best


def counted(movies: list[Movie], estimator: Estimator) -> Float[np.ndarray, " rates"]:
    """The false positives a frame at the threshold for the least rate and each other."""
    rates = np.array([LEAST_RATE, *RATES])
    counts, frame_count = np.zeros(rates.size), 0
    for movie in movies:
        frames, _, camera = even_light(movie)
        weights = camera.weights(frames) if estimator.takes_weights else None
        background = estimator(frames, weights)
        snr = background.matched_snr(frames, camera, PSF_SIGMA_PIX)
        thresholds = background.detection_threshold(rates, PSF_SIGMA_PIX)
        values = np.asarray(snr)[peaks(snr)]
        counts += [(values > threshold).sum() for threshold in np.asarray(thresholds)]
        frame_count += len(frames)
    return counts / frame_count


def scene_table(size: Size) -> str:
    """False positives over the promise, scene by scene."""
    kinds = {"LocalMean": jaxbkgd.LocalMean, "SpatialMean": jaxbkgd.SpatialMean}
    header = ["scene"]
    for name in kinds:
        header += [f"{name}: radii", "error", *(f"{rate:g}" for rate in RATES)]
    lines = [header, ["---"] * len(header)]
    least = dict[str, list[float]]()
    for scene in size.scenes:
        for channel, movies in movies_of(scene, size):
            cells = [scene.name + f", {channel + 1}" * (len(scene.lengths_pix) > 1)]
            for name, kind in kinds.items():
                estimator, error = fitting(movies[0], kind, size)
                of_least, *others = counted(movies, estimator)
                if error < LARGEST_ERROR:
                    least.setdefault(name, []).append(of_least / LEAST_RATE)
                ratio = np.array(others) / RATES
                radii = [f"{radius:g}" for radius in np.ravel(estimator.radii)[:-1]]
                cells += [", ".join(radii), f"{error:.2f}", *(f"{r:.2f}" for r in ratio)]
            lines.append(cells)
            print(" | ".join(cells), flush=True)
    frame_count = size.movies * size.frame_count
    sentences = [
        f"At {LEAST_RATE} a frame, `{name}` has {np.mean(ratios):.2f} of the promise in "
        f"the {len(ratios)} scenes with an error below {LARGEST_ERROR}; by chance, "
        f"± {100 / np.sqrt(LEAST_RATE * frame_count * len(ratios)):.0f} %."
        for name, ratios in least.items()
    ]
    return "\n".join([_markdown(lines), *sentences, ""])


def recall_table(size: Size) -> str:
    """The share of molecules found by either map, at the same false positives a frame."""
    header = ["photons", "false positives a frame", "matched SNR", "SNR of single pixels"]
    lines = [header, ["---"] * len(header)]
    options = {
        "frame_count": size.frame_count,
        "height_pix": size.size_pix,
        "width_pix": size.size_pix,
        "molecules_per_frame": 10 * (size.size_pix / 128) ** 2,
        "on_time_frames": 1.0,
        "psf_sigma_pix": PSF_SIGMA_PIX,
    }
    camera = jaxbkgd.Camera(0.0, 0.46, 1.5)
    estimator, key = jaxbkgd.LocalMean(), jax.random.key(0)
    for photons in size.photons:
        maps = []
        for light in (0.0, photons):
            movie, truth = jaxbkgd.simulate_movie(key, **options, photons_per_frame=light)
            frames = movie - 100.0
            background = estimator(frames)
            matched_snr = background.matched_snr(frames, camera, PSF_SIGMA_PIX)
            maps.append([matched_snr, background.snr(frames, camera)])
        empty, full = maps
        for rate in RATES:
            cells = [f"{photons:g}", f"{rate:g}"]
            for empty_map, full_map in zip(empty, full, strict=True):
                # So many in the frames without molecules.
                values = np.sort(np.asarray(empty_map)[peaks(empty_map)])
                threshold = values[-max(round(rate * size.frame_count), 1)]
                is_found = peaks(full_map) & (np.asarray(full_map) >= threshold)
                cells.append(f"{recall(is_found, truth):.3f}")
            lines.append(cells)
            print(" | ".join(cells), flush=True)
    return _markdown(lines)


def recall(
    is_found: Bool[np.ndarray, "frames height width"], truth: jaxbkgd.SimulatedTruth
) -> float:
    """The share of molecules inside of the frame that are within 250 nm of a maximum."""
    right = total = 0
    places = np.stack([truth.y_pix, truth.x_pix], 1)
    limits = np.array(is_found.shape[1:]) - 0.5
    is_inside = np.all((places > -0.5) & (places < limits), 1) & np.asarray(truth.is_on)
    for number, found in enumerate(is_found):
        here = places[is_inside & (np.asarray(truth.frame) == number)]
        distances, _ = matched(np.argwhere(found).astype(float), here)
        right, total = right + len(distances), total + len(here)
    return right / max(total, 1)


def _markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(size: Size, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "detection.md"
    told = (
        f"{size.movies} movies of {size.frame_count} frames of {size.size_pix} px a scene; "
        f"by chance, {', '.join(_chance(size))} of the promise."
    )
    result = f"{told}\n\n{scene_table(size)}\n{recall_table(size)}"
    text = page.read_text("utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{result}\n{END}{after}", "utf-8")


def _chance(size: Size) -> list[str]:
    counts = RATES * size.movies * size.frame_count
    return [
        f"± {100 / np.sqrt(count):.0f} % at {rate:g}"
        for rate, count in zip(RATES, counts, strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    beside = Path(__file__).parents[1] / "docs" / "pages"
    parser.add_argument("--smoke", action="store_true", help="one small scene")
    parser.add_argument("--out", type=Path, default=beside, help="the folder to write to")
    options = parser.parse_args()
    main(SMOKE if options.smoke else Size(), options.out)
