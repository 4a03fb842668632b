import contextlib
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import reference_mean
from scipy.optimize import minimize

from jaxbkgd import (
    AbstractEstimator,
    Background,
    calibrate,
    FramePairLoss,
    LocalMean,
    SpatialMean,
    SpatialOpening,
    TruthLoss,
)
from jaxbkgd._calibration import calibrate as _calibrate
from jaxbkgd._calibration.calibrate import secant_descent
from jaxbkgd._estimators.channels import map_channels


FRAME_COUNT, SIZE_PIX, BOUND_PIX = 40, 64, 30.0
Y, X = np.mgrid[:SIZE_PIX, :SIZE_PIX] + 0.5

# Short along y and long along x.
WAVES = 100 * (1 + 0.3 * np.sin(2 * np.pi * Y / 20) + 0.3 * np.sin(2 * np.pi * X / 60))
RNG = np.random.default_rng(20241122)
FRAMES = RNG.poisson(WAVES, (FRAME_COUNT, *Y.shape)).astype(np.uint16)
FRAMES.flags.writeable = False


def quietly(estimator, channels, **options):
    return calibrate(channels, estimator, progress=False, **options)


def error_of(radii_pix, frames=FRAMES, truth=WAVES):
    """The mean square error against the true background, in float64."""
    return np.mean((reference_mean(frames, tuple(radii_pix), "smooth") - truth) ** 2)


@pytest.fixture(scope="module")
def oracle():
    """The radii with the least error there is."""

    def error(logarithms):
        return error_of(np.exp(logarithms), FRAMES[::5])

    found = minimize(error, np.log([3, 9]), method="Nelder-Mead", options={"xatol": 0.01})
    return np.exp(found.x)


@pytest.fixture(scope="module")
def learned():
    """From three starts, without the truth."""
    objective = FramePairLoss(1)
    return [
        quietly(
            SpatialMean((start, start), max_radius_pix=BOUND_PIX),
            FRAMES,
            objective=objective,
        )
        for start in (2.0, 7.0, 25.0)
    ]


@pytest.fixture(scope="module")
def supervised():
    start = SpatialMean((7.0, 7.0), max_radius_pix=BOUND_PIX)
    return quietly(start, FRAMES, objective=TruthLoss(WAVES))


class TestRadii:
    def test_the_oracle_is_found_without_the_truth(self, learned, oracle):
        for estimator, history in learned:
            (radii,) = np.asarray(estimator.radii_pix)
            assert error_of(radii) < 1.02 * error_of(oracle)
            # A tenth of a radius costs 2 %: the minimum is flat.
            np.testing.assert_allclose(radii, oracle, rtol=0.1)
            assert history.is_converged
            assert "settled" in history.stop_reason

    def test_the_oracle_is_found_with_the_truth(self, supervised, oracle):
        (radii,) = np.asarray(supervised[0].radii_pix)
        assert error_of(radii) < 1.005 * error_of(oracle)
        np.testing.assert_allclose(radii, oracle, rtol=0.05)

    def test_all_starts_lead_to_the_same(self, learned):
        radii = np.stack([estimator.radii_pix for estimator, _ in learned])
        assert np.all(np.ptp(radii, axis=0) < 0.01 * radii.mean(axis=0))

    def test_each_axis_has_its_own(self, learned):
        (y, x) = np.asarray(learned[0][0].radii_pix[0])
        assert x > 1.7 * y

    def test_tied_radii_stay_tied_and_channels_are_learned_apart(self, oracle, rng):
        # Rougher than the other, and in one radius for both axes as that is.
        rough = 100 * (1 + 0.5 * np.sin(2 * np.pi * Y / 12) * np.sin(2 * np.pi * X / 12))
        rough = rng.poisson(rough, FRAMES.shape).astype(FRAMES.dtype)
        start = SpatialMean(np.array([[7.0], [7.0]]), max_radius_pix=BOUND_PIX)
        estimator, history = quietly(start, [FRAMES, rough], objective=FramePairLoss(1))
        assert estimator.unbounded_radii.shape == (2, 1)
        radii = np.asarray(estimator.radii_pix)
        assert np.all(np.ptp(radii, axis=1) == 0)
        assert oracle[0] < radii[0, 0] < oracle[1]
        assert 0.5 < radii[1, 0] < 0.8 * radii[0, 0]
        assert history.radii_pix.shape[1:] == (2, 2)
        assert np.all(history.radii_std_pix[:, 0] > 0)
        assert np.all(np.ptp(history.radii_std_pix, axis=1) == 0)

    def test_over_an_even_background_one_goes_to_the_bound_and_a_frozen_one_stays(
        self, rng
    ):
        frames = rng.poisson(100, (16, 32, 32))
        start = SpatialMean((4.0, 4.0), max_radius_pix=12, frozen=(True, False))
        with pytest.warns(UserWarning, match=r"1 of 2 radii went to their bound.* 12 px"):
            estimator, history = quietly(
                start, frames, objective=FramePairLoss(1), steps=15
            )
        assert estimator.radii_pix[0, 1] > 0.98 * 12
        assert history.is_at_bound.tolist() == [[False, True]]
        np.testing.assert_array_equal(history.radii_std_pix, [[np.nan, np.inf]])
        assert estimator.radii_pix[0, 0] == start.radii_pix[0, 0]
        assert np.all(history.radii_pix[:, 0, 0] == start.radii_pix[0, 0])
        assert estimator.frozen == start.frozen


