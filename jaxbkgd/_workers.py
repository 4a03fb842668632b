"""Threads and progress of long work, which Ctrl-C ends within half a second."""

import contextlib
import itertools as it
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import jax


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# On Windows a thread that waits hears Ctrl-C only when its wait ends.
_WAIT_SECONDS = 0.2

# Threads tell their results together: to wake the consumer for each short item would cost
# as much as the item.
_SECONDS_BETWEEN_NEWS = 0.02

# After Ctrl-C, the time that threads have to end what they have begun.
_GRACE_SECONDS = 0.2


def core_count() -> int:
    """The number of cores that this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def one_thread_a_call() -> None:
    """Makes JAX run each call on CPU in the thread that makes the call.

    Call it once, before JAX makes its first array, in a process that estimates movies or
    calls a compiled function from several threads. `jaxbkgd estimate` does. By default XLA
    splits a call over all cores and hands its parts from thread to thread, which costs time
    where [`jaxbkgd.estimate_movie`][] keeps all cores busy already: without that, it is up
    to 1.3 times as fast. The cost: a single call uses one core, and returns only when its
    result is there. Results are the same to the bit.

    It sets the environment variable `PJRT_NPROC`, the number of XLA's threads, and JAX's
    `jax_cpu_enable_async_dispatch`, for the whole process. It does nothing if `PJRT_NPROC`
    or `NPROC` is set.

    !!! example

        ```python
        import jaxbkgd

        jaxbkgd.one_thread_a_call()
        jaxbkgd.estimate_movie("movie.tif", jaxbkgd.SpatialMean(7.0), "bkgd.tif")
        ```
    """
    if not {"PJRT_NPROC", "NPROC"} & os.environ.keys():
        os.environ["PJRT_NPROC"] = "1"
        jax.config.update("jax_cpu_enable_async_dispatch", False)


class Stopped(Exception):
    """Ends the work of a thread whose result nobody waits for."""


class Gate:
    """Threads change what they share inside of it (`with gate:`), until it is closed.

    Once `close` has returned, no thread is inside, and `Stopped` is raised in a thread that
    would enter.
    """

    def __init__(self) -> None:
        self._inside: set[int] = set()
        self._is_closed = False

    def check(self) -> None:
        """Raises `Stopped` if the gate is closed."""
        if self._is_closed:
            raise Stopped

    def __enter__(self) -> None:
        self._inside.add(threading.get_ident())
        if self._is_closed:
            self._inside.discard(threading.get_ident())
            raise Stopped

    def __exit__(self, *error: object) -> None:
        self._inside.discard(threading.get_ident())

    def close(self) -> None:
        """Lets no thread in, and waits for those inside, also if Ctrl-C is pressed."""
        self._is_closed = True
        interrupt, seconds = None, 0.0
        while True:
            try:
                # A thread that enters at this instant sees that the gate is closed, or is
                # seen here.
                time.sleep(seconds)
                if not self._inside:
                    break
                seconds = 0.001
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


def on_threads(
    run: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int,
    gate: Gate | None = None,
) -> Generator[_Result, None, None]:
    """Yields `run(item)` for each item, in the order in which they are done, at most one
    item late. No thread waits for the consumer.

    After an error, the items that have begun are worked on to their end. After Ctrl-C, the
    gate is closed, and KeyboardInterrupt is raised within half a second: threads that are
    still in a call of XLA, which nothing can interrupt, are left to end by themselves, and
    Python waits for them when it exits.
    """
    gate = gate or Gate()
    items = iter(items)
    taking, is_over = threading.Lock(), False
    # Lists of results, and threads that have ended.
    news: SimpleQueue[list[_Result] | Future[None]] = SimpleQueue()

    def take() -> list[_Item]:
        with taking:
            return [] if is_over else list(it.islice(items, 1))

    def work(item: list[_Item]) -> None:
        results, told = [], time.monotonic()
        try:
            while item:
                results.append(run(*item))
                if time.monotonic() > told + _SECONDS_BETWEEN_NEWS:
                    news.put(results)
                    results, told = [], time.monotonic()
                item = take()
        finally:
            news.put(results)

    pool = ThreadPoolExecutor(workers)
    running: set[Future[None]] = set()
    try:
        while len(running) < workers and (item := take()):
            future = pool.submit(work, item)
            running.add(future)
            future.add_done_callback(news.put)
        while running:
            entry = _next(news)
            if isinstance(entry, Future):
                running.remove(entry)
                entry.result()
            else:
                yield from entry
    except Exception:
        is_over = True
        while wait(running, _WAIT_SECONDS).not_done:
            pass
        raise
    finally:
        is_over = True
        gate.close()
        is_left = bool(wait(running, _GRACE_SECONDS).not_done)
        pool.shutdown(wait=not is_left, cancel_futures=True)


def _next(news: SimpleQueue[_Item]) -> _Item:
    while True:
        with contextlib.suppress(Empty):
            return news.get(timeout=_WAIT_SECONDS)


def run_interruptibly(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Calls the function in another thread, so that Ctrl-C is heard meanwhile: in the main
    thread, Python would raise it only when a call or compilation of XLA has ended."""
    is_64_bit, device = jax.enable_x64.value, jax.default_device.value

    def run(_: None) -> _Result:
        with jax.enable_x64(is_64_bit), jax.default_device(device):
            return function(*arguments)

    (result,) = on_threads(run, [None], 1)
    return result


# Callback with the amount that is done, and a short text.
Report = Callable[[int, str], None]

# The bars that are drawn now.
_drawn: list[Any] = []


@contextlib.contextmanager
def progress_bar(total: int, is_shown: bool = True, done: int = 0) -> Iterator[Report]:
    """Draws a bar in a notebook or on stderr, if that is a terminal, and removes it in the
    end. Yields a function that is told how much of `total` is done, and a text to show.

    `done` is the amount that is done before.
    """
    # Not before it is needed: in a notebook without ipywidgets, this warns.
    from tqdm.auto import tqdm

    bar = tqdm(
        total=total,
        initial=done,
        # None: where there is no terminal.
        disable=None if is_shown else True,
        leave=False,
        dynamic_ncols=True,
        bar_format="{desc}{bar} {n_fmt}/{total_fmt} {remaining}",
    )

    def report(done: int, text: str) -> None:
        bar.set_description_str(f"{text} ", refresh=False)
        bar.update(done - bar.n)

    with bar:
        _drawn.append(bar)
        try:
            yield report
        finally:
            _drawn.remove(bar)


def end_progress() -> None:
    """Removes the bars, from any thread, where the process ends at once."""
    for bar in list(_drawn):
        bar.close()
