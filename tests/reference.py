"""The filter in float64, as dense matrices: what all tests of averages compare with."""

import numpy as np
from scipy.special import erfinv, ndtr


# Half of the central interval that holds 99 % of a normal density, in sigmas.
CUT_SIGMAS = float(np.sqrt(2) * erfinv(0.99))


def reference_kernel(radius_pix: float, truncation: str = "hard") -> np.ndarray:
    """All taps along one axis, centre in the middle; those beyond the cut are zero."""
    sigma = radius_pix / 2
    # n = ceil(6 sigma) taps, and one more if n is even: n // 2 on either side.
    half = int(np.ceil(6 * sigma)) // 2
    distance = np.abs(np.arange(-half, half + 1))
    inner, outer = distance - 0.5, distance + 0.5
    if truncation == "smooth":
        cut = CUT_SIGMAS * sigma
        inner, outer = np.clip(inner, -cut, cut), np.clip(outer, -cut, cut)
    # Of the tail, whose differences cancel least.
    taps = ndtr(-inner / sigma) - ndtr(-outer / sigma)
    if truncation == "hard":
        taps[distance > CUT_SIGMAS * sigma] = 0
    return taps / taps.sum()


def axis_matrix(taps: np.ndarray, size: int, edges: str = "repeated") -> np.ndarray:
    """The filter along an axis of `size` pixels, as a matrix (size, size).

    `taps` are those of a symmetric kernel from the centre outwards. Beyond the edges lie
    the edge pixels ("repeated") or zeros ("empty"); "folded" is the adjoint of "repeated".
    """
    matrix, pixels = np.zeros((size, size)), np.arange(size)
    for distance in range(1 - len(taps), len(taps)):
        read = pixels + distance
        is_read = (read >= 0) & (read < size) | (edges != "empty")
        read = read.clip(0, size - 1)
        np.add.at(matrix, (pixels[is_read], read[is_read]), taps[abs(distance)])
    return matrix.T if edges == "folded" else matrix


def mean_matrix(
    radius: float, size: int, truncation: str = "hard", edges: str = "repeated"
) -> np.ndarray:
    """The Gaussian average along an axis, its radius in px or frames."""
    taps = reference_kernel(float(radius), truncation)
    return axis_matrix(taps[taps.size // 2 :], size, edges)


def apply_matrices(frames: np.ndarray, matrices: dict[int, np.ndarray]) -> np.ndarray:
    """The frames with a matrix applied along each axis that has one.

    What is not finite goes where IEEE arithmetic takes it from the elements that are not
    zero: NaN to NaN, infinities of one sign under positive elements to infinity.
    """
    frames = np.asarray(frames, np.float64)
    result = _product(np.where(np.isfinite(frames), frames, 0), matrices)
    # All infinities, and those whose sign is turned, by the sign of the elements.
    positive = {axis: (matrix > 0).astype(float) for axis, matrix in matrices.items()}
    read = {axis: (matrix != 0).astype(float) for axis, matrix in matrices.items()}
    up, down = (_product(frames == value, positive) > 0 for value in (np.inf, -np.inf))
    reached = _product(np.isinf(frames), read) > 0
    has_one_sign = all(np.all(matrix >= 0) for matrix in matrices.values())
    is_nan = _product(np.isnan(frames), read) > 0
    is_nan |= (up & down) | (reached & (not has_one_sign))
    result[up], result[down] = np.inf, -np.inf
    result[is_nan] = np.nan
    return result


def dense_mean(
    frames: np.ndarray, radii_pix: float | tuple[float, float], truncation: str = "hard"
) -> np.ndarray:
    """The background of frames (..., height, width) for radii (y, x), by dense matrices."""
    return apply_matrices(
        frames,
        {
            axis: mean_matrix(radius, np.shape(frames)[axis], truncation)
            for axis, radius in zip((-2, -1), np.broadcast_to(radii_pix, 2), strict=True)
        },
    )


def dense_mean_over_time(
    frames: np.ndarray,
    radius_frames: float | np.ndarray,
    truncation: str = "smooth",
    edges: str = "repeated",
) -> np.ndarray:
    """The average over the axis of frames (..., frames, height, width)."""
    matrix = mean_matrix(float(radius_frames), np.shape(frames)[-3], truncation, edges)
    return apply_matrices(frames, {-3: matrix})


def _product(values: np.ndarray, matrices: dict[int, np.ndarray]) -> np.ndarray:
    result = np.asarray(values, np.float64)
    for axis, matrix in matrices.items():
        result = np.moveaxis(np.tensordot(matrix, result, (1, axis)), 0, axis)
    return result
