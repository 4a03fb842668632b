"""Separable correlation with symmetric kernels, as one JAX primitive."""
