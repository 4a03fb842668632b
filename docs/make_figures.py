"""Makes the figures of README and docs, and prints the numbers that they quote.

    python docs/make_figures.py [--quick] [FOLDER]

All is simulated, from fixed random keys. It takes a few minutes on two cores. Movies are
smaller with `--quick`, to see whether it runs.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxbkgd
from jaxbkgd._cli.figures import save_channel_figure
from jaxbkgd._filter.kernels import NoiseKind, Truncation


_IS_QUICK = "--quick" in sys.argv[1:]
_SIZE_PIX = 48 if _IS_QUICK else 128

_GAIN = 0.46  # electrons per ADU
_OFFSET_ADU = 100.0

_ORANGE, _BLUE, _DARK = "#d95f02", "#1b6ca8", "#222222"
_TRUNCATIONS: dict[Truncation, str] = {"hard": _ORANGE, "smooth": _BLUE}
_NOISE_KINDS: dict[NoiseKind, str] = {"exact": _BLUE, "separable": _ORANGE}

# Losses are computed at these; a parabola through the lowest three has their minimum.
_RADII_PIX = np.geomspace(1.6, 30, 7 if _IS_QUICK else 19)

Frames = Float[Array, "frames height width"]
Loss = jaxbkgd.TruthLoss | jaxbkgd.FramePairLoss


def draw_overview(path: Path) -> None:
    """A frame, its true background, the estimate, and what follows from it."""
    frames, truth = _simulated(frame_count=100, bkgd_length_scale_pix=20.0)
    background = jaxbkgd.SpatialMean(7.0)(frames)
    error = background.bkgds - truth
    print(
        f"overview: r = 7 px, true background {truth.mean():.1f} ADU, "
        f"root-mean-square error {jnp.sqrt(jnp.mean(error**2)):.1f} ADU"
    )
    save_channel_figure(
        path,
        frame=np.asarray(frames[0]),
        true_bkgd=np.asarray(truth[0]),
        bkgd=np.asarray(background.bkgds[0]),
        snr=np.asarray(background.snr(frames, jaxbkgd.Camera(0.0, _GAIN))[0]),
        title="a frame of a simulated movie, and SpatialMean(7.0)",
    )


def draw_truncation(path: Path) -> None:
    """Hard and smooth truncation: the taps, one tap over the radius, a loss over it."""
    figure = Figure((9, 3), dpi=100, layout="constrained")
    taps_axes, tap_axes, loss_axes = figure.subplots(1, 3)
    _draw_taps(taps_axes, radius_pix=5.3)
    _draw_one_tap(tap_axes, distance_pix=7)
    _draw_loss(loss_axes)
    figure.savefig(path)


def draw_noise_factor(path: Path) -> None:
    """Both noise factors over the radius, and what Monte Carlo measures."""
    figure = Figure((6, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    radii = np.linspace(1, 21, 81)
    for kind, colour in _NOISE_KINDS.items():
        factors = [jaxbkgd.noise_correction(radius, noise=kind) for radius in radii]
        axes.plot(radii, factors, color=colour, label=f'"{kind}"')
    print("noise: radius, Monte Carlo and its standard error, exact, separable")
    for radius in (2.0, 3.0, 5.0, 7.0, 10.0, 20.0):
        measured, standard_error = _measured_noise(radius)
        exact = jaxbkgd.noise_correction(radius)
        separable = jaxbkgd.noise_correction(radius, noise="separable")
        print(
            f"  {radius:4.0f}  {measured:.4f} +- {standard_error:.4f}  {exact:.4f}  "
            f"{separable:.4f}"
        )
        # Its standard error is smaller than the mark.
        axes.plot(radius, measured, "o", color=_DARK, ms=5, mfc="white")
    axes.plot([], [], "o", color=_DARK, mfc="white", label="measured in white noise")
    axes.set(
        title="noise of frame - background, over that of the frame",
        xlabel="radius (px)",
        ylabel="noise factor",
    )
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def draw_calibration_loss(path: Path) -> None:
    """The frame-pair loss over the radius, and the true mean square error beside it."""
    figure = Figure((9, 2.7), dpi=100, layout="constrained")
    panels = figure.subplots(1, 4)
    print("loss: minimum (px), and what it costs beside the oracle")
    scenes: dict[str, dict[str, Any]] = {
        "background of 8 px": {"bkgd_length_scale_pix": 8.0},
        "background of 25 px": {"bkgd_length_scale_pix": 25.0},
        "60 molecules on": {"molecules_per_frame": 60.0},
        "on for 6 frames": {"on_time_frames": 6.0},
    }
    for axes, (scene, settings) in zip(panels, scenes.items(), strict=True):
        frames, truth = _simulated(**settings)
        lag = _found_lag(frames)
        objectives: dict[str, Loss] = {
            "truth": jaxbkgd.TruthLoss(truth),
            f"pairs, lag {lag}": jaxbkgd.FramePairLoss(lag),
        }
        if scene == "on for 6 frames":
            objectives["pairs, lag 1"] = jaxbkgd.FramePairLoss(1)
        print(f"  {scene}")
        _draw_pair_losses(axes, frames, objectives)
        axes.set_title(scene, fontsize=10)
    panels[0].set_ylabel("mean square error\nabove its least (ADU²)")
    figure.savefig(path)


def draw_calibration_lag(path: Path) -> None:
    """The structure function over the lag for three on-times, and the lag chosen."""
    figure = Figure((6, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    lags = np.unique(np.geomspace(1, 64, 28).round().astype(int))
    print("lag: on-time (frames), lag chosen")
    for on_time, colour in ((1.0, _BLUE), (3.0, _ORANGE), (10.0, _DARK)):
        frames, _ = _simulated(frame_count=200, on_time_frames=on_time)
        # What lies between a mean as wide as a molecule's image and one far wider.
        spots = jaxbkgd.spatial_mean(frames, 2.6) - jaxbkgd.spatial_mean(frames, 7.0)

        def structure(lag, spots=spots):
            return jnp.mean((spots[lag:] - spots[:-lag]) ** 2) / 2

        chosen = _found_lag(frames)
        print(f"  {on_time:.0f}, {chosen}")
        axes.plot(
            lags,
            [structure(lag) for lag in lags],
            color=colour,
            lw=1.2,
            label=f"molecules on for {on_time:.0f}",
        )
        axes.plot(chosen, structure(chosen), "o", color=colour, mfc="white", ms=7)
    axes.plot([], [], "o", color=_DARK, mfc="white", label="the lag chosen")
    axes.set(xscale="log", xlabel="lag (frames)", ylabel="D(lag) (ADU²)", ylim=(0, None))
    ticks = [1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.legend(frameon=False)
    figure.savefig(path)


def draw_illumination(path: Path) -> None:
    """The light of each frame as it is and as LocalMean finds it, in three movies."""
    figure = Figure((9, 2.6), dpi=80, layout="constrained")
    frames, truth = _simulated(frame_count=120)
    times, rng = np.arange(len(frames)), np.random.default_rng(0)
    lights = {
        "an activation pulse every 4th frame": np.where(times % 4 == 0, 1.35, 1.0),
        "a laser that flickers by 3 %": 1 + 0.03 * rng.standard_normal(len(times)),
        "bleaching to a tenth": 0.1 ** (times / len(times)),
    }
    print("illumination: root-mean-square error (ADU) of LocalMean, and of SpatialMean")
    for axes, (name, light) in zip(figure.subplots(1, 3), lights.items(), strict=True):
        bkgds = light[:, None, None] * np.asarray(truth)
        # The molecules of the movie, and the noise of its light.
        molecules = np.asarray(frames - truth) * (np.asarray(frames - truth) > 150)
        movie = (rng.poisson(_GAIN * bkgds) / _GAIN + molecules).astype(np.float32)
        background = jaxbkgd.LocalMean()(movie)
        errors = [
            float(np.sqrt(np.mean((np.asarray(estimate.bkgds) - bkgds) ** 2)))
            for estimate in (background, jaxbkgd.SpatialMean(7.0)(movie))
        ]
        print(f"  {name}: {errors[0]:.2f}, {errors[1]:.2f}")
        found = np.asarray(background.illumination)
        axes.plot(times, light, color=_ORANGE, lw=3, label="as it is")
        axes.plot(
            times, found * light.mean() / found.mean(), color=_DARK, lw=1, label="found"
        )
        axes.set_title(name, fontsize=10)
        axes.set(xlabel="frame", ylabel="light")
        axes.legend(frameon=False, fontsize=8, loc="upper right")
        if name != "bleaching to a tenth":
            axes.set(xlim=(0, 40))
    figure.savefig(path)


def print_failures() -> None:
    """What changes, and what is steady but no background, do to the minimum."""
    count, size = 100, _SIZE_PIX
    field = np.asarray(_simulated(frame_count=1, height_pix=size + 32)[1][0])
    steady = np.broadcast_to(field[:size], (count, size, size))
    bleaching = steady * np.linspace(1, 0.5, count)[:, None, None]
    starts = np.linspace(0, 20, count).round().astype(int)
    drifting = np.stack([field[start : start + size] for start in starts])
    rng = np.random.default_rng(0)
    hot_pixels = 300.0 * (rng.random((size, size)) < 0.01)
    persistent, _ = _simulated(bkgd_photons=0.0, on_time_frames=1e6)
    scenes = {
        "nothing": (steady, 0, None),
        "bleaching to a half": (bleaching, 0, None),
        "bleaching to a half, too long a lag": (bleaching, 0, 45),
        "drift by 20 px": (drifting, 0, None),
        "drift by 20 px, too long a lag": (drifting, 0, 45),
        "1 % of pixels hot by 300 ADU": (steady, hot_pixels, None),
        "20 molecules that never vanish": (steady, np.asarray(persistent), None),
    }
    molecules, _ = _simulated(bkgd_photons=0.0)
    print("failures: minimum (px), and what it costs beside the oracle")
    for scene, (truth, added, lag) in scenes.items():
        electrons = rng.poisson(_GAIN * truth)
        frames = jnp.asarray(molecules + electrons / _GAIN + added, jnp.float32)
        lag = lag or _found_lag(frames)
        print(f"  {scene}")
        objectives = {
            "truth": jaxbkgd.TruthLoss(truth.astype(np.float32)),
            f"pairs, lag {lag}": jaxbkgd.FramePairLoss(lag),
        }
        _print_minima(_losses_over_radius(frames, objectives))


def _simulated(*, frame_count: int = 100, **settings: Any) -> tuple[Frames, Frames]:
    """Frames above the camera's offset and their true background, in ADU."""
    size: dict[str, Any] = {"height_pix": _SIZE_PIX, "width_pix": _SIZE_PIX}
    frames, truth = jaxbkgd.simulate_movie(
        jax.random.key(3),
        frame_count=frame_count,
        gain_electrons_per_adu=_GAIN,
        offset_adu=_OFFSET_ADU,
        **size | settings,
    )
    return frames - _OFFSET_ADU, truth.bkgds_adu