def frame_pair_loss(frames, bkgds, lag):
    """The definition, for all pairs at once."""
    frames = frames.astype(np.float64)
    before, after = frames[:-lag], frames[lag:]
    variances = np.mean((after - before) ** 2, (1, 2)) / 2
    forward = np.mean((after - bkgds[:-lag]) ** 2, (1, 2)) / variances
    backward = np.mean((before - bkgds[lag:]) ** 2, (1, 2)) / variances
    return np.mean(forward + backward) / 2 - 1


class TestHistory:
    def test_each_loss_belongs_to_its_radii(self, learned):
        for _, history in learned[::2]:
            # 39 pairs make 13 windows of 3, so that each pair counts once.
            for step in (0, 2, -1):
                bkgds = reference_mean(FRAMES, tuple(history.radii_pix[step, 0]), "smooth")
                expected = frame_pair_loss(FRAMES, bkgds, 1)
                # float32: of the frames, over their noise.
                np.testing.assert_allclose(
                    history.losses[step], expected, rtol=1e-3, atol=1e-5
                )

    def test_it_has_an_entry_for_each_step(self, learned, supervised):
        for start, (estimator, history) in zip((2, 7, 25), learned, strict=True):
            steps = len(history.losses)
            assert history.radii_pix.shape == (steps, 1, 2)
            assert history.radii_std_pix.shape == history.is_at_bound.shape == (1, 2)
            np.testing.assert_allclose(history.radii_pix[0], start, rtol=1e-6)
            best = history.radii_pix[np.argmin(history.losses)]
            np.testing.assert_array_equal(estimator.radii_pix, best)
            assert not history.is_at_bound.any()
            assert history.objective.lag == 1
        assert isinstance(supervised[1].objective, TruthLoss)


# Of a background that moves, and molecules that are on for a frame each.
DRIFTING = 100 * (
    1
    + 0.3
    * np.sin(2 * np.pi * (Y[:48, :48] + 0.1 * np.arange(60)[:, None, None]) / 24)
    * np.ones(48)
)


def blinking(rng):
    """Light of 12 molecules a frame."""
    places = rng.uniform(0, 48, (60, 12, 2, 1, 1))
    y, x = places[:, :, 0], places[:, :, 1]
    squares = (Y[:48, :48] - y) ** 2 + (X[:48, :48] - x) ** 2
    return 70 * np.exp(-squares / (2 * 1.3**2)).sum(axis=1)


