import _thread
import contextlib
import math
import threading
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import dense_mean
from scipy.optimize import minimize

from jaxbkgd import (
    AbstractEstimator,
    Background,
    calibrate,
    FramePairLoss,
    LocalMean,
    open_movie,
    SpatialMean,
    SpatialOpening,
    TruthLoss,
)
from jaxbkgd._calibration import calibrate as _calibrate
from jaxbkgd._calibration.descent import secant_descent


FRAME_COUNT, SIZE_PIX, BOUND_PIX = 40, 64, 30.0
Y, X = np.mgrid[:SIZE_PIX, :SIZE_PIX] + 0.5

# Short along y and long along x.
WAVES = 100 * (1 + 0.3 * np.sin(2 * np.pi * Y / 20) + 0.3 * np.sin(2 * np.pi * X / 60))
RNG = np.random.default_rng(20241122)
FRAMES = RNG.poisson(WAVES, (FRAME_COUNT, *Y.shape)).astype(np.uint16)
FRAMES.flags.writeable = False
# Where the pixels do not matter.
FEW = FRAMES[:, :8, :8]


@contextlib.contextmanager
def strict_modes():
    with (
        jax.debug_nans(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


def quietly(estimator: Any, channels: Any, **options: Any) -> Any:
    return calibrate(channels, estimator, progress=False, **options)


def error_of(radii_pix, frames=FRAMES, truth=WAVES):
    """The mean square error against the true background, in float64."""
    return np.mean((dense_mean(frames, tuple(radii_pix), "smooth") - truth) ** 2)


def triples(frames, lag):
    """Frames that have others at the lag on both sides, and these."""
    frames = frames.astype(np.float64)
    return frames[lag:-lag], frames[2 * lag :], frames[: -2 * lag]


def frame_pair_loss(frames, bkgds, lag):
    """The definition."""
    _, later, earlier = triples(frames, lag)
    square = np.mean((later - bkgds[lag:-lag]) * (earlier - bkgds[lag:-lag]))
    return 2 * square / np.mean((frames[lag:].astype(float) - frames[:-lag]) ** 2)


def windows(frames, lag=1, length=3):
    """What calibrate looks at, of a movie that so many triples divide."""
    return [
        frames[i : i + length + 2 * lag] for i in range(0, len(frames) - 2 * lag, length)
    ]


@pytest.fixture(scope="module")
def oracle():
    """The radii with the smallest error."""

    def error(logarithms):
        return error_of(np.exp(logarithms), FRAMES[::5])

    found = minimize(error, np.log([3, 9]), method="Nelder-Mead", options={"xatol": 0.01})
    return np.exp(found.x)


class TestRadii:
    @pytest.mark.long
    def test_the_oracle_is_found_from_any_start_without_the_truth(self, oracle):
        found, movie = [], FRAMES[:38]
        for start in (2.0, 25.0):
            estimator, history = quietly(
                SpatialMean((start, start), max_radius_pix=BOUND_PIX),
                movie,
                objective=FramePairLoss(1),
            )
            (radii,) = np.asarray(estimator.radii_pix)
            found.append(radii)
            assert error_of(radii) < 1.02 * error_of(oracle)
            # A tenth of a radius costs 2 %: the minimum is flat.
            np.testing.assert_allclose(radii, oracle, rtol=0.1)
            assert radii[1] > 1.7 * radii[0]
            assert history.is_converged
            assert "settled" in history.stop_reason
            # An entry for each step, whose loss belongs to its radii.
            assert history.radii.shape == (len(history.losses), 1, 2)
            assert history.radii_std.shape == history.is_at_bound.shape == (1, 2)
            np.testing.assert_allclose(history.radii[0], start, rtol=1e-6)
            best = history.radii[np.argmin(history.losses)]
            np.testing.assert_array_equal(estimator.radii_pix, best)
            assert not history.is_at_bound.any()
            assert history.lag == history.objective.lag == 1
            # 36 triples make 12 windows of 3, so that each counts once.
            for step in (0, 2, -1):
                bkgds = dense_mean(movie, tuple(history.radii[step, 0]), "smooth")
                parts = zip(windows(movie), windows(bkgds), strict=True)
                expected = np.mean([frame_pair_loss(*part, 1) for part in parts])
                # float32: of the frames, over their noise.
                loss = history.losses[step]
                np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-5)
        assert np.all(np.ptp(found, axis=0) < 0.01 * np.mean(found, axis=0))

    @pytest.mark.slow
    def test_the_oracle_is_found_with_the_truth(self, oracle):
        start = SpatialMean((7.0, 7.0), max_radius_pix=BOUND_PIX)
        estimator, history = quietly(start, FRAMES, objective=TruthLoss(WAVES), steps=12)
        assert error_of(np.asarray(estimator.radii_pix)[0]) < 1.005 * error_of(oracle)
        assert isinstance(history.objective, TruthLoss)
        assert history.lag is None

    @pytest.mark.long
    def test_tied_radii_stay_tied_and_channels_are_learned_apart(self, oracle, rng):
        # Rougher than the other, and with one radius for both axes, as the other.
        rough = 100 * (1 + 0.5 * np.sin(2 * np.pi * Y / 12) * np.sin(2 * np.pi * X / 12))
        rough = rng.poisson(rough, FRAMES.shape).astype(FRAMES.dtype)
        start = SpatialMean(np.array([[7.0], [7.0]]), max_radius_pix=BOUND_PIX)
        estimator, history = quietly(start, [FRAMES, rough], objective=FramePairLoss(1))
        assert estimator.unbounded_radii.shape == (2, 1)
        radii = np.asarray(estimator.radii_pix)
        assert np.all(np.ptp(radii, axis=1) == 0)
        assert oracle[0] < radii[0, 0] < oracle[1]
        assert 0.5 < radii[1, 0] < 0.8 * radii[0, 0]
        assert history.radii.shape[1:] == (2, 2)
        assert np.all(history.radii_std[:, 0] > 0)
        assert np.all(np.ptp(history.radii_std, axis=1) == 0)

    @pytest.mark.long
    def test_over_an_even_background_a_radius_goes_to_the_bound_and_a_frozen_one_stays(
        self, rng
    ):
        frames = rng.poisson(100, (16, 32, 32))
        start = SpatialMean((4.0, 4.0), max_radius_pix=12, frozen=(True, False))
        options: Any = {"objective": FramePairLoss(1), "steps": 15}
        match = r"1 of 2 radii went to their bound.*max_radius_pix.* \(12.0, 12.0\)"
        with pytest.warns(UserWarning, match=match):
            estimator, history = quietly(start, frames, **options)
        assert estimator.radii_pix[0, 1] > 0.98 * 12
        assert history.is_at_bound.tolist() == [[False, True]]
        np.testing.assert_array_equal(history.radii_std, [[np.nan, np.inf]])
        assert np.all(history.radii[:, 0, 0] == start.radii_pix[0, 0])
        assert estimator.radii_pix[0, 0] == start.radii_pix[0, 0]
        assert estimator.frozen == start.frozen


# A background that moves, and molecules that are on for a frame each.
DRIFTING = 100 * (
    1
    + 0.3
    * np.sin(2 * np.pi * (Y[:32, :32] + 0.1 * np.arange(60)[:, None, None]) / 24)
    * np.ones(32)
)


def blinking(rng):
    """Light of 2 molecules a frame."""
    places = rng.uniform(0, 32, (60, 2, 2, 1, 1))
    y, x = places[:, :, 0], places[:, :, 1]
    squares = (Y[:32, :32] - y) ** 2 + (X[:32, :32] - x) ** 2
    return 70 * np.exp(-squares / (2 * 1.3**2)).sum(axis=1)


def moving_mean(radius_pix, radius_frames, clip=None):
    # A block of several frames would smear what moves.
    fixed: Any = {"max_radius_pix": 7.0, "max_radius_frames": 20.0, "block_frames": 1}
    # The light is steady.
    return LocalMean(radius_pix, radius_frames, clip=clip, illumination_rank=0, **fixed)


@pytest.mark.usefixtures("quickly_compiled")
class TestOverTime:
    """`LocalMean`, which sees the frames before and after the one that it is judged by."""

    @pytest.mark.long
    def test_radii_are_nearly_the_best(self):
        frames = RNG.poisson(DRIFTING).astype(np.float32)

        @eqx.filter_jit
        def error(estimator):
            return jnp.mean((estimator(frames).bkgds - DRIFTING) ** 2)

        candidates = [(r, t) for r in (3, 4, 5) for t in (5, 7, 10)]
        best = min(error(moving_mean(*candidate)) for candidate in candidates)
        start = moving_mean(4.0, 18.0)
        estimator, history = quietly(start, frames, objective=FramePairLoss(1))
        assert history.is_converged
        assert history.radii.shape == (len(history.losses), 1, 3)
        # The radii are known to a part of themselves.
        learned = history.radii[history.losses.argmin()]
        assert np.all((history.radii_std > 0) & (history.radii_std < learned / 2))
        # A twentieth in the root mean square, as the frames' noise moves the minimum.
        assert error(estimator) < 1.05**2 * best

    @pytest.mark.long
    def test_the_loss_differs_as_the_error_does(self):
        @eqx.filter_jit
        def loss_and_error(estimator, frames):
            error = jnp.mean((estimator(frames).bkgds - DRIFTING) ** 2)
            return FramePairLoss(2)(estimator, frames), error

        radii, pairs = ((3, 5), (2, 1), (6, 5), (3, 18)), []
        for seed in range(4):
            rng = np.random.default_rng(seed)
            frames = rng.poisson(DRIFTING + blinking(rng)).astype(np.float32)
            estimators = [moving_mean(*pair, clip=3.0) for pair in radii]
            pairs.append([loss_and_error(module, frames) for module in estimators])
        losses, errors = np.mean(pairs, axis=0).T
        # Of the variance, 100, half a percent: where the lag is half of the radius in
        # frames, a frame is predicted from others that are farther away than its own. Under
        # 2 px and one frame, the loss is 11 % low, in 12 movies, too: the frame is a sixth
        # of its own mean, and its noise moves its weights.
        losses, errors = 100 * (losses - losses[0]), errors - errors[0]
        assert np.all(
            np.abs(losses - errors) < 0.5 + np.array([0.1, 0.12, 0.1, 0.1]) * abs(errors)
        )


# Estimators without radii, whose best numbers are known.


class Framewise(AbstractEstimator):
    """An estimator that sees one frame at a time."""

    @property
    def halo_frames(self) -> int:
        return 0


class Level(Framewise):
    """The same numbers for all rows and frames."""

    levels: jax.Array

    def estimate_stack(self, frames):
        return Background(jnp.broadcast_to(self.levels, frames.shape), jnp.ones(()))


class Haloed(Level):
    """As if it had to see two frames on either side."""

    @property
    def halo_frames(self) -> int:
        return 2


class Blend(Framewise):
    """Something between a frame and its mean."""

    weight: jax.Array

    def estimate_stack(self, frames):
        frames = frames.astype(float)
        means = frames.mean((1, 2), keepdims=True)
        return Background(frames + self.weight * (means - frames), jnp.ones(()))


def best_weight(frames, lag):
    """Where the frame-pair loss, quadratic in the weight, is smallest."""
    slopes, curvatures = [], []
    for window in windows(frames, lag):
        inner, later, earlier = triples(window, lag)
        variance = np.mean((window[lag:].astype(float) - window[:-lag]) ** 2)
        flat = inner.mean((1, 2), keepdims=True) - inner
        slopes.append(np.sum(flat * (later + earlier - 2 * inner)) / variance)
        curvatures.append(np.sum(2 * flat**2) / variance)
    return sum(slopes) / sum(curvatures)


def blend():
    return Blend(jnp.array(0.2))


def level(value=1.0):
    return Level(jnp.array(value))


def at_levels(answer):
    return lambda estimator, *_: answer(estimator.levels)


def towards_ten(estimator, channels, frame_indices):
    return jnp.square(estimator.levels - 10) / 2


class TestEstimators:
    @pytest.mark.slow
    def test_parameters_that_are_no_radii_are_learned(self):
        estimator, history = quietly(blend(), FEW[:38], objective=FramePairLoss(1))
        assert type(estimator) is Blend
        # Settled to a thousandth.
        np.testing.assert_allclose(estimator.weight, best_weight(FEW[:38], 1), rtol=2e-3)
        assert history.radii.shape == (len(history.losses), 1, 1)
        assert history.radii[0, 0, 0] == np.float32(0.2)
        assert 0 < history.radii_std[0, 0] < 0.1
        assert history.is_converged

    @pytest.mark.slow
    def test_the_standard_deviation_is_that_of_a_mean(self, rng):
        # Of each column by itself: 32 experiments at once.
        sigma, shape = 2.0, (64, 4, 32)
        frames = rng.normal(100, sigma, shape).astype(np.float32)

        def objective(estimator, channels, frame_indices):
            return jnp.mean(jnp.square(channels.mean(1) - estimator.levels))

        start = Level(jnp.full(32, 100.0))
        estimator, history = quietly(start, frames, objective=objective)
        windows = frames.mean(1).reshape(16, 4, 32).mean(1)
        # The minimum's place is known to a thousandth of its value's last change.
        np.testing.assert_allclose(estimator.levels, windows.mean(0), atol=0.03)
        (stated,) = history.radii_std
        # float32: gradients between points 0.1 apart, of numbers of 100.
        np.testing.assert_allclose(stated, windows.std(0, ddof=1) / 4, rtol=0.01)
        expected = sigma / np.sqrt(64 * 4)
        # Of 15 degrees of freedom a column: the error of a mean of chi squares.
        assert abs(np.mean(stated**2) / expected**2 - 1) < 4 * np.sqrt(2 / (15 * 32))
        errors = np.square(np.asarray(estimator.levels) - 100) / expected**2
        assert abs(np.mean(errors) - 1) < 4 * np.sqrt(2 / 32)

    @pytest.mark.slow
    def test_the_standard_deviation_is_unknown_where_it_cannot_be_known(self):
        # Two windows of one frame, and a loss without a minimum.
        _, history = quietly(level(), FEW[:2], objective=towards_ten)
        assert np.isnan(history.radii_std).all()

        def downhill(estimator, channels, frame_indices):
            return -estimator.levels * jnp.mean(channels.astype(float))

        _, history = quietly(level(), FEW, objective=downhill, steps=3)
        assert np.all(history.radii_std == np.inf)
        assert not history.is_converged
        assert "3 steps" in history.stop_reason

    @pytest.mark.slow
    @pytest.mark.usefixtures("as_installed")
    def test_what_is_no_estimator_or_has_nothing_to_learn_is_refused(self):
        with pytest.raises(ValueError, match=r"nothing to learn"):
            quietly(blend(), np.full_like(FEW, 100), objective=FramePairLoss(1))
        with pytest.raises(ValueError, match=r"SpatialOpening.* has nothing to learn"):
            quietly(SpatialOpening(), FEW)
        with pytest.raises(ValueError, match=r"There is nothing to learn"):
            quietly(SpatialMean(3.0).for_inference(), FEW, objective=FramePairLoss(1))
        with pytest.raises(
            TypeError, match=r"needs an AbstractEstimator.*given .*LocalMean"
        ):
            quietly(LocalMean, FEW)
        with pytest.raises(TypeError, match=r"^calibrate\(movie, estimator\) needs an"):
            quietly(FEW, level())


class TestObjectives:
    def test_a_user_may_write_an_objective(self):
        # Another level in the first frames, which alone the loss looks at.
        frames = np.full((40, 8, 8), 200, np.uint16)
        frames[:10] = 50

        def objective(estimator, channels, frame_indices):
            residuals = estimator(channels).residuals(channels)
            return jnp.mean((frame_indices < 10) * jnp.mean(residuals, (1, 2)) ** 2)

        estimator, history = quietly(level(45.0), frames, objective=objective)
        np.testing.assert_allclose(estimator.levels, 50, rtol=1e-3)
        assert history.objective is objective

    def test_an_objective_that_gives_no_finite_number_is_refused(self):
        for answer in (
            lambda levels: levels * jnp.ones(3),
            lambda levels: None,
            lambda levels: (levels, levels),
            lambda levels: levels + 1j,
            lambda levels: jnp.array(3),
        ):
            with pytest.raises(TypeError, match=r"scalar-output functions|real-valued out"):
                quietly(level(), FEW, objective=at_levels(answer))
        # The second has a gradient of zero times infinity.
        for answer in (lambda levels: jnp.log(-levels), lambda x: jnp.sqrt(0 * x)):
            with pytest.raises(ValueError, match=r"first radii .*nan.* must be finite"):
                quietly(level(), FEW, objective=at_levels(answer))

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (lambda loss, is_bad: jnp.where(is_bad, jnp.nan, loss), "the loss is nan"),
            (lambda loss, is_bad: eqx.error_if(loss, is_bad, "too high"), ""),
        ],
    )
    def test_an_objective_that_fails_later_stops_and_the_best_is_kept(self, spoil, reason):
        def objective(estimator, channels, frame_indices):
            loss = towards_ten(estimator, channels, frame_indices)
            return spoil(loss, estimator.levels > 5)

        match = rf"stopped at step \d+: .*{reason}.*best radii"
        with pytest.warns(UserWarning, match=match) as warned:
            estimator, history = quietly(level(), FEW, objective=objective)
        # JAX may have warned of its cache of programs, too.
        step = f"step {len(history.losses)}: "
        assert any(step in str(warning.message) for warning in warned)
        assert not history.is_converged
        assert 3 < estimator.levels <= 5
        assert estimator.levels == history.radii[-1, 0, 0]


