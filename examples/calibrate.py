"""Calibration: the radii of a two-channel movie, learned from three different starts.

    python examples/calibrate.py

It prints the radii that each start leads to, and those that the true background gives. It
draws the way of each to calibrate.png in the folder it runs in. The movie is simulated; one
of your own is an array (frames, height, width) for each channel, less the camera's offset.
It needs the extra `plots`, and takes about a minute on two cores.
"""

from collections.abc import Sequence

import jax
import numpy as np
from matplotlib.figure import Figure

import jaxbkgd


LENGTH_SCALES_PIX = (8.0, 25.0)  # of each channel's background
MOST_STEPS = 30  # twice as many as it takes from far off


def main(
    size_pix: int = 128, frame_count: int = 60, starts_pix: Sequence[float] = (2, 7, 25)
) -> list[jaxbkgd.CalibrationHistory]:
    """Shows where each start leads to."""
    channels, bkgds = [], []
    for channel, length_scale_pix in enumerate(LENGTH_SCALES_PIX):
        movie, truth = jaxbkgd.simulate_movie(
            jax.random.key(channel),
            frame_count=frame_count,
            height_pix=size_pix,
            width_pix=size_pix,
            bkgd_length_scale_pix=length_scale_pix,
            offset_adu=100.0,
        )
        channels.append(movie - 100.0)
        bkgds.append(truth.bkgds_adu)

    # The lag, which depends on the movie alone, is found once.
    pairs = jaxbkgd.FramePairLoss().fitted(channels)
    histories = {}
    print("                  channel 1: y, x (px)         channel 2: y, x (px)")
    for start in starts_pix:
        name = f"from {start:g} px"
        histories[name] = learn(name, start, channels, pairs)
    learn("from the truth", 7, channels, jaxbkgd.TruthLoss(bkgds))
    print(f"Pairs of frames were {pairs.lag} frames apart.")
    draw(histories)
    return list(histories.values())


def learn(name, start_pix, channels, objective) -> jaxbkgd.CalibrationHistory:
    """Calibrates a radius along y and one along x for each channel, and prints them."""
    start = jaxbkgd.SpatialMean([(start_pix, start_pix)] * 2, max_radius_pix=50.0)
    estimator, history = jaxbkgd.calibrate(
        channels, start, objective=objective, steps=MOST_STEPS
    )
    pairs = zip(np.ravel(estimator.radii_pix), np.ravel(history.radii_std), strict=True)
    radii = [f"{radius:5.2f} ± {std:.2f}" for radius, std in pairs]
    print(f"{name:16}  {', '.join(radii[:2]):27}  {', '.join(radii[2:])}")
    return history


def draw(histories: dict[str, jaxbkgd.CalibrationHistory]) -> None:
    figure = Figure((9, 2.8), dpi=100, layout="constrained")
    *channel_axes, loss_axes = figure.subplots(1, 3)
    colours = ("#1b6ca8", "#d95f02", "#222222")
    for (name, history), colour in zip(histories.items(), colours, strict=False):
        for channel, axes in enumerate(channel_axes):
            y, x = history.radii[:, channel].T
            axes.plot(y, ".-", color=colour, lw=1, label=f"y, {name}")
            axes.plot(x, "x:", color=colour, lw=1, ms=4, label=f"x, {name}")
        loss_axes.plot(history.losses, ".-", color=colour, lw=1, label=name)
    for axes, length_scale_pix in zip(channel_axes, LENGTH_SCALES_PIX, strict=True):
        title = f"radii, background of {length_scale_pix:g} px"
        axes.set(title=title, ylabel="radius (px)", yscale="log")
        axes.set_yticks([2, 5, 10, 20], labels=["2", "5", "10", "20"])
        axes.set_yticks([], minor=True)
    loss_axes.set(title="loss", ylabel="loss of frame pairs")
    loss_axes.legend(frameon=False)
    channel_axes[0].legend(frameon=False, fontsize=7)
    for axes in (*channel_axes, loss_axes):
        axes.set_xlabel("step")
    figure.savefig("calibrate.png")
    print("wrote calibrate.png")


if __name__ == "__main__":
    main()
