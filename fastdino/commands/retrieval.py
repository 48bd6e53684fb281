"""fastdino retrieval: the original's eval_image_retrieval.py."""

import argparse
from pathlib import Path

import numpy as np

from fastdino.commands.common import (
    add_ignored_flags,
    add_loading_flags,
    add_result_flags,
    add_weights_flags,
    check_positive,
    loading,
    open_backbone,
    tell,
)
from fastdino.data.sequences import SequenceSource
from fastdino.errors import UserError, printable, some_of
from fastdino.eval.retrieval import KS, mean_precision, ranking, read_truth, retrieval_features
from fastdino.train.command_line import boolean


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The original's."""
    parser.description = """\
Image retrieval on Oxford and Paris, revisited, as in the original's eval_image_retrieval.py.
--data_path holds roxford5k/gnd_roxford5k.pkl and roxford5k/jpg/*.jpg, or the same with rparis6k.
The article: Oxford with --imsize 224, Paris with --imsize 512 --multiscale true."""
    add_weights_flags(parser)
    parser.add_argument("--data_path", required=True, metavar="FOLDER", help="the folder that holds --dataset")
    parser.add_argument("--dataset", default="roxford5k", metavar="NAME", help="folder in --data_path [roxford5k]")
    parser.add_argument("--imsize", type=int, default=224, metavar="N", help="longest side of an image [224]")
    parser.add_argument(
        "--multiscale", type=boolean, default=False, metavar="BOOL", help="mean of three scales, 1 to 1/2 [off]"
    )
    add_loading_flags(parser.add_argument_group("Images"), batch_size=16)
    add_ignored_flags(parser, "--use_cuda")
    add_result_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The original's two lines, and the numbers."""
    check_positive(args, "imsize")
    folder = Path(args.data_path) / args.dataset
    truth = read_truth(folder / f"gnd_{args.dataset}.pkl")
    sources = [
        _images(folder / "jpg", names, f"{what} images of {args.dataset}")
        for what, names in (("database", truth.database), ("query", truth.queries))
    ]
    opened = open_backbone(args)
    print(f"train: {len(sources[0])} imgs / query: {len(sources[1])} imgs", flush=True)
    (database, lost), (queries, unasked) = (
        retrieval_features(opened.backbone, source, args.imsize, multiscale=args.multiscale, **loading(args))
        for source in sources
    )
    for what, bad, n in (("database", lost, len(database)), ("queries", unasked, len(queries))):
        if bad:
            print(f"{what:8} without {some_of(list(bad.values()), n)}")
    ranked = ranking(database, queries, list(lost))
    asked = [i for i in range(len(queries)) if i not in unasked]
    numbers: dict[str, float] = {}
    for level, of_queries in {"medium": truth.medium(), "hard": truth.only_hard()}.items():
        relevant, ignored = ([those[i] for i in asked] for those in of_queries)
        try:
            area, precision = mean_precision(ranked[asked], relevant, ignored)
        except ValueError as error:
            raise UserError(f"--data_path: no query that can be read has an image to find: {level}") from error
        numbers |= {f"{level}_map": area}
        numbers |= {f"{level}_mp{k}": float(p) for k, p in zip(KS, precision)}
    percent = {name: np.around(100 * value, 2) for name, value in numbers.items()}
    at_k = [np.array([percent[f"{level}_mp{k}"] for k in KS]) for level in ("medium", "hard")]
    print(f">> {args.dataset}: mAP M: {percent['medium_map']}, H: {percent['hard_map']}")
    print(f">> {args.dataset}: mP@k{np.array(KS)} M: {at_k[0]}, H: {at_k[1]}")
    tell(
        args,
        numbers,
        data=str(folder),
        imsize=args.imsize,
        multiscale=args.multiscale,
        images=len(database),
        queries=len(asked),
        unreadable=len(lost) + len(unasked),
    )
    return 0


def _images(folder: Path, names: list[str], what: str) -> SequenceSource:
    """Images by name. Raises UserError where one is not there."""
    if not folder.is_dir():
        raise UserError(f"--data_path: expected a folder of images at {printable(folder)}, found nothing")
    paths = [folder / f"{name}.jpg" for name in names]
    if missing := [path for path in paths if not path.exists()]:
        others = f", and {len(missing) - 1:,} others are missing" if len(missing) > 1 else ""
        raise UserError(f"--data_path: the benchmark names {printable(missing[0])}, which is not there{others}")
    return SequenceSource(paths, what=what)
