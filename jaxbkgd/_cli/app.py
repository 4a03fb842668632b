"""The command `jaxbkgd`."""

import contextlib
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from .._batch.run import Dtype, estimate_movie, installed_version, MovieSummary, Quantity
from .._calibration import calibrate as _calibrate
from .._calibration.objectives import FramePairLoss
from .._estimators.background import Background
from .._estimators.base import estimator_from_json
from .._estimators.local_mean import LocalMean
from .._estimators.soft_clip import SoftClip
from .._estimators.spatial_mean import noise_correction, SpatialMean
from .._movies.movie import Box, Channel, Movie, MovieError
from .._movies.open import open_movie
from .._movies.sinks import check_destination, draft_of
from .._simulation import simulate_movie
from .._workers import end_progress, one_thread_a_call, progress_bar


try:
    import rich.filesize
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(
        f"jaxbkgd: the command line needs the Python package {error.name}; install it "
        "with: pip install 'jaxbkgd[cli]'"
    ) from error

if TYPE_CHECKING:
    from .figures import CalibratedChannel


# What smlmlp takes for every movie.
_USUAL_RADIUS_PIX = 7.0

# Where a weight is one half, in deviations of the noise, as LocalMean has it.
_USUAL_CLIP = "3"

# What a calibration has for each channel.
_CHANNEL_FIELDS = {"radii_pix", "radius_frames", "frozen", "gains", "read_noise_electrons"}

# The loss is drawn at as many radii, and a frame with no more pixels of frames beside it.
_GRID_RADII, _FIGURE_PIXELS = 15, 2**25


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

_ClipOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVIATIONS",
        help="With --radius-frames: above how many standard deviations of the noise "
        "molecules are left out, or none, to leave out nothing.",
        show_default=_USUAL_CLIP,
    ),
]

app = typer.Typer(
    help="The background of single-molecule localization microscopy movies.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # A usage error is three short lines so, and a box of rich otherwise.
    rich_markup_mode=None,
)


def main() -> None:
    """The command, as a process of its own."""
    # The others make one call at a time, which may have all cores.
    if sys.argv[1:2] == ["estimate"]:
        one_thread_a_call()
    app()


def _print_version(is_asked: bool) -> bool:
    if is_asked:
        typer.echo(f"jaxbkgd {installed_version()}")
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
        from .figures import save_channel_figure

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
    channel: _DemoChannel, key: Key[Array, ""], **parameters: Any
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
    separable = noise_correction(channel.radius_pix, truncation="hard", noise="separable")
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
def info(
    movies: Annotated[
        list[Path],
        typer.Argument(metavar="MOVIE", help="Files, folders or quoted patterns."),
    ],
) -> None:
    """Say what a movie is."""
    with _one_line_errors(), _one_line_warnings():
        are_read = True
        for number, path in enumerate(movies):
            if number:
                typer.echo()
            try:
                with open_movie(path) as movie:
                    _print_info(movie)
            except MovieError as error:
                _say(str(error))
                are_read = False
        if not are_read:
            raise typer.Exit(2)


def _print_info(movie: Movie) -> None:
    frames, channels, height, width = movie.shape
    size_um, interval_s = movie.pixel_size_um, movie.frame_interval_s
    rows = {
        "movie": movie.name,
        "format": movie.format,
        "frames": f"{frames} of {height} x {width} px",
        "channels": f"{channels}",
        "pixels": movie.dtype.name,
        "pixel size": "unknown" if size_um is None else _in_y_and_x(*size_um, "um"),
        "frame interval": "unknown" if interval_s is None else f"{interval_s:g} s",
        "size on disk": rich.filesize.decimal(_bytes_on_disk(movie.paths)),
    }
    _print_rows(rows)


def _bytes_on_disk(paths: Sequence[Path]) -> int:
    """Of files, and of folders, some of which may be inside another."""
    roots = {path.resolve() for path in paths}
    files = roots.union(*(root.rglob("*") for root in roots))
    return sum(file.stat().st_size for file in files if file.is_file())


