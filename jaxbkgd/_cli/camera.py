"""`jaxbkgd camera`: offset, gain and read noise of a camera, measured."""

import contextlib
import functools as ft
import itertools
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
from typer import Argument, Option

from .._estimators.camera import Camera
from .._estimators.photon_transfer import CameraReport, measure_camera, measure_gain
from .._movies.movie import Channel
from .._movies.open import open_movie
from .._workers import run_interruptibly
from . import arguments, report
from .figures import save_camera_figure
from .report import refusing, UsageError


_MOVIES = Argument(
    help="Dark frames, and then frames of steady light, a file for each brightness; or one "
    "movie of molecules."
)
_OUT = Option(help="The .json, .npz or .tif to write; a figure, .png, is drawn beside it.")
_GAIN = Option(help="Electrons per ADU, if there are only dark frames.")
_OFFSET = Option(help="With one movie: the offset in ADU, if it is known.")
_READ_NOISE = Option(help="With one movie: the read noise in electrons.")


def camera(
    movies: Annotated[list[Path], _MOVIES],
    out: Annotated[Path | None, _OUT] = None,
    gain: Annotated[float | None, _GAIN] = None,
    offset: Annotated[float | None, _OFFSET] = None,
    read_noise: Annotated[float, _READ_NOISE] = 0.0,
    overwrite: Annotated[bool, arguments.OVERWRITE] = False,
    debug: Annotated[bool, arguments.DEBUG] = False,
) -> None:
    """Measure a camera: offset, gain and read noise.

    From dark and bright frames it makes maps, pixel by pixel; from dark frames and --gain,
    maps of offset and read noise; from a movie of molecules alone, one gain and offset.
    Other commands read the result with --camera.
    """
    is_alone = len(movies) == 1 and gain is None
    if not is_alone and (offset is not None or read_noise):
        raise UsageError("--offset, --read-noise: apply to one movie alone; leave them out")
    if out is None:
        out = Path("camera.json" if is_alone else "camera.npz")
    suffixes = [".npz", ".tif", ".tiff", *[".json"] * is_alone]
    if out.suffix.lower() not in suffixes:
        raise UsageError(f"--out {out}: give a name that ends in {', '.join(suffixes)}")
    png = out.with_suffix(".png")
    report.check_name(out)
    report.check_destination(out, overwrite=overwrite)
    report.check_output(png, ".png", overwrite=overwrite)
    names = ", ".join(map(str, movies))
    with contextlib.ExitStack() as files:
        channels = [_only_channel(path, files) for path in movies]
        for path, channel in itertools.product((out, png), channels):
            if channel.movie.includes(path.resolve()):
                what = "is one of the movies, or would be a part of one"
                raise UsageError(f"--out {path}: {what}; give a name elsewhere")
        with refusing(names):
            if is_alone:
                measure = ft.partial(
                    measure_gain,
                    channels[0],
                    offset_adu=offset,
                    read_noise_electrons=read_noise,
                )
            else:
                dark, *bright = channels
                measure = ft.partial(measure_camera, dark, bright, gain=gain)
            measured = run_interruptibly(measure)
    with tempfile.TemporaryDirectory() as scratch, refusing(f"--out {out}"):
        draft = Path(scratch) / out.name
        Camera(*measured[:3]).save(draft)
        report.write_whole(out, draft.read_bytes())
    # What is there is of other numbers.
    png.unlink(missing_ok=True)
    try:
        for doubt in measured.doubts:
            report.say(doubt)
        run_interruptibly(save_camera_figure, png, measured)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"the numbers are in {out}, and there is no figure")
        raise
    wrote = ", ".join(map(report.printable, (out, png)))
    report.print_rows(_rows(measured) | {"wrote": wrote})


def _only_channel(path: Path, files: contextlib.ExitStack) -> Channel:
    channels = files.enter_context(open_movie(path)).channels
    if len(channels) > 1:
        raise UsageError(
            f"{path}: has {len(channels)} channels; give a movie of one camera"
        )
    return channels[0]


def _rows(measured: CameraReport) -> dict[str, str]:
    """The middle and the spread of each map, and how well a pixel is known."""
    names, units = ("offset", "gain", "read noise"), ("ADU", "e-/ADU", "e-")
    of_each = zip(names, units, measured[:3], measured[3:6], strict=True)
    rows = {}
    for name, unit, value, std in of_each:
        text = f"{np.median(value):.4g} {unit}"
        if np.ndim(value):
            low, high = np.percentile(value, [5, 95])
            text += f" ({low:.4g} to {high:.4g} in 90 % of the pixels)"
        error = float(np.median(std))
        rows[name] = f"{text}, known to +- {error:.2g}" if error else f"{text}, as given"
    return rows
