"""The background layer for single-molecule localization microscopy in JAX."""

from . import smlmlp as smlmlp
from ._calibrate import calibrate as calibrate, History as History
from ._estimator import (
    AbstractEstimator as AbstractEstimator,
    Background as Background,
    snr as snr,
)
from ._objectives import FramePairLoss as FramePairLoss, TruthLoss as TruthLoss
from ._simulate import simulate_movie as simulate_movie, Truth as Truth
from ._spatial_mean import (
    noise_correction as noise_correction,
    spatial_mean as spatial_mean,
    SpatialMean as SpatialMean,
)
