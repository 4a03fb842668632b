"""Threads, memory and progress of long work, which Ctrl-C ends within half a second."""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import jax
import psutil


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Report = Callable[[int, str], None]

# A consumer that is woken for each result would cost as much as a short item.
_NEWS_SECONDS = 0.02
# After Ctrl-C, the time that threads have to end what they have begun.
_GRACE_SECONDS = 0.2
# Between lines where there is no terminal to draw a bar at.
_LINE_SECONDS = 5.0
# What each open bar says, the newest last: a list of one text, which the bar replaces.
_lines = [["at work"]]


class Job:
    """Calls a function in a thread of its own. A window shows what the work has reported,
    `done` of `total` and a `text`, asks now and then whether it `is_done`, and may cancel
    it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.done = self.total = 0
        self.text, self.is_cancelled = "", False
        self._future: Future[Any] = Future()
        self._function = function
        # Not one of a pool, for whose threads Python would wait as it exits.
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        _job.set(self)
        try:
            self._future.set_result(self._function())
        except BaseException as error:
            self._future.set_exception(error)

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def result(self) -> Any:
        """What the function has returned, or raised: of cancelled work,
        `KeyboardInterrupt`."""
        return self._future.result()

    def cancel(self) -> None:
        """Ends work at its next report, as Ctrl-C would."""
        self.is_cancelled = True

    def check(self) -> None:
        if self.is_cancelled:
            raise KeyboardInterrupt


# The job that this thread works on.
_job: ContextVar[Job | None] = ContextVar("job", default=None)


def core_count() -> int:
    """The number of cores that this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def one_thread_a_call() -> None:
    """Makes JAX run each call on CPU in the thread that makes the call.

    Call it once, before JAX makes its first array, in a process that estimates movies, as
    `jaxbkgd estimate` does. [`jaxbkgd.estimate_movie`][], which keeps all cores busy, is
    then up to 1.3 times as fast; a single call uses one core. Results are the same to the
    bit. It sets the environment variable `PJRT_NPROC`, the number of XLA's threads, and
    JAX's `jax_cpu_enable_async_dispatch`, and does nothing if `PJRT_NPROC` or `NPROC` is
    set.
    """
    if not {"PJRT_NPROC", "NPROC"} & os.environ.keys():
        os.environ["PJRT_NPROC"] = "1"
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def on_threads(
    run: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Generator[_Result, None, None]:
    """Yields `run(item)` for each item, in the order in which they are done. Threads have
    the caller's 64-bit mode and default device, and do not wait for the consumer. After an
    error, items that have begun are worked on to their end. Ctrl-C does not wait for
    threads in a call of XLA, which nothing can interrupt; Python does when it exits."""
    return each_on_threads(lambda item: [run(item)], items, workers)


def each_on_threads(
    run: Callable[[_Item], Iterable[_Result]], items: Iterable[_Item], workers: int
) -> Generator[_Result, None, None]:
    """As `on_threads`, where `run(item)` yields several results. After an error or Ctrl-C,
    an item ends at its next result."""
    is_ended = threading.Event()
    todo, done, job = deque(items), deque[_Result](), _job.get()
    is_64_bit, device = jax.enable_x64.value, jax.default_device.value

    def work() -> None:
        # Strict modes are for the user's own calls.
        with (
            jax.enable_x64(is_64_bit),
            jax.default_device(device),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            while todo:
                try:
                    item = todo.popleft()
                except IndexError:
                    return
                for result in run(item):
                    done.append(result)
                    if is_ended.is_set():
                        return

    pool = ThreadPoolExecutor(max(1, workers))
    running = {pool.submit(work) for _ in range(min(workers, len(todo)))}
    try:
        while running:
            ended, running = wait(running, _NEWS_SECONDS, FIRST_EXCEPTION)
            if job is not None:
                job.check()
            while done:
                yield done.popleft()
            for future in ended:
                future.result()
    finally:
        is_ended.set()
        todo.clear()
        must_end = isinstance(sys.exception(), Exception)
        # In short waits: on Windows, a long one does not hear Ctrl-C.
        while wait(running, _GRACE_SECONDS).not_done and must_end:
            pass
        pool.shutdown(wait=False)


def run_interruptibly(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Calls the function in another thread: in the main thread, Ctrl-C would be heard only
    when a call or compilation of XLA has ended."""
    (result,) = on_threads(lambda _: function(*arguments), [None], 1)
    return result


@contextlib.contextmanager
def progress_lines() -> Iterator[None]:
    """While this is open, a line every few seconds says on stderr how far the work is,
    where there is no terminal to draw a bar at."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(_LINE_SECONDS):
            print(f"jaxbkgd: {_lines[-1][0]}", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    if not sys.stderr.isatty():
        teller.start()
    try:
        yield
    finally:
        ended.set()
        # No line comes after this.
        if teller.is_alive():
            teller.join()


@contextlib.contextmanager
def progress_bar(
    total: int | None, is_shown: bool = True, done: int = 0, unit: str = "steps"
) -> Iterator[Report]:
    """Draws a bar in a notebook or at a terminal, of which `done` is done before. Yields a
    function that reports what is done by now, and a text. Where the total is not known,
    there is no bar."""
    # Not before it is needed: in a notebook without ipywidgets, this warns.
    from tqdm.auto import tqdm

    style = "{desc}{bar} {n_fmt}/{total_fmt} {remaining}" if total else "{desc}{n_fmt}"
    # `disable=None` draws at a terminal alone.
    disable = None if is_shown else True
    of_all = f" of {total}" if total else ""
    line, begun, first = [f"{done}{of_all} {unit}"], time.monotonic(), done
    job = _job.get()
    with (
        contextlib.ExitStack() as end,
        tqdm(
            total=total, initial=done, disable=disable, leave=False, bar_format=style
        ) as bar,
    ):
        end.callback(_lines.remove, line)
        _lines.append(line)

        def report(done: int, text: str) -> None:
            bar.set_description_str(f"{text} ", refresh=False)
            bar.update(done - bar.n)
            line[0] = f"{done}{of_all} {unit}, {text}"
            if total:
                left = (time.monotonic() - begun) * (total - done) / max(done - first, 1)
                line[0] += f", {tqdm.format_interval(left)} left"
            if job is not None:
                job.done, job.total, job.text = done, total or 0, line[0]
                job.check()

        yield report


def free_bytes(root: Path = Path("/")) -> int:
    """The memory that this process may still take, of the machine and within the limits of
    control groups, as in a container or a job of SLURM."""
    free = psutil.virtual_memory().available
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, kinds, path = line.split(":", 2)
        base, names = root / "sys/fs/cgroup", ("max", "current")
        if "memory" in kinds.split(","):
            # Version 1.
            base, names = base / "memory", ("limit_in_bytes", "usage_in_bytes")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            # Without a limit, there is no such file, or no number in it.
            with contextlib.suppress(OSError, ValueError):
                limit, usage = (int((folder / f"memory.{n}").read_text()) for n in names)
                stats = (folder / "memory.stat").read_text().split()
                # Cached files, which the system drops before it refuses memory.
                cached = [stats[stats.index(f"{n}active_file") + 1] for n in ("", "in")]
                free = min(free, max(0, limit - usage + sum(map(int, cached))))
    return free