class TestSteps:
    @pytest.mark.slow
    def test_an_optimizer_that_searches_along_a_line_works(self):
        options: Any = {"objective": towards_ten, "optimizer": optax.lbfgs(), "steps": 2}
        estimator, _ = quietly(level(9.0), FEW, **options)
        np.testing.assert_allclose(estimator.levels, 10, rtol=0.01)

    def test_the_best_is_kept_where_an_optimizer_runs_away(self):
        options: Any = {"objective": towards_ten, "optimizer": optax.sgd(50.0)}
        estimator, history = quietly(level(9.0), FEW, steps=5, **options)
        assert len(history.losses) == 5
        assert np.all(np.diff(history.losses) > 0)
        assert estimator.levels == 9
        for steps in (0, -1):
            with pytest.raises(ValueError, match="steps must be a whole number from 1 on"):
                quietly(level(), FEW, steps=steps, **options)

    @pytest.mark.slow
    def test_it_goes_on_while_anything_that_is_learned_moves(self):
        def towards_a_threshold_of_nine(estimator, channels, frame_indices):
            return (estimator.clip.threshold - 9) ** 2

        # The radii stay where they are.
        start = LocalMean(3.0, 2.0, max_radius_pix=4.0, max_radius_frames=3.0, frozen=True)
        options: Any = {"objective": towards_a_threshold_of_nine, "steps": 300}
        estimator, history = quietly(start, FEW, **options)
        assert history.is_converged
        # Settled to a thousandth.
        np.testing.assert_allclose(estimator.clip.threshold, 9, rtol=5e-3)

    def test_another_calibration_is_not_compiled_again(self):
        traced = []

        def objective(estimator, channels, frame_indices):
            traced.append(1)  # Python runs this only while JAX traces the function.
            return jnp.mean(jnp.square(estimator(channels).residuals(channels)))

        for value in (20.0, 30.0):
            quietly(level(value), FEW + int(value), objective=objective, steps=3)
            assert len(traced) == 1

    @pytest.mark.slow
    def test_loss_and_radii_are_shown_with_their_units(self, monkeypatch):
        shown = []

        @contextlib.contextmanager
        def listening_bar(total, is_shown):
            assert is_shown
            yield lambda done, text: shown.append((done, total, text))

        def objective(estimator, channels, frame_indices):
            return jnp.sum(jnp.square(estimator.radii)) / 8

        monkeypatch.setattr(_calibrate, "progress_bar", listening_bar)
        bounds: Any = {"max_radius_pix": 9.0, "max_radius_frames": 9.0}
        start = LocalMean([(4.0, 2.0), (6.0, 2.0)], 2.0, **bounds)
        calibrate([FEW, FEW], start, objective=objective, steps=2)
        assert [done for done, _, _ in shown] == [1, 2]
        radii = "2 frames, 4 px, 2 px, 2 frames, 6 px, 2 px"
        assert shown[0] == (1, 2, f"loss 8.5, radii {radii}")


