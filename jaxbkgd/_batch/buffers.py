"""Memory that is used for chunk after chunk, on CPU: of new memory, each page costs a
fault."""

import functools as ft
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


# JAX reads an array of NumPy in place if it begins at a multiple of this, and copies others
# to new memory.
_ALIGNMENT_BYTES = 64


class Buffers:
    """What a thread needs for chunks of one shape and dtype.

    **Attributes:**

    - `spent`: if results can be reused, those of the chunk before, one for each channel,
        which the next ones may be written over.
    """

    def __init__(self, can_reuse: bool) -> None:
        self.spent: list[Array] | None = None
        self._can_reuse = can_reuse
        self._frames: list[np.ndarray] | None = None

    def holding(self, chunks: Sequence[Any]) -> list[np.ndarray]:
        """The chunks of each channel where JAX reads them in place, until the next call."""
        if self._frames is None:
            self._frames = [_aligned_empty(chunk.shape, chunk.dtype) for chunk in chunks]
            if self._can_reuse:
                self.spent = [_blank(chunk.shape) for chunk in chunks]
        return list(map(_holding, self._frames, chunks))

    def as_numpy(self, images: list[Any]) -> list[np.ndarray]:
        """Results without a copy, to be spent on the next chunk.

        While one of these arrays is in use, JAX does not write over its image, but makes a
        new one. What `np.asarray` gives would be in use as long as there is the image.
        """
        if self._can_reuse:
            self.spent = images
        return [np.from_dlpack(image) for image in images]


@ft.partial(jax.jit, static_argnums=0)
def _blank(shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.zeros(shape, jnp.float32)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)


def _holding(buffer: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    is_aligned = chunk.ctypes.data % _ALIGNMENT_BYTES == 0
    if is_aligned and chunk.flags.c_contiguous:
        return chunk
    np.copyto(buffer, chunk)
    return buffer
