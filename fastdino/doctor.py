"""fastdino doctor: what this machine can do, on one screen. Nothing here fails where there is no GPU."""

import importlib.util
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from fastdino.data.decode import BadImage, decode
from fastdino.data.loader import useful_workers
from fastdino.data.sources import ImageSource, open_source
from fastdino.model.attention import BACKENDS
from fastdino.model.attention_choice import why_not
from fastdino.train import preset

PACKAGES = ("fastdino", "torch", "triton", "xformers", "numpy", "pillow", "simplejpeg")
READ_SECONDS = 3.0
# Numbers that a block keeps for the backward pass, in D per token. Both: its input, q k v, what attention returns, the
# sum, 4 D before GELU. Compiled, also the two norms' outputs, 4 D behind GELU, and attention's outputs once more.
EAGER_KEEPS, COMPILED_KEEPS = 10, 17


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _attention(backend: str) -> str:
    on_gpu = torch.cuda.is_available()
    reason = why_not(backend, "cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32)
    return f"no: {reason}" if reason else "yes"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "no: not installed"
    if not torch.cuda.is_available():
        return "no: needs a CUDA device; the ops run in plain PyTorch"
    from fastdino_kernels import ema_update_

    try:
        ema_update_([torch.zeros(8, device="cuda")], [torch.ones(8, device="cuda")], 0.5)
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler raises is the answer
        return f"no: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return "yes"


def _graphs() -> str:
    if not torch.cuda.is_available():
        return "no: needs a CUDA device"
    try:
        x, graph = torch.zeros(8, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x += 1
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"no: {str(error).splitlines()[0]}"
    return "yes" if float(x[0]) == 1 else "no: the replay did not write"


def _loading(source: ImageSource) -> str:
    """Images decoded per second by one core, over at most READ_SECONDS."""
    n_read, n_bad, start = 0, 0, time.perf_counter()
    for i in range(len(source)):
        try:
            decode(source[i])
            n_read += 1
        except (OSError, BadImage):
            n_bad += 1
        if time.perf_counter() - start > READ_SECONDS:
            break
    speed = n_read / (time.perf_counter() - start)
    return f"{speed:.0f} images/s on one core ({n_read} read, {n_bad} unreadable, of {len(source)})"


@dataclass(frozen=True)
class Need:
    """GPU memory of a step of 2 x 224 and 8 x 96 pixels with 65536 prototypes in bf16, as counted from shapes.

    Nothing was measured: kernels may need more. N tokens of an image's crops, D channels, P parameters.
    """

    dim: int
    depth: int
    tokens: int = 2 * 197 + 8 * 37
    prototypes: int = 65536

    @property
    def fixed_bytes(self) -> int:
        """22 per parameter: masters, two moments and teacher in fp32 (16), gradients and two copies in bf16 (6)."""
        head = self.dim * 2048 + 2048**2 + 2048 * 256 + 256 * self.prototypes
        return 22 * (12 * self.depth * self.dim**2 + head)

    @property
    def bytes_per_image(self) -> int:
        """What autograd keeps of blocks as the recommended flags run them, compiled; logits and their gradients.

        Of each student crop there are logits and their gradient, of each teacher crop logits; all in bf16.
        """
        return 2 * (COMPILED_KEEPS * self.dim * self.depth * self.tokens + (2 * 10 + 2) * self.prototypes)

    def images(self, n_bytes: float) -> int:
        """The largest batch of 1, 2, 4 ... 512 images that leaves a fifth of the memory; 0 where none does."""
        room = 0.8 * n_bytes - self.fixed_bytes
        fitting = [2**i for i in range(10) if 2**i * self.bytes_per_image <= room]
        return max(fitting, default=0)


NEEDS = {"vit_base": Need(768, 12), "vit_small": Need(384, 12), "vit_tiny": Need(192, 12)}
WANTED = 64  # images on a GPU that the original's settings were found with


def advice_for_gpu(free_bytes: float) -> str:
    """Flags for a GPU: the largest of these models that fits WANTED images, else the smallest with what fits."""
    name, need = next(
        (pair for pair in NEEDS.items() if pair[1].images(free_bytes) >= WANTED), ("vit_tiny", NEEDS["vit_tiny"])
    )
    n, gib = need.images(free_bytes), free_bytes / 2**30
    if not n:
        return (
            f"--checkpointing true and smaller crops  ({gib:.1f} GiB free hold no image of 2 x 224 and 8 x 96 pixels)"
        )
    least = (need.fixed_bytes + n * need.bytes_per_image) / 2**30
    flags = f"--arch {name} --batch_size_per_gpu {n}"
    return f"{flags}  (computed, not measured: at least {least:.1f} of {gib:.1f} GiB free)"


def advice_for_few(folder: str, source: ImageSource) -> list[tuple[str, str]]:
    """A command for a small folder, and what `train` takes there by itself."""
    few = preset.values(source)
    crops = "2 x {global_crops_size} px + {local_crops_number} x {local_crops_size} px".format(**few)
    recipe = f"{few['arch']}/{few['patch_size']}, {crops}, {few['epochs']} epochs"
    return [
        ("your images", f"fastdino train --data_path {shlex.quote(folder)}"),
        ("recipe", f"--preset small, chosen for {len(source):,} images: {recipe}; main_dino's: --preset none"),
    ]


def _device() -> tuple[str, list[tuple[str, str]]]:
    """The device in words, and what to try on it."""
    cores = useful_workers(sys.maxsize, 1)
    if not torch.cuda.is_available():
        return f"none; {cores} CPU cores", [
            ("try", "fastdino train  (the digits, made for a CPU)"),
            ("your images", "fastdino train --data_path FOLDER --preset small"),
        ]
    properties = torch.cuda.get_device_properties(0)
    half = "bf16" if torch.cuda.is_bf16_supported() else "fp16 only"
    text = (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}, {half}"
    )
    return text, [("try", f"fastdino train --data_path FOLDER {advice_for_gpu(torch.cuda.mem_get_info()[0])}")]


def environment() -> list[tuple[str, str]]:
    """(what, version or words): Python, packages, the device."""
    return [
        ("python", platform.python_version()),
        *((package, _version(package)) for package in PACKAGES),
        ("GPU", _device()[0]),
    ]


def examine(folder: str | None) -> list[tuple[str, str]]:
    """(what, finding) per line. folder: images whose loading is timed. Raises UserError where it is not one."""
    advice = _device()[1]
    lines = [*environment(), *((f"attention {name}", _attention(name)) for name in BACKENDS)]
    lines += [("Triton compiles", _triton()), ("CUDA graphs", _graphs())]
    if folder is not None:
        source = open_source(folder)
        lines.append(("loading", _loading(source)))
        if preset.is_small(source):
            advice = advice_for_few(folder, source)
    return [*lines, *advice]
