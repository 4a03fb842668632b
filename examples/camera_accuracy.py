"""How well cameras are measured, and what hot pixels do, for docs/pages/cameras.md.

    python examples/camera_accuracy.py

On simulated movies of 128 x 128 px, in some three minutes.
"""

from collections.abc import Sequence

import numpy as np
from scenes import MOVING_SCENES, Scene, SCENES, simulated

import jaxbkgd


GAIN, OFFSET_ADU, READ_NOISE = 0.46, 100.0, 1.5


def print_maps(
    levels: Sequence[float] = (60, 500, 3000), frame_count: int = 300, size_pix: int = 128
) -> list[float]:
    """The deviations of measured maps from the true ones over their stated errors, as root
    mean squares: 1 where these are true."""
    rng, shape = np.random.default_rng(0), (size_pix, size_pix)
    truth = (
        OFFSET_ADU + rng.standard_normal(shape),
        GAIN * (1 + 0.05 * rng.standard_normal(shape)),
        READ_NOISE * np.exp(0.4 * rng.standard_normal(shape)),
    )
    offset, gain, noise = truth
    stacks = []
    for level in (0.0, *levels):
        lamp = 1 + 0.02 * rng.standard_normal((frame_count, 1, 1))
        electrons = rng.poisson(np.broadcast_to(level * lamp, (frame_count, *shape)))
        electrons = electrons + noise * rng.standard_normal(electrons.shape)
        stacks.append(np.round(electrons / gain + offset))
    report = jaxbkgd.measure_camera(stacks[0], stacks[1:])
    ratios = [
        float(np.sqrt(np.mean(np.square((found - true) / std))))
        for found, true, std in zip(report[:3], truth, report[3:6], strict=True)
    ]
    share = np.median(report.gain_std / report.gain_electrons_per_adu)
    print(f"maps: deviations over stated errors {np.round(ratios, 2)}; gain to {share:.1%}")
    return ratios


def print_gains(
    scenes: Sequence[Scene], frame_count: int = 300, size_pix: int = 128
) -> list[float]:
    """Gain and offset of movies alone, as ratio and difference to the true ones."""
    ratios = []
    for scene in scenes:
        movie = simulated(scene, size_pix=size_pix, frame_count=frame_count)[0]
        noise = float(np.median(movie.camera.read_noise_electrons))
        report = jaxbkgd.measure_gain(movie.frames, read_noise_electrons=noise)
        ratio = float(report.gain_electrons_per_adu / movie.gain_electrons_per_adu)
        off = report.offset_adu - movie.offset_adu
        print(
            f"{scene.name:18s} gain {ratio:.3f} of the true one, stated to "
            f"{report.gain_std / report.gain_electrons_per_adu:.1%}; offset {off:+.1f} +- "
            f"{report.offset_std_adu:.1f} ADU"
        )
        ratios.append(ratio)
    return ratios


def print_hot_pixels(
    scene: Scene, count: int = 20, frame_count: int = 300, size_pix: int = 128
) -> tuple[float, float]:
    """The error of the background beside hot pixels that are seen, and left out."""
    (movie,) = simulated(scene, size_pix=size_pix, frame_count=frame_count)
    rng = np.random.default_rng(0)
    y, x = rng.integers(0, size_pix, (2, count))
    frames, is_good = movie.frames.copy(), np.ones((size_pix, size_pix), bool)
    frames[:, y, x] += rng.integers(150, 450, count).astype(np.uint16)
    is_good[y, x] = False
    truth = movie.bkgds_adu - movie.offset_adu
    errors = []
    for skips in (False, True):
        bkgds = np.empty(frames.shape, np.float32)
        estimator = jaxbkgd.LocalMean(5.0, 120.0)
        options = {"skips_hot_pixels": skips, "camera": movie.camera, "progress": False}
        jaxbkgd.estimate_movie(frames, estimator, bkgds, **options)
        square = np.mean(np.square(bkgds - truth)[:, is_good])
        errors.append(movie.gain_electrons_per_adu * float(np.sqrt(square)))
    print(f"{count} hot pixels: error {errors[0]:.2f} e-, left out {errors[1]:.2f} e-")
    return errors[0], errors[1]


def print_calibrated(scene: Scene) -> None:
    """The error of what `calibrate` finds with the camera's mean offset, and its maps."""
    (movie,) = simulated(scene, size_pix=128, frame_count=300)
    truth = movie.electrons(movie.bkgds_adu)
    for name, camera in {
        "mean offset": jaxbkgd.Camera(movie.offset_adu),
        "maps": movie.camera,
    }.items():
        estimator, _ = jaxbkgd.calibrate(movie.frames, camera=camera, progress=False)
        bkgds = np.empty(movie.frames.shape, np.float32)
        jaxbkgd.estimate_movie(
            movie.frames, estimator, bkgds, camera=camera, progress=False
        )
        errors = movie.electrons(bkgds + camera.offset_adu) - truth
        print(f"{name}: error {np.sqrt(np.mean(errors**2)):.2f} e-")


if __name__ == "__main__":
    print_maps()
    print_gains([*SCENES, *MOVING_SCENES])
    print_hot_pixels(next(scene for scene in SCENES if scene.name == "scale-20"))
    print_calibrated(next(scene for scene in SCENES if scene.name == "sCMOS-maps"))
