"""Other estimators of the background, for background_accuracy.py.

Each is called by its own package where it has one that installs (smlmlp and arrlp,
picassosr, sep, photutils, scikit-image), and otherwise written here by its paper or its
source, and named so; those need scipy. Where there is a size to choose, all are tried.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product

import numpy as np

import jaxbkgd


# The sizes to choose from.
WINDOWS_FRAMES = (5, 12, 25, 50, 100)  # on either side
BOXES_PIX = (8, 16, 32, 64)
BALLS_PIX = (3, 5, 10, 20)
SMOOTHING_PIX = (0, 1, 2, 3, 5, 8)  # on either side
LEVELS = (2, 3, 4, 5, 6)  # of wavelets, each twice as large as the one before
SOFTNESSES = (1.0, 2.0)  # of residuals, in median ones
SHRINKAGES = (0.3, 1.0, 3.0)

EVER_FRAMES = 100

# Frames (frames, height, width) to backgrounds, one for each setting there is to choose
# from, with its name.
Estimate = Callable[..., Iterator[tuple[str, np.ndarray]]]


@dataclass(frozen=True)
class Estimator:
    """A way to the background, the package it needs, and how Matplotlib draws it.

    One that is slow, and sees each frame by itself, is given one in `every` frames. One
    that knows cameras is given frames as they are, and the camera.
    """

    name: str
    package: str
    estimate: Estimate
    style: str
    every: int = 1
    knows_cameras: bool = False


def _smlmlp(block: str, frames: np.ndarray, **settings: float) -> np.ndarray:
    """The backgrounds of one of smlmlp's blocks."""
    # smlmlp 0.1.20 takes from stacklp what stacklp 0.1.9 does not have.
    stacklp, arrlp = map(import_module, ("stacklp", "arrlp"))
    vars(stacklp).setdefault("get_xp", arrlp.get_xp)
    ((bkgds,), *_) = getattr(import_module("smlmlp"), block)([frames.copy()], **settings)
    return bkgds


