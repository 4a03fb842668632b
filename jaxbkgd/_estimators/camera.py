"""The camera: what a number of ADU says about electrons, and how noisy it is."""

import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from .channels import is_sequence
from .checks import is_traced, real_array
from .photon_transfer import measure_camera


# Squared electrons, below which no weight depends on the read noise.
_LEAST_VARIANCE = 1e-3

# In files, and in the order of pages of a TIFF.
_NAMES = ("offset_adu", "gain_electrons_per_adu", "read_noise_electrons")

# A number, or a map with one number for each pixel.
PerPixel = Real[Array | np.ndarray, "height width"] | Real[Array, ""] | float


class Camera(eqx.Module):
    """A camera, whose pixels may differ, as in an sCMOS camera.

    A pixel that collects `electrons` reads `offset_adu + electrons /
    gain_electrons_per_adu` on average, with the variance `electrons +
    read_noise_electrons**2` in squared electrons (Huang et al., Nat. Methods 10, 653,
    2013). For an EMCCD, whose amplification doubles the variance, give half of the gain:
    the electrons per ADU over the EM gain, over two.

    **Attributes:** each a number, or a map `(height, width)`.

    - `offset_adu`: the mean of a pixel in the dark, in ADU.
    - `gain_electrons_per_adu`: photoelectrons per ADU, or `None` if it is not known.
    - `read_noise_electrons`: the standard deviation in the dark, in electrons.

    ```python
    >>> import jaxbkgd
    >>> camera = jaxbkgd.Camera(offset_adu=100.0, gain_electrons_per_adu=0.5)
    >>> float(camera.electrons(120.0))
    10.0

    ```
    """

    offset_adu: PerPixel
    gain_electrons_per_adu: PerPixel | None
    read_noise_electrons: PerPixel

    def __init__(
        self,
        offset_adu: Any = 0.0,
        gain_electrons_per_adu: Any = None,
        read_noise_electrons: Any = 0.0,
    ):
        """**Raises:** `TypeError` or `ValueError` for values that are neither numbers nor
        maps, for maps of different shapes, and for a read noise without a gain. The offset
        must be finite, the gain positive and finite, and the read noise not negative.
        """
        offset = {"minimum": -math.inf, "unit": "ADU"}
        self.offset_adu = _number_or_map("offset_adu", offset_adu, **offset)
        gain = gain_electrons_per_adu
        if gain is not None:
            unit = "electrons per ADU"
            gain = _number_or_map("gain_electrons_per_adu", gain, unit=unit)
        self.gain_electrons_per_adu = gain
        noise = {"includes_minimum": True, "unit": "electrons"}
        read_noise = _number_or_map("read_noise_electrons", read_noise_electrons, **noise)
        self.read_noise_electrons = read_noise
        shapes = {np.shape(value) for value in jax.tree.leaves(self)} - {()}
        if len(shapes) > 1:
            texts = " and ".join(map(str, sorted(shapes)))
            raise ValueError(f"Maps have the shapes {texts}; give maps of one camera.")
        if not self.is_gain_known and not _is_zero(self.read_noise_electrons):
            raise ValueError(
                "A read noise in electrons needs gain_electrons_per_adu; give the gain."
            )

    @classmethod
    def from_dark_and_bright(cls, dark: Any, bright: Any) -> "Camera":
        """The maps of a camera, from dark frames and a list of frames of steady light, one
        for each brightness. [`jaxbkgd.measure_camera`][] also gives their errors."""
        return cls(*measure_camera(dark, bright)[:3])

    @property
    def shape(self) -> tuple[int, ...]:
        """`(height, width)` of the maps, or `()` of numbers."""
        return max(map(np.shape, jax.tree.leaves(self)), key=len)

    @property
    def is_gain_known(self) -> bool:
        return self.gain_electrons_per_adu is not None

    @property
    def is_even(self) -> bool:
        """Whether pixels differ only in their offset. Even light then gives even frames of
        even noise, once the offset is subtracted."""
        values = self.gain_electrons_per_adu, self.read_noise_electrons
        return not any(np.ndim(value) for value in jax.tree.leaves(values))

    def above_offset(self, frames: Any) -> Any:
        """Frames `(..., height, width)` in ADU minus the offset. `ValueError` for maps that
        do not fit them."""
        self._check_frames(frames)
        return frames if _is_zero(self.offset_adu) else frames - _float32(self.offset_adu)

    def electrons(self, frames: Any) -> Any:
        """Frames `(..., height, width)` in ADU as photoelectrons. `ValueError` if the gain
        is not known."""
        gain = _float32(self.known_gain("Electrons"))
        return self.above_offset(frames) * gain

    def even_light(self, frames: Any) -> Any:
        """Frames `(..., height, width)` in ADU in the unit of estimation: above the offset,
        and in electrons if pixels differ, since even light is then even only in electrons.
        """
        return self.above_offset(frames) if self.is_even else self.electrons(frames)

    def in_adu(self, images: Any) -> Any:
        """Images `(..., height, width)` in the unit of `even_light` in ADU above the
        offset."""
        return images if self.is_even else images / _float32(self.known_gain("ADU"))

    def known_gain(self, purpose: str) -> PerPixel:
        """The gain; `ValueError` if it is not known, naming what needs it."""
        if self.gain_electrons_per_adu is None:
            raise ValueError(
                f"{purpose} needs the gain of the camera; give "
                "Camera(gain_electrons_per_adu=...)."
            )
        return self.gain_electrons_per_adu

    @property
    def of_electrons(self) -> "Camera":
        """The camera of frames in electrons, with the same read noise."""
        return Camera(0.0, 1.0, self.read_noise_electrons)

    def weights(
        self, electrons: Real[Array, "*frames height width"], weights: Any = None
    ) -> Any:
        """Weights for estimators that take them: how much each pixel counts, by its read
        noise and the photon noise of its frame. `weights` are multiplied by them. A camera
        whose pixels have the same read noise returns `weights` as they are."""
        if np.ndim(self.read_noise_electrons) == 0:
            return weights
        self._check_frames(electrons)
        given = 1.0 if weights is None else weights
        counts = jnp.isfinite(electrons) * jnp.asarray(given, electrons.dtype)
        light = jnp.sum(
            jnp.where(counts > 0, counts * electrons, 0), (-2, -1), keepdims=True
        )
        total = jnp.sum(counts, (-2, -1), keepdims=True)
        light = jnp.maximum(light / jnp.maximum(total, 1), 0)
        variance = _float32(self.read_noise_electrons) ** 2 + _LEAST_VARIANCE
        return given * (light + jnp.min(variance)) / (light + variance)

    def cropped(self, y: slice, x: slice) -> "Camera":
        """The camera of a part of the frame: these lines and columns."""
        return jax.tree.map(lambda value: value[y, x] if np.ndim(value) else value, self)

    def check_shape(self, height: int, width: int) -> None:
        """`ValueError` for maps that do not fit frames of this size."""
        if self.shape not in ((), (height, width)):
            raise ValueError(
                f"The camera's maps have the shape {self.shape}, but frames are {height} x "
                f"{width} px; give maps of the whole frame, from the same part of the chip."
            )

    def _check_frames(self, frames: Any) -> None:
        # A number stands for all pixels.
        if np.ndim(frames) > 1:
            self.check_shape(*np.shape(frames)[-2:])

    def save(self, path: str | Path) -> None:
        """Writes a file that `load` reads: `.json` for numbers, `.npz`, or `.tif` with
        three pages: offset, gain and read noise. `ValueError` for another suffix, for maps
        as JSON, and for a TIFF of a camera whose gain is not known."""
        path = Path(path)
        values = {
            "offset_adu": self.offset_adu,
            "gain_electrons_per_adu": self.gain_electrons_per_adu,
            "read_noise_electrons": self.read_noise_electrons,
        }
        match path.suffix.lower():
            case ".json" if not self.shape:
                path.write_text(json.dumps(values, indent=2), "utf-8")
            case ".npz":
                # To a path that does not end in small letters, NumPy adds a suffix.
                with path.open("wb") as file:
                    np.savez(file, **{n: v for n, v in values.items() if v is not None})
            case ".tif" | ".tiff" if self.is_gain_known:
                import tifffile

                maps = [np.broadcast_to(v, self.shape or (1, 1)) for v in values.values()]
                pages = np.stack(maps).astype(np.float32)
                about = {"photometric": "minisblack", "metadata": {"Labels": [*_NAMES]}}
                tifffile.imwrite(path, pages, **about)
            case _:
                raise ValueError(
                    f"{path}: a camera is written as .npz; as .json if it has numbers "
                    "alone, and as .tif if its gain is known; give such a name."
                )

    @classmethod
    def load(cls, path: str | Path) -> "Camera":
        """Reads what `save` has written; a TIFF of three pages: offset in ADU, gain in
        electrons per ADU, and read noise in electrons; or a `.yaml` of Picasso with the
        baseline and the sensitivity of one camera and mode. `ValueError` for a file that
        holds no camera, `OSError` for one that cannot be read."""
        path = Path(path)
        try:
            values = _read_values(path)
            if not isinstance(values, dict) or not values or values.keys() - set(_NAMES):
                raise ValueError(f"is no camera; one has {', '.join(_NAMES)}.")
            return cls(**values)
        except (TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: {error}") from error


def camera_of_each(camera: Any, channels: Any) -> Any:
    """A camera for each channel, in their structure, from one for all or one for each, or
    from `None`. `TypeError` for what is no camera, `ValueError` for another number."""
    if camera is None:
        camera = Camera()
    is_list = is_sequence(camera)
    cameras = list(camera) if is_list else [camera]
    for entry in cameras:
        if not isinstance(entry, Camera):
            rule = "must be a jaxbkgd.Camera, or one a channel, as Camera(100.0, 0.46)"
            raise TypeError(f"camera {rule}, but is {entry!r}.")
    if not is_sequence(channels):
        if is_list:
            raise ValueError("There is one stack of frames; give one camera, in no list.")
        return camera
    if not is_list:
        cameras *= len(channels)
    if len(cameras) != len(channels):
        raise ValueError(
            f"There are {len(channels)} channels, but {len(cameras)} cameras; give one for "
            "all, or one for each."
        )
    return tuple(cameras) if isinstance(channels, tuple) else cameras


def _number_or_map(name: str, value: Any, **limits: Any) -> Any:
    if is_traced(value):
        return value
    numbers = real_array(name, value, **limits)
    if numbers.ndim not in (0, 2):
        raise ValueError(
            f"{name} must be a number or a map (height, width), but has the shape "
            f"{numbers.shape}."
        )
    return numbers.astype(np.float32) if numbers.ndim else float(numbers)


def _float32(value: Any) -> Any:
    """A number that leaves frames in their dtype."""
    return np.float32(value) if isinstance(value, float) else value


def _is_zero(value: Any) -> bool:
    return isinstance(value, float) and value == 0


def _read_values(path: Path) -> Any:
    """What a file of a camera holds by name, by its suffix; `ValueError` for another."""
    match path.suffix.lower():
        case ".json":
            return json.loads(path.read_text("utf-8"))
        case ".npz":
            with path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    raise ValueError("is no .npz, or is cut short; write it again.")
                file.seek(0)
                with np.load(file) as arrays:
                    return dict(arrays)
        case ".tif" | ".tiff":
            import tifffile

            # Programs write the three as one series of pages, or as one each.
            with tifffile.TiffFile(path) as tiff:
                stacks = [series.asarray() for series in tiff.series]
            pages = [p for stack in stacks for p in (stack if stack.ndim > 2 else [stack])]
            if len(pages) != 3:
                rule = "give three: offset, gain and read noise"
                raise ValueError(f"has {len(pages)} pages; {rule}.")
            # A map of one pixel is how `save` writes a number.
            maps = [page.item() if page.size == 1 else page for page in pages]
            return dict(zip(_NAMES, maps, strict=True))
        case ".yaml" | ".yml":
            import yaml

            try:
                settings = list(yaml.safe_load_all(path.read_text("utf-8")))
            except (yaml.YAMLError, RecursionError) as error:
                raise ValueError(f"is no YAML ({' '.join(str(error).split())}).") from error
            modes = dict(_picasso_modes(settings))
            if len(modes) == 1:
                return dict(zip(_NAMES, *modes.values(), strict=False))
            texts = [f"{name}: {gain:g}" for name, (_, gain) in [*modes.items()][:20]]
            what = f"holds the settings of {len(modes)} cameras or modes of Picasso"
            raise ValueError(f"{what} ({'; '.join(texts)}); give offset and gain of one.")
    raise ValueError("a camera is a .json, .npz, .tif, or a .yaml of Picasso; give one.")


def _picasso_modes(settings: Any, name: str = "") -> Iterator[tuple[str, tuple]]:
    """The offset and the gain of each camera and readout mode in settings of Picasso, whose
    sensitivity is in electrons per ADU, before the EM gain."""
    if isinstance(settings, list):
        for inner in settings:
            yield from _picasso_modes(inner, name)
    elif isinstance(settings, dict) and {"Baseline", "Sensitivity"} <= settings.keys():
        em_gain = float(settings.get("Gain", 1))
        # The gain of an EMCCD is half, for its noise.
        share = em_gain * (2 if em_gain > 1 else 1)
        for mode, sensitivity in _numbers(settings["Sensitivity"], name):
            yield mode, (float(settings["Baseline"]), sensitivity / share)
    elif isinstance(settings, dict):
        for key, inner in settings.items():
            yield from _picasso_modes(inner, f"{name} {key}".strip())


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        entries = enumerate(value, 1) if isinstance(value, list) else value.items()
        for key, inner in entries:
            yield from _numbers(inner, f"{name} {key}".strip())
    else:
        yield name, float(value)
