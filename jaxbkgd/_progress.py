"""A progress bar, for those who sit at a terminal."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any


# Told what was done of the whole, and what to say of it.
Report = Callable[[int, str], None]

# Those of rich that are drawn now.
_drawn: list[Any] = []


@contextlib.contextmanager
def progress_bar(total: int, is_shown: bool = True, done: int = 0) -> Iterator[Report]:
    """Gives a function that is told how much of `total` is done, and what to say of it.

    `done` is what was done before. The bar is drawn on stderr by rich, and is gone in the
    end. There is none off a terminal, or where rich is not installed.
    """
    if not is_shown or importlib.util.find_spec("rich") is None:
        yield lambda done, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        _drawn.append(progress)
        task = progress.add_task("", total=total, completed=done)
        try:
            yield lambda done, text: progress.update(task, completed=done, description=text)
        finally:
            _drawn.remove(progress)


def end_progress() -> None:
    """Leaves the terminal as it was, from any thread, where a process ends at once."""
    for progress in _drawn:
        progress.stop()
