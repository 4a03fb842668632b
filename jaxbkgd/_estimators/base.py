"""What every estimator takes and gives: channels in, their background out."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Shaped

from .background import Background, joined, sharded_as_frames
from .channels import (
    as_frames,
    Channels,
    check_stacks,
    checked_weights,
    is_sequence,
    map_channels,
)
from .saved import SavedModule


_Estimator = TypeVar("_Estimator", bound="AbstractEstimator")


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
    def aligned_frames(self) -> int:
        """A part of a movie that begins at a multiple of so many frames is estimated to the
        same bit as the whole."""
        return 1

    @property
    def molecule_radius_pix(self) -> float | None:
        """Twice the standard deviation of the image of a molecule, in pixels, if the
        estimator leaves molecules out; `None` if it does not."""
        return None

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
        check_stacks(frames)
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

            return sharded_as_frames(function, frames, *values)

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
