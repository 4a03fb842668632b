"""Draws the map of the house: each part, what it does, and what it imports.

    python docs/make_map.py [FOLDER]

Docstrings and imports are read from the source. An import that follows from others is left
out. It writes house.svg to docs/pages/figures, or to FOLDER.
"""

import ast
import sys
import textwrap
from html import escape
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "jaxbkgd"

# The column and the row of each part; imports point downwards.
PLACES = {
    "_napari": (0, 0),
    "_cli": (2, 0),
    "_batch": (1, 1),
    "_calibration": (1, 2),
    "_simulation": (2, 2),
    "smlmlp": (3, 2),
    "_estimators": (2, 3),
    "_movies": (0, 4),
    "_workers": (1, 4),
    "_filter": (2, 4),
}
_COLUMN, _ROW, _BOX_WIDTH, _BOX_HEIGHT, _EDGE = 226, 132, 202, 88, 8
_LINE_CHARACTERS = 29


def files_of(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def summary(part: str) -> str:
    """The first paragraph of the docstring, up to a semicolon."""
    text = ast.get_docstring(ast.parse(files_of(part)[0].read_text("utf-8"))) or ""
    sentence = " ".join(text.split("\n\n")[0].split()).replace("`", "").split(";")[0]
    return sentence.removesuffix(".")


def imported_by(part: str) -> set[str]:
    """The other parts that a part imports."""
    level = 2 if (PACKAGE / part).is_dir() else 1
    names = set()
    for file in files_of(part):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == level:
                found = [node.module] if node.module else [a.name for a in node.names]
                names |= {name.split(".")[0] for name in found}
    return names & set(PLACES) - {part}


def arrows() -> list[tuple[str, str]]:
    """Imports from part to part, without those that follow from others."""
    direct = {part: imported_by(part) for part in PLACES}
    reached: dict[str, set[str]] = {}
    for part in sorted(PLACES, key=lambda part: -PLACES[part][1]):
        reached[part] = direct[part].union(*(reached[name] for name in direct[part]))
    return [
        (part, name)
        for part in PLACES
        for name in sorted(direct[part], key=lambda name: PLACES[name])
        if not any(name in reached[other] for other in direct[part])
    ]


def draw() -> str:
    """The map as SVG."""
    columns, rows = (max(places) for places in zip(*PLACES.values(), strict=True))
    width = columns * _COLUMN + _BOX_WIDTH + 2 * _EDGE
    height = rows * _ROW + _BOX_HEIGHT + 2 * _EDGE
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222222">',
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#1b6ca8"/></marker>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    drawn = arrows()
    for source, target in drawn:
        x0 = _end_of_arrow(source, target, [t for s, t in drawn if s == source])
        x1 = _end_of_arrow(target, source, [s for s, t in drawn if t == target])
        y0 = _EDGE + PLACES[source][1] * _ROW + _BOX_HEIGHT
        y1 = _EDGE + PLACES[target][1] * _ROW - 1
        bend = (y1 - y0) * 2 // 3
        lines.append(
            f'<path d="M{x0} {y0}C{x0} {y0 + bend} {x1} {y1 - bend} {x1} {y1}" '
            'fill="none" stroke="#1b6ca8" stroke-width="1.5" marker-end="url(#head)"/>'
        )
    for part, (column, row) in PLACES.items():
        x, y = _EDGE + column * _COLUMN, _EDGE + row * _ROW
        lines.append(
            f'<rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="6" '
            'fill="#eef4fa" stroke="#1b6ca8"/>'
        )
        name = f'<tspan font-weight="bold" font-size="14">{part}</tspan>'
        words = textwrap.wrap(escape(summary(part), quote=False), _LINE_CHARACTERS)
        for line, text in enumerate([name, *words]):
            lines.append(f'<text x="{x + 10}" y="{y + 22 + 17 * line}">{text}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _end_of_arrow(part: str, other: str, others: list[str]) -> int:
    """Where the arrow between a part and another one meets it: in the order of the others
    from left to right."""
    place = sorted(others, key=lambda name: PLACES[name]).index(other) + 1
    left = _EDGE + PLACES[part][0] * _COLUMN
    return left + _BOX_WIDTH * place // (len(others) + 1)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "pages/figures"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "house.svg").write_text(draw(), encoding="utf-8")
    print(f"wrote {folder / 'house.svg'}")
