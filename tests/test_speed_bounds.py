"""The script that says what bounds the speed, on a few tiny frames."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="page faults are counted by Unix alone")
def test_it_writes_a_row_for_each_function_between_its_markers(tmp_path: Path):
    marks = re.findall(
        "<!-- (?:begin: written by|end:) speed_bounds.py -->",
        (ROOT / "docs/pages/performance.md").read_text(),
    )
    page = tmp_path / "performance.md"
    page.write_text("before\n" + "\nold\n".join(marks) + "\nafter")
    tiny = ("--sizes", "24", "--radii", "3", "--megapixels", "0.01", "--out", tmp_path)
    # In a process of its own, since XLA's profiler ends one that has other libraries.
    command = [sys.executable, ROOT / "examples" / "speed_bounds.py", *tiny]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    before, table, after = re.split("<!-- .* -->", page.read_text())
    assert (before, after) == ("before\n", "\nafter")
    rows = [
        line.strip("| ").split(" | ") for line in table.splitlines() if "| 24 |" in line
    ]
    in_full_width = "background, vectors in full width"
    names = ["x + 1", "background", in_full_width, "slope (jvp)", "value and gradient"]
    assert [row[0] for row in rows] == names
    assert {len(row) for row in rows} == {8}
    filling = {}
    for row in rows:
        whole, _, of_part, _, filling[row[0]] = map(float, row[3:])
        assert whole > 0
        assert of_part > 0
    # A sum, and a cotangent.
    assert filling["x + 1"] > 0
    assert filling["value and gradient"] > 0
