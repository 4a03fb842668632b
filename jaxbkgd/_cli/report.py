"""What the commands print and write: lines, tables, errors, and whole files."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from .._estimators.local_mean import LocalMean
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.movie import MovieError
from .._movies.sinks import check_destination, draft_of


class UsageError(Exception):
    """A mistake in the arguments of a command, which one line names with its remedy."""


@contextlib.contextmanager
def refusing(given: str, rule: str | None = None) -> Iterator[None]:
    """Raise a `UsageError` with this rule, or with the error's own, for what is given."""
    try:
        yield
    except MovieError:
        raise
    except (OSError, TypeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UsageError(f"{given}: {rule or reason or error}") from error


def say(message: str) -> None:
    """Print one line on stderr."""
    line = printable(message).replace("\n", " ")
    print(f"jaxbkgd: {line}", file=sys.stderr, flush=True)


def printable(text: str | Path) -> str:
    """Replace the bytes of a file name that are not text."""
    return os.fsencode(text).decode(errors="replace")


def print_rows(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {printable(value)}")


def print_table(title: str, columns: Sequence[Mapping[str, str]]) -> None:
    """Print a table with a column for each channel; all have the same rows."""
    print(title)
    cells = {name: [f"{column[name]:>27}" for column in columns] for name in columns[0]}
    print_rows({name: "".join(row) for name, row in cells.items()})


def yx_text(y: float, x: float, unit: str) -> str:
    return f"{y:.4g} {unit}" + (f" in y, {x:.4g} {unit} in x" if x != y else "")


def radii_text(
    estimator: RadiiEstimator, stds: Float[np.ndarray, "channels axes"] | None = None
) -> str:
    """The radii of all channels, in pixels with their uncertainty where it is known."""
    texts = []
    for number, (*frames, y, x) in enumerate(estimator.radii.tolist()):
        text = yx_text(y, x, "px")
        if stds is not None and np.isfinite(stds[number, -2:]).all():
            std_y, std_x = np.maximum(stds[number, -2:], 0.01).tolist()
            text += f" (+- {std_y:.2f}, {std_x:.2f})"
        texts.append(", ".join([text, *(f"{count:.4g} frames" for count in frames)]))
    return "; ".join(texts)


def clip_rows(estimator: RadiiEstimator) -> dict[str, str]:
    if not isinstance(estimator, LocalMean):
        return {}
    clip = estimator.clip
    return {"clip": "none" if clip is None else f"{float(clip.threshold):.3g} deviations"}


def check_output(path: Path, suffix: str, *, overwrite: bool) -> None:
    """Raise before the work what `write_whole` would raise after it."""
    if path.suffix.lower() != suffix:
        raise UsageError(f"{path}: give a name that ends in {suffix}")
    check_name(path)
    check_destination(path, overwrite=overwrite)
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is not a regular file; choose another name")


def check_name(path: Path) -> None:
    """Refuse a name that the system does not take, as one that is too long."""
    with refusing(f"{path}: cannot be written"), contextlib.suppress(FileNotFoundError):
        draft_of(path).lstat()


def write_calibration(
    path: Path, estimator: RadiiEstimator, about: Mapping[str, Any]
) -> str:
    """Write an estimator and what its calibration found as JSON; return the text. A figure
    of another calibration is removed."""
    fields = json.loads(estimator.to_json()) | {"calibration": about}
    text = json.dumps(fields, indent=2, allow_nan=False)
    write_whole(path, text.encode())
    path.with_suffix(".png").unlink(missing_ok=True)
    return text


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, and give it its own when it is complete."""
    draft = draft_of(path)
    with contextlib.ExitStack() as end, refusing(f"{path}: cannot be written"):
        end.callback(draft.unlink, missing_ok=True)
        draft.write_bytes(content)
        draft.replace(os.path.realpath(path))
