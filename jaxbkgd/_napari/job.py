"""Long work in another thread, which a window watches and may cancel."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .._workers import Watch, watched


class Job:
    """Calls a function in a thread. A window asks now and then whether it `is_done`."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.watch = Watch()
        self._future: Future[Any] = Future()
        self._function = function
        # Not one of a pool, for whose threads Python would wait as it exits.
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            with watched(self.watch):
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
        self.watch.is_cancelled = True
