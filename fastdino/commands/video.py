"""fastdino video: the original's eval_video_segmentation.py, and J and F of its masks."""

import argparse
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdino.commands.common import (
    add_result_flags,
    add_weights_flags,
    check_positive,
    open_backbone,
    tell,
)
from fastdino.data.decode import BadImage, open_image
from fastdino.data.films import frame_files
from fastdino.data.loader import useful_workers
from fastdino.data.sequences import SequenceSource
from fastdino.data.sources import EXTENSIONS, read_file
from fastdino.errors import UserError, printable, some_of
from fastdino.eval.video import Mask, Propagation, frame_scores, objects_of, segment, too_small

N_THREADS = 4  # that read frames ahead


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The original's, and a film of one's own."""
    parser.description = """\
Follow objects through a film from a mask of its first frame, as in the original's eval_video_segmentation.py, and write
a mask of every frame. Where there are masks of all frames to compare with, their J and F are told.
--data_path holds DAVIS 2017: JPEGImages/480p/FILM/, Annotations/480p/FILM/ and ImageSets/2017/val.txt, which names the
films. A film of one's own: --frames FOLDER --mask FILE."""
    add_weights_flags(parser)
    parser.add_argument("--data_path", metavar="FOLDER", help="DAVIS 2017")
    parser.add_argument("--frames", metavar="FOLDER", help="a film instead: a folder of images, by name in order")
    parser.add_argument(
        "--mask",
        metavar="FILE",
        help="PNG as large as the first of --frames: 0 for the background, each object with a number of its own",
    )
    parser.add_argument(
        "--output_dir",
        default=".",
        metavar="FOLDER",
        help="masks go to FILM/ below; of --frames FILM, to FILM_masks/ [.]",
    )
    parser.add_argument("--imsize", type=int, default=480, metavar="N", help="short side of a frame [480]")
    parser.add_argument(
        "--n_last_frames", type=int, default=7, metavar="N", help="frames before that are looked at [7]"
    )
    parser.add_argument(
        "--size_mask_neighborhood", type=int, default=12, metavar="N", help="patches looked away, 0 for all [12]"
    )
    parser.add_argument("--topk", type=int, default=5, metavar="N", help="patches whose labels are taken [5]")
    parser.add_argument("--bs", type=int, default=6, metavar="N", help="frames that the backbone sees at once [6]")
    add_result_flags(parser)


@dataclass(frozen=True)
class Film:
    """frames, and the mask (H, W) of the first; truth: masks of all frames in files, or none."""

    name: str
    frames: Sequence[Path]
    mask: Mask
    palette: list[int]
    truth: Sequence[Path]
    output: Path

    def path(self, index: int) -> Path:
        """Where the mask of a frame is written."""
        return self.output / f"{self.frames[index].stem}.png"


