"""The frames, depths and channels of a movie's files, by their names."""

import contextlib
import fnmatch
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Sequence

from .movie import MovieError


# Words before a number. The single letters may also stand for something else.
_POSITIONS = {"pos", "position", "xy", "stage", "site", "fov", "field", "well", "scene"}
_POSITIONS |= {"tile", "roi", "point", "row", "col", "column"}
_LIKELY_POSITIONS = {"p", "s", "m", "series"}
_CHANNELS = {
    "c",
    "ch",
    "chan",
    "channel",
    "w",
    "wave",
    "wavelength",
    "color",
    "colour",
    "cy",
}
_DEPTHS = {"z", "slice", "depth", "plane", "focus"}
_TIMES = {"t", "time", "frame", "f", "img", "image"}
_LABELS = (_POSITIONS | _LIKELY_POSITIONS | _CHANNELS | _DEPTHS | _TIMES) - {"cy"}

# Files of more channels than this differ in something else.
_MAX_CHANNELS = 8

# What follows the name of a first file without number: _X2, -1, (3), @0001, _part2.
_NUMBER_BEHIND = re.compile(r"[\W_]*([a-z]*)[\W_]*([0-9]+)[)\]]?")

# Micro-Manager 1.4: img_000000000_DAPI_000 is a time, a channel and a depth.
_MICROMANAGER = re.compile(r"img_([0-9]{9})(_.*_)([0-9]{3})")

# Texts and numbers in turns.
_Parts = list[str | int]


def arrange_names(source: str, names: Sequence[str]) -> list[list[str]]:
    """The names of the files of `source`, a folder or a pattern, in rows of a frame, or of
    consecutive frames, with a file for each channel. `img_2` comes before `img_10`, and a
    file without a number is the first.

    **Raises:**

    [`jaxbkgd.MovieError`][] for names that differ in positions or in anything else, and for
    missing files; with a pattern that matches fewer of them.
    """
    unnumbered = _order_behind_unnumbered(names)
    if unnumbered:
        _warn_of_gaps(source, unnumbered[1:])
        return [[name] for name in unnumbered]
    try:
        rows = _order(names)
    except ValueError as error:
        raise MovieError(f"{source}: {error}; open {_fewer(names)}") from error
    _warn_of_gaps(source, [row[0] for row in rows])
    return rows


def stem(name: str) -> str:
    """A name in small letters without the suffixes of TIFF and OME-TIFF."""
    return re.sub(r"(\.ome)?\.[^.]*$", "", name.lower())


def _order_behind_unnumbered(names: Sequence[str]) -> list[str]:
    """Names in order if the first has no number and all others begin with it, else none."""
    first = min(names, key=lambda name: len(stem(name)))
    start = stem(first)
    numbers: dict[int, str] = {}
    words = set()
    for name in names:
        if name == first:
            continue
        rest = stem(name)[len(start) :]
        found = _NUMBER_BEHIND.fullmatch(rest)
        is_longer_number = start[-1:].isdigit() and rest[:1].isdigit()
        if found is None or is_longer_number or not stem(name).startswith(start):
            return []
        words.add(found[1])
        numbers[int(found[2])] = name
    if len(words) != 1 or words & (_POSITIONS | _CHANNELS) or len(numbers) < len(names) - 1:
        return []
    return [first, *(numbers[number] for number in sorted(numbers))]


