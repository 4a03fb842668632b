"""The benchmark runs, and its results have the structure that the docs page relies on.
How fast anything is depends on the machine, and is not tested."""

import importlib
import json
import math
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BEFORE, AFTER = "# A page\n", "\nand its end\n"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("benchmark")


@pytest.fixture(scope="module")
def folder(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one tiny run writes, on a page with text around the tables. All that its
    processes measure is measured in this one."""

    class Here:
        def __init__(self, name: str):
            self.name = name
            self.description = benchmark.description_of_process()

        def measure(self, cell, rounds: int) -> dict:
            answer = benchmark.measure(self.name, cell, rounds)
            return json.loads(json.dumps(answer))

        def close(self) -> None:
            pass

    folder = tmp_path_factory.mktemp("benchmark")
    page = (ROOT / "docs/pages/performance.md").read_text()
    marks = re.findall("<!-- begin: written by benchmark.py -->|<!-- end -->", page)
    (folder / "performance.md").write_text(BEFORE + "\nold\n".join(marks) + AFTER)
    tiny = {"sizes": [24], "radii": [3.0], "megapixels": 0.003, "rounds": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "Process", Here)
        patch.setattr(benchmark, "SETTLING_SECONDS", 0)
        results = benchmark.run_benchmark(Namespace(quick=True, **tiny))
    benchmark.write(results, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict:
    return json.loads((folder / "performance.json").read_text())


@pytest.mark.long
def test_every_setting_of_every_cell_has_jaxbkgd_in_it(results: dict):
    assert [cell["dtype"] for cell in results["cells"]] == ["float32", "uint16"]
    filtering = {
        *("one thread, fresh output", "one thread, warm output"),
        *("all cores", "all cores, JAX as it starts"),
        *("plain call", "plain call, huge pages"),
    }
    for cell in results["cells"]:
        assert filtering <= set(cell["speed"])
        for setting in filtering:
            way = cell["speed"][setting]["jaxbkgd"]
            assert math.isfinite(way["mpx_per_s"])
            assert 0 < way["mpx_per_s"] <= way["fastest"]
        assert math.isfinite(cell["compile_s"])
        assert cell["frames"] == 5
    # Only frames of floats have derivatives.
    of_float, of_integers = results["cells"]
    assert {"forward", "value_and_grad", "jvp"} <= set(of_float["speed"]["gradient"])
    assert of_float["value_and_grad_outputs"] > 0
    assert "gradient" not in of_integers["speed"]


@pytest.mark.long
def test_no_way_that_was_timed_gives_other_numbers_than_the_reference(results: dict):
    ways = {
        name: way
        for cell in results["cells"]
        for ways in cell["speed"].values()
        for name, way in ways.items()
    }
    assert {"scipy: correlate1d twice, a pool over frames", "lax.conv: two passes"} <= set(
        ways
    )
    assert [name for name, way in ways.items() if "error" in way] == []


def test_one_thread_is_one_thread(benchmark: ModuleType):
    process = benchmark.Process(benchmark.ONE_THREAD_WARM)
    try:
        assert set(process.description.get("pools", {}).values()) <= {1}
        if sys.platform == "linux":
            assert process.description["cores"] == 1
        # And the process answers.
        answer = process.measure(benchmark.Cell(24, 3.0, "float32", 2), 1)
        assert answer["speed"][benchmark.ONE_THREAD_WARM]["jaxbkgd"]["mpx_per_s"] > 0
    finally:
        process.close()


def test_the_tables_replace_what_is_between_the_markers(folder: Path, results: dict):
    page = (folder / "performance.md").read_text()
    assert page.startswith(BEFORE)
    assert page.endswith(AFTER)
    assert "old" not in page
    assert "| 5 x 24² | 3 | uint16 |" in page
    machine = results["machine"]
    assert machine["cpu"] in page
    assert {"cores", "system", "python", "date"} <= set(machine)
    assert {"jax", "jaxlib", "numpy", "scipy"} <= set(machine["versions"])
    # Every row of a table has as many columns as its head.
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    figure = (folder / "figures" / "performance.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) < 100_000
