"""What every estimator takes and gives: channels in, their background out."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Real, Shaped


# One stack of frames (..., height, width), or one a channel.
Channels = ArrayLike | Sequence[ArrayLike]


class Background(eqx.Module):
    """The background of each channel, and the noise of what is left without it.

    Both attributes have the structure of the channels they were estimated from: one
    stack gives one array each, a list or tuple of stacks a list or tuple of arrays.

    **Attributes:**

    - `bkgds`: the background, `(..., height, width)`, in the unit of the frames.
    - `noise_corrections`: the standard deviation of `frames - bkgd` over that of the
        frames, for noise that is independent from pixel to pixel.
    """

    bkgds: Any
    noise_corrections: Any

    def residuals(self, channels: Channels) -> Any:
        """The frames less their background.

        **Arguments:**

        - `channels`: the frames that were estimated.

        **Returns:**

        Residuals `(..., height, width)` in the unit of the frames, in the structure of
        `channels`.

        **Raises:**

        `ValueError` for channels of another structure or shape than the backgrounds, and
        `TypeError` for frames that are not real.
        """
        return map_channels(_residual, channels, self.bkgds)

    def snr(self, channels: Channels, gains: Any) -> Any:
        """The signal-to-noise ratio of each pixel; see [`jaxbkgd.snr`][].

        **Arguments:**

        - `channels`: the frames that were estimated, above the camera's offset, in ADU.
        - `gains`: the gain in electrons per ADU, a number for all or one a channel.

        **Returns:**

        Maps `(..., height, width)` without unit, in the structure of `channels`.

        **Raises:**

        `ValueError` for a gain that is not positive and finite, and for gains that do not
        fit the channels; else as `residuals` does.
        """
        for gain in jax.tree.leaves(gains):
            # A map may have dead pixels, where the ratio is not finite.
            is_known = not isinstance(gain, Tracer) and np.ndim(gain) == 0
            if is_known and not 0 < gain < np.inf:
                raise ValueError(
                    f"gains must be positive and finite, in electrons per ADU, but one is "
                    f"{gain!r}."
                )
        if not _is_sequence(gains):
            is_shared = not _is_sequence(channels) or np.ndim(gains) == 0
            gains = map_channels(lambda _: gains, channels) if is_shared else list(gains)
        return map_channels(
            snr, self.residuals(channels), self.bkgds, self.noise_corrections, gains
        )


class AbstractEstimator(eqx.Module):
    """An estimator of the background: called with channels, it gives a `Background`.

    Its learnable parameters are its inexact arrays. Here is
    [a subclass of your own](faq.md#can-i-use-an-estimator-of-my-own).
    """

    # Whether it is called with `weights`, and with `donated`, backgrounds of earlier frames
    # over which it may write the new ones on CPU.
    takes_weights: ClassVar[bool] = False
    takes_donated: ClassVar[bool] = False

    @property
    def halo_lines(self) -> int | None:
        """Lines that must be seen on either side of one, or None for whole frames."""
        return None

    @property
    @abc.abstractmethod
    def halo_frames(self) -> int:
        """Frames that must be seen on either side of one to estimate it."""

    @abc.abstractmethod
    def __call__(self, channels: Channels) -> Background:
        """Estimates the background of one stack of frames `(..., height, width)`, or of
        a list or tuple of them, one a channel.

        **Raises:**

        The estimators of this package raise `TypeError` or `ValueError` for channels that
        are not as above.
        """

    def for_inference(self) -> "AbstractEstimator":
        """An estimator that gives the same, and may cost less, where the parameters are
        known and stay. [`jaxbkgd.estimate_movie`][] uses it."""
        return self


def snr(
    signal: Real[ArrayLike, "..."],
    bkgd: Real[ArrayLike, "..."],
    noise_correction: Real[ArrayLike, "..."],
    gain: Real[ArrayLike, "..."],
) -> Float[Array, "..."]:
    """The signal in units of the photon noise expected where there is no molecule:
    `signal / (noise_correction * sqrt(bkgd / gain))`, in which `bkgd / gain` is the
    variance in ADU² of `bkgd * gain` photo-electrons. The camera's read noise is not in it:
    1.5 e- beside a background of 60 e- make the ratio's deviation 1.02 where there is no
    molecule, beside 20 e- 1.05. It is derived in
    [How it works](how-it-works.md#the-noise-factor).

    **Arguments:** (broadcast against each other)

    - `signal`: frames less their background, in ADU.
    - `bkgd`: the background above the camera's offset, in ADU. Where it is not positive
        no photon noise is expected, and the ratio is not finite.
    - `noise_correction`: see [`jaxbkgd.noise_correction`][].
    - `gain`: electrons per ADU.

    **Returns:**

    The ratio without unit, of the shape that the arguments have together.

    **Raises:**

    `TypeError` for what is no number or array, or does not broadcast.

    !!! example

        ```python
        >>> import jaxbkgd
        >>> float(jaxbkgd.snr(30.0, 100.0, 0.5, 4.0))
        12.0

        ```
    """
    expected = jnp.sqrt(jnp.divide(bkgd, gain))
    return jnp.divide(signal, jnp.multiply(noise_correction, expected))


def as_frames(channel: Any) -> Shaped[Array, "*batch height width"]:
    """The frames of one channel as a JAX array of a real dtype that can hold them."""
    return jnp.asarray(checked_frames(channel))


def checked_frames(channel: Any) -> Shaped[Array | np.ndarray, "*batch height width"]:
    """Frames as `as_frames` takes them. Those of NumPy stay there, for a compiled function
    to read them in place, and must not be written to before it is done."""
    if isinstance(channel, np.ma.MaskedArray):
        raise TypeError(
            "frames must not be a masked array, whose mask would be lost; fill it, for "
            "example with `frames.astype(float).filled(numpy.nan)`."
        )
    frames = channel if isinstance(channel, jax.Array) else np.asarray(channel)
    is_real = any(
        jnp.issubdtype(frames.dtype, kind) for kind in (bool, jnp.integer, jnp.floating)
    )
    # To NumPy, a time difference is an integer.
    if not is_real or frames.dtype.kind == "m":
        raise TypeError(
            f"frames must be real numbers, but their dtype is {frames.dtype}; convert "
            "them, or take the real part, first. Those of a file are "
            "`jaxbkgd.open_movie(path).channels[0][:]`."
        )
    if frames.ndim < 2 or 0 in frames.shape[-2:]:
        raise ValueError(
            "frames must have shape (..., height, width) with at least one pixel, but "
            f"their shape is {frames.shape}."
        )
    if isinstance(frames, np.ndarray):
        frames = frames.astype(_holding_dtype(frames.dtype), copy=False)
    return frames


def _holding_dtype(dtype: np.dtype) -> np.dtype:
    """A dtype that JAX has, in the machine's byte order, for numbers of `dtype`. Left to
    itself, JAX would wrap 64-bit integers to 32 bits."""
    if dtype.itemsize < 8:
        return dtype.newbyteorder("=")
    if not jax.config.read("jax_enable_x64"):
        return np.dtype(np.float32)
    return np.dtype(np.float64) if dtype.kind == "f" else dtype.newbyteorder("=")


def map_channels(function: Callable, channels: Any, *others: Any) -> Any:
    """Applies `function` to each channel and what belongs to it, in the same structure:
    to one stack itself, or to the entries of a list or tuple."""
    if not _is_sequence(channels):
        if any(map(_is_sequence, others)):
            raise ValueError(
                "There is one stack of frames, but a list of channels to go with it; give "
                "a list of stacks."
            )
        return function(channels, *others)
    if not channels:
        raise ValueError("channels is empty; it must hold at least one stack of frames.")
    for other in others:
        if not _is_sequence(other) or len(other) != len(channels):
            entries = f"{len(other)} entries" if _is_sequence(other) else "no sequence"
            raise ValueError(
                f"There are {len(channels)} channels, but {entries} to go with them; give "
                "a list with one entry for each channel."
            )
    answers = [function(*entries) for entries in zip(channels, *others, strict=True)]
    return tuple(answers) if isinstance(channels, tuple) else answers


def _is_sequence(channels: Any) -> bool:
    return isinstance(channels, list | tuple)


def _residual(channel: ArrayLike, bkgd: Array) -> Array:
    frames = as_frames(channel)
    if frames.shape != bkgd.shape:
        raise ValueError(
            f"The frames have shape {frames.shape}, but their background has "
            f"{bkgd.shape}; give the frames that it was estimated from."
        )
    return frames - bkgd
