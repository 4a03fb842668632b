"""The scenes of the accuracy examples: simulated movies, and their true background.

`SCENES` have a background that is steady or bleaches, `MOVING_SCENES` one that time
treats worse, and `OTHER_SCENES` a texture and other light. A scene's movie is the same
each time.
"""

import math
import zlib
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import jaxbkgd
from jaxbkgd._simulation import blinking_molecules, render_molecules, uneven_field


PSF_SIGMA_PIX = 1.3
OCTAVES = 4  # of a texture
DENSITY_SIZE_PIX = 256  # a scene's molecules are counted in a frame of this size
# Of an astigmatic image: how far from the middle each axis is in focus, and from there to
# where its variance has doubled.
FOCUS_NM, FOCUS_DEPTH_NM = 200.0, 400.0

# Programs of one operation each would take longer to compile.
_SIZES = "height_pix", "width_pix"
field_of = jax.jit(uneven_field, static_argnames=_SIZES)
molecules_of = jax.jit(
    blinking_molecules,
    static_argnames=(*_SIZES, "frame_count", "molecules_per_frame", "on_time_frames"),
)

Shape = Literal["uniform", "field", "gradient", "cell", "waves", "texture"]
Camera = Literal["sCMOS", "sCMOS maps", "EMCCD"]
Image = Float[Array, "height width"]


@dataclass(frozen=True)
class Scene:
    """What a movie is made of: a background, molecules over it, and a camera.

    `lengths_pix` has one pair (y, x) for each channel: the length scales of a random
    field, or the periods of waves, in pixels. A texture is a product of random fields,
    each with half of the length and contrast of the one before. `remaining` is the share
    of the background that is left at the end of the movie, `drift_pix` how far the
    background moves until then along y and x, and `blob` the height of an out-of-focus
    blob that crosses it, as a share of the background. `dimmed` is the share of all light
    that is lost halfway through the movie, in the whole frame or in its right half, and
    `flicker` the standard deviation of the light from frame to frame, as a share; `cycle`
    is the light of successive frames, over and over. `second` is the mean of a second
    pattern of light in every fourth frame, as a share of the background. Molecules as far
    as `beyond_pix` outside the frame shine into it. `bound_pix` is the largest radius
    allowed.

    Where molecules lie up to `depth_nm` above and below the focus, their images are
    astigmatic.
    """

    name: str
    shape: Shape = "field"
    lengths_pix: tuple[tuple[float, float], ...] = ((20.0, 20.0),)
    bkgd_photons: float = 60.0
    bkgd_contrast: float = 0.3
    molecules_per_frame: float = 60.0
    photons_per_frame: float = 700.0
    on_time_frames: float = 1.0
    camera: Camera = "sCMOS"
    remaining: float = 1.0
    drift_pix: tuple[float, float] = (0.0, 0.0)
    blob: float = 0.0
    dimmed: float = 0.0
    dimmed_part: Literal["frame", "right half"] = "frame"
    flicker: float = 0.0
    cycle: tuple[float, ...] = (1.0,)
    second: float = 0.0
    beyond_pix: int = 0
    bound_pix: float = 60.0
    depth_nm: float = 0.0

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


def one_scale(length_pix: float) -> tuple[tuple[float, float]]:
    return ((length_pix, length_pix),)


# Of one period, as of lamps on mains.
SINE = tuple(1 + 0.3 * math.sin(2 * math.pi * frame / 12) for frame in range(12))

