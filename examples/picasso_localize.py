"""Picasso on frames, and on frames less their background: how many molecules, how precise.

    python examples/picasso_localize.py [FOLDER]

It simulates movies, lets jaxbkgd find the estimator that suits each, and writes residuals
in Picasso's format to FOLDER (by default the folder it runs in). Picasso reads the files,
finds molecules, and fits them; what it finds is compared with those of the simulation. Each
way has the net gradient that is best for it. It needs the extras `movies` and `bench`, and
`pip install picassosr`, and takes some minutes on two cores.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

import jaxbkgd


# Type checkers need no Picasso for this.
io, localize = (importlib.import_module(f"picasso.{name}") for name in ("io", "localize"))

OFFSET_ADU, GAIN_ELECTRONS_PER_ADU = 100.0, 0.46
BOX_PIX, LEAST_GRADIENT = 7, 100
# A localization is of the molecule that is nearest, up to this distance. Fainter molecules
# need not be found, and are not false.
REACH_PIX, LEAST_PHOTONS = 2.0, 200.0
# The number of frames in Picasso's own filter, which takes an odd one.
MEDIAN_FRAMES = 51
SCENES: dict[str, dict[str, Any]] = {
    "smooth": {"bkgd_length_scale_pix": 20.0, "bkgd_contrast": 0.3},
    "detailed": {"bkgd_length_scale_pix": 8.0, "bkgd_contrast": 0.5},
}


def main(folder: Path, frame_count: int = 1000, size_pix: int = 128) -> dict[str, dict]:
    """The scores of each scene, way and fit."""
    found = {}
    for scene, bkgd in SCENES.items():
        size = {"frame_count": frame_count, "height_pix": size_pix, "width_pix": size_pix}
        movie, truth = jaxbkgd.simulate_movie(
            jax.random.key(0), molecules_per_frame=size_pix / 16, **size, **bkgd
        )
        for way, (searched, median_frames, fitted) in ways(folder, scene, movie).items():
            spots, _ = localize.identify(
                searched, LEAST_GRADIENT, BOX_PIX, temporal_median_window=median_frames
            )
            for fit in ("gausslq", "gaussmle"):
                locs = fit_spots(fitted, spots, fit)
                scores = found[f"{scene}, {way}, {fit}"] = score(locs, truth, size_pix)
                texts = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                print(f"{scene}, {way}, {fit}: {texts}", flush=True)
    return found


def ways(folder: Path, scene: str, frames: Any) -> dict[str, tuple[Any, int, Any]]:
    """The movie in which Picasso searches for molecules, the frames of its own temporal
    median, and the movie in which it fits them."""
    count, height, width = frames.shape
    sizes = {"Frames": count, "Height": height, "Width": width, "Pixelsize": 100}
    about = [{"Byte Order": "<", "Data Type": "uint16", **sizes}]
    source, dark, flat = (folder / f"{scene}{end}.raw" for end in ("", "-dark", "-flat"))
    io.save_raw(str(source), np.asarray(frames), about)
    camera = jaxbkgd.Camera(OFFSET_ADU, GAIN_ELECTRONS_PER_ADU)
    estimator, _ = jaxbkgd.calibrate(source, camera=camera)
    with jaxbkgd.lazy_estimate(source, estimator, camera=camera) as bkgds:
        mean_bkgd = round(float(bkgds[:: max(1, count // 20)].mean()))
    for path, pedestal in ((dark, OFFSET_ADU), (flat, OFFSET_ADU + mean_bkgd)):
        jaxbkgd.estimate_movie(
            source,
            estimator,
            path,
            quantity="residual",
            dtype="uint16",
            pedestal=pedestal,
            camera=camera,
            overwrite=True,
        )
    source, dark, flat = (io.load_movie(str(path))[0] for path in (source, dark, flat))
    return {
        "frames": (source, 0, source),
        "found with a temporal median": (source, MEDIAN_FRAMES, source),
        "found in residuals": (dark, 0, source),
        "residuals + offset": (dark, 0, dark),
        "residuals + offset + mean background": (flat, 0, flat),
    }


def fit_spots(movie: Any, spots: Any, fit: str) -> Any:
    """Picasso's table of localizations."""
    gain = GAIN_ELECTRONS_PER_ADU
    camera = {"Baseline": OFFSET_ADU, "Sensitivity": gain, "Gain": 1, "Pixelsize": 100}
    options = {"camera_info": camera, "identifications": spots, "box": BOX_PIX}
    locs, _ = localize.fit(movie, fitting_method=fit, **options)
    return locs[np.isfinite(locs.x) & np.isfinite(locs.y)]


