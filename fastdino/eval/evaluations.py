"""What a backbone is judged by while it trains: one table, from a name to a function that gives named numbers.

All of them look at the same features, which are extracted once: that is what takes the time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from fastdino.data.sources import ImageSource
from fastdino.errors import some_of
from fastdino.eval.knn import Features, extract_features, knn_accuracy
from fastdino.eval.linear import Labelled, best_of_rates, hold_out


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


LINEAR_STEPS = 500  # 6 passes over 10,000 images: the larger learning rates are done by then

# (labelled features, held-out ones or None for leave-one-out, settings) -> {name: number}
Evaluation = Callable[[Features, Features | None, EvalSettings], dict[str, float]]


def knn(bank: Features, queries: Features | None, settings: EvalSettings) -> dict[str, float]:
    """Accuracy in [0, 1] of a weighted k-NN."""
    return {"knn": knn_accuracy(bank, queries, settings.k)}


def linear(bank: Features, queries: Features | None, settings: EvalSettings) -> dict[str, float]:
    """Top-1 in [0, 1] of the best of 13 linear classifiers, each at a learning rate of DINOv2's, after 500 steps.

    Without queries they are tested on a fifth of each class of the bank, and trained on the rest.
    """
    del settings
    scale = bank.features.shape[1] ** 0.5  # unit length -> unit variance, for which those learning rates are
    parts = [Labelled(scale * each.features, each.labels) for each in (bank, queries) if each]
    if queries is None:
        chosen = hold_out(bank.labels.cpu().numpy())
        parts = [Labelled(parts[0].features[index], parts[0].labels[index]) for index in chosen]
    train_on, test_on = parts
    n_classes = int(max(part.labels.max() for part in parts)) + 1
    return {"linear": best_of_rates(train_on, test_on, n_classes, LINEAR_STEPS)}


EVALUATIONS: dict[str, Evaluation] = {"knn": knn, "linear": linear}
TITLES = {"knn": "k-NN"}  # how a name is said; the others are said as they are


def evaluate(
    names: Sequence[str],
    backbone: nn.Module,
    source: ImageSource,
    held_out: ImageSource | None,
    settings: EvalSettings,
) -> dict[str, float]:
    """The numbers of those evaluations. Raises UserError where there are no labels, or no image can be read."""

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
        settings.say(f"  {', '.join(TITLES.get(name, name) for name in names)} without {some_of(bad)}")
    found: dict[str, float] = {}
    for name in names:
        found |= EVALUATIONS[name](bank, queries, settings)
    return found
