"""From weights: a backbone that knows the digits 0 to 4 goes on with 5 to 9, as --init does it and naively.

cd tests && python -m trials.weights [--seeds 3 4 5]

Half of the images of 5 to 9 are held out, the same for all. Each seed starts from weights of its own. Naively: the
flags of a run from scratch, --init apart.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from trials.runs import Table, shrink, trial_parser

import fastdino
from fastdino.data.digits import load_digits
from fastdino.train.recipes import DIGITS

NAIVELY = {"freeze_backbone_epochs": 0, "freeze_last_layer": 1}
ARCHITECTURE = ("arch", "patch_size")
MUCH_WORSE = 0.02


class Digits:
    """Some of them, as a dataset."""

    def __init__(self, images: NDArray[np.uint8], targets: NDArray[np.int64]) -> None:
        self.images, self.targets = images, targets.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return self.images[index]


def first(every: int = 1) -> dict[str, Digits]:
    """0 to 4, as the digits are always split; one of so many."""
    parts = [(part.images, part.labels) for part in load_digits()]
    train, held_out = (Digits(images[labels < 5][::every], labels[labels < 5][::every]) for images, labels in parts)
    return {"dataset": train, "val_dataset": held_out}


def second(every: int = 1) -> dict[str, Digits]:
    """5 to 9, half of them to train on, half held out; one of so many."""
    parts = load_digits()
    images, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    known = np.flatnonzero(labels >= 5)[::every]
    halves = train_test_split(known, test_size=0.5, stratify=labels[known], random_state=0)
    train, held_out = (Digits(images[half], labels[half]) for half in halves)
    return {"dataset": train, "val_dataset": held_out}


class Watch(fastdino.Sink):
    """The k-NN accuracies of a run."""

    def __init__(self) -> None:
        self.before, self.after = 0.0, list[float]()

    def epoch(self, entry: Any) -> None:
        self.before = entry.get("knn_before") or self.before
        self.after += [entry["knn"]] if entry["knn"] is not None else []


def train(folder: Path, **flags: Any) -> Watch:
    """A run with the digits' recipe."""
    watch = Watch()
    recipe = {name: value for name, value in DIGITS.items() if "init" not in flags or name not in ARCHITECTURE}
    fastdino.train(**{**recipe, "attention_images": 0, "output_dir": str(folder), "callbacks": [watch], **flags})
    return watch


def main() -> int:
    parser = trial_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    args = parser.parse_args()
    seeds, epochs, every = (args.seeds[:1], 2, 5) if args.quick else (args.seeds, 18, 1)
    if args.quick:
        shrink()
    table, won = Table(), list[float]()
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            train(Path(name, f"first{seed}"), **first(every), seed=seed, epochs=2 if args.quick else 48)
            init = str(Path(name, f"first{seed}", "checkpoint.pth"))
            asked = {"init": init, "epochs": epochs, "knn_freq": 2, "seed": seed, **second(every)}
            ours, naive = (
                train(Path(name, f"ours{seed}"), **asked),
                train(Path(name, f"naive{seed}"), **asked, **NAIVELY),
            )
            for how, watch in (("as --init does it", ours), ("naively", naive)):
                print(f"seed {seed}, {how}: {watch.before:.4f}, then {' '.join(f'{x:.4f}' for x in watch.after)}")
            lost = ours.before - min(ours.after)
            won.append(ours.after[-1] - naive.after[-1])
            table.add("never far below the weights as they came", f"seed {seed}", [f"{lost:.4f}"] * (lost > MUCH_WORSE))
    mean = float(np.mean(won))
    if not args.quick:
        table.add("better than naively, on average", f"{len(seeds)} seeds", [f"{mean:.4f}"] * (mean <= 0))
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