class TestOverTime:
    """`LocalMean`, which sees the frames before and after the one that it is judged by."""

    def test_radii_are_nearly_the_best_wherever_they_start(self):
        frames = RNG.poisson(DRIFTING).astype(np.float32)

        def module(radius_pix, radius_frames):
            return LocalMean(
                radius_pix,
                radius_frames,
                clip=None,
                max_radius_pix=7.0,
                max_radius_frames=40.0,
            )

        @eqx.filter_jit
        def error(estimator):
            return jnp.mean((estimator(frames).bkgds - DRIFTING) ** 2)

        best = min(error(module(r, t)) for r in (2, 3, 4, 5, 6) for t in (5, 7, 10, 14, 20))
        for radius_frames in (1.0, 35.0):
            start = module(4.0, radius_frames)
            estimator, history = quietly(start, frames, objective=FramePairLoss(1))
            assert history.is_converged
            assert history.radii_pix.shape == (len(history.losses), 1, 3)
            assert history.radii_std_pix.shape == (1, 3)
            # A twentieth in the root mean square, as the frames' noise moves the minimum.
            assert error(estimator) < 1.05**2 * best

    @pytest.mark.parametrize("clip", [None, 3.0])
    def test_the_loss_differs_as_the_error_does(self, clip):
        rng = np.random.default_rng(1)
        light = 0 if clip is None else blinking(rng)
        frames = rng.poisson(DRIFTING + light).astype(np.float32)

        @eqx.filter_jit
        def loss_and_error(estimator):
            error = jnp.mean((estimator(frames).bkgds - DRIFTING) ** 2)
            return FramePairLoss(2)(estimator, frames), error

        losses, errors = np.transpose(
            [
                loss_and_error(
                    LocalMean(
                        radius_pix,
                        radius_frames,
                        clip=clip,
                        max_radius_pix=7.0,
                        max_radius_frames=40.0,
                    )
                )
                for radius_pix, radius_frames in ((3, 5), (2, 1), (6, 5), (3, 30))
            ]
        )
        # Of the variance, 100; as far as molecules let it, of which small radii keep more.
        np.testing.assert_allclose(
            100 * (losses - losses[0]), errors - errors[0], rtol=0.2, atol=0.2
        )

    def test_windows_are_long_runs(self):
        movie = np.broadcast_to(np.uint8(0), (3000, 256, 256))
        module = LocalMean(2.0, 2.0)
        windows = _calibrate._draw_windows(movie, 3000, module, FramePairLoss(5))
        assert [len(window.frame_indices) for window in windows] == [256, 256]
        for window in windows:
            np.testing.assert_array_equal(np.diff(window.frame_indices), 1)


# Estimators without radii, whose best numbers are known.


class Level(AbstractEstimator):
    """The same numbers for all rows and frames."""

    levels: jax.Array

    @property
    def halo_frames(self) -> int:
        return 0

    def __call__(self, channels):
        def estimate(channel):
            return jnp.broadcast_to(self.levels, channel.shape)

        ones = map_channels(lambda _: jnp.ones(()), channels)
        return Background(map_channels(estimate, channels), ones)


class Haloed(Level):
    """As if it had to see two frames on either side."""

    @property
    def halo_frames(self) -> int:
        return 2


class Blend(AbstractEstimator):
    """Something between a frame and its mean."""

    weight: jax.Array

    @property
    def halo_frames(self):
        return 0

    def __call__(self, channels):
        frames = jnp.asarray(channels, float)
        means = frames.mean((1, 2), keepdims=True)
        return Background(frames + self.weight * (means - frames), jnp.ones(()))


def best_weight(frames, lag):
    """Where the frame-pair loss, quadratic in the weight, is least."""
    frames = frames.astype(np.float64)
    flat = frames.mean((1, 2), keepdims=True) - frames
    variances = np.mean((frames[lag:] - frames[:-lag]) ** 2, (1, 2), keepdims=True)
    steps = (frames[lag:] - frames[:-lag]) / variances
    products = np.sum(flat[:-lag] * steps) - np.sum(flat[lag:] * steps)
    squares = np.sum((flat[:-lag] ** 2 + flat[lag:] ** 2) / variances)
    return products / squares


def blend():
    return Blend(jnp.array(0.2))


def level(value=1.0):
    return Level(jnp.array(value))


