"""fastdino linear: the original's eval_linear.py; and DINOv2's, with all its heads at once."""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

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
    some,
    tell,
)
from fastdino.data.views import RandomView
from fastdino.errors import TrainingError, UserError, reason, some_of
from fastdino.eval.features import fingerprint
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
from fastdino.train.command_line import boolean
from fastdino.train.contents import first_difference, unwrapped
from fastdino.train.finite import first_nonfinite
from fastdino.train.folder import RunFolder
from fastdino.train.interrupt import Stop

CHECKPOINT, LOG = "checkpoint.pth.tar", "log.txt"
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
        help="random: new crops in every epoch, as the original; "
        "center: features are made once, which is far faster [random]",
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
    opened = open_backbone(args, any_channels=True)
    part, test_part = open_parts(args.data_path, opened.image_format, test_only=args.evaluate)
    n_classes = len(part.source.classes)
    if args.num_labels not in (None, n_classes):
        raise UserError(f"--num_labels: {args.data_path or 'digits'} has {n_classes} classes, got {args.num_labels}")
    probe = Probe(args, opened, part, test_part)
    found = _evaluate(probe) if args.evaluate else _train(probe)
    top1, top5 = (float(each[found.head]) for each in (found.scores.top1, found.scores.top5))
    numbers = {"linear_top1": top1, **({"linear_top5": top5} if n_classes >= 5 else {})}
    context: dict[str, Any] = {"data": args.data_path or "digits", "head": probe.names[found.head]}
    if not args.evaluate:
        numbers["linear_best_top1"] = probe.best_acc / 100
        context["train_images"] = probe.n_trained_on
    if args.sweep:
        context["heads"] = dict(zip(probe.names, found.scores.top1.tolist()))
    context |= {"images": len(probe.test.labels), "unreadable": len(probe.bad)}
    tell(args, numbers, **context, seconds=round(time.monotonic() - started, 1))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError where flags are out of range or contradict each other; fills in defaults."""
    check_positive(args, "n_last_blocks", "num_labels", "lr", "epochs", "val_freq")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed: expected 0 or more, and less than 2**31, got {args.seed}")
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
        depth = len(opened.backbone.blocks)
        if not args.sweep and args.n_last_blocks > depth:
            raise UserError(f"--n_last_blocks: {args.pretrained_weights} has {depth} blocks, got {args.n_last_blocks}")
        rates = LEARNING_RATES if args.sweep else (args.lr,)
        inputs = sweep_inputs(depth) if args.sweep else (Input(args.n_last_blocks, args.avgpool_patchtokens),)
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
            "n_last_blocks": args.n_last_blocks,
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


def _evaluate(probe: Probe) -> Found:
    args = probe.args
    path = Path(args.linear_weights or Path(args.output_dir) / CHECKPOINT)
    _load_heads(probe.heads, load_checkpoint(path), path)
    probe.extract(with_training=False)
    found = probe.validate()
    print(f"Accuracy of the network on the {len(probe.test.labels)} test images: {found.acc1:.1f}%")
    return found


def _train(probe: Probe) -> Found:
    """All epochs, from where an earlier run ended."""
    args, folder = probe.args, RunFolder(probe.args.output_dir, 0, print, Stop())
    folder.check()
    optimizer = probe.heads.optimizer()
    scheduler = CosineAnnealingLR(optimizer, args.epochs * (SWEEP_STEPS if args.sweep else 1))
    first = _resume(probe, folder.path, optimizer, scheduler)
    for what, part in (("train", probe.part), ("val", probe.test_part)):
        print(f"{what:8}{part.describe()}")
    folder.make()
    try:
        if first:
            print(f"resume  {folder.path / CHECKPOINT}, after {first} of {args.epochs} epochs")
            _write_log(folder, probe)
        probe.extract(with_training=first < args.epochs)
        print(f"Data loaded with {probe.n_trained_on} train and {len(probe.test.labels)} val imgs.")
        found = None
        for epoch in range(first, args.epochs):
            rate = optimizer.param_groups[0]["lr"]
            losses = train(probe.heads, optimizer, probe.batches(epoch), scheduler if args.sweep else None)
            if not args.sweep:
                scheduler.step()
            if not losses.isfinite().any():
                raise TrainingError(f"the loss is not finite in epoch {epoch}: a smaller --lr may help")
            found = probe.after(epoch, rate, losses.nan_to_num(torch.inf).cpu())
            _save(folder, probe, epoch + 1, optimizer, scheduler)
        found = found or probe.validate()
        print("Training of the supervised linear classifier on frozen features completed.")
        print(f"Top-1 test accuracy: {probe.best_acc:.1f}")
        return found
    finally:
        folder.unlock()


# What is written, and read again


def _save(
    folder: RunFolder, probe: Probe, epoch: int, optimizer: torch.optim.SGD, scheduler: CosineAnnealingLR
) -> None:
    """The original's checkpoint, with two more keys that it ignores; then the log, which the checkpoint holds, too.

    In this order, so that the log is that of the checkpoint whenever a run is killed and goes on.
    """
    content = {
        "epoch": epoch,
        "state_dict": {f"module.{name}": value for name, value in probe.heads.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "best_acc": probe.best_acc,
        "settings": probe.settings,
        "log": probe.log,
    }
    folder.write(CHECKPOINT, lambda path: files.replace(path, lambda file: torch.save(content, file)))
    _write_log(folder, probe)


def _write_log(folder: RunFolder, probe: Probe) -> None:
    folder.replace(LOG, "".join(json.dumps(entry) + "\n" for entry in probe.log))


def _resume(probe: Probe, folder: Path, optimizer: torch.optim.SGD, scheduler: CosineAnnealingLR) -> int:
    """Finished epochs, of a checkpoint of ours or of the original that is loaded; 0 without one.

    Raises UserError where the checkpoint cannot be read, or is of another run; nothing was written then.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        if (folder / LOG).exists():
            raise UserError(f"--output_dir: {folder} holds the log.txt of something else; take another folder")
        return 0
    saved = load_checkpoint(path)
    instead = "take another --output_dir, or remove the file"
    try:
        for name, value in saved.get("settings", {}).items():
            if probe.settings.get(name, value) != value:
                raise UserError(f"--{name}: {path} was made with {value}, got {probe.settings[name]}; {instead}")
        expected, found = scheduler.state_dict(), saved["scheduler"]
        for name, flag in (("T_max", "epochs"), ("base_lrs", "lr")):
            if found[name] != expected[name]:
                raise UserError(f"--{flag}: {path} was made with {found[name]}, got {expected[name]}; {instead}")
        epoch, probe.best_acc = int(saved["epoch"]), float(saved["best_acc"])
        if not 0 <= epoch <= probe.args.epochs:
            raise ValueError(f"{epoch} epochs are done, of {probe.args.epochs}")
        _load_heads(probe.heads, saved, path)
        moments = {i: state["momentum_buffer"] for i, state in saved["optimizer"]["state"].items()}
        for i, parameter in enumerate(probe.heads.parameters()):
            if moments[i].shape != parameter.shape:
                raise ValueError(f"momentum {i} is {tuple(moments[i].shape)}, expected {tuple(parameter.shape)}")
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict({name: found[name] for name in expected if name in found})
        probe.log = list(saved["log"]) if "log" in saved else _read_log(folder / LOG, epoch)
        json.dumps(probe.log)
    except UserError:
        raise
    except Exception as error:  # anything may be in a file
        raise UserError(f"{path} is no checkpoint of a linear classifier, or is damaged: {reason(error)}") from error
    return epoch


def _read_log(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The entries of the original's log, up to its checkpoint."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["epoch"] < epochs]


def _load_heads(heads: Heads, saved: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where the file holds other heads."""
    state = saved.get("state_dict")
    if not isinstance(state, Mapping):
        raise UserError(f"{path} is no checkpoint of a linear classifier: it has no state_dict")
    state = unwrapped(state)
    if difference := first_difference(heads.state_dict(), state):
        raise UserError(f"{path} is of another linear classifier: {difference}")
    if bad := first_nonfinite(state):
        raise UserError(f"{path}: {bad} holds numbers that are not finite")
    heads.load_state_dict(state)
