"""Coming from smlmlp: its pipeline, with jaxbkgd's backgrounds in it.

    python examples/from_smlmlp.py

smlmlp's `bkgd_combination` subtracts a median over time, then a mean over space. Here that
is an estimator, and so is what can take its place: the same with exact noise factors, and a
mean over time and space that leaves molecules out, its radii learned from the movie. It
prints how right each background and its noise are, and draws from_smlmlp.png in the folder
it runs in. Where smlmlp is installed, which needs Python 3.12, its `detect_snr` and
`detect_spatial_maxima` go on from there. It needs the extra `plots`.
"""

import importlib
import importlib.util
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import jaxbkgd


GAIN_ELECTRONS_PER_ADU = 0.46
LEAST_SNR, REACH_PIX = 4.0, 3.0


def pipelines(channels: list[jax.Array]) -> dict[str, jaxbkgd.AbstractEstimator]:
    """smlmlp's first."""
    start = jaxbkgd.LocalMean(max_radius_pix=20.0, max_radius_frames=120.0)
    calibrated, _ = jaxbkgd.calibrate(channels, start)
    return {
        "smlmlp's": jaxbkgd.Chained(
            jaxbkgd.TemporalMedian(25, noise="unit"),
            jaxbkgd.SpatialMean(7.0, truncation="hard", noise="separable"),
        ),
        "exact factors": jaxbkgd.Chained(
            jaxbkgd.TemporalMedian(25), jaxbkgd.SpatialMean(7.0)
        ),
        "LocalMean": calibrated,
    }


def main(size_pix: int = 128, frame_count: int = 100) -> dict[str, jaxbkgd.Background]:
    """The background of each pipeline."""
    movie, truth = jaxbkgd.simulate_movie(
        jax.random.key(0),
        frame_count=frame_count,
        height_pix=size_pix,
        width_pix=size_pix,
        molecules_per_frame=size_pix**2 / 2000,
        bkgd_remaining=0.8,
        gain_electrons_per_adu=GAIN_ELECTRONS_PER_ADU,
        offset_adu=100.0,
    )
    channels = [movie - 100.0]

    backgrounds, snrs = {}, {}
    print("                    error (ADU)  noise of the SNR  right and false maxima")
    for name, estimator in pipelines(channels).items():
        background = backgrounds[name] = estimator(channels)
        (snr,) = background.snr(channels, jaxbkgd.Camera(0.0, GAIN_ELECTRONS_PER_ADU))
        snrs[name] = snr
        (bkgds,) = background.bkgds
        error = float(np.sqrt(np.mean((bkgds - truth.bkgds_adu) ** 2)))
        low, high = np.percentile(snr, [15.87, 84.13])  # a deviation, without molecules
        count = found(channels, background, truth)
        print(f"{name:20}{error:11.2f}{(high - low) / 2:18.3f}{count:>24}")
    middle_pix, reach_pix = (size_pix - 1) / 2, size_pix / 2
    is_inside = (abs(truth.y_pix - middle_pix) < reach_pix) & truth.is_on
    is_inside &= abs(truth.x_pix - middle_pix) < reach_pix
    print(f"There are {np.count_nonzero(is_inside)} images of molecules in the frames.")
    draw(backgrounds, snrs, truth.bkgds_adu)
    return backgrounds


def found(
    channels: list[jax.Array], background: jaxbkgd.Background, truth: jaxbkgd.SimulatedTruth
) -> str:
    """How many maxima of the SNR map smlmlp finds at molecules, and elsewhere."""
    if importlib.util.find_spec("smlmlp") is None:
        return "needs smlmlp"
    smlmlp: Any = importlib.import_module("smlmlp")
    snrs, _ = smlmlp.detect_snr(
        [np.array(residuals) for residuals in background.residuals(channels)],
        [np.array(bkgds) for bkgds in background.bkgds],
        background.noise_corrections,
        GAIN_ELECTRONS_PER_ADU,
    )
    frames, x_pix, y_pix, *_ = smlmlp.detect_spatial_maxima(
        snrs,
        LEAST_SNR,
        [np.ones((5, 5), np.float32)],
        channels_pixels_nm=[(1.0, 1.0)],
    )
    # Its frames count from one.
    is_same_frame = frames[:, None] - 1 == truth.frame
    distances_pix = np.hypot(y_pix[:, None] - truth.y_pix, x_pix[:, None] - truth.x_pix)
    is_near = is_same_frame & truth.is_on & (distances_pix < REACH_PIX)
    right = np.count_nonzero(is_near.any(1))
    return f"{right} and {len(frames) - right}"


def draw(
    backgrounds: dict[str, jaxbkgd.Background],
    snrs: dict[str, jax.Array],
    true_bkgds_adu: jax.Array,
) -> None:
    """The errors of one frame, and how often each signal-to-noise ratio is met."""
    figure = Figure((11, 2.8), dpi=85, layout="constrained")
    *image_axes, snr_axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.3])
    index = len(true_bkgds_adu) // 2
    for axes, (name, background) in zip(image_axes, backgrounds.items(), strict=True):
        error = background.bkgds[0][index] - true_bkgds_adu[index]
        axes.imshow(error, cmap="RdBu_r", vmin=-20, vmax=20)
        axes.set(title=f"{name}: error (ADU)", xticks=[], yticks=[])
    figure.colorbar(image_axes[0].images[0], ax=image_axes, pad=0.01)

    edges = np.linspace(-5, 8, 131)
    middles = (edges[1:] + edges[:-1]) / 2
    normal = np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi)
    snr_axes.plot(middles, normal, "k:", lw=1, label="normal")
    for name, snr in snrs.items():
        heights, _ = np.histogram(snr, edges, density=True)
        snr_axes.plot(middles, heights, lw=1, label=name)
    snr_axes.set(title="density of the SNR", xlabel="SNR", yscale="log", ylim=(1e-5, 1))
    snr_axes.legend(frameon=False, fontsize=7, loc="upper right")
    figure.savefig("from_smlmlp.png")
    print("wrote from_smlmlp.png")


if __name__ == "__main__":
    main()
