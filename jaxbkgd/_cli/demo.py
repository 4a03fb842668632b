"""`jaxbkgd demo`: the background of a simulated movie, beside the truth."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._estimators.base import Background
from .._estimators.spatial_mean import SpatialMean
from .._simulation import simulate_movie
from .._workers import one_thread_a_call, progress_bar
from .figures import save_channel_figure
from .report import print_table, printable, require, UsageError


OPTIONS = {
    "out": ("DIR", "The folder for the figures."),
    "seed": ("SEED", "The seed of the simulation.", 0),
}
_GAIN, _OFFSET_ADU = 0.46, 100.0  # electrons per ADU, ADU


class _Scene(NamedTuple):
    """A channel to simulate, and the radius to estimate its background with."""

    shape: tuple[int, int, int]
    bkgd_photons: float
    length_scale_pix: float
    radius_pix: float

    def frames_and_truth(self, seed: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Frames above the camera's offset and their true background, both in ADU."""
        frame_count, height, width = self.shape
        frames, truth = simulate_movie(
            jax.random.key(seed),
            frame_count=frame_count,
            height_pix=height,
            width_pix=width,
            bkgd_photons=self.bkgd_photons,
            bkgd_length_scale_pix=self.length_scale_pix,
            gain_electrons_per_adu=_GAIN,
            offset_adu=_OFFSET_ADU,
            **options,
        )
        return np.asarray(frames, np.float32) - _OFFSET_ADU, np.asarray(truth.bkgds_adu)


_SCENES = (
    _Scene((100, 128, 128), 60.0, 20.0, 7.0),
    _Scene((100, 128, 128), 25.0, 12.0, 5.0),
)


def demo(out: Path = Path("jaxbkgd-demo"), seed: int = 0) -> None:
    """Simulate a movie of two channels and estimate its background.

    Prints the error of the estimate and the time it took, and draws a figure of each
    channel.
    """
    require("matplotlib", "PIL")
    one_thread_a_call()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made a folder ({error.strerror})") from error
    columns, figures = [], {}
    with progress_bar(len(_SCENES)) as report:
        for number, scene in enumerate(_SCENES, 1):
            report(number - 1, f"channel {number}")
            frames, truth = scene.frames_and_truth(seed + number)
            estimator = SpatialMean(scene.radius_pix)
            background = estimator(frames)
            columns.append(_judged(scene, seed + number, background, frames, truth))
            middle = len(frames) // 2
            figures[out / f"channel-{number}.png"] = dict(
                frame=frames[middle],
                true_bkgd=truth[middle],
                bkgd=np.asarray(background.bkgds[middle]),
                snr=np.asarray(background.snr(frames, _GAIN)[middle]),
                title=f"Simulated channel {number}, frame {middle}: spatial mean, "
                f"radius {scene.radius_pix:g} px",
            )
    print_table("Spatial mean of a simulated movie", columns)
    for path, images in figures.items():
        save_channel_figure(path, **images)
        print(f"wrote {printable(path)}")


def _judged(
    scene: _Scene,
    seed: int,
    background: Background,
    frames: np.ndarray,
    truth: np.ndarray,
) -> dict[str, str]:
    """The rows of the table for a channel."""
    estimator = SpatialMean(scene.radius_pix)
    start = time.perf_counter()
    jax.block_until_ready(estimator(frames))
    seconds = time.perf_counter() - start
    error = float(np.sqrt(np.mean(np.square(background.bkgds - truth))))
    # The noise is that of even light. At the borders, the kernel is another one.
    noise = np.random.default_rng(seed).poisson(scene.bkgd_photons, scene.shape)
    border = int(2 * scene.radius_pix)
    before, after = (
        np.std(stack[:, border:-border, border:-border], dtype=np.float64)
        for stack in (noise, noise - np.asarray(estimator(noise.astype(np.float32)).bkgds))
    )
    return {
        "movie": " x ".join(map(str, frames.shape)),
        "radius": f"{scene.radius_pix:g} px",
        "true mean background": f"{truth.mean():.0f} ADU",
        "RMS error of the background": f"{error:.1f} ADU ({error * _GAIN:.1f} e-)",
        "time, once compiled": f"{seconds:.4f} s",
        "noise of the residual, relative": f"{float(background.noise_corrections):.3f}",
        "  measured": f"{after / before:.3f}",
    }
