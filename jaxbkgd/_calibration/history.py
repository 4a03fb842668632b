"""How a calibration went."""

import math
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float

from .findings import Findings
from .objectives import FramePairLoss, Objective


class CalibrationHistory(eqx.Module):
    """The course of a calibration, and how far to believe its result.

    **Attributes:**

    - `losses`: the objective at each of the radii that were tried, in its unit. If no
        estimator was given, it is the squared error, averaged over channels.
    - `radii`: these radii, y and x in pixels, and before them time in frames for a
        [`jaxbkgd.LocalMean`][]. For an estimator without radii, the learnable parameters in
        one row.
    - `radii_std`: the standard deviation of the learned radii, from the scatter of
        gradients between blocks of frames and the curvature of the loss. Infinite at the
        bound and where the loss does not curve upwards; NaN for frozen radii, from fewer
        than 8 blocks, and for more than 32 parameters.
    - `is_at_bound`: whether a radius is as large as its bound allows.
    - `is_converged`, `stop_reason`: whether the radii have settled, and why the search
        ended.
    - `objective`, `lag`: the objective that was minimised, and the lag of a
        [`jaxbkgd.FramePairLoss`][].
    - `findings`: one [`jaxbkgd.Findings`][] for each channel; none if a movie is too short,
        or if the objective is not the default.
    - `doubts`: reasons not to believe the result, and what to do about them; none if all is
        well.
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

    def rows(self) -> dict[str, str]:
        """The findings in words, with a bar between channels."""
        texts: dict[str, list[str]] = {}
        for findings in self.findings:
            for name, text in findings.rows().items():
                texts.setdefault(name, []).append(text)
        rows = {name: " | ".join(of_channels) for name, of_channels in texts.items()}
        verdict = "yes" if self.findings else "not known"
        return rows | {"believe it": "not all, see above" if self.doubts else verdict}

    def about(self) -> dict[str, Any]:
        """The parts that are kept in a JSON text, which has no NaN."""

        def numbers(values: np.ndarray) -> list[Any]:
            rows = values.tolist()
            return [[x if math.isfinite(x) else None for x in row] for row in rows]

        return {
            "lag": self.lag,
            "radii_std": numbers(self.radii_std),
            "is_at_bound": self.is_at_bound.tolist(),
            "is_converged": self.is_converged,
            "stop_reason": self.stop_reason,
            "steps": len(self.losses),
            "doubts": list(self.doubts),
            "unit": self.findings[0].unit if self.findings else None,
            "error": [of.error for of in self.findings],
            "error_interval": [list(of.error_interval) for of in self.findings],
            "noise": [of.noise for of in self.findings],
            "molecule_light": [of.molecules.light for of in self.findings],
            "psf_sigma_pix": [of.molecules.psf_sigma_pix for of in self.findings],
            "kept": [of.kept for of in self.findings],
            "unexplained": [numbers(of.unexplained) for of in self.findings] or None,
        }
