"""curves.png says what a run has learned: after an epoch, without labels, after hundreds of epochs."""

import math
from io import BytesIO

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from fastdino.train.curves import draw_curves


def entries(n, every=0):
    """Of n epochs, with an accuracy every so many."""
    found = [
        {
            "epoch": i,
            "train_loss": 3.5 - i / n,
            "train_teacher_entropy": 2.5 - i / n,
            "train_lr": 5e-4,
            "train_momentum": 0.996,
            "knn": 0.5 + i / n / 3 if every and i % every == 0 else None,
        }
        for i in range(n)
    ]
    return [{**found[0], "knn_before": 0.4 if every else None}, *found[1:]]


def assert_can_be_drawn(figure):
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    assert np.asarray(Image.open(file).convert("L")).std() > 10


def legends(figure):
    return [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]


@pytest.mark.parametrize("n", [1, 400])
def test_every_curve_has_its_last_value(n):
    figure = draw_curves(entries(n, every=1), 64)
    losses, accuracy, rate, momentum = legends(figure)
    last = entries(n, every=1)[-1]
    assert losses[:2] == [f"loss {last['train_loss']:.3f}", f"teacher entropy {last['train_teacher_entropy']:.3f}"]
    assert accuracy == [f"k-NN {last['knn']:.4f}"]
    assert rate == ["lr 0.0005"]
    assert momentum == ["momentum 0.99600"]
    assert_can_be_drawn(figure)


def test_without_labels_the_divergence_is_drawn():
    figure = draw_curves(entries(5), 64)
    _, heights = figure.axes[1].lines[0].get_data()
    assert list(heights) == pytest.approx([1.0] * 5)
    assert legends(figure)[1] == ["KL 1.000 (nothing is evaluated)"]
    assert_can_be_drawn(figure)


def test_axes_hold_what_a_number_can_be():
    figure = draw_curves(entries(1, every=1), 64)
    lowest, highest = figure.axes[3].get_ylim()
    assert 0.99 < lowest < 0.996 < 1 < highest < 1.001
    assert figure.axes[0].get_ylim()[1] > math.log(64)
    assert_can_be_drawn(draw_curves([], 64))  # of a run that was stopped in its first epoch
