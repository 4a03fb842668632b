"""The command `jaxbkgd`."""

import contextlib
import importlib.metadata
import json
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from . import _calibrate
from ._batch import map_frames
from ._estimator import Background
from ._kernels import Truncation
from ._objectives import FramePairLoss
from ._progress import progress_bar
from ._simulate import simulate_movie
from ._spatial_mean import noise_correction, spatial_mean, SpatialMean


try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(
        f"jaxbkgd: the command line needs the Python package {error.name}; install it "
        "with: pip install 'jaxbkgd[cli]'"
    ) from error

if TYPE_CHECKING:
    from ._figures import CalibratedChannel
    from ._movies import MovieReader


# What smlmlp takes for every movie.
_USUAL_RADIUS_PIX = 7.0

# The loss is drawn at as many radii.
_GRID_RADII = 15

# Frames are read, computed and written in blocks of as many pixels: 32 MB of float32.
_BLOCK_PIXELS = 2**23


@dataclass(frozen=True)
class _DemoChannel:
    """What a channel of the demo is simulated with, and estimated with."""

    height_pix: int
    width_pix: int
    bkgd_photons: float
    bkgd_length_scale_pix: float
    radius_pix: float


_DEMO_CHANNELS = (
    _DemoChannel(128, 128, bkgd_photons=60.0, bkgd_length_scale_pix=20.0, radius_pix=7.0),
    _DemoChannel(96, 128, bkgd_photons=25.0, bkgd_length_scale_pix=12.0, radius_pix=5.0),
)
_DEMO_FRAMES = 100
_DEMO_GAIN_ELECTRONS_PER_ADU = 0.46
_DEMO_OFFSET_ADU = 100.0

app = typer.Typer(
    help="The background of single-molecule localization microscopy movies.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # A usage error is three short lines so, and a box of rich otherwise.
    rich_markup_mode=None,
)


def _print_version(is_asked: bool) -> bool:
    if is_asked:
        try:
            version = importlib.metadata.version("jaxbkgd")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        typer.echo(f"jaxbkgd {version}")
        raise typer.Exit
    return is_asked


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder for the figures.")
    ] = Path("jaxbkgd-demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="The seed of the simulation.")
    ] = 0,
) -> None:
    """Simulate a movie of two channels and estimate its background.

    Prints how well that went and what it cost, and draws a figure of each channel.
    """
    with _one_line_errors():
        from ._figures import save_channel_figure

        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _fail(f"{out}: cannot be made a folder ({error.strerror}); choose another")
        columns: list[dict[str, str]] = []
        paths: list[Path] = []
        with progress_bar(2 * len(_DEMO_CHANNELS)) as report:
            for number, channel in enumerate(_DEMO_CHANNELS, 1):
                key = jax.random.key(seed + number)
                path = out / f"channel-{number}.png"
                report(2 * number - 2, f"channel {number}: estimating")
                frames, true_bkgds = _simulate(channel, key)
                background, column = _estimate_and_judge(channel, frames, true_bkgds)
                report(2 * number - 1, f"channel {number}: measuring noise")
                measured = _measured_noise_factor(channel, key)
                columns.append(column | {"  measured": f"{measured:.3f}"})
                snr = background.snr(frames, _DEMO_GAIN_ELECTRONS_PER_ADU)
                middle = _DEMO_FRAMES // 2
                save_channel_figure(
                    path,
                    frame=frames[middle],
                    true_bkgd=true_bkgds[middle],
                    bkgd=np.asarray(background.bkgds[middle]),
                    snr=np.asarray(snr[middle]),
                    title=f"Simulated channel {number}, frame {middle}: spatial mean, "
                    f"radius {channel.radius_pix:g} px",
                )
                paths.append(path)
        _print_table("Spatial mean of a simulated movie", columns)
        for path in paths:
            typer.echo(f"wrote {_printable(path)}")


def _simulate(
    channel: _DemoChannel, key: Key[Array, ""], **parameters: float
) -> tuple[Float[np.ndarray, "frames height width"], ...]:
    """Frames above the camera's offset and their true background, in ADU."""
    frames, truth = simulate_movie(
        key,
        frame_count=_DEMO_FRAMES,
        height_pix=channel.height_pix,
        width_pix=channel.width_pix,
        bkgd_photons=channel.bkgd_photons,
        bkgd_length_scale_pix=channel.bkgd_length_scale_pix,
        gain_electrons_per_adu=_DEMO_GAIN_ELECTRONS_PER_ADU,
        offset_adu=_DEMO_OFFSET_ADU,
        **parameters,
    )
    return np.asarray(frames, np.float32) - _DEMO_OFFSET_ADU, np.asarray(truth.bkgds_adu)


