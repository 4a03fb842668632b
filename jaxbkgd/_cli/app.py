"""The command `jaxbkgd`: its subcommands, and how their errors are reported."""

import functools
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .._movies.movie import MovieError
from .._version import __version__
from . import calibrate, camera, demo, estimate, info, view
from .main import INTERRUPTED, missing_text
from .report import say, UsageError


# Without markup, a wrong option is three short lines instead of a box.
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)
_DEBUG = "JAXBKGD_DEBUG"


def _print_version(is_asked: bool) -> bool:
    if is_asked:
        print(f"jaxbkgd {__version__}")
        raise typer.Exit
    return is_asked


_Version = Annotated[bool, typer.Option("--version", callback=_print_version)]
_Debug = Annotated[bool, typer.Option("--debug", envvar=_DEBUG, help="Show tracebacks.")]


@app.callback()
def _options(version: _Version = False, debug: _Debug = False) -> None:
    """Estimate the background of single-molecule localization microscopy movies."""
    if debug:
        os.environ[_DEBUG] = "1"


def _add_command(run: Callable[..., None]) -> None:
    """Add a subcommand, with the option `--debug` beside its own. An error is a line, and
    the exit code 2 where the user can act, 1 for a bug, or 130."""

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

    own = inspect.signature(run).parameters.values()
    debug = inspect.signature(_options).parameters["debug"]
    vars(command)["__signature__"] = inspect.Signature([*own, debug])
    app.command()(command)


_COMMANDS = (
    demo.demo,
    info.info,
    view.view,
    estimate.estimate,
    calibrate.calibrate,
    camera.camera,
)
for _run in _COMMANDS:
    _add_command(_run)
