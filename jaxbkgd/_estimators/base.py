"""What every estimator takes and gives: channels in, their background out."""

import abc
import functools as ft
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import auto_axes, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from .checks import checked_number, is_real_dtype, is_traced
from .saved import SavedModule


# One stack of frames (..., height, width), or one a channel.
Channels = ArrayLike | Sequence[ArrayLike]

_Estimator = TypeVar("_Estimator", bound="AbstractEstimator")


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
        if not is_sequence(gains):
            is_shared = not is_sequence(channels) or np.ndim(gains) == 0
            gains = map_channels(lambda _: gains, channels) if is_shared else list(gains)

        def ratio(signal, bkgd, noise_correction, gain):
            return snr(signal, bkgd, noise_correction=noise_correction, gain=gain)

        signals = self.residuals(channels)
        return map_channels(ratio, signals, self.bkgds, self.noise_corrections, gains)


class Prediction(NamedTuple):
    """What `AbstractEstimator.predict` gives."""

    background: Background
    near: Any
    far: Any


class AbstractEstimator(SavedModule):
    """An estimator of the background: called with channels, it gives a `Background`.

    One of your own implements `halo_frames` and `estimate_stack`, the background of one
    stack; lists of channels, checks of the frames and JSON texts come with this class. Its
    learnable parameters are its inexact arrays.

    !!! example

        ```python
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxbkgd
        >>> class FrameLevel(jaxbkgd.AbstractEstimator):
        ...     scale: jax.Array
        ...     @property
        ...     def halo_frames(self):
        ...         return 0
        ...     def estimate_stack(self, frames):
        ...         level = jnp.mean(frames, axis=(-2, -1), keepdims=True)
        ...         bkgds = self.scale * jnp.broadcast_to(level, frames.shape)
        ...         return jaxbkgd.Background(bkgds, jnp.ones(()))
        >>> estimator = FrameLevel(jnp.array(1.0))
        >>> estimator([jnp.ones((4, 8, 8)), jnp.ones((4, 8, 9))]).bkgds[1].shape
        (4, 8, 9)
        >>> float(FrameLevel.from_json(estimator.to_json()).scale)
        1.0

        ```

    **Attributes:**

    - `takes_weights`: whether it takes `weights`, which `estimate_stack` then has as a
        second argument.
    - `takes_donated`: whether it takes `donated`, which `estimate_stack` then has as an
        argument.
    - `can_predict`: whether it has `predict`.
    """

    takes_weights: ClassVar[bool] = False
    takes_donated: ClassVar[bool] = False
    can_predict: ClassVar[bool] = False

    def __check_init__(self) -> None:
        methods = ("estimate_stack", "__call__")
        if all(getattr(type(self), m) is getattr(AbstractEstimator, m) for m in methods):
            raise TypeError(
                f"{type(self).__name__} is abstract: it must implement "
                "estimate_stack(self, frames), which gives the Background of one stack."
            )

    def __hash__(self) -> int:
        # That of equinox needs hashable arrays; `jax.jit(estimator)` needs a hash.
        leaves, structure = jax.tree.flatten(self)
        return hash((structure, *map(np.shape, leaves)))

    @property
    @abc.abstractmethod
    def halo_frames(self) -> int:
        """Frames that must be seen on either side of one to estimate it."""

    @property
    def halo_lines(self) -> int | None:
        """Lines that must be seen above and below a strip of a frame to estimate it to the
        same bit, or `None` if it takes the whole frame."""
        return None

    @property
    def molecule_radius_pix(self) -> float | None:
        """Twice the standard deviation of the image of a molecule, in pixels, if the
        estimator leaves molecules out; `None` if it does not."""
        return None

    @property
    def is_for_inference(self) -> bool:
        """Whether its parameters are fixed, as `for_inference` fixes them."""
        return False

    def estimate_stack(self, frames: Any) -> Background:
        """The background of one stack: to be implemented by an estimator of one's own.

        **Arguments:**

        - `frames`: a JAX array `(..., height, width)` of a real dtype.

        **Returns:**

        A [`jaxbkgd.Background`][] with one array of the shape of `frames` and one factor.
        """
        return self(frames)

    def __call__(
        self, channels: Channels, weights: Any = None, *, donated: Any = None
    ) -> Background:
        """**Arguments:**

        - `channels`: one stack of frames `(..., height, width)`, or a list or tuple of
            them, one a channel, of any shapes and real dtypes.
        - `weights`: how much a pixel counts, if the estimator takes weights: zero or
            positive, or booleans that are False for pixels to leave out. Of a shape that
            broadcasts to that of the frames, as `(height, width)` or `(frames, 1, 1)`; for
            a list of channels, one for each.
        - `donated`: backgrounds of such channels that are needed no longer, if the
            estimator takes them. On CPU the new ones may be written over them.

        **Returns:**

        A [`jaxbkgd.Background`][] with the structure of `channels`.

        **Raises:**

        `TypeError` or `ValueError` for channels or weights that are not as above, or are
        not as many as the estimator has parameters for.
        """
        frames = map_channels(as_frames, channels)
        _check_stacks(frames)
        options: dict[str, Any] = {}
        if weights is not None:
            if not self.takes_weights:
                raise TypeError(
                    f"{type(self).__name__} takes no weights; LocalMean does, and an "
                    "estimator of your own that sets takes_weights = True."
                )
            options["weights"] = map_channels(checked_weights, frames, weights)
        if donated is not None:
            if not self.takes_donated:
                raise TypeError(f"{type(self).__name__} takes no donated backgrounds.")
            options["donated"] = donated

        def estimate(frames, estimate_stack, *values):
            def function(frames, *values):
                given = dict(zip(options, values, strict=True))
                return _checked_background(self, estimate_stack(frames, **given), frames)

            return _sharded_as_frames(function, frames, *values)

        count = len(frames) if is_sequence(frames) else 1
        # A transfer guard is to watch the frames, not the constants of the estimator.
        with jax.transfer_guard("allow"):
            functions = self._stack_functions(count)
            functions = functions if is_sequence(frames) else functions[0]
            return joined(map_channels(estimate, frames, functions, *options.values()))

    def _stack_functions(self, count: int) -> list[Callable[..., Background]]:
        """`estimate_stack` for each of so many channels."""
        return [self.estimate_stack] * count

    def predict(self, channels: Channels, gap_frames: int) -> Prediction:
        """The background, and two predictions of each frame that have not seen it, for an
        estimator of which [`jaxbkgd.FramePairLoss`][] is to learn the time scale.

        **Arguments:**

        - `channels`: as above, with at least `2 * gap_frames + 2` frames.
        - `gap_frames`: 1 or more.

        **Returns:**

        `background`, and `near` and `far` in the structure of `channels`: estimates of
        each frame from those at least `gap_frames` away, and at least one frame farther.

        **Raises:**

        `ValueError` for too few frames or no gap, and for an estimator that cannot predict.
        """
        raise ValueError(
            f"{type(self).__name__} has no predict, which gives each frame's background "
            "from the frames around it; LocalMean has."
        )

    def for_inference(self: _Estimator) -> _Estimator:
        """An estimator of the same class that gives the same, and may cost less, where the
        parameters are known and stay. [`jaxbkgd.estimate_movie`][] uses it."""
        return self


