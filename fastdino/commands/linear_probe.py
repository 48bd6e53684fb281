"""What `fastdino linear` trains: heads, the images they see, and the original's lines about them."""

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from fastdino.commands.common import Opened, Part, asked_input, loading, some
from fastdino.data.views import RandomView
from fastdino.errors import UserError, some_of
from fastdino.eval.features import fingerprint
from fastdino.eval.linear import (
    LEARNING_RATES,
    Heads,
    Labelled,
    Scores,
    Tokens,
    cached_batches,
    passes,
    scaled,
    score,
    sweep_inputs,
)

SWEEP_STEPS = 1250  # of an epoch, in DINOv2


class Found(NamedTuple):
    """Scores of all heads, and which one is the best of them."""

    scores: Scores
    head: int

    @property
    def acc1(self) -> float:
        """Of the best head, in percent."""
        return 100 * float(self.scores.top1[self.head])


class Probe:
    """Heads, the images they are trained and tested on, and what was found.

    Attributes: names of the heads; best_acc, the greatest top-1 so far, in percent; log, an entry for each epoch; bad,
    lines about unreadable images; n_trained_on, how many images a pass over the training images has.
    """

    def __init__(self, args: argparse.Namespace, opened: Opened, part: Part, test_part: Part) -> None:
        self.args, self.opened, self.part, self.test_part = args, opened, part, test_part
        rates = LEARNING_RATES if args.sweep else (args.lr,)
        inputs = sweep_inputs(opened.backbone) if args.sweep else (asked_input(args, opened.backbone, n_layers=4),)
        self.names = [f"{each}_lr{rate:g}" for each in inputs for rate in rates]
        self.heads = Heads(
            {each: scaled(rates, args.batch_size_per_gpu) for each in inputs},
            width=opened.backbone.embed_dim,
            layers=max(each.layers for each in inputs),
            n_classes=len(part.source.classes),
            seed=args.seed,
        ).to(next(opened.backbone.parameters()).device)
        self.best_acc, self.bad, self.log = 0.0, list[str](), list[dict[str, Any]]()
        self.n_trained_on = len(part.indices)
        self._data: Labelled | None = None
        self.test: Labelled

    def extract(self, with_training: bool) -> None:
        """Put into memory what is looked at more than once: features of the held-out images, of center crops."""
        self.test = self._cached(self.test_part, "val")
        if with_training and self.args.train_view == "center":
            self._data = self._cached(self.part, "train")
            self.n_trained_on = len(self._data.labels)

    def _tokens(self, part: Part) -> Tokens:
        return Tokens(
            backbone=self.opened.backbone,
            source=part.source,
            labels=part.labels,
            inputs=list(self.heads.rates),
            **loading(self.args),
        )

    def _cached(self, part: Part, what: str) -> Labelled:
        started = time.monotonic()
        data = self._tokens(part).cached(part.indices, self.opened.view)
        print(f"{what:8}features of {len(data.labels):,} images in {time.monotonic() - started:.1f} s", flush=True)
        self._blame(data.bad, what)
        return data

    def _blame(self, bad: Sequence[str], what: str) -> None:
        """Name the unreadable ones, once."""
        if new := [line for line in dict.fromkeys(bad) if line not in self.bad]:
            print(f"{what:8}without {some_of(new)}")
            self.bad += new

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint has to agree on, by the flag that says it."""
        args = self.args
        return {
            "pretrained_weights": f"weights with the checksum {fingerprint(self.opened.backbone)}",
            "data_path": f"{len(self.part.indices)} images of the classes {some(self.part.source.classes)}",
            "n_last_blocks": max(each.layers for each in self.heads.rates),
            "avgpool_patchtokens": args.avgpool_patchtokens,
            "train_view": args.train_view,
            "size": self.opened.view.size,
            "resize": self.opened.view.resize,
            "batch_size_per_gpu": args.batch_size_per_gpu,
            "lr": args.lr,
            "epochs": args.epochs,
            "seed": args.seed,
            "dtype": args.dtype,
            "sweep": args.sweep,
        }

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return SWEEP_STEPS if self.args.sweep else -(-self.n_trained_on // self.args.batch_size_per_gpu)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from features in memory, or from crops made now."""
        args, span = self.args, (epoch * self.steps, self.steps)
        if self._data is not None:
            yield from cached_batches(self._data, args.batch_size_per_gpu, args.seed, *span)
            return
        bad: list[str] = []
        tokens = self._tokens(self.part)
        for number, positions in passes(self.n_trained_on, args.batch_size_per_gpu, args.seed, *span):
            view = RandomView(self.opened.view.size, args.seed, number)
            yield from tokens.rows(self.part.indices[positions], view, bad)
        if len(bad) >= self.n_trained_on:
            raise UserError(f"none of the images could be read: {self.part.source.describe()}")
        self._blame(bad, "train")

    def validate(self) -> Found:
        """Test the heads; the original's line."""
        scores = score(self.heads, self.test, self.args.batch_size_per_gpu)
        found = Found(scores, int(scores.top1.argmax()))
        loss, top1, top5 = (float(each[found.head]) for each in scores)
        of_top5 = f"Acc@5 {100 * top5:.3f} " if self.heads.n_classes >= 5 else ""
        of_head = f" ({self.names[found.head]})" if len(self.names) > 1 else ""
        print(f"* Acc@1 {100 * top1:.3f} {of_top5}loss {loss:.3f}{of_head}")
        return found

    def after(self, epoch: int, rate: float, losses: Tensor) -> Found | None:
        """The original's lines, and its entry of the log. losses: of each head. None where no validation is due."""
        is_due = epoch % self.args.val_freq == 0 or epoch == self.args.epochs - 1
        print(f"Epoch: [{epoch}]  Averaged stats: lr: {rate:.6f}  loss: {float(losses.min()):.4f}")
        entry: dict[str, Any] = {"train_lr": rate, "train_loss": float(losses.min()), "epoch": epoch}
        found = self.validate() if is_due else None
        if found:
            self.best_acc = max(self.best_acc, found.acc1)
            n_images = len(self.test.labels)
            print(f"Accuracy at epoch {epoch} of the network on the {n_images} test images: {found.acc1:.1f}%")
            print(f"Max accuracy so far: {self.best_acc:.2f}%", flush=True)
            entry["train_loss"] = float(losses[found.head])
            entry |= {"test_loss": float(found.scores.loss[found.head]), "test_acc1": found.acc1}
            if self.heads.n_classes >= 5:
                entry["test_acc5"] = 100 * float(found.scores.top5[found.head])
            if len(self.names) > 1:
                entry["head"] = self.names[found.head]
        self.log.append(entry)
        return found