SCENES = (
    # In frames only a few times as wide as the radius, a larger one is not always better:
    # an edge pixel is repeated, and its own noise counts more.
    Scene("uniform", shape="uniform", bound_pix=30.0),
    Scene("scale-6", lengths_pix=one_scale(6.0)),
    Scene("scale-10", lengths_pix=one_scale(10.0)),
    Scene("scale-20"),
    Scene("scale-40", lengths_pix=one_scale(40.0)),
    Scene("gradient", shape="gradient"),
    Scene("cell-edge", shape="cell"),
    Scene("stripes", shape="waves", lengths_pix=((30.0, math.inf),)),
    Scene("waves", shape="waves", lengths_pix=((30.0, 90.0),)),
    Scene("sparse", molecules_per_frame=5.0),
    Scene("dense", molecules_per_frame=200.0),
    Scene("dim", photons_per_frame=50.0),
    Scene("bright", photons_per_frame=1000.0),
    Scene("on-5-frames", on_time_frames=5.0),
    Scene("EMCCD", camera="EMCCD"),
    Scene("sCMOS-maps", camera="sCMOS maps"),
    Scene("bleaching", remaining=0.5),
    Scene("two-channels", lengths_pix=(*one_scale(8.0), *one_scale(25.0))),
)
# Of a molecule 8 px outside, no photon comes in: that is 6 sigmas of its PSF.
MOVING_SCENES = (
    Scene("blob", blob=1.0, beyond_pix=8),
    Scene("step", dimmed=0.3, beyond_pix=8),
    Scene("step-in-half", dimmed=0.3, dimmed_part="right half", beyond_pix=8),
    Scene("fast-bleaching", remaining=0.1, beyond_pix=8),
    Scene("flicker", flicker=0.03, beyond_pix=8),
    Scene("pulse", flicker=0.015, cycle=(1.35, 1.0, 1.0, 1.0), beyond_pix=8),
    Scene("alternating", cycle=(1.0, 0.3), beyond_pix=8),
    Scene("drift", drift_pix=(6.0, -4.0), beyond_pix=8),
    Scene("on-20-frames", on_time_frames=20.0, beyond_pix=8),
    Scene("5-fold-density", molecules_per_frame=300.0, beyond_pix=8),
)
OTHER_SCENES = (
    Scene("texture", shape="texture", lengths_pix=one_scale(40.0), beyond_pix=8),
    Scene("second-pattern", second=0.35, beyond_pix=8),
    Scene("sine", cycle=SINE, beyond_pix=8),
    Scene("flash", cycle=(*49 * (1.0,), 10.0, *50 * (1.0,)), beyond_pix=8),
    Scene("dark-frames", cycle=(*19 * (1.0,), 0.0), beyond_pix=8),
)


@dataclass(frozen=True)
class Molecules:
    """Those of each frame: arrays (frames, places) of their place in pixels, their height
    above the focus, and the photons expected from them, 0 where there is none."""

    y_pix: np.ndarray
    x_pix: np.ndarray
    z_nm: np.ndarray
    photons: np.ndarray


@dataclass(frozen=True)
class Movie:
    """Frames in ADU, what they would be on average without molecules, the camera, whose
    gain is in photoelectrons, of an EMCCD before its noise, what molecules add to the
    frames on average, and the molecules."""

    frames: np.ndarray
    bkgds_adu: np.ndarray
    camera: jaxbkgd.Camera
    molecules_electrons: np.ndarray | float = 0.0
    molecules: Molecules | None = None

    @property
    def gain_electrons_per_adu(self) -> float:
        """The mean of the camera's."""
        return float(np.mean(self.camera.known_gain("A scene")))

    @property
    def offset_adu(self) -> float:
        """The mean of the camera's."""
        return float(np.mean(self.camera.offset_adu))


def simulated(
    scene: Scene, *, size_pix: int, frame_count: int, seed: int | None = None
) -> list[Movie]:
    """A movie for each channel of the scene, the same each time."""
    seed = scene.seed if seed is None else seed
    return [
        _simulated_channel(scene, lengths_pix, size_pix, frame_count, (seed, channel))
        for channel, lengths_pix in enumerate(scene.lengths_pix)
    ]


def _simulated_channel(
    scene: Scene,
    lengths_pix: tuple[float, float],
    size_pix: int,
    frame_count: int,
    seed: tuple[int, int],
) -> Movie:
    rng = np.random.default_rng(seed)
    light_rng, depth_rng = rng.spawn(2)
    time = np.linspace(0, 1, frame_count)
    levels = _levels(scene, lengths_pix, size_pix, time, _random_key(rng))
    bleached = scene.remaining**time
    bkgds = scene.bkgd_photons * bleached[:, None, None] * levels
    molecules = _molecules(scene, size_pix, frame_count, _random_key(rng), depth_rng)
    signal = _rendered(molecules, size_pix, is_astigmatic=scene.depth_nm > 0)
    light = _light(scene, size_pix, time, light_rng)
    movie = _exposed(scene.camera, light * bkgds, light * signal, rng)
    # The light at their place.
    column = np.clip(np.rint(molecules.x_pix), 0, size_pix - 1).astype(int)
    photons = molecules.photons * np.take_along_axis(light[:, 0], column, 1)
    return replace(movie, molecules=replace(molecules, photons=photons))


def _random_key(rng: np.random.Generator) -> jax.Array:
    return jax.random.key(rng.integers(2**31))