@pytest.mark.parametrize("finished", [0, 3])
def test_after_ctrl_c_a_step_is_not_waited_for_and_the_best_is_kept(finished):
    calls, ended, may_end = [], [], threading.Event()

    def observe(_):
        calls.append(1)
        if len(calls) > finished:
            _thread.interrupt_main()
            may_end.wait(60)
            ended.append(1)

    def objective(estimator, channels, frame_indices):
        jax.debug.callback(observe, estimator.levels)
        return towards_ten(estimator, channels, frame_indices)

    try:
        # A single frame, and so a single window.
        if finished == 0:
            with pytest.raises(KeyboardInterrupt):
                quietly(level(), FEW[:1], objective=objective)
            return
        estimator, history = quietly(level(), FEW[:1], objective=objective)
        assert len(history.losses) == finished
        assert estimator.levels == history.radii[-1, 0, 0]
        assert not history.is_converged
        assert f"interrupted after {finished} steps" in history.stop_reason
        assert not ended
    finally:
        may_end.set()


@pytest.mark.parametrize(
    ("function", "start", "steps", "expected"),
    [
        # Once the curvature is known, a step is enough if it may be so long.
        (
            lambda p: jnp.sum(
                jnp.array([1e-3, 1, 1e4]) * (p - jnp.array([0.5, -1, 2])) ** 2
            ),
            [0.0, 0.0, 0.0],
            6,
            [0.5, -1.0, 2.0],
        ),
        # Wells, from the plateau around them.
        (
            lambda p: -jnp.sum(1 / (1 + ((p - 5) / 0.7) ** 2)),
            [-3.0, 4.0, 9.0],
            25,
            [5.0, 5.0, 5.0],
        ),
        # A number without a gradient at first, and another that never has one.
        (
            lambda p: (p[0] - 1) ** 2 + (p[0] * (p[1] - 2)) ** 2 + 0 * p[2],
            [0.0, 0.0, 0.7],
            25,
            [1.0, 2.0, 0.7],
        ),
    ],
    ids=["parabolas", "wells", "late"],
)
def test_secant_descent_finds_the_minimum_of(function, start, steps, expected):
    optimizer = secant_descent()

    @jax.jit
    def path(point):
        def step(carry, _):
            point, state = carry
            updates, state = optimizer.update(jax.grad(function)(point), state, point)
            return (optax.apply_updates(point, updates), state), None

        (point, _), _ = jax.lax.scan(step, (point, optimizer.init(point)), length=steps)
        return point

    # Where the curvature changes along the way, the last steps are a hundredth.
    np.testing.assert_allclose(path(jnp.array(start)), expected, atol=5e-3)


