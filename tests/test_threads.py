"""Work on threads, and Ctrl-C at every step of it."""

import itertools as it
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jaxbkgd._workers import _SECONDS_BETWEEN_NEWS, on_threads


ITEMS = range(3)
# Python's modules of what is taken and given back, and the one that is tested.
WITH_LOCKS = {"_threads", "threading"}


def test_every_item_is_worked_on_once():
    assert sorted(on_threads(lambda item: 2 * item, ITEMS, 2)) == [2 * i for i in ITEMS]
    assert list(on_threads(str, [], 2)) == []


def test_an_error_ends_it_once_what_has_begun_has_ended():
    begun, workers = [], set()

    def fail(item):
        begun.append(item)
        workers.add(threading.current_thread())
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(on_threads(fail, ITEMS, 1))
    assert begun == list(range(len(begun)))
    assert [worker.is_alive() for worker in workers] == [False]


def test_an_error_of_the_items_ends_it_too():
    def items():
        yield from ITEMS
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(on_threads(str, items(), 2))


def test_results_come_before_all_is_done():
    has_come = threading.Event()

    def run(item):
        # The last one waits until the first is heard of.
        assert item < 2 or has_come.wait(60)
        time.sleep(2 * _SECONDS_BETWEEN_NEWS)
        return item

    results = on_threads(run, ITEMS, 1)
    assert next(results) == 0
    has_come.set()
    assert list(results) == [1, 2]


def test_there_are_no_more_threads_than_items():
    before = threading.active_count()

    def run(_):
        return threading.active_count() - before

    assert max(on_threads(run, ITEMS, 64)) <= len(ITEMS)


def test_who_does_not_listen_any_longer_ends_it():
    begun = []
    results = on_threads(begun.append, it.count(), 2)
    next(results)
    results.close()
    count = len(begun)
    time.sleep(0.01)
    assert len(begun) == count


# The share of a call's work that is done in the thread that makes it.
SHARE = """
import time
import jax, numpy as np
import jaxbkgd
from jaxbkgd._workers import one_thread_a_call
one_thread_a_call()
frames = jax.device_put(np.zeros((16, 256, 256), np.float32))
jaxbkgd.spatial_mean(frames, 30.0).block_until_ready()
thread, process = time.thread_time(), time.process_time()
for _ in range(3):
    jaxbkgd.spatial_mean(frames, 30.0).block_until_ready()
print((time.thread_time() - thread) / (time.process_time() - process))
"""


@pytest.mark.parametrize("set_by_user", [None, "PJRT_NPROC", "NPROC"])
def test_a_call_is_worked_on_in_the_thread_that_makes_it(set_by_user: str | None):
    # With two devices, as the tests have, JAX has a thread for each.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    for name in ("PJRT_NPROC", "NPROC"):
        environment.pop(name, None)
    if set_by_user is not None:
        environment[set_by_user] = "2"
    command = [sys.executable, "-c", SHARE]
    ran = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    # All of it, but for what the clocks themselves take; otherwise XLA's threads have most.
    assert (float(ran.stdout) > 0.9) is (set_by_user is None)


def _interrupted_at(step: int, workers: set[Any]) -> tuple[list[int], bool]:
    """What comes of the items, where Ctrl-C is pressed before one of the steps of Python
    that are taken for them in this thread while it has a handler; and whether there are so
    many steps. Threads that worked on them are added to the workers."""
    steps, results = 0, []

    def run(item: int) -> int:
        workers.add(threading.current_thread())
        return item

    def trace(frame: Any, *event_and_argument: Any) -> Any:
        nonlocal steps
        if Path(frame.f_code.co_filename).stem not in WITH_LOCKS:
            return None
        steps += signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        if steps == step:
            steps += 1
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for item in on_threads(run, ITEMS, 1):
            results.append(item)
    finally:
        sys.settrace(before)
    return sorted(results), steps > step


def test_ctrl_c_at_any_step_leaves_no_thread_waiting():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    step, is_there = 0, True
    while is_there:
        step += 1
        workers = set()
        try:
            results, is_there = _interrupted_at(step, workers)
            assert results == list(ITEMS)
            assert not is_there
        except KeyboardInterrupt:
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert not any(worker.is_alive() for worker in workers)
    assert step > 100


def test_a_handler_of_somebody_else_is_left_alone():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append("it"))
    try:
        assert _interrupted_at(100, set()) == (list(ITEMS), True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == ["it"]
