"""Where an op runs, in blocks of what size, and what `aot` compiles of it.

Nothing autotunes: a table can be read, gives the same program on every run, and cannot change inside a CUDA graph.
Rooms take `triton` and `tl` from here. Where Triton cannot be installed (macOS, Windows) both are stand-ins, so that
the kernels' definitions are read over and every op takes its plain PyTorch reference.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


class _Absent:
    """Stands in for Triton in `@triton.jit`, `x: tl.constexpr` and `tl.constexpr(1.0)`, which run at import."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, first: Any) -> Any:
        return first


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()

HAS_TRITON = not isinstance(triton, _Absent)
INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when triton was imported

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

# A set, so that the tests can add their fake device to it.
TRITON_DEVICES: set[str] = ({"cuda"} | ({"cpu"} if INTERPRETED else set())) if HAS_TRITON else set()


def use_triton(*tensors: Tensor) -> bool:
    """Whether an op on these tensors launches its kernels. fp64 is the reference's: the kernels compute in fp32."""
    return all(x.device.type in TRITON_DEVICES and x.dtype != torch.float64 for x in tensors)


def on_host(x: Tensor) -> bool:
    """Whether an op may look at values and take library calls: on a CPU, and not while a compiler traces."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def device_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """What may change per step, as kernels read it: () on the device of `like`. A float is filled in, not copied."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.full((), value, dtype=torch.float32, device=like.device)


