"""What bounds the speed: where a call, a slope and a gradient spend their time on CPU.

    python examples/speed_bounds.py

For each size and radius, on one core: the time of a whole call for each pixel; that of one
so small that its result gets memory which was used before; the page faults that the system
counts in either; and what of the whole call XLA's own profile ascribes to steps that do no
more than fill an image. It takes about four minutes, and writes its table between two
markers in performance.md, in docs/pages or the folder `--out`.
"""

import argparse
import collections
import functools as ft
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


# Before jax counts the cores.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from jaxbkgd import spatial_mean
from jaxbkgd._filter.vectors import WIDE_VECTORS


ROUNDS = 7
PART_PIXELS = 2**20
FULL_WIDTH = "background, vectors in full width"
# Steps that do nothing else than fill a new image: with zeros, x + 1, or the cotangent.
FILLING = ("broadcast", "multiply")
BEGIN, END = "<!-- begin: written by speed_bounds.py -->", "<!-- end: speed_bounds.py -->"


def functions(radius_pix: float) -> dict[str, Callable[..., Any]]:
    def background(radii, frames):
        return spatial_mean(frames, radii, max_radius_pix=radius_pix, truncation="smooth")

    def loss(radii, frames):
        return jnp.sum(background(radii, frames) ** 2)

    def slope(radii, frames):
        return jax.jvp(lambda radii: loss(radii, frames), (radii,), (jnp.ones(2),))

    return {
        "x + 1": lambda radii, frames: frames + radii[0],
        "background": background,
        FULL_WIDTH: background,
        "slope (jvp)": slope,
        "value and gradient": jax.value_and_grad(loss, (0, 1)),
    }


def seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def page_faults(call: Callable[[], Any]) -> int:
    # Not everywhere there is one.
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(call())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def profile(call: Callable[[], Any]) -> dict[str, float]:
    """The seconds of each of the program's outermost steps."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        events = [
            event
            for plane in ProfileData.from_file(str(path)).planes
            for line in plane.lines
            for event in line.events
            if "hlo_op" in dict(event.stats)
        ]
    steps, end = collections.Counter(), 0.0
    for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
        if event.start_ns >= end:
            steps[event.name] += event.duration_ns / 1e9
            end = event.start_ns + event.duration_ns
    return dict(steps)


def row(size: int, radius_pix: float, name: str, megapixels: float) -> str:
    options = WIDE_VECTORS if name == FULL_WIDTH else None
    function = jax.jit(functions(radius_pix)[name], compiler_options=options)
    radii = jnp.full(2, radius_pix, jnp.float32)
    shape = (max(1, round(megapixels * 1e6 / size**2)), size, size)
    frames = np.random.default_rng(0).integers(100, 1000, shape).astype(np.float32)
    numbers = []
    for frame_count in (len(frames), max(1, min(len(frames), PART_PIXELS // size**2))):
        part = jnp.asarray(frames[:frame_count])
        call = ft.partial(function, radii, part)
        # Twice, since the first result may be in memory that is new.
        jax.block_until_ready([call() for _ in range(2)])
        numbers += [1e9 * seconds(call) / part.size, 1e6 * page_faults(call) / part.size]
    steps = profile(ft.partial(function, radii, jnp.asarray(frames)))
    filling = sum(s for step, s in steps.items() if any(word in step for word in FILLING))
    whole, faults, of_part, faults_of_part = numbers
    return (
        f"| {name} | {size} | {radius_pix:g} | {whole:.2f} | {faults:.0f} | {of_part:.2f} "
        f"| {faults_of_part:.0f} | {1e9 * filling / frames.size:.2f} |"
    )


def table(sizes: list[int], radii: list[float], megapixels: float) -> str:
    lines = [
        f"One core, float32, jax {jax.__version__}; ns for a pixel, median of {ROUNDS} "
        "calls, one call's page faults for a Mpx, and one call's profile.",
        "",
        f"| what | frames (px) | r | {megapixels:g} Mpx | page faults | 1 Mpx | "
        "page faults | filling |",
        "| --- " * 8 + "|",
    ]
    for size, radius in itertools.product(sizes, radii):
        names = list(functions(radius))
        for name in names if radius == radii[0] else names[1:]:
            lines.append(row(size, radius, name, megapixels))
            print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    beside = Path(__file__).parents[1] / "docs" / "pages"
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--radii", type=float, nargs="+", default=[3.0, 15.0, 60.0])
    parser.add_argument("--megapixels", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=beside, help="the folder to write to")
    options = parser.parse_args()
    page = options.out / "performance.md"
    result = table(options.sizes, options.radii, options.megapixels)
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{result}\n\n{END}{after}")
