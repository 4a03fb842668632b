"""Compiled programs, which the command keeps from one run to the next."""

import contextlib
import os
import platform
import sys
from pathlib import Path

import jax


# Shorter compilations cost less than the files that would hold them.
_LEAST_SECONDS = 0.1
_MOST_BYTES = 2**29


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, unless the environment names one,
    or the folder cannot be made or takes no files."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    # Without a home, there is a RuntimeError.
    with contextlib.suppress(OSError, RuntimeError):
        # A program is for one processor, and machines may share a home.
        folder = _cache_folder() / "jaxbkgd" / (platform.node() or "machine")
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def _cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