def towards_ten(estimator, channels, frame_indices):
    return jnp.square(estimator.levels - 10) / 2


# Small, where the pixels are no matter.
FEW = FRAMES[:, :8, :8]


class TestEstimators:
    def test_one_without_radii_is_learned(self):
        estimator, history = quietly(blend(), FRAMES, objective=FramePairLoss(1))
        # Settled to a thousandth.
        np.testing.assert_allclose(estimator.weight, best_weight(FRAMES, 1), rtol=2e-3)
        assert history.radii_pix.shape == (len(history.losses), 1, 1)
        assert history.radii_pix[0, 0, 0] == np.float32(0.2)
        assert 0 < history.radii_std_pix[0, 0] < 0.1
        assert history.is_converged

    def test_its_standard_deviation_is_that_of_a_mean(self, rng):
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
        (stated,) = history.radii_std_pix
        # float32: gradients between points 0.1 apart, of numbers of 100.
        np.testing.assert_allclose(stated, windows.std(0, ddof=1) / 4, rtol=0.01)
        expected = sigma / np.sqrt(64 * 4)
        # Of 15 degrees of freedom a column: the error of a mean of chi squares.
        assert abs(np.mean(stated**2) / expected**2 - 1) < 4 * np.sqrt(2 / (15 * 32))
        errors = np.square(np.asarray(estimator.levels) - 100) / expected**2
        assert abs(np.mean(errors) - 1) < 4 * np.sqrt(2 / 32)

    def test_it_is_unknown_where_it_cannot_be_known(self):
        # Two windows of one frame, and a loss without a minimum.
        _, history = quietly(level(), FEW[:2], objective=towards_ten)
        assert np.isnan(history.radii_std_pix).all()

        def downhill(estimator, channels, frame_indices):
            return -estimator.levels * jnp.mean(channels.astype(float))

        _, history = quietly(level(), FEW, objective=downhill, steps=3)
        assert np.all(history.radii_std_pix == np.inf)
        assert not history.is_converged
        assert "3 steps" in history.stop_reason


class TestObjectives:
    def test_a_user_may_write_one(self):
        # Another level in the first frames, which alone the loss looks at.
        frames = np.full((40, 8, 8), 200, np.uint16)
        frames[:10] = 50

        def objective(estimator, channels, frame_indices):
            ratios = estimator(channels).snr(channels, gains=2.0)
            return jnp.mean((frame_indices < 10) * jnp.mean(ratios, (1, 2)) ** 2)

        estimator, history = quietly(level(45.0), frames, objective=objective)
        np.testing.assert_allclose(estimator.levels, 50, rtol=1e-3)
        assert history.objective is objective

    @pytest.mark.parametrize(
        "answer",
        [
            lambda estimator: estimator.levels * jnp.ones(3),
            lambda estimator: None,
            lambda estimator: (estimator.levels, estimator.levels),
            lambda estimator: estimator.levels + 1j,
            lambda estimator: jnp.array(3),
        ],
    )
    def test_one_that_gives_no_number_is_refused(self, answer):
        with pytest.raises(TypeError, match=r"one real number, but gives"):
            quietly(level(), FEW, objective=lambda estimator, *_: answer(estimator))

    @pytest.mark.parametrize(
        "answer",
        [lambda levels: jnp.log(-levels), lambda levels: jnp.sqrt(0 * levels)],
    )
    def test_one_that_is_not_finite_at_the_start_is_refused(self, answer):
        # The second has a gradient of zero times infinity.
        with pytest.raises(ValueError, match=r"first radii .*nan.* must be finite"):
            quietly(level(), FEW, objective=lambda module, *_: answer(module.levels))

    def test_one_without_anything_to_learn_is_refused(self):
        with pytest.raises(ValueError, match=r"nothing to learn"):
            quietly(blend(), np.full_like(FEW, 100), objective=FramePairLoss(1))
        with pytest.raises(ValueError, match=r"SpatialOpening.* has nothing to learn"):
            quietly(SpatialOpening(), FEW)

    def test_a_class_is_no_estimator(self, as_installed):
        with pytest.raises(TypeError, match=r"must be an AbstractEstimator"):
            quietly(LocalMean, FEW)

    def test_one_that_is_not_finite_later_stops_and_the_best_is_kept(self):
        def objective(estimator, channels, frame_indices):
            loss = towards_ten(estimator, channels, frame_indices)
            return jnp.where(estimator.levels > 5, jnp.nan, loss)

        with pytest.warns(UserWarning, match=r"stopped.* is nan") as warned:
            estimator, history = quietly(level(), FEW, objective=objective)
        assert f"step {len(history.losses)}: " in str(warned[0].message)
        assert not history.is_converged
        assert 3 < estimator.levels <= 5
        assert estimator.levels == history.radii_pix[-1, 0, 0]


