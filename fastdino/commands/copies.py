"""fastdino copies: the original's eval_copy_detection.py."""

import argparse
from pathlib import Path

import numpy as np
import torch

from fastdino.commands.common import (
    add_ignored_flags,
    add_loading_flags,
    add_result_flags,
    add_weights_flags,
    check_positive,
    loading,
    open_backbone,
    some,
    tell,
)
from fastdino.data.sources import FolderSource, ImageSource, open_source
from fastdino.errors import UserError, printable, some_of
from fastdino.eval.copies import BLOCKS, copy_features, copy_map, fit_whitening, nearest, originals_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The original's."""
    parser.description = """\
Copy detection on Copydays, as in the original's eval_copy_detection.py.
--data_path holds original/, and copies in strong/, jpegqual/3 ... 75/, crops/10 ... 80/: those of them that are there.
The article: ViT-B/8, whitening learned on 20,000 and distractors of 10,000 images of YFCC100M."""
    add_weights_flags(parser)
    parser.add_argument("--data_path", required=True, metavar="FOLDER", help="Copydays")
    parser.add_argument("--whitening_path", metavar="PATH", help="images to learn the whitening from [none]")
    parser.add_argument("--distractors_path", metavar="PATH", help="images to search among, too [none]")
    parser.add_argument("--imsize", type=int, default=320, metavar="N", help="side of the square images [320]")
    add_loading_flags(parser.add_argument_group("Images"), batch_size=16)
    add_ignored_flags(parser, "--use_cuda")
    add_result_flags(parser)


def run(args: argparse.Namespace) -> int:
    """A line for each block, and the numbers."""
    check_positive(args, "imsize")
    sources = _blocks(Path(args.data_path))
    names = {block: [Path(path).name for path in source.paths] for block, source in sources.items()}
    try:
        originals = {block: originals_of(block, those, names["original"]) for block, those in names.items()}
    except ValueError as error:
        raise UserError(f"--data_path: {printable(error)}") from error
    more = {name: open_source(path) for name in ("distractors", "whitening") if (path := getattr(args, f"{name}_path"))}
    opened = open_backbone(args)
    least = opened.backbone.patch_embed.patch_size
    if args.imsize < least:
        raise UserError(f"--imsize: expected at least the patch size {least}, got {args.imsize}")
    if "whitening" in more and len(more["whitening"]) < (dim := 2 * opened.backbone.embed_dim):
        raise UserError(
            f"--whitening_path: expected at least {dim} images, as many as features have numbers, "
            f"got {len(more['whitening'])}"
        )
    n_bad = 0

    def extracted(what: str, source: ImageSource) -> tuple[torch.Tensor, np.ndarray]:
        nonlocal n_bad
        print(f"{what:12}{len(source):,} images", flush=True)
        bad: list[str] = []
        found = copy_features(
            opened.backbone, source, args.imsize, bad=lambda _, line: bad.append(line), **loading(args)
        )
        if bad:
            print(f"{what:12}without {some_of(bad, len(source))}")
        n_bad += len(bad)
        return found

    queries = {block: extracted(block, source) for block, source in sources.items()}
    print(f"Extraction of queries features done. Shape: {_shape([found for found, _ in queries.values()])}")
    database, index = queries["original"]
    if "distractors" in more:
        print("Using distractors...")
        database = torch.cat((database, extracted("distractors", more["distractors"])[0]))
        index = np.concatenate((index, np.full(len(database) - len(index), -1)))
    print(f"Extraction of database and distractors features done. Shape: {_shape([database])}", flush=True)
    whiten = None
    if "whitening" in more:
        print(f"Extracting features on images from {args.whitening_path} for learning the whitening operator.")
        try:
            whiten = fit_whitening(extracted("whitening", more["whitening"])[0])
        except ValueError as error:
            raise UserError(f"--whitening_path: {error}") from error
        database = whiten(database)
    numbers = {}
    for block, (features, kept) in queries.items():
        found = index[nearest(whiten(features) if whiten else features, database)]
        value = copy_map(found, [originals[block][i] for i in kept])
        print(f"eval on {block} mAP={value:.3f}")
        numbers[f"{block}_map"] = value
    tell(
        args,
        numbers,
        data=args.data_path,
        imsize=args.imsize,
        database=len(database),
        whitening=args.whitening_path,
        unreadable=n_bad,
    )
    return 0


def _shape(features: list[torch.Tensor]) -> list[int]:
    return [sum(map(len, features)), features[0].shape[1]]


def _blocks(folder: Path) -> dict[str, FolderSource]:
    """The blocks that are there. Raises UserError where it is not the originals and at least one block of copies."""
    there = [block for block in BLOCKS if (folder / block).is_dir()]
    if "original" not in there or len(there) < 2:
        raise UserError(
            f"--data_path: expected the folders original/ and one of {some(BLOCKS[1:])} "
            f"in {printable(folder)}, found {some(there)}"
        )
    if len(there) < len(BLOCKS):
        print(f"without {some([block for block in BLOCKS if block not in there])}, which are not there")
    return {block: FolderSource(folder / block) for block in there}
