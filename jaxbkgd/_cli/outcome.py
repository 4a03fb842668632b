"""What `jaxbkgd estimate` shows of its result: rows of text, and images for a figure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from .._batch.compute import Quantity
from .._batch.run import MovieSummary
from .._estimators.background import snr
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.movie import Channel
from .._movies.open import open_movie
from .figures import ChannelPanels
from .report import clip_rows, yx_text


def size_text(summary: MovieSummary, channels: Sequence[Channel]) -> str:
    sizes = "; ".join(f"{c.shape[1]} x {c.shape[2]} px" for c in channels)
    return f"{summary.frames} of {sizes}"


def estimator_rows(estimator: RadiiEstimator, summary: MovieSummary) -> dict[str, str]:
    """Radii and noise, where a user has chosen the estimator."""
    radii = [
        ", ".join([yx_text(y, x, "px"), *(f"{count:g} frames" for count in frames)])
        for *frames, y, x in estimator.radii.tolist()
    ]
    return {
        "radius": "; ".join(radii),
        **clip_rows(estimator),
        "noise factor": "; ".join(f"{f:.4f}" for f in summary.noise_corrections),
    }


def run_rows(summary: MovieSummary) -> dict[str, str]:
    """The time that a run took, and what was exceptional about it."""
    rows = {"time": f"{summary.seconds:.2f} s, {summary.megapixels_per_second:.1f} Mpx/s"}
    if summary.resumed_frames:
        rows["resumed"] = f"{summary.resumed_frames} frames had been done before"
    if summary.clipped_frames:
        rows["clipped"] = f"to uint16, in {summary.clipped_frames} frames"
    if summary.nonfinite_frames:
        rows["not finite"] = f"NaN or infinity in {summary.nonfinite_frames} frames"
    return rows


def light_rows(summary: MovieSummary) -> dict[str, str]:
    """How the light goes on and off, or fades."""
    texts = [_light_text(light) for light in summary.lights if light is not None]
    return {"light": "; ".join(dict.fromkeys(texts))} if texts else {}


def _light_text(light: Float[np.ndarray, " frames"]) -> str:
    seen = light[np.isfinite(light)].astype(float)
    tenth = max(1, len(seen) // 10)
    mean, first, last = seen.mean(), seen[:tenth].mean(), seen[-tenth:].mean()
    if len(seen) < 2 or not (mean > 0 and first > 0):
        return "not measured"
    # Of independent values, a difference has twice the variance.
    flicker = np.diff(seen).std() / np.sqrt(2) / mean
    return f"flickers by {flicker:.1%}, ends at {last / first:.0%} of its beginning"


def channel_panels(
    channels: Sequence[Channel],
    sinks: Sequence[Path],
    quantity: Quantity,
    pedestal: float,
    offsets: Float[np.ndarray, " channels"],
    gains: Float[np.ndarray, " channels"] | None,
    summary: MovieSummary,
) -> list[ChannelPanels]:
    """The frame in the middle of each channel, and what was written of it."""
    panels = []
    for number, channel in enumerate(channels):
        is_alone = len(sinks) == len(channels)
        middle = len(channel) // 2
        with open_movie(sinks[number if is_alone else 0]) as movie:
            written = movie.channels[0 if is_alone else number][middle]
        frame = channel[middle].astype(np.float32) - np.float32(offsets[number])
        signal, bkgd = written.astype(np.float32) - np.float32(pedestal), None
        if quantity == "background":
            bkgd, signal = signal, frame - signal
        elif quantity == "residual":
            bkgd = frame - signal
        is_snr = quantity == "snr"
        if bkgd is not None and gains is not None:
            factor = summary.noise_corrections[number]
            ratio = snr(signal, bkgd, noise_correction=factor, gain=gains[number])
            is_snr, signal = True, np.asarray(ratio)
        panels.append(
            ChannelPanels(
                frame_number=channel.frames[middle],
                frame=frame,
                bkgd=bkgd,
                signal=signal,
                signal_name="SNR" if is_snr else "frame - background (ADU)",
                light=summary.lights[number],
                frame_numbers=channel.frames,
            )
        )
    return panels
