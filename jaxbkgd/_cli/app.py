"""The command `jaxbkgd`: its subcommands, and how their errors are reported."""

import functools
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from .._movies.movie import MovieError
from .._version import __version__
from . import calibrate, demo, estimate, info
from .main import INTERRUPTED, missing_text
from .report import say, UsageError


# Without markup, a wrong option is three short lines instead of a box.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(is_asked: bool) -> bool:
    if is_asked:
        print(f"jaxbkgd {__version__}")
        raise typer.Exit
    return is_asked


_Version = Annotated[
    bool, typer.Option("--version", help="Print the version.", callback=_print_version)
]
_OPTION = r"^(\w+)(?: (\S*?)(?:>=(\d))?)?: (.*(?:\n  .*)*)"
_DEBUG_VARIABLE = "JAXBKGD_DEBUG"
_Debug = Annotated[
    bool,
    typer.Option("--debug", envvar=_DEBUG_VARIABLE, help="Show the traceback of an error."),
]


@app.callback()
def _options(version: _Version = False, debug: _Debug = False) -> None:
    """Estimate the background of single-molecule localization microscopy movies."""
    if debug:
        os.environ[_DEBUG_VARIABLE] = "1"


def _add_command(run: Callable[..., None], texts: str) -> None:
    """Add a subcommand with its options, `name METAVAR>=minimum: help`, and `--debug`."""

    @functools.wraps(run)
    def command(*, debug: bool, **values: Any) -> None:
        with _one_line_errors(debug), warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *where: say(str(message))
            run(**values)

    parameters = inspect.signature(run).parameters
    described = []
    for entry in re.finditer(_OPTION, texts, re.MULTILINE):
        name, metavar, least, text = entry.groups()
        make = typer.Argument if metavar == "MOVIE" else typer.Option
        flags = [metavar] if (metavar or "").startswith("--") else []
        option = make(
            *flags,
            metavar=None if flags else metavar,
            min=None if least is None else int(least),
            help=" ".join(text.split()),
        )
        hint = Annotated[parameters[name].annotation, option]
        described.append(parameters[name].replace(annotation=hint))
    described.append(inspect.signature(_options).parameters["debug"])
    vars(command)["__signature__"] = inspect.Signature(described)
    app.command()(command)


@contextmanager
def _one_line_errors(is_debug: bool) -> Iterator[None]:
    """End with a line, and the exit code 2 where the user can act, 1 for a bug, or 130."""
    try:
        yield
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
        if is_debug:
            traceback.print_exc()
        elif not is_users:
            text += "; run again with --debug for the traceback"
        say(text if is_users else f"internal error: {type(error).__name__}: {text}")
        sys.exit(2 if is_users else 1)


_add_command(demo.demo, demo.OPTIONS)
_add_command(info.info, info.OPTIONS)
_add_command(estimate.estimate, estimate.OPTIONS)
_add_command(calibrate.calibrate, calibrate.OPTIONS)