def _draw_taps(axes: Axes, *, radius_pix: float) -> None:
    dot = np.zeros((1, 31))
    dot[0, 15] = 1
    for shift, (truncation, colour) in zip((-0.2, 0.2), _TRUNCATIONS.items(), strict=True):
        taps = jaxbkgd.spatial_mean(dot, radius_pix, truncation=truncation)[0]
        axes.bar(
            np.arange(-15, 16) + shift,
            taps,
            0.4,
            color=colour,
            label=truncation,
        )
    cut_pix = 2.5758 * radius_pix / 2
    axes.axvline(cut_pix, color=_DARK, lw=0.8, ls=":", label="cut")
    axes.set(
        title=f"taps at r = {radius_pix} px",
        xlabel="distance (px)",
        ylabel="weight",
        xlim=(2.5, 9),
        ylim=(0, 0.1),
    )
    axes.legend(frameon=False)


def _draw_one_tap(axes: Axes, *, distance_pix: int) -> None:
    radii = np.linspace(4.5, 6.5, 201)
    dot = np.zeros((1, 31))
    dot[0, 15] = 1
    for truncation, colour in _TRUNCATIONS.items():
        bkgds = [
            jaxbkgd.spatial_mean(dot, radius, max_radius_pix=7.0, truncation=truncation)
            for radius in radii
        ]
        weights = [bkgd[0, 15 + distance_pix] for bkgd in bkgds]
        axes.plot(radii, weights, color=colour, label=truncation)
    axes.set(title=f"the tap at {distance_pix} px", xlabel="radius (px)", ylabel="weight")
    axes.legend(frameon=False)


