"""Compiler options for full vectors, given where XLA knows them."""

import jax
import pytest

from jaxbkgd._filter import vectors as _vectors


# XLA refuses it.
NO_OPTION = {"no_such_option": 1}


@pytest.fixture
def asked_anew():
    _vectors.compiler_options.cache_clear()
    yield
    _vectors.compiler_options.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_there_are_options_for_cpu_alone(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _vectors.compiler_options() is None


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("options", [_vectors.WIDE_VECTORS, NO_OPTION])
def test_an_option_that_xla_does_not_know_is_not_given(options, monkeypatch):
    monkeypatch.setattr(_vectors, "WIDE_VECTORS", options)
    is_known = options != NO_OPTION
    assert _vectors.compiler_options() == (options if is_known else None)