def score(locs: Any, truth: jaxbkgd.SimulatedTruth, size_pix: int) -> dict[str, float]:
    """How many localizations are right, at the net gradient at which the share of these is
    highest in all that are right, false or missed; and how precise they are."""
    is_on = np.asarray(truth.is_on)
    of_events = truth.frame, truth.x_pix, truth.y_pix, truth.photons
    frame, x, y, photons = (np.asarray(of_each)[is_on] for of_each in of_events)
    locs = locs[is_inside(locs.x, locs.y, size_pix)]
    event = nearest_events((frame, x, y), (locs.frame, locs.x, locs.y), photons)
    is_wanted = is_inside(x, y, size_pix) & (photons >= LEAST_PHOTONS)
    is_right, is_false = (event >= 0) & is_wanted[event], event < 0
    gradients = locs.net_gradient.to_numpy()
    limits = np.quantile(gradients, np.linspace(0, 1, 400))
    right, false = (
        np.array([(of_kind & (gradients >= limit)).sum() for limit in limits])
        for of_kind in (is_right, is_false)
    )
    best = np.argmax(right / (is_wanted.sum() + false))
    is_kept = is_right & (gradients >= limits[best])
    event, kept = event[is_kept], locs[is_kept]
    errors = np.stack([kept.x - x[event], kept.y - y[event]])
    stated = np.stack([kept.lpx, kept.lpy])
    return {
        "net gradient": limits[best],
        "molecules": is_wanted.sum(),
        "right": right[best],
        "false": false[best],
        "error (px)": np.sqrt(np.mean(errors**2)),
        # Of a normal error that is as large as stated, 0.674 is the median.
        "of stated": np.nanmedian(abs(errors) / stated) / 0.674,
        "without stated": np.isnan(stated).mean(),
        "photons of true": np.median(kept.photons / photons[event]),
    }


def is_inside(x: Any, y: Any, size_pix: int) -> np.ndarray:
    """Whether places are a box or more from the border."""
    x, y = np.asarray(x), np.asarray(y)
    return (np.minimum(x, y) >= BOX_PIX) & (np.maximum(x, y) <= size_pix - 1 - BOX_PIX)


def nearest_events(events: tuple, found: tuple, photons: np.ndarray) -> np.ndarray:
    """The event of each localization, or -1: pairs with the least distances in all, those
    of bright molecules first."""
    events, found = (tuple(map(np.asarray, of_each)) for of_each in (events, found))
    event = np.full(len(found[0]), -1)
    for frame in np.unique(found[0]):
        first, second = (np.flatnonzero(of_each[0] == frame) for of_each in (events, found))
        y, x = (
            of_event[first][:, None] - of_found[second]
            for of_event, of_found in zip(events[1:], found[1:], strict=True)
        )
        is_far = np.hypot(y, x) > REACH_PIX
        costs = np.hypot(y, x) + REACH_PIX * (photons[first] < LEAST_PHOTONS)[:, None]
        rows, columns = linear_sum_assignment(np.where(is_far, 1e6, costs))
        is_near = ~is_far[rows, columns]
        event[second[columns[is_near]]] = first[rows[is_near]]
    return event


if __name__ == "__main__":
    jaxbkgd.one_thread_a_call()
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