def _draw_loss(axes: Axes) -> None:
    frames, truth = _simulated(frame_count=1, bkgd_length_scale_pix=10.0)
    radii = jnp.linspace(2, 14, 601)

    def loss(radius, truncation):
        bkgds = jaxbkgd.spatial_mean(
            frames, radius, max_radius_pix=14.0, truncation=truncation
        )
        return jnp.sqrt(jnp.mean((bkgds - truth) ** 2))

    print(f"slope of the loss, mean from {radii[0]:.0f} to {radii[-1]:.0f} px")
    for truncation, colour in _TRUNCATIONS.items():
        losses, slopes = jax.lax.map(
            lambda radius, truncation=truncation: jax.value_and_grad(loss)(
                radius, truncation
            ),
            radii,
        )
        span = radii[-1] - radii[0]
        print(
            f"  {truncation}: {(losses[-1] - losses[0]) / span:.4f} ADU/px, by autodiff "
            f"{jnp.trapezoid(slopes, radii) / span:.4f} ADU/px"
        )
        is_shown = (radii > 9) & (radii < 11.5)
        axes.plot(radii[is_shown], losses[is_shown], color=colour, lw=1.2, label=truncation)
    axes.set(
        title="error of the background",
        xlabel="radius (px)",
        ylabel="root-mean-square error (ADU)",
    )
    axes.legend(frameon=False)


