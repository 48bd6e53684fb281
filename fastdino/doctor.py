"""fastdino doctor: what this machine can do, on one screen. Nothing here fails where there is no GPU."""

import importlib.util
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from fastdino.data.decode import BadImage, decode
from fastdino.data.sources import FolderSource
from fastdino.model.attention import BACKENDS, why_not

PACKAGES = ("fastdino", "torch", "triton", "xformers", "numpy", "pillow", "simplejpeg")
READ_SECONDS = 3.0


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


def _loading(folder: str) -> str:
    """Images decoded per second by one core, over at most READ_SECONDS. Raises UserError as FolderSource does."""
    source = FolderSource(folder)
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


def _device() -> tuple[str, str]:
    """The device in words, and flags for it."""
    if not torch.cuda.is_available():
        return f"none; {os.cpu_count()} CPU cores", "fastdino train  (the digits, made for a CPU)"
    properties = torch.cuda.get_device_properties(0)
    half = "bf16" if torch.cuda.is_bf16_supported() else "fp16 only"
    text = (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}, {half}"
    )
    return text, "--use_fp16 true --batch_size_per_gpu 64  (the original's; raise it while memory lasts)"


def examine(folder: str | None) -> list[tuple[str, str]]:
    """(what, finding) per line. folder: images whose loading is timed. Raises UserError where it is not one."""
    device, advice = _device()
    lines = [("python", platform.python_version())]
    lines += [(package, _version(package)) for package in PACKAGES]
    lines += [("GPU", device), *((f"attention {name}", _attention(name)) for name in BACKENDS)]
    lines += [("Triton compiles", _triton()), ("CUDA graphs", _graphs())]
    if folder is not None:
        lines.append(("loading", _loading(folder)))
    return [*lines, ("try", advice)]
