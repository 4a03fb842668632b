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
        # The import of JAX takes seconds, and in the main thread it loses Ctrl-C.
        loading = ThreadPoolExecutor(1).submit(
            importlib.import_module, f"{__package__}.app"
        )
        while not loading.done():
            wait([loading], timeout=0.1)
        loading.result().app(prog_name="jaxbkgd")
    except ModuleNotFoundError as error:
        print(f"jaxbkgd: {missing_text(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("jaxbkgd: interrupted; nothing has been written", file=sys.stderr)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # An orderly end would wait for threads that compute, and tear down what they use.
    os._exit(INTERRUPTED)


def missing_text(error: ModuleNotFoundError) -> str:
    package = f"the command line needs the Python package {error.name}"
    return f"{package}; install it with: pip install 'jaxbkgd[cli]'"
