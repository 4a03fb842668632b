"""Benchmark: jaxbkgd beside the other ways to filter a movie, in one table and figure.

    python examples/benchmark.py [--quick]

It takes a quarter of an hour, with `--quick` under a minute. The extra `bench` installs
what it needs; smlmlp, kornia with torch, and dm_pix are compared with where they are
installed. It writes performance.json, figures/performance.png and, between two markers in
performance.md, the tables, to docs/pages or to the folder `--out`.

Each way of measuring has a process of its own, which waits while another one measures. A
cell of the table is a size, a radius and a dtype; the processes measure it one after
another, and each takes all its competitors in turn, round after round.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import correlate1d
from scipy.special import ndtr

import jaxbkgd


TOLERANCE = 2e-6  # of the largest input: what the definition's own float32 code needs
SECONDS_PER_WAY = 0.4  # slow competitors do fewer rounds,
SECONDS_PER_CALL = 0.1  # and fewer frames a call
SETTLING_SECONDS = 0.005  # threads of the competitor before may still spin
CHECKED_PIXELS = 2**18
MOVIE_STACKS = 4  # on all cores, that many stacks make a movie
WARM_PIXELS = 2**21

COMPETITORS = ("OpenCV", "scipy", "smlmlp", "kornia", "dm_pix", "lax.conv")

ONE_THREAD_FRESH = "one thread, fresh output"
ONE_THREAD_WARM = "one thread, warm output"
ALL_CORES = "all cores"
ALL_CORES_BY_DEFAULT = "all cores, JAX as it starts"
PLAIN = "plain call"
HUGE_PAGES = "plain call, huge pages"
GRADIENT = "gradient"
GPU = "GPU"

ONE_THREAD = dict.fromkeys(
    (
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
        "NUMBA_NUM_THREADS",
    ),
    "1",
)
ON_CPU = {"JAX_PLATFORMS": "cpu"}
# Let glibc's malloc keep up to 32 MB that were freed. Without, it depends on chance whether
# "warm" results are: JAX makes them in threads of its own, and malloc gives back all memory
# of a thread as soon as none of it is in use.
KEEPING_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=33554432"
    ":glibc.malloc.trim_threshold=1073741824"
}
# What each process has in its environment.
PROCESSES = {
    ONE_THREAD_FRESH: ON_CPU | ONE_THREAD,
    ONE_THREAD_WARM: ON_CPU | ONE_THREAD | KEEPING_MEMORY,
    ALL_CORES: ON_CPU,
    ALL_CORES_BY_DEFAULT: ON_CPU,
    PLAIN: ON_CPU,
    HUGE_PAGES: ON_CPU | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    GPU: {},
}
PACKAGES = (
    *("jaxbkgd", "jax", "jaxlib", "numpy", "scipy", "opencv-python-headless"),
    *("smlmlp", "arrlp", "numba", "kornia", "torch", "dm-pix"),
)


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    size: int
    radius_pix: float
    dtype: str
    frames: int

    @property
    def sigma(self) -> float:
        return self.radius_pix / 2

    @property
    def half_width(self) -> int:
        return math.floor(2.5758293 * self.sigma)

    @property
    def checked(self) -> int:
        """How many frames are compared with the reference."""
        return min(self.frames, max(1, CHECKED_PIXELS // self.size**2))

    def taps(self, is_sampled: bool = False) -> np.ndarray:
        """The definition's taps, or the density at the pixels' centres: no other taps can
        be given to OpenCV's GaussianBlur and dm_pix."""
        distance = np.abs(np.arange(-self.half_width, self.half_width + 1))
        if is_sampled:
            taps = np.exp(-((distance / self.sigma) ** 2) / 2)
        else:
            taps = ndtr((0.5 - distance) / self.sigma) - ndtr(
                (-0.5 - distance) / self.sigma
            )
        return taps / taps.sum()

    def stack(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        shape = (self.frames, self.size, self.size)
        frames = rng.integers(100, 1000, shape, np.uint16)
        return frames if self.dtype == "uint16" else frames * np.float32(1.1)

    def reference(self, frames: np.ndarray, is_sampled: bool) -> np.ndarray:
        image = frames[: self.checked].astype(np.float64)
        for axis in (1, 2):
            image = correlate1d(image, self.taps(is_sampled), axis, mode="nearest")
        return image


@dataclass(frozen=True)
class Way:
    """A way to filter frames.

    `prepare` takes the frames and gives the call that is timed, which returns the filtered
    frames, or the first of them. `name` begins with the library's, and ends at a colon.
    """

    setting: str
    name: str
    prepare: Callable[[np.ndarray], Callable[[], Any]]
    is_sampled: bool = False
    is_filter: bool = True  # otherwise there is no reference to compare with
    chunk: int = 1  # frames are a multiple of it
    seconds: float = SECONDS_PER_WAY  # before there are no more rounds
    before: Callable[[], Any] = lambda: None


# The competitors.


def optional(module: str) -> Any:
    """The module, or None where it is not installed."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(module)


def limits(setting: str) -> Iterator[Way]:
    """What no filter can beat: a copy of the result, and the cost of its memory."""

    def prepare_copy(frames):
        source, out = frames.astype(np.float32), np.empty(frames.shape, np.float32)
        return lambda: np.copyto(out, source)

    def prepare_increment(frames):
        frames, increment = jnp.asarray(frames, jnp.float32), jax.jit(lambda x: x + 1)
        return lambda: increment(frames).block_until_ready()

    is_fresh = setting != ONE_THREAD_WARM and setting != ALL_CORES
    if is_fresh:
        yield Way(setting, "x + 1", prepare_increment, is_filter=False)
    else:
        yield Way(setting, "copyto", prepare_copy, is_filter=False)


def jaxbkgd_plain(cell: Cell, setting: str) -> Iterator[Way]:
    def prepare(frames):
        frames = jnp.asarray(frames)
        return lambda: jaxbkgd.spatial_mean(frames, cell.radius_pix).block_until_ready()

    yield Way(setting, "jaxbkgd", prepare)


def jaxbkgd_in_warm_memory(cell: Cell) -> Iterator[Way]:
    """Calls so small that malloc gives the memory of one result to the next."""
    chunk = min(cell.frames, max(1, WARM_PIXELS // cell.size**2))

    def prepare(frames):
        chunks = [jnp.asarray(part) for part in np.split(frames, len(frames) // chunk)]

        def run():
            first, *others = chunks
            result = jaxbkgd.spatial_mean(first, cell.radius_pix).block_until_ready()
            for other in others:
                jaxbkgd.spatial_mean(other, cell.radius_pix).block_until_ready()
            return result

        return run

    yield Way(ONE_THREAD_WARM, "jaxbkgd", prepare, chunk=chunk)


def jaxbkgd_on_all_cores(cell: Cell, setting: str) -> Iterator[Way]:
    estimator = jaxbkgd.SpatialMean(cell.radius_pix, truncation="hard")

    def prepare(frames):
        out = np.empty(frames.shape, np.float32)

        def run():
            jaxbkgd.estimate_movie(frames, estimator, out, progress=False)
            return out

        return run

    yield Way(setting, "jaxbkgd", prepare, seconds=MOVIE_STACKS * SECONDS_PER_WAY)


def opencv_blurs(cell: Cell) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Functions that filter a frame into `out`, and whether their taps are sampled."""
    cv2 = importlib.import_module("cv2")
    taps, width = cell.taps().astype(np.float32), 2 * cell.half_width + 1
    edges = {"borderType": cv2.BORDER_REPLICATE}

    def separable(frame, out):
        cv2.sepFilter2D(frame, cv2.CV_32F, taps, taps, dst=out, **edges)

    def gaussian(frame, out):
        cv2.GaussianBlur(frame, (width, width), cell.sigma, dst=out, **edges)

    if cell.dtype == "float32":
        yield "OpenCV: sepFilter2D", separable, False
        yield "OpenCV: GaussianBlur", gaussian, True
        return

    def converted(blur):
        return lambda frame, out: blur(frame.astype(np.float32), out)

    yield "OpenCV: sepFilter2D of uint16", separable, False
    yield "OpenCV: sepFilter2D, converted first", converted(separable), False
    yield "OpenCV: GaussianBlur, converted first", converted(gaussian), True


def opencv_on_one_thread(
    cell: Cell, into_output: Callable[..., Callable[[], Any]], setting: str
) -> Iterator[Way]:
    cv2 = optional("cv2")
    if cv2 is None:
        return
    cv2.setNumThreads(1)
    for name, blur, is_sampled in opencv_blurs(cell):
        prepare = functools.partial(into_output, blur=blur)
        yield Way(setting, name, prepare, is_sampled)


def into_fresh_output(frames: np.ndarray, blur: Callable[..., Any]) -> Callable[[], Any]:
    """A run that writes each frame, blurred, to an array that is new."""

    def run():
        out = np.empty(frames.shape, np.float32)
        for frame, frame_out in zip(frames, out, strict=True):
            blur(frame, frame_out)
        return out

    return run


def into_kept_output(frames: np.ndarray, blur: Callable[..., Any]) -> Callable[[], Any]:
    """A run that writes each frame, blurred, to the same array again and again."""
    out = np.empty(frames.shape, np.float32)

    def run():
        for frame, frame_out in zip(frames, out, strict=True):
            blur(frame, frame_out)
        return out

    return run


def opencv_on_all_cores(cell: Cell) -> Iterator[Way]:
    cv2 = optional("cv2")
    if cv2 is None:
        return
    cores = core_count()
    for name, blur, is_sampled in opencv_blurs(cell):

        def prepare(frames, blur=blur):
            return into_kept_output(frames, blur)

        def prepare_pool(frames, blur=blur):
            return pooled(frames, blur)

        yield Way(
            *(ALL_CORES, f"{name}, its threads", prepare, is_sampled),
            before=lambda: cv2.setNumThreads(cores),
        )
        yield Way(
            *(ALL_CORES, f"{name}, a pool over frames", prepare_pool, is_sampled),
            chunk=min(cores, cell.frames),
            before=lambda: cv2.setNumThreads(1),
        )


def pooled(frames: np.ndarray, blur: Callable[..., Any]) -> Callable[[], Any]:
    """Filters frames one by one, on a pool of threads, into memory that is kept."""
    out = np.empty(frames.shape, np.float32)
    pool = ThreadPoolExecutor(core_count())

    def run():
        list(pool.map(blur, frames, out))
        return out

    return run


def scipy_on_all_cores(cell: Cell) -> Iterator[Way]:
    taps = cell.taps()

    def blur(frame, out):
        rows = correlate1d(frame, taps, 0, np.float32, "nearest")
        correlate1d(rows, taps, 1, out, "nearest")

    def prepare(frames):
        return pooled(frames, blur)

    name = "scipy: correlate1d twice, a pool over frames"
    yield Way(ALL_CORES, name, prepare, chunk=min(core_count(), cell.frames))


def smlmlp_on_all_cores(cell: Cell) -> Iterator[Way]:
    smlmlp = optional("smlmlp")
    if smlmlp is None:
        return

    def prepare(frames):
        out = np.empty(frames.shape, np.float32)

        def run():
            smlmlp.bkgd_spatial_mean([frames], cell.radius_pix, bkgds=[out], parallel=True)
            return out

        return run

    chunk = min(core_count(), cell.frames)
    yield Way(ALL_CORES, "smlmlp: parallel=True", prepare, chunk=chunk)


def kornia_on_all_cores(cell: Cell) -> Iterator[Way]:
    torch, filters = optional("torch"), optional("kornia.filters")
    if torch is None or filters is None:
        return
    taps = torch.tensor(cell.taps()[None], dtype=torch.float32)
    width, sigma = taps.shape[1], (cell.sigma, cell.sigma)

    def prepare(blur):
        def prepared(frames):
            frames = torch.from_numpy(frames)

            def run():
                with torch.inference_mode():
                    return blur(frames.to(torch.float32)[:, None])[:, 0].numpy()

            return run

        return prepared

    def separable(image):
        return filters.filter2d_separable(image, taps, taps, border_type="replicate")

    def gaussian(image):
        return filters.gaussian_blur2d(image, (width, width), sigma, "replicate")

    yield Way(ALL_CORES, "kornia: filter2d_separable", prepare(separable))
    yield Way(ALL_CORES, "kornia: gaussian_blur2d", prepare(gaussian), is_sampled=True)


def jax_convolutions_on_all_cores(cell: Cell) -> Iterator[Way]:
    half, taps = cell.half_width, jnp.asarray(cell.taps(), jnp.float32)

    def padded(frames):
        widths = ((0, 0), (half, half), (half, half))
        return jnp.pad(frames.astype(jnp.float32), widths, "edge")

    def prepare(blur):
        def prepared(frames):
            return lambda: np.asarray(blur(frames))

        return prepared

    @jax.jit
    def convolve(frames):
        image = padded(frames)[:, None]
        for row in (taps[None, None, :, None], taps[None, None, None, :]):
            image = jax.lax.conv_general_dilated(image, row, (1, 1), "VALID")
        return image[:, 0]

    yield Way(ALL_CORES, "lax.conv: two passes", prepare(convolve))
    dm_pix = optional("dm_pix")
    if dm_pix is None:
        return

    @jax.jit
    def blur(frames):
        image = padded(frames)[..., None]
        width = 2 * half + 1
        return dm_pix.gaussian_blur(image, cell.sigma, width, padding="VALID")[..., 0]

    yield Way(ALL_CORES, "dm_pix: gaussian_blur", prepare(blur), is_sampled=True)


def gradients(cell: Cell) -> Iterator[Way]:
    """The sum of squares of the background: its value, gradient and slopes."""

    def prepare(transform):
        def prepared(frames):
            radii, frames = jnp.full(2, cell.radius_pix, jnp.float32), jnp.asarray(frames)
            function = compiled_loss(cell, transform)
            return lambda: jax.block_until_ready(function(radii, frames))

        return prepared

    for transform in ("forward", "value_and_grad", "jvp"):
        yield Way(GRADIENT, transform, prepare(transform), is_filter=False)
    torch, filters = optional("torch"), optional("kornia.filters")
    if torch is None or filters is None:
        return
    width = 2 * cell.half_width + 1

    def prepare_kornia(frames):
        image = torch.from_numpy(frames)[:, None].requires_grad_()
        sigma = torch.full((1, 2), cell.sigma, requires_grad=True)

        def run():
            blurred = filters.gaussian_blur2d(image, (width, width), sigma, "replicate")
            return torch.autograd.grad(blurred.square().sum(), (sigma, image))

        return run

    yield Way(GRADIENT, "kornia", prepare_kornia, is_filter=False)


@functools.lru_cache(maxsize=3)
def compiled_loss(cell: Cell, transform: str) -> Any:
    def forward(radii, frames):
        bkgds = jaxbkgd.spatial_mean(
            *(frames, radii), max_radius_pix=cell.radius_pix, truncation="smooth"
        )
        return jnp.sum(bkgds**2)

    def jvp(radii, frames):
        slopes = jnp.ones_like(radii)
        return jax.jvp(lambda radii: forward(radii, frames), (radii,), (slopes,))

    value_and_grad = jax.value_and_grad(forward, (0, 1))
    transforms = {"forward": forward, "value_and_grad": value_and_grad, "jvp": jvp}
    radii = jax.ShapeDtypeStruct((2,), jnp.float32)
    frames = jax.ShapeDtypeStruct((cell.frames, cell.size, cell.size), jnp.float32)
    return jax.jit(transforms[transform]).lower(radii, frames).compile()


def ways_of(process: str, cell: Cell) -> Iterator[Way]:
    if process == ONE_THREAD_WARM:
        yield from jaxbkgd_in_warm_memory(cell)
        yield from limits(process)
        yield from opencv_on_one_thread(cell, into_kept_output, process)
    elif process == ALL_CORES:
        yield from jaxbkgd_on_all_cores(cell, ALL_CORES)
        yield from limits(ALL_CORES)
        yield from opencv_on_all_cores(cell)
        yield from scipy_on_all_cores(cell)
        yield from smlmlp_on_all_cores(cell)
        yield from kornia_on_all_cores(cell)
    elif process == ALL_CORES_BY_DEFAULT:
        yield from jaxbkgd_on_all_cores(cell, ALL_CORES_BY_DEFAULT)
        # These need XLA's own threads.
        yield from jax_convolutions_on_all_cores(cell)
    else:
        yield from jaxbkgd_plain(cell, process)
        yield from limits(process)
    if process == ONE_THREAD_FRESH:
        yield from opencv_on_one_thread(cell, into_fresh_output, process)
    if process == PLAIN and cell.dtype == "float32":
        yield from gradients(cell)


# Measuring: what runs in each process.


def measure(process: str, cell: Cell, rounds: int) -> dict[str, Any]:
    """The pixel rates of all ways, by setting and name; those whose numbers are wrong have
    an error instead. In a plain process, what compiling and memory cost, too."""
    frames = cell.stack()
    if process in (ALL_CORES, ALL_CORES_BY_DEFAULT):
        frames = np.concatenate([frames] * MOVIE_STACKS)
    reference = functools.cache(lambda is_sampled: cell.reference(frames, is_sampled))
    costs = costs_of(cell, frames) if process == PLAIN else {}
    rates: dict[str, dict[str, Any]] = {}
    candidates = []
    for way in ways_of(process, cell):
        of_setting = rates.setdefault(way.setting, {})
        candidate = prepared(way, cell, frames)
        if way.is_filter:
            error = error_of(candidate.result, reference(way.is_sampled), frames)
            if not error <= TOLERANCE:
                of_setting[way.name] = {"error": error}
                continue
        candidates.append(dataclasses.replace(candidate, result=None))
    time_in_turn(candidates, rounds)
    for candidate in candidates:
        pixels, seconds = candidate.pixels, candidate.seconds
        rates[candidate.way.setting][candidate.way.name] = {
            "mpx_per_s": round(pixels / np.median(seconds) / 1e6, 2),
            "fastest": round(pixels / min(seconds) / 1e6, 2),
            "calls": len(seconds),
        }
    return {"speed": rates, **costs}


@dataclass(frozen=True)
class Candidate:
    """A way with frames to work on, which has done so once."""

    way: Way
    run: Callable[[], Any]
    pixels: int
    result: Any
    seconds: list[float]


def prepared(way: Way, cell: Cell, frames: np.ndarray) -> Candidate:
    """jaxbkgd gets all frames, and so do the limits; a competitor that is slow gets as many
    as it can do in its time."""
    count = len(frames) - len(frames) % way.chunk
    way.before()
    if way.name.split(":")[0] in COMPETITORS:
        few = frames[: max(cell.checked, way.chunk)]
        run = way.prepare(few)
        result = run()
        seconds = time_of(run)
        affordable = int(SECONDS_PER_CALL / seconds * len(few))
        count = min(count, affordable - affordable % way.chunk)
        if count <= len(few):
            return Candidate(way, run, few.size, result, [seconds])
    part = frames[:count]
    run = way.prepare(part)
    return Candidate(way, run, part.size, run(), [])


def time_in_turn(candidates: list[Candidate], rounds: int) -> None:
    for _ in range(rounds):
        for candidate in candidates:
            if sum(candidate.seconds) < candidate.way.seconds:
                candidate.way.before()
                time.sleep(SETTLING_SECONDS)
                candidate.seconds.append(time_of(candidate.run))


def time_of(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def error_of(result: Any, reference: np.ndarray, frames: np.ndarray) -> float:
    difference = np.abs(np.asarray(result)[: len(reference)] - reference)
    return float(np.max(difference) / np.max(frames))


def costs_of(cell: Cell, stack: np.ndarray) -> dict[str, float]:
    """What compiling takes, and memory beside the input and the output."""
    frames = jnp.asarray(stack)

    def plain(frames):
        return jaxbkgd.spatial_mean(frames, cell.radius_pix)

    first, warm = (time_of(lambda: plain(frames).block_until_ready()) for _ in range(2))
    output_bytes = 4 * stack.size
    memory = memory_of(jax.jit(plain).lower(frames).compile())
    costs = {
        "compile_s": round(first - warm, 3),
        "scratch_mib": round((memory - output_bytes) / 2**20, 2),
    }
    if cell.dtype == "float32":
        memory = memory_of(compiled_loss(cell, "value_and_grad"))
        costs["value_and_grad_outputs"] = round(memory / output_bytes, 2)
    return costs


def memory_of(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def serve(process: str) -> None:
    """Measures the cells that come in, a line of JSON each, and answers in kind."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # some packages greet
    if process == ALL_CORES:
        jaxbkgd.one_thread_a_call()  # as the command `jaxbkgd` does
    print(json.dumps(description_of_process()), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = measure(process, Cell(**request["cell"]), request["rounds"])
        print(json.dumps(answer), file=answers, flush=True)


def description_of_process() -> dict[str, Any]:
    description: dict[str, Any] = {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": core_count(),
    }
    threadpoolctl = optional("threadpoolctl")
    if threadpoolctl is not None:
        description["pools"] = {
            pool["internal_api"]: pool["num_threads"]
            for pool in threadpoolctl.threadpool_info()
        }
    return description


def core_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Everything below runs in the first process, which only asks, collects and draws.


class Process:
    """A process that measures cells in one way."""

    def __init__(self, name: str):
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
        }
        is_alone = name in (ONE_THREAD_FRESH, ONE_THREAD_WARM)
        with one_core() if is_alone else contextlib.nullcontext():
            self.popen = subprocess.Popen(
                [sys.executable, __file__, "--serve", name],
                env=environment | PROCESSES[name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """Its first answer, for which there is no question."""
        return self._answer()

    def measure(self, cell: Cell, rounds: int) -> dict[str, Any]:
        assert self.popen.stdin is not None
        request = {"cell": asdict(cell), "rounds": rounds}
        self.popen.stdin.write(json.dumps(request) + "\n")
        self.popen.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.popen.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise RuntimeError(f"a measuring process ended with {self.popen.wait()}")
        return json.loads(line)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """A process started in here has one core, before it imports anything."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def all_cells(options: argparse.Namespace) -> list[Cell]:
    cells = []
    for size, radius, dtype in itertools.product(
        options.sizes, options.radii, ("float32", "uint16")
    ):
        frames = max(1, round(options.megapixels * 1e6 / size**2))
        cell = Cell(size, radius, dtype, frames)
        if 2 * cell.half_width + 1 <= size:
            cells.append(cell)
    return cells


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    processes = {name: Process(name) for name in PROCESSES}
    descriptions = {name: process.description for name, process in processes.items()}
    if descriptions[GPU]["backend"] == "cpu":
        del descriptions[GPU]
        processes.pop(GPU).close()
    records = []
    for cell in progress(all_cells(options)):
        record = asdict(cell) | {"speed": {}}
        for process in processes.values():
            answer = process.measure(cell, options.rounds)
            for setting, ways in answer.pop("speed").items():
                record["speed"].setdefault(setting, {}).update(ways)
            record |= answer
        records.append(record)
    for process in processes.values():
        process.close()
    return {
        "machine": machine(descriptions),
        "method": {
            "is_quick": options.quick,
            "rounds": options.rounds,
            "seconds_per_way": SECONDS_PER_WAY,
            "tolerance": TOLERANCE,
            "took_s": round(time.monotonic() - started),
        },
        "cells": records,
    }


def progress(cells: list[Cell]) -> Iterable[Cell]:
    rich = optional("rich.progress")
    if rich is not None and sys.stdout.isatty():
        yield from rich.track(cells, "measuring")
        return
    for index, cell in enumerate(cells, 1):
        print(
            f"[{index}/{len(cells)}] {cell.size} px, r = {cell.radius_pix:g}, {cell.dtype}",
            flush=True,
        )
        yield cell


def machine(processes: dict[str, Any]) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": cpu_model(),
        "cores": core_count(),
        "system": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "processes": processes,
    }


def cpu_model() -> str:
    """The model as the system names it, and its family and number, where it says so."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    pairs = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(pairs)}
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts.get('cpu family')}, model {facts.get('model')})"


# Ratios and tables.


def rate(cell: dict[str, Any], setting: str, library: str) -> float:
    """The pixel rate of a library's best way, NaN where it was not measured."""
    rates = [
        way["mpx_per_s"]
        for name, way in cell["speed"].get(setting, {}).items()
        if name.split(":")[0] == library and "error" not in way
    ]
    return max(rates, default=math.nan)


def ratios_of(cell: dict[str, Any]) -> dict[str, float]:
    """What the tables say of a cell, all of it times jaxbkgd is faster or costs more."""
    ours = {
        setting: rate(cell, setting, "jaxbkgd")
        for setting in (
            *(ONE_THREAD_FRESH, ONE_THREAD_WARM, ALL_CORES, ALL_CORES_BY_DEFAULT),
            *(PLAIN, HUGE_PAGES),
        )
    }
    ratios = {
        f"{setting}: OpenCV": ours[setting] / rate(cell, setting, "OpenCV")
        for setting in (ONE_THREAD_FRESH, ONE_THREAD_WARM, ALL_CORES)
    }
    for library in ("scipy", "smlmlp", "kornia", "dm_pix", "lax.conv", "copyto"):
        ratios[f"{ALL_CORES}: {library}"] = ours[ALL_CORES] / rate(cell, ALL_CORES, library)
    opencv = rate(cell, ALL_CORES, "OpenCV")
    ratios[f"{ALL_CORES_BY_DEFAULT}: OpenCV"] = ours[ALL_CORES_BY_DEFAULT] / opencv
    ratios["plain call / one thread"] = ours[PLAIN] / ours[ONE_THREAD_FRESH]
    ratios["huge pages / plain call"] = ours[HUGE_PAGES] / ours[PLAIN]
    forward, gradient = (rate(cell, GRADIENT, way) for way in ("forward", "value_and_grad"))
    ratios["value_and_grad / forward"] = forward / gradient
    ratios["jvp / forward"] = forward / rate(cell, GRADIENT, "jvp")
    ratios["value_and_grad: kornia"] = gradient / rate(cell, GRADIENT, "kornia")
    return ratios


def cost_of_60_over_7(cells: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """By size and dtype, on one thread into warm memory."""
    rates = {
        (cell["size"], cell["dtype"], cell["radius_pix"]): rate(
            cell, ONE_THREAD_WARM, "jaxbkgd"
        )
        for cell in cells
    }
    return {
        (size, dtype): rates[size, dtype, 7] / rates[size, dtype, 60]
        for size, dtype, radius in rates
        if radius == 60 and (size, dtype, 7) in rates
    }


SUMMARY = {
    f"{ONE_THREAD_FRESH}: OpenCV": "OpenCV, one thread each, fresh output",
    f"{ONE_THREAD_WARM}: OpenCV": "OpenCV, one thread each, warm output",
    f"{ALL_CORES}: OpenCV": "OpenCV, all cores",
    f"{ALL_CORES_BY_DEFAULT}: OpenCV": "OpenCV, all cores; JAX's threads as they start",
    f"{ALL_CORES}: scipy": "scipy.ndimage on a pool of threads, all cores",
    f"{ALL_CORES}: smlmlp": "smlmlp with parallel=True, all cores",
    f"{ALL_CORES}: kornia": "kornia, all cores",
    f"{ALL_CORES}: dm_pix": "dm_pix, all cores",
    f"{ALL_CORES}: lax.conv": "lax.conv_general_dilated, all cores",
    f"{ALL_CORES}: copyto": "numpy.copyto of the result",
    "value_and_grad: kornia": "kornia, forward and backward, all cores",
}
COSTS = {
    "value_and_grad / forward": "value and gradient, over the forward call",
    "jvp / forward": "derivative in the radii (jvp), over the forward call",
    "plain call / one thread": "speed of the plain call, over one thread's",
    "huge pages / plain call": "speed of the plain call with huge pages, over without",
}


def tables(results: dict[str, Any]) -> str:
    cells, facts = results["cells"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    every = [ratios_of(cell) for cell in cells]
    lines = [
        f"Measured on {facts['date']}: {facts['cpu']}, {facts['cores']} cores, "
        f"{facts['system']}, Python {facts['python']}; {versions}. {len(cells)} cells"
        + (", a `--quick` run." if results["method"]["is_quick"] else "."),
        "",
        "| jaxbkgd's speed over that of | geometric mean | least | most |",
        "| --- | --- | --- | --- |",
        *summary_rows(SUMMARY, every),
        "",
        "| ratio | geometric mean | least | most |",
        "| --- | --- | --- | --- |",
        *summary_rows(COSTS, every),
        *summary_rows(
            {0: "time at r = 60 px over that at 7 px, frames up to 512 px"},
            [
                {0: cost}
                for (size, _), cost in cost_of_60_over_7(cells).items()
                if size <= 512
            ],
        ),
        *summary_rows(
            {0: "the same, larger frames"},
            [
                {0: cost}
                for (size, _), cost in cost_of_60_over_7(cells).items()
                if size > 512
            ],
        ),
        "",
        "jaxbkgd's speed over OpenCV's by the radius, geometric mean (least):",
        "",
        *rows_by_radius(cells, every),
        "",
        "Each cell: speed in Mpx/s, in brackets over OpenCV's.",
        "",
        "| frames | r | dtype | one thread, fresh | one thread, warm | all cores | "
        "value and gradient / forward | jvp / forward | compile (s) | scratch (MiB) |",
        "| --- " * 10 + "|",
        *itertools.starmap(cell_row, zip(cells, every, strict=True)),
    ]
    if any(GPU in cell["speed"] for cell in cells):
        lines += ["", *gpu_table(cells, facts["processes"][GPU]["device"])]
    return "\n".join(lines)


def rows_by_radius(cells: list[dict], ratios: list[dict]) -> Iterator[str]:
    settings = (ONE_THREAD_FRESH, ONE_THREAD_WARM, ALL_CORES)
    yield f"| r | {' | '.join(settings)} |"
    yield "| --- " * 4 + "|"
    for radius in sorted({cell["radius_pix"] for cell in cells}):
        columns = []
        for setting in settings:
            known = [
                each[f"{setting}: OpenCV"]
                for cell, each in zip(cells, ratios, strict=True)
                if cell["radius_pix"] == radius
            ]
            mean = math.exp(np.mean(np.log(known)))
            columns.append(f"{number(mean)} ({number(min(known))})")
        yield f"| {radius:g} | {' | '.join(columns)} |"


def summary_rows(names: dict, ratios: list[dict]) -> Iterator[str]:
    for key, name in names.items():
        known = [each[key] for each in ratios if not math.isnan(each[key])]
        if known:
            mean = math.exp(np.mean(np.log(known)))
            yield f"| {name} | {mean:.2f} | {min(known):.2f} | {max(known):.2f} |"


def cell_row(cell: dict[str, Any], ratios: dict[str, float]) -> str:
    def speed(setting):
        ratio = number(ratios[f"{setting}: OpenCV"])
        return f"{rate(cell, setting, 'jaxbkgd'):.0f} ({ratio})"

    columns = (
        f"{cell['frames']} x {cell['size']}²",
        f"{cell['radius_pix']:g}",
        cell["dtype"],
        *map(speed, (ONE_THREAD_FRESH, ONE_THREAD_WARM, ALL_CORES)),
        number(ratios["value_and_grad / forward"]),
        number(ratios["jvp / forward"]),
        number(cell["compile_s"]),
        number(cell["scratch_mib"]),
    )
    return f"| {' | '.join(columns)} |"


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def gpu_table(cells: list[dict[str, Any]], device: str) -> Iterator[str]:
    yield f"The plain call on {device}:"
    yield ""
    yield "| frames | r | dtype | Mpx/s | x + 1, Mpx/s |"
    yield "| --- " * 5 + "|"
    for cell in cells:
        ours, limit = (rate(cell, GPU, name) for name in ("jaxbkgd", "x + 1"))
        yield (
            f"| {cell['frames']} x {cell['size']}² | {cell['radius_pix']:g} | "
            f"{cell['dtype']} | {ours:.0f} | {limit:.0f} |"
        )


# The figure.

STYLES = {
    "jaxbkgd": ("#1b6ca8", "o"),
    "OpenCV": ("#d95f02", "s"),
    "kornia": ("#7570b3", "^"),
    "smlmlp": ("#b8860b", "D"),
    "scipy": ("#66a61e", "v"),
    "dm_pix": ("#e7298a", "P"),
    "lax.conv": ("#888888", "X"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """The pixel rate over the radius, a column a size, for uint16."""
    cells = [cell for cell in results["cells"] if cell["dtype"] == "uint16"]
    sizes = sorted({cell["size"] for cell in cells})
    radii = sorted({cell["radius_pix"] for cell in cells})
    figure = Figure((max(2.1 * len(sizes), 6.5), 5.2), dpi=100, layout="constrained")
    grid = figure.subplots(2, len(sizes), sharex=True, sharey=True, squeeze=False)
    for row, setting in zip(grid, (ONE_THREAD_WARM, ALL_CORES), strict=True):
        for axes, size in zip(row, sizes, strict=True):
            of_size = [cell for cell in cells if cell["size"] == size]
            for library, (colour, marker) in STYLES.items():
                rates = [rate(cell, setting, library) for cell in of_size]
                if not np.all(np.isnan(rates)):
                    radii_of_size = [cell["radius_pix"] for cell in of_size]
                    style = {"color": colour, "marker": marker, "ms": 4, "lw": 1.2}
                    axes.loglog(radii_of_size, rates, label=library, **style)
            limit = np.median([rate(cell, setting, "copyto") for cell in of_size])
            axes.axhline(limit, color="#222222", lw=0.8, ls=":", label="numpy.copyto")
            axes.set_title(f"{size} px", fontsize=10)
            axes.set_xticks(radii, [f"{radius:g}" for radius in radii])
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3, lw=0.5)
        row[0].set_ylabel(f"{setting}\nMpx/s", fontsize=9)
    figure.supxlabel("radius (px), frames of uint16", fontsize=10)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    # It is a part of every clone: a few colours are enough for lines.
    with Image.open(path) as drawn:
        small = drawn.convert("RGB").quantize(64)
    small.save(path, optimize=True)


# The results.

BEGIN, END = "<!-- begin: written by benchmark.py -->", "<!-- end -->"


def write(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # A line a cell.
    lines = ",\n".join(json.dumps(cell) for cell in results["cells"])
    head = json.dumps(results | {"cells": []}, indent=1)
    text = head.replace('"cells": []', f'"cells": [\n{lines}\n]')
    (folder / "performance.json").write_text(text + "\n")
    draw(results, folder / "figures" / "performance.png")
    page = folder / "performance.md"
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    beside = Path(__file__).parents[1] / "docs" / "pages"
    parser.add_argument("--quick", action="store_true", help="fewer cells and rounds")
    parser.add_argument("--sizes", type=int, nargs="+", help="of a frame, in pixels")
    parser.add_argument("--radii", type=float, nargs="+", help="in pixels")
    parser.add_argument("--megapixels", type=float, default=10.0, help="of a cell's frames")
    parser.add_argument("--rounds", type=int, help="in which all take turns")
    parser.add_argument(
        "--out", type=Path, default=beside, help="to write to, docs/pages if not"
    )
    parser.add_argument("--serve", choices=PROCESSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quick = options.quick
    options.sizes = options.sizes or ([512] if quick else [128, 256, 512, 1024, 2048])
    options.radii = options.radii or ([7.0] if quick else [3.0, 7.0, 15.0, 30.0, 60.0])
    options.rounds = options.rounds or (3 if quick else 7)
    return options


if __name__ == "__main__":
    options = parse_options()
    if options.serve:
        serve(options.serve)
    else:
        results = run_benchmark(options)
        write(results, options.out)
        print(f"wrote performance.json, .md and .png in {results['method']['took_s']} s")
