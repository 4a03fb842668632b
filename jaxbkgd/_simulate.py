"""Synthetic movies of blinking molecules over an uneven background, and their truth."""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Key, PRNGKeyArray, UInt16


RealScalar = float | Float[Array, ""]

# Plane waves in a background: its values are normal to within a kurtosis of 1.5 / 1024.
_WAVE_COUNT = 1024
# An array of molecules is too short for what is drawn once in e^21, or 1e9, times.
_LOG_ODDS_OF_FIT = 21


class Truth(eqx.Module):
    """What a simulated movie was made from.

    `bkgds_adu` is the expected background in ADU above the camera's offset.

    The molecules are flat arrays, with one event for each molecule and frame in which
    it shines, in the order of the frames. Their length is static: every frame has the
    same number of places, and those that it does not need have `is_on` False and zeros
    for position and photons. `photons` counts the photons (photoelectrons) expected
    from the molecule during that frame, before photon noise, those that fall beside
    the frame included. Pixel centres are at integers, the first at 0.
    """

    bkgds_adu: Float32[Array, "frames height width"]
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
    on_time_frames: int | float = 2.0,
    psf_sigma_pix: int | float = 1.3,
    bkgd_photons: int | float = 60.0,
    bkgd_contrast: int | float = 0.3,
    bkgd_length_scale_pix: int | float = 20.0,
    gain_electrons_per_adu: int | float = 0.46,
    offset_adu: int | float = 100.0,
    read_noise_electrons: int | float = 1.5,
) -> tuple[UInt16[Array, "frames height width"], Truth]:
    """A movie of blinking molecules over an uneven background, and its truth.

    Molecules lie anywhere in the frame with equal probability, switch on at any
    instant, and stay on for an exponentially distributed time; the first frame finds
    them in their steady state. A molecule that is on during a part of a frame sends
    that part of `photons_per_frame`. The background is log-normal and steady, has the
    same mean everywhere, and does not repeat. One photon gives one electron, and
    ADU = electrons / gain + offset, rounded and clipped to 0..65535.

    **Arguments:**

    - `key`: a JAX random key, of `jax.random.key` or `jax.random.PRNGKey`.
    - `frame_count`, `height_pix`, `width_pix`: the size of the movie.
    - `molecules_per_frame`: how many molecules are on at an instant, on average, in the
        whole frame.
    - `photons_per_frame`: photons from a molecule that is on during a whole frame.
    - `on_time_frames`: mean time that a molecule stays on, in frames. A very long one
        gives molecules that neither appear nor vanish.
    - `psf_sigma_pix`: standard deviation of the Gaussian PSF, which is integrated over
        each pixel.
    - `bkgd_photons`: mean background per pixel and frame, in photons.
    - `bkgd_contrast`: standard deviation of the background over space, divided by its
        mean.
    - `bkgd_length_scale_pix`: the background's logarithm at two places that are d
        pixels apart has the correlation exp(-d^2 / (2 bkgd_length_scale_pix^2)).
    - `gain_electrons_per_adu`, `offset_adu`, `read_noise_electrons`: the camera; its
        defaults are those of a usual sCMOS camera. Read noise is a standard deviation.

    **Returns:**

    The frames, and a `Truth`.

    **Raises:**

    - `TypeError`: something else than a key, a size that is no integer, or a parameter
        that is no Python or NumPy number.
    - `ValueError`: a batch of keys, a size below 1, a parameter that is negative, NaN
        or infinite, a length, time or gain of zero, or more molecules than 32-bit
        indices count.

    !!! Example

        ```python
        >>> import jax
        >>> frames, truth = simulate_movie(jax.random.key(0), frame_count=3)
        >>> frames.shape, frames.dtype
        ((3, 128, 128), dtype('uint16'))
        >>> residuals = frames - 100.0 - truth.bkgds_adu
        >>> photons = 0.46 * residuals.sum() / truth.photons.sum()
        >>> bool(0.9 < photons < 1.1)
        True

        ```
    """
    key = _checked_key(key)
    sizes = {
        name: _checked_size(name, value)
        for name, value in {
            "frame_count": frame_count,
            "height_pix": height_pix,
            "width_pix": width_pix,
        }.items()
    }
    positive = {
        name: _checked_number(name, value, is_zero_allowed=False)
        for name, value in {
            "on_time_frames": on_time_frames,
            "psf_sigma_pix": psf_sigma_pix,
            "bkgd_length_scale_pix": bkgd_length_scale_pix,
            "gain_electrons_per_adu": gain_electrons_per_adu,
        }.items()
    }
    non_negative = {
        name: _checked_number(name, value, is_zero_allowed=True)
        for name, value in {
            "molecules_per_frame": molecules_per_frame,
            "photons_per_frame": photons_per_frame,
            "bkgd_photons": bkgd_photons,
            "bkgd_contrast": bkgd_contrast,
            "offset_adu": offset_adu,
            "read_noise_electrons": read_noise_electrons,
        }.items()
    }
    return _simulate(key, **sizes, **positive, **non_negative)