def on_own_device(launcher: Launcher) -> Launcher:
    """Triton launches on the current device, which need not be the one of the launcher's first tensor."""

    @functools.wraps(launcher)
    def guarded(first: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(first):
            return launcher(first, *args)

    return guarded  # type: ignore[return-value]


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched: elements of its BLOCK axis per program, and warps per program.

    num_stages: of a loop over loads, how many iterations' loads are under way. max_registers: of a thread, where the
    assembler would else stop short of what hides the latency of memory.
    """

    block: int
    num_warps: int
    num_stages: int = 3
    max_registers: int | None = None

    def block_for(self, n: int) -> int:
        """The block, or less where `n` elements need less; a power of two."""
        return min(self.block, max(16, triton.next_power_of_2(n)))


ARCHS = (80, 90, 100)  # compute capabilities, times ten, of what `aot` compiles for: Ampere, Hopper, Blackwell

LAUNCH = {
    # Predicted from sm_90 machine code, 2026-11-25, batch 64, bf16, % of a copy on H200 / H100: 82 / 92. Tried: block
    # 1024 80 / 89 (better below batch 64), no cap on registers 48 / 66, 5 views a program 66 / 84, two warps 30 / 41.
    "dino_loss_fwd": Launch(block=2048, num_warps=1, max_registers=128),
    "dino_loss_join": Launch(block=1, num_warps=8),  # a program per image
    "dino_loss_mean": Launch(block=256, num_warps=4),
    "dino_loss_bwd": Launch(block=512, num_warps=1),  # predicted 98 / 99; 1024 with 2 warps too, but sm_100 spills
    # Predicted, 2026-11-28, M 3771, bf16, % of a copy on H200 / H100: forward 98 / 99; in place 90 / 99 if the L2 gave
    # all rows a second time, which it does not at K 65536. Tried in place: 4 warps 84 / 97; 16 warps, so that the L2
    # would hold them, 42 / 54, and 55 / 74 with loads three ahead; one row at a time 92 / 99, but with the center 18
    # bytes a logit through the L2 instead of 14.
    "patch_loss_fwd": Launch(block=1, num_warps=2),
    "patch_loss_sum": Launch(block=1024, num_warps=4),
    "patch_loss_bwd": Launch(block=512, num_warps=1),  # predicted 100 / 100
    # Predicted, 2026-11-28, M 3771, bf16, % of a copy on H200 / H100: 97 / 99, 97 / 99, 98 / 99. Tried: a column's top
    # per row 68 / 96; two rows that share the center, not four 77 / 87; probs with 4 warps 86 / 99, 2 warps 42 / 60.
    "column_exps": Launch(block=64, num_warps=4),
    "row_norm": Launch(block=1, num_warps=4),
    "column_probs": Launch(block=64, num_warps=8),
    # Predicted, 2026-11-28, M 44160, bf16, % of a copy on H200 / H100: D 384 100 / 100, 192 97 / 100, with 4 warps 768
    # 97 / 100 and 1024 99 / 100. Tried at D 384: nothing ahead 55 / 72; two ahead 95 / 99; four rows at once, a
    # warp each, 58 / 81; two 84 / 98; 64 rows a program 91 / 100. D 768: one warp 86 / 95, two 90 / 97.
    "layer_norm_bwd_512": Launch(block=1, num_warps=1, num_stages=3),
    "layer_norm_bwd_2048": Launch(block=1, num_warps=4, num_stages=3),
    "layer_norm_bwd_wider": Launch(block=1, num_warps=16, num_stages=3),
    # Of some rows. Predicted, 2026-11-29, 0.7 of 44160 rows in fp32, % of a copy on H200 / H100: D 384 87 / 99, 768
    # 77 / 92, 1024 87 / 97, 192 63 / 87. Tried at D 384: weight and gamma in registers, not read again for each row,
    # 57 / 71, for 8 warps fit an SM then, not 12; no cap on registers 79 / 93; loops with rows ahead, whose addresses
    # the tool does not know. D 768, 4 warps, 96 registers: 80 / 97, but on sm_100 it spills.
    "layer_norm_bwd_rows_512": Launch(block=1, num_warps=1, num_stages=1, max_registers=168),
    "layer_norm_bwd_rows_1024": Launch(block=1, num_warps=2, num_stages=1, max_registers=168),
    "layer_norm_bwd_rows_2048": Launch(block=1, num_warps=4, num_stages=1, max_registers=168),
    "layer_norm_bwd_rows_wider": Launch(block=1, num_warps=16, num_stages=1),
    "column_sums": Launch(block=8, num_warps=8),  # predicted, (1380, 1152): 4.1 us; 16 columns 6.4, 32 columns 12
    "batch_center": Launch(block=64, num_warps=4),  # predicted 73 / 83; 256 columns with 8 warps 40 / 57
    "center_ema": Launch(block=1024, num_warps=4),
    "ema": Launch(block=2048, num_warps=8),
    "grad_norm": Launch(block=2048, num_warps=8),
    "clip_adamw_ema": Launch(block=1024, num_warps=8),
    # block: queries at once. By rows of a tile; an architecture's own entry comes first. Predicted, 2026-11-28, ViT-S,
    # B 64, % of a copy on H200 / H100: forward 86 / 92 at 37 tokens and 57 / 70 at 197, backward 83 / 93 and 31 / 40,
    # with sums 70 / 89 and 30 / 40: 12 us of a block's backward pass for what another pass over memory takes 28.
    # Tried: 128 rows for 37 tokens 57 / 73 and 36 / 46; both lengths in one launch, whose registers are then those of
    # 197, the same; forward of 197 without a cap on registers 43 / 55; its backward with keys in parts of 128 and the
    # output read instead of a second sum, 89 us instead of 107, but 32 bytes of stack and gradients added up in bf16.
    # Keys of 197 in parts of 128, 64 and 16, a fifth fewer: forward 48 us instead of 32, for registers. Backward, other
    # blocks, warps and stages: 113 us to 151. Sums of 37 by the upstream gradient, its key's as zero: 38 us, not 40.
    "short_attention_fwd_64": Launch(block=64, num_warps=4, num_stages=1),
    "short_attention_fwd_128": Launch(block=64, num_warps=4, num_stages=1),
    "short_attention_fwd_256": Launch(block=64, num_warps=4, num_stages=1),
    "short_attention_fwd_256_sm90": Launch(block=64, num_warps=4, num_stages=1, max_registers=168),
    "short_attention_bwd_64": Launch(block=64, num_warps=4, num_stages=1),
    "short_attention_bwd_64_sm90": Launch(block=64, num_warps=4, num_stages=1, max_registers=128),
    "short_attention_bwd_128": Launch(block=16, num_warps=4, num_stages=1),
    "short_attention_bwd_256": Launch(block=32, num_warps=8, num_stages=4),
    "short_attention_bwd_256_sm100": Launch(block=16, num_warps=8, num_stages=4),  # 32 queries with sums spill
    "short_attention_bwd_256_sm80": Launch(block=16, num_warps=8, num_stages=2),
    # With queries and keys turned. Predicted, 2026-11-29, 201 and 41 tokens, us for 128 and 512 images of 6 heads on an
    # H200: forward 47 and 23 (34 and 18 without turning), backward 152 and 59 (112 and 39): 91 us of a block of ViT-S,
    # where passes over memory of their own, as a compiler makes them, take 160. Tried: halves of the channels as
    # operands of their own, whose products take no wgmma, 360 bytes of stack; both halves loaded once, split and
    # joined, 112 bytes; gradients stored by halves 154 and 67; four stages 166; 8 warps, 16 or 32 queries 61 to 207.
    "short_attention_fwd_turned_64": Launch(block=64, num_warps=4, num_stages=1),
    "short_attention_fwd_turned_128": Launch(block=64, num_warps=4, num_stages=1),
    "short_attention_fwd_turned_256": Launch(block=64, num_warps=4, num_stages=1),
    "short_attention_bwd_turned_64": Launch(block=64, num_warps=4, num_stages=1),
    "short_attention_bwd_turned_128": Launch(block=16, num_warps=8, num_stages=1),
    "short_attention_bwd_turned_256": Launch(block=32, num_warps=8, num_stages=1),
    "cls_attention_64": Launch(block=1, num_warps=2),
    "cls_attention_128": Launch(block=1, num_warps=4),
    "cls_attention_256": Launch(block=1, num_warps=8),
    "resize_weights": Launch(block=32, num_warps=1),
    "resize": Launch(block=32, num_warps=1),  # columns: a warp is a row, so that sums need no exchange
    "augment_color": Launch(block=1024, num_warps=4),
    "blur": Launch(block=32, num_warps=4),  # columns
}


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """A kernel in one configuration that real models use; every room yields its own from `aot_cases()`."""

    name: str
    """A row's title in the report: op, kernel, dtype."""
    kernel: Any
    """The `@triton.jit` function."""
    signature: Mapping[str, str | tuple[str, ...]]
    """Runtime argument to type: "*bf16", "*fp32", "i32", or a tuple of them. May name arguments of the room's other
    kernels too."""
    constexprs: Mapping[str, Any]
    """The `tl.constexpr` arguments."""
    aligned: tuple[str, ...] = ()
    """Runtime arguments that are multiples of 16 in real models (pointers: of 16 bytes), as a launch would find out."""
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    fp_fusion: bool = True
    """Whether a multiplication and an addition may become one operation, rounded once."""
    narrow_load: str = ""
    """Why no load of this kernel is 128 bits wide, where none is."""
    archs: tuple[int, ...] = ARCHS
    """What it is launched so on."""
