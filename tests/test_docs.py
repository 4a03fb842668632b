"""README, docs, notebooks and examples say what is so: their code runs, README's commands
are where `.ci/run` looks for them, every public name has an entry, and every file is at
home."""

import importlib.util
import inspect
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt

import jaxbkgd


pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "pages" / "notebooks").glob("*.ipynb"))
# What is of this repository: beside it lie caches, environments and outputs.
FILES = sorted(
    path
    for pattern in (
        *("*.cff", "*.md", "*.toml", ".gitignore"),
        *(f"{tree}/**/*" for tree in (".ci", "docs", "examples", "jaxbkgd", "tests")),
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and "__pycache__" not in path.parts
)

# Package registries, and the folders in which this was written.
FOREIGN = re.compile(
    r"(pypi|pythonhosted|npmjs|debian)\.(org|com)|/(work|root|farm|home)/[a-z.]"
)


@pytest.fixture
def small_movies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated movies are small, and of one size and density, for which programs are
    compiled once. Where nothing else is asked for, they are that of calibration.md."""
    small: Any = {"frame_count": 40, "height_pix": 64, "width_pix": 64}
    small |= {"molecules_per_frame": 5.0}
    usual: Any = {"bkgd_length_scale_pix": 8.0}
    simulate = jaxbkgd.simulate_movie

    def simulate_small(key: jax.Array, **options: Any) -> Any:
        return simulate(key, **usual | options | small)

    monkeypatch.setattr(jaxbkgd, "simulate_movie", simulate_small)


def fenced_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.mark.long
@pytest.mark.usefixtures("small_movies")
@pytest.mark.parametrize(
    "page",
    [page for page in (README, *PAGES) if fenced_blocks(page, "python")],
    ids=lambda page: page.name,
)
def test_code_on_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    variables = {}
    for block in fenced_blocks(page, "python"):
        # smlmlp needs Python 3.12, and is installed where it is compared with.
        if "import smlmlp" in block and importlib.util.find_spec("smlmlp") is None:
            continue
        exec(compile(block, page.name, "exec"), variables)


def cells_of(notebook: Path, kind: str) -> list[str]:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@pytest.mark.long
@pytest.mark.usefixtures("small_movies")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_code_in_a_notebook_runs_from_top_to_bottom(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    variables = {}
    for number, cell in enumerate(cells_of(notebook, "code")):
        exec(compile(cell, f"{notebook.name}, code {number}", "exec"), variables)
        for figure in plt.get_fignums():
            plt.figure(figure).savefig("figure.png")
        plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_kept_without_outputs(notebook: Path):
    # They are as large as all the rest, and another one in each run.
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_the_map_of_the_house_is_that_of_its_imports():
    script = runpy.run_path(str(ROOT / "docs" / "make_map.py"))
    parts = {path.stem for path in (ROOT / "jaxbkgd").glob("*") if path.name != "py.typed"}
    left_out = {"__init__", "__main__", "__pycache__", "_version"}
    assert parts - left_out == set(script["PLACES"])
    house = ROOT / "docs" / "pages" / "figures" / "house.svg"
    assert house.read_text("utf-8") == script["draw"](), "run docs/make_map.py"


@pytest.mark.long
@pytest.mark.usefixtures("small_movies")
def test_the_quick_start_writes_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "quick_start.py"))
    assert (tmp_path / "quick_start.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.usefixtures("small_movies")
def test_the_example_of_calibration_comes_to_the_same_radii_from_all_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calibrate = jaxbkgd.calibrate

    def towards_five(estimator: Any, channels: Any, frame_indices: Any) -> jax.Array:
        return jnp.sum(jnp.log(estimator.radii_pix / 5) ** 2)

    def calibrate_quickly(channels: Any, start: Any, steps: int, **_: Any) -> Any:
        """To 5 px: objectives and what they find have tests of their own."""
        return calibrate(
            channels, start, objective=towards_five, steps=steps, progress=False
        )

    monkeypatch.setattr(jaxbkgd, "calibrate", calibrate_quickly)
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(ROOT / "examples" / "calibrate.py"))
    histories = example["main"](size_pix=64, frame_count=40, starts_pix=(2, 25))
    small, large = (history.radii[-1] for history in histories)
    np.testing.assert_allclose(small, 5, rtol=3e-3)
    # They have settled to a thousandth, each from its side.
    np.testing.assert_allclose(small, large, rtol=3e-3)
    assert (tmp_path / "calibrate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.usefixtures("small_movies")
def test_the_example_of_a_whole_movie_writes_what_the_estimator_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def calibrate(few: Any, start: jaxbkgd.SpatialMean) -> tuple[Any, None]:
        """What is found from there, whose search has tests of its own."""
        assert few.shape == (40, 64, 64)
        return jaxbkgd.SpatialMean(5.0, max_radius_pix=start.max_radius_pix), None

    monkeypatch.setattr(jaxbkgd, "calibrate", calibrate)
    example = runpy.run_path(str(ROOT / "examples" / "whole_movie.py"))
    # The second time, from the movie that there is, in the place of what there was.
    example["main"](tmp_path, frame_count=40, size_pix=64)
    estimator, summaries = example["main"](tmp_path, frame_count=40, size_pix=64)
    assert [summary.frames for summary in summaries.values()] == [40, 40]
    assert (tmp_path / "whole_movie.png").read_bytes().startswith(b"\x89PNG")
    movie, bkgds, snr = (
        jaxbkgd.open_movie(tmp_path / name).channels[0][:]
        for name in ("movie.tif", "background.ome.tif", "snr.ome.tif")
    )
    (factor,) = summaries["snr"].noise_corrections
    # A few roundings of float32: a kernel that is traced has another order.
    np.testing.assert_allclose(bkgds, estimator(movie - 100.0).bkgds, rtol=1e-5)
    expected = jaxbkgd.snr(movie - 100.0 - bkgds, bkgds, noise_correction=factor, gain=0.46)
    # Some roundings of float32, of residuals that are smaller than what they are left of.
    np.testing.assert_allclose(snr, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("small_movies")
def test_the_example_from_smlmlp_has_less_error_and_fewer_false_maxima(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def calibrate(channels: Any, start: jaxbkgd.LocalMean) -> tuple[Any, None]:
        """What is found from there, whose search has tests of its own."""
        assert start.max_radii == (120.0, 20.0, 20.0)
        return jaxbkgd.LocalMean(5.0, 100.0), None

    monkeypatch.setattr(jaxbkgd, "calibrate", calibrate)
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(ROOT / "examples" / "from_smlmlp.py"))
    backgrounds = example["main"](size_pix=64, frame_count=40)
    theirs, exact, _ = backgrounds.values()
    # The truncation of the kernel is what differs.
    np.testing.assert_allclose(theirs.bkgds[0], exact.bkgds[0], rtol=0.01)
    assert theirs.noise_corrections[0] < 0.9 < exact.noise_corrections[0] < 1
    columns = [
        line.removeprefix(name).split()
        for line in capsys.readouterr().out.splitlines()
        for name in backgrounds
        if line.startswith(name)
    ]
    errors = [float(error) for error, *_ in columns]
    assert errors[2] < errors[0] / 2
    # smlmlp, which finds the maxima, needs Python 3.12.
    if importlib.util.find_spec("smlmlp") is not None:
        right, false = np.array([(row[2], row[4]) for row in columns], int).T
        assert np.all(false[1:] < false[0] / 2)
        assert right[2] > right[1] > 0
    assert (tmp_path / "from_smlmlp.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_picasso_finds_more_and_better_without_a_background(tmp_path: Path):
    # Picasso is large, and no part of what the tests install.
    pytest.importorskip("picasso")
    example = runpy.run_path(str(ROOT / "examples" / "picasso_localize.py"))
    found = example["main"](tmp_path, frame_count=60, size_pix=64)
    frames, flat = (
        found[f"detailed, {way}, gausslq"]
        for way in ("frames", "residuals + offset + mean background")
    )
    assert flat["right"] > 1.2 * frames["right"]
    assert flat["error (px)"] < 0.7 * frames["error (px)"]


def test_readme_has_two_commands_that_each_stand_alone():
    lines = [
        line
        for line in README.read_text().splitlines()
        if line.startswith("python3 -m venv")
    ]
    # As a shell reads them; a line of its own in a block can be copied.
    demo, tests = ([*map(shlex.split, line.split(" && "))] for line in lines)
    assert [f"{line}\n" for line in lines] == [
        block for block in fenced_blocks(README, "sh") if "venv" in block
    ]
    for command in (demo, tests):
        assert command[0] == ["python3", "-m", "venv", ".venv"]
        assert command[1][:2] == [".venv/bin/pip", "install"]
        assert len(command) == 3
    assert demo[2] == [".venv/bin/jaxbkgd", "demo"]
    assert tests[2][:3] == [".venv/bin/python", "-m", "pytest"]


def test_the_citation_has_the_version_of_the_package():
    versions = [
        re.findall(pattern, (ROOT / name).read_text(), re.M)
        for name, pattern in {
            "CITATION.cff": r"^version: (.+)$",
            "pyproject.toml": r'^version = "(.+)"$',
        }.items()
    ]
    assert len(versions[0]) == 1
    assert versions[0] == versions[1]


def test_the_tested_package_is_the_one_of_this_repository():
    assert Path(jaxbkgd.__file__).parent == ROOT / "jaxbkgd"


def test_every_public_name_has_an_entry_in_the_api():
    entries = re.findall(
        r"^::: (\S+)", (ROOT / "docs" / "pages" / "api.md").read_text(), re.M
    )
    names = {
        f"jaxbkgd.{name}"
        for name in dir(jaxbkgd)
        if not name.startswith("_") and not inspect.ismodule(getattr(jaxbkgd, name))
    }
    assert names | {"jaxbkgd.smlmlp.bkgd_spatial_mean"} <= set(entries)


@pytest.mark.parametrize("page", [README, *PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_links_to_files_of_this_repository_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [
        link
        for link in links
        if not link.startswith("https://") and not (page.parent / link).exists()
    ]
    assert missing == []


def test_no_file_names_a_registry_or_a_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(
            path.read_bytes().decode(errors="replace").splitlines(), 1
        )
        if FOREIGN.search(line)
    ]
    assert found == []


@pytest.mark.slow
def test_pictures_are_small():
    # They are a part of every clone.
    sizes = {path.name: path.stat().st_size for path in FILES if path.suffix == ".png"}
    assert sizes
    assert max(sizes.values()) < 100_000, sizes