@partial(
    jax.jit,
    static_argnames=(
        "frame_count",
        "height_pix",
        "width_pix",
        "molecules_per_frame",
        "on_time_frames",
    ),
)
def _simulate(
    key,
    *,
    frame_count,
    height_pix,
    width_pix,
    molecules_per_frame,
    photons_per_frame,
    on_time_frames,
    psf_sigma_pix,
    bkgd_photons,
    bkgd_contrast,
    bkgd_length_scale_pix,
    gain_electrons_per_adu,
    offset_adu,
    read_noise_electrons,
):
    molecules_key, bkgd_key, camera_key = jax.random.split(key, 3)
    is_on, y_pix, x_pix, photons = blinking_molecules(
        molecules_key,
        frame_count=frame_count,
        height_pix=height_pix,
        width_pix=width_pix,
        molecules_per_frame=molecules_per_frame,
        photons_per_frame=photons_per_frame,
        on_time_frames=on_time_frames,
    )
    bkgd = bkgd_photons * uneven_field(
        bkgd_key,
        height_pix=height_pix,
        width_pix=width_pix,
        contrast=bkgd_contrast,
        length_scale_pix=bkgd_length_scale_pix,
    )

    def expose(frame):
        frame_key, *molecules = frame
        signal = render_molecules(
            *molecules,
            psf_sigma_pix=psf_sigma_pix,
            height_pix=height_pix,
            width_pix=width_pix,
        )
        return read_out(
            frame_key,
            bkgd + signal,
            gain_electrons_per_adu=gain_electrons_per_adu,
            offset_adu=offset_adu,
            read_noise_electrons=read_noise_electrons,
        )

    # Frame by frame, so that memory stays small and the loop of the Poisson sampler,
    # which runs until the last pixel of a frame has its count, stays in the cache.
    frame_keys = jax.random.split(camera_key, frame_count)
    frames = lax.map(expose, (frame_keys, y_pix, x_pix, photons))
    frame = jnp.arange(frame_count, dtype=jnp.int32)
    truth = Truth(
        bkgds_adu=jnp.broadcast_to(bkgd / gain_electrons_per_adu, frames.shape),
        frame=jnp.repeat(frame, is_on.shape[1]),
        y_pix=y_pix.ravel(),
        x_pix=x_pix.ravel(),
        photons=photons.ravel(),
        is_on=is_on.ravel(),
    )
    return frames, truth


