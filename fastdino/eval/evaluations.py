"""What a backbone is judged by while it trains: one table, from a name to a function that gives named numbers."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastdino.data.sources import ImageSource
from fastdino.errors import some_of
from fastdino.eval.knn import Features, extract_features, knn_accuracy


@dataclass(frozen=True)
class EvalSettings:
    """How images are shown to the backbone, and how many.

    resize: short side in pixels before the center crop of side `size`. limit: images of each half, 0 for all.
    k: neighbours that vote. say: is told of images that cannot be read.
    """

    resize: int
    size: int
    limit: int
    num_workers: int
    k: int
    say: Callable[[str], object] = print


# (backbone, labelled images, held-out images or None for leave-one-out, settings) -> {name: number}
Evaluation = Callable[[nn.Module, ImageSource, ImageSource | None, EvalSettings], dict[str, float]]


def knn(
    backbone: nn.Module, source: ImageSource, held_out: ImageSource | None, settings: EvalSettings
) -> dict[str, float]:
    """Accuracy in [0, 1] of a weighted k-NN."""

    def features(images: ImageSource) -> Features:
        return extract_features(
            backbone,
            images,
            resize=settings.resize,
            size=settings.size,
            limit=settings.limit,
            num_workers=settings.num_workers,
        )

    queries, bank = features(held_out) if held_out is not None else None, features(source)
    if bad := [*bank.bad, *(queries.bad if queries else ())]:
        settings.say(f"  k-NN is without {some_of(bad)}")
    return {"knn": knn_accuracy(bank, queries, settings.k)}


EVALUATIONS: dict[str, Evaluation] = {"knn": knn}
