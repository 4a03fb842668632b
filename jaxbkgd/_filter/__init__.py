"""The separable filter: JAX only, and nothing of microscopy."""

# The primitives are complete only with their rules.
from . import rules as rules
