"""fastdino doctor: what this machine can do, on one screen. Nothing here fails where there is no GPU."""

import importlib.util
import os
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from fastdino.data.channels import ImageFormat, converted
from fastdino.data.decode import BadImage, decode
from fastdino.data.loader import useful_workers
from fastdino.data.remarks import remarks
from fastdino.data.sources import ImageSource, open_source
from fastdino.errors import UserError, reason, some_of
from fastdino.model.attention import BACKENDS
from fastdino.model.attention_choice import why_not
from fastdino.train import distributed, preset
from fastdino.train.build import Own, Parts, assemble
from fastdino.train.config import TrainConfig
from fastdino.train.folder import RunFolder
from fastdino.train.interrupt import Stop
from fastdino.train.recipes import SMALL

PACKAGES = ("fastdino", "torch", "triton", "xformers", "numpy", "pillow", "simplejpeg")
DEMO = "fastdino train  (the digits, made for a CPU)"
READ_SECONDS = 3.0
STEP_SECONDS, MAX_STEPS = 5.0, 12  # of a run that is measured: whichever comes first
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


def _loading(source: ImageSource) -> list[tuple[str, str]]:
    """Images decoded per second by one core, over at most READ_SECONDS, what is done to them, and which are bad."""
    n_read, bad, start = 0, list(getattr(source, "damage", ())), time.perf_counter()
    n_lost = len(bad)
    for i in range(len(source)):
        try:
            decode(source[i])
            n_read += 1
        except (OSError, BadImage) as error:
            bad.append(f"{source.name(i)}: {error}")
        if time.perf_counter() - start > READ_SECONDS:
            break
    speed = n_read / (time.perf_counter() - start)
    counted = f"{n_read:,} read, {len(bad)} unreadable, of {len(source) + n_lost:,}"
    lines = [("loading", f"{speed:.0f} images/s on one core ({counted})")]
    lines += [("unreadable", some_of(bad).partition(": ")[2])] if bad else []
    return lines + [("images", line) for line in remarks(source)]


def measured_run(config: TrainConfig, source: ImageSource) -> list[tuple[str, str]]:
    """How long a run would take on this CPU, and the memory it needs: some of its own steps, and nothing written.

    On a GPU nothing is timed: the first steps there compile, for minutes, and a short look would be a guess.
    """
    if torch.cuda.is_available():
        return [("time", "not measured on a GPU: after its first epoch `fastdino train` shows images/s")]
    process = distributed.start("cpu", config.dist_url)
    with tempfile.TemporaryDirectory() as folder:
        run_folder = RunFolder(folder, 0, print, Stop(speaks=False))
        try:
            parts = assemble(config, process, Own(source=source), run_folder, lambda line: None)
        except UserError as error:
            return [("time", f"such a run cannot be: {error}")]
        try:
            return _timed(parts)
        except (BadImage, RuntimeError, MemoryError) as error:
            return [("time", f"not measured: {reason(error)}")]
        finally:
            parts.loader.close()
            parts.step.close()
            distributed.stop()


def _timed(parts: Parts) -> list[tuple[str, str]]:
    epochs, n_steps, started = parts.config.epochs, 0, 0.0
    for batch in parts.loader:
        if n_steps == 1:
            started = time.perf_counter()  # the first step allocates
        parts.step(batch.views(parts.process.device), n_steps)
        n_steps += 1
        if n_steps == MAX_STEPS or (n_steps > 1 and time.perf_counter() - started > STEP_SECONDS):
            break
    if n_steps < 2:
        return [("time", "not measured: an epoch is one step")]
    step_s = (time.perf_counter() - started) / (n_steps - 1)
    hours = step_s * parts.niter * epochs / 3600
    total = f"{hours:.1f} hours" if hours >= 1 else f"{max(1, 60 * hours):.0f} minutes"
    steps = f"{epochs} epochs x {parts.niter:,} steps of {step_s:.2f} s, measured over {n_steps - 1} now"
    lines = [("time", f"about {total} on this CPU without evaluations ({steps})")]
    if peak := _peak_gib():
        lines.append(("memory", f"{peak:.1f} GiB at most in those steps, of {_total_gib():.0f} GiB"))
    return lines


def _peak_gib() -> float:
    """The most memory that this process has had; 0 where nobody tells."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _total_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


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


def advice_for_few(source: ImageSource) -> list[tuple[str, str]]:
    """What `train` takes by itself where there are few images."""
    few = preset.values(source)
    crops = "2 x {global_crops_size} px + {local_crops_number} x {local_crops_size} px".format(**few)
    recipe = f"{few['arch']}/{few['patch_size']}, {crops}, {few['epochs']} epochs"
    return [
        ("your images", "fastdino train --data_path FOLDER"),
        ("recipe", f"--preset small, chosen for {len(source):,} images: {recipe}; main_dino's: --preset none"),
    ]


def _device() -> tuple[str, list[tuple[str, str]]]:
    """The device in words, and what to try on it."""
    cores = useful_workers(sys.maxsize, 1)
    if not torch.cuda.is_available():
        return f"none; {cores} CPU cores", [
            ("try", DEMO),
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


def examine(path: str | None) -> list[tuple[str, str]]:
    """(what, finding) per line. path: a folder, tar or parquet files: loading is timed, and a run that suits them.

    Raises UserError where there are no images.
    """
    advice = _device()[1]
    lines = [*environment(), *((f"attention {name}", _attention(name)) for name in BACKENDS)]
    lines += [("Triton compiles", _triton()), ("CUDA graphs", _graphs())]
    if path is None:
        return [*lines, *advice]
    source = open_source(path)
    if preset.is_small(source):
        advice = advice_for_few(source)
        source = converted(source, ImageFormat(exif_turn=SMALL["exif_turn"]))  # as such a run reads them
    lines += _loading(source)
    own = [(what, said.replace("FOLDER", shlex.quote(path))) for what, said in advice if said != DEMO]
    config = TrainConfig.from_flags({**preset.values(source), "preset": "small", "data_path": path})
    return [*lines, *own, *measured_run(config, source)]
