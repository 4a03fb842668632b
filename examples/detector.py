"""A small detector of molecules that sees signal-to-noise maps: its network, its loss, what
it finds, and how right that is. `train_detector.py` trains it.

Each pixel has a probability that a molecule lies in it, and a Gaussian over where, with how
many photons, as in DECODE (Speiser et al., *Nat. Methods* 18, 1082, 2021).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key
from scipy.optimize import linear_sum_assignment

import jaxbkgd


GAIN_ELECTRONS_PER_ADU = 0.46
CAMERA = jaxbkgd.Camera(0.0, GAIN_ELECTRONS_PER_ADU)
# Molecules fainter than this in a frame need not be found, and are no error of a score if
# they are. The loss knows nothing of them.
LEAST_PHOTONS = 100.0
# The usual tolerance of challenges, 250 nm, in pixels of 100 nm.
TOLERANCE_PIX, PIXEL_NM = 2.5, 100.0

_CHANNELS, _KERNEL_PIX, _DEPTH = 16, 3, 3
# About one molecule in 700 pixels.
_FIRST_LOGIT = -6.5
# The likelihood of a molecule is that of the pixels so far from it at most.
_REACH_PIX = 1
# No position is known to better than this, nor a logarithm of photons.
_LEAST_STD = 0.02


class Molecules(NamedTuple):
    """The molecules of each frame, in places that may be empty."""

    y_pix: Float[Array, "frames places"]
    x_pix: Float[Array, "frames places"]
    photons: Float[Array, "frames places"]
    is_on: Bool[Array, "frames places"]


class Prediction(NamedTuple):
    """What each pixel says of a molecule in it."""

    logit: Float32[Array, "frames height width"]
    mean: Float32[Array, "frames 3 height width"]  # y, x, and the logarithm of photons
    std: Float32[Array, "frames 3 height width"]


class Detector(eqx.Module):
    """An estimator of the background, and a network that looks at the SNR map it leaves.

    The estimator is a part of the model: its radii are learned with the weights. With
    `psf_sigma_pix`, it looks at `matched_snr` for molecules of that width, instead of the
    SNR of single pixels.
    """

    estimator: jaxbkgd.AbstractEstimator
    layers: list[eqx.nn.Conv2d]
    psf_sigma_pix: float | None = eqx.field(static=True)

    def __init__(
        self,
        estimator: jaxbkgd.AbstractEstimator,
        key: Key[Array, ""],
        psf_sigma_pix: float | None = None,
    ):
        first, *others, last = jax.random.split(key, _DEPTH + 1)
        kernel = {"kernel_size": _KERNEL_PIX, "padding": "SAME"}
        self.estimator = estimator
        self.psf_sigma_pix = psf_sigma_pix
        self.layers = [
            eqx.nn.Conv2d(1, _CHANNELS, **kernel, key=first),
            *(eqx.nn.Conv2d(_CHANNELS, _CHANNELS, **kernel, key=key) for key in others),
            eqx.nn.Conv2d(_CHANNELS, 7, kernel_size=1, key=last),
        ]

    def __call__(
        self,
        movie: Float[Array, "frames height width"],
        background: jaxbkgd.Background | None = None,
    ) -> Prediction:
        """`movie` is in ADU above the camera's offset. A `background` that is given takes
        the place of the estimator's."""
        if background is None:
            background = self.estimator(movie)
        if self.psf_sigma_pix is None:
            snr = background.snr(movie, CAMERA)
        else:
            snr = background.matched_snr(movie, CAMERA, self.psf_sigma_pix)
        noise_electrons = jnp.sqrt(background.bkgds * GAIN_ELECTRONS_PER_ADU)
        *hidden, last = self.layers
        images = snr[..., None]
        for layer in hidden:
            images = jax.nn.silu(_convolved(layer, images))
        channels = jnp.moveaxis(_convolved(last, images), -1, 0)
        logit, y, x, log_snr, *log_stds = channels
        rows, columns = (jnp.arange(size, dtype=jnp.float32) for size in snr.shape[1:])
        mean = [
            rows[:, None] + _REACH_PIX * jnp.tanh(y),
            columns + _REACH_PIX * jnp.tanh(x),
            # Of a molecule's photons, some are in its brightest pixel.
            2 + log_snr + jnp.log(noise_electrons),
        ]
        std = _LEAST_STD + jax.nn.softplus(jnp.stack(log_stds, 1))
        return Prediction(logit + _FIRST_LOGIT, jnp.stack(mean, 1), std)


def _convolved(layer: eqx.nn.Conv2d, images: Float[Array, "frames height width channels"]):
    """With channels last, which takes a CPU less time."""
    order = ("NHWC", "OIHW", "NHWC")
    images = jax.lax.conv_general_dilated(
        images, layer.weight, (1, 1), "SAME", dimension_numbers=order
    )
    assert layer.bias is not None
    return images + layer.bias.ravel()