def _found_lag(frames: Frames) -> int:
    lag = jaxbkgd.FramePairLoss().fitted(frames).lag
    assert lag is not None
    return lag


def _losses_over_radius(
    frames: Frames, objectives: Mapping[str, Loss]
) -> dict[str, np.ndarray]:
    """Each objective at each of the radii."""

    def losses(radius):
        estimator = jaxbkgd.SpatialMean(radius, max_radius_pix=40.0)
        return [objective(estimator, frames) for objective in objectives.values()]

    values = jax.lax.map(losses, jnp.asarray(_RADII_PIX))
    return {name: np.asarray(loss) for name, loss in zip(objectives, values, strict=True)}


def _minimum(losses: np.ndarray) -> float:
    """The radius of the minimum, by a parabola over its logarithm."""
    lowest = int(np.clip(np.argmin(losses), 1, len(losses) - 2))
    near = slice(lowest - 1, lowest + 2)
    around = np.log(_RADII_PIX[near] / _RADII_PIX[lowest])
    curvature, slope, _ = np.polyfit(around, losses[near], 2)
    return float(_RADII_PIX[lowest] * np.exp(-slope / (2 * curvature)))


def _at(radius_pix: float, losses: np.ndarray) -> float:
    """A loss between the radii, by a cubic through the four around."""
    first = int(np.clip(np.searchsorted(_RADII_PIX, radius_pix) - 2, 0, len(losses) - 4))
    near = slice(first, first + 4)
    around = np.log(_RADII_PIX[near] / radius_pix)
    return float(np.polyfit(around, losses[near], 3)[-1])


def _print_minima(losses: Mapping[str, np.ndarray]) -> None:
    truth = losses["truth"]
    least = _at(_minimum(truth), truth)
    for name, values in losses.items():
        excess = abs(np.sqrt(_at(_minimum(values), truth) / least) - 1)
        print(f"    {name}: {_minimum(values):.2f}, {excess:.2%}")


def _draw_pair_losses(axes: Axes, frames: Frames, objectives: Mapping[str, Loss]) -> None:
    """The true error, and losses of pairs in its unit, above what each has at its least."""
    losses = _losses_over_radius(frames, objectives)
    _print_minima(losses)
    styles = ((_DARK, "-", 3.0), (_ORANGE, "--", 1.5), (_BLUE, ":", 1.5))
    for (name, values), (colour, style, width) in zip(losses.items(), styles, strict=False):
        lag = getattr(objectives[name], "lag", None)
        # A loss of pairs is in units of the variance of a frame.
        unit = jnp.mean((frames[lag:] - frames[:-lag]) ** 2) / 2 if lag else 1
        heights = unit * (values - _at(_minimum(values), values))
        axes.plot(_RADII_PIX, heights, style, color=colour, lw=width, label=name)
        axes.plot(_minimum(values), 0, "o", color=colour, mfc="white", ms=5, clip_on=False)
    ticks = [2, 5, 10, 20]
    axes.set(xscale="log", xlabel="radius (px)")
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, fontsize=8)


def _measured_noise(radius_pix: float) -> tuple[float, float]:
    """The standard deviation of white noise less its background, away from the borders,
    and the standard error of the mean over frames."""
    frames = jax.random.normal(jax.random.key(0), (100, 256, 256))
    residuals = frames - jaxbkgd.spatial_mean(frames, radius_pix)
    margin = int(1.3 * radius_pix) + 1
    inside = residuals[:, margin:-margin, margin:-margin]
    variances = jnp.mean(inside**2, axis=(1, 2))
    measured = float(jnp.sqrt(jnp.mean(variances)))
    error_of_variance = float(jnp.std(variances)) / np.sqrt(len(variances))
    return measured, error_of_variance / (2 * measured)


if __name__ == "__main__":
    beside = Path(__file__).parent / "pages" / "figures"
    folders = [Path(word) for word in sys.argv[1:] if word != "--quick"]
    (folder,) = folders or [beside]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = (
        *(draw_overview, draw_truncation, draw_noise_factor),
        *(draw_calibration_loss, draw_calibration_lag, draw_illumination),
    )
    for draw in drawn:
        path = folder / f"{draw.__name__.removeprefix('draw_').replace('_', '-')}.png"
        draw(path)
        print(f"wrote {path.name}, {path.stat().st_size / 1000:.0f} kB")
    print_failures()