class TestSteps:
    @pytest.mark.parametrize(
        ("optimizer", "steps"), [(optax.adam(0.3), 100), (optax.lbfgs(), 2)]
    )
    def test_any_optimizer_of_optax_works(self, optimizer, steps):
        estimator, history = quietly(
            level(9.0), FEW, objective=towards_ten, optimizer=optimizer, steps=steps
        )
        # Adam is not there yet, but near.
        np.testing.assert_allclose(estimator.levels, 10, rtol=0.01)
        assert len(history.losses) <= steps

    def test_the_best_is_kept_where_an_optimizer_runs_away(self):
        estimator, history = quietly(
            level(9.0), FEW, objective=towards_ten, optimizer=optax.sgd(50.0), steps=5
        )
        assert len(history.losses) == 5
        assert np.all(np.diff(history.losses) > 0)
        assert estimator.levels == 9

    def test_one_step_is_a_look_at_the_start(self):
        estimator, history = quietly(level(9.0), FEW, objective=towards_ten, steps=1)
        np.testing.assert_allclose(history.losses, [0.5], rtol=1e-6)
        assert estimator.levels == 9
        for steps in (0, -1):
            with pytest.raises(ValueError, match="at least 1"):
                quietly(level(), FEW, objective=towards_ten, steps=steps)

    @pytest.mark.parametrize("interrupted", [1, 3])
    def test_an_interruption_keeps_the_best(self, monkeypatch, interrupted):
        @contextlib.contextmanager
        def interrupting_bar(total, is_shown):
            def report(done, text):
                if done == interrupted:
                    raise KeyboardInterrupt

            yield report

        monkeypatch.setattr(_calibrate, "progress_bar", interrupting_bar)
        estimator, history = quietly(level(), FEW, objective=towards_ten)
        assert len(history.losses) == interrupted
        assert estimator.levels == history.radii_pix[-1, 0, 0]
        assert not history.is_converged
        assert f"interrupted after {interrupted} steps" in history.stop_reason

    def test_loss_and_radii_are_shown(self, monkeypatch):
        said = []

        @contextlib.contextmanager
        def listening_bar(total, is_shown):
            assert is_shown
            yield lambda done, text: said.append((done, total, text))

        monkeypatch.setattr(_calibrate, "progress_bar", listening_bar)
        calibrate(FEW, level(9.0), objective=towards_ten, steps=2)
        assert said[0] == (1, 2, "loss 0.5, radii 9 px")
        assert [done for done, _, _ in said] == [1, 2]


def descend(function, start, steps):
    """Where `secant_descent` gets to."""
    optimizer = secant_descent()

    @jax.jit
    def path(point):
        def step(carry, _):
            point, state = carry
            updates, state = optimizer.update(jax.grad(function)(point), state, point)
            return (optax.apply_updates(point, updates), state), None

        (point, _), _ = jax.lax.scan(step, (point, optimizer.init(point)), length=steps)
        return point

    return np.asarray(path(jnp.array(start)))


