"""Threads and progress of long work, which Ctrl-C ends within half a second."""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# A consumer that is woken for each result would cost as much as a short item.
_NEWS_SECONDS = 0.02

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
    splits a call over all cores, which costs time where [`jaxbkgd.estimate_movie`][] keeps
    all cores busy already: without that, it is up to 1.3 times as fast. A single call then
    uses one core, and returns only when its result is there. Results are the same to the
    bit.

    It sets the environment variable `PJRT_NPROC`, the number of XLA's threads, and JAX's
    `jax_cpu_enable_async_dispatch`, for the whole process, and does nothing if `PJRT_NPROC`
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


def on_threads(
    run: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Generator[_Result, None, None]:
    """Yields `run(item)` for each item, in the order in which they are done. Threads have
    the caller's 64-bit mode and default device, and do not wait for the consumer.

    After an error, items that have begun are worked on to their end. After Ctrl-C,
    KeyboardInterrupt is raised within half a second: threads in a call of XLA, which
    nothing can interrupt, end by themselves, and Python waits for them when it exits.
    """
    todo, done = deque(items), deque[_Result]()
    is_64_bit, device = jax.enable_x64.value, jax.default_device.value

    def work() -> None:
        with jax.enable_x64(is_64_bit), jax.default_device(device):
            while todo:
                try:
                    item = todo.popleft()
                except IndexError:
                    return
                done.append(run(item))

    pool = ThreadPoolExecutor(max(1, workers))
    running = {pool.submit(work) for _ in range(min(workers, len(todo)))}
    must_end = False
    try:
        while running:
            ended, running = wait(running, _NEWS_SECONDS, FIRST_EXCEPTION)
            while done:
                yield done.popleft()
            for future in ended:
                future.result()
    except Exception:
        must_end = True
        raise
    finally:
        todo.clear()
        # In short waits: on Windows, a long one does not hear Ctrl-C.
        while wait(running, _GRACE_SECONDS).not_done and must_end:
            pass
        pool.shutdown(wait=False)


def run_interruptibly(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Calls the function in another thread: in the main thread, Python would raise Ctrl-C
    only when a call or compilation of XLA has ended."""
    (result,) = on_threads(lambda _: function(*arguments), [None], 1)
    return result


Report = Callable[[int, str], None]


@contextlib.contextmanager
def progress_bar(total: int, is_shown: bool = True, done: int = 0) -> Iterator[Report]:
    """Draws a bar in a notebook or at a terminal, of which `done` is done before, and
    removes it in the end. Yields a function that reports what is done by now, and a text.
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
        yield report
