"""The inputs behind the golden values, made again wherever they are needed."""

import dataclasses
import itertools

import numpy as np


RADII_PIX = (0.3, 1.0, 2.0, 3.0, 5.0, 7.0, 10.5, 20.0, 40.0)
_SHAPES = ((256, 256), (64, 48), (5, 7), (1, 64), (1, 1))
_DTYPES = ("uint16", "float32", "uint8", "int32", "float64")
_FRAMES = (17, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A stack of frames and the radii (y, x) of its background."""

    shape: tuple[int, int, int]
    dtype: str
    radii_pix: tuple[float, float]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape}-{self.dtype}-{self.radii_pix[0]}-{self.radii_pix[1]}"

    def frames(self) -> np.ndarray:
        """White noise over the dtype's whole range, or over -200 to 800 in floats.

        It comes from a bit generator's raw numbers, whose stream NumPy never changes.
        """
        count = int(np.prod(self.shape))
        raw = np.random.PCG64(sum(self.shape)).random_raw(count).reshape(self.shape)
        dtype = np.dtype(self.dtype)
        if dtype.kind == "f":
            # 24 bits, which float32 holds.
            return (1000 * ((raw >> 40) * 2.0**-24) - 200).astype(dtype)
        bits = np.uint64(8 * dtype.itemsize)
        return (raw >> (64 - bits)).astype(f"u{dtype.itemsize}").view(dtype)


def _every_pair_of_shape_radius_and_dtype() -> list[Case]:
    cases = []
    for s, r in itertools.product(range(len(_SHAPES)), range(len(RADII_PIX))):
        radius_x_pix = RADII_PIX[(r + 2 * s) % len(RADII_PIX)]
        cases.append(
            Case(
                (_FRAMES[(s + r) % len(_FRAMES)], *_SHAPES[s]),
                _DTYPES[(s + r) % len(_DTYPES)],
                (RADII_PIX[r], radius_x_pix),
            )
        )
    return cases


# The 256 x 256 frames have one radius for both axes, all others a pair.
CASES = _every_pair_of_shape_radius_and_dtype()

# Kernels with zero taps at their ends, and without.
NOT_FINITE_RADII_PIX = ((7.0, 2.0), (10.5, 1.0), (40.0, 0.3))


def not_finite_frames() -> np.ndarray:
    """A frame with NaN, one with infinities of one sign, and one with both signs."""
    frames = Case((3, 40, 32), "float32", (1.0, 1.0)).frames()
    frames[0, (17, 0, 39), (20, 3, 31)] = np.nan
    frames[1, (20, 39), (16, 0)] = np.inf
    frames[2, (10, 10, 30), (5, 12, 31)] = np.inf, -np.inf, np.nan
    return frames


def subset(frames: np.ndarray) -> np.ndarray:
    """The pixels whose golden values are stored: the first, middle and last frame, in
    which six rows and columns at each border, and a sixteenth of those between."""
    count, height, width = frames.shape
    rows, columns = (
        sorted({*range(6), *range(0, size, -(-size // 16)), *range(size - 6, size)})
        if size > 12
        else range(size)
        for size in (height, width)
    )
    return frames[np.ix_(sorted({0, count // 2, count - 1}), rows, columns)]
