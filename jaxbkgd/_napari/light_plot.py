"""The light of each frame as a line, in the colours of the window."""

import numpy as np
from jaxtyping import Float
from qtpy.QtCore import QPointF, QRectF, Qt
from qtpy.QtGui import QPainter, QPaintEvent, QPalette, QPen, QPolygonF
from qtpy.QtWidgets import QWidget


_HEIGHT_PIX, _MARGIN_PIX = 90, 18
# The least that is shown below and above the mean, so that steady light looks steady.
_LEAST_SHOWN = 0.02


class LightPlot(QWidget):
    """Draws the light of frames that are spread over a movie, as a share of its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.setMinimumHeight(_HEIGHT_PIX)
        self._light: Float[np.ndarray, " frames"] | None = None

    def show_light(self, light: Float[np.ndarray, " frames"] | None) -> None:
        self._light = light
        self.setVisible(light is not None)
        self.update()

    def paintEvent(self, a0: QPaintEvent | None) -> None:
        if self._light is None:
            return
        seen = np.asarray(self._light, float)
        seen = seen[np.isfinite(seen)]
        if seen.size < 2:
            return
        seen = seen / seen.mean()
        low, high = float(seen.min()), float(seen.max())
        text = f"light of the frames: {low:.3f} to {high:.3f} of its mean"
        low, high = min(low, 1 - _LEAST_SHOWN), max(high, 1 + _LEAST_SHOWN)
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        colour = self.palette().color(QPalette.ColorRole.WindowText)
        painter.setPen(QPen(colour, 1))
        area = QRectF(self.rect()).adjusted(4, _MARGIN_PIX, -4, -4)
        painter.drawText(QRectF(self.rect()), Qt.AlignmentFlag.AlignTop, text)
        painter.drawRect(area)
        x = np.linspace(area.left(), area.right(), seen.size)
        y = area.bottom() - (seen - low) / (high - low) * area.height()
        points = [QPointF(*point) for point in zip(x.tolist(), y.tolist(), strict=True)]
        painter.drawPolyline(QPolygonF(points))
        painter.end()
