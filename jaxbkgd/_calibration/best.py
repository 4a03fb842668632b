"""The best estimator of a movie: its structure, its radii, and what is known of it."""

import itertools as it
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from .._estimators.camera import Camera
from .._estimators.light_model import LEAST_FRAME_PIX
from .._estimators.local_mean import LocalMean
from .._estimators.radii_estimator import RadiiEstimator
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Channel
from .._workers import free_bytes, progress_bar, run_interruptibly
from .blinking import UnlearnableError
from .findings import doubts_of, Findings, findings_of, molecules_of
from .history import CalibrationHistory
from .molecules import Molecules
from .movie_patterns import sample_rank, with_movie_patterns
from .objectives import FramePairLoss
from .sample import draw_sample, Sample
from .search import ChannelSearch, EACH_FRAME, LARGEST_PIX, Radii, Structure, structures


# Radii whose spikes are looked at before the usual ones are taken.
MOST_CHECKED = 6
# Radii that are tried where the first structure is the best.
_USUAL_TRIALS = 12
# A lag that is a larger share of a run leaves few frames to predict from.
_LONGEST_LAG = 0.25
_LONG_LIVED = (
    "molecules stay on for too long to be told from the background by time; the error is "
    "too large, and the radii may be too small: give a longer movie"
)
# At this share of the longest, a radius in frames is at its bound.
_AT_BOUND = 0.98
_EVEN = (
    "a radius in pixels is the largest that is tried: the background is even, and larger "
    "radii may be better still; give calibrate a LocalMean with a larger max_radius_pix"
)
_SEVERAL = (
    "each frame is a mixture of several patterns of light, for which the error that is "
    "stated may be far off: in Python, compare the result with that of "
    "LocalMean(illumination_rank=1)"
)
# The squared error of a mean under 7 px that is due to the noise of its own frame alone,
# as a share of the variance of a pixel: 1 / (4 pi sigma^2).
_LEAST_OF_MEAN = 0.0065
# The share of pixels that may have the largest value by chance.
_MOST_SATURATED = 0.01


def find_best(
    channels: Sequence[Channel],
    masks: Sequence[Channel | None],
    cameras: Sequence[Camera],
    psf_sigma_pix: float | None,
    progress: bool,
) -> tuple[RadiiEstimator, CalibrationHistory]:
    """That with the lowest error whose molecules keep their light; see `calibrate`."""
    try:
        sample = draw_sample(channels, masks, cameras)
    except UnlearnableError as error:
        return _usual(str(error), channels)
    skips_nan = not all(jnp.isfinite(frames).all() for run in sample.runs for frames in run)
    # Twice what an estimate takes must be free.
    frame_pixels = sum(math.prod(channel.shape[1:]) for channel in channels)
    most_bytes = free_bytes() / (2 * frame_pixels)
    most = _USUAL_TRIALS * len(channels)
    with progress_bar(most, progress) as report:
        tried = it.count(1)

        def count_trial() -> None:
            report(min(next(tried), most - 1), "trying radii")

        searches, structure, rows, findings = run_interruptibly(
            _search, sample, psf_sigma_pix, skips_nan, most_bytes, count_trial
        )
    is_found = all(blinking.is_found for blinking in sample.blinking)
    is_found &= sample.lag < _LONGEST_LAG * min(map(len, sample.runs[0]))
    estimator = structure.estimator(rows, None, skips_nan)
    trials = [list(search.trials[structure].values()) for search in searches]
    count = max(map(len, trials))
    # Channels for which fewer radii were tried keep their last ones.
    steps = [[of[min(n, len(of) - 1)] for of in trials] for n in range(count)]
    axes = len(estimator.max_radii)
    radii_std = np.array(
        [s.radii_std(structure, row) for s, row in zip(searches, rows, strict=True)]
    )
    bounds = np.array([_AT_BOUND * structure.longest, LARGEST_PIX, LARGEST_PIX])
    is_at_bound = (np.array(rows) >= bounds)[:, -axes:]
    doubts = [*([] if is_found else [_LONG_LIVED]), *doubts_of(findings)]
    if is_at_bound[:, -2:].any():
        doubts.append(_EVEN)
    doubts += _saturation_doubts(sample)
    if structure.rank != 1:
        estimator = with_movie_patterns(estimator, channels, masks, cameras)
        doubts.append(_SEVERAL)
    if is_at_bound[:, 0].any() and structure not in structures(math.inf, structure.rank):
        doubts.append(
            f"the radius in frames is kept to {structure.longest:.0f}, since memory is "
            "short for chunks of more frames: give boxes, or free memory"
        )
    dark = sample.dark_frames
    left_out = f" without {dark} dark frames" if dark else ""
    return estimator, CalibrationHistory(
        losses=np.array([np.mean([t.loss for t in step]) for step in steps]),
        radii=np.array([[t.radii for t in step] for step in steps])[..., -axes:],
        radii_std=radii_std[:, -axes:],
        is_at_bound=is_at_bound,
        is_converged=True,
        stop_reason=f"{sum(map(len, trials))} radii were tried{left_out}",
        objective=FramePairLoss(sample.lag),
        findings=tuple(findings),
        doubts=tuple(doubts),
    )


