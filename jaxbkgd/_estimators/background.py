"""The background of channels, and the ratio of a signal to the noise expected on it."""

import functools as ft
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import auto_axes, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from .camera import camera_of_each
from .channels import as_frames, Channels, is_sequence, map_channels
from .checks import checked_number, is_traced
from .detection import threshold
from .matched import checked_psf_sigma, matched_snr
from .residual_noise import MatchedNoise


class Background(eqx.Module):
    """The background of each channel and the noise of its residuals, in the structure of
    the channels: an array, or a list or tuple of arrays.

    **Attributes:**

    - `bkgds`: the background, `(..., height, width)`, in the unit of the frames.
    - `noise_corrections`: the standard deviation of `frames - bkgd` over that of the
        frames, for noise that is independent from pixel to pixel.
    - `illumination`: the light of each frame, `(..., frames)`, if the estimator measures it
        ([`jaxbkgd.LocalMean`][]). The background is this times a part that changes slowly.
        With several patterns of light it is `(..., rank, frames)`, and the background a
        sum.
    - `noise`: the correlations in the noise of `frames - bkgds`, which `matched_snr` uses,
        or `None` if noise is independent from pixel to pixel.
    """

    bkgds: Any
    noise_corrections: Any
    illumination: Any = None
    noise: Any = None

    def residuals(self, channels: Channels) -> Any:
        """The frames less their background, in their unit and structure. `ValueError` for
        frames of another structure or shape than the backgrounds."""
        return map_channels(_residual, channels, self.bkgds)

    def snr(self, channels: Channels, camera: Any) -> Any:
        """The signal-to-noise ratio of each pixel, without unit, in the structure of
        `channels`; see [`jaxbkgd.snr`][].

        **Arguments:**

        - `channels`: the frames that were estimated, above the camera's offset, in ADU.
        - `camera`: a [`jaxbkgd.Camera`][] with its gain, one for all or one a channel.

        **Raises:** `TypeError` or `ValueError` for cameras that do not fit.
        """

        def ratio(signal, bkgd, noise_correction, camera):
            return snr(
                signal,
                bkgd,
                noise_correction=noise_correction,
                gain=camera.known_gain("An SNR"),
                read_noise_electrons=camera.read_noise_electrons,
            )

        signals, cameras = self.residuals(channels), self._cameras(camera, channels)
        return map_channels(ratio, signals, self.bkgds, self.noise_corrections, cameras)

    def matched_snr(
        self, channels: Channels, camera: Any, psf_sigma_pix: float = 1.3
    ) -> Any:
        """The signal-to-noise ratio of a molecule at each pixel, without unit, in the
        structure of `channels`; see [`jaxbkgd.matched_snr`][]. It includes the different
        noise at the borders of the frame and the ends of the movie.

        **Arguments:**

        - `channels`, `camera`: see `snr`.
        - `psf_sigma_pix`: the standard deviation of the image of a molecule, in pixels.

        **Raises:** `TypeError` or `ValueError` for what does not fit.
        """

        def ratio(signal, bkgd, noise, camera):
            return matched_snr(
                signal,
                bkgd,
                noise_correction=noise.deviation,
                skewness_correction=noise.skewness,
                gain=camera.known_gain("An SNR"),
                read_noise_electrons=camera.read_noise_electrons,
                psf_sigma_pix=psf_sigma_pix,
            )

        signals, cameras = self.residuals(channels), self._cameras(camera, channels)
        noises = self.matched_noise(psf_sigma_pix)
        return map_channels(ratio, signals, self.bkgds, noises, cameras)

    def _cameras(self, camera: Any, channels: Channels) -> Any:
        """A camera for each channel, whose maps fit it."""
        cameras = camera_of_each(camera, channels)
        map_channels(
            lambda bkgds, of_one: of_one.check_shape(*bkgds.shape[-2:]), self.bkgds, cameras
        )
        return cameras

    def matched_noise(self, psf_sigma_pix: float = 1.3) -> Any:
        """The noise under a point-spread function, after subtraction of the background, for
        `matched_snr`. `deviation` and `skewness` are its standard deviation and its
        skewness over those in the frames. Each is a number or a map `(height, width)` or
        `(frames, height, width)`, in the structure of channels.

        If `noise` is `None`, it is the factor of single pixels, which is exact for noise
        that is independent from pixel to pixel.
        """
        psf_sigma_pix = checked_psf_sigma(psf_sigma_pix)

        def of_channel(bkgd, noise_correction, noise):
            if noise is None:
                return MatchedNoise(noise_correction, jnp.ones(()))
            return noise.matched(psf_sigma_pix, bkgd.shape)

        return map_channels(
            of_channel, self.bkgds, self.noise_corrections, self._noise_of_each
        )

    def detection_threshold(
        self, false_positives_per_frame: Any, psf_sigma_pix: float = 1.3
    ) -> Any:
        """[`jaxbkgd.detection_threshold`][] for the `matched_snr` of these frames, in the
        structure of channels. The background makes noise less alike from pixel to pixel.
        `TypeError` or `ValueError` for arguments that do not fit, and if the radii of the
        background are traced."""
        psf_sigma_pix = checked_psf_sigma(psf_sigma_pix)

        def of_channel(bkgd, noise):
            correlation = None if noise is None else noise.correlation(psf_sigma_pix)
            shape = bkgd.shape[-2:]
            return threshold(false_positives_per_frame, shape, psf_sigma_pix, correlation)

        return map_channels(of_channel, self.bkgds, self._noise_of_each)

    @property
    def _noise_of_each(self) -> Any:
        if self.noise is None:
            return map_channels(lambda _: None, self.bkgds)
        return self.noise