def _order(names: Sequence[str]) -> list[list[str]]:
    two = f"({names[0]}, {names[-1]})"
    parts = _split_alike(names)
    columns = list(zip(*parts, strict=True))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    times: list[int] = []
    depths: list[int] = []
    channels: list[int] = []
    for i in varying:
        label = _label(parts[0], i) if i % 2 else ""
        if label in _POSITIONS or (label in _LIKELY_POSITIONS and len(varying) > 1):
            count = len(set(columns[i]))
            raise ValueError(f"holds {count} positions ({label}), which are no frames")
        is_channel = i % 2 == 0 or label in _CHANNELS
        (channels if is_channel else depths if label in _DEPTHS else times).append(i)
    if all(i % 2 == 0 for i in varying):
        raise ValueError(f"its files differ in a word, not in a number {two}")
    places: dict[tuple, str] = {}
    for name, part in zip(names, parts, strict=True):
        place = tuple(tuple(part[i] for i in group) for group in (times, depths, channels))
        if places.setdefault(place, name) != name:
            raise ValueError(f"has two files of one number ({places[place]}, {name})")
    moments, levels, colours = (sorted(set(group)) for group in zip(*places, strict=True))
    # Several numbers may count the same frames, as a time stamp does.
    if any(list(column) != sorted(column) for column in zip(*moments, strict=True)):
        raise ValueError(f"its files differ in more than one number {two}")
    if len(colours) > _MAX_CHANNELS:
        raise ValueError(f"its files differ in {len(colours)} channels {two}")
    missing = len(moments) * len(levels) * len(colours) - len(places)
    if missing:
        raise ValueError(f"lacks {missing} files of its frames and channels")
    return [
        [places[moment, level, colour] for colour in colours]
        for moment in moments
        for level in levels
    ]


def _split_alike(names: Sequence[str]) -> list[_Parts]:
    """Names in as many parts each."""
    for split in (_split_micromanager, _split, _split_words):
        parts = [split(stem(name)) for name in names]
        if parts[0] and len({len(part) for part in parts}) == 1:
            return parts
    raise ValueError(f"its files have names of different kinds ({names[0]}, {names[-1]})")


def _split_micromanager(name: str) -> _Parts:
    found = _MICROMANAGER.fullmatch(name)
    return [] if found is None else ["t", int(found[1]), found[2], 0, "z", int(found[3])]


def _split(name: str) -> _Parts:
    parts = re.split("([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _split_words(name: str) -> _Parts:
    """Words may have numbers, as Cy5, unless the number has a known label."""
    parts: _Parts = []
    for word, end in re.findall(r"([^\W_]+|^)([\W_]*)", name):
        found = re.fullmatch("([a-z]*)([0-9]+)", word)
        if found is not None and (not found[1] or found[1] in _LABELS):
            parts += [found[1], int(found[2]), end, 0]
        else:
            parts += [word, 0, end, 0]
    return parts


def _label(texts: Sequence[str | int], number: int) -> str:
    """The last word before a number. A letter that begins the names is their own."""
    words = re.findall("[a-z]+", str(texts[number - 1]))
    if number == 1 and len(words) == 1 and words[0] in _LIKELY_POSITIONS:
        return ""
    return words[-1] if words else ""


def _fewer(names: Sequence[str]) -> str:
    """The pattern of the longest movie among the files, or the name of a file."""
    patterns: dict[str, int] = {}
    for name in (names[0], names[-1]):
        parts = re.split("([0-9]+)", name)
        for index in range(len(parts) - 2, 0, -2):
            pattern = "".join([*parts[:index], "*", *parts[index + 1 :]])
            matched = fnmatch.filter(names, pattern)
            if 1 < len(matched) < len(names):
                with contextlib.suppress(ValueError):
                    _order(matched)
                    patterns.setdefault(pattern, len(matched))
    if patterns:
        return f"some of them by a pattern, as {max(patterns, key=patterns.__getitem__)}"
    return f"a file alone, as {names[0]}"


def _warn_of_gaps(source: str, names: Sequence[str]) -> None:
    """Warns where the only number of the names jumps, or may be that of a position."""
    parts = [_split(stem(name)) for name in names]
    if len({len(part) for part in parts}) != 1:
        return
    columns = list(zip(*parts, strict=True))
    varying = [i for i in range(1, len(columns), 2) if len(set(columns[i])) > 1]
    if len(varying) != 1:
        return
    numbers = columns[varying[0]]
    if _label(parts[0], varying[0]) in _LIKELY_POSITIONS:
        warnings.warn(
            f"{source}: its files ({names[0]}, {names[-1]}) are read one after the other; "
            "if they are positions, open each alone",
            stacklevel=3,
        )
    steps = [int(b) - int(a) for a, b in itertools.pairwise(numbers)]
    step, count = Counter(steps).most_common(1)[0]
    if 2 * count > len(steps) > count:
        jump = next(i for i, other in enumerate(steps) if other != step)
        warnings.warn(
            f"{source}: {names[jump + 1]} follows {names[jump]}; frames between them may "
            "be missing",
            stacklevel=3,
        )
