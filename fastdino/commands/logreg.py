"""fastdino logreg: DINOv2's logistic regression on frozen features."""

import argparse
import time

from fastdino.commands.common import (
    HELD_OUT,
    Part,
    add_result_flags,
    add_view_flags,
    add_weights_flags,
    asked_input,
    check_positive,
    loading,
    open_backbone,
    open_parts,
    tell,
)
from fastdino.errors import UserError, some_of
from fastdino.eval.linear import Labelled, Tokens
from fastdino.eval.logreg import C_VALUES, MAX_ITERATIONS, log_regression
from fastdino.train.command_line import boolean


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What DINOv2 fixes, as defaults."""
    parser.description = f"""\
Logistic regression with an L2 penalty on frozen features of center crops, as in DINOv2: C is the best of 45 on a
tenth of the training images; then all are fitted. scikit-learn's, in fp64 on the CPU.
--data_path holds {HELD_OUT}, a fifth of which is
held out; or is left out, for the digits."""
    add_weights_flags(parser)
    add_view_flags(parser)
    parser.add_argument("--data_path", metavar="FOLDER", help="labelled images; without it: scikit-learn's digits")
    parser.add_argument("--n_last_blocks", type=int, metavar="N", help="blocks whose CLS tokens are joined [1]")
    parser.add_argument(
        "--avgpool_patchtokens",
        type=boolean,
        default=False,
        metavar="BOOL",
        help="and the mean of the last one's patches [off]",
    )
    parser.add_argument(
        "--C", type=float, nargs="+", metavar="X", help="to choose from; a single one is taken [45 from 1e-6 to 1e5]"
    )
    add_result_flags(parser)


def run(args: argparse.Namespace) -> int:
    """DINOv2's lines, and the numbers."""
    started = time.monotonic()
    check_positive(args, "n_last_blocks")
    if args.C and min(args.C) <= 0:
        raise UserError(f"--C: expected values above 0, got {min(args.C):g}")
    opened = open_backbone(args, of_any_kind=True, any_channels=True)
    part, test_part = open_parts(args.data_path, opened.image_format)
    seen = asked_input(args, opened.backbone, n_layers=1)

    def extracted(part: Part, what: str) -> Labelled:
        print(f"{what:8}{part.describe()}", flush=True)
        tokens = Tokens(
            backbone=opened.backbone, source=part.source, labels=part.labels, inputs=[seen], **loading(args)
        )
        data = tokens.cached(part.indices, opened.view)
        if data.bad:
            print(f"{what:8}without {some_of(data.bad)}")
        return data

    train, test = extracted(part, "train"), extracted(test_part, "val")
    extracting = time.monotonic() - started
    found = log_regression(train, test, args.C or C_VALUES, say=lambda line: print(line, flush=True))
    n_classes = len(part.source.classes)
    print("Training of the supervised logistic regression on frozen features completed.")
    print(f"Top-1 test accuracy: {100 * found.top1:.1f}")
    if n_classes >= 5:
        print(f"Top-5 test accuracy: {100 * found.top5:.1f}")
    print(f"obtained for C = {found.c:.6f}")
    if found.iterations >= MAX_ITERATIONS:
        print(f"not converged after {MAX_ITERATIONS:,} iterations, where DINOv2 stops, too")
    numbers = {"logreg_top1": found.top1, **({"logreg_top5": found.top5} if n_classes >= 5 else {}), "C": found.c}
    context = {"data": args.data_path or "digits", "features": str(seen), "iterations": found.iterations}
    context |= {"train_images": len(train.labels), "images": len(test.labels)}
    context |= {"unreadable": len({*train.bad, *test.bad})}
    seconds = round(time.monotonic() - started, 1)
    tell(args, numbers, **context, seconds=seconds, seconds_features=round(extracting, 1))
    return 0
