"""The page of background_accuracy.py: its tables and figures, from what was measured."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from accuracy_bound import Bound
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image


LEARNED, USUAL = "LocalMean, learned", "LocalMean, as it is"
OURS = (LEARNED, USUAL, "SpatialMean, learned", "SpatialMean, r = 7")
NONE = "-"

PAGE = """# Accuracy of the background

After this page you know how close each estimator comes to the truth, and how close any
could.

{summary}

![The error of each estimator in each scene, and the limit](figures/background_accuracy.png)

Simulated movies of {frames} frames of {height} x {width} px, of {count} scenes: kinds of
background, molecules and light (`examples/scenes.py`). `LocalMean` learns its radii from
the movie by itself. The others get the setting that is best for the scene by the truth,
which nobody has in an experiment; smlmlp's mean, opening and pipeline have their defaults,
and the rolling ball sees one frame in ten. In `sCMOS-maps`, all get frames that its maps
have made even. Those marked "(paper)" or "(source)" have no
package that installs beside the others; `examples/rivals.py` follows their paper or source.

## Root-mean-square error (e-)

{errors}
The smallest error of a scene is bold. Means are geometric, over the scenes that both have.

## The limit

The limit is the Bayesian Cramér-Rao bound (van Trees, 1968). It knows the law that the
scene draws its background from, the camera and all molecules
(`examples/accuracy_bound.py`). No estimator has a smaller mean squared error over draws,
and one that has to find the law and the molecules in the movie has a larger one.
*Efficiency* is the limit divided by the error of `LocalMean, learned`.