def _levels(
    scene: Scene,
    lengths_pix: tuple[float, float],
    size_pix: int,
    time: np.ndarray,
    key: jax.Array,
) -> np.ndarray:
    """The background's shape as `time` goes from 0 to 1: one frame of mean 1 if steady."""
    # Of a frame with room for the drift, what is in view, linear between pixels.
    margin = math.ceil(max(map(abs, scene.drift_pix)))
    wide = _level(scene, lengths_pix, size_pix + 2 * margin, key)
    levels = wide[None]
    if margin:
        places = margin + np.arange(size_pix)

        def in_view(shift_pix: float) -> np.ndarray:
            distances = places[:, None] - shift_pix - np.arange(len(wide))
            return np.maximum(1 - np.abs(distances), 0)

        y, x = scene.drift_pix
        levels = np.array([in_view(y * t) @ wide @ in_view(x * t).T for t in time])
    if scene.blob:
        levels = levels + scene.blob * _blob(size_pix, time)
    if scene.second:
        # A beam that is centred on an edge of the frame.
        y, x = np.mgrid[:size_pix, :size_pix] / size_pix
        beam = np.exp(-((y - 0.5) ** 2 + x**2) / 0.3)
        is_lit = np.arange(time.size) % 4 == 0
        levels = levels + scene.second * is_lit[:, None, None] * beam / beam.mean()
    return levels


def _blob(size_pix: int, time: np.ndarray) -> np.ndarray:
    """A Gaussian, a tenth of the frame in sigma, that crosses half of the frame."""
    pixels = (np.arange(size_pix) + 0.5) / size_pix
    y, x = (
        np.exp(-(((pixels - centre[:, None]) / 0.1) ** 2) / 2)
        for centre in (0.35 + 0.3 * time, 0.3 + 0.4 * time)
    )
    return y[:, :, None] * x[:, None, :]


