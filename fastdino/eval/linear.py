"""Linear classifiers on frozen features: DINO (arXiv:2104.14294), section 4.1, and many at once, as DINOv2 does.

All heads that see the same features are one matrix: the logits of H heads of C classes are one product of (B, D) with
(D, H * C). Each head has a learning rate of its own. SGD with momentum is linear in the gradient, so a head's rate can
be folded into its share of the loss: at rate r, a gradient times a / r moves the weights as at rate a. One optimizer
serves all.

A step of DINOv2's 52 heads at batch 128, in ms of one CPU core, and of 52 modules in brackets (2026-11-28): for tokens
of 96 channels and 10 classes 3.1 (9.1), for 384 and 20 classes 10 (20), for 384 and 1,000 classes 426 (406), of which
83% are the products, at the 83 GFLOP/s that the core has.

Axes: B images of a batch, N images, W channels of a token, L blocks, D channels of an input, H heads of an input,
C classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from fastdino.data.sources import ImageSource
from fastdino.data.views import RandomView, View
from fastdino.errors import UserError
from fastdino.eval.features import BATCH, stream
from fastdino.model import VisionTransformer

# Of DINOv2 (arXiv:2304.07193), for a batch of 256.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
INIT_STD = 0.01
HELD_OUT = 5  # of so many images of a class one is held out, where nobody says which
REFERENCE_BATCH = 256  # learning rates are given for it


class Input(NamedTuple):
    """What a head sees: the CLS tokens of the last `layers` blocks; avgpool: and the mean of the last one's patches."""

    layers: int
    avgpool: bool

    def __str__(self) -> str:
        return f"n{self.layers}_avg" if self.avgpool else f"n{self.layers}"

    def channels(self, width: int) -> int:
        """D, of tokens of that width."""
        return width * (self.layers + self.avgpool)

    def of(self, rows: Tensor, width: int, layers: int) -> Tensor:
        """(B, D) from what `Tokens.rows` gives for at least as many layers."""
        seen = rows[:, (layers - self.layers) * width : (layers + self.avgpool) * width]
        if self.avgpool and self.layers == 1:  # channel by channel, as in the original's weights
            return seen.unflatten(1, (2, width)).transpose(1, 2).flatten(1)
        return seen


def sweep_inputs(backbone: nn.Module) -> tuple[Input, ...]:
    """The four of DINOv2: one block and four (or all that there are), without and with the mean.

    The one of a backbone that gives its output alone.
    """
    if not isinstance(backbone, VisionTransformer):
        return (Input(1, False),)
    n_layers = 1, min(4, len(backbone.blocks))
    return tuple(dict.fromkeys(Input(n, avgpool) for n in n_layers for avgpool in (False, True)))


@dataclass(frozen=True)
class Labelled:
    """features: (N, D) fp32. labels: (N,) int64, on the same device. bad: a line for each image that was unreadable."""

    features: Tensor
    labels: Tensor
    bad: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Rows of features from images: all that the heads' inputs are made of.

    labels: (n,) int64, of all images of the source; their own, or renumbered.
    """

    backbone: nn.Module
    source: ImageSource
    labels: NDArray[np.int64]
    inputs: Sequence[Input]
    batch_size: int = BATCH
    num_workers: int = 0

    @property
    def layers(self) -> int:
        """L: as many as the deepest input asks for."""
        return max(each.layers for each in self.inputs)

    def rows(
        self, indices: NDArray[np.int64], view: View | RandomView, bad: list[str]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (rows, labels (B,)) of the readable ones: CLS of L blocks, the last one's at the end, then the mean.

        rows: (B, L * W), or (B, (L + 1) * W) where an input asks for the mean. bad: lines are added to it.
        """
        tokens = ("cls", "avg") if any(each.avgpool for each in self.inputs) else ("cls",)
        batches = stream(
            self.backbone,
            self.source,
            indices,
            view,
            layers=self.layers,
            tokens=tokens,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            bad=lambda _, line: bad.append(line),
        )
        for kept, features in batches:
            rows = features["cls"]
            if "avg" in features:
                width = rows.shape[1] // self.layers
                rows = torch.cat([rows, features["avg"][:, -width:]], dim=1)
            yield rows, torch.from_numpy(self.labels[kept]).to(rows.device)

    def cached(self, indices: NDArray[np.int64], view: View) -> Labelled:
        """All of them, in memory. Raises UserError where none can be read."""
        bad: list[str] = []
        n_images, features = 0, torch.empty(0)
        labels = torch.empty(len(indices), dtype=torch.int64)
        for rows, own in self.rows(indices, view, bad):
            if not n_images:  # at once: joined at the end, they would need the memory twice
                features = rows.new_empty(len(indices), rows.shape[1])
                labels = labels.to(rows.device)
            features[n_images : n_images + len(rows)] = rows
            labels[n_images : n_images + len(rows)] = own
            n_images += len(rows)
        if not n_images:
            raise UserError(f"none of the images could be read: {self.source.describe()}")
        return Labelled(features[:n_images], labels[:n_images], tuple(bad))


