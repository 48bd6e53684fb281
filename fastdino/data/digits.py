"""The 1797 real handwritten digits that come with scikit-learn (UCI, 8 x 8 pixels), enlarged and split."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 24  # pixels: 8 x 8 enlarged, so that crops can lie between the original pixels
N_HELD_OUT = 360


class DigitsSource:
    """Digits as (24, 24, 3) uint8 arrays. The held-out fifth is the same in every run, balanced over the classes."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], what: str) -> None:
        self.images = images
        self.labels: NDArray[np.int64] | None = labels
        self.classes: Sequence[str] = [str(digit) for digit in range(10)]
        self.what = what

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"digit {index} of the {self.what} set"

    def describe(self) -> str:
        return f"{len(self):,} handwritten digits of scikit-learn ({self.what}), 10 classes"


def load_digits() -> tuple[DigitsSource, DigitsSource]:
    """(1437 digits to train on, 360 held out)."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    enlarged = [
        np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for pixels in np.round(digits.images * (255 / 16)).astype(np.uint8)
    ]
    images = np.repeat(np.stack(enlarged)[..., None], 3, axis=-1)
    labels = digits.target.astype(np.int64)
    train, held_out = train_test_split(np.arange(len(labels)), test_size=N_HELD_OUT, stratify=labels, random_state=0)
    return (
        DigitsSource(images[train], labels[train], "training"),
        DigitsSource(images[held_out], labels[held_out], "held-out"),
    )
