"""The command `jaxbkgd`."""

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn, TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from ._batch import map_frames
from ._estimator import Background
from ._simulate import simulate_movie
from ._spatial_mean import noise_correction, spatial_mean, SpatialMean


try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(
        f"jaxbkgd: the command line needs the Python package {error.name}; install it "
        "with: pip install 'jaxbkgd[cli]'"
    ) from error

if TYPE_CHECKING:
    from ._movies import MovieReader


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
        with _progress() as progress:
            task = progress.add_task("", total=2 * len(_DEMO_CHANNELS))
            for number, channel in enumerate(_DEMO_CHANNELS, 1):
                key = jax.random.key(seed + number)
                path = out / f"channel-{number}.png"
                progress.update(task, description=f"channel {number}: estimating")
                frames, true_bkgds = _simulate(channel, key)
                background, column = _estimate_and_judge(channel, frames, true_bkgds)
                progress.update(
                    task, advance=1, description=f"channel {number}: measuring noise"
                )
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
                progress.update(task, advance=1)
                paths.append(path)
        _print_table(columns)
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


def _print_table(columns: list[dict[str, str]]) -> None:
    table = Table(title="Spatial mean of a simulated movie")
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
        str,
        typer.Option(
            metavar="PIXELS", help="The averaging radius: a number, or y,x as in 6,10."
        ),
    ] = "7",
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
        radius_pix = _parsed_radius(radius)
        with open_movie(movie) as reader:
            if not out.is_dir() and out.suffix.lower() not in (".tif", ".tiff"):
                _fail(f"{out}: is written as TIFF; give a name that ends in .tif")
            if out.exists() and out.samefile(movie):
                _fail(f"{out}: is the movie itself; give --out another name")
            with (
                TiffWriter(out, reader.shape, overwrite=overwrite) as writer,
                _progress() as progress,
            ):
                task = progress.add_task("estimating", total=len(reader))
                for bkgds in _bkgds_in_blocks(reader, radius_pix):
                    writer.append(bkgds)
                    progress.advance(task, len(bkgds))
        seconds = time.perf_counter() - start
        _print_summary(out, reader.shape, radius_pix, seconds)


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
    movie: "MovieReader", radius_pix: tuple[float, float]
) -> Iterator[np.ndarray]:
    frame_count, height, width = movie.shape
    block_frames = max(1, _BLOCK_PIXELS // (height * width))
    estimate_chunk = jax.jit(lambda frames: spatial_mean(frames, radius_pix))
    for start in range(0, frame_count, block_frames):
        yield map_frames(estimate_chunk, movie[start : start + block_frames])


def _print_summary(
    path: Path,
    shape: tuple[int, int, int],
    radius_pix: tuple[float, float],
    seconds: float,
) -> None:
    frames, height, width = shape
    y, x = radius_pix
    exact, separable = (
        float(noise_correction(radius_pix, kind=kind)) for kind in ("exact", "separable")
    )
    rate = frames * height * width / seconds / 1e6
    typer.echo(f"wrote {_printable(path)}")
    typer.echo(f"frames        {frames} of {height} x {width} px, float32")
    typer.echo(f"radius        {y:g} px" + (f" in y, {x:g} px in x" if x != y else ""))
    typer.echo(f"noise factor  {exact:.4f} (exact), {separable:.4f} (separable)")
    typer.echo(f"time          {seconds:.2f} s, {rate:.1f} Mpx/s")


def _progress() -> Progress:
    """A progress bar on stderr that is gone in the end, and absent off a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


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
    line = _printable(message).replace("\n", " ")
    typer.echo(f"jaxbkgd: {line}", err=True)
    raise typer.Exit(2)


def _printable(text: str | Path) -> str:
    """Without the bytes of a file name that are no text."""
    return os.fsencode(text).decode(errors="replace")
