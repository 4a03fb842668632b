"""The window of napari in which a movie is calibrated, looked at and written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from magicgui.types import FileDialogMode
from magicgui.widgets import (
    ComboBox,
    Container,
    FileEdit,
    FloatSlider,
    FloatSpinBox,
    ProgressBar,
    PushButton,
)
from napari.utils.notifications import show_error, show_info
from qtpy.QtCore import QPointF, QRectF, Qt, QTimer
from qtpy.QtGui import QPainter, QPaintEvent, QPalette, QPen, QPolygonF
from qtpy.QtWidgets import QLabel, QVBoxLayout, QWidget

from .._batch.compute import Quantity
from .._estimators.camera import Camera
from .._movies.movie import MovieError
from .._workers import Job
from .reader import channel_of, contrast_limits
from .session import Calibrated, Session, Settings


# How often the window looks whether something is done.
_TICK_MS = 30
_MADE_HERE = "jaxbkgd"
_COLORMAPS = {"background": "viridis", "residual": "gray", "snr": "magma"}
_WIDTH_PIX = 400
_CAMERA_FILES = "Camera (*.json *.npz *.tif)"
_MOVIE_FILES = "Movie (*.tif *.tiff *.zarr *.raw)"
# The height of the plot of the light, and the part of it for the text.
_HEIGHT_PIX, _MARGIN_PIX = 90, 18
# The least that is shown below and above the mean, so that steady light looks steady.
_LEAST_SHOWN = 0.02


class BackgroundWidget(Container):
    """Calibrates a layer, and shows its background, residual and SNR as sliders move."""

    def __init__(self, napari_viewer: Any) -> None:
        self._viewer = napari_viewer
        self.session: Session | None = None
        # Long work, what to do with its result, and the work on the frame shown.
        self._job: tuple[Job, Callable[[Any], None]] | None = None
        self._live: Job | None = None
        self._is_live, self._wanted, self._shown = False, None, None
        self._movie = ComboBox(name="movie", label="movie", choices=self._movies)
        self._camera = {
            "offset": FloatSpinBox(name="offset", label="offset (ADU)", max=1e5, step=1),
            "gain": FloatSpinBox(name="gain", label="gain (e-/ADU)", max=1e3, step=0.01),
            "read noise": FloatSpinBox(label="read noise (e-)", max=1e3, step=0.1),
        }
        self._camera["gain"].tooltip = "0 if it is not known; the SNR needs it"
        self._camera_file = FileEdit(label="or its file", filter=_CAMERA_FILES)
        self._calibrate = PushButton(name="calibrate", text="Calibrate")
        self._sliders = {
            "radius_y_pix": FloatSlider(label="radius y (px)", min=0.5, max=60, step=0.01),
            "radius_x_pix": FloatSlider(label="radius x (px)", min=0.5, max=60, step=0.01),
            "radius_frames": FloatSlider(label="radius (frames)", max=120, step=0.01),
            "clip": FloatSlider(label="clip (deviations)", max=10, step=0.01),
        }
        for name, slider in self._sliders.items():
            slider.name = name
        self._sliders["radius_frames"].tooltip = "0 estimates each frame by itself"
        self._sliders["clip"].tooltip = "molecules above it are left out; 0 leaves none out"
        self._show = PushButton(name="show", text="Show what the sliders do")
        self._quantity = ComboBox(label="result", choices=[*_COLORMAPS])
        self._add = PushButton(name="add", text="Add as a layer of all frames")
        self._path = FileEdit(
            label="file", mode=FileDialogMode.OPTIONAL_FILE, filter=_MOVIE_FILES
        )
        self._save = PushButton(name="save", text="Save the movie")
        self._bar = ProgressBar(min=0, max=1)
        self._cancel = PushButton(name="cancel", text="Cancel")
        self._status, self._findings, self._light = QLabel(), QLabel(), LightPlot()
        camera = [*self._camera.values(), self._camera_file]
        work = [self._calibrate, *self._sliders.values(), self._show]
        result = [self._quantity, self._add, self._path, self._save]
        super().__init__(widgets=[self._movie, *camera, *work, *result])
        # What comes later has all labels made as wide as each other.
        self.extend([self._bar, self._cancel])
        self.native.setMaximumWidth(_WIDTH_PIX)
        layout: QVBoxLayout = self.native.layout()
        for below in (self._status, self._findings, self._light):
            layout.addWidget(below)
        for label in (self._status, self._findings):
            label.setWordWrap(True)
        layout.addStretch()
        self._connect()
        self._set_sliders(Settings())
        self._choose()
        self._timer = QTimer(self.native)
        self._timer.timeout.connect(self._tick)
        self._timer.start(_TICK_MS)

    def _connect(self) -> None:
        events = self._viewer.layers.events
        for event in (events.inserted, events.removed):
            event.connect(lambda _: self._movie.reset_choices())
        self._movie.changed.connect(self._choose)
        for widget in (*self._camera.values(), self._camera_file):
            widget.changed.connect(self._set_camera)
        for slider in self._sliders.values():
            slider.changed.connect(self._set_settings)
        self._quantity.changed.connect(self._set_path)
        for button, act in (
            (self._calibrate, self._begin_calibration),
            (self._show, self._begin_live),
            (self._add, self._begin_adding),
            (self._save, self._begin_saving),
            (self._cancel, self._end_job),
        ):
            button.changed.connect(act)
        self.native.destroyed.connect(self._end_job)

    def _movies(self, _: Any) -> list[Any]:
        """The layers that are movies of frames, and not made here."""
        return [
            layer
            for layer in self._viewer.layers
            if layer.ndim == 3 and _MADE_HERE not in layer.metadata
        ]

    def _choose(self, *_: Any) -> None:
        """A session for the layer that is chosen now."""
        # What is done for the layer that was chosen before is not waited for.
        self._end_job()
        self._job = self._live = None
        self.session, layer = None, self._movie.value
        self._light.show_light(None)
        self._findings.setText("")
        if layer is not None:
            try:
                self.session = Session(channel_of(layer.data))
            except MovieError as error:
                show_error(str(error))
        if self.session is not None:
            self._set_camera()
            self._set_settings()
            self._set_path()
        self._update_buttons()

    def _set_camera(self, *_: Any) -> None:
        if self.session is None:
            return
        offset, gain, read_noise = (widget.value for widget in self._camera.values())
        file = Path(str(self._camera_file.value))
        is_file = file.is_file()
        for widget in self._camera.values():
            widget.enabled = not is_file
        try:
            camera = (
                Camera.load(file) if is_file else Camera(offset, gain or None, read_noise)
            )
            camera.check_shape(*self.session.channel.shape[1:])
            self.session.camera = camera
        except (ValueError, OSError) as error:
            show_error(str(error))

    def _set_settings(self, *_: Any) -> None:
        if self.session is not None:
            values = {name: slider.value for name, slider in self._sliders.items()}
            self.session.settings = Settings(**{n: round(v, 2) for n, v in values.items()})

    def _set_sliders(self, settings: Settings) -> None:
        for slider, value in zip(self._sliders.values(), settings, strict=True):
            with slider.changed.blocked():
                slider.value = min(max(value, slider.min), slider.max)

    def _set_path(self, *_: Any) -> None:
        path = self.session and self.session.path_beside(self._quantity.value)
        if path:
            self._path.value = path

    def _start(
        self, text: str, work: Callable[[], Any], then: Callable[[Any], None]
    ) -> None:
        self._job = Job(work), then
        self._status.setText(text)
        self._update_buttons()

    def _begin_calibration(self, *_: Any) -> None:
        self._start("calibrating", self.session.calibrate, self._adopt)

    def _adopt(self, calibrated: Calibrated) -> None:
        self.session.adopt(calibrated)
        self._set_sliders(self.session.settings)
        self._light.show_light(calibrated.light)
        history = calibrated.history
        doubts = [f"doubt: {doubt}" for doubt in history.doubts]
        lines = [f"{name}: {text}" for name, text in history.rows().items()]
        self._findings.setText("\n".join([*doubts, *lines]))
        self._status.setText("calibrated")
        self._begin_live()

    def _begin_live(self, *_: Any) -> None:
        self._is_live, self._shown = True, None

    def _begin_adding(self, *_: Any) -> None:
        session, quantity = self.session, self._quantity.value
        lazy, frame = session.lazy(quantity), self._frame()
        self._start(
            f"estimating {quantity} of all frames around this one",
            lambda: (lazy, lazy[frame]),
            lambda found: self._put_found(quantity, *found),
        )

    def _begin_saving(self, *_: Any) -> None:
        session, quantity = self.session, self._quantity.value
        path = Path(str(self._path.value or ""))
        self._start(
            f"writing {path.name}",
            lambda: session.save(path, quantity),
            lambda summary: self._say(f"wrote {path}: {summary.frames} frames"),
        )

    def _say(self, text: str) -> None:
        self._status.setText(text)
        show_info(text)

    def _end_job(self, *_: Any) -> None:
        if self._job is not None:
            self._job[0].cancel()

    def _update_buttons(self) -> None:
        is_idle = self.session is not None and self._job is None
        for button in (self._calibrate, self._add, self._save):
            button.enabled = is_idle
        self._show.enabled = self.session is not None
        self._cancel.enabled = self._job is not None
        self._bar.visible = self._job is not None

    def _tick(self) -> None:
        """Shows how far work is, and what is done."""
        if self._job is not None:
            job, then = self._job
            self._bar.max, self._bar.value = max(1, job.total), job.done
            if job.text:
                self._status.setText(job.text)
            if job.is_done:
                self._job = None
                self._finish(job, then)
                self._update_buttons()
        self._tick_live()

    def _finish(self, job: Job, then: Callable[[Any], None]) -> None:
        try:
            then(job.result())
        except KeyboardInterrupt:
            self._status.setText("cancelled; all is as it was, and what is written is kept")
        except Exception as error:
            self._status.setText(str(error))
            show_error(str(error))

    def _frame(self) -> int:
        step = self._viewer.dims.current_step
        return min(step[-3] if len(step) > 2 else 0, len(self.session.channel) - 1)

    def _tick_live(self) -> None:
        """Estimates the frame anew where it, the sliders or the camera have changed."""
        session = self.session
        if session is None or not self._is_live:
            return
        if self._live is not None and self._live.is_done:
            live, self._live = self._live, None
            self._shown = self._wanted
            self._finish(live, self._put_live)
        wanted = session, self._frame(), session.settings, session.camera
        if self._live is None and wanted != self._shown:
            self._wanted, frame = wanted, wanted[1]
            self._live = Job(lambda: session.live_images(frame))

    def _put_found(self, quantity: Quantity, data: Any, image: np.ndarray) -> None:
        name = f"{quantity} of {self._movie.value.name}"
        self._put_layer(quantity, name, data, image)
        self._say(f"added {name}")

    def _put_live(self, images: dict[Quantity, np.ndarray]) -> None:
        for quantity, image in images.items():
            self._put_layer(quantity, f"{quantity} of this frame", image, image)

    def _put_layer(self, quantity: str, name: str, data: Any, image: np.ndarray) -> None:
        """Shows data in the layer of this name, or in a new one."""
        movie, layers = self._movie.value, self._viewer.layers
        scale, translate = movie.scale[-data.ndim :], movie.translate[-data.ndim :]
        if name in layers:
            layers[name].data = data
            layers[name].scale, layers[name].translate = scale, translate
            return
        self._viewer.add_image(
            data,
            name=name,
            scale=scale,
            translate=translate,
            colormap=_COLORMAPS[quantity],
            contrast_limits=contrast_limits(image),
            metadata={_MADE_HERE: quantity},
        )


class LightPlot(QWidget):
    """The light of frames that are spread over a movie, as a share of its mean: a line in
    the colours of the window."""

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