@app.command()
def estimate(
    movies: Annotated[
        list[Path],
        typer.Argument(
            metavar="MOVIE",
            help="A file, a folder or a quoted pattern, such as 'movie_*.tif'; of several "
            "channels in files of their own, one for each.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="OUT",
            help="What to write, as its suffix says: .tif, .ome.tif, .zarr or .ome.zarr. "
            "Several movies or boxes are written as OUT-1, OUT-2 and so on.",
        ),
    ],
    radius: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PIXELS",
            help="The averaging radius: a number, or y,x as in 6,10. Give it once for all "
            "channels, or once for each.",
            show_default=f"{_USUAL_RADIUS_PIX:g}",
        ),
    ] = None,
    radius_frames: Annotated[
        list[float] | None,
        typer.Option(
            metavar="FRAMES",
            help="Average over time too, with this radius; once for all channels, or once "
            "for each.",
            show_default="each frame by itself",
        ),
    ] = None,
    clip: _ClipOption = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="MASK",
            help="With --radius-frames: a .npy or .tif file, one frame for all or as many "
            "as the movie has, that is 0 in pixels to leave out and 1 in others.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="CALIBRATION.json",
            help="What `jaxbkgd calibrate` has written, instead of radii and --clip.",
        ),
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(
            min=1, help="Which channel of CALIBRATION.json the movie is, from 1 on."
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="BOXES",
            help="Parts of the frames that are channels: x0,y0,x1,y1 in pixels, up to and "
            "without x1 and y1, with a semicolon between two, all in quotes.",
        ),
    ] = None,
    quantity: Annotated[
        Quantity,
        typer.Option(
            help="What to write: the background, the frames less their background, or "
            "their signal-to-noise ratio, which needs --gain and the right --offset."
        ),
    ] = "background",
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="The type to write; uint16 is rounded, and for backgrounds alone."
        ),
    ] = "float32",
    offset: Annotated[
        list[float] | None,
        typer.Option(
            metavar="ADU",
            help="The camera's offset, which is subtracted first; once for all channels, "
            "or once for each.",
            show_default="0",
        ),
    ] = None,
    gain: Annotated[
        list[float] | None,
        typer.Option(
            metavar="E-/ADU",
            help="Electrons per ADU, for --quantity snr; once for all channels, or once for "
            "each.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads.", show_default="the cores")
    ] = None,
    chunk_frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames in a chunk, which memory grows with.",
            show_default="a megapixel",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh",
            help="Go on with what an interrupted run has left, or begin anew.",
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
) -> None:
    """Estimate the background of a movie, each frame by itself, or over time too.

    It is written in the movie's unit. Memory does not grow with the length of the movie.
    After Ctrl-C, or whatever else ends it early, the same command goes on from there.
    """
    sinks: list[Path] = []
    with (
        _one_line_errors(),
        _one_line_warnings(),
        _ended_by_ctrl_c(sinks),
        contextlib.ExitStack() as files,
    ):
        opened = [files.enter_context(open_movie(movie)) for movie in movies]
        boxes = None if channels is None else _parsed_boxes(channels)
        _check_one_choice(radius, radius_frames, clip, calibration, channel)
        sizes = _channel_sizes(opened, boxes)
        estimator = (
            _calibrated_estimator(calibration, channel, len(sizes))
            if calibration is not None
            else _chosen_estimator(radius, radius_frames, clip, len(sizes))
        )
        if mask is not None and not isinstance(estimator, LocalMean):
            _fail(f"--mask {mask}: is for averages over time; give --radius-frames too")
        _check_camera(quantity, offset, gain)
        is_split = len(opened) > 1 or boxes is not None
        sinks += _numbered(out, len(sizes)) if is_split else [out]

        def run() -> MovieSummary:
            return estimate_movie(
                opened if len(opened) > 1 else opened[0],
                estimator,
                sinks if is_split else out,
                quantity=quantity,
                dtype=dtype,
                boxes=boxes,
                offsets=_shared_or_each(offset) or 0.0,
                gains=_shared_or_each(gain),
                weights=None if mask is None else _read_mask(mask),
                chunk_frames=chunk_frames,
                workers=workers,
                resume=resume,
                overwrite=overwrite,
            )

        try:
            with ThreadPoolExecutor(1) as thread:
                # A signal is heard in this thread, and only between two steps of Python:
                # to compile is one.
                summary = thread.submit(run).result()
        except (TypeError, ValueError) as error:
            _fail(_with_notes(error))
        for sink in sinks:
            typer.echo(f"wrote {_printable(sink)}")
        _print_rows(
            {
                "frames": f"{summary.frames} of {_listed(sizes)}",
                "written": _described_quantity(quantity, dtype, offset),
                **_estimator_rows(estimator),
                **_summary_rows(summary),
            }
        )