def blinking_molecules(
    key: Key[Array, ""],
    *,
    frame_count: int,
    height_pix: int,
    width_pix: int,
    molecules_per_frame: float,
    photons_per_frame: RealScalar,
    on_time_frames: float,
) -> tuple[
    Bool[Array, "frames places"],
    Float32[Array, "frames places"],
    Float32[Array, "frames places"],
    Float32[Array, "frames places"],
]:
    """Whether a molecule shines in each place of each frame, its y, x and photons.

    Molecules switch on as a Poisson process in time. Its steady state at the start of
    the movie is a Poisson number of molecules that are on already, and since
    exponential times have no memory, what is left of theirs has the same distribution.
    """
    molecule_capacity, event_capacity, place_count = _capacities(
        frame_count, molecules_per_frame, on_time_frames
    )
    count_key, frame_key, uniform_key = jax.random.split(key, 3)
    late_mean = molecules_per_frame * frame_count / on_time_frames
    means = jnp.array([molecules_per_frame, late_mean], jnp.float32)
    early_count, late_count = jax.random.poisson(count_key, means, dtype=jnp.int32)
    uniform_y, uniform_x, phase, survival = jax.random.uniform(
        uniform_key, (4, molecule_capacity), jnp.float32
    )
    y_pix = height_pix * uniform_y - 0.5
    x_pix = width_pix * uniform_x - 0.5

    # The frame and the moment within it are drawn apart, so that a long movie does not
    # use up the digits of a float32.
    molecule = jnp.arange(molecule_capacity, dtype=jnp.int32)
    is_early = molecule < early_count
    frame = jax.random.randint(frame_key, molecule.shape, 0, frame_count, jnp.int32)
    first_frame = jnp.where(is_early, 0, frame)
    start = jnp.where(is_early, 0, phase)
    end = start - on_time_frames * jnp.log1p(-survival)
    event_counts = jnp.minimum(jnp.ceil(end), frame_count - first_frame)
    is_real = molecule < early_count + late_count
    event_counts = jnp.where(is_real, event_counts, 0).astype(jnp.int32)

    # One event for each molecule and frame that it shines in.
    events_end = jnp.cumsum(event_counts)
    event = jnp.arange(event_capacity, dtype=jnp.int32)
    molecule = jnp.searchsorted(events_end, event, side="right")
    molecule = jnp.minimum(molecule, molecule_capacity - 1)
    elapsed = event - (events_end - event_counts)[molecule]
    frame = jnp.where(event < events_end[-1], first_frame[molecule] + elapsed, -1)
    on_part = jnp.minimum(end[molecule], elapsed + 1)
    on_part = on_part - jnp.maximum(start[molecule], elapsed)

    # The events of each frame, in that frame's places.
    order = jnp.argsort(frame)
    frames = jnp.arange(frame_count, dtype=jnp.int32)[:, None]
    place = jnp.searchsorted(frame[order], frames) + jnp.arange(place_count)
    event = jnp.take(order, place, mode="clip")
    is_on = (place < event_capacity) & (frame[event] == frames)
    molecule = molecule[event]
    return (
        is_on,
        jnp.where(is_on, y_pix[molecule], 0),
        jnp.where(is_on, x_pix[molecule], 0),
        jnp.where(is_on, photons_per_frame * on_part[event], 0),
    )


def _capacities(frame_count, molecules_per_frame, on_time_frames):
    """Places for all molecules, for all events, and for the events of one frame.

    Each is too small once in a billion times, by Bernstein's inequality for sums with
    exponential tails (Boucheron, Lugosi and Massart, "Concentration inequalities",
    2013, theorem 2.10). What finds no place is in neither frames nor truth.
    """

    def capacity(mean, variance, tail):
        return mean + math.sqrt(2 * _LOG_ODDS_OF_FIT * variance) + _LOG_ODDS_OF_FIT * tail

    per_frame = molecules_per_frame * (1 + 1 / on_time_frames)
    molecules = molecules_per_frame * (1 + frame_count / on_time_frames)
    longest = min(on_time_frames + 1, frame_count)
    molecule_capacity = capacity(molecules, molecules, 1)
    event_capacity = min(
        capacity(per_frame * frame_count, 2 * molecules * longest**2, longest),
        molecule_capacity * frame_count,
    )
    place_count = capacity(per_frame, per_frame, 1)
    if not max(event_capacity, place_count * frame_count) < 2**31:
        raise ValueError(
            f"molecules_per_frame = {molecules_per_frame} with on_time_frames = "
            f"{on_time_frames} and frame_count = {frame_count} needs places for "
            f"{place_count * frame_count:.3g} events, and there may be no more than "
            "2^31. Simulate fewer molecules or frames, or a longer on-time."
        )
    return (
        math.ceil(molecule_capacity),
        math.ceil(event_capacity),
        math.ceil(place_count),
    )


