"""fastdino linear: the original's eval_linear.py; and DINOv2's, with all its heads at once."""

import argparse
import json
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastdino import files
from fastdino.commands.common import (
    HELD_OUT,
    Opened,
    Part,
    add_result_flags,
    add_view_flags,
    add_weights_flags,
    check_positive,
    loading,
    open_backbone,
    open_parts,
    tell,
)
from fastdino.errors import TrainingError, UserError, reason, some_of
from fastdino.eval.features import RandomView
from fastdino.eval.linear import (
    LEARNING_RATES,
    Heads,
    Input,
    Labelled,
    Scores,
    Tokens,
    cached_batches,
    passes,
    scaled,
    score,
    sweep_inputs,
    train,
)
from fastdino.train.checkpoint import load_checkpoint
from fastdino.train.config import boolean
from fastdino.train.contents import first_difference, unwrapped
from fastdino.train.distributed import launched
from fastdino.train.finite import first_nonfinite
from fastdino.train.folder import RunFolder
from fastdino.train.interrupt import Stop

CHECKPOINT = "checkpoint.pth.tar"
EPOCHS = 100  # of the original
SWEEP_EPOCHS, SWEEP_STEPS = 10, 1250  # of DINOv2: epochs, and steps of each


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The original's, and those of the faster ways."""
    parser.description = f"""\
Linear classification on frozen features, as in the original's eval_linear.py.
--data_path holds {HELD_OUT}, a fifth of which is
held out; or is left out, for the digits. For ViT-B the original takes --n_last_blocks 1 --avgpool_patchtokens true.
The same command goes on where it was stopped."""
    add_weights_flags(parser)
    add_view_flags(parser)
    parser.add_argument("--data_path", metavar="FOLDER", help="labelled images; without it: scikit-learn's digits")
    group = parser.add_argument_group("Classifier")
    group.add_argument("--n_last_blocks", type=int, metavar="N", help="blocks whose CLS tokens are joined [4]")
    group.add_argument(
        "--avgpool_patchtokens", type=boolean, metavar="BOOL", help="and the mean of the last one's patches [off]"
    )
    group.add_argument("--num_labels", type=int, metavar="N", help="not needed: the folders tell, and have to agree")
    group.add_argument("--lr", type=float, metavar="X", help="for a batch of 256 [0.001]")
    group.add_argument(
        "--epochs", type=int, metavar="N", help=f"passes over the images [{EPOCHS}]; with --sweep [{SWEEP_EPOCHS}]"
    )
    group.add_argument("--val_freq", type=int, default=1, metavar="N", help="epochs between validations [1]")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and crops [0]")
    group.add_argument(
        "--train_view",
        choices=["random", "center"],
        default="random",
        help="random: new crops in every epoch, as the original; center: features are made once, minutes for hours",
    )
    group.add_argument(
        "--sweep",
        action="store_true",
        help="as DINOv2: 1 and 4 blocks, without and with the mean, at 13 learning rates, all at once; "
        f"epochs of {SWEEP_STEPS:,} steps",
    )
    parser.add_argument("--output_dir", default=".", metavar="FOLDER", help=f"for {CHECKPOINT} and log.txt [.]")
    parser.add_argument("--evaluate", action="store_true", help="test a trained classifier, train none")
    parser.add_argument(
        "--linear_weights", metavar="FILE", help=f"which one: the original's files, too [{CHECKPOINT} of --output_dir]"
    )
    add_result_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The original's lines, and the numbers."""
    started = time.monotonic()
    _check(args)
    part, test_part = open_parts(args.data_path)
    n_classes = len(part.source.classes)
    if args.num_labels not in (None, n_classes):
        raise UserError(f"--num_labels: {args.data_path or 'digits'} has {n_classes} classes, got {args.num_labels}")
    opened = open_backbone(args)
    heads, names = _heads(args, opened, n_classes)
    probe = _Probe(args, opened, heads, names, part, test_part)
    if args.evaluate:
        probe.load(Path(args.linear_weights or Path(args.output_dir) / CHECKPOINT))
        scores = probe.validate()
        print(f"Accuracy of the network on the {len(probe.test.labels)} test images: {_best(scores)[1]:.1f}%")
    else:
        scores = probe.train()
        print("Training of the supervised linear classifier on frozen features completed.")
        print(f"Top-1 test accuracy: {probe.best_acc:.1f}")
    head = _best(scores)[0]
    numbers = {"linear_top1": float(scores.top1[head])}
    if n_classes >= 5:
        numbers["linear_top5"] = float(scores.top5[head])
    context: dict[str, Any] = {"data": args.data_path or "digits", "head": names[head]}
    if not args.evaluate:
        numbers["linear_best_top1"] = probe.best_acc / 100
    if args.sweep:
        context["heads"] = dict(zip(names, scores.top1.tolist()))
    context |= {"train_images": len(part.indices), "images": len(probe.test.labels), "unreadable": len(probe.bad)}
    tell(args, numbers, **context, seconds=round(time.monotonic() - started, 1))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError where flags are out of range or contradict each other; fills in defaults."""
    check_positive(args, "n_last_blocks", "num_labels", "lr", "epochs", "val_freq")
    if args.seed < 0:
        raise UserError(f"--seed: expected 0 or more, got {args.seed}")
    if launched().world_size > 1:
        raise UserError(f"one process trains a linear classifier, and {launched().world_size} were launched")
    if args.linear_weights and not args.evaluate:
        raise UserError("--linear_weights: for --evaluate alone")
    if args.sweep:
        for name in ("n_last_blocks", "avgpool_patchtokens", "lr"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: --sweep tries several, leave it out")
    defaults = {"n_last_blocks": 4, "avgpool_patchtokens": False, "lr": 0.001}
    defaults["epochs"] = SWEEP_EPOCHS if args.sweep else EPOCHS
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _heads(args: argparse.Namespace, opened: Opened, n_classes: int) -> tuple[Heads, list[str]]:
    """The classifiers on the backbone's device, and their names."""
    depth = len(opened.backbone.blocks)
    if not args.sweep and args.n_last_blocks > depth:
        raise UserError(f"--n_last_blocks: {args.pretrained_weights} has {depth} blocks, got {args.n_last_blocks}")
    rates = LEARNING_RATES if args.sweep else (args.lr,)
    inputs = sweep_inputs(depth) if args.sweep else (Input(args.n_last_blocks, args.avgpool_patchtokens),)
    heads = Heads(
        {each: scaled(rates, args.batch_size_per_gpu) for each in inputs},
        width=opened.backbone.embed_dim,
        layers=max(each.layers for each in inputs),
        n_classes=n_classes,
        seed=args.seed,
    )
    names = [f"{each}_lr{rate:g}" for each in inputs for rate in rates]
    return heads.to(next(opened.backbone.parameters()).device), names