class TestSecantDescent:
    def test_a_sum_of_parabolas_is_minimal_in_a_few_steps(self):
        places, curvatures = np.array([0.5, -1.0, 2.0]), np.array([1e-3, 1.0, 1e4])

        def parabolas(point):
            return jnp.sum(curvatures * (point - places) ** 2)

        # Once their curvature is known, one step is enough if it may be so long.
        reached = descend(parabolas, np.zeros(3), 6)
        np.testing.assert_allclose(reached, places, atol=1e-5)

    @pytest.mark.parametrize("start", [-3.0, 4.0, 9.0])
    def test_a_well_is_found_from_the_plateau_around_it(self, start):
        def well(point):
            return -jnp.sum(1 / (1 + ((point - 5) / 0.7) ** 2))

        reached = descend(well, [start], 25)
        np.testing.assert_allclose(reached, 5, atol=1e-3)

    def test_what_has_no_gradient_stays(self):
        def function(point):
            return (point[0] - 2) ** 2 + 0 * point[1]

        reached = descend(function, [0.3, 0.7], 8)
        assert reached[1] == np.float32(0.7)
        np.testing.assert_allclose(reached[0], 2, atol=1e-5)

    def test_what_has_no_gradient_at_first_moves_later(self):
        def function(point):
            first, second = point
            return (first - 1) ** 2 + (first * (second - 2)) ** 2

        reached = descend(function, [0.0, 0.0], 25)
        np.testing.assert_allclose(reached, (1, 2), atol=0.01)


class Recorded:
    """A movie that is made as it is read, and records what was."""

    def __init__(self, frame_count, size_pix):
        self.shape = frame_count, size_pix, size_pix
        self.dtype = np.dtype(np.uint16)
        self.windows = []

    def __getitem__(self, frames):
        start, stop, step = frames.indices(self.shape[0])
        assert step == 1
        self.windows.append((start, stop))
        size = stop - start, *self.shape[1:]
        return np.random.default_rng(start).poisson(50, size).astype(self.dtype)


class TestTheWay:
    def test_an_objective_that_raises_later_loses_nothing(self):
        def brittle(estimator, channels, frame_indices):
            value = towards_ten(estimator, channels, frame_indices)
            return eqx.error_if(value, estimator.levels > 5, "too high")

        with pytest.warns(
            UserWarning, match=r"stopped at step \d+: .*best radii"
        ) as warned:
            estimator, history = quietly(level(), FEW, objective=brittle)
        assert f"step {len(history.losses)}: " in str(warned[0].message)
        assert not history.is_converged
        assert estimator.levels == history.radii_pix[np.argmin(history.losses)]

    def test_it_goes_on_while_anything_that_is_learned_moves(self):
        class Clipped(Level):
            clip: jax.Array = eqx.field(default_factory=lambda: jnp.array(1.0))
            max_radius_pix: float = 60.0

            @property
            def radii_pix(self):
                return jnp.full((1, 2), 3.0)

        def towards_a_hundred(estimator, channels, frame_indices):
            return (estimator.clip - 100) ** 2 + 0 * estimator.levels

        estimator, history = quietly(
            Clipped(jnp.array(1.0)), FEW, objective=towards_a_hundred, steps=300
        )
        assert history.is_converged
        # Settled to a thousandth.
        assert abs(estimator.clip - 100) < 0.1


