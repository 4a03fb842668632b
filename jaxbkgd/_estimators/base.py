"""What every estimator takes and gives: channels in, their background out."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np

from .background import (
    Background,
    is_on_explicit_mesh,
    joined,
    on_auto_mesh,
    sharded_as,
)
from .channels import as_frames, Channels, checked_weights, is_sequence, map_channels
from .checks import is_traced
from .saved import SavedModule


_Estimator = TypeVar("_Estimator", bound="AbstractEstimator")


class Prediction(NamedTuple):
    """What `AbstractEstimator.predict` gives; predictions are steady, but for the light,
    over blocks of so many frames, and `far` leaves out so many blocks more than `near` on
    each side."""

    background: Background
    near: Any
    far: Any
    block_frames: int = 1
    compared_blocks: int = 1


class AbstractEstimator(SavedModule):
    """An estimator of the background: called with channels, it gives a `Background`.

    Implement `halo_frames` and `estimate_stack`; lists of channels, checks of the frames
    and JSON texts come with this class. The floating-point arrays are the learnable
    parameters. With `takes_weights = True`, `estimate_stack` has `weights` as a second
    argument; with `takes_donated = True`, `donated`. One over time may have `predict`.

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

    ```
    """

    takes_weights: ClassVar[bool] = False
    takes_donated: ClassVar[bool] = False

    def __hash__(self) -> int:
        # That of equinox needs hashable arrays; `jax.jit(estimator)` needs a hash.
        leaves, structure = jax.tree.flatten(self)
        return hash((structure, *map(np.shape, leaves)))

    @property
    @abc.abstractmethod
    def halo_frames(self) -> int:
        """The number of frames on either side that the background of a frame depends on."""

    @property
    def sees_one_frame(self) -> bool:
        """Whether a background depends on one frame, apart from its light."""
        return self.halo_frames == 0

    @property
    def learns_patterns(self) -> bool:
        """Whether `with_patterns` must first learn from the movie what all of its parts
        share."""
        return False

    @property
    def aligned_frames(self) -> int:
        """A part of a movie is estimated to the same bit as the whole if it begins at a
        multiple of this number of frames."""
        return 1

    def light_models(self, count: int) -> list[Any] | None:
        """The `LightModel` of each of `count` channels, for chunks that follow each other
        from the beginning of a movie to its end; `None` if each chunk is estimated by
        itself."""
        return None

    @property
    def pixel_bytes(self) -> int:
        """The memory for a pixel that is read, converted, estimated and written."""
        return 32

    @property
    def molecule_radius_pix(self) -> float | None:
        """Twice the standard deviation of the image of a molecule, if the estimator leaves
        molecules out."""
        return None

    @abc.abstractmethod
    def estimate_stack(self, frames: Any) -> Background:
        """The background of one stack, a JAX array `(..., height, width)` of a real dtype:
        a [`jaxbkgd.Background`][] with one array of its shape and one factor."""

    def __call__(
        self, channels: Channels, weights: Any = None, *, donated: Any = None
    ) -> Background:
        """The background of all channels, in the structure of `channels`.

        **Arguments:**

        - `channels`: one stack of frames `(..., height, width)`, or a list or tuple of
            them, one a channel, of any shapes and real dtypes.
        - `weights`: for an estimator that takes them, how much a pixel counts: zero or
            positive, or False for pixels to leave out. The shape broadcasts to that of the
            frames, such as `(height, width)` or `(frames, 1, 1)`; one for each channel.
        - `donated`: for an estimator that takes them, backgrounds of equal channels that
            are no longer needed, and that it may overwrite on CPU.

        **Raises:** `TypeError` or `ValueError` for other arguments, and if the estimator
        has parameters for another number of channels.
        """
        frames = map_channels(as_frames, channels)
        stacks = frames if is_sequence(frames) else [frames]
        # Within `jax.vmap`, stacks look like frames.
        if len(stacks) > 1 and all(s.ndim == 2 and not is_traced(s) for s in stacks):
            raise ValueError(
                f"A list of {len(stacks)} images would be {len(stacks)} channels; give one "
                "stack, numpy.stack(frames), or for single frames [frame[None], ...]."
            )
        options: dict[str, Any] = {}
        if weights is not None:
            if not self.takes_weights:
                raise TypeError(f"{type(self).__name__} takes no weights; LocalMean does.")
            options["weights"] = map_channels(checked_weights, frames, weights)
        if donated is not None:
            options["donated"] = donated

        # A transfer guard is to watch the frames, not the constants of the estimator.
        with jax.transfer_guard("allow"):
            if any(is_on_explicit_mesh(stack) for stack in stacks):
                return joined(on_auto_mesh(self, type(self)._estimates, frames, options))
            return joined(self._estimates(frames, options))

    def _estimates(self, frames: Any, options: dict[str, Any]) -> Any:
        """The background of each channel, in the structure of the frames."""

        def estimate(frames, estimate_stack, *values):
            given = dict(zip(options, values, strict=True))
            background: Any = estimate_stack(frames, **given)
            name = f"{type(self).__name__}.estimate_stack"
            if not isinstance(background, Background):
                kind = type(background).__name__
                raise TypeError(f"{name} must give a Background, but gave {kind}.")
            bkgds, factor = background.bkgds, background.noise_corrections
            if np.shape(bkgds) != frames.shape:
                rule = f"must give a Background with bkgds of shape {frames.shape}"
                raise ValueError(f"{name} {rule}, but their shape is {np.shape(bkgds)}.")
            if np.iscomplexobj(bkgds):
                rule = "must give a Background with real bkgds"
                raise ValueError(f"{name} {rule}, but they are {bkgds.dtype}.")
            if np.shape(factor) != ():
                rule = "must give a Background with one number as noise_corrections"
                raise ValueError(f"{name} {rule}, but their shape is {np.shape(factor)}.")
            return sharded_as(background, frames)

        count = len(frames) if is_sequence(frames) else 1
        functions = self._stack_functions(count)
        functions = functions if is_sequence(frames) else functions[0]
        return map_channels(estimate, frames, functions, *options.values())

    def _stack_functions(self, count: int) -> list[Callable[..., Background]]:
        """`estimate_stack` for each of so many channels."""
        return [self.estimate_stack] * count

    def predict(self, channels: Channels, gap_frames: int) -> Prediction:
        """Predictions of each frame that have not seen it, from which
        [`jaxbkgd.FramePairLoss`][] learns the time scale. `background` is that of a call.
        `near` and `far`, in the structure of `channels`, estimate each frame from those at
        least `gap_frames` away, and at least one frame farther. `ValueError` for fewer than
        `2 * gap_frames + 2` frames, and for an estimator that cannot predict."""
        raise ValueError(
            f"{type(self).__name__} has no predict, which learning without a truth "
            "needs; write one, as LocalMean has, or give an objective, such as TruthLoss."
        )

    def for_inference(self: _Estimator) -> _Estimator:
        """An estimator of the same class with the same results, which may cost less if the
        parameters are known and stay. [`jaxbkgd.estimate_movie`][] uses it."""
        return self
