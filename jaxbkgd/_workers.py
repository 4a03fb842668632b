"""Threads and progress of long work, which Ctrl-C ends soon."""

import contextlib
import importlib.util
import itertools as it
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import jax


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def core_count() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def one_thread_a_call() -> None:
    """Lets XLA on CPU do all of a call in the thread that makes it.

    For processes of our own, before JAX makes its first array. XLA has two pools of threads
    and hands steps of a call from one to another, also where calls run side by side and
    leave no core to win: each waits for threads that wait for a core.

    `PJRT_NPROC`, or else `NPROC`, is how many threads the pools have; who sets one of them
    has made up their mind.
    """
    if not {"PJRT_NPROC", "NPROC"} & os.environ.keys():
        os.environ["PJRT_NPROC"] = "1"
        jax.config.update("jax_cpu_enable_async_dispatch", False)


# What threads tell of their results together: of short pieces of work, each time that the
# thread that listens wakes up would cost as much as the work.
_SECONDS_BETWEEN_NEWS = 0.02


class _News(NamedTuple):
    """What a thread has done; of no results, that there will be no more."""

    results: list[Any]
    error: BaseException | None = None


def on_threads(
    run: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Generator[_Result, None, None]:
    """What `run` gives for each item: soon, and at the latest when its thread has done the
    next one. No thread waits for who listens.

    After an error or Ctrl-C, only what has begun is waited for.
    """
    items = iter(items)
    taking, is_over = threading.Lock(), False
    # Of what may wait, this alone can be added to by a handler of signals.
    news: SimpleQueue[_News] = SimpleQueue()

    def next_item() -> list[_Item]:
        with taking:
            return [] if is_over else list(it.islice(items, 1))

    def work(item: list[_Item]) -> None:
        results, error, told = [], None, time.monotonic()
        try:
            while item:
                results.append(run(*item))
                if time.monotonic() > told + _SECONDS_BETWEEN_NEWS:
                    news.put(_News(results))
                    results, told = [], time.monotonic()
                item = next_item()
        except BaseException as raised:
            error = raised
        if results:
            news.put(_News(results))
        news.put(_News([], error))
        # An error holds the variables of its functions, and these would hold it.
        del error

    threads = []
    with _ctrl_c_added_to(news):
        try:
            while len(threads) < workers and (item := next_item()):
                thread = threading.Thread(target=work, args=(item,))
                thread.start()
                threads.append(thread)
            running = len(threads)
            while running:
                results, error = news.get()
                if error is not None:
                    try:
                        raise error
                    finally:
                        del error
                yield from results
                running -= not results
        finally:
            is_over = True
            for thread in threads:
                thread.join()
    # A Ctrl-C after the last one.
    if not news.empty():
        _, error = news.get()
        assert error is not None
        raise error


@contextlib.contextmanager
def _ctrl_c_added_to(news: SimpleQueue[_News]) -> Iterator[None]:
    """Python raises KeyboardInterrupt between any two steps, also between those that take a
    lock and give it back: a thread would then wait for it for ever. Here it is
    news like any other. A second Ctrl-C does what it always does, and so does the first
    one where somebody else has a handler."""
    default = signal.default_int_handler

    def end(*signal_and_frame: Any) -> None:
        signal.signal(signal.SIGINT, default)
        news.put(_News([], KeyboardInterrupt()))

    # Others have no handlers, and hear no signals.
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not default:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)


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
