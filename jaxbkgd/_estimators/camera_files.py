"""What files say of a camera: of jaxbkgd, TIFF and Picasso."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


NAMES = ("offset_adu", "gain_electrons_per_adu", "read_noise_electrons")


def read_values(path: Path) -> Any:
    """What a file of a camera holds by name, by its suffix; `ValueError` for another."""
    match path.suffix.lower():
        case ".json":
            return json.loads(path.read_text("utf-8"))
        case ".npz":
            with path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    raise ValueError("is no .npz, or is cut short; write it again.")
                file.seek(0)
                with np.load(file) as arrays:
                    return dict(arrays)
        case ".tif" | ".tiff":
            import tifffile

            # Programs write the three as one series of pages, or as one each.
            with tifffile.TiffFile(path) as tiff:
                stacks = [series.asarray() for series in tiff.series]
            pages = [p for stack in stacks for p in (stack if stack.ndim > 2 else [stack])]
            if len(pages) != 3:
                rule = "give three: offset, gain and read noise"
                raise ValueError(f"has {len(pages)} pages; {rule}.")
            # A map of one pixel is how `save` writes a number.
            maps = [page.item() if page.size == 1 else page for page in pages]
            return dict(zip(NAMES, maps, strict=True))
        case ".yaml" | ".yml":
            import yaml

            try:
                settings = list(yaml.safe_load_all(path.read_text("utf-8")))
            except (yaml.YAMLError, RecursionError) as error:
                raise ValueError(f"is no YAML ({' '.join(str(error).split())}).") from error
            modes = dict(_picasso_modes(settings))
            if len(modes) == 1:
                return dict(zip(NAMES, *modes.values(), strict=False))
            texts = [f"{name}: {gain:g}" for name, (_, gain) in [*modes.items()][:20]]
            what = f"holds the settings of {len(modes)} cameras or modes of Picasso"
            raise ValueError(f"{what} ({'; '.join(texts)}); give offset and gain of one.")
    raise ValueError("a camera is a .json, .npz, .tif, or a .yaml of Picasso; give one.")


def _picasso_modes(settings: Any, name: str = "") -> Iterator[tuple[str, tuple]]:
    """The offset and the gain of each camera and readout mode in settings of Picasso, whose
    sensitivity is in electrons per ADU, before the EM gain."""
    if isinstance(settings, list):
        for inner in settings:
            yield from _picasso_modes(inner, name)
    elif isinstance(settings, dict) and {"Baseline", "Sensitivity"} <= settings.keys():
        em_gain = float(settings.get("Gain", 1))
        # The gain of an EMCCD is half, for its noise.
        share = em_gain * (2 if em_gain > 1 else 1)
        for mode, sensitivity in _numbers(settings["Sensitivity"], name):
            yield mode, (float(settings["Baseline"]), sensitivity / share)
    elif isinstance(settings, dict):
        for key, inner in settings.items():
            yield from _picasso_modes(inner, f"{name} {key}".strip())


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        entries = enumerate(value, 1) if isinstance(value, list) else value.items()
        for key, inner in entries:
            yield from _numbers(inner, f"{name} {key}".strip())
    else:
        yield name, float(value)
