"""Makes the figures of the docs that the examples draw.

    python docs/make_example_figures.py [FOLDER]

It runs the examples, in some two minutes, and writes their pictures to FOLDER, by default
docs/pages/figures. It needs the extra `cli`.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image


DOCS = Path(__file__).parent
EXAMPLES = ("quick_start", "calibrate", "whole_movie", "from_smlmlp")


def main(folder: Path) -> None:
    for name in EXAMPLES:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            script = DOCS.parent / "examples" / f"{name}.py"
            subprocess.run([sys.executable, script], cwd=scratch, check=True)
            # Noise hardly compresses: a pixel is a byte, of 256 colours.
            with Image.open(Path(scratch) / f"{name}.png") as picture:
                picture.convert("RGB").quantize().save(
                    folder / f"{name}.png", optimize=True
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "pages" / "figures")