class TestMovies:
    def test_a_long_movie_is_sampled(self):
        movie = Recorded(20_000, 64)
        estimator, history = quietly(blend(), movie, steps=3)
        lengths = [stop - start for start, stop in movie.windows]
        # For the lag, at most 512 frames and 2 megapixels at once; then at most 16
        # windows of two megapixels each.
        assert max(lengths) <= 512
        assert sum(lengths) <= 512 + 2**25 / 64**2
        assert len(lengths) <= 17
        assert min(start for start, _ in movie.windows) == 0
        assert max(stop for _, stop in movie.windows) == 20_000
        assert history.objective.lag == 1
        # Nothing but noise about an even background.
        assert 0.9 < estimator.weight < 1.1

    @pytest.mark.parametrize("frame_count", [1, 2, 16, 17, 100])
    def test_a_short_movie_is_used_whole(self, frame_count):
        movie = Recorded(frame_count, 8)
        quietly(level(), movie, objective=towards_ten, steps=1)
        seen = {frame for window in movie.windows for frame in range(*window)}
        assert seen == set(range(frame_count))
        assert len(movie.windows) <= 16
        # All of one length, and compiled once.
        assert len({stop - start for start, stop in movie.windows}) == 1

    @pytest.mark.parametrize(
        ("frame_count", "lag"), [(4, 3), (23, 3), (80, 9), (60, 40), (60, 1)]
    )
    def test_all_pairs_of_a_short_movie_are_used(self, frame_count, lag):
        objective = FramePairLoss(lag)
        windows = _calibrate._draw_windows(
            Recorded(frame_count, 8), frame_count, level(), objective
        )
        firsts = set()
        for window in windows:
            indices = np.asarray(window.frame_indices)
            # As the objective pairs them: by halves, or along one run.
            places = lag if len(indices) > 2 * lag else len(indices) // 2
            np.testing.assert_array_equal(indices[places:] - indices[:-places], lag)
            firsts |= set(indices[:-places].tolist())
        assert firsts == set(range(frame_count - lag))

    @pytest.mark.parametrize("lag", [1, 100])
    def test_of_large_frames_few_are_kept_whatever_the_lag(self, lag):
        movie = np.broadcast_to(np.uint8(0), (500, 2048, 2048))
        windows = _calibrate._draw_windows(movie, 500, level(), FramePairLoss(lag))
        assert sum(len(window.frame_indices) for window in windows) == 16

    def test_pairs_are_not_for_an_estimator_that_sees_its_target(self):
        with pytest.raises(ValueError, match=r"`predicted` as .* Haloed sees 2 on either"):
            quietly(Haloed(jnp.array(1.0)), FEW, objective=FramePairLoss(1))

    def test_a_movie_of_any_dtype_gives_the_same(self):
        weights = [
            quietly(blend(), FEW.astype(dtype), objective=FramePairLoss(1))[0].weight
            for dtype in ("u2", ">u2", "i8", ">f4")
        ]
        # float32, and settled to a thousandth.
        np.testing.assert_allclose(weights, weights[0], rtol=1e-6)

    def test_it_works_in_64_bit_mode(self, x64):
        start = Blend(jnp.array(0.2))
        estimator, history = quietly(start, FEW.astype(float), objective=FramePairLoss(1))
        assert estimator.weight.dtype == np.float64
        np.testing.assert_allclose(estimator.weight, best_weight(FEW, 1), rtol=2e-3)
        flat = FEW.mean((1, 2), keepdims=True)
        expected = frame_pair_loss(FEW, FEW + 0.2 * (flat - FEW), 1)
        np.testing.assert_allclose(history.losses[0], expected, rtol=1e-12)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_pixel_that_is_not_finite_is_named(self, value):
        frames = FEW.astype(np.float32)
        frames[33, 2, 5] = value
        for objective in (FramePairLoss(1), FramePairLoss(), TruthLoss(WAVES[:8, :8])):
            with pytest.raises(
                ValueError, match=rf"Frame 33 holds {value} at y = 2, x = 5"
            ):
                quietly(blend(), frames, objective=objective)

    @pytest.mark.parametrize(
        "movie",
        [FEW[0], FEW[None], FEW[:, :0], FEW[:0], np.float32(3), 3.0],
    )
    def test_what_is_no_movie_is_refused(self, movie):
        with pytest.raises(ValueError, match=r"\(frames, height, width\)"):
            quietly(blend(), movie, objective=FramePairLoss(1))

    def test_channels_of_different_lengths_are_refused(self):
        with pytest.raises(ValueError, match=r"40, 39, 40 frames; .* same length"):
            quietly(level(), (FEW, FEW[:-1], FEW), objective=FramePairLoss(1))

    def test_a_movie_that_is_too_short_is_refused(self):
        with pytest.raises(ValueError, match=r"40 frames, but at least 41 .* lag of 40"):
            quietly(blend(), FEW, objective=FramePairLoss(40))
        with pytest.raises(ValueError, match=r"40 frames, but the true background 39"):
            quietly(level(), FEW, objective=TruthLoss(np.ones((39, 8, 8))))
