"""The command `jaxbkgd`: its subcommands, and how their errors are reported."""

import functools
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TYPE_CHECKING

from .._batch.run import installed_version
from .._movies.movie import MovieError
from .._workers import end_progress
from . import calibrate, demo, estimate, info
from .main import at_ctrl_c
from .report import require, say, UsageError


if TYPE_CHECKING:
    import typer


def run_app() -> None:
    """Run the command with the arguments of this process."""
    try:
        app = build_app()
    except UsageError as error:
        say(str(error))
        sys.exit(2)
    app(prog_name="jaxbkgd")


def build_app() -> "typer.Typer":
    """The command `jaxbkgd`.

    **Raises:**

    `UsageError` where a package of the extra `cli` is missing.
    """
    require("typer", "rich")
    import typer

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        # A wrong option is three short lines then, and a box otherwise.
        rich_markup_mode=None,
    )
    debug = typer.Option("--debug", help="Show the traceback of an error.")

    def print_version(is_asked: bool) -> None:
        if is_asked:
            print(f"jaxbkgd {installed_version()}")
            raise typer.Exit

    version = typer.Option("--version", help="Print the version.", callback=print_version)

    @app.callback()
    def options(
        context: typer.Context,
        version: Annotated[bool, version] = False,
        debug: Annotated[bool, debug] = False,
    ) -> None:
        """Estimate the background of single-molecule localization microscopy movies."""
        context.obj = debug

    kind = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("context", kind, annotation=typer.Context),
        inspect.Parameter("debug", kind, annotation=Annotated[bool, debug], default=False),
    ]
    for run, texts in (
        (demo.demo, demo.OPTIONS),
        (info.info, info.OPTIONS),
        (estimate.estimate, estimate.OPTIONS),
        (calibrate.calibrate, calibrate.OPTIONS),
    ):
        parameters = [
            parameter.replace(
                annotation=Annotated[parameter.annotation, _option(*texts[name])]
            )
            for name, parameter in inspect.signature(run).parameters.items()
        ]
        answered = _answered(run)
        vars(answered)["__signature__"] = inspect.Signature([*parameters, *added])
        app.command()(answered)
    return app


def _option(metavar: str, help: str, least: int | None = None) -> Any:
    """An option of typer; the metavar of a switch are its flags."""
    import typer

    if metavar == "MOVIE":
        return typer.Argument(metavar=metavar, help=help)
    if metavar.startswith("--"):
        return typer.Option(metavar, help=help)
    return typer.Option(metavar=metavar or None, help=help, min=least)


def _answered(run: Callable[..., None]) -> Callable[..., None]:
    """The command with `--debug`, and with errors and warnings in one line."""

    @functools.wraps(run)
    def answered(*, context: Any, debug: bool, **options: Any) -> None:
        is_debug = debug or context.obj or bool(os.environ.get("JAXBKGD_DEBUG"))
        with at_ctrl_c(end_progress), _one_line_errors(is_debug), _one_line_warnings():
            run(**options)

    return answered


@contextmanager
def _one_line_errors(is_debug: bool) -> Iterator[None]:
    """End with a line and the exit code 2 where the user can act, or 1 for a bug."""
    try:
        yield
    # The reader of a pipe has gone; typer ends silently.
    except BrokenPipeError:
        raise
    except Exception as error:
        is_users = isinstance(error, MovieError | UsageError)
        text = "; ".join([str(error), *getattr(error, "__notes__", [])])
        if is_debug:
            traceback.print_exc()
        elif not is_users:
            text += "; run again with --debug for the traceback"
        say(text if is_users else f"internal error: {type(error).__name__}: {text}")
        sys.exit(2 if is_users else 1)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *where: say(str(message))
        yield