def run(args: argparse.Namespace) -> int:
    """A line or two for each film, and the numbers."""
    check_positive(args, "imsize", "topk", "bs")
    for name in ("n_last_frames", "size_mask_neighborhood"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}: expected 0 or more, got {getattr(args, name)}")
    films = _films(args)
    opened = open_backbone(args)
    how = Propagation(args.imsize, args.n_last_frames, args.size_mask_neighborhood, args.topk)
    of_objects: list[np.ndarray] = []
    n_frames = n_bad = 0
    for i, film in enumerate(films):
        print(f"[{i}/{len(films)}] Begin to segmentate video {film.name}.", flush=True)
        started, bad = time.perf_counter(), dict[int, str]()
        scores = _segment(film, opened.backbone, how, args.bs, bad)
        seconds = time.perf_counter() - started
        n_objects = len(objects_of(film.mask))
        said = f"{len(film.frames)} frames, {n_objects} object{'s' * (n_objects > 1)}, {seconds:.1f} s"
        if len(scores):
            of_objects.append(scores)
            j, f = scores.mean((0, 1))
            said += f", J {j:.4f}, F {f:.4f}"
        print(f"{film.name}: {said}")
        if bad:
            print(f"{film.name}: without {some_of(list(bad.values()), len(film.frames))}")
        n_frames, n_bad = n_frames + len(film.frames), n_bad + len(bad)
    numbers = _summary(of_objects)
    if numbers:
        print(", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    print(f"wrote the masks below {args.output_dir}")
    data = args.data_path or args.frames
    tell(args, numbers, data=data, films=len(films), scored=len(of_objects), frames=n_frames, unreadable=n_bad)
    return 0


def _segment(film: Film, backbone: Any, how: Propagation, batch_size: int, bad: dict[int, str]) -> np.ndarray:
    """Write a film's masks; (frames, objects, 2) J and F of all frames but the first and the last, as DAVIS counts."""
    objects = objects_of(film.mask)
    masks = segment(
        backbone,
        SequenceSource(film.frames),
        film.mask,
        how,
        batch_size=batch_size,
        num_workers=useful_workers(N_THREADS, 1),
        bad=bad,
    )
    if small := too_small(backbone, film.mask, how.side):
        print(f"{film.name}: too small to be seen in any patch, and not followed: object {', '.join(map(str, small))}")
    scores = []
    _make_folder(film.output)
    _write(film, 0, film.mask)
    for index, mask in masks:
        _write(film, index, mask)
        if film.truth and index < len(film.frames) - 1:
            truth, _ = _read_mask(film.truth[index])
            if truth.shape != mask.shape:
                raise UserError(f"{printable(film.truth[index])}: expected a mask of {mask.shape}, got {truth.shape}")
            scores.append(frame_scores(mask, truth, objects))
    return np.array(scores)


def _summary(of_objects: list[np.ndarray]) -> dict[str, float]:
    """Means over all objects of all films; recall: the share of frames above a half."""
    if not of_objects:
        return {}
    mean = np.concatenate([scores.mean(0) for scores in of_objects]).mean(0)
    recall = np.concatenate([(scores > 0.5).mean(0) for scores in of_objects]).mean(0)
    return {
        "J&F-Mean": float(mean.mean()),
        "J-Mean": float(mean[0]),
        "J-Recall": float(recall[0]),
        "F-Mean": float(mean[1]),
        "F-Recall": float(recall[1]),
    }


def _films(args: argparse.Namespace) -> list[Film]:
    """What the flags ask for. Raises UserError where it is not there, or masks would be written over it."""
    if bool(args.data_path) == bool(args.frames) or bool(args.mask) != bool(args.frames):
        raise UserError("expected --data_path FOLDER, or --frames FOLDER and --mask FILE")
    output = Path(args.output_dir)
    if args.frames:
        folder = Path(args.frames)
        films = [_film(folder.resolve().name, folder, Path(args.mask), output / f"{folder.resolve().name}_masks")]
    else:
        data = Path(args.data_path)
        listed = data / "ImageSets" / "2017" / "val.txt"
        try:
            names = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data_path: expected names of films in {printable(listed)}: {error}") from error
        if not names:
            raise UserError(f"--data_path: {printable(listed)} names no film")
        if odd := [name for name in names if Path(name).name != name]:
            raise UserError(f"--data_path: {printable(listed)}: expected names of folders, got {printable(odd[0])}")
        frames, masks = data / "JPEGImages" / "480p", data / "Annotations" / "480p"
        films = [_film(name, frames / name, masks / name, output / name) for name in names]
    for film in films:
        there = next(path for path in (film.output, *film.output.parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"--output_dir: expected a folder, got the file {printable(there)}")
        taken = {path.resolve().parent for path in (*film.frames, *film.truth)}
        if film.output.resolve() in taken or (args.mask and film.path(0).resolve() == Path(args.mask).resolve()):
            raise UserError(f"--output_dir: masks would be written over what is in {printable(film.output)}")
    return films


def _film(name: str, folder: Path, masks: Path, output: Path) -> Film:
    """masks: a file, of the first frame, or a folder with masks called like frames, of the first at least."""
    if not folder.is_dir():
        raise UserError(f"expected a folder of frames, found {'a file' if folder.exists() else 'nothing'} at {folder}")
    frames = frame_files(folder)
    if not frames:
        raise UserError(f"no frame in {printable(folder)} (looked for {', '.join(e[1:] for e in EXTENSIONS)})")
    by_stem: dict[str, Path] = {}
    for frame in frames:
        if (other := by_stem.setdefault(frame.stem, frame)) != frame:
            raise UserError(f"{printable(folder)}: two frames with one name, {other.name} and {frame.name}")
    truth = [masks / f"{frame.stem}.png" for frame in frames] if not masks.is_file() else [masks]
    mask, palette = _read_mask(truth[0])
    if not mask.any():
        raise UserError(f"{printable(truth[0])} shows no object: all of it is 0")
    try:
        first = open_image(read_file(frames[0]))
    except (BadImage, OSError) as error:
        raise UserError(f"the first frame cannot be read: {printable(frames[0])}: {error}") from error
    if (first.height, first.width) != mask.shape:
        raise UserError(
            f"{printable(truth[0])}: expected a mask as large as the first frame, {first.width} x {first.height} "
            f"pixels, got {mask.shape[1]} x {mask.shape[0]}"
        )
    is_whole = len(truth) == len(frames) and all(path.is_file() for path in truth)
    return Film(name, frames, mask, palette, truth if is_whole else [], output)


def _read_mask(path: Path) -> tuple[Mask, list[int]]:
    """(objects' numbers (H, W), the colors they are shown in)."""
    try:
        image = Image.open(io.BytesIO(read_file(path)), formats=("PNG", "GIF", "BMP", "TIFF"))
        if image.mode not in ("P", "L", "1"):
            expected = "a mask of one channel, whose levels are the objects' numbers"
            raise UserError(f"{printable(path)}: expected {expected}, got {image.mode}")
        colors = image.getpalette() if image.mode == "P" else None
        return np.array(image).astype(np.uint8), colors or voc_palette()
    except UserError:
        raise
    except Exception as error:  # a broken file makes codecs raise nearly anything
        raise UserError(f"{printable(path)}: expected a PNG, a mask of the first frame: {printable(error)}") from error


def voc_palette() -> list[int]:
    """256 colors, red, green, blue of each: PASCAL VOC's, which DAVIS has."""
    colors = []
    for number in range(256):
        for channel in range(3):  # of three bits each, the lowest are the colors' highest
            bits = [number >> (3 * place + channel) & 1 for place in range(3)]
            colors.append(sum(bit << (7 - place) for place, bit in enumerate(bits)))
    return colors


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {printable(folder)}: {error.strerror or error}") from error


def _write(film: Film, index: int, mask: Mask) -> None:
    """As an indexed PNG."""
    image = Image.fromarray(mask)
    image.putpalette(film.palette)
    path = film.path(index)
    try:
        image.save(path)
    except OSError as error:
        raise UserError(f"--output_dir: {printable(path)}: {error.strerror or error}") from error
