"""The background of single-molecule localization microscopy movies, in JAX."""

from . import smlmlp as smlmlp
from ._batch.dask import estimate_dask as estimate_dask
from ._batch.lazy import (
    lazy_estimate as lazy_estimate,
    LazyEstimate as LazyEstimate,
)
from ._batch.run import estimate_movie as estimate_movie, MovieSummary as MovieSummary
from ._calibration.calibrate import calibrate as calibrate
from ._calibration.findings import Findings as Findings
from ._calibration.history import CalibrationHistory as CalibrationHistory
from ._calibration.hot_pixels import find_hot_pixels as find_hot_pixels
from ._calibration.molecules import Molecules as Molecules
from ._calibration.objectives import (
    FramePairLoss as FramePairLoss,
    Objective as Objective,
    SpikeInLoss as SpikeInLoss,
    TruthLoss as TruthLoss,
)
from ._estimators.background import Background as Background, snr as snr
from ._estimators.base import AbstractEstimator as AbstractEstimator
from ._estimators.camera import Camera as Camera
from ._estimators.chained import Chained as Chained
from ._estimators.detection import detection_threshold as detection_threshold
from ._estimators.local_mean import LocalMean as LocalMean
from ._estimators.matched import matched_snr as matched_snr
from ._estimators.photon_transfer import (
    CameraReport as CameraReport,
    measure_camera as measure_camera,
    measure_gain as measure_gain,
)
from ._estimators.soft_clip import SoftClip as SoftClip
from ._estimators.spatial_mean import (
    noise_correction as noise_correction,
    spatial_mean as spatial_mean,
    SpatialMean as SpatialMean,
)
from ._estimators.spatial_opening import SpatialOpening as SpatialOpening
from ._estimators.temporal_median import TemporalMedian as TemporalMedian
from ._movies.movie import (
    Channel as Channel,
    Movie as Movie,
    MovieError as MovieError,
)
from ._movies.open import open_movie as open_movie
from ._simulation import simulate_movie as simulate_movie, SimulatedTruth as SimulatedTruth
from ._version import __version__ as __version__
from ._workers import one_thread_a_call as one_thread_a_call
