"""fastdino knn: the original's eval_knn.py."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from fastdino import files
from fastdino.commands.common import (
    HELD_OUT,
    add_result_flags,
    add_view_flags,
    add_weights_flags,
    check_positive,
    loading,
    open_backbone,
    open_labelled,
    original_numbers,
    tell,
)
from fastdino.data.sources import ImageSource
from fastdino.errors import UserError, some_of
from fastdino.eval.knn import Features, extract_features, knn_votes, n_of_each_class
from fastdino.train.command_line import boolean

PARTS = ("train", "test")  # of files that the original writes: trainfeat.pth, trainlabels.pth ...


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The original's, and DINOv2's few-shot ones."""
    parser.description = f"""\
Weighted k-NN on frozen features, as in the original's eval_knn.py.
--data_path holds {HELD_OUT}, evaluated leave-one-out; or is left out, for the digits."""
    add_weights_flags(parser, unless="--load_features")
    add_view_flags(parser)
    parser.add_argument("--data_path", metavar="FOLDER", help="labelled images; without it: scikit-learn's digits")
    parser.add_argument(
        "--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], metavar="N", help="neighbours [10 20 100 200]"
    )
    parser.add_argument("--temperature", type=float, default=0.07, metavar="X", help="of the votes' weights [0.07]")
    parser.add_argument(
        "--n_per_class", type=int, nargs="+", metavar="N", help="a bank of N images of each class, drawn at random"
    )
    parser.add_argument("--n_tries", type=int, default=1, metavar="N", help="such banks, of which the mean is told [1]")
    parser.add_argument("--use_cuda", type=boolean, default=True, metavar="BOOL", help="features stay on the GPU [on]")
    parser.add_argument("--dump_features", metavar="FOLDER", help="write the features there, as the original does")
    parser.add_argument("--load_features", metavar="FOLDER", help="read them from there, instead of images and weights")
    add_result_flags(parser)


def run(args: argparse.Namespace) -> int:
    """A line for each k, and the numbers."""
    for n in (*args.nb_knn, *(args.n_per_class or ()), args.n_tries):
        if n < 1:
            raise UserError(f"--nb_knn, --n_per_class, --n_tries: expected numbers above 0, got {n}")
    check_positive(args, "temperature")
    bank, queries = _load(args) if args.load_features else _extract(args)
    numbers: dict[str, float] = {}
    for n in args.n_per_class or [0]:
        banks = [n_of_each_class(bank, n, seed) for seed in range(args.n_tries)] if n else [bank]
        for k in args.nb_knn:
            votes = [knn_votes(few, queries, k, args.temperature) for few in banks]
            top1, top5 = (sum(percents) / len(banks) for percents in zip(*votes))
            of_each = f" of {n} images a class" if n else ""
            print(f"{k}-NN classifier result{of_each}: Top1: {top1}, Top5: {top5}")
            name = f"{n}_per_class_" if n else ""
            numbers |= {f"{name}{k}nn_top1": top1 / 100, f"{name}{k}nn_top5": top5 / 100}
    tell(args, numbers, data=args.data_path or args.load_features or "digits", images=len((queries or bank).labels))
    return 0


def _extract(args: argparse.Namespace) -> tuple[Features, Features | None]:
    opened = open_backbone(args, of_any_kind=True, any_channels=True)
    source, held_out = open_labelled(args.data_path, opened.image_format)

    def extracted(images: ImageSource, what: str) -> Features:
        found = extract_features(opened.backbone, images, **vars(opened.view), **loading(args))
        if found.bad:
            print(f"{what:8} without {some_of(found.bad)}")
        return found if args.use_cuda else Features(found.features.cpu(), found.labels.cpu(), found.bad)

    print(f"bank     {source.describe()}")
    print(f"queries  {held_out.describe() if held_out else 'the same, leave-one-out'}")
    bank = extracted(source, "bank")
    queries = extracted(held_out, "queries") if held_out else None
    if args.dump_features:
        _dump(Path(args.dump_features), bank, queries, source.classes)
    return bank, queries


def _dump(folder: Path, bank: Features, queries: Features | None, classes: Sequence[str]) -> None:
    """In the original's files, with its class numbers."""
    number = torch.from_numpy(original_numbers(classes))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part, found in zip(PARTS, (bank, queries or bank)):
            for what, values in (("feat", found.features.cpu()), ("labels", number[found.labels.cpu()])):
                files.replace(folder / f"{part}{what}.pth", partial(torch.save, values))
    except OSError as error:
        raise UserError(f"--dump_features: {folder}: {error.strerror or error}") from error
    print(f"wrote {folder}/trainfeat.pth, trainlabels.pth, testfeat.pth, testlabels.pth")


def _load(args: argparse.Namespace) -> tuple[Features, Features]:
    device = "cuda" if args.use_cuda and torch.cuda.is_available() and args.device == "auto" else "cpu"
    folder, parts = Path(args.load_features), []
    for part in PARTS:
        try:
            values = [torch.load(folder / f"{part}{w}.pth", map_location=device) for w in ("feat", "labels")]
        except Exception as error:  # a damaged pickle makes the loader raise nearly anything
            raise UserError(f"--load_features: {folder} has no features of the original's form: {error}") from error
        features, labels = values
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise UserError(
                f"--load_features: expected (N, D) and (N,) in {folder}, got {features.shape} and {labels.shape}"
            )
        parts.append(Features(features.float(), labels.long()))
    return parts[0], parts[1]
