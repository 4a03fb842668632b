"""Compiler options for the processor's vectors in full width."""

import functools as ft

import jax
import jax.numpy as jnp


# XLA on CPU takes vectors of 256 bits also where there are 512, since early processors with
# AVX-512 slowed down with them.
WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}


@ft.cache
def compiler_options() -> dict[str, int] | None:
    """For `jax.jit`, where XLA knows them."""
    if jax.default_backend() != "cpu":
        return None
    try:
        with jax.ensure_compile_time_eval():
            jax.jit(lambda: jnp.zeros(()), compiler_options=WIDE_VECTORS)()
    except RuntimeError:
        return None
    return WIDE_VECTORS