def uneven_field(
    key: Key[Array, ""],
    *,
    height_pix: int,
    width_pix: int,
    contrast: RealScalar,
    length_scale_pix: RealScalar,
) -> Float32[Array, "height width"]:
    """A positive random field of mean 1: exp of a Gaussian field, log-normal.

    The Gaussian field is a sum of plane waves with random phases, whose wave vectors
    are drawn from the power spectrum of its covariance (Shinozuka and Deodatis, Appl.
    Mech. Rev. 44, 191, 1991; Rahimi and Recht, NIPS 2007). It has no period.
    """
    wave_key, phase_key = jax.random.split(key)
    waves = jax.random.normal(wave_key, (2, _WAVE_COUNT), jnp.float32)
    wave_y, wave_x = waves / length_scale_pix
    phase = jax.random.uniform(phase_key, (_WAVE_COUNT,), jnp.float32, maxval=2 * math.pi)
    angle_y = jnp.arange(height_pix, dtype=jnp.float32)[:, None] * wave_y + phase
    angle_x = jnp.arange(width_pix, dtype=jnp.float32)[:, None] * wave_x
    # cos(a + b) makes the sum over all waves a product of two matrices.
    field = jnp.matmul(
        jnp.concatenate([jnp.cos(angle_y), -jnp.sin(angle_y)], axis=1),
        jnp.concatenate([jnp.cos(angle_x), jnp.sin(angle_x)], axis=1).T,
        precision="highest",
    ) * math.sqrt(2 / _WAVE_COUNT)
    log_variance = jnp.logaddexp(0, 2 * jnp.log(contrast))
    return jnp.exp(jnp.sqrt(log_variance) * field - log_variance / 2)


def render_molecules(
    y_pix: Float32[Array, " molecules"],
    x_pix: Float32[Array, " molecules"],
    photons: Float32[Array, " molecules"],
    *,
    psf_sigma_pix: RealScalar,
    height_pix: int,
    width_pix: int,
) -> Float32[Array, "height width"]:
    """Photons expected in each pixel of a frame, from pixel-integrated Gaussians."""

    def pixel_integrals(centre_pix, size_pix):
        edges_pix = jnp.arange(size_pix + 1, dtype=jnp.float32) - 0.5
        distance = (edges_pix - centre_pix[:, None]) / (math.sqrt(2) * psf_sigma_pix)
        return jnp.diff(lax.erf(distance)) / 2

    return jnp.matmul(
        pixel_integrals(y_pix, height_pix).T,
        photons[:, None] * pixel_integrals(x_pix, width_pix),
        precision="highest",
    )


def read_out(
    key: Key[Array, ""],
    photons: Float32[Array, "height width"],
    *,
    gain_electrons_per_adu: RealScalar,
    offset_adu: RealScalar,
    read_noise_electrons: RealScalar,
) -> UInt16[Array, "height width"]:
    """The frame that a camera writes where `photons` are expected."""
    photon_key, read_key = jax.random.split(key)
    noise = jax.random.normal(read_key, photons.shape, jnp.float32)
    # Counts are 32-bit integers. A camera has saturated long before their end.
    electrons = jax.random.poisson(photon_key, jnp.minimum(photons, 1e9), dtype=jnp.int32)
    electrons += read_noise_electrons * noise
    adu = jnp.round(electrons / gain_electrons_per_adu + offset_adu)
    return jnp.clip(adu, 0, 65535).astype(jnp.uint16)


def _checked_key(key) -> Key[Array, ""]:
    remedy = "Make one with jax.random.key(0)."
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (is_typed or dtype == jnp.uint32):
        raise TypeError(f"key is {key!r}, and must be a JAX random key. {remedy}")
    single = () if is_typed else jax.random.PRNGKey(0).shape
    if key.shape != single:
        raise ValueError(
            f"key has shape {key.shape}, and must be one key, of shape {single}. "
            f"{remedy} For many movies, jax.vmap over the keys of jax.random.split."
        )
    key = key if is_typed else jax.random.wrap_key_data(key)
    # Other kinds of key have no Poisson numbers in JAX.
    return jax.random.wrap_key_data(
        jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32"
    )


def _checked_size(name, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}, and must be an integer: give an int.")
    if value < 1:
        raise ValueError(f"{name} is {value}, and must be 1 or more: ask for at least 1.")
    return int(value)


def _checked_number(name, value, *, is_zero_allowed) -> float:
    if isinstance(value, bool) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise TypeError(
            f"{name} is {value!r}, and must be a real number that is known before jit: "
            "give an int or a float."
        )
    # Python floats, for a large int does not compare with NumPy's.
    largest = float(np.finfo(np.float32).max)
    smallest = 0.0 if is_zero_allowed else float(np.finfo(np.float32).tiny)
    if not smallest <= value <= largest:
        rule = "zero or positive" if is_zero_allowed else "positive"
        raise ValueError(
            f"{name} is {value}, and must be {rule} and finite, in float32: "
            f"give a number between {smallest:.8g} and {largest:.8g}."
        )
    return float(value)