def _estimate_and_judge(
    channel: _DemoChannel,
    frames: Float[np.ndarray, "frames height width"],
    true_bkgds: Float[np.ndarray, "frames height width"],
) -> tuple[Background, dict[str, str]]:
    estimator = SpatialMean(channel.radius_pix)
    background = estimator(frames)
    seconds = min(_seconds(estimator, frames) for _ in range(3))
    error = float(np.sqrt(np.mean(np.square(background.bkgds - true_bkgds))))
    electrons = error * _DEMO_GAIN_ELECTRONS_PER_ADU
    separable = noise_correction(
        channel.radius_pix, truncation=estimator.truncation, kind="separable"
    )
    return background, {
        "movie": " x ".join(map(str, frames.shape)),
        "true mean background": f"{true_bkgds.mean():.0f} ADU",
        "radius": f"{channel.radius_pix:g} px",
        "RMS error of the background": f"{error:.1f} ADU ({electrons:.1f} e-)",
        "time, once compiled": f"{seconds:.4f} s",
        "noise factor of the residual": "",
        "  separable, as smlmlp has it": f"{separable:.3f}",
        "  exact": f"{background.noise_corrections:.3f}",
    }


def _seconds(
    estimator: SpatialMean, frames: Float[np.ndarray, "frames height width"]
) -> float:
    start = time.perf_counter()
    jax.block_until_ready(estimator(frames))
    return time.perf_counter() - start


def _measured_noise_factor(channel: _DemoChannel, key: Key[Array, ""]) -> float:
    """The noise of the residual over that of the frames, where there are no molecules.

    The background does not change with time there, so that the noise is what does.
    """
    frames, _ = _simulate(channel, key, photons_per_frame=0.0)
    residuals = frames - np.asarray(SpatialMean(channel.radius_pix)(frames).bkgds)
    # At the borders the kernel is another one; twice the radius is beyond its reach.
    border = int(2 * channel.radius_pix)
    inside = (slice(None), slice(border, -border), slice(border, -border))
    before, after = (
        np.var(stack[inside], axis=0, dtype=np.float64).mean()
        for stack in (frames, residuals)
    )
    return float(np.sqrt(after / before))


def _print_table(title: str, columns: list[dict[str, str]]) -> None:
    table = Table(title=title)
    table.add_column("")
    for number in range(1, len(columns) + 1):
        table.add_column(f"channel {number}", justify="right")
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    Console(highlight=False).print(table)


@app.command()
def estimate(
    movie: Annotated[
        Path,
        typer.Argument(metavar="MOVIE.tif", help="A TIFF or BigTIFF stack of frames."),
    ],
    out: Annotated[Path, typer.Option(metavar="BKGD.tif", help="The file to write.")],
    radius: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            help="The averaging radius: a number, or y,x as in 6,10.",
            show_default=f"{_USUAL_RADIUS_PIX:g}",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="CALIBRATION.json",
            help="What `jaxbkgd calibrate` has written, instead of a radius.",
        ),
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(
            min=1, help="Which channel of CALIBRATION.json the movie is, from 1 on."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace BKGD.tif if it exists.")
    ] = False,
) -> None:
    """Estimate the background of a movie, each frame by itself.

    It is written as a TIFF stack of float32 in the movie's unit, the camera's offset
    included. Memory does not grow with the length of the movie.
    """
    with _one_line_errors():
        from ._movies import open_movie, TiffWriter

        start = time.perf_counter()
        radius_pix, truncation = _chosen_radius(radius, calibration, channel)
        with open_movie(movie) as reader:
            if not out.is_dir() and out.suffix.lower() not in (".tif", ".tiff"):
                _fail(f"{out}: is written as TIFF; give a name that ends in .tif")
            if out.exists() and out.samefile(movie):
                _fail(f"{out}: is the movie itself; give --out another name")
            with (
                TiffWriter(out, reader.shape, overwrite=overwrite) as writer,
                progress_bar(len(reader)) as report,
            ):
                done = 0
                report(done, "estimating")
                for bkgds in _bkgds_in_blocks(reader, radius_pix, truncation):
                    writer.append(bkgds)
                    done += len(bkgds)
                    report(done, "estimating")
        seconds = time.perf_counter() - start
        _print_summary(out, reader.shape, radius_pix, truncation, seconds)


