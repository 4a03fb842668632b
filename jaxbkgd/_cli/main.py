"""The entry point, which needs no package of the extra `cli`."""

import contextlib
import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NoReturn


INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command `jaxbkgd` with the arguments of this process, and exit."""
    try:
        # The import of JAX takes seconds, and would lose Ctrl-C in the main thread.
        loading = ThreadPoolExecutor(1).submit(
            importlib.import_module, f"{__package__}.app"
        )
        while not loading.done():
            wait([loading], timeout=0.1)
        loading.result().app(prog_name="jaxbkgd")
    except ModuleNotFoundError as error:
        sys.exit(_report(missing_text(error), 2))
    except KeyboardInterrupt:
        _report("interrupted; nothing has been written", INTERRUPTED)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # An orderly end would wait for threads that compute, and tear down what they use.
    os._exit(INTERRUPTED)


def missing_text(error: ModuleNotFoundError) -> str:
    return (
        f"the command line needs the Python package {error.name}; install it with: "
        "pip install 'jaxbkgd[cli]'"
    )


def _report(text: str, code: int) -> int:
    print(f"jaxbkgd: {text}", file=sys.stderr, flush=True)
    return code
