"""`jaxbkgd demo`: the background of a simulated movie, beside the truth."""

import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from typer import Option

from .._estimators.camera import Camera
from .._estimators.spatial_mean import SpatialMean
from .._simulation import simulate_movie
from .._workers import one_thread_a_call, run_interruptibly
from .arguments import DEBUG
from .figures import save_channel_figure
from .programs import keep_programs
from .report import print_table, printable, refusing


# The background in photons of each channel, its length scale and the averaging radius.
_CHANNELS = ((60.0, 20.0, 7.0), (25.0, 12.0, 5.0))
_GAIN, _OFFSET_ADU = 0.46, 100.0  # electrons per ADU, ADU
_OUT = Option(help="The folder for the figures.")
_SEED = Option(min=0, max=2**31, help="The seed of the simulation.")


def demo(
    out: Annotated[Path, _OUT] = Path("jaxbkgd-demo"),
    seed: Annotated[int, _SEED] = 0,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Simulate a movie of two channels and estimate its background.

    Prints the error of the estimate and its time, and draws a figure of each channel.
    """
    one_thread_a_call()
    keep_programs()
    with refusing(f"{out}: is not a folder, and cannot be made one"):
        out.mkdir(parents=True, exist_ok=True)
    paths = [out / "channel-1.png", out / "channel-2.png"]
    for path in paths:
        # What is there may be of another seed.
        with refusing(f"{path}: cannot be replaced"):
            path.unlink(missing_ok=True)
    try:
        columns = [
            run_interruptibly(_show_channel, i, seed, path) for i, path in enumerate(paths)
        ]
    except KeyboardInterrupt as interrupt:
        drawn = ", ".join(printable(path) for path in paths if path.exists())
        if drawn:
            interrupt.add_note(f"the demo has written {drawn}")
        raise
    print_table("Spatial mean of a simulated movie", columns)
    print("\n".join(f"wrote {printable(path)}" for path in paths))


def _show_channel(number: int, seed: int, path: Path) -> dict[str, str]:
    """Draw a channel; return the rows of its column."""
    photons, scale_pix, radius_pix = _CHANNELS[number]
    movie, truth = simulate_movie(
        jax.random.key(seed + number + 1),
        bkgd_photons=photons,
        bkgd_length_scale_pix=scale_pix,
        gain_electrons_per_adu=_GAIN,
        offset_adu=_OFFSET_ADU,
    )
    frames, true_bkgds = np.asarray(movie, np.float32) - _OFFSET_ADU, truth.bkgds_adu
    estimator = SpatialMean(radius_pix)
    background = estimator(frames)
    start = time.perf_counter()
    jax.block_until_ready(estimator(frames))
    seconds = time.perf_counter() - start
    error = float(np.sqrt(np.mean(np.square(background.bkgds - true_bkgds))))
    middle = len(frames) // 2
    save_channel_figure(
        path,
        frame=frames[middle],
        true_bkgd=np.asarray(true_bkgds[middle]),
        bkgd=np.asarray(background.bkgds[middle]),
        snr=np.asarray(background.snr(frames, Camera(0.0, _GAIN))[middle]),
        title=f"Simulated channel {number + 1}, frame {middle}: radius {radius_pix:g} px",
    )
    return {
        "radius": f"{radius_pix:g} px",
        "true mean background": f"{true_bkgds.mean():.0f} ADU",
        "RMS error of the background": f"{error:.1f} ADU ({error * _GAIN:.1f} e-)",
        "time, once compiled": f"{seconds:.4f} s",
        "noise factor": f"{float(background.noise_corrections):.4f}",
    }