def _chosen_radius(
    radius: str | None, calibration: Path | None, channel: int | None
) -> tuple[tuple[float, float], Truncation]:
    """The radii (y, x) in pixels, and how their kernels end."""
    if calibration is None:
        if channel is not None:
            _fail(f"--channel {channel}: belongs to a calibration; give --calibration too")
        usual = f"{_USUAL_RADIUS_PIX:g}"
        return _parsed_radius(usual if radius is None else radius), "hard"
    if radius is not None:
        _fail("--radius and --calibration: each gives a radius; leave one of them out")
    try:
        module = SpatialMean.from_json(calibration.read_text("utf-8"))
    except OSError as error:
        _fail(f"{calibration}: cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        _fail(f"{calibration}: is no calibration, and no text at all")
    except (TypeError, ValueError) as error:
        _fail(f"{calibration}: is no calibration: {error}")
    radii = module.radii_pix.tolist()
    if channel is None and len(radii) > 1:
        _fail(f"{calibration}: has {len(radii)} channels; say which one with --channel")
    if channel is not None and channel > len(radii):
        _fail(f"--channel {channel}: {calibration} has {len(radii)} of them")
    y, x = radii[(channel or 1) - 1]
    return (y, x), module.truncation


def _parsed_radius(text: str) -> tuple[float, float]:
    """The radii (y, x) in pixels."""
    try:
        radii = [float(part) for part in text.split(",")]
        y, x = radii if len(radii) > 1 else 2 * radii
    except ValueError:
        _fail(f"--radius {text}: is neither a number of pixels nor a pair as in 6,10")
    try:
        noise_correction((y, x))
    except ValueError as error:
        _fail(f"--radius {text}: {error}")
    return y, x


def _bkgds_in_blocks(
    movie: "MovieReader", radius_pix: tuple[float, float], truncation: Truncation
) -> Iterator[np.ndarray]:
    frame_count, height, width = movie.shape
    block_frames = max(1, _BLOCK_PIXELS // (height * width))
    estimate_chunk = jax.jit(
        lambda frames: spatial_mean(frames, radius_pix, truncation=truncation)
    )
    for start in range(0, frame_count, block_frames):
        yield map_frames(estimate_chunk, movie[start : start + block_frames])


def _print_summary(
    path: Path,
    shape: tuple[int, int, int],
    radius_pix: tuple[float, float],
    truncation: Truncation,
    seconds: float,
) -> None:
    frames, height, width = shape
    y, x = radius_pix
    exact, separable = (
        float(noise_correction(radius_pix, truncation=truncation, kind=kind))
        for kind in ("exact", "separable")
    )
    rate = frames * height * width / seconds / 1e6
    typer.echo(f"wrote {_printable(path)}")
    typer.echo(f"frames        {frames} of {height} x {width} px, float32")
    typer.echo(f"radius        {y:g} px" + (f" in y, {x:g} px in x" if x != y else ""))
    typer.echo(f"noise factor  {exact:.4f} (exact), {separable:.4f} (separable)")
    typer.echo(f"time          {seconds:.2f} s, {rate:.1f} Mpx/s")


@app.command()
def calibrate(
    movies: Annotated[
        list[Path],
        typer.Argument(
            metavar="MOVIE.tif",
            help="TIFF or BigTIFF stacks of the same length, one for each channel.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="CALIBRATION.json", help="The file to write.")
    ] = Path("calibration.json"),
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FIGURE.png",
            help="The figure to draw.",
            show_default="CALIBRATION.png, beside CALIBRATION.json",
        ),
    ] = None,
    radius: Annotated[
        str,
        typer.Option(
            metavar="PIXELS",
            help="Where to start: y,x to learn the two apart, or a number to learn one "
            "radius for both.",
        ),
    ] = "7,7",
    max_radius: Annotated[
        float, typer.Option(metavar="PIXELS", help="The largest radius allowed.")
    ] = 60.0,
    lag: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many frames apart the frames of a pair are: more than molecules "
            "stay on.",
            show_default="found from the movie",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="The most steps to take.")] = 200,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace CALIBRATION.json and FIGURE.png if they exist."
        ),
    ] = False,
) -> None:
    """Learn the averaging radii of a movie from the movie itself.

    Prints them and the error that they save, and writes them for
    `jaxbkgd estimate --calibration`. Ctrl-C ends the search with the best radii so far;
    what follows takes as long as a few steps more, and another Ctrl-C leaves it out.
    """
    with _one_line_errors(), contextlib.ExitStack() as files:
        from ._figures import save_calibration_figure
        from ._movies import MovieError, open_movie

        start = _start(radius, max_radius, len(movies))
        png = out.with_suffix(".png") if figure is None else figure
        _check_destination(out, ".json", overwrite)
        _check_destination(png, ".png", overwrite)
        readers = [files.enter_context(open_movie(movie)) for movie in movies]
        for reader in readers:
            if (count := reader.count_channels()) > 1:
                _fail(
                    f"{reader.path}: holds {count} channels; save each as a file of its "
                    "own, and give all of them"
                )
        try:
            with _one_line_warnings():
                module, history = _calibrate.calibrate(
                    start, readers, objective=FramePairLoss(lag), steps=steps
                )
        except MovieError:
            raise
        except ValueError as error:
            _fail(f"{', '.join(map(str, movies))}: {error}")
        bound = module.max_radius_pix
        grid_pix = np.geomspace(min(1, bound / 10), 0.99 * bound, _GRID_RADII)
        try:
            losses = _channel_losses(module, history.objective, readers, grid_pix)
        except KeyboardInterrupt:
            losses = np.full((len(readers), 2 + _GRID_RADII), np.nan)
        _print_calibration(movies, module, history, losses)
        with _written_whole(out) as draft:
            draft.write_text(_calibration_json(movies, module, history, losses), "utf-8")
        typer.echo(f"wrote {_printable(out)}")
        if np.isnan(losses).all():
            typer.echo("interrupted before the figure")
            return
        channels = [
            _drawn_channel(number, module, history, reader, grid_pix, losses[number, 2:])
            for number, reader in enumerate(readers)
        ]
        with _written_whole(png) as draft:
            save_calibration_figure(draft, channels)
        typer.echo(f"wrote {_printable(png)}")


