"""What `jaxbkgd estimate` shows of its result: rows of text, and images for a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._batch.compute import Output
from .._batch.run import MovieSummary
from .._estimators.background import Background
from .._estimators.camera import Camera
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.movie import Channel
from .._movies.open import open_movie
from .figures import Panel
from .report import clip_rows, radii_text


def given_rows(
    estimator: RadiiEstimator, summary: MovieSummary, written: Sequence[str]
) -> dict[str, str]:
    """What was done, where a user has chosen the estimator."""
    rows = {"frames": written[0], "written": written[1], "radius": radii_text(estimator)}
    rows |= clip_rows(estimator)
    rows["noise factor"] = "; ".join(f"{f:.4f}" for f in summary.noise_corrections)
    rows["time"] = f"{summary.seconds:.2f} s, {summary.megapixels_per_second:.1f} Mpx/s"
    return rows | _exceptional_rows(summary)


def found_rows(
    estimator: RadiiEstimator,
    summary: MovieSummary,
    findings: Mapping[str, str],
    written: Sequence[str],
    names: str,
    seconds: float,
) -> dict[str, str]:
    """What was found and done in this time, in six lines; more only of what is
    exceptional."""
    rows = {"radius": radii_text(estimator)}
    if "error" in findings:
        rows["error"] = findings["error"]
        rows["molecules"] = f"{findings['molecules']}; they keep {findings['they keep']}"
    lights = [_light_text(light) for light in summary.lights if light is not None]
    texts = [" | ".join(lights if len(set(lights)) > 1 else lights[:1])] if lights else []
    if "not explained" in findings:
        texts.append(f"not explained: {findings['not explained']}")
    rows["light"] = "; ".join(texts) or "not measured"
    rows["believe it"] = findings["believe it"]
    rows |= _exceptional_rows(summary)
    rows["wrote"] = f"{written[0]}, {written[1]}, in {seconds:.0f} s: {names}"
    return rows


def written_texts(
    summary: MovieSummary,
    channels: Sequence[Channel],
    output: Output,
    cameras: Sequence[Camera],
) -> tuple[str, str]:
    """Of which frames there is a result, and what it is."""
    offsets = dict.fromkeys(float(np.median(c.offset_adu)) for c in cameras)
    adu = "; ".join(f"{offset:g}" for offset in offsets if offset)
    rest = f", above the offset of {adu} ADU" if adu else ", the camera's offset included"
    rest = "" if output.quantity == "residual" else rest
    rest += f", with a pedestal of {output.pedestal:g}" if output.pedestal else ""
    sizes = "; ".join(f"{c.shape[1]} x {c.shape[2]} px" for c in channels)
    return f"{summary.frames} of {sizes}", f"{output.quantity}, {output.dtype}{rest}"


def _light_text(light: Float[np.ndarray, "*rank frames"]) -> str:
    if light.ndim > 1:
        first = _light_text(light[0])
        return f"{len(light)} patterns, mixed differently in each frame; the first: {first}"
    seen = light[np.isfinite(light)].astype(float)
    tenth = -(-len(seen) // 10)
    first, last = seen[:tenth].mean(), seen[-tenth:].mean()
    if len(seen) < 2 or first <= 0:
        return "not measured"
    # The difference of two independent values has twice the variance of one.
    flicker = np.diff(seen).std() / np.sqrt(2) / seen.mean()
    if flicker < 0.005 and abs(last / first - 1) < 0.005:
        return "steady"
    return f"flickers by {flicker:.1%}, ends at {last / first:.0%} of its beginning"


def _exceptional_rows(summary: MovieSummary) -> dict[str, str]:
    rows = {}
    if summary.resumed_frames:
        rows["resumed"] = f"{summary.resumed_frames} frames were already done"
    if summary.clipped_frames:
        rows["clipped"] = f"to uint16, in {summary.clipped_frames} frames"
    if any(summary.hot_pixels):
        counts = "; ".join(map(str, summary.hot_pixels))
        rows["left out"] = f"{counts} pixels that are hot or dead in all frames"
    if summary.nonfinite_frames:
        rows["not finite"] = f"NaN or infinity in {summary.nonfinite_frames} frames"
    return rows


def channel_panels(
    channels: Sequence[Channel],
    sinks: Sequence[Path],
    output: Output,
    cameras: Sequence[Camera],
    summary: MovieSummary,
) -> list[list[Panel]]:
    """The frame in the middle of each channel, and what was written of it."""
    panels = []
    for number, (channel, camera) in enumerate(zip(channels, cameras, strict=True)):
        middle = len(channel) // 2
        # A sink for each channel, or one for all.
        path, index = (sinks[number], 0) if len(sinks) > 1 else (sinks[0], number)
        with open_movie(path) as movie:
            written = movie.channels[index][middle].astype(np.float32)
        written -= np.float32(output.pedestal)
        frame = camera.above_offset(channel[middle].astype(np.float32))
        shown: list[Panel] = [(f"frame {channel.frames[middle]} (ADU)", frame, "magma")]
        panels.append(shown)
        if output.quantity == "snr":
            shown.append(("SNR", written, "magma"))
            continue
        bkgd = written if output.quantity == "background" else frame - written
        shown.append(("background (ADU)", bkgd, "viridis"))
        if camera.is_gain_known:
            background = Background(jnp.asarray(bkgd), summary.noise_corrections[number])
            ratio = np.asarray(background.snr(frame, camera))
            shown.append(("SNR", ratio, "magma"))
        else:
            shown.append(("frame - background (ADU)", frame - bkgd, "magma"))
    return panels
