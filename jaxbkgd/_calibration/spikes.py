"""Spikes: molecules of known light, added to a movie to see what an estimator leaves."""

import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


# Places are so far apart that their molecules do not share pixels.
_SPACING_PIX = 32
# After a molecule, its place is dark for so many times as long as it was on, and longer.
_DARK_TIMES, _DARK_FRAMES = 4, 6
# Half the width of the image of an added molecule, and of the box in which it is fitted.
_IMAGE_HALF_WIDTH, _FIT_HALF_WIDTH = 5, 3

_Frames = Float[Array, "frames height width"]


class Spikes(NamedTuple):
    """Images of added molecules: frames, pixels, and the share of a frame that it is on."""

    frames: Int[np.ndarray, " images"]
    y: Int[np.ndarray, " images"]
    x: Int[np.ndarray, " images"]
    shares: Float[np.ndarray, " images"]


@ft.cache
def spread_spikes(shape: tuple[int, int, int], on_frames: float) -> Spikes:
    """Molecules that are on for so many frames, at random places of a movie of this shape
    (frames, height, width), the same ones each time. They go on and off at any time within
    a frame; those that are on for as long as the movie do not."""
    count, *size = shape
    rng = np.random.default_rng(0)
    period = on_frames + max(_DARK_TIMES * on_frames, _DARK_FRAMES)
    counts = [max(1, length // _SPACING_PIX) for length in size]
    images = []
    for place in np.ndindex(*counts):
        # Some molecule is on in the shortest movie, too.
        first = 0.0 if place == (0, 0) else rng.uniform(-on_frames, period - on_frames)
        for start in np.arange(first, count, period):
            # Not at the edges of a cell, and so of the frame.
            y, x = (np.array(place) + rng.uniform(0.2, 0.8, 2)) / counts * size
            for frame in range(max(0, int(start)), min(count, int(start + on_frames) + 1)):
                share = min(start + on_frames, frame + 1) - max(start, frame)
                images += [(frame, int(y), int(x), share)] if share > 0 else []
    frames, y, x, shares = np.array(images).T
    return Spikes(frames.astype(int), y.astype(int), x.astype(int), shares)


def image_of_molecule(psf_sigma_pix: Any, half_width: int) -> Float[Array, "pixels pixels"]:
    """A Gaussian of unit light about the middle of a pixel."""
    profile = jnp.exp(
        -(jnp.arange(-half_width, half_width + 1) ** 2) / (2 * psf_sigma_pix**2)
    )
    return jnp.outer(profile, profile) / (2 * jnp.pi * psf_sigma_pix**2)


@jax.jit
def add_spikes(frames: _Frames, spikes: Spikes, light: Any, psf_sigma_pix: Any) -> _Frames:
    """Frames with molecules of this light. What lies outside of the frame is lost."""
    steps = np.arange(-_IMAGE_HALF_WIDTH, _IMAGE_HALF_WIDTH + 1)
    image = image_of_molecule(psf_sigma_pix, _IMAGE_HALF_WIDTH)
    images = light * spikes.shares[:, None, None] * image
    height, width = frames.shape[1:]
    y = spikes.y[:, None] + steps
    x = spikes.x[:, None] + steps
    # Indices beyond the last are dropped; negative ones would count from the end.
    y, x = jnp.where(y < 0, height, y), jnp.where(x < 0, width, x)
    places = spikes.frames[:, None, None], y[:, :, None], x[:, None, :]
    return frames.at[places].add(images.astype(frames.dtype), mode="drop")


@jax.jit
def fitted_light(
    residuals: _Frames, spikes: Spikes, psf_sigma_pix: Any
) -> Float[Array, " images"]:
    """The light of each image, by least squares in 7 x 7 pixels of what is left of frames
    without their background."""
    steps = np.arange(-_FIT_HALF_WIDTH, _FIT_HALF_WIDTH + 1)
    image = image_of_molecule(psf_sigma_pix, _FIT_HALF_WIDTH)
    y, x = (place[:, None] + steps for place in (spikes.y, spikes.x))
    places = spikes.frames[:, None, None], y[:, :, None], x[:, None, :]
    height, width = residuals.shape[1:]
    is_inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    weights = image * is_inside
    boxes = residuals.at[places].get(mode="clip")
    sums = jnp.sum(weights * boxes, (-2, -1))
    return sums / jnp.sum(weights * image, (-2, -1))