def _start(radius: str, max_radius: float, channel_count: int) -> SpatialMean:
    """A row of radii for each channel: a pair, or one number for both axes."""
    row = _parsed_radius(radius)[: radius.count(",") + 1]
    if max_radius <= max(row):
        _fail(
            f"--max-radius {max_radius:g}: must be more than --radius {radius}, where the "
            "search starts"
        )
    try:
        return SpatialMean(channel_count * [row], max_radius_pix=max_radius)
    except ValueError as error:
        _fail(f"--radius {radius}, --max-radius {max_radius:g}: {error}")


def _channel_losses(
    module: SpatialMean,
    objective: FramePairLoss,
    readers: Sequence["MovieReader"],
    grid_pix: np.ndarray,
) -> np.ndarray:
    """Of each channel by itself: at its radii, at the usual one, and over the grid."""
    others = [(radius, radius) for radius in (_USUAL_RADIUS_PIX, *grid_pix)]
    bound = max(module.max_radius_pix, 2 * _USUAL_RADIUS_PIX)
    losses = []
    with progress_bar(len(readers)) as report:
        for number, reader in enumerate(readers):
            report(number, f"channel {number + 1}: drawing the loss")
            pairs = [tuple(module.radii_pix[number].tolist()), *others]
            estimators = [SpatialMean(pair, max_radius_pix=bound) for pair in pairs]
            losses.append(_calibrate.losses_at(estimators, [reader], objective))
    return np.stack(losses)


def _drawn_channel(
    number: int,
    module: SpatialMean,
    history: _calibrate.History,
    reader: "MovieReader",
    grid_pix: np.ndarray,
    grid_losses: np.ndarray,
) -> "CalibratedChannel":
    from ._figures import CalibratedChannel

    middle = len(reader) // 2
    frame = reader[middle : middle + 1][0]
    radii_pix = np.asarray(module.radii_pix[number])
    bkgds = [
        spatial_mean(frame, share * radii_pix, truncation=module.truncation)
        for share in (0.5, 1, 2)
    ]
    return CalibratedChannel(
        f"Channel {number + 1}: {_printable(reader.path.name)}, frame {middle}",
        radii_pix=radii_pix,
        radii_std_pix=history.radii_std_pix[number],
        path_pix=history.radii_pix[:, number],
        grid_pix=grid_pix,
        grid_losses=grid_losses,
        frame=frame,
        bkgds=np.stack(bkgds),
    )


