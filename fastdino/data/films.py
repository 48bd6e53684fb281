"""Films, frame by frame: a video file, or a folder of images in the order of their names; and writing one."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino.data.decode import BadImage, decode
from fastdino.data.sources import EXTENSIONS, read_file
from fastdino.errors import UserError, printable

CODECS = {".mp4": "vp09", ".avi": "MJPG"}  # of those that OpenCV's wheels can write; browsers play VP9


def frames(path: str | Path, bad: list[str] | None = None) -> Iterator[tuple[str, Image.Image]]:
    """(name, RGB image) of each frame. bad: gets a line for each image of a folder that cannot be read.

    Raises UserError where there is no film at `path`, or no frame in it.
    """
    path = Path(path)
    if path.is_dir():
        found = False
        for file in frame_files(path):
            try:
                image = decode(read_file(file))
            except (BadImage, OSError) as error:
                if bad is not None:
                    bad.append(f"{printable(file)}: {error}")
                continue
            found = True
            yield file.stem, image
        if not found:
            raise UserError(f"no frame in {printable(path)} that can be read")
        return
    if not path.is_file():
        raise UserError(f"expected a film or a folder of frames, found nothing at {printable(path)}")
    film, number = cv2.VideoCapture(str(path)), 0
    try:
        while film.isOpened():
            ok, pixels = film.read()
            if not ok:
                break
            yield f"frame-{number:05}", Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            number += 1
    finally:
        film.release()
    if not number:
        raise UserError(f"no frame in {printable(path)}: it is no film that OpenCV reads")


def frame_files(folder: Path) -> list[Path]:
    """The images in a folder, not below it, in the order of their names: frame2 before frame10."""
    files = (p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    return sorted(files, key=_natural)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", path.stem)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], path.name


def rate_of(path: str | Path) -> float | None:
    """Frames a second of a video file; None of a folder, and where the file does not say."""
    if Path(path).is_dir():
        return None
    film = cv2.VideoCapture(str(path))
    try:
        return film.get(cv2.CAP_PROP_FPS) or None
    finally:
        film.release()


def write_film(path: Path, pictures: Iterable[NDArray[np.uint8]], fps: float) -> int:
    """Write RGB pictures (H, W, 3), all of one size, as an .mp4 or .avi; how many. An odd row or column is cut off.

    Raises UserError where OpenCV cannot write it. What was at `path` is replaced once all frames are there.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    writer, n = None, 0
    try:
        for picture in pictures:
            height, width = (side // 2 * 2 for side in picture.shape[:2])
            if writer is None:
                codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()])
                writer = cv2.VideoWriter(str(partial), codec, fps, (width, height))
                if not writer.isOpened():
                    raise UserError(f"{path}: this OpenCV cannot write {CODECS[path.suffix.lower()]}")
            writer.write(cv2.cvtColor(np.ascontiguousarray(picture[:height, :width]), cv2.COLOR_RGB2BGR))
            n += 1
        if writer is not None:
            writer.release()
            partial.replace(path)
    finally:
        if writer is not None:
            writer.release()
        partial.unlink(missing_ok=True)
    return n
