"""Synthetic movies of blinking molecules over an uneven background, and their truth."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Key, PRNGKeyArray, UInt16

from .._estimators.checks import checked_count, checked_number, checked_numbers, is_traced
from .light import (
    blinking_molecules,
    cell_inside,
    drifting_haze,
    read_out,
    RealScalar,
    render_molecules,
    uneven_field,
)


# The limits of float32, in which numbers are used.
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_ANY, _POSITIVE = (0.0, _HUGE), (_TINY, _HUGE)
# The smallest and the largest value of each number, for molecules and for all the rest.
_MOLECULE_LIMITS = {
    "molecules_per_frame": _ANY,
    "photons_per_frame": _ANY,
    "photons_spread": _ANY,
    "on_time_frames": _POSITIVE,
}
_LIMITS = {
    "psf_sigma_pix": _POSITIVE,
    "bkgd_photons": _ANY,
    "bkgd_contrast": _ANY,
    "bkgd_length_scale_pix": _POSITIVE,
    "cell_contrast": (0.0, 1.0),
    "haze_photons": _ANY,
    "haze_sigma_pix": _POSITIVE,
    "bkgd_remaining": (_TINY, 1.0),
    "gain_electrons_per_adu": _POSITIVE,
    "offset_adu": _ANY,
    "read_noise_electrons": _ANY,
    "em_gain": (1.0, _HUGE),
}


class SimulatedTruth(eqx.Module):
    """What a simulated movie was made from.

    `bkgds_adu` is the expected background of every frame in ADU above the camera's
    offset, `(frames, height, width)`; with channels, a tuple with one for each.

    The molecules are flat arrays, with one event for each molecule and frame in which
    it shines, in the order of the frames. Their length is static: every frame has the
    same number of places, and those that it does not need have `is_on` False and zeros
    for position and photons.

    - `frame`: the index of the event's frame, from 0.
    - `y_pix`, `x_pix`: the molecule's place in pixels, along height and width. Pixel
        centres are at integers, the first at 0: a molecule is inside the frame from -0.5
        to `height_pix - 0.5` and `width_pix - 0.5`. Those whose light reaches in from
        outside are listed as well.
    - `photons`: the photons (photoelectrons) expected from the molecule during that
        frame, before photon noise, in all channels together and those that fall beside
        the frame included.
    - `is_on`: whether there is an event in this place.
    """

    bkgds_adu: Any
    frame: Int32[Array, " events"]
    y_pix: Float32[Array, " events"]
    x_pix: Float32[Array, " events"]
    photons: Float32[Array, " events"]
    is_on: Bool[Array, " events"]


def simulate_movie(
    key: PRNGKeyArray,
    *,
    frame_count: int = 100,
    height_pix: int = 128,
    width_pix: int = 128,
    molecules_per_frame: int | float = 20.0,
    photons_per_frame: int | float = 700.0,
    photons_spread: int | float = 0.0,
    on_time_frames: int | float = 2.0,
    psf_sigma_pix: int | float = 1.3,
    bkgd_photons: int | float = 60.0,
    bkgd_contrast: int | float = 0.3,
    bkgd_length_scale_pix: int | float = 20.0,
    cell_contrast: int | float = 0.0,
    haze_photons: int | float = 0.0,
    haze_sigma_pix: int | float = 15.0,
    bkgd_remaining: int | float = 1.0,
    gain_electrons_per_adu: int | float = 0.46,
    offset_adu: int | float = 100.0,
    read_noise_electrons: int | float = 1.5,
    em_gain: int | float = 1.0,
    channel_shares: Sequence[int | float] | None = None,
) -> tuple[Any, SimulatedTruth]:
    """A movie of blinking molecules over an uneven background, and its truth.

    Molecules lie anywhere with equal probability, also just outside the frame, switch on
    at any instant, and stay on for an exponentially distributed time; the first frame
    finds them in their steady state. A molecule that is on during a part of a frame
    sends that part of its photons. The background is log-normal, has the same mean
    everywhere, and does not repeat (a sum of random plane waves: Shinozuka and Deodatis,
    Appl. Mech. Rev. 44, 191, 1991); a cell, haze and bleaching can be added to it. One
    photon gives one electron, and ADU = electrons / gain + offset, rounded and clipped
    to 0..65535.

    Other numbers in the same sizes are not compiled again, except for
    `molecules_per_frame`, `on_time_frames`, a PSF that reaches over another number of
    pixels, and haze or EM gain where there were none.

    **Arguments:**

    - `key`: a JAX random key, of `jax.random.key` or `jax.random.PRNGKey`.
    - `frame_count`, `height_pix`, `width_pix`: the size of the movie.
    - `molecules_per_frame`: how many molecules are on at an instant, on average, inside
        the frame. As many for each area lie as far as 5 sigmas of the PSF outside.
    - `photons_per_frame`: photons from a molecule that is on during a whole frame; the
        mean of all molecules.
    - `photons_spread`: standard deviation of that number from molecule to molecule,
        divided by its mean. It is log-normal, and stays the same while a molecule is on.
    - `on_time_frames`: mean time that a molecule stays on, in frames. A very long one
        gives molecules that neither appear nor vanish.
    - `psf_sigma_pix`: standard deviation of the Gaussian PSF, which is integrated over
        each pixel.
    - `bkgd_photons`: mean background per pixel and frame, in photons.
    - `bkgd_contrast`: standard deviation of the background over space, divided by its
        mean.
    - `bkgd_length_scale_pix`: the background's logarithm at two places that are d
        pixels apart has the correlation exp(-d^2 / (2 bkgd_length_scale_pix^2)).
    - `cell_contrast`: outside of a cell with a random outline, the background is
        multiplied by `1 - cell_contrast`. With 0 there is no cell, with 1 it is dark
        around it. The edge is a few pixels wide.
    - `haze_photons`: mean haze per pixel and frame, in photons, added to the background:
        Gaussians of sources out of focus, which drift by about their own width until the
        end of the movie.
    - `haze_sigma_pix`: standard deviation of these Gaussians, which should be many pixels.
    - `bkgd_remaining`: the share of background and haze that is left in the last frame,
        after exponential bleaching. Molecules do not fade.
    - `gain_electrons_per_adu`, `offset_adu`, `read_noise_electrons`: the camera; its
        defaults are those of a usual sCMOS camera. Read noise is a standard deviation.
    - `em_gain`: above 1 the camera is an EMCCD, whose register multiplies each electron
        by a random number of this mean, before read noise. In photons, 1 ADU is then
        `gain_electrons_per_adu / em_gain`. Multiplication doubles the variance of photon
        noise (Robbins and Hadwen, IEEE Trans. Electron Devices 50, 1227, 2003):
        [`jaxbkgd.snr`][] needs half of that as its `gain`.
    - `channel_shares`: for a movie with channels, the share of a molecule's photons that
        each gets, positive and 1 in sum, such as `(0.6, 0.4)`. Every channel has a
        background of its own, with the same parameters.

    **Returns:**

    The frames, 16-bit `(frames, height, width)`, and a `SimulatedTruth`. With
    `channel_shares` the frames are a tuple with one such stack for each channel.

    **Raises:**

    `TypeError` or `ValueError` for anything else than one key, whole sizes from 1 on, and
    real numbers that are known before `jax.jit`, finite, not negative, and positive where
    they divide; for shares that do not add up to 1, an EM gain below 1, and more molecules
    than 32-bit indices count.

    !!! Example

        ```python
        >>> import jax
        >>> frames, truth = simulate_movie(jax.random.key(0), frame_count=3)
        >>> frames.shape, frames.dtype
        ((3, 128, 128), dtype('uint16'))
        >>> photons = 0.46 * (frames - 100.0 - truth.bkgds_adu).sum()
        >>> is_inside = (abs(truth.y_pix - 63.5) < 64) & (abs(truth.x_pix - 63.5) < 64)
        >>> bool(0.9 < photons / truth.photons[is_inside].sum() < 1.1)
        True

        ```
    """
    arguments = dict(locals())
    key = _checked_key(key)
    sizes = {
        name: checked_count(name, arguments[name])
        for name in ("frame_count", "height_pix", "width_pix")
    }
    molecules, numbers = (
        {name: _checked_number(name, arguments[name], *limits[name]) for name in limits}
        for limits in (_MOLECULE_LIMITS, _LIMITS)
    )
    shares = (1.0,) if channel_shares is None else _checked_shares(channel_shares)

    molecules_key, *keys = jax.random.split(key, 1 + 4 * len(shares))
    margin_pix = math.ceil(5 * numbers["psf_sigma_pix"])
    events = _events(molecules_key, margin_pix=margin_pix, **sizes, **molecules)
    # Haze and EM gain are compiled for the movies that have them only.
    optional = {"haze_photons": numbers["haze_photons"] or None}
    optional["em_gain"] = numbers["em_gain"] if numbers["em_gain"] > 1 else None
    channels = [
        _channel(keys[4 * i : 4 * i + 4], events, share, numbers | optional, **sizes)
        for i, share in enumerate(shares)
    ]
    frames, bkgds_adu = zip(*channels, strict=True)
    if channel_shares is None:
        frames, bkgds_adu = frames[0], bkgds_adu[0]
    return frames, SimulatedTruth(bkgds_adu, **events)


@partial(
    jax.jit,
    static_argnames=(
        "margin_pix",
        "frame_count",
        "height_pix",
        "width_pix",
        "molecules_per_frame",
        "on_time_frames",
    ),
)
def _events(
    key, *, margin_pix, height_pix, width_pix, frame_count, molecules_per_frame, **molecules
):
    """The molecules of a `SimulatedTruth`, drawn in a frame with a margin on each side."""
    wide_height_pix = height_pix + 2 * margin_pix
    wide_width_pix = width_pix + 2 * margin_pix
    wider = wide_height_pix * wide_width_pix / (height_pix * width_pix)
    is_on, y_pix, x_pix, photons = blinking_molecules(
        key,
        frame_count=frame_count,
        height_pix=wide_height_pix,
        width_pix=wide_width_pix,
        molecules_per_frame=wider * molecules_per_frame,
        **molecules,
    )
    frame = jnp.arange(frame_count, dtype=jnp.int32)
    return {
        "frame": jnp.repeat(frame, is_on.shape[1]),
        "y_pix": jnp.where(is_on, y_pix - margin_pix, 0).ravel(),
        "x_pix": jnp.where(is_on, x_pix - margin_pix, 0).ravel(),
        "photons": photons.ravel(),
        "is_on": is_on.ravel(),
    }


@partial(jax.jit, static_argnames=("frame_count", "height_pix", "width_pix"))
def _channel(
    keys: list[Array],
    events: dict[str, Array],
    share: RealScalar,
    numbers: dict[str, Any],
    *,
    frame_count: int,
    **size: int,
) -> tuple[UInt16[Array, "frames height width"], Float32[Array, "frames height width"]]:
    """Frames, and their expected background in ADU."""
    field_key, camera_key, cell_key, haze_key = keys
    gain, em_gain = numbers["gain_electrons_per_adu"], numbers["em_gain"]
    field = uneven_field(
        field_key,
        contrast=numbers["bkgd_contrast"],
        length_scale_pix=numbers["bkgd_length_scale_pix"],
        **size,
    )
    outside = 1 - cell_inside(cell_key, **size)
    first_bkgd = numbers["bkgd_photons"] * field * (1 - numbers["cell_contrast"] * outside)
    electrons_per_photon = 1 if em_gain is None else em_gain

    def expose(frame: tuple[Array, ...]) -> tuple[Array, Array]:
        frame_key, time, *molecules = frame
        bkgd = first_bkgd
        if numbers["haze_photons"] is not None:
            sigma_pix = numbers["haze_sigma_pix"]
            haze = drifting_haze(haze_key, time, sigma_pix=sigma_pix, **size)
            bkgd += numbers["haze_photons"] * haze
        bkgd *= jnp.exp(time * jnp.log(numbers["bkgd_remaining"]))
        psf_sigma_pix = numbers["psf_sigma_pix"]
        signal = render_molecules(*molecules, psf_sigma_pix=psf_sigma_pix, **size)
        image = read_out(
            frame_key,
            bkgd + share * signal,
            gain_electrons_per_adu=gain,
            offset_adu=numbers["offset_adu"],
            read_noise_electrons=numbers["read_noise_electrons"],
            em_gain=em_gain,
        )
        return image, electrons_per_photon * bkgd / gain

    # One frame at a time keeps memory small, and the loop of the Poisson sampler, which
    # runs until each pixel has its count, in the cache.
    molecules = (
        events[name].reshape(frame_count, -1) for name in ("y_pix", "x_pix", "photons")
    )
    frame_keys = jax.random.split(camera_key, frame_count)
    time = jnp.linspace(0, 1, frame_count, dtype=jnp.float32)
    return lax.map(expose, (frame_keys, time, *molecules))


def _checked_key(key: Any) -> Key[Array, ""]:
    remedy = "make one with jax.random.key(0)"
    is_typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    single = () if is_typed else jax.random.PRNGKey(0).shape
    if not (is_typed or getattr(key, "dtype", None) == np.uint32):
        raise TypeError(f"key must be a JAX random key, but is {key!r}; {remedy}.")
    if key.shape != single:
        raise ValueError(
            f"key must be one key, of shape {single}, but has shape {key.shape}; {remedy}, "
            "or for many movies use jax.vmap over the keys of jax.random.split."
        )
    key = key if is_typed else jax.random.wrap_key_data(key)
    # JAX draws Poisson numbers from keys of this kind alone.
    return jax.random.wrap_key_data(
        jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32"
    )


def _checked_number(name: str, value: Any, smallest: float, largest: float) -> float:
    if is_traced(value):
        raise TypeError(f"{name} must be known before jax.jit, but is traced.")
    return checked_number(
        name, value, minimum=smallest, includes_minimum=True, maximum=largest
    )


def _checked_shares(channel_shares: Any) -> tuple[float, ...]:
    shares = checked_numbers("channel_shares", channel_shares)
    if not math.isclose(sum(shares), 1, rel_tol=1e-6):
        raise ValueError(
            f"channel_shares must add up to 1, but are {shares}; for two channels give two "
            "numbers, such as (0.6, 0.4), and for a movie without channels None."
        )
    return shares
