"""The example of training: its loss, what it finds, its scores, and that it trains."""

from functools import partial
from importlib import import_module
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_compilation

import jaxbkgd


with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    detector, train_detector = map(import_module, ("detector", "train_detector"))


pytestmark = pytest.mark.slow

NOWHERE = -30.0  # a logit
STEPS = 30  # of all trainings here, so that they share one program
LIGHT = "steady"
# Estimators of one frame, which take less time to compile.
TRAINED, FROZEN = NAMES = ["from 7 px", "7 px"]
STARTS = {"from 2 px": 2.0, "from 25 px": 25.0, TRAINED: 7.0, FROZEN: 7.0}


@pytest.fixture(autouse=True, scope="module")
def small_movies():
    # And radii that are moved faster, in so few steps.
    small = {"FRAMES": 8, "LONG_MOVIES": 1, "LONG_FRAMES": 8, "RADIUS_RATE": 0.2}
    with pytest.MonkeyPatch.context() as patch, quick_compilation():
        for name, value in small.items():
            patch.setattr(train_detector, name, value)
        for name, start_pix in STARTS.items():
            first = partial(jaxbkgd.SpatialMean, start_pix, max_radius_pix=30.0)
            kind = train_detector.Kind(first, LIGHT, is_trained=name != FROZEN)
            patch.setitem(train_detector.KINDS, name, kind)
        yield


@pytest.fixture(scope="module")
def whole(small_movies, tmp_path_factory) -> Path:
    """A folder in which two kinds were trained."""
    folder = tmp_path_factory.mktemp("whole")
    train_detector.main(folder, NAMES, [0], steps=STEPS)
    return folder


def prediction_of(places, size_pix=9, logit=0.0, std=0.3):
    """One frame, in which the pixels of these places say that a molecule is exactly there,
    with 400 photons."""
    shape = (size_pix, size_pix)
    logits = np.full(shape, NOWHERE, np.float32)
    mean = np.zeros((3, *shape), np.float32)
    for y_pix, x_pix in places:
        pixel = round(y_pix), round(x_pix)
        logits[pixel] = logit
        mean[:, *pixel] = y_pix, x_pix, np.log(400.0)
    stds = np.full_like(mean, std)
    return detector.Prediction(*map(jnp.asarray, (logits[None], mean[None], stds[None])))


def molecules_of(*places, photons=400.0):
    y_pix, x_pix = np.array(places, np.float32).reshape(-1, 2).T
    light = np.full_like(y_pix, photons)
    is_on = np.ones_like(y_pix, bool)
    return detector.Molecules(
        *(jnp.asarray(row)[None] for row in (y_pix, x_pix, light, is_on))
    )


@pytest.mark.long
def test_backgrounds_bleach_as_fast_in_short_movies_as_in_long_ones():
    levels = []
    for frame_count in (2, train_detector.LONG_FRAMES):
        movie = train_detector.simulated(7, frame_count=frame_count, light=LIGHT)
        bkgds = np.asarray(movie.background.bkgds)
        levels.append(bkgds[1] / bkgds[0])
    # float32.
    np.testing.assert_allclose(*levels, rtol=1e-5)


def test_pulsed_light_is_light_on_the_background_and_its_noise_is_photon_noise():
    movies = [
        train_detector.simulated(8, frame_count=train_detector.LONG_FRAMES, light=light)
        for light in train_detector.LIGHTS
    ]
    steady, pulsed = (np.asarray(movie.background.bkgds) for movie in movies)
    light = np.mean(pulsed / steady, (1, 2))
    # float32.
    np.testing.assert_allclose(pulsed, light[:, None, None] * steady, rtol=1e-5)
    # Four standard deviations of the flicker of two frames.
    np.testing.assert_allclose(light[::4] / light[1::4], 1.35, rtol=4 * 0.015 * 2**0.5)
    frames, lit_frames = (np.asarray(movie.frames, float) for movie in movies)
    expected = 0.46 * (pulsed - steady).astype(float)
    errors = 0.46 * (lit_frames - frames) - expected
    # Of Poisson numbers, the variance is the mean, m, and the fourth central moment is
    # m + 3 m^2. Five standard errors.
    variance, moment = expected.mean(), np.mean(expected + 2 * expected**2)
    mean_error, square_error = 5 * np.sqrt(np.array([variance, moment]) / errors.size)
    assert abs(errors.mean()) < mean_error
    assert abs(np.mean(errors**2) - variance) < square_error