def _saturation_doubts(sample: Sample) -> list[str]:
    """Those of channels in which many pixels have the largest value."""
    doubts = []
    for number, runs in enumerate(zip(*sample.runs, strict=True), 1):
        frames = jnp.concatenate([run.reshape(-1) for run in runs])
        largest = float(jnp.nanmax(frames))
        share = float(jnp.sum(frames == largest) / jnp.sum(jnp.isfinite(frames)))
        if share > _MOST_SATURATED:
            name = f"channel {number}: " if len(sample.blinking) > 1 else ""
            doubts.append(
                f"{name}{share:.0%} of the pixels have the largest value, {largest:.4g} "
                f"{sample.unit}: the camera is saturated there, and the light is more than "
                "that; give less light, or mask that part"
            )
    return doubts


def _usual(
    flaw: str, channels: Sequence[Channel]
) -> tuple[RadiiEstimator, CalibrationHistory]:
    """The defaults, where nothing can be learned."""
    least_pix = min(min(channel.shape[1:]) for channel in channels)
    usual, name = LocalMean(), "LocalMean()"
    if least_pix < LEAST_FRAME_PIX:
        usual, name = SpatialMean(7.0), "SpatialMean(7.0)"
    doubt = f"{flaw}; until then, {name} is used as it is"
    return usual, CalibrationHistory(
        losses=np.zeros(0),
        radii=np.zeros((0, *usual.radii.shape)),
        radii_std=np.full(usual.radii.shape, np.nan),
        is_at_bound=np.zeros(usual.radii.shape, bool),
        is_converged=False,
        stop_reason=flaw,
        objective=FramePairLoss(),
        doubts=(doubt,),
    )


def _search(
    sample: Sample,
    psf_sigma_pix: float | None,
    skips_nan: bool,
    most_bytes: float,
    report: Callable[[], None],
) -> tuple[list[ChannelSearch], Structure, list[Radii], list[Findings]]:
    """What was tried, and the structure, radii and findings of the best."""
    searches = [
        ChannelSearch(sample.of_channel(number), skips_nan, report)
        for number in range(len(sample.blinking))
    ]
    allowed = structures(most_bytes, sample_rank(sample, skips_nan))
    ranked = _ranked_structures(searches, allowed)
    usual = [search.estimator(allowed[0], allowed[0].usual) for search in searches]
    molecules = [
        molecules_of(estimator, search.sample, psf_sigma_pix)
        for estimator, search in zip(usual, searches, strict=True)
    ]
    for structure, best in ranked:
        guarded = [
            _guard(search, structure, radii, of_channel)
            for search, radii, of_channel in zip(searches, best, molecules, strict=True)
        ]
        rows, findings = map(list, zip(*guarded, strict=True))
        # The last one is taken in any case, and the doubts say what it does.
        is_last = structure is ranked[-1][0]
        if is_last or not any(of.takes_molecules for of in findings):
            return searches, structure, rows, findings
    raise AssertionError("There is a last structure.")


def _ranked_structures(
    searches: Sequence[ChannelSearch], structures: Sequence[Structure]
) -> list[tuple[Structure, list[Radii]]]:
    """Structures and the best radii of each channel, from that with the lowest error in the
    geometric mean of channels to the slowest, which takes molecules last. Faster ones are
    tried where the background changes within the radius in frames."""
    is_masked = searches[0].skips_nan
    found: dict[Structure, float] = {}
    best: dict[Structure, list[Radii]] = {}
    for structure in structures:
        trials = [search.best(structure) for search in searches]
        losses = [max(trial.loss, trial.std) for trial in trials]
        found[structure] = float(np.mean(np.log(losses)))
        best[structure] = [trial.radii for trial in trials]
        is_slow = all(
            trial.radii[0] > 1.01 * structure.shortest
            and not (structure.block_frames > 1 and trial.is_uneven)
            and trial.loss < _LEAST_OF_MEAN * trial.variance
            for trial in trials
        )
        # A mean over each frame takes no masks.
        if (structure.longest and is_slow) or (structure is EACH_FRAME and is_masked):
            break
    ranked = sorted(found, key=lambda structure: found[structure])
    return [
        (structure, best[structure])
        for structure in ranked[: ranked.index(structures[0]) + 1]
    ]


def _guard(
    search: ChannelSearch, structure: Structure, radii: Radii, molecules: list[Molecules]
) -> tuple[Radii, Findings]:
    """The given radii, or those with the lowest loss that do not take molecules for
    background, or the usual ones; and what is found with them."""
    usual = search.trial(structure, structure.usual)
    others = sorted(search.trials[structure].values(), key=lambda trial: trial.loss)
    candidates = [radii, *[t.radii for t in others if t.loss <= usual.loss]]
    failed: list[Radii] = []

    def found(candidate: Radii) -> Findings:
        estimator = search.estimator(structure, candidate)
        return findings_of(estimator, search.sample, molecules)[0]

    for candidate in dict.fromkeys(candidates):
        if candidate == usual.radii or len(failed) == MOST_CHECKED:
            break
        # Radii below those that take molecules take them, too.
        if any(all(np.less_equal(candidate, other)) for other in failed):
            continue
        findings = found(candidate)
        if not findings.takes_molecules:
            return candidate, findings
        failed.append(candidate)
    return usual.radii, found(usual.radii)
