"""Gaussian averaging kernels: taps from a radius, and the noise that they leave."""

import dataclasses
import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


# Frames of any real dtype, and images in the dtype of the radii.
Frames = Shaped[Array, "*batch height width"]
Image = Float[Array, "*batch height width"]
Truncation = Literal["hard", "smooth"]
NoiseKind = Literal["exact", "separable"]

# Half of the central interval that holds 99 % of a normal density, in sigmas:
# sqrt(2) erfinv(0.99), where arrlp's `kernel` cuts its taps.
CUT_SIGMAS = 2.5758293035489004

# Gauss-Legendre quadrature integrates the density over each pixel, since a difference of
# two erf cancels in float32. Over at most 2.6 sigma, 12 nodes err by less than 1e-15.
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(12)


def half_width(radius_pix: float, truncation: Truncation) -> int:
    """The distance in pixels from the centre to the last tap that is not zero."""
    cut = CUT_SIGMAS * radius_pix / 2
    return math.floor(cut) if truncation == "hard" else max(math.ceil(cut - 0.5), 0)


@dataclasses.dataclass(frozen=True)
class GaussianKernel:
    """The static part of a Gaussian kernel along one axis. Its radius is traced.

    A tap is the integral of the normal density with `sigma = radius / 2` over its pixel,
    divided by the sum of all. "hard" truncation zeroes the taps whose centre lies further
    out than 2.576 sigma, as arrlp's `kernel` does; "smooth" clips each pixel to that
    interval, so that the taps are continuous in the radius.
    """

    half_width: int  # the taps on either side of the centre
    truncation: Truncation
    order: int = 0  # how often the taps are differentiated in the radius
    # Whether `half_width` is that of a larger radius: a NaN under a zero tap then stays.
    is_bound: bool = False
    zero_taps: int = 0  # further zeros, under which a NaN spreads

    # Traced once for each kernel, of which several images may be made.
    @ft.partial(jax.jit, static_argnums=0)
    def taps(self, radius_pix: Float[Array, ""]) -> Float[Array, " taps"]:
        """The taps from the centre outwards. The kernel is symmetric."""
        taps: Callable = ft.partial(_taps, self)
        for _ in range(self.order):
            taps = ft.partial(_derivative, taps)
        return jnp.pad(taps(radius_pix), (0, self.zero_taps))

    def derivative(self) -> "GaussianKernel":
        """The kernel whose taps are the derivative of these in the radius."""
        return dataclasses.replace(self, order=self.order + 1)


# The kernels of one image, (y, x) in space and (t,) in time, and their radii in this order.
Kernels = tuple[GaussianKernel, ...]
Radius = Float[Array, ""]
Radii = Sequence[Radius]


def differentiate(kernels: Kernels, axis: int) -> Kernels:
    """The kernels whose image is the derivative in the radius of one axis."""
    return (*kernels[:axis], kernels[axis].derivative(), *kernels[axis + 1 :])


def _taps(kernel: GaussianKernel, radius_pix: Float[Array, ""]) -> Float[Array, " taps"]:
    sigma = radius_pix / 2
    distance = jnp.arange(kernel.half_width + 1, dtype=radius_pix.dtype)
    # "hard" clips too, at 4 sigma: further out the density underflows, and where the
    # centre is the only tap its integral must not be 0.
    clip = sigma * (CUT_SIGMAS if kernel.truncation == "smooth" else 4.0)
    inner = jnp.minimum(jnp.maximum(distance - 0.5, 0), clip)
    outer = jnp.minimum(distance + 0.5, clip)
    middle, half = (outer + inner)[:, None] / 2, (outer - inner)[:, None] / 2
    z = (middle + half * _NODES.astype(distance.dtype)[None]) / sigma
    density = jnp.exp(-(z**2) / 2) * _NODE_WEIGHTS.astype(distance.dtype)[None]
    integral = jnp.sum(density, axis=1) * half[:, 0]
    # The centre's pixel was integrated over its outer half only.
    taps = integral.at[0].multiply(2)
    if kernel.truncation == "hard" and kernel.is_bound:
        taps = jnp.where(distance <= CUT_SIGMAS * sigma, taps, 0)
    return taps / (taps[0] + 2 * jnp.sum(taps[1:]))


def _derivative(taps: Callable, radius: Float[Array, ""]) -> Float[Array, " taps"]:
    return jax.jvp(taps, (radius,), (jnp.ones_like(radius),))[1]


def noise_factor(
    taps_y: Float[Array, " y"], taps_x: Float[Array, " x"], kind: NoiseKind
) -> Float[Array, ""]:
    """The standard deviation of `frame - background` for white noise of unit deviation,
    from the taps from the centre outwards.

    "exact" is the norm of the residual's kernel, `||delta - g_y (x) g_x||`; "separable" is
    the product of the axes' own norms, `||delta - g_y|| * ||delta - g_x||`, which
    `smlmlp.bkgd_spatial_mean` uses.
    """
    # In terms of the mass and the energy off the centre, since 1 - 2 g(0) + |g|^2 cancels.
    mass_y, mass_x = [2 * jnp.sum(taps[1:]) for taps in (taps_y, taps_x)]
    energy_y, energy_x = [2 * jnp.sum(taps[1:] ** 2) for taps in (taps_y, taps_x)]
    if kind == "separable":
        return _sqrt(mass_y**2 + energy_y) * _sqrt(mass_x**2 + energy_x)
    mass = mass_y + mass_x - mass_y * mass_x
    energy = energy_y * energy_x + energy_y * taps_x[0] ** 2 + energy_x * taps_y[0] ** 2
    return _sqrt(mass**2 + energy)


def _sqrt(x: Float[Array, ""]) -> Float[Array, ""]:
    # Kernels of one tap leave no noise, and the derivative there is 0, not infinite.
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))
