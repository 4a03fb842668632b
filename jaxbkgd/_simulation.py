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
from jaxtyping import Array, Bool, Float, Float32, Int32, Key, PRNGKeyArray, UInt16


RealScalar = float | Float[Array, ""]

# Plane waves in a background: its values are normal to within a kurtosis of 1.5 / 1024.
_WAVE_COUNT = 1024
# An array of molecules is too short for what is drawn once in e^21, or 1e9, times.
_LOG_ODDS_OF_FIT = 21
# Python floats, for a large int does not compare with NumPy's.
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_RANGES = {
    "positive": (_TINY, _HUGE),
    "zero or positive": (0.0, _HUGE),
    "1 or more": (1.0, _HUGE),
    "from 0 to 1": (0.0, 1.0),
    "above 0, at most 1": (_TINY, 1.0),
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

    The frames, 16-bit `(frames, height, width)`, and a `SimulatedTruth`. With `channel_shares`
    the frames are a tuple with one such stack for each channel.

    **Raises:**

    - `TypeError`: something else than a key, a size that is no integer, or a parameter
        that is no Python or NumPy number.
    - `ValueError`: a batch of keys, a size below 1, a parameter that is negative, NaN
        or infinite, a length, time or gain of zero, a share that is none, an EM gain below
        1, or more molecules than 32-bit indices count.

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
    key = _checked_key(key)
    sizes = {
        name: _checked_size(name, value)
        for name, value in {
            "frame_count": frame_count,
            "height_pix": height_pix,
            "width_pix": width_pix,
        }.items()
    }
    psf = _checked_numbers("positive", psf_sigma_pix=psf_sigma_pix)
    molecules = _checked_numbers("positive", on_time_frames=on_time_frames)
    molecules |= _checked_numbers(
        "zero or positive",
        molecules_per_frame=molecules_per_frame,
        photons_per_frame=photons_per_frame,
        photons_spread=photons_spread,
    )
    bkgd = _checked_numbers(
        "positive",
        bkgd_length_scale_pix=bkgd_length_scale_pix,
        haze_sigma_pix=haze_sigma_pix,
    )
    bkgd |= _checked_numbers(
        "zero or positive",
        bkgd_photons=bkgd_photons,
        bkgd_contrast=bkgd_contrast,
        haze_photons=haze_photons,
    )
    bkgd |= _checked_numbers("from 0 to 1", cell_contrast=cell_contrast)
    bkgd |= _checked_numbers("above 0, at most 1", bkgd_remaining=bkgd_remaining)
    camera = _checked_numbers("positive", gain_electrons_per_adu=gain_electrons_per_adu)
    camera |= _checked_numbers(
        "zero or positive",
        offset_adu=offset_adu,
        read_noise_electrons=read_noise_electrons,
    )
    camera |= _checked_numbers("1 or more", em_gain=em_gain)
    shares = (1.0,) if channel_shares is None else _checked_shares(channel_shares)

    # What few movies have is compiled only for those.
    bkgd["haze_photons"] = bkgd["haze_photons"] or None
    camera["em_gain"] = None if camera["em_gain"] == 1 else camera["em_gain"]

    molecules_key, *keys = jax.random.split(key, 1 + 4 * len(shares))
    events = _events(
        molecules_key, margin_pix=math.ceil(5 * psf_sigma_pix), **sizes, **molecules
    )
    channels = [
        _channel(keys[4 * i : 4 * i + 4], events, share, **sizes, **psf, **bkgd, **camera)
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
    keys,
    events,
    share,
    *,
    frame_count,
    height_pix,
    width_pix,
    psf_sigma_pix,
    bkgd_photons,
    bkgd_contrast,
    bkgd_length_scale_pix,
    cell_contrast,
    haze_photons,
    haze_sigma_pix,
    bkgd_remaining,
    gain_electrons_per_adu,
    em_gain,
    **camera,
):
    """Frames, and their expected background in ADU."""
    field_key, camera_key, cell_key, haze_key = keys
    size = {"height_pix": height_pix, "width_pix": width_pix}
    field = uneven_field(
        field_key, contrast=bkgd_contrast, length_scale_pix=bkgd_length_scale_pix, **size
    )
    outside = 1 - cell_inside(cell_key, **size)
    first_bkgd = bkgd_photons * field * (1 - cell_contrast * outside)
    electrons_per_photon = 1 if em_gain is None else em_gain

    def expose(frame):
        frame_key, time, *molecules = frame
        bkgd = first_bkgd
        if haze_photons is not None:
            bkgd += haze_photons * drifting_haze(
                haze_key, time, sigma_pix=haze_sigma_pix, **size
            )
        bkgd *= jnp.exp(time * jnp.log(bkgd_remaining))
        signal = render_molecules(*molecules, psf_sigma_pix=psf_sigma_pix, **size)
        image = read_out(
            frame_key,
            bkgd + share * signal,
            gain_electrons_per_adu=gain_electrons_per_adu,
            em_gain=em_gain,
            **camera,
        )
        return image, electrons_per_photon * bkgd / gain_electrons_per_adu

    # Frame by frame, so that memory stays small and the loop of the Poisson sampler,
    # which runs until the last pixel of a frame has its count, stays in the cache.
    molecules = (
        events[name].reshape(frame_count, -1) for name in ("y_pix", "x_pix", "photons")
    )
    frame_keys = jax.random.split(camera_key, frame_count)
    time = jnp.linspace(0, 1, frame_count, dtype=jnp.float32)
    return lax.map(expose, (frame_keys, time, *molecules))


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
        jnp.where(is_on, photons_per_frame * brightness[molecule] * on_part[event], 0),
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
            f"molecules_per_frame = {molecules_per_frame:.8g}, with those just outside "
            f"the frame, with on_time_frames = {on_time_frames} and frame_count = "
            f"{frame_count} needs places for {place_count * frame_count:.3g} events, and "
            "there may be no more than 2^31. Simulate fewer molecules or frames, a longer "
            "on-time, or a smaller PSF."
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
    return _log_normal(field, contrast)


def _log_normal(normal, spread):
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

    def profiles(size_pix, place, drift):
        # In units of sigma. Sources lie as far as 4 outside the frame.
        extent = size_pix / sigma_pix + 8
        centre = extent * place - 4 + (time - 0.5) * drift
        pixel = (jnp.arange(size_pix, dtype=jnp.float32) + 0.5) / sigma_pix
        density = jnp.exp(-((pixel - centre[:, None]) ** 2) / 2) / math.sqrt(2 * math.pi)
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
    if em_gain is not None:
        # A sum of exponentials; of none, zero.
        electrons = em_gain * jax.random.gamma(em_key, electrons.astype(jnp.float32))
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


def _checked_numbers(rule, **numbers) -> dict[str, Any]:
    return {name: _checked_number(name, value, rule) for name, value in numbers.items()}


def _checked_number(name, value, rule) -> float:
    if isinstance(value, bool) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise TypeError(
            f"{name} is {value!r}, and must be a real number that is known before jit: "
            "give an int or a float."
        )
    smallest, largest = _RANGES[rule]
    if not smallest <= value <= largest:
        raise ValueError(
            f"{name} is {value}, and must be {rule} and finite, in float32: "
            f"give a number between {smallest:.8g} and {largest:.8g}."
        )
    return float(value)


def _checked_shares(channel_shares) -> tuple[float, ...]:
    remedy = "For two channels give two numbers, such as (0.6, 0.4), and for none None."
    if not isinstance(channel_shares, tuple | list):
        raise TypeError(
            f"channel_shares is {channel_shares!r}, and must be a tuple or list. {remedy}"
        )
    shares = tuple(
        _checked_number(f"channel_shares[{i}]", share, "positive")
        for i, share in enumerate(channel_shares)
    )
    if not math.isclose(sum(shares), 1, rel_tol=1e-6):
        raise ValueError(
            f"channel_shares is {shares}, and must add up to 1, not {sum(shares)}. {remedy}"
        )
    return shares