def joined(backgrounds: Any) -> Background:
    """One background of all channels, in their structure."""
    names = "bkgds", "noise_corrections", "illumination", "noise"
    return Background(*(map_channels(operator.attrgetter(n), backgrounds) for n in names))


def snr(
    signal: Real[ArrayLike, "..."],
    bkgd: Real[ArrayLike, "..."],
    *,
    noise_correction: Real[ArrayLike, "..."],
    gain: Real[ArrayLike, "..."],
    read_noise_electrons: Real[ArrayLike, "..."] = 0.0,
) -> Float[Array, "..."]:
    """The signal in units of the noise expected where there is no molecule:
    `signal / (noise_correction * sqrt(bkgd / gain + (read_noise_electrons / gain)**2))`;
    see [How it works](how-it-works.md#the-noise-factor).

    **Arguments:** (broadcast against each other)

    - `signal`: frames less their background, in ADU.
    - `bkgd`: the background above the camera's offset, in ADU. Where it is not positive and
        there is no read noise, the ratio is not finite and has no gradient.
    - `noise_correction`: see [`jaxbkgd.noise_correction`][].
    - `gain`: electrons per ADU, a positive number (`ValueError` for another), or a map,
        which may have dead pixels.
    - `read_noise_electrons`: the standard deviation in the dark, a number or a map.

    ```python
    >>> import jaxbkgd
    >>> float(jaxbkgd.snr(30.0, 100.0, noise_correction=0.5, gain=4.0))
    12.0

    ```
    """
    if not is_traced(gain) and np.ndim(gain) == 0:
        checked_number("gain", gain, unit="electrons per ADU")
    given = signal, bkgd, noise_correction, gain, read_noise_electrons
    with jax.transfer_guard("allow"):
        arguments = [jnp.asarray(a) for a in given]
        rank = max(a.ndim for a in arguments)
        # Scalars stay scalars.
        arguments = [
            a.reshape(*[1] * (rank - a.ndim), *a.shape) if a.ndim else a for a in arguments
        ]
        signal, bkgd, factor, gain, read_noise = arguments
        is_light = bkgd > -(read_noise**2 / gain)
        are_usable = [
            jnp.isfinite(signal),
            jnp.isfinite(bkgd) & is_light,
            jnp.isfinite(factor) & (factor > 0),
            jnp.isfinite(gain) & (gain > 0),
            jnp.isfinite(read_noise),
        ]
        # Derivatives that are not finite would pass a `where` of the caller, as NaN.
        usable = [jnp.where(i, a, 1) for i, a in zip(are_usable, arguments, strict=True)]
        unusable = map(lax.stop_gradient, arguments)
        is_usable = ft.reduce(jnp.logical_and, are_usable)
        return jnp.where(is_usable, _ratio_to_noise(*usable), _ratio_to_noise(*unusable))


