"""What --preset small learns with each recipe: k-NN on held-out images, beside main_dino's settings at as many CPU
seconds.

cd tests && python -m trials.small [--seconds 60] [--seeds 1 2 3]

Digits of scikit-learn, and parts of the photographs that scikit-image and scikit-learn carry: a class each, and held
out are parts of other places in them. main_dino's own model and crops take minutes a step on a CPU, so its settings
(65,536 prototypes, an average of 0.996 ...) are tried with the preset's model, crops and batch.
"""

import argparse
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

import fastdino
from fastdino.data.digits import load_digits
from fastdino.data.sources import open_source
from fastdino.errors import TrainingError
from fastdino.train import preset
from fastdino.train.recipes import RECIPES

PHOTOGRAPHS = """astronaut brick camera cell chelsea coffee coins grass gravel hubble_deep_field immunohistochemistry
    moon retina rocket"""
PLACES = 6  # a side: a photograph is cut into so many rows and columns
SAME = """arch patch_size drop_path_rate batch_size_per_gpu global_crops_size local_crops_size
    local_crops_number"""
Half = list[tuple[Any, int]]  # pixels and class


def digits() -> tuple[Half, Half]:
    """1,437 and 360."""
    train, held_out = ([(half[i], int(half.labels[i])) for i in range(len(half))] for half in load_digits())
    return train, held_out


def parts_of_photographs() -> tuple[Half, Half]:
    """612 and 612, of 40 pixels and more."""
    rng = np.random.default_rng(0)
    photos = [getattr(skimage.data, name)() for name in PHOTOGRAPHS.split()]
    photos += [skimage.data.stereo_motorcycle()[0], *(load_sample_image(f"{name}.jpg") for name in ("china", "flower"))]
    halves: tuple[Half, Half] = ([], [])
    for label, photo in enumerate(photos):
        pixels = np.asarray(Image.fromarray(photo).convert("RGB"))
        height, width = (n // PLACES for n in pixels.shape[:2])
        for i, place in enumerate(rng.permutation(PLACES**2)):
            y, x = int(place) // PLACES * height, int(place) % PLACES * width
            for _ in range(2):
                side = int(min(height, width) * rng.uniform(0.6, 0.95))
                top, left = y + rng.integers(height - side + 1), x + rng.integers(width - side + 1)
                halves[i % 2].append((pixels[top : top + side, left : left + side], label))
    return halves


def save(half: Half, folder: Path) -> str:
    """A folder of a folder per class."""
    for i, (pixels, label) in enumerate(half):
        path = folder / str(label) / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return str(folder)


class Clock(fastdino.Sink):
    """CPU seconds of a step, and the end of a run that has taken enough of them to know."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def step(self, entry: dict[str, Any]) -> None:
        self.times.append(time.process_time())
        if len(self.times) == 12:
            raise InterruptedError

    @property
    def seconds(self) -> float:
        return (self.times[-1] - self.times[3]) / (len(self.times) - 4)


def learn(paths: tuple[str, str], flags: dict[str, Any], seed: int, seconds: float) -> str:
    """A run of so many CPU seconds, in words."""
    run = {"data_path": paths[0], "val_path": paths[1], "seed": seed, "attention_images": 0, "num_workers": 1, **flags}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        with suppress(TrainingError):
            fastdino.train(**{**run, "knn_freq": 0, "epochs": 20}, callbacks=[clock], output_dir=f"{folder}/clock")
        source = open_source(paths[0])
        steps = len(source) // preset.values(source)["batch_size_per_gpu"]
        epochs = max(1, round(seconds / clock.seconds / steps))
        started = time.process_time()
        result = fastdino.train(**run, epochs=epochs, output_dir=f"{folder}/run")
        took = time.process_time() - started
    return f"{result.before['knn']:.4f} -> {result.after['knn']:.4f}  {epochs * steps} steps, {took:.0f} CPU s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, halves in (("digits", digits()), ("photographs", parts_of_photographs())):
            paths = save(halves[0], Path(folder) / name / "train"), save(halves[1], Path(folder) / name / "held_out")
            few = preset.values(open_source(paths[0]))
            same = {flag: few[flag] for flag in SAME.split()}
            ways = {f"small {recipe}": {"preset": "small", "recipe": recipe} for recipe in RECIPES}
            for what, flags in (*ways.items(), ("main_dino", {**same, "preset": "none"})):
                for seed in args.seeds:
                    lines.append(f"{name:12} {what:12} seed {seed}  {learn(paths, flags, seed, args.seconds)}")
    print("\n".join(["", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
