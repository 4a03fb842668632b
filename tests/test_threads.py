"""Work on threads: results, errors, Ctrl-C, and the mode of one thread a call."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from jaxbkgd._workers import core_count, on_threads, one_thread_a_call, run_interruptibly


ITEMS = range(3)


def test_every_item_is_worked_on_once():
    assert sorted(on_threads(lambda item: 2 * item, ITEMS, 2)) == [2 * i for i in ITEMS]
    assert list(on_threads(str, [], 2)) == []


def test_an_error_ends_it_once_what_has_begun_has_ended():
    begun, ended, has_failed = set(), set(), threading.Event()

    def fail(item):
        begun.add(item)
        if item == 0:
            has_failed.set()
            raise ValueError("item 0")
        has_failed.wait()
        time.sleep(0.05)
        ended.add(item)

    with pytest.raises(ValueError, match="item 0"):
        list(on_threads(fail, range(100), 2))
    assert begun - ended == {0}
    assert len(begun) < 100


def test_results_come_before_all_is_done():
    has_come = threading.Event()

    def run(item):
        # The last one waits until the first is heard of.
        assert item < 2 or has_come.wait(60)
        time.sleep(0.04)
        return item

    results = on_threads(run, ITEMS, 1)
    assert next(results) == 0
    has_come.set()
    assert list(results) == [1, 2]


def test_it_ends_when_the_consumer_does():
    begun = []

    def run(item):
        begun.append(item)
        # All of them would take minutes.
        time.sleep(1e-3)

    results = on_threads(run, range(10**6), 2)
    next(results)
    results.close()
    count = len(begun)
    time.sleep(0.01)
    assert len(begun) == count


def test_ctrl_c_waits_for_no_thread():
    may_end, threads = threading.Event(), []

    def run(_):
        threads.append(threading.current_thread())
        signal.raise_signal(signal.SIGINT)
        may_end.wait()

    with pytest.raises(KeyboardInterrupt):
        list(on_threads(run, [None], 1))
    may_end.set()
    threads[0].join()


def test_a_call_in_another_thread_has_the_callers_settings():
    device = jax.devices()[-1]
    with jax.enable_x64(True), jax.default_device(device):
        one = run_interruptibly(jax.numpy.asarray, 1.0)
    assert (one.dtype, one.devices()) == ("float64", {device})
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 / 0)


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    assert 1 <= core_count() <= (os.cpu_count() or 1)
    if sys.version_info < (3, 13):
        # As on macOS and Windows.
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        assert core_count() == os.cpu_count()


# The threads of XLA's pools: one, which does nothing.
_THREADS = """
import os, jax, numpy as np
import jaxbkgd
jaxbkgd.one_thread_a_call()
jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros((16, 256, 256), np.float32)))
names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
is_asynchronous = jax.config.values["jax_cpu_enable_async_dispatch"]
print(sum("XLAEigen" in name for name in names), is_asynchronous)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux")
def test_one_thread_a_call_leaves_xla_one_thread():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    for name in ("PJRT_NPROC", "NPROC"):
        environment.pop(name, None)
    command = [sys.executable, "-c", _THREADS]
    ran = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    )
    assert ran.stdout.split() == ["1", "False"]


def test_one_thread_a_call_leaves_what_the_user_has_set(monkeypatch):
    # A command that ran in this process has set them.
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setenv("NPROC", "3")
    is_asynchronous = jax.config.values["jax_cpu_enable_async_dispatch"]
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    try:
        one_thread_a_call()
        assert "PJRT_NPROC" not in os.environ
        assert jax.config.values["jax_cpu_enable_async_dispatch"]
    finally:
        jax.config.update("jax_cpu_enable_async_dispatch", is_asynchronous)
