"""LocalMean of a long movie: chunk after chunk of its blocks, with every round at once.

Each round needs the sums of the round before in the neighbouring chunks, and no others. So
chunks go through a chain of generators, of which each one lags a chunk behind the one that
it takes from, and only three chunks of sums of each round are in memory, however far the
rounds reach together.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .background import Background
from .light_model import FrameBlocks, LastSums, LightModel, Rates, spread_bad_blocks


_Sums = TypeVar("_Sums")
# Blocks of a chunk, and those of its neighbours.
_Three = tuple[_Sums, _Sums, _Sums]


class Piece(NamedTuple):
    """What the background of a chunk is made of: the last sums, and those of the chunks
    before and after it; and which blocks have a NaN, as far as it spreads."""

    sums: _Three[LastSums]
    is_bad: Bool[Array, " blocks"]

    def background(self, model: LightModel) -> Background:
        """The background of the chunk's frames."""
        blocks, height, width = self.sums[1].sums.shape
        margin, reach = model.reach_blocks, model.halo_blocks
        images = _join_neighbours([sums[:3] for sums in self.sums], margin)
        light = model.steady_light(
            _join_neighbours([sums.light for sums in self.sums], blocks)
        )
        light = light[blocks:-blocks]
        last = LastSums(images[0], images[1], images[2], self.sums[1].light)
        is_bad = spread_bad_blocks(self.is_bad, reach)[reach : reach + blocks]
        (bkgds,) = model.backgrounds(last, light, is_bad, margin=margin)
        return model.background(bkgds.reshape(-1, height, width), light.reshape(-1))


def least_blocks(model: LightModel, shape: tuple[int, ...]) -> int:
    """The blocks of the shortest chunk for frames (height, width): no round may need more
    than the neighbours. Chunks are multiples of it."""
    light_blocks = -(-model.reach_light // model.block_frames)
    step = model.step_blocks(shape)
    # A loop of one or two steps is compiled, and rounded, in another way than others.
    return max(3, -(-max(model.reach_blocks, light_blocks) // step)) * step


def pieces(
    model: LightModel,
    read: Callable[[int], FrameBlocks],
    numbers: range,
    chunk_count: int,
    step: int,
) -> Iterator[tuple[int, Piece]]:
    """What the backgrounds of successive chunks of a movie are made of.

    **Arguments:**

    - `read`: gives the frames of a chunk by its number; all have as many blocks.
    - `numbers`: of the chunks that are wanted.
    - `chunk_count`: of the whole movie.
    - `step`: the model's `step_blocks` for the frames.
    """
    # Each of the stages that look at neighbours loses a chunk at either end.
    stages = model.rounds + 1
    first = max(0, numbers.start - stages)
    last = min(chunk_count, numbers.stop + stages)
    bad: dict[int, Bool[Array, " blocks"]] = {}

    def first_sums() -> Iterator[tuple[int, Any]]:
        for number in range(first, last):
            sums, bad[number] = _first_sums(model, read(number))
            yield number, (Rates.before(sums), sums)

    def with_clipped(states: Iterable[tuple[int, Rates]]) -> Iterator[tuple[int, Any]]:
        for number, rates in states:
            yield number, (rates, _clipped_sums(model, read(number), rates))

    def rates_of_round(chunks: Iterator[tuple[int, Any]], is_first: bool) -> Iterator[Any]:
        for number, three in with_neighbours(chunks, chunk_count):
            yield number, _rates_of_round(model, three, jnp.asarray(is_first), step)

    states = rates_of_round(first_sums(), True)
    for _ in range(model.rounds - 1):
        states = rates_of_round(with_clipped(states), False)
    ends = ((number, _last_sums(model, read(number), rates)) for number, rates in states)
    for number, three in with_neighbours(ends, chunk_count):
        # At the ends of the movie no chunk is lost.
        if number in numbers:
            yield number, Piece(three, _around(bad, number, model.halo_blocks))
        bad.pop(number - stages, None)


def with_neighbours(
    chunks: Iterable[tuple[int, _Sums]], count: int
) -> Iterator[tuple[int, _Three[_Sums]]]:
    """Each of the successive chunks with the ones before and after it. Beyond the ends of a
    movie of `count` chunks are zeros; elsewhere the first and last are left out."""
    three = deque[Any](maxlen=3)
    for number, chunk in chunks:
        if number == 0:
            three.append(jax.tree.map(jnp.zeros_like, chunk))
        three.append(chunk)
        if len(three) == 3:
            yield number - 1, tuple(three)
        if number == count - 1:
            three.append(jax.tree.map(jnp.zeros_like, chunk))
            yield number, tuple(three)


def _join_neighbours(three: Iterable[Any], margin: int) -> Any:
    """The blocks of a chunk with so many of its neighbours on either side."""

    def join(before: Array, here: Array, after: Array) -> Array:
        return jnp.concatenate([before[len(before) - margin :], here, after[:margin]])

    return jax.tree.map(join, *three)


def _around(
    bad: dict[int, Bool[Array, " blocks"]], number: int, reach: int
) -> Bool[Array, " _blocks"]:
    """Which blocks of a chunk, and within reach of it, have a NaN."""
    here = bad[number]
    chunks = -(-reach // len(here))
    none = jnp.zeros_like(here)
    near = [bad.get(n, none) for n in range(number - chunks, number + chunks + 1)]
    extra = chunks * len(here) - reach
    return jnp.concatenate(near)[extra : len(here) * len(near) - extra]


_first_sums = eqx.filter_jit(LightModel.first_sums)
_clipped_sums = eqx.filter_jit(LightModel.clipped_sums)
_last_sums = eqx.filter_jit(LightModel.last_sums)


@eqx.filter_jit
def _rates_of_round(
    model: LightModel, three: _Three[Any], is_first: Any, step: int
) -> Rates:
    margin, (rates, _) = model.reach_blocks, three[1]
    sums = _join_neighbours([sums for _, sums in three], margin)
    return model.rates_of_round(rates, sums, is_first, step, margin)
