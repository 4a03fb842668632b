"""`jaxbkgd demo`: the background of a simulated movie, beside the truth."""

import time
from pathlib import Path

import jax
import numpy as np

from .._estimators.spatial_mean import SpatialMean
from .._simulation import simulate_movie
from .._workers import one_thread_a_call, progress_bar
from .figures import save_channel_figure
from .report import print_table, printable, require, UsageError


OPTIONS = {
    "out": ("DIR", "The folder for the figures."),
    "seed": ("SEED", "The seed of the simulation.", 0),
}

# Of each channel, the background in photons, its length scale and the averaging radius.
_CHANNELS = ((60.0, 20.0, 7.0), (25.0, 12.0, 5.0))
_SHAPE, _GAIN, _OFFSET_ADU = (100, 128, 128), 0.46, 100.0  # electrons per ADU, ADU


def demo(out: Path = Path("jaxbkgd-demo"), seed: int = 0) -> None:
    """Simulate a movie of two channels and estimate its background.

    Prints the error of the estimate and its time, and draws a figure of each channel.
    """
    require("matplotlib", "PIL")
    one_thread_a_call()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made a folder ({error.strerror})") from error
    frame_count, height, width = _SHAPE
    columns, middle = [], frame_count // 2
    with progress_bar(len(_CHANNELS)) as report:
        for number, (photons, scale_pix, radius_pix) in enumerate(_CHANNELS, 1):
            report(number - 1, f"channel {number}")
            movie, truth = simulate_movie(
                jax.random.key(seed + number),
                frame_count=frame_count,
                height_pix=height,
                width_pix=width,
                bkgd_photons=photons,
                bkgd_length_scale_pix=scale_pix,
                gain_electrons_per_adu=_GAIN,
                offset_adu=_OFFSET_ADU,
            )
            frames = np.asarray(movie, np.float32) - _OFFSET_ADU
            true_bkgds = np.asarray(truth.bkgds_adu)
            estimator = SpatialMean(radius_pix)
            background = estimator(frames)
            start = time.perf_counter()
            jax.block_until_ready(estimator(frames))
            seconds = time.perf_counter() - start
            error = float(np.sqrt(np.mean(np.square(background.bkgds - true_bkgds))))
            factor = float(background.noise_corrections)
            columns.append(
                {
                    "movie": " x ".join(map(str, _SHAPE)),
                    "radius": f"{radius_pix:g} px",
                    "true mean background": f"{true_bkgds.mean():.0f} ADU",
                    "RMS error of the background": f"{error:.1f} ADU "
                    f"({error * _GAIN:.1f} e-)",
                    "time, once compiled": f"{seconds:.4f} s",
                    "noise of the residual, relative": f"{factor:.3f}",
                    "  measured": f"{_measured_noise(estimator, radius_pix, seed):.3f}",
                }
            )
            save_channel_figure(
                out / f"channel-{number}.png",
                frame=frames[middle],
                true_bkgd=true_bkgds[middle],
                bkgd=np.asarray(background.bkgds[middle]),
                snr=np.asarray(background.snr(frames, _GAIN)[middle]),
                title=f"Simulated channel {number}, frame {middle}: spatial mean, "
                f"radius {radius_pix:g} px",
            )
    print_table("Spatial mean of a simulated movie", columns)
    for number in range(1, len(_CHANNELS) + 1):
        print(f"wrote {printable(out / f'channel-{number}.png')}")


def _measured_noise(estimator: SpatialMean, radius_pix: float, seed: int) -> float:
    """The noise of the residual over that of the frames, in even light."""
    frames = np.random.default_rng(seed).poisson(50.0, _SHAPE).astype(np.float32)
    residuals = frames - np.asarray(estimator(frames).bkgds)
    # At the borders, the kernel is another one.
    inside = slice(int(2 * radius_pix), -int(2 * radius_pix))
    before, after = (
        np.std(stack[:, inside, inside], dtype=np.float64) for stack in (frames, residuals)
    )
    return float(after / before)