def _parsed_boxes(text: str) -> list[Box]:
    try:
        boxes = [tuple(map(int, box.split(","))) for box in text.split(";")]
        return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes]
    except ValueError:
        _fail(
            f"--channels {text}: are no boxes x0,y0,x1,y1 of whole pixels, as in "
            "'0,0,256,512;256,0,512,512'"
        )


def _channel_sizes(movies: list[Movie], boxes: list[Box] | None) -> list[str]:
    """What is estimated as a channel, each in words."""
    if boxes is not None:
        sizes = [(y1 - y0, x1 - x0) for x0, y0, x1, y1 in boxes]
    elif len(movies) > 1:
        sizes = [movie.shape[2:] for movie in movies]
    else:
        sizes = movies[0].shape[1] * [movies[0].shape[2:]]
    return [f"{height} x {width} px" for height, width in sizes]


def _check_one_choice(
    radii: list[str] | None,
    radii_frames: list[float] | None,
    clip: str | None,
    calibration: Path | None,
    channel: int | None,
) -> None:
    """A calibration, or numbers."""
    if calibration is not None:
        for name, value in (
            ("radius", radii),
            ("radius-frames", radii_frames),
            ("clip", clip),
        ):
            if value:
                _fail(f"--{name} and --calibration: each gives it; leave one of them out")
    elif channel is not None:
        _fail(f"--channel {channel}: belongs to a calibration; give --calibration too")


def _counted(channel_count: int) -> str:
    return "is 1 channel" if channel_count == 1 else f"are {channel_count} channels"


def _chosen_estimator(
    radii: list[str] | None,
    radii_frames: list[float] | None,
    clip: str | None,
    channel_count: int,
) -> SpatialMean | LocalMean:
    rows = [_parsed_radius(text) for text in radii or [f"{_USUAL_RADIUS_PIX:g}"]]
    for name, values in (("radius", rows), ("radius-frames", radii_frames or [0])):
        if len(values) not in (1, channel_count):
            _fail(
                f"--{name}: is given {len(values)} times, but there "
                f"{_counted(channel_count)}; give it once for all channels, or once for "
                "each"
            )
    if not radii_frames:
        _check_no_clip(clip)
        return SpatialMean(rows)
    try:
        return LocalMean(rows, radii_frames, clip=_parsed_clip(clip))
    except ValueError as error:
        _fail(f"--radius-frames {_listed(map(str, radii_frames))}: {error}")


def _check_no_clip(clip: str | None) -> None:
    if clip is not None:
        _fail(f"--clip {clip}: is for averages over time; give --radius-frames too")


def _parsed_clip(text: str | None) -> SoftClip | None:
    if text == "none":
        return None
    try:
        return SoftClip(float(text or _USUAL_CLIP))
    except ValueError:
        _fail(f"--clip {text}: is neither none nor a threshold from 0.01 to 100 deviations")


