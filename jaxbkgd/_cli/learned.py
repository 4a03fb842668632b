"""What `jaxbkgd calibrate` shows of the radii that were learned: a table and a figure."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .._calibration import calibrate as calibration
from .._calibration.calibrate import CalibrationHistory
from .._calibration.objectives import FramePairLoss
from .._estimators.local_mean import LocalMean
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Channel
from .._workers import progress_bar
from .figures import CalibratedChannel
from .options import USUAL_RADIUS
from .report import clip_rows, print_table, printable


_USUAL_RADIUS_PIX = float(USUAL_RADIUS)
# A frame is drawn with at most so many pixels of the frames around it.
_FIGURE_PIXELS = 2**25


def channel_name(channel: Channel) -> str:
    """The name of its file, and its number where the file holds several."""
    movie = channel.movie
    number = f", channel {channel.index + 1}" if movie.shape[1] > 1 else ""
    return printable(Path(movie.name).name) + number


def _with_radii_pix(
    module: SpatialMean | LocalMean,
    number: int,
    radii_pix: tuple[float, float],
    bound: float | None,
) -> SpatialMean | LocalMean:
    """The module for the channel of this number alone, with other radii in space."""
    if isinstance(module, SpatialMean):
        return SpatialMean(radii_pix, max_radius_pix=bound)
    return LocalMean(
        radii_pix,
        float(module.radius_frames[number]),
        clip=module.clip,
        max_radius_pix=bound,
        max_radius_frames=module.max_radius_frames,
    )


def channel_losses(
    module: SpatialMean | LocalMean,
    objective: FramePairLoss,
    channels: Sequence[Channel],
    grid_pix: np.ndarray,
) -> np.ndarray:
    """The loss of each channel at its radii, at the usual radius, and over the grid."""
    others = [(radius, radius) for radius in (_USUAL_RADIUS_PIX, *grid_pix.tolist())]
    bound = max(module.max_radius_pix, 2 * _USUAL_RADIUS_PIX)
    losses = []
    with progress_bar(len(channels)) as report:
        for number, channel in enumerate(channels):
            report(number, f"channel {number + 1}: drawing the loss")
            y, x = module.radii_pix[number].tolist()
            pairs = [(y, x), *others]
            estimators = [_with_radii_pix(module, number, pair, bound) for pair in pairs]
            losses.append(calibration.losses_at(estimators, [channel], objective))
    return np.stack(losses)


def drawn_channel(
    number: int,
    module: SpatialMean | LocalMean,
    history: CalibrationHistory,
    channel: Channel,
    grid_pix: np.ndarray,
    grid_losses: np.ndarray,
) -> CalibratedChannel:
    middle = len(channel) // 2
    y, x = module.radii_pix[number].tolist()
    estimators = [
        _with_radii_pix(module, number, (share * y, share * x), None).for_inference()
        for share in (0.5, 1, 2)
    ]
    # Of frames that do not fit in memory, fewer make no difference to the eye.
    most = _FIGURE_PIXELS // (2 * math.prod(channel.shape[1:]))
    reach = min(estimators[0].halo_frames, most)
    first = max(0, middle - reach)
    frames = channel[first : middle + reach + 1]
    bkgds = [estimator(frames).bkgds[middle - first] for estimator in estimators]
    return CalibratedChannel(
        f"Channel {number + 1}: {channel_name(channel)}, frame {middle}",
        radii_pix=np.array([y, x]),
        # The figure shows no radius in time.
        radii_std_pix=history.radii_std_pix[number, -2:],
        path_pix=history.radii_pix[:, number, -2:],
        grid_pix=grid_pix,
        grid_losses=grid_losses,
        frame=frames[middle - first],
        bkgds=np.stack(bkgds),
    )


def print_calibration(
    names: Sequence[str],
    module: SpatialMean | LocalMean,
    history: CalibrationHistory,
    losses: np.ndarray,
) -> None:
    units = {"radius in y": "px", "radius in x": "px"}
    if isinstance(module, LocalMean):
        units = {"radius in time": "frames", **units}
    columns = []
    for number, name in enumerate(names):
        learned, usual = losses[number, :2].tolist()
        radii = zip(
            units.items(),
            calibration.radii_of(module)[number].tolist(),
            history.radii_std_pix[number].tolist(),
            history.is_at_bound[number].tolist(),
            strict=True,
        )
        change = 100 * (np.sqrt(learned / usual) - 1) if min(learned, usual) > 0 else np.nan
        columns.append(
            {"movie": name}
            | {
                axis: _radius_text(radius, std, is_at_bound, unit)
                for (axis, unit), radius, std, is_at_bound in radii
            }
            | clip_rows(module)
            | {
                "RMS error, learned": _error_text(learned),
                f"RMS error at r = {USUAL_RADIUS}": _error_text(usual),
                "  change": f"{change:+.0f} %" if np.isfinite(change) else "",
            }
        )
    print_table("Radii learned from the movie itself", columns)
    lag = history.objective.lag
    print(f"lag        {lag} frame{'s' if lag > 1 else ''}")
    print(f"converged  {'yes' if history.is_converged else 'no'}: {history.stop_reason}")


def _radius_text(radius: float, std: float, is_at_bound: bool, unit: str) -> str:
    if is_at_bound:
        return f"{radius:.2f} {unit}, at its bound"
    if not np.isfinite(std):
        return f"{radius:.2f} {unit}, uncertainty unknown"
    # The uncertainty is not below the last digit.
    return f"{radius:.2f} +- {max(std, 0.01):.2f} {unit}"


def _error_text(loss: float) -> str:
    """The root of the loss, a mean square error over the variance of the noise."""
    return f"{np.sqrt(loss):.3f} of the noise" if loss > 0 else "below what can be measured"
