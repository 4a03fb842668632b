"""The command `jaxbkgd`: its subcommands, and how their errors are reported."""

import functools
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TYPE_CHECKING

from .._batch.run import installed_version
from .._movies.movie import MovieError
from .._workers import end_progress
from . import calibrate, demo, estimate, info
from .main import at_ctrl_c
from .report import missing_text, require, say, UsageError


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
    # Whether --debug is given before the subcommand; it may come after it, too.
    is_debug: list[bool] = []
    debug = typer.Option("--debug", help="Show the traceback of an error.")

    def print_version(is_asked: bool) -> bool:
        if is_asked:
            print(f"jaxbkgd {installed_version()}")
            raise typer.Exit
        return is_asked

    version = typer.Option("--version", help="Print the version.", callback=print_version)

    @app.callback()
    def options(
        version: Annotated[bool, version] = False,
        debug: Annotated[bool, debug] = False,
    ) -> None:
        """Estimate the background of single-molecule localization microscopy movies."""
        is_debug[:] = [debug]

    debug_parameter = inspect.Parameter(
        "debug",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[bool, debug],
        default=False,
    )
    commands: dict[Callable[..., None], Mapping[str, tuple[Any, ...]]] = {
        demo.demo: demo.OPTIONS,
        info.info: info.OPTIONS,
        estimate.estimate: estimate.OPTIONS,
        calibrate.calibrate: calibrate.OPTIONS,
    }
    for run, texts in commands.items():
        parameters = [
            each.replace(annotation=Annotated[each.annotation, _option(*texts[name])])
            for name, each in inspect.signature(run).parameters.items()
        ]
        answered = _answered(run, is_debug)
        vars(answered)["__signature__"] = inspect.Signature([*parameters, debug_parameter])
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


def _answered(run: Callable[..., None], is_debug: list[bool]) -> Callable[..., None]:
    """The command with `--debug`, and with errors and warnings in one line."""

    @functools.wraps(run)
    def answered(*, debug: bool, **options: Any) -> None:
        is_shown = debug or any(is_debug) or bool(os.environ.get("JAXBKGD_DEBUG"))
        with at_ctrl_c(end_progress), _one_line_errors(is_shown), _one_line_warnings():
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
        is_users = isinstance(error, MovieError | UsageError | ModuleNotFoundError)
        text = "; ".join([str(error), *getattr(error, "__notes__", [])])
        if isinstance(error, ModuleNotFoundError):
            text = missing_text(error.name)
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
