"""Compiler options for vectors of 512 bits, where they pay."""

import contextlib
import functools as ft
import re
from pathlib import Path

import jax
import jax.numpy as jnp


WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}


@ft.cache
def compiler_options() -> dict[str, int] | None:
    """For `jax.jit`, or `None` where XLA does not know them or they may not pay. XLA on CPU
    prefers 256 bits, since the first processors with AVX-512 lowered their clock for 512;
    those with VBMI2 (Ice Lake, Zen 4 and later) hardly do, which Linux alone tells."""
    if jax.default_backend() != "cpu" or "avx512_vbmi2" not in _processor_flags():
        return None
    try:
        with jax.ensure_compile_time_eval():
            jax.jit(lambda: jnp.zeros(()), compiler_options=WIDE_VECTORS)()
    except RuntimeError:
        return None
    return WIDE_VECTORS


def _processor_flags() -> set[str]:
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        return set(flags[1].split()) if flags else set()
    return set()