def _ratio_to_noise(
    signal: Array, bkgd: Array, factor: Array, gain: Array, read_noise: Array
) -> Array:
    variance = jnp.divide(bkgd, gain) + jnp.square(jnp.divide(read_noise, gain))
    return jnp.divide(signal, jnp.multiply(factor, jnp.sqrt(variance)))


def _residual(channel: ArrayLike, bkgd: Array) -> Array:
    frames = as_frames(channel)
    if frames.shape != bkgd.shape:
        shapes = f"shape {frames.shape}, and their background {bkgd.shape}"
        raise ValueError(f"The frames have {shapes}; give those that were estimated.")
    return (frames if frames.dtype == jnp.float64 else frames.astype(bkgd.dtype)) - bkgd


def sharded_as(background: Background, frames: Shaped[Array, "..."]) -> Background:
    """The background, sharded as the frames are on an Auto mesh."""
    if is_traced(frames) or len(frames.sharding.device_set) == 1:
        return background
    bkgds = jax.device_put(background.bkgds, frames.sharding)
    return eqx.tree_at(lambda b: b.bkgds, background, bkgds)


def is_on_explicit_mesh(frames: Shaped[Array, "..."]) -> bool:
    """Whether the sharding of these frames is a part of their type."""
    return AxisType.Explicit in jax.typeof(frames).sharding.mesh.axis_types


def on_auto_mesh(
    estimator: Any, estimates: Callable[..., Any], frames: Any, options: dict[str, Any]
) -> Any:
    """`estimates(estimator, frames, options)`, the background of each channel, sharded as
    its frames are. JAX finds the sharding of all that is computed on the way."""
    arrays, static = eqx.partition(estimator, eqx.is_array)
    stacks = jax.tree.leaves(frames)
    shardings = [
        jax.typeof(stack).sharding for stack in stacks if is_on_explicit_mesh(stack)
    ]
    replicated = NamedSharding(shardings[0].mesh, PartitionSpec())

    def placed(constants: Any) -> Any:
        """On all devices: those that are not traced are on one only."""
        if any(map(is_traced, stacks)):
            return constants
        mesh = next(s.sharding.mesh for s in stacks if is_on_explicit_mesh(s))
        return jax.device_put(constants, NamedSharding(mesh, PartitionSpec()))

    def fields(background: Background) -> tuple[Any, ...]:
        known = placed((background.noise_corrections, background.noise))
        return background.bkgds, known[0], background.illumination, known[1]

    def on_mesh(arrays: Any, frames: Any, options: dict[str, Any]) -> Any:
        backgrounds = estimates(eqx.combine(arrays, static), frames, options)
        return map_channels(fields, backgrounds)

    def of_fields(stack: Any) -> tuple[Any, ...]:
        own = jax.typeof(stack).sharding if is_on_explicit_mesh(stack) else replicated
        return own, replicated, replicated, replicated

    estimated: Any = auto_axes(on_mesh, out_sharding=map_channels(of_fields, frames))
    found = estimated(placed(arrays), frames, options)
    if not is_sequence(frames):
        return Background(*found)
    return map_channels(lambda of_one: Background(*of_one), found)
