"""The background layer for single-molecule localization microscopy in JAX."""

from . import smlmlp as smlmlp
from ._batch import estimate_movie as estimate_movie, Summary as Summary
from ._calibrate import calibrate as calibrate, History as History
from ._chained import Chained as Chained
from ._dask import estimate_dask as estimate_dask
from ._estimator import (
    AbstractEstimator as AbstractEstimator,
    Background as Background,
    snr as snr,
)
from ._local_mean import LocalMean as LocalMean
from ._movies import Movie as Movie, MovieError as MovieError, open_movie as open_movie
from ._objectives import FramePairLoss as FramePairLoss, TruthLoss as TruthLoss
from ._simulate import simulate_movie as simulate_movie, Truth as Truth
from ._soft_clip import SoftClip as SoftClip
from ._spatial_mean import (
    noise_correction as noise_correction,
    spatial_mean as spatial_mean,
    SpatialMean as SpatialMean,
)
from ._spatial_opening import SpatialOpening as SpatialOpening
from ._temporal_median import TemporalMedian as TemporalMedian
