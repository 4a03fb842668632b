"""What the window does with a channel, without the window."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from .._batch.compute import Quantity
from .._batch.lazy import lazy_estimate, LazyEstimate
from .._batch.names import number_paths, paths_beside
from .._batch.run import estimate_movie, MovieSummary
from .._calibration.calibrate import calibrate
from .._calibration.cameras import cameras_of
from .._calibration.history import CalibrationHistory
from .._calibration.hot_pixels import hot_pixels_of
from .._estimators.camera import Camera
from .._estimators.channels import as_frames
from .._estimators.local_mean import LocalMean
from .._estimators.radii_estimator import RadiiEstimator
from .._estimators.soft_clip import SoftClip
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Channel


# Of these, an image is estimated while a slider moves. They are spread over the radius in
# frames on either side, which is two standard deviations of the kernel.
_LIVE_FRAMES = 7
# Static bounds of radii: below one, no value is compiled anew.
_BOUNDS_PIX, _BOUND_FRAMES = (31.0, 101.0), 6.0
# The frames and the side in pixels of what the light is measured on.
_LIGHT_FRAMES, _LIGHT_PIX = 300, 128
# The kernel over which steady light is averaged, in frames, and the least that it may be.
_LIGHT_RADIUS, _LEAST_LIGHT_RADIUS = 10.0, 0.1


class Settings(NamedTuple):
    """What the sliders say. Without `radius_frames`, each frame is by itself; without
    `clip`, no molecules are left out."""

    radius_y_pix: float = 7.0
    radius_x_pix: float = 7.0
    radius_frames: float = 30.0
    clip: float = 3.0

    def estimator(self, skips_nan: bool = False, **bounds: Any) -> RadiiEstimator:
        """The mean over each frame, or over time as well, or without molecules."""
        pix = self.radius_y_pix, self.radius_x_pix
        if not (self.radius_frames or self.clip):
            return SpatialMean(pix, max_radius_pix=bounds.get("max_radius_pix"))
        clip = SoftClip(self.clip) if self.clip else None
        return LocalMean(pix, self.radius_frames, clip=clip, skips_nan=skips_nan, **bounds)

    @classmethod
    def of_estimator(cls, estimator: RadiiEstimator) -> "Settings":
        *frames, y, x = estimator.radii[0].tolist()
        is_mean = not isinstance(estimator, LocalMean)
        if is_mean or estimator.sees_one_frame:
            frames = [0.0]
        clip = 0.0 if is_mean or estimator.clip is None else float(estimator.clip.threshold)
        # As sliders show them.
        return cls(*(round(value, 2) for value in (y, x, *frames, clip)))


class Calibrated(NamedTuple):
    """What a calibration has found; `light` is of frames spread over the movie."""

    estimator: RadiiEstimator
    history: CalibrationHistory
    is_hot: Bool[np.ndarray, "height width"]
    light: Float[np.ndarray, " frames"]


class Session:
    """A channel, its camera, what the sliders say, and what a calibration has found.

    Its methods may run in other threads, and change nothing.
    """

    def __init__(self, channel: Channel, camera: Camera | None = None) -> None:
        self.channel = channel
        self.camera = camera or Camera()
        self.settings = Settings()
        self.calibrated: Calibrated | None = None

    def calibrate(self) -> Calibrated:
        """The best estimator of the channel, hot pixels and the light."""
        estimator, history = calibrate(self.channel, camera=self.camera, progress=False)
        is_hot = hot_pixels_of(self.channel)
        return Calibrated(estimator, history, is_hot, self._measured_light(estimator))

    def _measured_light(self, estimator: RadiiEstimator) -> Float[np.ndarray, " frames"]:
        """Of frames spread over the movie, in the middle of the field."""
        count, height, width = self.channel.shape
        numbers = range(0, count, -(-count // _LIGHT_FRAMES))
        y, x = (max(0, (size - _LIGHT_PIX) // 2) for size in (height, width))
        part = slice(y, y + _LIGHT_PIX), slice(x, x + _LIGHT_PIX)
        frames = self.channel[numbers.start : numbers.stop : numbers.step, *part]
        (camera,) = cameras_of(self.camera, [self.channel])
        light = camera.cropped(*part).even_light(as_frames(frames))
        found = Settings.of_estimator(estimator)
        radius = max(2.0, found.radius_frames / numbers.step)
        mean = found._replace(radius_frames=radius).estimator(self._skips_nan)
        return np.asarray(eqx.filter_jit(mean)(light).illumination)

    def adopt(self, calibrated: Calibrated) -> None:
        """Sets the sliders to what a calibration has found."""
        self.calibrated = calibrated
        self.settings = Settings.of_estimator(calibrated.estimator)

    @property
    def _skips_nan(self) -> bool:
        return self.channel.dtype.kind == "f"

    @property
    def _good_pixels(self) -> Bool[np.ndarray, "height width"]:
        if self.calibrated is None:
            return np.ones(self.channel.shape[1:], bool)
        return ~self.calibrated.is_hot

    def estimator(self) -> RadiiEstimator:
        """That of the sliders: that of the calibration, where they say the same."""
        found = self.calibrated
        if found and self.settings == Settings.of_estimator(found.estimator):
            return found.estimator
        return self.settings.estimator(self._skips_nan)

    def live_images(
        self, frame: int
    ) -> Mapping[Quantity, Shaped[np.ndarray, "height width"]]:
        """The images of a frame, of which the SNR needs the gain, from few frames around
        it, for one value of the sliders as for another by the same compiled program."""
        settings, length = self.settings, len(self.channel)
        radius = settings.radius_frames
        count = min(_LIVE_FRAMES if radius else 1, length)
        step = max(1, round(2 * radius / _LIVE_FRAMES))
        step = min(step, max(1, (length - 1) // count))
        # The frame is in the middle, or nearer to an end of the movie.
        after = (length - 1 - frame) // step
        place = max(min(count // 2, frame // step), count - 1 - after)
        first = frame - place * step
        frames = self.channel[first : first + (count - 1) * step + 1 : step]
        settings = settings._replace(radius_frames=min(radius / step, 0.99 * _BOUND_FRAMES))
        largest = max(settings.radius_y_pix, settings.radius_x_pix)
        bounds: dict[str, Any] = {
            "max_radius_pix": next(bound for bound in _BOUNDS_PIX if largest < bound),
            "max_radius_frames": _BOUND_FRAMES if radius else None,
            "block_frames": 1,
            "illumination_radius_frames": max(_LIGHT_RADIUS / step, _LEAST_LIGHT_RADIUS),
        }
        estimator = settings.estimator(self._skips_nan, **bounds)
        (camera,) = cameras_of(self.camera, [self.channel])
        images = _images(estimator, frames, self._good_pixels, camera, jnp.asarray(place))
        return {quantity: np.asarray(image) for quantity, image in images.items()}

    def lazy(self, quantity: Quantity) -> LazyEstimate:
        """The frames that `save` would write, estimated as they are read."""
        estimator = self.estimator()
        good = self._good_pixels
        # As in `save`: a mask of all pixels rounds differently from none.
        weights = None if good.all() or not estimator.takes_weights else good
        options: Any = {"quantity": quantity, "camera": self.camera, "weights": weights}
        return lazy_estimate(self.channel, estimator, **options)

    def save(self, path: Path, quantity: Quantity = "background") -> MovieSummary:
        """Estimates the movie and writes it; what is done when it is cancelled is kept, and
        the same call resumes it."""
        return estimate_movie(
            self.channel,
            self.estimator(),
            path,
            quantity=quantity,
            camera=self.camera,
            skips_hot_pixels=self.calibrated is not None,
            progress=False,
        )

    def path_beside(self, quantity: Quantity) -> Path | None:
        """The name of a result, where the movie has one; of several channels, each has a
        number."""
        movie = self.channel.movie
        path = Path(movie.name)
        if not path.exists():
            return None
        (beside,) = paths_beside(path, quantity)
        return number_paths(beside, len(movie.channels))[self.channel.index]


@eqx.filter_jit
def _images(
    estimator: RadiiEstimator,
    frames: Shaped[Any, "frames height width"],
    good_pixels: Bool[Any, "height width"],
    camera: Camera,
    place: Any,
) -> dict[Quantity, Float[Array, "height width"]]:
    """Background, residual and, where the gain is known, SNR of the frame at `place`."""
    light = camera.even_light(as_frames(frames))
    weights = None
    if estimator.takes_weights:
        weights = camera.weights(light, good_pixels)
    background = estimator(light, weights)
    images: dict[Quantity, Float[Array, "height width"]] = {
        "background": camera.in_adu(background.bkgds)[place],
        "residual": camera.in_adu(background.residuals(light))[place],
    }
    if camera.is_gain_known:
        snr = background.snr(light, camera if camera.is_even else camera.of_electrons)
        images["snr"] = snr[place]
    return images
