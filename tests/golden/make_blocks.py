"""Writes blocks.npz, what smlmlp 0.1.20 and arrlp 0.1.27 answer to `block_cases`.

Run `python tests/golden/make_blocks.py` where these are installed (Python 3.13).
"""

import importlib
import importlib.metadata
from pathlib import Path

import numpy as np
from block_cases import BLOCKS, CHANNELS
from cases import Case


def main() -> None:
    # Here, since pytest imports this file where they are not installed.
    smlmlp, stacklp, arrlp = map(importlib.import_module, ("smlmlp", "stacklp", "arrlp"))
    # smlmlp 0.1.20 takes from stacklp what stacklp 0.1.9 does not have.
    vars(stacklp).setdefault("get_xp", arrlp.get_xp)

    packages = ("smlmlp", "arrlp", "stacklp", "numpy", "scipy")
    golden = {
        "versions": np.array(
            [f"{name} {importlib.metadata.version(name)}" for name in packages]
        )
    }
    channels = [Case(shape, dtype, (1.0, 1.0)).frames() for shape, dtype in CHANNELS]
    for name, (block, options) in BLOCKS.items():
        bkgds, factors, _ = getattr(smlmlp, block)(channels, **options)
        golden[f"{name}: factors"] = np.array(factors)
        for index, bkgd in enumerate(bkgds):
            golden[f"{name}: bkgd {index}"] = bkgd
    np.savez_compressed(
        Path(__file__).with_name("blocks.npz"), allow_pickle=False, **golden
    )


if __name__ == "__main__":
    main()