class Heads(nn.Module):
    """Linear classifiers. Their weights start at N(0, 0.01), their biases at 0.

    rates: by input, the learning rates of its heads, for SGD as it is called. width: W. layers: L of the rows.
    A single head has the original's names, linear.weight and linear.bias; more are n4_avg.weight (H * C, D) and so on.
    """

    def __init__(
        self, rates: dict[Input, Sequence[float]], *, width: int, layers: int, n_classes: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.rates, self.width, self.layers, self.n_classes = rates, width, layers, n_classes
        self.max_rate = max(max(of_input) for of_input in rates.values())
        generator = torch.Generator().manual_seed(seed)
        is_single = sum(map(len, rates.values())) == 1
        for each, of_input in rates.items():
            linear = nn.Linear(each.channels(width), len(of_input) * n_classes)
            nn.init.normal_(linear.weight, std=INIT_STD, generator=generator)
            nn.init.zeros_(linear.bias)
            self.add_module("linear" if is_single else str(each), linear)
        shares = torch.tensor([rate for of_input in rates.values() for rate in of_input], dtype=torch.float64)
        shares /= self.max_rate
        self.register_buffer("shares", shares, persistent=False)
        self.shares: Tensor

    def forward(self, rows: Tensor) -> Iterator[tuple[nn.Linear, Tensor, Tensor]]:
        """Rows of `Tokens` -> for each input (its layer, what it sees (B, D), its logits (B, H, C)).

        One after another: the logits of all 52 heads of DINOv2 would fill a cache many times over.
        """
        for each, layer in zip(self.rates, self.children()):
            assert isinstance(layer, nn.Linear)
            x = each.of(rows, self.width, self.layers)
            yield layer, x, layer(x).unflatten(1, (-1, self.n_classes))

    @torch.no_grad()
    def backward_(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each head (all heads,), a mean over the batch; each one's gradient, times its share.

        The gradient of the logits is (probs - one-hot) / B: no graph is needed, and buffers stay.
        """
        losses, shares = [], iter((self.shares / len(labels)).split([len(rates) for rates in self.rates.values()]))
        for layer, x, logits in self(rows):
            n_heads = logits.shape[1]
            own_class = labels[:, None, None].expand(-1, n_heads, 1)
            log_probs = F.log_softmax(logits, dim=-1)
            losses.append(-log_probs.gather(2, own_class)[..., 0].mean(0))
            grad = log_probs.exp_()
            grad.scatter_add_(2, own_class, grad.new_full((len(labels), n_heads, 1), -1.0))
            grad = grad.mul_(next(shares).to(grad.dtype)[:, None]).flatten(1)
            for parameter in (layer.weight, layer.bias):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
            torch.mm(grad.T, x, out=layer.weight.grad)
            torch.sum(grad, 0, out=layer.bias.grad)
        return torch.cat(losses)

    def optimizer(self) -> torch.optim.SGD:
        """SGD at the greatest of the rates, for `train`."""
        return torch.optim.SGD(self.parameters(), self.max_rate, momentum=0.9, weight_decay=0)


def train(
    heads: Heads,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    scheduler: LRScheduler | None = None,
) -> Tensor:
    """A step for each batch (rows, labels); the mean over the steps of each head's loss.

    scheduler: moved on after each step. Raises ValueError where there is no batch.
    """
    total, steps = torch.zeros_like(heads.shares), 0
    for rows, labels in batches:
        losses = heads.backward_(rows, labels)
        optimizer.step()
        if scheduler:
            scheduler.step()
        total, steps = total + losses, steps + 1
    if not steps:
        raise ValueError("batches: expected at least one, got none")
    return total / steps


class Scores(NamedTuple):
    """Of each head. loss: mean over batches of the batch's mean. top1, top5: shares of images in [0, 1]."""

    loss: Tensor
    top1: Tensor
    top5: Tensor


@torch.no_grad()
def score(heads: Heads, test: Labelled, batch_size: int = BATCH) -> Scores:
    """Of held-out images, in their order. With fewer than five classes top5 is 1."""
    losses, hits = [], torch.zeros(2, len(heads.shares), device=test.features.device, dtype=torch.int64)
    for rows, labels in zip(test.features.split(batch_size), test.labels.split(batch_size)):
        of_batch, of_hits = [], []
        for _, _, logits in heads(rows):
            log_probs, own_class = F.log_softmax(logits, dim=-1), labels[:, None, None]
            of_batch.append(-log_probs.gather(2, own_class.expand(-1, logits.shape[1], 1))[..., 0].mean(0))
            best = logits.topk(min(5, heads.n_classes), dim=-1).indices == own_class
            of_hits.append(torch.stack([best[..., 0].sum(0), best.any(-1).sum(0)]))
        losses.append(torch.cat(of_batch))
        hits += torch.cat(of_hits, dim=1)
    top1, top5 = (hits.double() / len(test.labels)).cpu()
    return Scores(torch.stack(losses).mean(0).cpu(), top1, top5)


def passes(
    n_images: int, batch_size: int, seed: int, first: int, n_steps: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(pass, positions) for the steps `first` to `first + n_steps` of an endless run over n_images images.

    Each pass has an order of (seed, pass), that of PyTorch's DistributedSampler, and a last, smaller batch. What lies
    in one pass comes together, to be cut into batches.
    """
    per_pass = -(-n_images // batch_size)
    last = first + n_steps
    while first < last:
        number, start = divmod(first, per_pass)
        stop = min(start + last - first, per_pass)
        order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed + number)).numpy()
        yield number, order[start * batch_size : stop * batch_size]
        first += stop - start


def cached_batches(
    data: Labelled, batch_size: int, seed: int, first: int, n_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps of `passes` over features in memory."""
    for _, positions in passes(len(data.labels), batch_size, seed, first, n_steps):
        for chosen in torch.from_numpy(positions).to(data.labels.device).split(batch_size):
            yield data.features[chosen], data.labels[chosen]


def scaled(rates: Iterable[float], batch_size: int) -> list[float]:
    """Learning rates for a batch of 256 -> for this one."""
    return [rate * batch_size / REFERENCE_BATCH for rate in rates]


def best_of_rates(train_on: Labelled, test_on: Labelled, n_classes: int, n_steps: int, seed: int = 0) -> float:
    """Top-1 in [0, 1] of the best of DINOv2's learning rates, after n_steps of batch 128, cosine per step."""
    seen = Input(1, False)
    heads = Heads(
        {seen: scaled(LEARNING_RATES, BATCH)},
        width=train_on.features.shape[1],
        layers=1,
        n_classes=n_classes,
        seed=seed,
    ).to(train_on.features.device)
    optimizer = heads.optimizer()
    batches = cached_batches(train_on, BATCH, seed, 0, n_steps)
    train(heads, optimizer, batches, CosineAnnealingLR(optimizer, n_steps))
    return float(score(heads, test_on).top1.max())


def hold_out(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indices to train on, a fifth of each class), the same for the same labels. A class of two or more gives one.

    Raises UserError where no class has a second image.
    """
    rng, held = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (own,) = np.nonzero(labels == label)
        held[rng.permutation(own)[: max(len(own) // HELD_OUT, int(len(own) > 1))]] = True
    if not held.any():
        raise UserError(f"none of {len(labels)} images can be held out: each class has a single one")
    return np.flatnonzero(~held), np.flatnonzero(held)
