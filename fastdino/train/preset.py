"""--preset small: what takes the place of main_dino's defaults where there are few images, found in the images."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdino.data.channels import Converted, ImageFormat, channels_of, converted, open_images
from fastdino.data.decode import BadImage, open_image
from fastdino.data.sequences import dataset_source
from fastdino.data.sources import ImageSource
from fastdino.errors import UserError
from fastdino.train.config import TrainConfig
from fastdino.train.recipes import SMALL, SMALL_FOLDER, from_weights, small

MEASURED = 33  # images whose size is looked up, spread over all of them
# A flag of these says what is to be learned and how: whoever gives one has a recipe of his own. But for --recipe, which
# has values in the preset, and --epochs, which says how much of it.
GROUPS = ("Recipe", "Model", "Teacher", "Optimisation", "Crops")
RECIPE_FLAGS = {f.name for f in fields(TrainConfig) if f.metadata["group"] in GROUPS} - {"preset", "recipe", "epochs"}


def is_small(source: ImageSource) -> bool:
    """Whether `auto` means small."""
    return len(source) <= SMALL_FOLDER


def short_side(source: ImageSource) -> int:
    """The median short side of the images, in pixels; 0 where none of those looked at can be read."""
    sides = []
    for i in np.linspace(0, len(source) - 1, min(MEASURED, len(source)), dtype=int):
        with suppress(OSError, BadImage):  # the run names them
            opened = open_image(source[int(i)], channels=channels_of(source))
            sides.append(min(opened.width, opened.height))
    return int(np.median(sides)) if sides else 0


def values(source: ImageSource, n_processes: int = 1, recipe: str = "dino") -> dict[str, Any]:
    """What the preset gives for these images, by flag."""
    return small(len(source), short_side(source), n_processes, recipe)


def _of_run(given: Mapping[str, Any]) -> str:
    """The preset of the run in the output folder that is gone on with, with more epochs, say; `auto` where none is."""
    folder = Path(given.get("output_dir", TrainConfig.output_dir))
    if not given.get("resume", True) or not (folder / "checkpoint.pth").exists():
        return "auto"
    with suppress(OSError, ValueError, AttributeError):
        return "small" if json.loads((folder / "args.json").read_text()).get("preset") == "small" else "none"
    return "auto"


def _recipe(given: Mapping[str, Any]) -> str:
    return str(given.get("recipe", TrainConfig.recipe))


def _above(few: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags somebody gave, above those of the preset."""
    its_own = from_weights({}) if given.get("init") else {}  # whose architecture it is then
    return {**{name: value for name, value in few.items() if name not in its_own}, **given}


def before_images(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as far as they can be checked before the images are looked for.

    With --preset small above what it gives for the smallest folder, which contradicts least.
    """
    return _above(small(0, 0, recipe=_recipe(given)), given) if given.get("preset") == "small" else dict(given)


def with_preset(
    given: Mapping[str, Any], n_processes: int, dataset: Any = None, backbone: Any = None
) -> tuple[dict[str, Any], ImageSource | None]:
    """The flags somebody gave above those of the preset; the images, where they had to be opened for that.

    `auto` is small for a small folder (or dataset) where nothing of RECIPE_FLAGS, and no backbone, is given; but a run
    that is gone on with keeps what it has. Raises UserError where the images are not there.
    """
    asked = given.get("preset", "auto")
    asked = _of_run(given) if asked == "auto" else asked
    has_recipe = backbone is not None or bool(RECIPE_FLAGS & given.keys())
    has_images = dataset is not None or bool(given.get("data_path"))
    if not has_images or asked not in ("auto", "small") or (asked == "auto" and has_recipe):
        return {**given, **({"preset": asked} if has_images and asked != "auto" else {})}, None
    try:
        as_given = given.get("channels", 3), tuple(given.get("value_range", ()))
        wanted = ImageFormat(*as_given, exif_turn=given.get("exif_turn", SMALL["exif_turn"]))
    except ValueError as error:
        raise UserError(f"--{error}") from error
    source = open_images(given["data_path"], wanted) if dataset is None else dataset_source(dataset, "dataset", wanted)
    if asked == "auto" and not is_small(source):
        stored = source.source if isinstance(source, Converted) else source
        return dict(given), converted(stored, replace(wanted, exif_turn=given.get("exif_turn", False)))
    return {**_above(values(source, n_processes, _recipe(given)), given), "preset": "small"}, source
