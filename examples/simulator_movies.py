"""Movies by simulators that other people have written, with the background that is true.

    python examples/simulator_movies.py FOLDER [NAME ...]

It needs NumPy and the simulators alone: `pip install picassosr`, `sdt-python`, `microsim`,
`deeptrack`.
Since microsim wants an older NumPy than jaxbkgd, movies are made in an environment of their
own, and `examples/other_simulators.py` reads them. Each is FOLDER/NAME.npz, with `frames`
in ADU, `bkgds`, what these would be on average without molecules, and the camera:
`offset_adu`, `gain_electrons_per_adu` (of an EMCCD before its noise) and
`read_noise_electrons`.

- picasso-paint: binding sites of DNA-PAINT by `picasso.simulate`, which draws each photon,
  over the light of a beam and of blobs out of focus.
- sdt-tracks: molecules that diffuse until they bleach by `sdt.sim`, over blobs that it
  draws.
- microsim-cell: filaments of a cell, out of focus, and molecules under one vectorial PSF by
  `microsim`, with its CMOS camera; and microsim-emccd with its EMCCD.
- deeptrack-drift: ellipsoids, out of focus, that drift by some pixels, and molecules up to
  0.4 um out of focus by the optics of `deeptrack`.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np


FRAME_COUNT, SIZE_PIX = 300, 128
PIXEL_UM = 0.1
BKGD_PHOTONS, PHOTONS = 60.0, 700.0


def beam_and_blobs(rng: np.random.Generator, count: int = 12) -> np.ndarray:
    """The light of a beam, in which there are blobs, of mean 1."""
    y, x = np.mgrid[:SIZE_PIX, :SIZE_PIX] / SIZE_PIX
    beam = np.exp(-((y - 0.45) ** 2 + (x - 0.55) ** 2) / (2 * 0.35**2))
    level = np.full_like(beam, 0.6)
    for centre_y, centre_x, width in rng.uniform([0, 0, 0.04], [1, 1, 0.15], (count, 3)):
        distance = ((y - centre_y) ** 2 + (x - centre_x) ** 2) / (2 * width**2)
        level += rng.uniform(0.3, 1.2) * np.exp(-distance)
    return beam * level / (beam * level).mean()


def picasso_paint() -> dict[str, Any]:
    simulate = importlib.import_module("picasso.simulate")
    # It draws from NumPy's own numbers.
    np.random.seed(0)  # noqa: NPY002
    frame_ms, bright_ms, dark_ms, sites = 100, 200, 4000, 400
    rate = PHOTONS / frame_ms
    places = simulate.generatePositions(sites, SIZE_PIX, 0, 1)
    structures = np.zeros((5, sites))
    structures[:2] = places.T
    photons = np.array(
        [
            simulate.paintgen(
                dark_ms, bright_ms, FRAME_COUNT, frame_ms, rate, 0.15 * rate, 1e9
            )[0]
            for _ in range(sites)
        ]
    )
    bkgd = BKGD_PHOTONS * beam_and_blobs(np.random.default_rng(1))
    movie = np.array(
        [
            simulate.convertMovie(
                *(number, photons, structures, SIZE_PIX, FRAME_COUNT, 1.3, rate),
                *(0, 0, False, [], []),
            )
            for number in range(FRAME_COUNT)
        ]
    )
    frames = simulate.check_type(
        simulate.noisy_p(movie, np.broadcast_to(bkgd, movie.shape))
    )
    return _movie(frames, bkgd, 0.0, 1.0, 0.0)


def sdt_tracks() -> dict[str, Any]:
    sim = importlib.import_module("sdt.sim")
    rng, state = np.random.default_rng(2), np.random.RandomState(2)
    count, size = 400, (SIZE_PIX, SIZE_PIX)
    # 0.2 px^2 in a frame is 0.05 um^2/s at 40 ms.
    tracks = sim.simulate_brownian(
        *(count, 15, 0.2),
        size=size,
        track_len_dist="exp",
        random_state=state,
        columns={"coords": ["x", "y"], "time": "frame", "particle": "particle"},
    )
    first = rng.integers(-15, FRAME_COUNT, count)
    number = tracks["frame"].to_numpy() + first[tracks["particle"].to_numpy()]
    places = tracks[["x", "y"]].to_numpy()
    blobs = 25
    light = sim.simulate_gauss(
        *(size, rng.uniform(0, SIZE_PIX, (blobs, 2)), rng.uniform(0.3, 1.5, blobs)),
        rng.uniform(4, 15, blobs),
        engine="python_full",
    )
    bkgd = BKGD_PHOTONS * (0.5 + light) / (0.5 + light).mean()
    frames = []
    for frame in range(FRAME_COUNT):
        of_frame = places[number == frame]
        image = np.zeros(size)
        if len(of_frame):
            image = sim.simulate_gauss(size, of_frame, PHOTONS / 2, 1.3, mass=True)
        electrons = rng.poisson(bkgd + image) + 1.5 * rng.standard_normal(size)
        frames.append(np.clip(np.rint(electrons / 0.46 + 100), 0, 65535))
    return _movie(np.array(frames, np.uint16), bkgd, 100.0, 0.46, 1.5)


def microsim_cell() -> dict[str, Any]:
    schema = importlib.import_module("microsim.schema")
    camera = schema.CameraCMOS(read_noise=1.6, full_well=30_000, bit_depth=16, offset=100)
    frames, bkgd = _cell(schema, camera)
    gain = camera.adc_gain / camera.gain
    return _movie(frames, bkgd, camera.offset, gain, camera.read_noise)


def microsim_emccd() -> dict[str, Any]:
    schema = importlib.import_module("microsim.schema")
    em_gain = 100.0
    camera = schema.CameraEMCCD(
        em_gain=em_gain, read_noise=30, full_well=800_000, bit_depth=16, offset=200
    )
    frames, bkgd = _cell(schema, camera)
    gain = camera.adc_gain / camera.gain / em_gain
    return _movie(frames, bkgd, camera.offset, gain, camera.read_noise / em_gain)


def _cell(schema: Any, camera: Any) -> tuple[np.ndarray, np.ndarray]:
    """Frames, and their background in photons."""
    finer, planes = 3, 48
    fine_um = PIXEL_UM / finer
    size = SIZE_PIX * finer
    common = {
        "objective_lens": schema.ObjectiveLens(numerical_aperture=1.4),
        "output_space": {"downscale": (1, finer, finer)},
    }
    # Each simulation with a seed would begin with the same noise.
    uncached = {"cache": {"read": False, "write": False}}
    seeded, unseeded = (schema.Settings(random_seed=seed, **uncached) for seed in (3, None))
    lines = {"type": "matslines", "density": 0.4, "length": 20, "azimuth": 5, "max_r": 1}
    label = schema.FluorophoreDistribution(distribution=lines)
    space = schema.ShapeScaleSpace(shape=(planes, size, size), scale=(0.1, *2 * [fine_um]))
    sample = schema.Sample(labels=[label])
    cell = schema.Simulation(truth_space=space, sample=sample, settings=seeded, **common)
    # The uppermost plane has most of the cell below it.
    light = np.asarray(cell.digital_image(with_detector_noise=False))[0, 4]
    bkgd = BKGD_PHOTONS * (light / light.mean() + 0.3) / 1.3
    rng = np.random.default_rng(4)
    frames = []
    for _ in range(FRAME_COUNT):
        molecules = np.zeros((1, size, size), np.float32)
        places = rng.integers(0, size, (rng.poisson(15), 2))
        molecules[0, places[:, 0], places[:, 1]] = 1
        of_frame = schema.Simulation.from_ground_truth(
            molecules, scale=(0.1, fine_um, fine_um), settings=unseeded, **common
        )
        image = of_frame.digital_image(with_detector_noise=False)[0, 0]
        # Its molecules are as bright as ours.
        shine = PHOTONS * len(places) / max(float(image.sum()), 1e-12)
        photons = image.copy(data=shine * image.data + bkgd)
        frames.append(np.asarray(camera.render(photons, exposure_ms=1000)))
    return np.array(frames, np.uint16), bkgd


def deeptrack_drift() -> dict[str, Any]:
    deeptrack = importlib.import_module("deeptrack")
    optics = deeptrack.Fluorescence(
        NA=1.4,
        wavelength=660e-9,
        resolution=1e-6,
        magnification=1 / PIXEL_UM,
        refractive_index_medium=1.33,
        output_region=(0, 0, SIZE_PIX, SIZE_PIX),
    )
    rng = np.random.default_rng(5)

    def image_of(scatterers: list[Any]) -> np.ndarray:
        """In photons, of which each molecule has the same number."""
        sample = scatterers[0]
        for scatterer in scatterers[1:]:
            sample = sample & scatterer
        return np.asarray(optics(sample).update()(), float)[..., 0]

    def molecule(place: np.ndarray) -> Any:
        return deeptrack.PointParticle(position=place[:2], z=place[2], intensity=1)

    one = image_of([molecule(np.array([64, 64, 0]))]).sum()
    starts, drifts = rng.uniform(10, 118, (8, 2)), rng.uniform(-5, 5, (8, 2))
    radii, depths = rng.uniform(0.6e-6, 2e-6, (8, 3)), rng.uniform(-15, 15, 8)
    keys = 16  # of the background; between them it is interpolated
    levels = []
    for time in np.linspace(0, 1, keys):
        ellipsoids = [
            deeptrack.Ellipsoid(radius=radius, position=place, z=depth, intensity=1)
            for radius, place, depth in zip(
                radii, starts + time * drifts, depths, strict=True
            )
        ]
        levels.append(image_of(ellipsoids))
    scale = np.mean(levels)
    bkgds, frames = [], []
    for place in np.linspace(0, keys - 1, FRAME_COUNT):
        first = min(int(place), keys - 2)
        level = levels[first] + (place - first) * (levels[first + 1] - levels[first])
        bkgds.append(BKGD_PHOTONS * (level / scale + 0.5) / 1.5)
        places = rng.uniform([0, 0, -4], [SIZE_PIX, SIZE_PIX, 4], (1 + rng.poisson(14), 3))
        molecules = PHOTONS / one * image_of([*map(molecule, places)])
        electrons = rng.poisson(bkgds[-1] + molecules)
        electrons = electrons + 1.5 * rng.standard_normal(electrons.shape)
        frames.append(np.clip(np.rint(electrons / 0.46 + 100), 0, 65535))
    return _movie(np.array(frames, np.uint16), np.array(bkgds), 100.0, 0.46, 1.5)


def _movie(
    frames: np.ndarray, bkgd: np.ndarray, offset_adu: float, gain: float, read_noise: float
) -> dict[str, Any]:
    """What is kept of it. The background, an image or one of each frame, is in
    photoelectrons."""
    return {
        "frames": frames,
        "bkgds": (offset_adu + bkgd / gain).astype(np.float32),
        "offset_adu": offset_adu,
        "gain_electrons_per_adu": gain,
        "read_noise_electrons": read_noise,
    }


MOVIES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "picasso-paint": ("picasso", picasso_paint),
    "sdt-tracks": ("sdt", sdt_tracks),
    "microsim-cell": ("microsim", microsim_cell),
    "microsim-emccd": ("microsim", microsim_emccd),
    "deeptrack-drift": ("deeptrack", deeptrack_drift),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:] or ["."]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names or MOVIES:
        package, make = MOVIES[name]
        if find_spec(package) is None:
            print(f"not installed, left out: {name} ({package})")
            continue
        np.savez_compressed(Path(folder) / f"{name}.npz", **make())
        print(f"wrote {name}.npz")
