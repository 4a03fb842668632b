"""Makes the figures of README and docs, and prints the numbers that they quote.

    python docs/make_figures.py [FOLDER]

All is simulated, from fixed random keys. It takes about a minute on two cores.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxbkgd
from jaxbkgd._figures import save_channel_figure
from jaxbkgd._kernels import NoiseKind, Truncation


_GAIN = 0.46  # electrons per ADU
_OFFSET_ADU = 100.0

_ORANGE, _BLUE, _DARK = "#d95f02", "#1b6ca8", "#222222"
_TRUNCATIONS: dict[Truncation, str] = {"hard": _ORANGE, "smooth": _BLUE}
_NOISE_KINDS: dict[NoiseKind, str] = {"exact": _BLUE, "separable": _ORANGE}


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
        snr=np.asarray(background.snr(frames, _GAIN)[0]),
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
        factors = [jaxbkgd.noise_correction(radius, kind=kind) for radius in radii]
        axes.plot(radii, factors, color=colour, label=f'"{kind}"')
    print("noise: radius, Monte Carlo and its standard error, exact, separable")
    for radius in (2.0, 3.0, 5.0, 7.0, 10.0, 20.0):
        measured, standard_error = _measured_noise(radius)
        exact = jaxbkgd.noise_correction(radius)
        separable = jaxbkgd.noise_correction(radius, kind="separable")
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


def _simulated(
    *, frame_count: int, bkgd_length_scale_pix: float
) -> tuple[Float[Array, "frames height width"], Float[Array, "frames height width"]]:
    """Frames above the camera's offset and their true background, in ADU."""
    frames, truth = jaxbkgd.simulate_movie(
        jax.random.key(3),
        frame_count=frame_count,
        bkgd_length_scale_pix=bkgd_length_scale_pix,
        gain_electrons_per_adu=_GAIN,
        offset_adu=_OFFSET_ADU,
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
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else beside
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (draw_overview, draw_truncation, draw_noise_factor):
        path = folder / f"{draw.__name__.removeprefix('draw_').replace('_', '-')}.png"
        draw(path)
        print(f"wrote {path.name}, {path.stat().st_size / 1000:.0f} kB")
