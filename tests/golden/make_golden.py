"""Writes golden.npz, what smlmlp 0.1.20 and arrlp 0.1.27 answer to `cases`.

Run `python tests/golden/make_golden.py` where these are installed (Python 3.13).
"""

import importlib
import importlib.metadata
from pathlib import Path

import numpy as np
from cases import CASES, not_finite_frames, NOT_FINITE_RADII_PIX, RADII_PIX, subset


def main() -> None:
    # Here, since pytest imports this file where they are not installed.
    bkgd_spatial_mean = importlib.import_module("smlmlp").bkgd_spatial_mean

    packages = ("smlmlp", "arrlp", "numpy", "scipy")
    golden = {
        "versions": np.array(
            [f"{name} {importlib.metadata.version(name)}" for name in packages]
        )
    }
    pixel = np.ones((1, 1, 1), np.float32)
    for radius in RADII_PIX:
        _, factors, info = bkgd_spatial_mean([pixel], radius)
        golden[f"kernel {radius}"] = info["spatial_mean_kernels_y"][0]
        golden[f"factor {radius}"] = factors[0]
    for case in CASES:
        bkgds, factors, _ = bkgd_spatial_mean([case.frames()], [case.radii_pix])
        golden[f"bkgd {case}"] = subset(bkgds[0])
        golden[f"factor {case}"] = factors[0]
    for radii in NOT_FINITE_RADII_PIX:
        bkgds, _, _ = bkgd_spatial_mean([not_finite_frames()], [radii])
        golden[f"not finite {radii[0]} {radii[1]}"] = bkgds[0]
    np.savez_compressed(
        Path(__file__).with_name("golden.npz"), allow_pickle=False, **golden
    )


if __name__ == "__main__":
    main()
