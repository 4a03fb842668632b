"""The entry point: the command runs in a thread, and the main thread answers Ctrl-C.

Python hears a signal in its main thread only, between two steps of Python, and therefore
not while that thread compiles, computes or waits in C. The work, imports included, runs in
a thread of its own. Ctrl-C ends the process by `os._exit`: an orderly end would wait for
threads that compute, and tear down what they use. Files are whole or absent all the same,
since they get their names by `report.write_whole` or by a sink, which may be killed.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn


INTERRUPTED = 130

# Held while a file is written under its own name, and from Ctrl-C to the end.
writing = threading.RLock()

# Seconds between two looks at the queue: on Windows no signal interrupts a wait.
_POLL_S = 0.1
# The answer takes milliseconds. It is given up where a disk or terminal blocks for so long.
_LONGEST_ANSWER_S = 2.0

_acts: list[Callable[[], str | None]] = []


@contextlib.contextmanager
def at_ctrl_c(act: Callable[[], str | None]) -> Iterator[None]:
    """Call `act` if Ctrl-C is pressed meanwhile, in another thread. The text that it
    returns is printed: what is kept, and how to go on."""
    _acts.append(act)
    try:
        yield
    finally:
        _acts.remove(act)


def main() -> NoReturn:
    """Run the command `jaxbkgd` with the arguments of this process, and exit."""
    sys.exit(run(_command))


def run(command: Callable[[], object]) -> int:
    """Run a command in a thread; return its exit code, or end the process on Ctrl-C."""
    # An exit code, or None for Ctrl-C. A handler may put to such a queue at any time.
    news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    # A shell ignores Ctrl-C for a command in its background.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *signal_and_frame: news.put(None))
    threading.Thread(target=lambda: news.put(_exit_code(command)), daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            code = news.get(timeout=_POLL_S)
            if code is not None:
                return code
            answer = threading.Thread(target=_answer_ctrl_c, daemon=True)
            answer.start()
            answer.join(_LONGEST_ANSWER_S)
            os._exit(INTERRUPTED)


def _command() -> None:
    # It imports JAX, which takes seconds.
    from .app import run_app

    run_app()


def _exit_code(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _answer_ctrl_c() -> None:
    with writing:
        try:
            texts = [text for act in reversed(_acts) if (text := act())]
        except Exception as error:
            texts = [str(error)]
        kept = "; ".join(texts or ["nothing has been written"])
        print(f"jaxbkgd: interrupted; {kept}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
