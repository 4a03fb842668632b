"""The command `jaxbkgd`: its subcommands, and how their errors are reported."""

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .._movies.movie import MovieError
from .._version import __version__
from . import arguments, calibrate, camera, demo, estimate, info, view
from .main import INTERRUPTED, missing_text
from .report import say, UsageError


# Without markup, a wrong option is three short lines instead of a box.
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


def _print_version(is_asked: bool) -> bool:
    if is_asked:
        print(f"jaxbkgd {__version__}")
        raise typer.Exit
    return is_asked


_Version = Annotated[bool, typer.Option("--version", callback=_print_version)]


@app.callback()
def _options(
    version: _Version = False, debug: Annotated[bool, arguments.DEBUG] = False
) -> None:
    """Estimate the background of single-molecule localization microscopy movies."""
    if debug:
        # Commands have the same option, and read it from here.
        os.environ[arguments.DEBUG_VARIABLE] = "1"


def _add_command(run: Callable[..., None]) -> None:
    """Add a subcommand. An error is a line, and the exit code 2 where the user can act, 1
    for a bug, or 130. It handles the option `--debug`, and the function need not."""

    @functools.wraps(run)
    def command(*, debug: bool, **values: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = lambda message, *where: say(str(message))
                run(**values)
        # The reader of a pipe has gone; typer ends silently.
        except BrokenPipeError:
            raise
        except KeyboardInterrupt as interrupt:
            kept = getattr(interrupt, "__notes__", ["nothing has been written"])
            say("; ".join(["interrupted", *kept]))
            sys.exit(INTERRUPTED)
        except Exception as error:
            is_missing = isinstance(error, ModuleNotFoundError)
            is_users = is_missing or isinstance(error, MovieError | UsageError)
            text = missing_text(error) if is_missing else str(error)
            text = "; ".join([text, *getattr(error, "__notes__", [])])
            if debug:
                traceback.print_exc()
            elif not is_users:
                text += "; run again with --debug for the traceback"
            say(text if is_users else f"internal error: {type(error).__name__}: {text}")
            sys.exit(2 if is_users else 1)

    # By `wraps`, typer sees the arguments of the function.
    app.command()(command)


_add_command(demo.demo)
_add_command(info.info)
_add_command(view.view)
_add_command(estimate.estimate)
_add_command(calibrate.calibrate)
_add_command(camera.camera)
