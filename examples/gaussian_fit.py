"""Molecules fitted by maximum likelihood where the background is known, and the bound.

The image of a molecule is a Gaussian that is integrated over pixels. Noise is that of
photons, to which the variance of read noise is added as if it were photons (Huang et al.,
Nat. Methods 10, 653, 2013). The bound is that of Cramer and Rao: no fit without bias
scatters less.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from scenes import pixel_shares, PSF_SIGMA_PIX, widths_pix


BOX_PIX = 7
# From the true parameters, fewer than ten steps change anything.
STEPS = 30

Box = Float[Array, "height width"]
Parameters = Float[Array, " parameters"]


@dataclass(frozen=True)
class Fit:
    """What is fitted in boxes of 7 x 7 pixels: y and x in pixels from the middle of the
    first pixel, and photons; then z in nm, if images are astigmatic; then the background,
    if it is not known but the same in all of the box.

    Frames and backgrounds are in photoelectrons. `read_noise` is its standard deviation.
    """

    is_astigmatic: bool = False
    has_free_bkgd: bool = False
    read_noise: float = 1.5

    def expected(self, parameters: Parameters, bkgd: Box) -> Box:
        """Photons in each pixel."""
        y_pix, x_pix, photons, *others = parameters
        sigmas_pix = PSF_SIGMA_PIX, PSF_SIGMA_PIX
        if self.is_astigmatic:
            sigmas_pix = widths_pix(others[0])
        rows, columns = (
            pixel_shares(centre_pix, sigma_pix, BOX_PIX)
            for centre_pix, sigma_pix in zip((y_pix, x_pix), sigmas_pix, strict=True)
        )
        level = others[-1] if self.has_free_bkgd else bkgd
        return photons * jnp.outer(rows, columns) + level

    def deviance(self, parameters: Parameters, bkgd: Box, box: Box) -> Float[Array, ""]:
        """Twice the negative logarithm of the likelihood, above its least value."""
        expected = self.expected(parameters, bkgd) + self.read_noise**2
        counted = jnp.maximum(box + self.read_noise**2, 0)
        excess = jax.scipy.special.xlogy(counted, counted / expected)
        return 2 * jnp.sum(expected - counted + excess)

    def information(
        self, parameters: Parameters, bkgd: Box
    ) -> Float[Array, "parameters parameters"]:
        """Fisher's."""
        return self._slope(parameters, bkgd, bkgd)[1]

    @partial(jax.jit, static_argnums=0)
    def bounds(
        self,
        parameters: Float[Array, "molecules parameters"],
        bkgds: Float[Array, "molecules height width"],
    ) -> Float[Array, "molecules parameters"]:
        """The standard deviations that no fit is below, at the true parameters."""
        information = jax.vmap(self.information)(parameters, bkgds)
        return jnp.sqrt(jnp.diagonal(jnp.linalg.inv(information), axis1=1, axis2=2))

    @partial(jax.jit, static_argnums=0)
    def fitted(
        self,
        start: Float[Array, "molecules parameters"],
        bkgds: Float[Array, "molecules height width"],
        boxes: Float[Array, "molecules height width"],
    ) -> Float[Array, "molecules parameters"]:
        """The parameters of most likelihood, by Fisher scoring with the damping of
        Levenberg and Marquardt."""
        return jax.vmap(self._fitted)(start, bkgds, boxes)

    def _slope(
        self, parameters: Parameters, bkgd: Box, box: Box
    ) -> tuple[Parameters, Float[Array, "parameters parameters"]]:
        """The gradient of the logarithm of the likelihood, and the information."""
        expected = self.expected(parameters, bkgd)
        slopes = jax.jacfwd(self.expected)(parameters, bkgd)
        variance = expected + self.read_noise**2
        gradient = jnp.einsum("yxp,yx->p", slopes, (box - expected) / variance)
        weighted = slopes / variance[..., None]
        return gradient, jnp.einsum("yxp,yxq->pq", slopes, weighted)

    def _fitted(self, start: Parameters, bkgd: Box, box: Box) -> Parameters:
        def step(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            parameters, damping, deviance = state
            gradient, information = self._slope(parameters, bkgd, box)
            damped = information + damping * jnp.diag(jnp.diagonal(information))
            tried = parameters + jnp.linalg.solve(damped, gradient)
            found = self.deviance(tried, bkgd, box)
            # Not where it is NaN.
            is_better = found <= deviance
            return (
                jnp.where(is_better, tried, parameters),
                jnp.where(is_better, damping / 10, damping * 10),
                jnp.where(is_better, found, deviance),
            )

        first = start, jnp.float32(1e-3), self.deviance(start, bkgd, box)
        return lax.fori_loop(0, STEPS, step, first)[0]