class TestLoss:
    def test_is_minus_the_logarithm_of_the_likelihood_of_points(self):
        place = (4.2, 3.9)
        for logit, distance in ((0.0, 0.0), (2.0, 0.5)):
            value = detector.loss(
                prediction_of([place], logit=logit),
                molecules_of((place[0] + distance, place[1])),
            )
            probability = 1 / (1 + np.exp(-logit))
            # Three normal densities, of which one is off its centre.
            density = (2 * np.pi) ** -1.5 * 0.3**-3 * np.exp(-((distance / 0.3) ** 2) / 2)
            expected = probability - np.log(probability * density)
            # Some float32 roundings; what the other pixels say is less.
            assert value == pytest.approx(expected, rel=1e-5)

    def test_does_not_ask_for_what_is_outside_or_faint(self):
        empty = prediction_of([])
        faint = molecules_of((4, 4), photons=detector.LEAST_PHOTONS - 1)
        for unseen in (molecules_of((-2, 4)), molecules_of((4, 9)), faint):
            assert detector.loss(empty, unseen) == pytest.approx(0, abs=1e-6)
        value, gradient = eqx.filter_value_and_grad(detector.loss)(
            prediction_of([(4, 4)]), molecules_of((-2, 4))
        )
        assert jnp.isfinite(value)
        assert all(jnp.all(jnp.isfinite(part)) for part in gradient)


class TestFound:
    def test_is_one_for_each_peak(self):
        rows = detector.found(prediction_of([(2.3, 2.1), (6.0, 5.6)], logit=3.0))
        np.testing.assert_allclose(rows.place_pix, [(2.3, 2.1), (6.0, 5.6)], rtol=1e-6)
        np.testing.assert_allclose(rows.photons, 400, rtol=1e-5)
        np.testing.assert_allclose(rows.score, 1 / (1 + np.exp(-3.0)), rtol=1e-6)

    def test_neighbours_that_are_not_sure_add_up(self):
        # Two pixels share a molecule between them.
        prediction = prediction_of([(4.4, 4.0), (4.6, 4.0)], logit=-0.2)
        rows = detector.found(prediction)
        assert len(rows.frame) == 1
        assert rows.score[0] == pytest.approx(2 / (1 + np.exp(0.2)), rel=1e-5)
        assert len(detector.found(prediction, least_score=0.95).frame) == 0


class TestScores:
    @staticmethod
    def score(found_places, true_places):
        places = np.array(found_places, float).reshape(-1, 2)
        count = len(places)
        rows = detector.Found(
            np.zeros(count, int), places, np.full(count, 400.0), np.ones(count)
        )
        return detector.scored(rows, molecules_of(*true_places), (20, 20))

    def test_count_pairs_within_250_nm(self):
        score = self.score([(5, 5.3), (15, 15), (2, 12)], [(5, 5), (15, 17.4), (12, 4)])
        assert score.recall == pytest.approx(2 / 3)
        assert score.precision == pytest.approx(2 / 3)
        assert score.jaccard == pytest.approx(2 / 4)
        assert score.rmse_nm == pytest.approx(100 * np.sqrt((0.3**2 + 2.4**2) / 2))

    def test_take_each_molecule_once_and_as_many_as_can_be(self):
        assert self.score([(5, 5), (5, 5.5)], [(5, 5)]).precision == 0.5
        # The nearest one for the first of them would leave none for the second.
        assert self.score([(5, 5), (5, 7.4)], [(5, 5.1), (5, 3)]).recall == 1

    def test_forgive_what_lies_outside(self):
        score = self.score([(-0.4, 5), (10, 10)], [(-1.5, 5), (10, 10)])
        assert score == pytest.approx((1, 1, 1, 0))