def loss(prediction: Prediction, molecules: Molecules) -> Float[Array, ""]:
    """Minus the logarithm of the likelihood of the molecules, a frame.

    They are points of a Poisson process, whose intensity is the sum over pixels of their
    probability times their Gaussian (Daley and Vere-Jones, *An Introduction to the Theory
    of Point Processes*, 2003, proposition 7.1.III).
    """
    _, height_pix, width_pix = prediction.logit.shape
    log_probability = jax.nn.log_sigmoid(prediction.logit)
    step = jnp.arange(-_REACH_PIX, _REACH_PIX + 1)

    def log_intensity(log_probability, mean, std, y_pix, x_pix, photons):
        """At one molecule of one frame."""
        row = jnp.round(y_pix).astype(int) + step[:, None]
        column = jnp.round(x_pix).astype(int) + step
        is_inside = (row >= 0) & (row < height_pix) & (column >= 0) & (column < width_pix)
        place = jnp.stack([y_pix, x_pix, jnp.log(photons)])[:, None, None]
        densities = jax.scipy.stats.norm.logpdf(
            place, mean[:, row, column], std[:, row, column]
        )
        terms = log_probability[row, column] + jnp.sum(densities, 0)
        return jax.nn.logsumexp(jnp.where(is_inside, terms, -jnp.inf))

    of_places = jax.vmap(log_intensity, (None, None, None, 0, 0, 0))
    y_pix, x_pix, photons, _ = molecules
    is_asked = asked(molecules, height_pix, width_pix)
    likelihoods = jax.vmap(of_places)(
        log_probability,
        *prediction[1:],
        jnp.where(is_asked, y_pix, 0),
        jnp.where(is_asked, x_pix, 0),
        jnp.where(is_asked, photons, 1),
    )
    expected = jnp.sum(jax.nn.sigmoid(prediction.logit))
    total = expected - jnp.sum(jnp.where(is_asked, likelihoods, 0))
    return total / len(prediction.logit)


def asked(molecules: Molecules, height_pix: int, width_pix: int):
    """Those that are to be found: bright enough, and inside of the frame."""
    y_pix, x_pix, photons, is_on = molecules
    is_inside = (y_pix >= -0.5) & (y_pix < height_pix - 0.5)
    is_inside &= (x_pix >= -0.5) & (x_pix < width_pix - 0.5)
    return is_on & is_inside & (photons >= LEAST_PHOTONS)


class Found(NamedTuple):
    """What a detector found, a row each."""

    frame: Int[np.ndarray, " found"]
    place_pix: Float[np.ndarray, "found 2"]  # y, x
    photons: Float[np.ndarray, " found"]
    score: Float[np.ndarray, " found"]


def found(prediction: Prediction, least_score: float = 0.5) -> Found:
    """One molecule for each pixel that is more probable than those around it, where they
    say together that there is one."""
    probability = jax.nn.sigmoid(prediction.logit)
    padding = [(0, 0), (1, 1), (1, 1)]
    around = (1, 3, 3)

    def over_neighbours(first, operation):
        return np.asarray(
            jax.lax.reduce_window(probability, first, operation, around, (1, 1, 1), padding)
        )

    score = over_neighbours(0.0, jax.lax.add)
    # Of equal neighbours, the first in the frame is the peak.
    order = np.arange(probability[0].size, 0, -1).reshape(probability.shape[1:])
    is_peak = np.asarray(probability) == over_neighbours(0.0, jax.lax.max)
    ranks = jnp.asarray(is_peak * order, jnp.float32)
    padded = jax.lax.reduce_window(ranks, 0.0, jax.lax.max, around, (1, 1, 1), padding)
    is_peak &= np.asarray(ranks == padded)
    frame, row, column = np.nonzero(is_peak & (score >= least_score))
    y_pix, x_pix, log_photons = np.asarray(prediction.mean)[frame, :, row, column].T
    place_pix = np.stack([y_pix, x_pix], 1)
    return Found(frame, place_pix, np.exp(log_photons), score[frame, row, column])


class Score(NamedTuple):
    """How right a detector is about the molecules within 250 nm."""

    jaccard: float
    recall: float
    precision: float
    rmse_nm: float


def scored(rows: Found, molecules: Molecules, shape_pix: tuple[int, int]) -> Score:
    """Each molecule is matched with one found at most, so that as many as can be are, and
    their distances add up to the least (Sage et al., *Nat. Methods* 16, 387, 2019)."""
    y_pix, x_pix, _, is_on = map(np.asarray, molecules)
    is_asked = np.asarray(asked(molecules, *shape_pix))
    squares, wrong = [], 0
    for frame, (on, asks) in enumerate(zip(is_on, is_asked, strict=True)):
        places = np.stack([y_pix[frame], x_pix[frame]], 1)
        mine = rows.place_pix[rows.frame == frame]
        distances, is_matched = matched(mine, places[asks])
        squares.extend(distances**2)
        # What is left may be one that need not be found.
        forgiven, _ = matched(mine[~is_matched], places[on & ~asks])
        wrong += len(mine) - len(distances) - len(forgiven)
    right, missed = len(squares), int(is_asked.sum()) - len(squares)
    return Score(
        right / max(right + wrong + missed, 1),
        right / max(right + missed, 1),
        right / max(right + wrong, 1),
        PIXEL_NM * float(np.sqrt(np.mean(squares))) if squares else float("nan"),
    )


def matched(
    places: Float[np.ndarray, "found 2"], truth: Float[np.ndarray, "molecules 2"]
) -> tuple[Float[np.ndarray, " matches"], Bool[np.ndarray, " found"]]:
    """The distances of the pairs in pixels, and which of the found are in one."""
    distances = np.linalg.norm(places[:, None] - truth, axis=-1)
    # A pair that is too far apart costs more than all that are not.
    is_far = distances > TOLERANCE_PIX
    costs = np.where(is_far, TOLERANCE_PIX * (1 + min(distances.shape)), distances)
    row, column = linear_sum_assignment(costs)
    is_pair = ~is_far[row, column]
    is_matched = np.zeros(len(places), bool)
    is_matched[row[is_pair]] = True
    return distances[row, column][is_pair], is_matched
