"""Synthetic movies of blinking molecules over an uneven background, and their truth."""

import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Key, PRNGKeyArray, UInt16

from ._estimators.checks import checked_count, checked_number, is_traced


RealScalar = float | Float[Array, ""]
Places = Float32[Array, "frames places"]
Image = Float32[Array, "height width"]

# Plane waves in a background: its values are normal to within a kurtosis of 1.5 / 1024.
_WAVE_COUNT = 1024
# Arrays of molecules are too short once in e^21, or 1e9, movies.
_LOG_ODDS_OF_FIT = 21
# The limits of float32, in which numbers are used.
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_ABOVE_ZERO = {
    *("on_time_frames", "psf_sigma_pix", "bkgd_length_scale_pix", "bkgd_remaining"),
    "gain_electrons_per_adu",
}
_COUNTS = ("frame_count", "height_pix", "width_pix")
_PER_FRAME = ("molecules_per_frame", "on_time_frames")


class SimulatedTruth(eqx.Module):
    """The truth from which a simulated movie was made.

    `bkgds_adu` is the expected background of every frame in ADU above the camera's offset.

    The molecules are flat arrays, with one event for each molecule and frame in which it
    shines, in the order of the frames. Every frame has the same number of places; those
    that it does not need have `is_on` False and zeros for position and photons.

    - `frame`, `y_pix`, `x_pix`: the event's frame and place. Pixel centres are at integers
        from 0. Molecules whose light reaches in from outside the frame are listed, too.
    - `photons`: the photons (photoelectrons) expected from the molecule during that frame,
        with those that fall beside the frame.
    - `is_on`: whether there is an event in this place.
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
    photons_spread: int | float = 0.0,
    on_time_frames: int | float = 2.0,
    psf_sigma_pix: int | float = 1.3,
    bkgd_photons: int | float = 60.0,
    bkgd_contrast: int | float = 0.3,
    bkgd_length_scale_pix: int | float = 20.0,
    bkgd_remaining: int | float = 1.0,
    gain_electrons_per_adu: int | float = 0.46,
    offset_adu: int | float = 100.0,
    read_noise_electrons: int | float = 1.5,
) -> tuple[UInt16[Array, "frames height width"], SimulatedTruth]:
    """A movie of blinking molecules over an uneven background, and its truth.

    Molecules lie anywhere, also just outside the frame, switch on at any instant, and stay
    on for an exponential time; the first frame finds them in their steady state. The
    background is log-normal with the same mean everywhere. One photon gives one electron,
    and ADU = electrons / gain + offset, rounded and clipped to 0..65535. Each new size, PSF
    width, `molecules_per_frame` or `on_time_frames` is compiled.

    **Arguments:**

    - `key`: a JAX random key, of `jax.random.key` or `jax.random.PRNGKey`.
    - `frame_count`, `height_pix`, `width_pix`: the size of the movie.
    - `molecules_per_frame`: the mean number of molecules that are on inside the frame.
        As many for each area lie as far as 5 sigmas of the PSF outside.
    - `photons_per_frame`: mean photons from a molecule that is on during a whole frame.
    - `photons_spread`: standard deviation of that number from molecule to molecule,
        divided by its mean. It is log-normal, and stays the same while a molecule is on.
    - `on_time_frames`: mean time that a molecule stays on, in frames.
    - `psf_sigma_pix`: standard deviation of the pixel-integrated Gaussian PSF.
    - `bkgd_photons`: mean background per pixel and frame, in photons.
    - `bkgd_contrast`: its standard deviation over space, divided by its mean.
    - `bkgd_length_scale_pix`: the background's logarithm at two places that are d
        pixels apart has the correlation exp(-d^2 / (2 bkgd_length_scale_pix^2)).
    - `bkgd_remaining`: the share of the background that is left in the last frame, after
        exponential bleaching. Molecules do not fade.
    - `gain_electrons_per_adu`, `offset_adu`, `read_noise_electrons`: the camera, by default
        a usual sCMOS camera. Read noise is a standard deviation.

    **Returns:**

    The frames, 16-bit `(frames, height, width)`, and a `SimulatedTruth`.

    **Raises:**

    `TypeError` or `ValueError` for a key, size or number that is none or out of its range,
    numbers that `jax.jit` traces, and more molecules than 32-bit indices count.

    !!! Example

        ```python
        >>> import jax
        >>> frames, truth = simulate_movie(jax.random.key(0), frame_count=30)
        >>> frames.shape, frames.dtype
        ((30, 128, 128), dtype('uint16'))
        >>> photons = 0.46 * (frames - 100.0 - truth.bkgds_adu).sum()
        >>> is_inside = (abs(truth.y_pix - 63.5) < 64) & (abs(truth.x_pix - 63.5) < 64)
        >>> bool(0.9 < photons / truth.photons[is_inside].sum() < 1.1)
        True

        ```
    """
    numbers = dict(locals())
    key = _checked_key(numbers.pop("key"))
    sizes = {name: checked_count(name, numbers.pop(name)) for name in _COUNTS}
    for name, value in numbers.items():
        if is_traced(value):
            raise TypeError(f"{name} must be known before jax.jit, but is traced.")
        minimum = _TINY if name in _ABOVE_ZERO else 0.0
        maximum = 1.0 if name == "bkgd_remaining" else _HUGE
        numbers[name] = checked_number(
            name, value, minimum=minimum, includes_minimum=True, maximum=maximum
        )
    sizes |= {name: numbers.pop(name) for name in _PER_FRAME}
    margin_pix = math.ceil(5 * numbers["psf_sigma_pix"])
    return _simulate(key, numbers, margin_pix=margin_pix, **sizes)


@partial(jax.jit, static_argnames=("margin_pix", *_COUNTS, *_PER_FRAME))
def _simulate(
    key: Key[Array, ""],
    numbers: dict[str, RealScalar],
    *,
    margin_pix: int,
    frame_count: int,
    height_pix: int,
    width_pix: int,
    molecules_per_frame: float,
    on_time_frames: float,
) -> tuple[UInt16[Array, "frames height width"], SimulatedTruth]:
    molecules_key, field_key, camera_key = jax.random.split(key, 3)
    size = {"height_pix": height_pix, "width_pix": width_pix}
    # The molecules lie in a frame with a margin on each side.
    wide = {name: pixels + 2 * margin_pix for name, pixels in size.items()}
    wider = math.prod(wide.values()) / (height_pix * width_pix)
    is_on, y_pix, x_pix, photons = blinking_molecules(
        molecules_key,
        frame_count=frame_count,
        molecules_per_frame=wider * molecules_per_frame,
        photons_per_frame=numbers["photons_per_frame"],
        on_time_frames=on_time_frames,
        photons_spread=numbers["photons_spread"],
        **wide,
    )
    y_pix = jnp.where(is_on, y_pix - margin_pix, 0)
    x_pix = jnp.where(is_on, x_pix - margin_pix, 0)
    contrast, scale_pix = numbers["bkgd_contrast"], numbers["bkgd_length_scale_pix"]
    field = uneven_field(field_key, contrast=contrast, length_scale_pix=scale_pix, **size)
    gain, psf_sigma_pix = numbers["gain_electrons_per_adu"], numbers["psf_sigma_pix"]

    def expose(frame: tuple[Array, ...]) -> tuple[Array, Array]:
        frame_key, time, *molecules = frame
        left = jnp.exp(time * jnp.log(numbers["bkgd_remaining"]))
        bkgd = numbers["bkgd_photons"] * left * field
        signal = render_molecules(*molecules, psf_sigma_pix=psf_sigma_pix, **size)
        photon_key, read_key = jax.random.split(frame_key)
        noise = jax.random.normal(read_key, bkgd.shape, jnp.float32)
        # Counts are 32-bit integers. A camera has saturated long before their end.
        photons = jnp.minimum(bkgd + signal, 1e9)
        electrons = jax.random.poisson(photon_key, photons, dtype=jnp.int32)
        electrons = electrons.astype(jnp.float32) + numbers["read_noise_electrons"] * noise
        adu = jnp.clip(jnp.round(electrons / gain + numbers["offset_adu"]), 0, 65535)
        return adu.astype(jnp.uint16), bkgd / gain

    # One frame at a time keeps memory small, and the loop of the Poisson sampler, which
    # runs until each pixel has its count, in the cache.
    frame_keys = jax.random.split(camera_key, frame_count)
    time = jnp.linspace(0, 1, frame_count, dtype=jnp.float32)
    frames, bkgds_adu = lax.map(expose, (frame_keys, time, y_pix, x_pix, photons))
    frame = jnp.repeat(jnp.arange(frame_count, dtype=jnp.int32), is_on.shape[1])
    return frames, SimulatedTruth(
        bkgds_adu, frame, y_pix.ravel(), x_pix.ravel(), photons.ravel(), is_on.ravel()
    )


def _checked_key(key: Any) -> Key[Array, ""]:
    remedy = "make one with jax.random.key(0)"
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32:
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key must be a JAX random key, but is {key!r}; {remedy}.")
    if key.shape != ():
        raise ValueError(
            f"key must be one key, but has shape {key.shape}; {remedy}, or for many movies "
            "use jax.vmap over the keys of jax.random.split."
        )
    # JAX draws Poisson numbers from keys of this kind alone.
    bits = jax.random.bits(key, (2,), jnp.uint32)
    return jax.random.wrap_key_data(bits, impl="threefry2x32")


def blinking_molecules(
    key: Key[Array, ""],
    *,
    frame_count: int,
    height_pix: int,
    width_pix: int,
    molecules_per_frame: float,
    photons_per_frame: RealScalar,
    on_time_frames: float,
    photons_spread: RealScalar = 0.0,
) -> tuple[Bool[Array, "frames places"], Places, Places, Places]:
    """Whether a molecule shines in each place of each frame, its y, x and photons.

    Molecules switch on as a Poisson process in time. At the start, a Poisson number of them
    is on already, for as long a time as others, since exponential times have no memory.
    """
    molecule_capacity, event_capacity, place_count = _capacities(
        frame_count, molecules_per_frame, on_time_frames
    )
    count_key, frame_key, uniform_key, photons_key = jax.random.split(key, 4)
    late_mean = molecules_per_frame * frame_count / on_time_frames
    means = jnp.array([molecules_per_frame, late_mean], jnp.float32)
    early_count, late_count = jax.random.poisson(count_key, means, dtype=jnp.int32)
    uniform_y, uniform_x, phase, survival = jax.random.uniform(
        uniform_key, (4, molecule_capacity), jnp.float32
    )
    y_pix = height_pix * uniform_y - 0.5
    x_pix = width_pix * uniform_x - 0.5
    normal = jax.random.normal(photons_key, (molecule_capacity,), jnp.float32)
    brightness = _log_normal(normal, photons_spread)

    # The frame and the moment within it are drawn apart, so that a long movie does not
    # use up the digits of a float32.
    molecule = jnp.arange(molecule_capacity, dtype=jnp.int32)
    frame = jax.random.randint(frame_key, molecule.shape, 0, frame_count, jnp.int32)
    first_frame = jnp.where(molecule < early_count, 0, frame)
    start = jnp.where(molecule < early_count, 0, phase)
    end = start - on_time_frames * jnp.log1p(-survival)
    frames_left = (frame_count - first_frame).astype(jnp.float32)
    is_real = molecule < early_count + late_count
    event_counts = jnp.where(is_real, jnp.minimum(jnp.ceil(end), frames_left), 0)
    event_counts = event_counts.astype(jnp.int32)

    # One event for each molecule and frame that it shines in.
    events_end = jnp.cumsum(event_counts)
    event = jnp.arange(event_capacity, dtype=jnp.int32)
    molecule = jnp.searchsorted(events_end, event, side="right")
    molecule = jnp.minimum(molecule, molecule_capacity - 1)
    elapsed = event - (events_end - event_counts)[molecule]
    frame = jnp.where(event < events_end[-1], first_frame[molecule] + elapsed, -1)
    on_part = jnp.minimum(end[molecule], (elapsed + 1).astype(jnp.float32))
    on_part -= jnp.maximum(start[molecule], elapsed.astype(jnp.float32))

    # The events of each frame, in that frame's places.
    order = jnp.argsort(frame)
    frames = jnp.arange(frame_count, dtype=jnp.int32)[:, None]
    places = jnp.arange(place_count, dtype=jnp.int32)[None]
    place = jnp.searchsorted(frame[order], frames) + places
    event = jnp.take(order, place, mode="clip")
    is_on = (place < event_capacity) & (frame[event] == frames)
    molecule = molecule[event]
    return (
        is_on,
        jnp.where(is_on, y_pix[molecule], 0),
        jnp.where(is_on, x_pix[molecule], 0),
        jnp.where(is_on, photons_per_frame * brightness[molecule] * on_part[event], 0),
    )


def _capacities(
    frame_count: int, molecules_per_frame: float, on_time_frames: float
) -> tuple[int, int, int]:
    """Places for all molecules, for all events, and for the events of one frame, each too
    few once in a billion times, by Bernstein's inequality for sums with exponential tails
    (Boucheron, Lugosi and Massart, "Concentration inequalities", 2013, theorem 2.10)."""

    def capacity(mean: float, variance: float, tail: int | float) -> float:
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
            f"A movie with {molecules_per_frame:.8g} molecules per frame, those outside "
            f"included, needs places for {place_count * frame_count:.3g} events, and there "
            "may be no more than 2^31. Simulate fewer molecules or frames, a longer "
            "on-time, or a smaller PSF."
        )
    return math.ceil(molecule_capacity), math.ceil(event_capacity), math.ceil(place_count)


def uneven_field(
    key: Key[Array, ""],
    *,
    height_pix: int,
    width_pix: int,
    contrast: RealScalar,
    length_scale_pix: RealScalar,
) -> Image:
    """A log-normal random field of mean 1: exp of a sum of plane waves with random phases,
    whose wave vectors are drawn from the power spectrum of its covariance (Shinozuka and
    Deodatis, Appl. Mech. Rev. 44, 191, 1991; Rahimi and Recht, NIPS 2007)."""
    wave_key, phase_key = jax.random.split(key)
    waves = jax.random.normal(wave_key, (2, _WAVE_COUNT), jnp.float32)
    wave_y, wave_x = waves / length_scale_pix
    phase = jax.random.uniform(phase_key, (_WAVE_COUNT,), jnp.float32, maxval=2 * math.pi)
    y_pix = jnp.arange(height_pix, dtype=jnp.float32)[:, None]
    x_pix = jnp.arange(width_pix, dtype=jnp.float32)[:, None]
    angle_y = y_pix * wave_y[None] + phase[None]
    angle_x = x_pix * wave_x[None]
    # cos(a + b) makes the sum over all waves a product of two matrices.
    field = jnp.matmul(
        jnp.concatenate([jnp.cos(angle_y), -jnp.sin(angle_y)], axis=1),
        jnp.concatenate([jnp.cos(angle_x), jnp.sin(angle_x)], axis=1).T,
        precision="highest",
    ) * math.sqrt(2 / _WAVE_COUNT)
    return _log_normal(field, contrast)


def _log_normal(normal: Float32[Array, "..."], spread: RealScalar) -> Array:
    """Log-normal values of mean 1 and standard deviation `spread` from normal ones."""
    log_variance = jnp.logaddexp(0, 2 * jnp.log(spread))
    return jnp.exp(jnp.sqrt(log_variance) * normal - log_variance / 2)


def render_molecules(
    y_pix: Float32[Array, " molecules"],
    x_pix: Float32[Array, " molecules"],
    photons: Float32[Array, " molecules"],
    *,
    psf_sigma_pix: RealScalar,
    height_pix: int,
    width_pix: int,
) -> Image:
    """Photons expected in each pixel of a frame, from pixel-integrated Gaussians."""

    def pixel_integrals(centre_pix: Array, size_pix: int) -> Array:
        edges_pix = jnp.arange(size_pix + 1, dtype=jnp.float32) - 0.5
        distance = (edges_pix[None] - centre_pix[:, None]) / (math.sqrt(2) * psf_sigma_pix)
        return jnp.diff(lax.erf(distance)) / 2

    return jnp.matmul(
        pixel_integrals(y_pix, height_pix).T,
        photons[:, None] * pixel_integrals(x_pix, width_pix),
        precision="highest",
    )