def with_smlmlp(block: str, frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "default", _smlmlp(block, frames)


def with_best_median(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for window in WINDOWS_FRAMES:
        bkgds = _smlmlp("bkgd_temporal_median", frames, median_window_fr=window)
        yield f"± {window} frames", bkgds


def with_picasso(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Its movie less a temporal median, where that is positive: so of both signs."""
    localize = import_module("picasso.localize")
    for window in WINDOWS_FRAMES:
        # One median for a fifth of a window; for the whole of it by default.
        stride = max(1, 2 * window // 5)
        above, below = (
            localize.TemporalMedianMovie(movie, 2 * window + 1, stride=stride)[:]
            for movie in (frames, -frames)
        )
        yield f"± {window} frames", frames - (above - below)


def with_sep(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    sep = import_module("sep")
    for box in BOXES_PIX:
        bkgds = [sep.Background(frame, bw=box, bh=box).back() for frame in frames]
        yield f"{box} px", np.array(bkgds)


def with_photutils(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    photutils = import_module("photutils.background")
    for mode in (photutils.SExtractorBackground(), photutils.MMMBackground()):
        for box in BOXES_PIX:
            bkgds = [
                photutils.Background2D(frame, box, bkg_estimator=mode).background
                for frame in frames
            ]
            yield f"{type(mode).__name__}, {box} px", np.array(bkgds)


def with_rolling_ball(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    restoration = import_module("skimage.restoration")
    for radius in BALLS_PIX:
        bkgds = [restoration.rolling_ball(frame, radius=radius) for frame in frames]
        yield f"{radius} px", np.array(bkgds)


def with_percentile(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """PYME's background by its source, PYME/IO/buffers.py: in a window of frames, each
    pixel's lower quartile, shifted by what the medians of all pixels are higher."""
    # A pixel's frames side by side are sorted ten times faster.
    pixels = np.ascontiguousarray(np.moveaxis(frames, 0, -1))
    for window in WINDOWS_FRAMES:
        bkgds = np.empty_like(frames)
        for frame in range(len(frames)):
            around = np.sort(pixels[..., max(0, frame - window) : frame + window + 1])
            count = around.shape[-1]
            quartile, median = around[..., count // 4], around[..., count // 2]
            bkgds[frame] = quartile + np.median(median) - np.median(quartile)
        yield f"± {window} frames", bkgds


def expected_minimum(
    levels: np.ndarray, light: np.ndarray, read_noise: float
) -> np.ndarray:
    """Of each level, in electrons, the mean of the lowest of its pixel's frames.

    Read noise is taken for that of photons which are taken off again.
    """
    poisson = import_module("scipy.stats").poisson
    variance = read_noise**2
    most = (light.min() * levels + variance).max()
    counts = np.arange(most + 10 * np.sqrt(most) + 10)
    means = levels[:, None, None] * light[:, None] + variance
    return poisson.sf(counts, means).prod(1).sum(1) - variance


def with_ever(
    frames: np.ndarray, camera: jaxbkgd.Camera
) -> Iterator[tuple[str, np.ndarray]]:
    """EVER by its paper (Ma et al., Sci. Rep. 11, 20417, 2021): from the lowest value of
    each pixel in 100 frames to the level of which that is the mean, times the light of
    each frame, which is the mean of pixels without molecules.

    What the paper tabulates for the mean light of a block is computed here for the light
    of each frame.
    """
    ndimage = import_module("scipy.ndimage")
    gain = camera.known_gain("EVER")
    read_noise = float(np.mean(camera.read_noise_electrons))
    electrons = gain * (frames - np.asarray(camera.offset_adu, np.float64))
    blocks = []
    for block in np.split(electrons, range(EVER_FRAMES, len(frames), EVER_FRAMES)):
        # With few molecules, the deviation is less than twice that of photons. Light that
        # changes adds to that of all pixels.
        excess = block.var(0) / (np.median(block, axis=0) + read_noise**2)
        light = block[:, excess <= max(4.0, 2 * np.median(excess))].mean(1)
        light = np.maximum(light / light.mean(), 0)
        levels = np.geomspace(0.1, 2 * block.mean(0).max(), 100)
        minima = expected_minimum(levels, light, read_noise)
        blocks.append((block.min(0), light, minima, levels))
    for smoothing in SMOOTHING_PIX:
        bkgds = []
        for lowest, light, minima, levels in blocks:
            smooth, room = (
                ndimage.uniform_filter(image, 2 * smoothing + 1, mode="constant")
                for image in (lowest, np.ones_like(lowest))
            )
            level = np.interp(smooth / room, minima, levels)
            bkgds.append(light[:, None, None] * level)
        yield f"± {smoothing} px", np.concatenate(bkgds) / gain


def _low_pass(frames: np.ndarray, level: int) -> np.ndarray:
    """The frames without so many levels of à-trous wavelets of cubic B-splines."""
    ndimage = import_module("scipy.ndimage")
    for step in range(level):
        taps = np.zeros(4 * 2**step + 1, np.float32)
        taps[:: 2**step] = np.array([1, 4, 6, 4, 1]) / 16
        for axis in (1, 2):
            frames = ndimage.convolve1d(frames, taps, axis, mode="mirror")
    return frames


def with_iterated_wavelets(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """SMAP's wavelets by its source, BG_wavelet.m and mywaveletfilter.m: the coarse part of
    frames whose brightest hundredth is clipped; refined, that of what twice as many levels
    leave, clipped at three deviations, is added. The wavelets are those of Izeddin et al.,
    Opt. Express 20, 2081 (2012), which SMAP has beside its own."""
    clipped = np.minimum(frames, np.quantile(frames, 0.99, axis=(1, 2), keepdims=True))
    for level in LEVELS:
        yield f"level {level}", _low_pass(clipped, level)
        if 2 * level <= max(LEVELS):
            coarse = _low_pass(clipped, 2 * level)
            left = clipped - coarse
            left = np.minimum(left, 3 * left.std((1, 2), keepdims=True))
            yield f"level {level}, refined", coarse + _low_pass(left, level)


def with_wbns(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """WBNS by its paper (Hüpfel et al., Biomed. Opt. Express 12, 969, 2021): the coarse
    part of Haar wavelets, means over squares, under a Gaussian as wide as these."""
    gaussian_filter = import_module("scipy.ndimage").gaussian_filter
    _, height, width = frames.shape
    for level in LEVELS[:-1]:
        size = 2**level
        rest = (0, 0), (0, -height % size), (0, -width % size)
        padded = np.pad(frames, rest, mode="symmetric")
        count, y, x = padded.shape
        means = padded.reshape(count, y // size, size, x // size, size).mean((2, 4))
        squares = means.repeat(size, 1).repeat(size, 2)
        bkgds = gaussian_filter(squares, (0, size, size), mode="nearest")
        yield f"level {level}", bkgds[:, :height, :width]


def with_basic(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """BaSiC by its paper (Peng et al., Nat. Commun. 8, 14836, 2017): a baseline for each
    frame times one image, whose cosine transform is sparse, and residuals that are sparse.

    Both are by iteratively reweighted least squares. Of basicpy, version 1 does not import
    with what it installs, and 2 needs numpy 1: its error in the scene scale-20, 0.30 e- at
    its best smoothness, is that of this one.
    """
    fft = import_module("scipy.fft")
    for softness, shrinkage in product(SOFTNESSES, SHRINKAGES):
        baselines, image = frames.mean((1, 2)), np.ones(frames.shape[1:], np.float32)
        for _ in range(10):
            squares = (frames - baselines[:, None, None] * image) ** 2
            weights = 1 / (squares + softness**2 * np.median(squares) + 1e-6)
            sums = np.einsum("tyx,t->yx", weights, baselines**2)
            image = np.einsum("tyx,tyx,t->yx", weights, frames, baselines) / sums
            waves = fft.dctn(image, norm="ortho")
            least = shrinkage * np.median(np.abs(waves)) / 0.67
            kept = np.sign(waves) * np.maximum(np.abs(waves) - least, 0)
            kept[0, 0] = waves[0, 0]
            image = fft.idctn(kept, norm="ortho")
            baselines = np.einsum("tyx,tyx,yx->t", weights, frames, image)
            baselines /= np.einsum("tyx,yx->t", weights, image**2)
        setting = f"softness {softness:g}, shrinkage {shrinkage:g}"
        yield setting, baselines[:, None, None] * image


MEDIAN, BASIC = "smlmlp median", "BaSiC (paper)"

RIVALS = (
    Estimator(MEDIAN, "smlmlp", partial(with_smlmlp, "bkgd_temporal_median"), "sC1"),
    Estimator("smlmlp median, best window", "smlmlp", with_best_median, "DC1"),
    Estimator("smlmlp mean", "smlmlp", partial(with_smlmlp, "bkgd_spatial_mean"), "sC7"),
    Estimator(
        "smlmlp opening", "smlmlp", partial(with_smlmlp, "bkgd_spatial_opening"), "vC4"
    ),
    Estimator("smlmlp pipeline", "smlmlp", partial(with_smlmlp, "bkgd_combination"), "PC5"),
    Estimator("Picasso median", "picasso", with_picasso, "dC1"),
    Estimator("PYME percentile (source)", "numpy", with_percentile, "pC2"),
    Estimator("EVER (paper)", "scipy", with_ever, "hC0", knows_cameras=True),
    Estimator("SMAP wavelets (source)", "scipy", with_iterated_wavelets, "^C4"),
    Estimator("WBNS (paper)", "scipy", with_wbns, "vC6"),
    Estimator(BASIC, "scipy", with_basic, "Pk"),
    Estimator("sep, best box", "sep", with_sep, "^C2"),
    Estimator("photutils, best box", "photutils", with_photutils, "<C8"),
    Estimator("rolling ball, best radius", "skimage", with_rolling_ball, ">C6", every=10),
)
