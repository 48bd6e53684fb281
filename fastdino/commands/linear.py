"""fastdino linear: the original's eval_linear.py; and DINOv2's, with all its heads at once."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastdino.commands.common import (
    HELD_OUT,
    add_result_flags,
    add_view_flags,
    add_weights_flags,
    check_positive,
    open_backbone,
    open_parts,
    tell,
)
from fastdino.commands.linear_files import CHECKPOINT, load_heads, resume, save, write_log
from fastdino.commands.linear_probe import SWEEP_STEPS, Found, Probe
from fastdino.errors import TrainingError, UserError
from fastdino.eval.linear import train
from fastdino.train.checkpoint import load_checkpoint
from fastdino.train.command_line import boolean
from fastdino.train.folder import RunFolder
from fastdino.train.interrupt import Stop

EPOCHS, SWEEP_EPOCHS = 100, 10  # of the original, of DINOv2


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
    group.add_argument(
        "--n_last_blocks",
        type=int,
        metavar="N",
        help="blocks whose CLS tokens are joined [4; 1 of networks that give nothing else]",
    )
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
    opened = open_backbone(args, of_any_kind=True, any_channels=True)
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
    defaults = {"avgpool_patchtokens": False, "lr": 0.001}
    defaults["epochs"] = SWEEP_EPOCHS if args.sweep else EPOCHS
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _evaluate(probe: Probe) -> Found:
    args = probe.args
    path = Path(args.linear_weights or Path(args.output_dir) / CHECKPOINT)
    load_heads(probe.heads, load_checkpoint(path), path)
    probe.extract(with_training=False)
    found = probe.validate()
    print(f"Accuracy of the network on the {len(probe.test.labels)} test images: {found.acc1:.1f}%")
    return found


def _train(probe: Probe) -> Found:
    """All epochs, from where an earlier run ended."""
    args, folder = probe.args, RunFolder(probe.args.output_dir, 0, print, Stop())
    folder.check()
    optimizer = probe.heads.optimizer()
    scheduler = CosineAnnealingLR(optimizer, args.epochs * (probe.steps if args.sweep else 1))
    first = resume(probe, folder.path, optimizer, scheduler)
    for what, part in (("train", probe.part), ("val", probe.test_part)):
        print(f"{what:8}{part.describe()}")
    folder.make()
    try:
        if first:
            print(f"resume  {folder.path / CHECKPOINT}, after {first} of {args.epochs} epochs")
            write_log(folder, probe)
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
            save(folder, probe, epoch + 1, optimizer, scheduler)
        found = found or probe.validate()
        print("Training of the supervised linear classifier on frozen features completed.")
        print(f"Top-1 test accuracy: {probe.best_acc:.1f}")
        return found
    finally:
        folder.unlock()