def _light(
    scene: Scene, size_pix: int, time: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The illumination of each frame and column, 1 at first."""
    if scene.dimmed_part == "frame":
        part = np.ones(size_pix)
    else:
        # The edge is as soft as that of a stop: most of it lies within 4 px.
        part = (1 + np.tanh((np.arange(size_pix) - (size_pix - 1) / 2) / 2)) / 2
    dimmed = scene.dimmed * (time >= 0.5)
    flicker = 1 + scene.flicker * rng.standard_normal(time.size)
    flicker *= np.resize(scene.cycle, time.size)
    return flicker[:, None, None] * (1 - dimmed[:, None, None] * part)


def _level(
    scene: Scene, lengths_pix: tuple[float, float], size_pix: int, key: jax.Array
) -> np.ndarray:
    """The background's shape, of mean 1."""
    y, x = np.meshgrid(*2 * [np.arange(size_pix)], indexing="ij")
    centre = (size_pix - 1) / 2
    if scene.shape == "uniform":
        level = np.ones((size_pix, size_pix))
    elif scene.shape == "field":
        level = field_of(
            key,
            height_pix=size_pix,
            width_pix=size_pix,
            contrast=scene.bkgd_contrast,
            length_scale_pix=lengths_pix[0],
        )
    elif scene.shape == "texture":
        level = np.ones((size_pix, size_pix))
        for octave, octave_key in enumerate(jax.random.split(key, OCTAVES)):
            level *= field_of(
                octave_key,
                height_pix=size_pix,
                width_pix=size_pix,
                contrast=scene.bkgd_contrast / 2**octave,
                length_scale_pix=lengths_pix[0] / 2**octave,
            )
    elif scene.shape == "gradient":
        level = 1 + (0.8 * (y - centre) + 0.4 * (x - centre)) / size_pix
    elif scene.shape == "waves":
        waves = [
            np.sin(2 * np.pi * axis / length)
            for axis, length in zip((y, x), lengths_pix, strict=True)
        ]
        level = 1 + scene.bkgd_contrast * np.add(*waves)
    else:
        # Three times brighter inside; most of the step lies within 4 px.
        angle = np.arctan2(y - centre, x - centre)
        edge = size_pix * (0.3 + 0.05 * np.cos(3 * angle) + 0.03 * np.sin(2 * angle))
        inside = np.tanh((edge - np.hypot(y - centre, x - centre)) / 2)
        level = 2 + inside
    level = np.asarray(level, np.float64)
    return level / level.mean()


def _molecules(
    scene: Scene, size_pix: int, frame_count: int, key: jax.Array, rng: np.random.Generator
) -> Molecules:
    """All that are on, in a light of 1."""
    wide_pix = size_pix + 2 * scene.beyond_pix
    _, y_pix, x_pix, photons = molecules_of(
        key,
        frame_count=frame_count,
        height_pix=wide_pix,
        width_pix=wide_pix,
        molecules_per_frame=scene.molecules_per_frame * (wide_pix / DENSITY_SIZE_PIX) ** 2,
        photons_per_frame=scene.photons_per_frame,
        on_time_frames=scene.on_time_frames,
    )
    z_nm = scene.depth_nm * rng.uniform(-1, 1, photons.shape)
    places = y_pix - scene.beyond_pix, x_pix - scene.beyond_pix
    return Molecules(*map(np.asarray, (*places, z_nm, photons)))


def _rendered(molecules: Molecules, size_pix: int, *, is_astigmatic: bool) -> np.ndarray:
    """Photons expected from molecules in each frame."""
    size = {"height_pix": size_pix, "width_pix": size_pix}
    if is_astigmatic:
        render, places = partial(astigmatic_image, **size), astuple(molecules)
    else:
        render = partial(render_molecules, psf_sigma_pix=PSF_SIGMA_PIX, **size)
        places = molecules.y_pix, molecules.x_pix, molecules.photons
    frames = lax.map(lambda frame: render(*frame), tuple(map(jnp.float32, places)))
    return np.asarray(frames, np.float64)


def widths_pix(z_nm: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The standard deviations of an astigmatic image along y and x (Huang et al., Science
    319, 810, 2008, without terms of higher order)."""
    y_pix, x_pix = (
        PSF_SIGMA_PIX * jnp.sqrt(1 + jnp.square((z_nm - focus_nm) / FOCUS_DEPTH_NM))
        for focus_nm in (-FOCUS_NM, FOCUS_NM)
    )
    return y_pix, x_pix


def pixel_shares(
    centre_pix: Float[Array, ""], sigma_pix: float | Float[Array, ""], size_pix: int
) -> Float[Array, " pixels"]:
    """The share of a Gaussian in each of so many pixels, the first of which is at 0."""
    edges_pix = jnp.arange(size_pix + 1, dtype=jnp.float32) - 0.5
    return jnp.diff(lax.erf((edges_pix - centre_pix) / (math.sqrt(2) * sigma_pix))) / 2


def astigmatic_image(
    y_pix: Float[Array, " molecules"],
    x_pix: Float[Array, " molecules"],
    z_nm: Float[Array, " molecules"],
    photons: Float[Array, " molecules"],
    *,
    height_pix: int,
    width_pix: int,
) -> Image:
    """Photons expected in each pixel of a frame."""
    sigma_y_pix, sigma_x_pix = widths_pix(z_nm)
    shares = jax.vmap(pixel_shares, (0, 0, None))
    rows = shares(y_pix, sigma_y_pix, height_pix)
    columns = shares(x_pix, sigma_x_pix, width_pix)
    return jnp.matmul(rows.T, photons[:, None] * columns, precision="highest")


def _exposed(
    camera: Camera, bkgds: np.ndarray, signal: np.ndarray, rng: np.random.Generator
) -> Movie:
    """What the camera writes, and what it would write of the background on average."""
    image_shape = bkgds.shape[1:]
    electrons = rng.poisson(bkgds + signal).astype(np.float64)
    em_gain = 1.0
    if camera == "EMCCD":
        em_gain, electrons_per_adu, offset_adu, read_noise = 300.0, 12.0, 200.0, 40.0
        # A gamma distribution of no electrons is no electrons.
        electrons = em_gain * rng.standard_gamma(electrons)
    elif camera == "sCMOS maps":
        electrons_per_adu = 0.46 * (1 + 0.02 * rng.standard_normal(image_shape))
        offset_adu = 100 + rng.standard_normal(image_shape)
        read_noise = 1.5 * np.exp(0.4 * rng.standard_normal(image_shape))
    else:
        electrons_per_adu, offset_adu, read_noise = 0.46, 100.0, 1.5
    electrons += read_noise * rng.standard_normal(electrons.shape)
    frames = np.clip(np.round(electrons / electrons_per_adu + offset_adu), 0, 65535)
    return Movie(
        frames.astype(np.uint16),
        em_gain * bkgds / electrons_per_adu + offset_adu,
        jaxbkgd.Camera(offset_adu, electrons_per_adu / em_gain, read_noise / em_gain),
        signal,
    )