def _read_mask(path: Path) -> Any:
    """What `estimate_movie` takes for weights."""
    try:
        array = np.load(path, mmap_mode="r") if path.suffix.lower() == ".npy" else None
    except (OSError, ValueError):
        array = None
    # Of one frame, whose file is no movie; all others are read as movies are.
    return path if array is None or array.ndim != 2 else array


def _calibrated_estimator(
    path: Path, channel: int | None, channel_count: int
) -> SpatialMean | LocalMean:
    if channel is not None and channel_count > 1:
        _fail(
            f"--channel {channel}: is for one channel alone, but there "
            f"{_counted(channel_count)}"
        )
    estimator = _read_calibration(path, channel)
    count = len(estimator.radii_pix)
    if count not in (1, channel_count):
        remedy = "; say which one with --channel" if channel_count == 1 else ""
        _fail(f"{path}: has {count} channels, but there {_counted(channel_count)}{remedy}")
    return estimator


def _read_calibration(path: Path, channel: int | None) -> SpatialMean | LocalMean:
    """With the radii of one channel, or of all."""
    try:
        text = path.read_text("utf-8")
        module = estimator_from_json(text)
        if not isinstance(module, SpatialMean | LocalMean):
            raise ValueError(f"it holds a {type(module).__name__}")
        fields = json.loads(text)
        kept = slice(None) if channel is None else slice(channel - 1, channel)
        faults = _calibration_faults(fields, kept)
    except OSError as error:
        _fail(f"{path}: cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        _fail(f"{path}: is no calibration, and no text at all")
    except (TypeError, ValueError) as error:
        _fail(f"{path}: is no calibration: {error}")
    count = len(module.radii_pix)
    if channel is not None and channel > count:
        _fail(f"--channel {channel}: {path} has {count} of them")
    if faults:
        _say(f"{path}: {' and '.join(faults)}; the background may be off")
    if channel is None or count == 1:
        return module
    for part in (fields, fields.get("clip") or {}):
        for name in _CHANNEL_FIELDS & part.keys():
            # Of a camera, one number may serve all channels.
            if part[name] is not None and len(part[name]) == count:
                part[name] = part[name][kept]
    return type(module).from_json(json.dumps(fields))


def _calibration_faults(fields: dict[str, Any], channels: slice) -> list[str]:
    """What the calibration itself says of radii that were not found well."""
    faults = []
    match fields:
        case {"calibration": {"is_converged": is_converged, "is_at_bound": [*rows]}}:
            if not is_converged:
                faults.append("the search for these radii had not ended")
            # In time, a steady background has no radius that is too large.
            if np.any([row[-2:] for row in rows[channels]]):
                faults.append("a radius is at its bound")
    return faults


def _parsed_radius(text: str) -> tuple[float, float]:
    """The radii (y, x) in pixels."""
    try:
        radii = [float(part) for part in text.split(",")]
        y, x = radii if len(radii) > 1 else 2 * radii
    except ValueError:
        _fail(f"--radius {text}: is neither a number of pixels nor a pair as in 6,10")
    try:
        SpatialMean((y, x))
    except ValueError as error:
        _fail(f"--radius {text}: {error}")
    return y, x


def _check_camera(
    quantity: Quantity, offset: list[float] | None, gain: list[float] | None
) -> None:
    if quantity != "snr" and gain:
        _fail("--gain: is for --quantity snr; leave it out, or give that")
    if quantity == "snr" and not gain:
        _fail("--quantity snr: needs --gain, in electrons per ADU")
    if quantity == "snr" and not offset:
        _say(
            "--quantity snr: takes the camera's offset for light, unless --offset is given"
        )


def _shared_or_each(values: list[float] | None) -> Any:
    return values[0] if values and len(values) == 1 else values


def _numbered(out: Path, count: int) -> list[Path]:
    """A name for each channel, as bkgd-1.ome.tif for bkgd.ome.tif."""
    if count == 1:
        return [out]
    is_double = out.stem.lower().endswith(".ome")
    suffix = "".join(out.suffixes[-2:]) if is_double else out.suffix
    stem = out.name.removesuffix(suffix)
    return [out.parent / f"{stem}-{number}{suffix}" for number in range(1, count + 1)]


@contextlib.contextmanager
def _ended_by_ctrl_c(sinks: list[Path]) -> Iterator[None]:
    """Ends the process at once: what is done is safe, and nothing that works on more is
    waited for. An exception would be lost in a callback of the garbage collector."""

    def end(*signal_and_frame: Any) -> None:
        end_progress()
        is_begun = any(draft_of(sink).exists() for sink in sinks)
        remedy = "; run the same command again to go on, or with --fresh to begin anew"
        _say("interrupted" + (remedy if is_begun else ""))
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _described_quantity(
    quantity: Quantity, dtype: Dtype, offset: list[float] | None
) -> str:
    if quantity == "residual":
        return f"residual, {dtype}"
    adu = _listed(f"{value:g}" for value in offset or [])
    rest = f"above the offset of {adu} ADU" if adu else "the camera's offset included"
    return f"{'SNR' if quantity == 'snr' else quantity}, {dtype}, {rest}"


def _estimator_rows(estimator: SpatialMean | LocalMean) -> dict[str, str]:
    radii = [_in_y_and_x(y, x, "px") for y, x in estimator.radii_pix.tolist()]
    if isinstance(estimator, SpatialMean):
        return {"radius": _listed(radii)}
    frames = estimator.radius_frames.tolist()
    rows = zip(radii, frames, strict=True)
    return {
        "radius": _listed(f"{pix}, {count:g} frames" for pix, count in rows),
        **_clip_row(estimator),
    }


def _clip_row(estimator: SpatialMean | LocalMean) -> dict[str, str]:
    if isinstance(estimator, SpatialMean):
        return {}
    clip = estimator.clip
    return {"clip": "none" if clip is None else f"{float(clip.threshold):.3g} deviations"}


def _summary_rows(summary: MovieSummary) -> dict[str, str]:
    rows = {
        "noise factor": _listed(f"{factor:.4f}" for factor in summary.noise_corrections),
        "chunks": f"of {summary.chunk_frames} frames, on {summary.workers} threads",
        "time": f"{summary.seconds:.2f} s, {summary.megapixels_per_second:.1f} Mpx/s",
    }
    if summary.resumed_frames:
        rows["resumed"] = f"{summary.resumed_frames} frames had been done before"
    if summary.clipped_frames:
        rows["clipped"] = (
            f"to uint16, in {summary.clipped_frames} of {summary.frames} frames"
        )
    if summary.nonfinite_frames:
        rows["not finite"] = (
            f"NaN or infinity in {summary.nonfinite_frames} of {summary.frames} frames"
        )
    return rows


def _in_y_and_x(y: float, x: float, unit: str) -> str:
    return f"{y:g} {unit}" + (f" in y, {x:g} {unit} in x" if x != y else "")


def _listed(channels: Iterable[str]) -> str:
    """What belongs to each channel."""
    return "; ".join(channels)


def _print_rows(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:<{width}}  {_printable(value)}")


@app.command()
def calibrate(
    movies: Annotated[
        list[Path],
        typer.Argument(
            metavar="MOVIE",
            help="Movies of the same length, each with one channel or more; see `jaxbkgd "
            "info`.",
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
    radius_frames: Annotated[
        float | None,
        typer.Option(
            metavar="FRAMES",
            help="Learn a radius in time too, and start there.",
            show_default="each frame by itself",
        ),
    ] = None,
    max_radius_frames: Annotated[
        float | None,
        typer.Option(
            metavar="FRAMES", help="The largest radius in time allowed.", show_default="60"
        ),
    ] = None,
    clip: _ClipOption = None,
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
    with _one_line_errors(), _one_line_warnings(), contextlib.ExitStack() as files:
        from .figures import save_calibration_figure

        _parsed_radius(radius)
        png = out.with_suffix(".png") if figure is None else figure
        _check_destination(out, ".json", overwrite)
        _check_destination(png, ".png", overwrite)
        channels = [
            channel
            for movie in movies
            for channel in files.enter_context(open_movie(movie)).channels
        ]
        start = _start(radius, max_radius, len(channels))
        if radius_frames is not None:
            bound = 60.0 if max_radius_frames is None else max_radius_frames
            start = _start_in_time(start, radius_frames, bound, clip)
        else:
            _check_no_clip(clip)
            if max_radius_frames is not None:
                _fail(
                    f"--max-radius-frames {max_radius_frames:g}: needs --radius-frames, "
                    "where the search starts"
                )
        try:
            module, history = _calibrate.calibrate(
                channels, start, objective=FramePairLoss(lag), steps=steps
            )
        except MovieError:
            raise
        except ValueError as error:
            _fail(f"{', '.join(map(str, movies))}: {error}")
        bound = module.max_radius_pix
        grid_pix = np.geomspace(min(1, bound / 10), 0.99 * bound, _GRID_RADII)
        try:
            losses = _channel_losses(module, history.objective, channels, grid_pix)
        except KeyboardInterrupt:
            losses = np.full((len(channels), 2 + _GRID_RADII), np.nan)
        names = [_channel_name(channel) for channel in channels]
        _print_calibration(names, module, history, losses)
        with _written_whole(out) as draft:
            draft.write_text(_calibration_json(names, module, history, losses), "utf-8")
        typer.echo(f"wrote {_printable(out)}")
        if np.isnan(losses).all():
            typer.echo("interrupted before the figure")
            return
        drawn = [
            _drawn_channel(number, module, history, channel, grid_pix, losses[number, 2:])
            for number, channel in enumerate(channels)
        ]
        with _written_whole(png) as draft:
            save_calibration_figure(draft, drawn)
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


def _start_in_time(
    start: SpatialMean, radius_frames: float, bound: float, clip: str | None
) -> LocalMean:
    rows = np.asarray(start.radii_pix)[:, : start.unbounded_radii.shape[1]]
    try:
        return LocalMean(
            rows,
            radius_frames,
            clip=_parsed_clip(clip),
            max_radius_pix=start.max_radius_pix,
            max_radius_frames=bound,
        )
    except ValueError as error:
        _fail(f"--radius-frames {radius_frames:g}, --max-radius-frames {bound:g}: {error}")


def _with_radii_pix(
    module: SpatialMean | LocalMean, number: int, radii_pix: Any, bound: float | None
) -> SpatialMean | LocalMean:
    """A module for the channel of a number alone."""
    if isinstance(module, SpatialMean):
        return SpatialMean(radii_pix, max_radius_pix=bound)
    return LocalMean(
        radii_pix,
        float(module.radius_frames[number]),
        clip=module.clip,
        max_radius_pix=bound,
        max_radius_frames=module.max_radius_frames,
    )


def _channel_name(channel: Channel) -> str:
    """The name of its file, and its number where that holds several."""
    movie = channel.movie
    number = f", channel {channel.index + 1}" if movie.shape[1] > 1 else ""
    return _printable(Path(movie.name).name) + number


def _channel_losses(
    module: SpatialMean | LocalMean,
    objective: FramePairLoss,
    channels: Sequence[Channel],
    grid_pix: np.ndarray,
) -> np.ndarray:
    """Of each channel by itself: at its radii, at the usual one, and over the grid."""
    others = [(radius, radius) for radius in (_USUAL_RADIUS_PIX, *grid_pix)]
    bound = max(module.max_radius_pix, 2 * _USUAL_RADIUS_PIX)
    losses = []
    with progress_bar(len(channels)) as report:
        for number, channel in enumerate(channels):
            report(number, f"channel {number + 1}: drawing the loss")
            pairs = [tuple(module.radii_pix[number].tolist()), *others]
            estimators = [_with_radii_pix(module, number, pair, bound) for pair in pairs]
            losses.append(_calibrate.losses_at(estimators, [channel], objective))
    return np.stack(losses)


def _drawn_channel(
    number: int,
    module: SpatialMean | LocalMean,
    history: _calibrate.CalibrationHistory,
    channel: Channel,
    grid_pix: np.ndarray,
    grid_losses: np.ndarray,
) -> "CalibratedChannel":
    from .figures import CalibratedChannel

    middle = len(channel) // 2
    radii_pix = np.asarray(module.radii_pix[number])
    estimators = [
        _with_radii_pix(module, number, tuple(share * radii_pix), None).for_inference()
        for share in (0.5, 1, 2)
    ]
    # Of a large frame no more than there is memory for, to the eye the same.
    reach = min(
        estimators[0].halo_frames, _FIGURE_PIXELS // (2 * math.prod(channel.shape[1:]))
    )
    first = max(0, middle - reach)
    frames = channel[first : middle + reach + 1]
    bkgds = [estimator(frames).bkgds[middle - first] for estimator in estimators]
    return CalibratedChannel(
        f"Channel {number + 1}: {_channel_name(channel)}, frame {middle}",
        radii_pix=radii_pix,
        # Of a radius in time there is none in the figure.
        radii_std_pix=history.radii_std_pix[number, -2:],
        path_pix=history.radii_pix[:, number, -2:],
        grid_pix=grid_pix,
        grid_losses=grid_losses,
        frame=frames[middle - first],
        bkgds=np.stack(bkgds),
    )


def _print_calibration(
    names: list[str],
    module: SpatialMean | LocalMean,
    history: _calibrate.CalibrationHistory,
    losses: np.ndarray,
) -> None:
    columns = []
    for number, name in enumerate(names):
        learned, usual = losses[number, :2]
        axes = {"radius in y": "px", "radius in x": "px"}
        if isinstance(module, LocalMean):
            axes = {"radius in time": "frames", **axes}
        radii = [
            _described_radius(*values)
            for values in zip(
                _calibrate.radii_of(module)[number].tolist(),
                history.radii_std_pix[number].tolist(),
                history.is_at_bound[number].tolist(),
                axes.values(),
                strict=True,
            )
        ]
        is_measured = learned > 0 and usual > 0
        change = 100 * (np.sqrt(learned / usual) - 1) if is_measured else np.nan
        columns.append(
            {
                "movie": name,
                **dict(zip(axes, radii, strict=True)),
                **_clip_row(module),
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


def _described_radius(radius: float, std: float, is_at_bound: bool, unit: str) -> str:
    if is_at_bound:
        return f"{radius:.2f} {unit}, at its bound"
    if not np.isfinite(std):
        return f"{radius:.2f} {unit}, uncertainty unknown"
    # No smaller than the last digit.
    return f"{radius:.2f} +- {max(std, 0.01):.2f} {unit}"


def _described_error(loss: float) -> str:
    """The loss is the mean square error over the variance of the noise."""
    if np.isnan(loss):
        return "not measured"
    return f"{np.sqrt(loss):.3f} of the noise" if loss > 0 else "below what can be measured"


def _calibration_json(
    names: list[str],
    module: SpatialMean | LocalMean,
    history: _calibrate.CalibrationHistory,
    losses: np.ndarray,
) -> str:
    """The module, with what is known of how it was learned."""
    calibration = {
        "movies": names,
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
    check_destination(path, overwrite=overwrite)
    if path.exists() and not path.is_file():
        _fail(f"{path}: is not a regular file; choose another name")


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A file to write in, which gets the name `path` once that has gone well."""
    draft = draft_of(path)
    try:
        yield draft
        draft.replace(os.path.realpath(path))
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
        yield
    except MovieError as error:
        _fail(_with_notes(error))
    except ModuleNotFoundError as error:
        _fail(f"the package {error.name} is missing: pip install 'jaxbkgd[cli]'")
    except OSError as error:
        _fail(_with_notes(error))
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(130) from None


def _with_notes(error: BaseException) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", [])])


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
