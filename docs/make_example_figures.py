"""Makes the figures of the docs that the examples draw.

    python docs/make_example_figures.py [FOLDER]

It runs the examples, in some three minutes, and writes their pictures to FOLDER, by default
docs/pages/figures; and that of `jaxbkgd estimate` on a movie in the light of two pulses. It
needs the extra `cli`.
"""

import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tifffile
from PIL import Image


DOCS = Path(__file__).parent
EXAMPLES = ("quick_start", "calibrate", "whole_movie", "from_smlmlp")


def draw_estimate(folder: Path) -> None:
    """The picture that the command makes of a simulated movie."""
    scenes = runpy.run_path(str(DOCS.parent / "examples" / "scenes.py"))
    (scene,) = (scene for scene in scenes["MOVING_SCENES"] if scene.name == "pulse")
    (movie,) = scenes["simulated"](scene, size_pix=128, frame_count=300)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "movie.tif"
        tifffile.imwrite(path, movie.frames, photometric="minisblack")
        options = ["--offset", "100", "--gain", "0.46"]
        command = [sys.executable, "-m", "jaxbkgd", "estimate", path, *options]
        subprocess.run(command, check=True)
        shutil.copy(path.with_name("movie-background.png"), folder / "estimate.png")


def main(folder: Path) -> None:
    print("estimate", flush=True)
    draw_estimate(folder)
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
