"""Image files changed at random: each is decoded, or a bad image with a reason; nothing crashes or hangs.

cd tests && python -m trials.images [--images 2000] [--loaded 400] [--quick]
"""

import faulthandler
import io
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from trials.runs import Table, trial_parser

from fastdino.data.decode import BadImage, decode
from fastdino.data.loader import CropLoader, EpochSampler
from fastdino.data.params import MultiCropRecipe, ViewRecipe
from fastdino.data.sources import FolderSource

LIMIT_S = 20  # a decoder that takes longer hangs
MODES = {
    "JPEG": ["RGB", "L", "CMYK"],
    "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P"],
    "BMP": ["RGB", "L", "1", "P"],
    "TIFF": ["RGB", "L", "CMYK", "I;16", "F"],
    "PPM": ["RGB", "L", "1"],
}


def originals() -> dict[str, bytes]:
    """A small file of each format and mode, by name."""
    rng, files = np.random.default_rng(0), {}
    smooth = np.repeat(np.repeat(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), 9, 0), 9, 1)
    for file_format, modes in MODES.items():
        for mode in modes:
            image = Image.fromarray(smooth)
            gray = np.asarray(image.convert("L"))
            wide = {"I;16": gray.astype(np.uint16) * 257, "F": gray.astype(np.float32) / 255}
            image = Image.fromarray(wide[mode]) if mode in wide else image.convert(mode)
            file = io.BytesIO()
            image.save(file, file_format)
            files[f"{file_format} {mode}"] = file.getvalue()
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", progressive=True)
    files["JPEG progressive"] = file.getvalue()
    return files


def mutated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Changed bits or bytes, mostly in the header; cut; repeated; another format's beginning."""
    kind, changed = rng.randrange(6), bytearray(data)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return rng.choice(others)[: rng.randrange(1, 64)] + data[rng.randrange(64) :]
    if kind == 2:
        at = rng.randrange(len(data))
        return data[:at] + data[rng.randrange(len(data)) :]
    for _ in range(rng.choice([1, 2, 8, 64])):
        at = rng.randrange(min(len(data), 64 if kind == 3 else len(data)))
        changed[at] = rng.randrange(256) if kind == 4 else changed[at] ^ 1 << rng.randrange(8)
    return bytes(changed)


def decoded(data: bytes) -> list[str]:
    """What is wrong with how a file is decoded."""
    try:
        image = decode(data)
    except BadImage as error:
        return [] if str(error) and "\n" not in str(error) and "0x" not in str(error) else [f"said {error}"]
    except BaseException as error:
        return [f"{type(error).__name__}: {error}"]
    return [] if image.mode == "RGB" else [image.mode]


def loaded(files: list[bytes], folder: Path, good: bytes) -> list[str]:
    """What is wrong with a batch in which one of ten files is damaged."""
    for i in range(10 * len(files)):
        (folder / f"{i:05}.jpg").write_bytes(files[i // 10] if i % 10 == 0 else good)
    source = FolderSource(folder)
    view = ViewRecipe(size=16, scale=(0.4, 1.0), flip=0.5, jitter=0, gray=0, blur=0, solarize=0)
    sampler = EpochSampler(len(source), 20, 0)
    loader = CropLoader(source, MultiCropRecipe(globals=(view, view), locals=()), sampler, num_workers=2)
    named = {line.partition(":")[0] for batch in loader for line in batch.bad}
    loader.close()
    broken = {source.name(10 * i) for i, data in enumerate(files) if not _readable(data)}
    return [] if named == broken else [f"named {len(named)}, broken {len(broken)}"]


def _readable(data: bytes) -> bool:
    try:
        decode(data)
    except BadImage:
        return False
    return True


def main() -> int:
    parser = trial_parser(__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--loaded", type=int, default=400)
    args = parser.parse_args()
    n_images, n_loaded = (200, 40) if args.quick else (args.images, args.loaded)
    table, rng, files = Table(), random.Random(args.seed), originals()
    kinds, every = list(files), list(files.values())
    changed = [mutated(files[kinds[i % len(kinds)]], rng, every) for i in range(n_images)]
    for i, data in enumerate(changed):
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        table.add("a changed image, decoded", f"{kinds[i % len(kinds)]}, number {i}", decoded(data))
    faulthandler.dump_traceback_later(LIMIT_S * 10, exit=True)
    for start in range(0, n_loaded, 40):
        with tempfile.TemporaryDirectory() as name:
            words = loaded(changed[start : start + 40], Path(name), files["JPEG RGB"])
            table.add("40 changed images among 400, loaded", f"from {start} on", words)
    faulthandler.cancel_dump_traceback_later()
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
