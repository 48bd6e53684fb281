"""Logistic regression: the optimum of what DINOv2 minimises, and its choice of C; and the command."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from fastdino import vit_nano
from fastdino.cli import main
from fastdino.errors import UserError
from fastdino.eval.linear import Labelled
from fastdino.eval.logreg import C_VALUES, log_regression


def drawn(n, n_classes, seed, distance=1.0, width=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    features = torch.randn(n, width, generator=generator) + distance * torch.eye(n_classes, width)[labels]
    return Labelled(features, labels)


def newton_accuracy(train, test, n_classes, c):
    """Top-1 and top-5 after Newton's method in fp64 on sum of cross-entropy + |W|^2 / (2 C)."""
    x, width = train.features.double(), train.features.shape[1]

    def objective(weights):
        weight, bias = weights.view(n_classes, width + 1).split([width, 1], dim=1)
        logits = x @ weight.T + bias[:, 0]
        return nn.functional.cross_entropy(logits, train.labels, reduction="sum") + weight.square().sum() / (2 * c)

    weights = torch.zeros(n_classes * (width + 1), dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(objective, weights)
        hessian = torch.autograd.functional.hessian(objective, weights)
        step = torch.linalg.lstsq(hessian, gradient[:, None], driver="gelsd").solution[:, 0]
        weights = weights - step
    assert gradient.abs().max() < 1e-8
    weight, bias = weights.view(n_classes, width + 1).split([width, 1], dim=1)
    hits = (test.features.double() @ weight.T + bias[:, 0]).argsort(dim=1, descending=True) == test.labels[:, None]
    return hits[:, 0].double().mean().item(), hits[:, :5].any(1).double().mean().item()


@pytest.mark.parametrize("n_classes", [2, 6])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_it_is_the_optimum_that_newtons_method_finds(n_classes, c):
    train, test = drawn(300, n_classes, 0), drawn(400, n_classes, 1)
    found = log_regression(train, test, [c])
    if n_classes == 2:  # scikit-learn has one row w for two classes; as two rows, w / 2 and -w / 2, it costs half
        c /= 2
    assert (found.top1, found.top5) == pytest.approx(newton_accuracy(train, test, n_classes, c), abs=1e-9)
    assert 0.3 < found.top1 < 0.95


def test_c_is_the_smallest_of_the_best_on_a_tenth_and_all_are_fitted_then():
    train, test = drawn(400, 6, 2), drawn(300, 6, 3)
    values, said = (1e-5, 1e-3, 0.1, 10.0), []
    found = log_regression(train, test, values, said.append)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    tenth, rest = (Labelled(train.features[i], train.labels[i]) for i in (order[:40], order[40:]))
    by_hand = {c: newton_accuracy(rest, tenth, 6, c)[0] for c in values}
    assert found.by_c == pytest.approx(by_hand, abs=1e-9)
    assert found.c == min(c for c in values if by_hand[c] == max(by_hand.values()))
    assert found.top1 == pytest.approx(newton_accuracy(train, test, 6, found.c)[0], abs=1e-9)
    assert len(said) == 4


def test_the_values_are_dinov2s():
    assert np.allclose(C_VALUES, (10 ** torch.linspace(-6, 5, 45).double()).numpy(), rtol=1e-6)


def test_too_few_images_to_choose_on_are_refused():
    with pytest.raises(UserError, match="9 are too few"):
        log_regression(drawn(9, 2, 0), drawn(9, 2, 1))
    assert log_regression(drawn(9, 2, 0), drawn(9, 2, 1), [1.0]).c == 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(vit_nano(patch_size=8, img_size=[16]).state_dict(), path)
    return path


def test_the_command_prints_dinov2s_lines(weights, photo_folder, tmp_path, capsys):
    shutil.copytree(photo_folder, tmp_path / "photos")
    path = min((tmp_path / "photos").rglob("*.jpg"))
    path.write_bytes(b"broken")
    words = ["--pretrained_weights", weights, "--data_path", tmp_path / "photos", "--C", 0.01, 1, 100]
    assert main(["logreg", *map(str, words), "--json", str(tmp_path / "results.json")]) == 0
    *_, done, top1, c, last = (line for line in capsys.readouterr().out.splitlines() if "converged" not in line)
    found = json.loads(last)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert done == "Training of the supervised logistic regression on frozen features completed."
    assert top1 == f"Top-1 test accuracy: {100 * found['logreg_top1']:.1f}"
    assert c == f"obtained for C = {found['C']:.6f}"
    assert (found["train_images"] + found["images"], found["unreadable"]) == (31, 1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--C", "0"], "--C: expected values above 0"),
        (["--n_last_blocks", "5"], "--n_last_blocks: "),
        (["--n_last_blocks", "0"], "--n_last_blocks: expected a value above 0"),
        (["--data_path", "nowhere"], "found nothing at nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(weights, photo_folder, capsys, flags, expected):
    assert main(["logreg", "--pretrained_weights", str(weights), "--data_path", str(photo_folder), *flags]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
