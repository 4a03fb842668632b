"""Work on all cores, which Ctrl-C ends soon."""

import contextlib
import itertools as it
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

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


def on_threads(
    run: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Iterator[_Result]:
    """What `run` gives for each item, as it comes.

    After an error or Ctrl-C, only what has begun is waited for.
    """
    items = iter(items)
    # Of what may wait, this alone can be added to by a handler of signals.
    ended = SimpleQueue()
    with _ctrl_c_added_to(ended):
        pool = ThreadPoolExecutor(workers)

        def begin(count: int) -> int:
            futures = [pool.submit(run, item) for item in it.islice(items, count)]
            for future in futures:
                future.add_done_callback(ended.put)
            return len(futures)

        try:
            # Twice as many as work on them, so that none waits for this thread.
            running = begin(2 * workers)
            while running:
                yield ended.get().result()
                running += begin(1) - 1
        finally:
            pool.shutdown(cancel_futures=True)
    # A Ctrl-C after the last one.
    if not ended.empty():
        ended.get().result()


@contextlib.contextmanager
def _ctrl_c_added_to(ended: SimpleQueue) -> Iterator[None]:
    """Python raises KeyboardInterrupt between any two steps, also between those that take a
    lock and give it back: a thread would then wait for it for ever. Here it is the result
    of one more future. A second Ctrl-C does what it always does, and so does the first one
    where somebody else has a handler."""
    interrupted = Future()
    interrupted.set_exception(KeyboardInterrupt())
    default = signal.default_int_handler

    def end(*signal_and_frame: Any) -> None:
        signal.signal(signal.SIGINT, default)
        ended.put(interrupted)

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
