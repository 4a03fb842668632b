"""Programs that use the processor's vectors in full width."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state


with jax.ensure_compile_time_eval():
    _OUTSIDE = get_opaque_trace_state()


# XLA on CPU takes vectors of 256 bits also where there are 512, since early processors with
# AVX-512 slowed down with it.
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


def jit_in_full_width(function: Callable, **options: Any) -> Callable:
    """As `jax.jit`, with these compiler options where it is called outside of all other
    transformations. Inside of a `jit`, JAX takes none but those of the outermost."""
    inside = jax.jit(function, **options)

    @ft.cache
    def outside() -> Callable:
        return jax.jit(function, compiler_options=compiler_options(), **options)

    @ft.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        is_outside = get_opaque_trace_state() == _OUTSIDE
        return (outside() if is_outside else inside)(*arguments, **named)

    return call