def _best(scores: Scores) -> tuple[int, float]:
    """(which head, its accuracy in percent)."""
    head = int(scores.top1.argmax())
    return head, 100 * float(scores.top1[head])


class _Probe:
    """Heads, the images they are trained and tested on, and the files of the run."""

    def __init__(
        self, args: argparse.Namespace, opened: Opened, heads: Heads, names: list[str], part: Part, test_part: Part
    ) -> None:
        self.args, self.opened, self.heads, self.names = args, opened, heads, names
        self.part, self.test_part = part, test_part
        self.best_acc, self.bad = 0.0, list[str]()
        self.log = list[dict[str, Any]]()
        self.test: Labelled

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
        print(f"{what:8} features of {len(data.labels):,} images in {time.monotonic() - started:.1f} s", flush=True)
        self._blame(data.bad, what)
        return data

    def _blame(self, bad: Any, what: str) -> None:
        """Name the unreadable ones, once."""
        if new := [line for line in dict.fromkeys(bad) if line not in self.bad]:
            print(f"{what:8} without {some_of(new)}")
            self.bad += new

    def validate(self) -> Scores:
        """Test the heads; the original's line."""
        if not hasattr(self, "test"):
            self.test = self._cached(self.test_part, "val")
        scores = score(self.heads, self.test, self.args.batch_size_per_gpu)
        head = _best(scores)[0]
        loss, top1, top5 = (float(each[head]) for each in scores)
        of_top5 = f"Acc@5 {100 * top5:.3f} " if self.heads.n_classes >= 5 else ""
        of_head = f" ({self.names[head]})" if len(self.names) > 1 else ""
        print(f"* Acc@1 {100 * top1:.3f} {of_top5}loss {loss:.3f}{of_head}")
        return scores

    def train(self) -> Scores:
        """All epochs, from where an earlier run ended."""
        args, folder = self.args, RunFolder(self.args.output_dir, 0, print, Stop())
        folder.check()
        # RunFolder locks what it will write into; two runs in one folder would replace each other's files.
        optimizer = self.heads.optimizer()
        per_epoch = SWEEP_STEPS if args.sweep else -(-len(self.part.indices) // args.batch_size_per_gpu)
        scheduler = CosineAnnealingLR(optimizer, args.epochs * (per_epoch if args.sweep else 1))
        first = self._resume(folder.path, optimizer, scheduler)
        for what, part in (("train", self.part), ("val", self.test_part)):
            print(f"{what:8} {part.describe()}")
        folder.make()
        try:
            self.test = self._cached(self.test_part, "val")
            data = self._cached(self.part, "train") if args.train_view == "center" else None
            n_images = len(self.part.indices) if data is None else len(data.labels)
            print(f"Data loaded with {n_images} train and {len(self.test.labels)} val imgs.")
            if not args.sweep:
                per_epoch = -(-n_images // args.batch_size_per_gpu)
            scores = None
            for epoch in range(first, args.epochs):
                rate = optimizer.param_groups[0]["lr"]
                batches = self._batches(data, n_images, epoch * per_epoch, per_epoch)
                try:
                    losses = train(self.heads, optimizer, batches, scheduler if args.sweep else None)
                except ValueError as error:
                    raise TrainingError(f"none of the images could be read: {self.part.source.describe()}") from error
                if not args.sweep:
                    scheduler.step()
                if not losses.isfinite().any():
                    raise TrainingError(f"the loss is not finite in epoch {epoch}: a smaller --lr may help")
                scores = self._after(epoch, rate, losses.cpu())
                self._save(folder, epoch + 1, optimizer, scheduler)
            return self.validate() if scores is None else scores
        finally:
            folder.unlock()

    def _batches(self, data: Labelled | None, n_images: int, first: int, n_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of n_steps steps, from features in memory, or from crops made now."""
        args = self.args
        if data is not None:
            yield from cached_batches(data, args.batch_size_per_gpu, args.seed, first, n_steps)
            return
        bad: list[str] = []
        tokens = self._tokens(self.part)
        for number, positions in passes(n_images, args.batch_size_per_gpu, args.seed, first, n_steps):
            view = RandomView(self.opened.view.size, args.seed, number)
            yield from tokens.rows(self.part.indices[positions], view, bad)
        self._blame(bad, "train")

    def _after(self, epoch: int, rate: float, losses: Tensor) -> Scores | None:
        """The original's lines and entry of the log; scores where it is time for them."""
        args, head, scores = self.args, int(losses.nan_to_num(torch.inf).argmin()), None
        if epoch % args.val_freq == 0 or epoch == args.epochs - 1:
            scores = score(self.heads, self.test, args.batch_size_per_gpu)
            head = _best(scores)[0]
        entry: dict[str, Any] = {"train_lr": rate, "train_loss": float(losses[head]), "epoch": epoch}
        print(f"Averaged stats: lr: {rate:.6f}  loss: {entry['train_loss']:.4f}")
        if scores:
            self._say(scores)
            accuracy = _best(scores)[1]
            self.best_acc = max(self.best_acc, accuracy)
            print(
                f"Accuracy at epoch {epoch} of the network on the {len(self.test.labels)} test images: {accuracy:.1f}%"
            )
            print(f"Max accuracy so far: {self.best_acc:.2f}%", flush=True)
            entry |= {"test_loss": float(scores.loss[head]), "test_acc1": accuracy}
            if self.heads.n_classes >= 5:
                entry["test_acc5"] = 100 * float(scores.top5[head])
            if len(self.names) > 1:
                entry["head"] = self.names[head]
        self.log.append(entry)
        return scores