class Recorded:
    """A movie that is made as it is read, and records what was."""

    def __init__(self, frame_count: int, size_pix: int, mean: int = 50):
        self.shape = frame_count, size_pix, size_pix
        self.dtype = np.dtype(np.uint16)
        self.runs: list[tuple[int, int]] = []
        self._mean = mean

    def __getitem__(self, frames: Any) -> np.ndarray:
        start, stop, step = frames.indices(self.shape[0])
        assert step == 1
        self.runs.append((start, stop))
        size = stop - start, *self.shape[1:]
        if not self._mean:
            return np.zeros(size, self.dtype)
        rng = np.random.default_rng(start)
        return rng.integers(0, 2 * self._mean, size, self.dtype)


class TestMovies:
    @pytest.mark.long
    def test_a_long_movie_is_sampled(self):
        movie = Recorded(20_000, 64)
        estimator, history = quietly(blend(), movie, steps=3)
        lengths = [stop - start for start, stop in movie.runs]
        # For the lag, at most 512 frames and 2 megapixels at once; then at most 16
        # windows of two megapixels each.
        assert max(lengths) <= 512
        # What is found is found in three runs of 300.
        assert sum(lengths) <= 512 + 2**25 / 64**2 + 900
        assert len(lengths) <= 20
        assert min(start for start, _ in movie.runs) == 0
        assert max(stop for _, stop in movie.runs) == 20_000
        assert history.lag == 1
        # Nothing but noise about an even background.
        assert 0.9 < estimator.weight < 1.1

    @pytest.mark.parametrize("frame_count", [1, 17, 100])
    def test_a_short_movie_is_used_whole(self, frame_count):
        movie = Recorded(frame_count, 8)
        quietly(level(), movie, objective=towards_ten, steps=1)
        seen = {frame for run in movie.runs for frame in range(*run)}
        assert seen == set(range(frame_count))
        assert len(movie.runs) <= 16
        # All of one length, and compiled once.
        assert len({stop - start for start, stop in movie.runs}) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize(("frame_count", "lag"), [(7, 3), (80, 9), (90, 40)])
    def test_all_pairs_of_a_short_movie_are_used(self, frame_count, lag):
        movie = Recorded(frame_count, 8)
        quietly(blend(), movie, objective=FramePairLoss(lag), steps=1)
        # What comes after is read for the findings.
        length = movie.runs[0][1] - movie.runs[0][0]
        runs = [run for run in movie.runs if run[1] - run[0] == length]
        starts = [start for start, _ in runs]
        if length <= lag:
            # A window has three runs, which are read one after the other.
            firsts = starts[::3]
            assert [start + lag for start in firsts] == starts[1::3]
            assert [start + 2 * lag for start in firsts] == starts[2::3]
            count = length
        else:
            firsts, count = starts, length - 2 * lag
        places = {first + place for first in firsts for place in range(count)}
        assert places == set(range(frame_count - 2 * lag))

    @pytest.mark.slow
    def test_of_large_frames_few_are_kept_whatever_the_lag(self):
        movie = Recorded(500, 2048, mean=0)
        with pytest.raises(ValueError, match="nothing to learn"):
            quietly(level(), movie, objective=FramePairLoss(100), steps=1)
        assert sum(stop - start for start, stop in movie.runs) == 24

    def test_an_estimator_that_sees_other_frames_is_given_long_runs(self):
        movie = Recorded(3000, 256, mean=0)
        quietly(Haloed(jnp.array(1.0)), movie, objective=towards_ten, steps=1)
        assert [stop - start for start, stop in movie.runs] == [256, 256]

    @pytest.mark.long
    def test_paths_movies_and_arrays_of_any_dtype_give_the_same(self, tmp_path):
        path = tmp_path / "movie.npy"
        np.save(path, FEW)
        np.save(tmp_path / "two.npy", np.stack([FEW, FEW[::-1]], axis=1))
        objective = FramePairLoss(1)
        expected = quietly(blend(), FEW, objective=objective)[0].weight
        with open_movie(path) as movie:
            sources: list[Any] = [path, str(path), movie, movie.channels[0]]
            sources += [np.load(path, mmap_mode="r"), jnp.asarray(FEW)]
            for source in sources:
                estimator, _ = quietly(blend(), source, objective=objective)
                assert estimator.weight == expected
        for dtype in (">u2", ">f4"):
            estimator, _ = quietly(blend(), FEW.astype(dtype), objective=objective)
            # float32
            np.testing.assert_allclose(estimator.weight, expected, rtol=1e-6)
        channels = [FEW, FEW[::-1]]
        expected = quietly(blend(), channels, objective=objective)[0].weight
        for source in (tmp_path / "two.npy", (path, FEW[::-1])):
            estimator, _ = quietly(blend(), source, objective=objective)
            assert estimator.weight == expected

    @pytest.mark.slow
    def test_it_works_in_64_bit_mode(self, x64):
        start = eqx.tree_at(lambda level: level.levels, level(), np.float64(9))
        estimator, _ = quietly(start, FEW[:1], objective=towards_ten)
        assert np.asarray(estimator.levels).dtype == np.float64
        np.testing.assert_allclose(estimator.levels, 10, rtol=1e-3)
        start = Blend(jnp.array(0.2))
        few = FEW[:38].astype(float)
        estimator, history = quietly(start, few, objective=FramePairLoss(1))
        assert estimator.weight.dtype == np.float64
        np.testing.assert_allclose(estimator.weight, best_weight(FEW[:38], 1), rtol=2e-3)
        bkgds = few + 0.2 * (few.mean((1, 2), keepdims=True) - few)
        parts = zip(windows(few), windows(bkgds), strict=True)
        expected = np.mean([frame_pair_loss(*part, 1) for part in parts])
        np.testing.assert_allclose(history.losses[0], expected, rtol=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("mode", "objective"),
        [(strict_modes, FramePairLoss(3)), (jax.disable_jit, TruthLoss(WAVES[:8, :8]))],
    )
    def test_it_works_in_the_strict_modes_of_jax(self, mode, objective):
        expected, _ = quietly(blend(), FEW, objective=objective, steps=3)
        with mode():
            estimator, _ = quietly(blend(), FEW, objective=objective, steps=3)
        # float32
        np.testing.assert_allclose(estimator.weight, expected.weight, rtol=1e-5)

    @pytest.mark.long
    @pytest.mark.usefixtures("quickly_compiled")
    def test_what_is_found_of_molecules_works_there_too(self):
        # Of so many frames, molecules are looked for, too.
        expected, _ = quietly(SpatialMean(7.0), FRAMES, steps=2)
        with strict_modes():
            estimator, history = quietly(SpatialMean(7.0), FRAMES, steps=2)
        assert history.findings
        # float32
        np.testing.assert_allclose(estimator.radii, expected.radii, rtol=1e-5)

    def test_a_pixel_that_is_not_finite_is_named(self):
        frames = FEW.astype(np.float32)
        frames[33, 2, 5] = -math.inf
        match = r"Frame 33 holds -inf at y = 2, x = 5"
        for objective in (FramePairLoss(1), FramePairLoss(), TruthLoss(WAVES[:8, :8])):
            with pytest.raises(ValueError, match=match):
                quietly(blend(), frames, objective=objective)
        match = r"Frame 33 of channel 2 holds -inf"
        with jax.debug_infs(True), pytest.raises(ValueError, match=match):
            quietly(blend(), [FEW, frames], objective=FramePairLoss(1))

    @pytest.mark.usefixtures("as_installed")
    @pytest.mark.parametrize(
        ("movie", "message"),
        [
            (FEW[0], r"shape \(8, 8\); .*\(frames, height, width\)"),
            (FEW[:, :0], "has no frames|0 x 8 px"),
            (FEW[:0], "no frames|0 frames"),
            (np.float32(3), r"shape \(\); .*\(frames, height, width\)"),
            (3.0, "is a float; give a path, or an array"),
            ([], "no source; give a path"),
            (Path("missing.npy"), r"missing\.npy: "),
            ((FEW, FEW[:-1], FEW), r"40, 39, 40 frames; .* same length"),
        ],
    )
    def test_what_is_no_movie_is_refused(self, movie, message):
        with pytest.raises(ValueError, match=message):
            quietly(blend(), movie, objective=FramePairLoss(1))

    @pytest.mark.usefixtures("as_installed")
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"objective": "pairs"}, r"objective must be .*FramePairLoss.*'pairs'"),
            ({"optimizer": 3}, r"optimizer must be .*optax\.adam.*3"),
        ],
    )
    def test_what_is_no_objective_or_optimizer_is_refused(self, options, message):
        with pytest.raises(TypeError, match=message):
            quietly(blend(), FEW, **options)

    @pytest.mark.slow
    def test_a_movie_that_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match=r"40 frames, but at least 81 .* lag of 40"):
            quietly(blend(), FEW, objective=FramePairLoss(40))
        with pytest.raises(ValueError, match=r"40 frames, but the true background 39"):
            quietly(level(), FEW, objective=TruthLoss(np.ones((39, 8, 8))))
        with pytest.raises(ValueError, match=r"Haloed has no predict"):
            quietly(Haloed(jnp.array(1.0)), FEW, objective=FramePairLoss(1))