def _print_calibration(
    movies: list[Path],
    module: SpatialMean,
    history: _calibrate.History,
    losses: np.ndarray,
) -> None:
    columns = []
    for number, movie in enumerate(movies):
        learned, usual = losses[number, :2]
        y, x = (
            _described_radius(*values)
            for values in zip(
                module.radii_pix[number].tolist(),
                history.radii_std_pix[number].tolist(),
                history.is_at_bound[number].tolist(),
                strict=True,
            )
        )
        is_measured = learned > 0 and usual > 0
        change = 100 * (np.sqrt(learned / usual) - 1) if is_measured else np.nan
        columns.append(
            {
                "movie": _printable(movie.name),
                "radius in y": y,
                "radius in x": x,
                "RMS error, learned": _described_error(learned),
                f"RMS error at r = {_USUAL_RADIUS_PIX:g}": _described_error(usual),
                "  change": f"{change:+.0f} %" if is_measured else "",
            }
        )
    _print_table("Radii learned from the movie itself", columns)
    lag = history.objective.lag
    typer.echo(f"lag        {lag} frame{'s' if lag > 1 else ''}")
    is_converged = "yes" if history.is_converged else "no"
    typer.echo(f"converged  {is_converged}: {history.stop_reason}")


def _described_radius(radius_pix: float, std_pix: float, is_at_bound: bool) -> str:
    if is_at_bound:
        return f"{radius_pix:.2f} px, at its bound"
    if not np.isfinite(std_pix):
        return f"{radius_pix:.2f} px, uncertainty unknown"
    # No smaller than the last digit.
    return f"{radius_pix:.2f} +- {max(std_pix, 0.01):.2f} px"


def _described_error(loss: float) -> str:
    """The loss is the mean square error over the variance of the noise."""
    if np.isnan(loss):
        return "not measured"
    return f"{np.sqrt(loss):.3f} of the noise" if loss > 0 else "below what can be measured"


def _calibration_json(
    movies: list[Path],
    module: SpatialMean,
    history: _calibrate.History,
    losses: np.ndarray,
) -> str:
    """The module, with what is known of how it was learned."""
    calibration = {
        "movies": [_printable(movie.name) for movie in movies],
        "lag": history.objective.lag,
        "radii_std_pix": _json_numbers(history.radii_std_pix),
        "is_at_bound": history.is_at_bound.tolist(),
        "is_converged": history.is_converged,
        "stop_reason": history.stop_reason,
        "steps": len(history.losses),
        "loss": _json_numbers(losses[:, 0]),
        f"loss_at_{_USUAL_RADIUS_PIX:g}_pix": _json_numbers(losses[:, 1]),
    }
    fields = json.loads(module.to_json()) | {"calibration": calibration}
    return json.dumps(fields, indent=2, allow_nan=False) + "\n"


def _json_numbers(values: Any) -> Any:
    """In lists, to 4 digits, and None for what JSON has no number for."""
    if np.ndim(values):
        return [_json_numbers(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None


def _check_destination(path: Path, suffix: str, overwrite: bool) -> None:
    """Refuse now what could not be written in the end."""
    if path.suffix.lower() != suffix:
        _fail(f"{path}: give a name that ends in {suffix}")
    if not path.parent.is_dir():
        _fail(f"{path}: there is no folder {path.parent}; make it, or choose another place")
    if not os.access(path.parent, os.W_OK):
        _fail(f"{path}: cannot be written, because {path.parent} refuses files")
    try:
        path.lstat()
    except FileNotFoundError:
        return
    if not overwrite:
        _fail(f"{path}: exists already; choose another name, or give --overwrite")
    if not path.is_file():
        _fail(f"{path}: is not a regular file; choose another name")


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A file to write in, which gets the name `path` once that has gone well."""
    destination = Path(os.path.realpath(path))
    draft = destination.with_name(f".{secrets.token_hex(6)}.part")
    try:
        yield draft
        draft.replace(destination)
    except OSError as error:
        _fail(f"{path}: cannot be written ({error.strerror or error})")
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Say warnings as errors are said."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *where: _say(str(message))
        yield


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Say in one line what the user can mend, and end with an exit code."""
    try:
        from ._movies import MovieError

        try:
            yield
        except MovieError as error:
            _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"the package {error.name} is missing: pip install 'jaxbkgd[cli]'")
    except OSError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo("jaxbkgd: interrupted", err=True)
        raise typer.Exit(130) from None


def _fail(message: str) -> NoReturn:
    _say(message)
    raise typer.Exit(2)


def _say(message: str) -> None:
    """One line on stderr."""
    line = _printable(message).replace("\n", " ")
    typer.echo(f"jaxbkgd: {line}", err=True)


def _printable(text: str | Path) -> str:
    """Without the bytes of a file name that are no text."""
    return os.fsencode(text).decode(errors="replace")
