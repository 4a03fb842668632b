"""`jaxbkgd demo`: the background of a simulated movie, beside the truth."""

import time
from pathlib import Path

import jax
import numpy as np

from .._estimators.spatial_mean import SpatialMean
from .._simulation import simulate_movie
from .._workers import one_thread_a_call, progress_bar, run_interruptibly
from .figures import save_channel_figure
from .report import print_table, printable, refusing


OPTIONS = """
out DIR: The folder for the figures.
seed SEED>=0: The seed of the simulation.
"""

# The background in photons of each channel, its length scale and the averaging radius.
_CHANNELS = ((60.0, 20.0, 7.0), (25.0, 12.0, 5.0))
_SHAPE, _GAIN, _OFFSET_ADU = (100, 128, 128), 0.46, 100.0  # electrons per ADU, ADU


def demo(out: Path = Path("jaxbkgd-demo"), seed: int = 0) -> None:
    """Simulate a movie of two channels and estimate its background.

    Prints the error of the estimate and its time, and draws a figure of each channel.
    """
    one_thread_a_call()
    with refusing(f"{out}: cannot be made a folder"):
        out.mkdir(parents=True, exist_ok=True)
    paths = [out / "channel-1.png", out / "channel-2.png"]
    columns = []
    with progress_bar(len(paths)) as report:
        for number, path in enumerate(paths):
            report(number, f"channel {number + 1}")
            columns.append(run_interruptibly(_show_channel, number, seed, path))
    print_table("Spatial mean of a simulated movie", columns)
    for path in paths:
        print(f"wrote {printable(path)}")


def _show_channel(number: int, seed: int, path: Path) -> dict[str, str]:
    """Draw a channel; return the rows of its column."""
    photons, scale_pix, radius_pix = _CHANNELS[number]
    frame_count, height, width = _SHAPE
    movie, truth = simulate_movie(
        jax.random.key(seed + number + 1),
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
    middle = frame_count // 2
    save_channel_figure(
        path,
        frame=frames[middle],
        true_bkgd=true_bkgds[middle],
        bkgd=np.asarray(background.bkgds[middle]),
        snr=np.asarray(background.snr(frames, _GAIN)[middle]),
        title=f"Simulated channel {number + 1}, frame {middle}: spatial mean, "
        f"radius {radius_pix:g} px",
    )
    # The noise of the residual in even light, away from the borders.
    noise = np.random.default_rng(seed).poisson(50.0, _SHAPE).astype(np.float32)
    inside = np.s_[:, 15:-15, 15:-15]
    measured = np.std((noise - estimator(noise).bkgds)[inside]) / np.std(noise[inside])
    return {
        "movie": " x ".join(map(str, _SHAPE)),
        "radius": f"{radius_pix:g} px",
        "true mean background": f"{true_bkgds.mean():.0f} ADU",
        "RMS error of the background": f"{error:.1f} ADU ({error * _GAIN:.1f} e-)",
        "time, once compiled": f"{seconds:.4f} s",
        "noise of the residual, relative": f"{float(background.noise_corrections):.3f}",
        "  measured": f"{measured:.3f}",
    }
