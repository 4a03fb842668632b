"""The light of a simulated movie: molecules, uneven backgrounds, and the camera."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Key, UInt16


RealScalar = float | Float[Array, ""]

# Plane waves in a background: its values are normal to within a kurtosis of 1.5 / 1024.
_WAVE_COUNT = 1024
# Arrays of molecules are too short once in e^21, or 1e9, movies.
_LOG_ODDS_OF_FIT = 21


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
    is_early = molecule < early_count
    frame = jax.random.randint(frame_key, molecule.shape, 0, frame_count, jnp.int32)
    first_frame = jnp.where(is_early, 0, frame)
    start = jnp.where(is_early, 0, phase)
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
    """Places for all molecules, for all events, and for the events of one frame.

    Each is too small once in a billion times, by Bernstein's inequality for sums with
    exponential tails (Boucheron, Lugosi and Massart, "Concentration inequalities",
    2013, theorem 2.10). What finds no place is in neither frames nor truth.
    """

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
            f"molecules_per_frame = {molecules_per_frame:.8g}, with those just outside "
            f"the frame, with on_time_frames = {on_time_frames} and frame_count = "
            f"{frame_count} needs places for {place_count * frame_count:.3g} events, and "
            "there may be no more than 2^31. Simulate fewer molecules or frames, a longer "
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


def cell_inside(
    key: Key[Array, ""], *, height_pix: int, width_pix: int
) -> Float32[Array, "height width"]:
    """1 inside of a cell, 0 outside; nine tenths of the step lie within 6 px.

    The cell covers some 40 % of the frame. Around a centre near the frame's, the
    logarithm of its radius is a trigonometric polynomial with normal coefficients.
    """
    centre_key, outline_key = jax.random.split(key)
    centre = jax.random.uniform(centre_key, (2,), jnp.float32, 0.35, 0.65)
    y_pix = jnp.arange(height_pix, dtype=jnp.float32) - (height_pix * centre[0] - 0.5)
    x_pix = jnp.arange(width_pix, dtype=jnp.float32) - (width_pix * centre[1] - 0.5)
    y_pix, x_pix = jnp.meshgrid(y_pix, x_pix, indexing="ij")
    angle = jnp.arctan2(y_pix, x_pix)
    log_radius = jnp.zeros_like(angle)
    for order, (cosine, sine) in enumerate(
        jax.random.normal(outline_key, (4, 2), jnp.float32), start=2
    ):
        wave = cosine * jnp.cos(order * angle) + sine * jnp.sin(order * angle)
        log_radius += 0.3 / order * wave
    edge_pix = 0.35 * math.sqrt(height_pix * width_pix) * jnp.exp(log_radius)
    return jax.nn.sigmoid(edge_pix - jnp.hypot(y_pix, x_pix))


def drifting_haze(
    key: Key[Array, ""],
    time: RealScalar,
    *,
    height_pix: int,
    width_pix: int,
    sigma_pix: RealScalar,
) -> Float32[Array, "height width"]:
    """Light of out-of-focus sources, of mean 1, as `time` goes from 0 to 1.

    Every source is a Gaussian of `sigma_pix`. Until the end it moves along each axis by
    a normal distance of standard deviation `sigma_pix`.
    """
    source_count = 16 + height_pix * width_pix // 512
    place_key, drift_key = jax.random.split(key)
    place = jax.random.uniform(place_key, (2, source_count), jnp.float32)
    drift = jax.random.normal(drift_key, (2, source_count), jnp.float32)

    def profiles(size_pix: int, place: Array, drift: Array) -> Array:
        # In units of sigma. Sources lie as far as 4 outside the frame.
        extent = size_pix / sigma_pix + 8
        centre = extent * place - 4 + (time - 0.5) * drift
        pixel = (jnp.arange(size_pix, dtype=jnp.float32) + 0.5) / sigma_pix
        distance = pixel[None] - centre[:, None]
        density = jnp.exp(-(distance**2) / 2) / math.sqrt(2 * math.pi)
        return extent * density

    profiles_y = profiles(height_pix, place[0], drift[0])
    profiles_x = profiles(width_pix, place[1], drift[1])
    return jnp.matmul(profiles_y.T, profiles_x, precision="highest") / source_count


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

    def pixel_integrals(centre_pix: Array, size_pix: int) -> Array:
        edges_pix = jnp.arange(size_pix + 1, dtype=jnp.float32) - 0.5
        distance = (edges_pix[None] - centre_pix[:, None]) / (math.sqrt(2) * psf_sigma_pix)
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
    em_gain: RealScalar | None,
) -> UInt16[Array, "height width"]:
    """The frame that a camera writes where `photons` are expected.

    In the register of an EMCCD each electron becomes an exponential number of them
    (Basden, Haniff and Mackay, Mon. Not. R. Astron. Soc. 345, 985, 2003).
    """
    photon_key, read_key, em_key = jax.random.split(key, 3)
    noise = jax.random.normal(read_key, photons.shape, jnp.float32)
    # Counts are 32-bit integers. A camera has saturated long before their end.
    electrons = jax.random.poisson(photon_key, jnp.minimum(photons, 1e9), dtype=jnp.int32)
    electrons = electrons.astype(jnp.float32)
    if em_gain is not None:
        # The sum of n exponential numbers has a gamma distribution; for n = 0 it is zero.
        electrons = em_gain * jax.random.gamma(em_key, electrons, dtype=jnp.float32)
    electrons += read_noise_electrons * noise
    adu = jnp.round(electrons / gain_electrons_per_adu + offset_adu)
    return jnp.clip(adu, 0, 65535).astype(jnp.uint16)