† Scenes with one fixed background have no law to draw it from. Here the limit is the error
of the best linear filter (Wiener's) for that very background: a bound for filters, not for
all estimators. No limit is given where the shape of the background changes (blob, drift,
second pattern).

{losses}
## Mean error (% of the local background)

{biases}
## How it is made

One command makes the page and its figures, and goes on where it was interrupted:

```sh
pip install -e ".[bench]" smlmlp arrlp picassosr sep photutils scikit-image
python examples/background_accuracy.py docs/pages
```
"""

LOSSES = """### What the rest is lost to

Root-mean-square errors (e-) with the radii that were learned from each movie. From
*molecules left out* on, each column takes away one more cause.

{table}
- *600 frames*: as learned, but with this radius in time; `calibrate` tries 120 at most.
- *molecules left out*: weight 0 where they add more than 1 e-.
- *no molecules*: a movie of the same background without them.
- *no clip*, *steady light*: that movie with `clip=None`, then also with
  `illumination_rank=0`.
- *inner half*: of that, the pixels a quarter of the frame or more from its borders.

The light of faint molecules and of outskirts costs the most where molecules are dense or
the background is smooth. Next are borders, where the edge pixel is repeated, and radii in
time that end at 120 frames. Where structure is as fine as a few pixels, the kernel and the
clip cost the most: one Gaussian serves the whole frame, and the clip takes fine structure
for molecules. That the light of each frame is free costs almost nothing.

### What other kernels would gain

Errors (e-) of 300 frames without molecules in steady light, whose mean is smoothed in
space, the mean of eight draws (`examples/kernels_tried.py`). `LocalMean` is of order 4; the
first three have the radius that is best by the truth, and *local radii* one for each pixel:

| scene | G | order 4 | order 6 | order 4, local radii | Wiener, learned | Wiener, true |
| --- | --- | --- | --- | --- | --- | --- |
| scale-6 | 0.338 | 0.204 | 0.179 | 0.207 | 0.193 | 0.192 |
| scale-20 | 0.154 | 0.097 | 0.088 | 0.091 | 0.120 | 0.118 |
| scale-40 | 0.109 | 0.076 | 0.070 | 0.068 | 0.099 | 0.097 |
| cell-edge | 0.353 | 0.254 | 0.237 | 0.234 | 0.222 | 0.221 |

A kernel of order 6, which smooths once more, would gain 7 to 12 %, and local radii up to
10 %, but nothing in fine structure. A Wiener filter with a spectrum learned
from the movie is as good as with the true one, and better only at the edge of the cell: a
spectrum is the same in the whole frame, and has no edges.

### Single frames

20 frames, each by itself, without molecules, at the best radius by the truth:

{singles}
"""


@dataclass(frozen=True)
class Result:
    """How far an estimator is from the true background of a scene.

    `rms_electrons` is the root-mean-square error over all pixels and frames, and
    `bias_percent` the mean of the error as a share of the local background. `setting` is
    what was chosen or learned.
    """

    scene: str
    estimator: str
    setting: str
    rms_electrons: float
    bias_percent: float


@dataclass(frozen=True)
class Report:
    """What was measured, and by scene its limit and the experiments about losses."""

    movie_shape: tuple[int, int, int]
    results: list[Result] = field(default_factory=list)
    limits: dict[str, Bound | None] = field(default_factory=dict)
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    single_frames: dict[str, dict[str, float]] = field(default_factory=dict)


def errors_by_scene(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Of each scene, the root-mean-square error of each estimator, in electrons; NaN where
    it has not been measured. The estimators that win come first."""
    names = dict.fromkeys(result.estimator for result in results)
    names = sorted(names, key=lambda name: [*OURS[:2], name].index(name))
    errors = {result.scene: dict.fromkeys(names, np.nan) for result in results}
    for result in results:
        errors[result.scene][result.estimator] = result.rms_electrons
    return errors


def geometric_mean(numbers: Iterable[float]) -> float:
    """Of those that are not NaN."""
    kept = [number for number in numbers if not np.isnan(number)]
    return float(np.exp(np.mean(np.log(kept)))) if kept else np.nan


def mean_ratio(errors: Mapping[str, Mapping[str, float]], name: str, base: str) -> float:
    """The mean over scenes of an estimator's error as a ratio to the base's."""
    return geometric_mean(row[name] / row[base] for row in errors.values())


def best_rivals(errors: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The closest of others in each scene."""
    found = {}
    for scene, row in errors.items():
        others = {n: e for n, e in row.items() if n not in OURS and not np.isnan(e)}
        if others:
            found[scene] = min(others, key=lambda name: others[name])
    return found


def efficiencies(report: Report) -> dict[str, float]:
    """The limit over the error of what learned its radii; NaN where either is missing."""
    found = {}
    for scene, row in errors_by_scene(report.results).items():
        limit = report.limits.get(scene)
        found[scene] = limit.rms_electrons / row.get(LEARNED, np.nan) if limit else np.nan
    return found


def _number(value: float, digits: int = 2) -> str:
    return NONE if np.isnan(value) else f"{value:.{digits}f}"


def table(report: Report) -> str:
    """Errors in electrons, the smallest of a scene in bold, and their means over scenes;
    after ours, the limit and the efficiency."""
    errors = errors_by_scene(report.results)
    names = list(next(iter(errors.values())))
    place = sum(name in OURS[:2] for name in names)
    shares = efficiencies(report)
    header = ["scene", *names[:place], "limit", "efficiency", *names[place:]]
    lines = [header, ["---"] * len(header)]
    for scene, row in errors.items():
        best = np.nanmin([*row.values()])
        cells = [f"**{e:.2f}**" if e == best else _number(e) for e in row.values()]
        limit = report.limits.get(scene)
        mark = " †" if limit and limit.kind == "filters" else ""
        shown = f"{_number(limit.rms_electrons, 3)}{mark}" if limit else NONE
        share = f"{_number(shares[scene])}{mark if not np.isnan(shares[scene]) else ''}"
        lines.append([scene, *cells[:place], shown, share, *cells[place:]])
    if LEARNED in names:
        ratios = [_number(mean_ratio(errors, name, LEARNED)) for name in names]
        mean = [_number(geometric_mean(share for share in shares.values()))] * 2
        label = f"mean ratio to {LEARNED}"
        lines.append([label, *ratios[:place], *mean, *ratios[place:]])
    return _markdown(lines)


def bias_table(results: Sequence[Result]) -> str:
    """Mean errors as shares of the local background, in percent."""
    biases = {(r.scene, r.estimator): r.bias_percent for r in results}
    errors = errors_by_scene(results)
    names = list(next(iter(errors.values())))
    lines = [["scene", *names], ["---"] * (1 + len(names))]
    for scene in errors:
        row = [biases.get((scene, name), np.nan) for name in names]
        lines.append([scene, *(NONE if np.isnan(bias) else f"{bias:+.2f}" for bias in row)])
    return _markdown(lines)


def _rows(by_scene: Mapping[str, Mapping[str, float]]) -> str:
    names = list(next(iter(by_scene.values())))
    lines = [["scene", *names], ["---"] * (1 + len(names))]
    for scene, row in by_scene.items():
        lines.append([scene, *(_number(row[name], 3) for name in names)])
    return _markdown(lines)


def _losses(report: Report) -> str:
    """The part of the page that says what is lost to what; empty without experiments."""
    if not (report.losses and report.single_frames):
        return ""
    by_scene = {}
    for scene, row in report.losses.items():
        limit = report.limits.get(scene)
        by_scene[scene] = {**row, "limit": limit.rms_electrons if limit else np.nan}
    singles = {
        scene: {**row, "efficiency": row["limit"] / row["error"]}
        for scene, row in report.single_frames.items()
    }
    return LOSSES.format(table=_rows(by_scene), singles=_rows(singles))


def summary(report: Report) -> str:
    """How often ours is the closest, and how much farther others are."""
    errors = errors_by_scene(report.results)
    rivals = best_rivals(errors)
    if LEARNED not in next(iter(errors.values())) or not rivals:
        return "Few estimators are installed here."
    lost = [s for s, name in rivals.items() if errors[s][name] < errors[s][LEARNED]]
    means = {name: mean_ratio(errors, name, LEARNED) for name in set(rivals.values())}
    nearest = min(means, key=lambda name: means[name])
    of_best = geometric_mean(errors[s][n] / errors[s][LEARNED] for s, n in rivals.items())
    shares = [share for share in efficiencies(report).values() if not np.isnan(share)]
    where = f"all but {', '.join(f'`{s}`' for s in lost)}" if lost else "all"
    text = (
        f"`{LEARNED}` is the closest to the truth in {where} of {len(rivals)} scenes. The "
        f"best rival on average over scenes, {nearest}, has {means[nearest]:.1f} times its "
        f"error; the best rival of each scene, picked by the truth, {of_best:.1f} times."
    )
    if shares:
        text += (
            f" Its efficiency, the limit over its error, is {min(shares):.2f} to "
            f"{max(shares):.2f}, and {geometric_mean(shares):.2f} on average."
        )
    return text


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(report: Report, styles: Mapping[str, str], path: Path) -> None:
    """The error of each estimator, scene by scene, and the limit."""
    errors = errors_by_scene(report.results)
    places = np.arange(len(errors))
    figure = Figure((8.5, 1.9 + 0.2 * len(errors)), dpi=80, layout="constrained")
    axes = figure.subplots()
    limits = [report.limits.get(scene) for scene in errors]
    levels = [limit.rms_electrons if limit else np.nan for limit in limits]
    axes.barh(places, levels, 0.9, left=1e-3, color="0.85", label="below the limit")
    for name, style in styles.items():
        if name in next(iter(errors.values())):
            values = [row[name] for row in errors.values()]
            size, order = (11, 4) if name == LEARNED else (5, 3)
            axes.plot(values, places, style, ms=size, zorder=order, label=name)
    axes.set(
        xscale="log",
        xlabel="root-mean-square error of the background (e-)",
        yticks=places,
        yticklabels=list(errors),
        xlim=(max(2e-3, 0.7 * np.nanmin([0.05, *levels])), None),
        ylim=(len(errors) - 0.4, -0.6),
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(axis="y", lw=0.4)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    # Few colours make it a third as large.
    drawn = BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(48).save(path, optimize=True)


def draw_maps(images: Mapping[str, np.ndarray], names: Sequence[str], path: Path) -> None:
    """A frame, its background, and the errors of some estimators on one scale."""
    truth = images["truth"]
    errors = {name: images[name] - truth for name in names if name in images}
    bound = np.percentile(np.abs(list(errors.values())), 99)
    panels = [
        ("frame (e-)", images["frame"], "magma", *np.percentile(images["frame"], [1, 99])),
        ("truth (e-)", truth, "magma", truth.min(), truth.max()),
        *(
            (f"error of {name} (e-)", error, "RdBu_r", -bound, bound)
            for name, error in errors.items()
        ),
    ]
    figure = Figure((8.5, 5.2), dpi=100, layout="constrained")
    every_axes = list(figure.subplots(2, 3).flat)
    for axes in every_axes:
        axes.set_axis_off()
    for axes, (title, image, colours, low, high) in zip(every_axes, panels, strict=False):
        colours = colormaps[colours].resampled(48)
        shown = axes.imshow(image, cmap=colours, vmin=low, vmax=high)
        figure.colorbar(shown, ax=axes, shrink=0.9)
        axes.set_title(title, fontsize=9)
    # Noise hardly compresses, but with few colours it is small enough.
    figure.savefig(path, pil_kwargs={"optimize": True})


def read(path: Path, movie_shape: tuple[int, int, int]) -> Report:
    """What has been measured already."""
    if not path.exists():
        return Report(movie_shape)
    kept = json.loads(path.read_text())
    if kept["movie_shape"] != list(movie_shape):
        raise SystemExit(
            f"{path} is of movies of {kept['movie_shape']}, not of {list(movie_shape)}; "
            "give another folder."
        )
    limits = kept.get("limits", {}).items()
    return Report(
        movie_shape,
        [Result(**fields) for fields in kept["results"]],
        {scene: Bound(**fields) if fields else None for scene, fields in limits},
        kept.get("losses", {}),
        kept.get("single_frames", {}),
    )


def write(report: Report, styles: Mapping[str, str], folder: Path) -> None:
    """The .json, the page and its figure."""
    path = folder / "background_accuracy.json"
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")
    frame_count, height_pix, width_pix = report.movie_shape
    scenes = dict.fromkeys(result.scene for result in report.results)
    page = PAGE.format(
        summary=summary(report),
        frames=frame_count,
        height=height_pix,
        width=width_pix,
        count=len(scenes),
        errors=table(report),
        losses=_losses(report),
        biases=bias_table(report.results),
    )
    path.with_suffix(".md").write_text(page)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    draw(report, styles, figures / "background_accuracy.png")
