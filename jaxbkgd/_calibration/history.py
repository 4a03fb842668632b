"""How a calibration went."""

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float

from .findings import Findings
from .objectives import FramePairLoss, Objective


class CalibrationHistory(eqx.Module):
    """How a calibration went, and what is to be believed of it.

    **Attributes:**

    - `losses`: the objective at each of the radii that were tried, in its unit. Without an
        estimator to begin with, it is the squared error, averaged over channels.
    - `radii`: these radii: y and x in pixels, for [`jaxbkgd.LocalMean`][] after time in
        frames; without radii, the learnable parameters in one row.
    - `radii_std`: the standard deviation of the learned radii, from the scatter of
        gradients between blocks of frames and the curvature of the loss. Infinite at the
        bound and where the loss does not curve upwards; NaN for frozen radii, from fewer
        than 8 blocks, and for more than 32 parameters.
    - `is_at_bound`: whether a radius is as large as its bound allows.
    - `is_converged`, `stop_reason`: whether the radii have settled, and why it ended.
    - `objective`, `lag`: what was minimised, and the lag of a [`jaxbkgd.FramePairLoss`][].
    - `findings`: of each channel, see [`jaxbkgd.Findings`][]; none where a movie is too
        short, or where the objective is another one than the default.
    - `doubts`: what is not to be believed, and what to do about it.
    """

    losses: Float[np.ndarray, " steps"]
    radii: Float[np.ndarray, "steps channels axes"]
    radii_std: Float[np.ndarray, "channels axes"]
    is_at_bound: Bool[np.ndarray, "channels axes"]
    is_converged: bool
    stop_reason: str
    objective: Objective
    findings: tuple[Findings, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def lag(self) -> int | None:
        return self.objective.lag if isinstance(self.objective, FramePairLoss) else None