def joined(backgrounds: Any) -> Background:
    """One background of all channels, in their structure."""
    return Background(
        map_channels(operator.attrgetter("bkgds"), backgrounds),
        map_channels(operator.attrgetter("noise_corrections"), backgrounds),
    )


def snr(
    signal: Real[ArrayLike, "..."],
    bkgd: Real[ArrayLike, "..."],
    *,
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
        no photon noise is expected, and the ratio is not finite and has no gradient.
    - `noise_correction`: see [`jaxbkgd.noise_correction`][].
    - `gain`: electrons per ADU, a positive number, or a map, which may have dead pixels.

    **Returns:**

    The ratio without unit, of the shape that the arguments have together.

    **Raises:**

    `TypeError` for what is no number or array, or does not broadcast, and `ValueError` for
    a gain that is not positive and finite.

    !!! example

        ```python
        >>> import jaxbkgd
        >>> float(jaxbkgd.snr(30.0, 100.0, noise_correction=0.5, gain=4.0))
        12.0

        ```
    """
    if not is_traced(gain) and np.ndim(gain) == 0:
        checked_number("gain", gain, unit="electrons per ADU")
    arguments = [jnp.asarray(a) for a in (signal, bkgd, noise_correction, gain)]
    rank = max(a.ndim for a in arguments)
    # Scalars stay scalars.
    arguments = [
        a.reshape(*[1] * (rank - a.ndim), *a.shape) if a.ndim else a for a in arguments
    ]
    with jax.transfer_guard("allow"):
        are_usable = [jnp.isfinite(a) & (a > 0) for a in arguments]
        are_usable[0] = jnp.isfinite(arguments[0])
        # Derivatives that are not finite would pass a `where` of the caller, as NaN.
        usable = [jnp.where(i, a, 1) for i, a in zip(are_usable, arguments, strict=True)]
        unusable = _ratio_to_noise(*map(lax.stop_gradient, arguments))
        is_usable = ft.reduce(jnp.logical_and, are_usable)
        return jnp.where(is_usable, _ratio_to_noise(*usable), unusable)


def _ratio_to_noise(
    signal: Real[Array, "..."],
    bkgd: Real[Array, "..."],
    noise_correction: Real[Array, "..."],
    gain: Real[Array, "..."],
) -> Float[Array, "..."]:
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
    if not is_real_dtype(frames.dtype, allows_bool=True):
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


def working_dtype(frames: Shaped[Array, "..."]) -> Any:
    """The dtype of estimates: float64 for float64 frames, and float32 for all others."""
    return jnp.float64 if frames.dtype == jnp.float64 else jnp.float32


def checked_weights(
    frames: Shaped[Array, "*batch height width"], weights: Any
) -> Shaped[Array, "..."] | None:
    """Weights of one channel as a JAX array that broadcasts to its frames."""
    if weights is None:
        return None
    is_masked = isinstance(weights, np.ma.MaskedArray)
    weights = weights if isinstance(weights, jax.Array) else np.asarray(weights)
    if is_masked or not is_real_dtype(weights.dtype, allows_bool=True):
        raise TypeError(
            "weights must be an array of real numbers or booleans, as numpy.load reads it "
            f"from a file, but are {'a masked one' if is_masked else weights.dtype}."
        )
    if isinstance(weights, np.ndarray) and weights.dtype.kind in "iu":
        # JAX would wrap 64-bit integers to 32 bits.
        weights = weights.astype(np.float64)
    weights = jnp.asarray(weights)
    try:
        fits = jnp.broadcast_shapes(weights.shape, frames.shape) == frames.shape
    except ValueError:
        fits = False
    # One for each frame would be taken for one for each column.
    if not fits or weights.ndim == 1:
        raise ValueError(
            f"weights have shape {weights.shape}, and must be one for each pixel, (height, "
            "width), for each frame, (frames, 1, 1), or for both, to go with frames of "
            f"shape {frames.shape}."
        )
    # In NumPy: within a trace, JAX would trace the comparison of known weights, too.
    known_weights = np.ones(1) if is_traced(weights) else np.asarray(weights)
    if not np.all((known_weights >= 0) & (known_weights < np.inf)):
        raise ValueError(
            "weights must be zero or positive, and finite, but some are not; give 0 for "
            "what is to be left out."
        )
    return weights


def map_channels(function: Callable, channels: Any, *others: Any) -> Any:
    """Applies `function` to each channel and what belongs to it, in the same structure:
    to one stack itself, or to the entries of a list or tuple."""
    if not is_sequence(channels):
        if any(map(is_sequence, others)):
            raise ValueError(
                "There is one stack of frames, but a list of channels to go with it; give "
                "a list of stacks."
            )
        return function(channels, *others)
    if not channels:
        raise ValueError("channels is empty; it must hold at least one stack of frames.")
    for other in others:
        if not is_sequence(other) or len(other) != len(channels):
            entries = f"{len(other)} entries" if is_sequence(other) else "no sequence"
            raise ValueError(
                f"There are {len(channels)} channels, but {entries} to go with them; give "
                "a list with one entry for each channel."
            )
    answers = [function(*entries) for entries in zip(channels, *others, strict=True)]
    return tuple(answers) if isinstance(channels, tuple) else answers


def is_sequence(channels: Any) -> bool:
    """Whether these are channels, rather than one stack."""
    return isinstance(channels, list | tuple)


def _check_stacks(frames: Any) -> None:
    """Refuses a list of frames, which would be that many channels. (Within `jax.vmap`,
    stacks look like frames.)"""
    if not is_sequence(frames) or len(frames) < 2:
        return
    if all(frame.ndim == 2 and not is_traced(frame) for frame in frames):
        raise ValueError(
            f"A list of {len(frames)} images would be {len(frames)} channels of one frame; "
            "give frames of one channel as one stack, numpy.stack(frames), and single "
            "frames of several channels as [frame[None], ...]."
        )


def _checked_background(
    estimator: AbstractEstimator, background: Any, frames: Shaped[Array, "..."]
) -> Background:
    is_background = isinstance(background, Background)
    if not is_background or np.shape(background.bkgds) != frames.shape:
        found = f"bkgds of shape {np.shape(background.bkgds)}" if is_background else "none"
        raise ValueError(
            f"{type(estimator).__name__}.estimate_stack must give a Background with bkgds "
            f"of the shape of its frames, {frames.shape}, but there are {found}."
        )
    return background


def _sharded_as_frames(
    function: Callable[..., Background], frames: Shaped[Array, "..."], *values: Any
) -> Background:
    """`function` of frames on any mesh, whose background is sharded as the frames are."""

    def replicated(mesh):
        return NamedSharding(mesh, PartitionSpec())

    sharding = jax.typeof(frames).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:

        def on_mesh(frames, *values):
            background = function(frames, *values)
            factor = background.noise_corrections
            if not is_traced(frames):
                # A constant is on one device only.
                factor = jax.device_put(factor, replicated(frames.sharding.mesh))
            return background.bkgds, factor

        out_sharding = (sharding, replicated(sharding.mesh))
        on_auto_mesh: Any = auto_axes(on_mesh, out_sharding=out_sharding)
        return Background(*on_auto_mesh(frames, *values))
    background = function(frames, *values)
    if is_traced(frames) or len(frames.sharding.device_set) == 1:
        return background
    bkgds = jax.device_put(background.bkgds, frames.sharding)
    return Background(bkgds, background.noise_corrections)


def _residual(channel: ArrayLike, bkgd: Array) -> Array:
    frames = as_frames(channel)
    if frames.shape != bkgd.shape:
        raise ValueError(
            f"The frames have shape {frames.shape}, but their background has "
            f"{bkgd.shape}; give the frames that it was estimated from."
        )
    return (frames if frames.dtype == jnp.float64 else frames.astype(bkgd.dtype)) - bkgd


def _holding_dtype(dtype: np.dtype) -> np.dtype:
    """A dtype that JAX has, in the machine's byte order, for numbers of `dtype`. Left to
    itself, JAX would wrap 64-bit integers to 32 bits."""
    if dtype.itemsize < 8:
        return dtype.newbyteorder("=")
    if not jax.config.read("jax_enable_x64"):
        return np.dtype(np.float32)
    return np.dtype(np.float64) if dtype.kind == "f" else dtype.newbyteorder("=")


def estimator_from_json(text: str) -> AbstractEstimator:
    """The estimator that `to_json` of any class wrote as `text`; see
    [`jaxbkgd.AbstractEstimator.from_json`][]."""
    return AbstractEstimator.from_json(text)