def radii_after(name, folder):
    state = train_detector.trained(name, 0, STEPS, folder)
    return np.asarray(train_detector.radii_of(state.detector.estimator)), state


@pytest.mark.long
def test_radii_move_towards_each_other_from_far_starts(tmp_path):
    small, large = (radii_after(f"from {r} px", tmp_path)[0][0] for r in (2, 25))
    assert 2.5 < small < large < 22


@pytest.mark.long
def test_frozen_radii_stay_and_the_weights_are_learned(whole):
    radii, state = radii_after(FROZEN, whole)
    np.testing.assert_allclose(radii, 7.0, rtol=1e-6)
    first = train_detector.first_state(train_detector.KINDS[FROZEN], 0, STEPS)
    weights = [one.detector.layers[0].weight for one in (state, first)]
    assert not np.allclose(*weights)
    assert np.all(np.isfinite(state.losses))


@pytest.mark.long
def test_a_training_that_was_interrupted_ends_as_if_it_had_not_been(
    whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_detector, "STEPS_PER_CHECKPOINT", 2)
    simulated = train_detector.training_movie

    def until_the_third(seed, step, light):
        if step == 3:
            raise KeyboardInterrupt
        return simulated(seed, step, light)

    with monkeypatch.context() as patch:
        patch.setattr(train_detector, "training_movie", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            radii_after(TRAINED, tmp_path)
    states = [radii_after(TRAINED, folder)[1] for folder in (whole, tmp_path)]
    leaves = (jax.tree.leaves(eqx.filter(state, eqx.is_array)) for state in states)
    for left, right in zip(*leaves, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.long
def test_it_writes_its_table_and_figure_and_measures_nothing_twice(whole, monkeypatch):
    figure = whole / "figures" / "train_detector.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    report = (whole / "train_detector.md").read_text()
    assert all(f"| {name} |" in report for name in NAMES)
    monkeypatch.setattr(train_detector, "trained", None)
    results = train_detector.main(whole, NAMES, [0], steps=STEPS)
    assert [result.background for result in results] == NAMES
    with pytest.raises(SystemExit, match="give another folder"):
        train_detector.main(whole, NAMES, [0], steps=STEPS + 1)


@pytest.mark.long
def test_the_true_background_takes_the_estimators_place():
    movie = train_detector.simulated(9, frame_count=train_detector.FRAMES, light=LIGHT)
    model = detector.Detector(jaxbkgd.SpatialMean(3.0), jax.random.key(0))
    given = model(movie.frames, movie.background)
    other = eqx.tree_at(lambda m: m.estimator, model, jaxbkgd.SpatialMean(9.0))
    same = other(movie.frames, movie.background)
    np.testing.assert_array_equal(given.logit, same.logit)
    assert not np.allclose(model(movie.frames).logit, other(movie.frames).logit)


@pytest.mark.long
def test_a_detector_sees_the_matched_snr_and_learns_from_it():
    movie = jnp.asarray(np.random.default_rng(0).poisson(60.0, (2, 16, 16)), jnp.float32)
    # Few taps, so that little is compiled.
    estimator = jaxbkgd.SpatialMean(5.0, max_radius_pix=5.5)
    model = detector.Detector(estimator, jax.random.key(0), 1.3)
    molecules = detector.Molecules(
        *(jnp.full((2, 1), 8.0) for _ in range(2)),
        *(jnp.full((2, 1), value) for value in (700.0, True)),
    )

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model):
        prediction = model(movie)
        return detector.loss(prediction, molecules), prediction.logit

    (value, logit), slopes = loss(model)
    assert bool(jnp.isfinite(value))
    assert bool((slopes.estimator.unbounded_radii != 0).all())
    plain = detector.Detector(estimator, jax.random.key(0))
    assert not np.allclose(eqx.filter_jit(plain)(movie).logit, logit)
