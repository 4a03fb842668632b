"""Programs that use the processor's vectors in full width."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state


with jax.ensure_compile_time_eval():
    _OUTSIDE_OF_ALL_PROGRAMS = get_opaque_trace_state()


def compiler_options() -> dict[str, int] | None:
    """For `jax.jit`: XLA on CPU takes vectors of 256 bits also where there are 512, since
    early processors with AVX-512 slowed down with it."""
    is_cpu = jax.default_backend() == "cpu"
    return {"xla_cpu_prefer_vector_width": 512} if is_cpu else None


def jit_in_full_width(function: Callable, **options: Any) -> Callable:
    """As `jax.jit`, with these compiler options where it is called outside of any other
    program. Inside of one, JAX takes none but that one's."""
    inside = jax.jit(function, **options)

    @ft.cache
    def outside() -> Callable:
        return jax.jit(function, compiler_options=compiler_options(), **options)

    @ft.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        is_outside = get_opaque_trace_state() == _OUTSIDE_OF_ALL_PROGRAMS
        return (outside() if is_outside else inside)(*arguments, **named)

    return call
