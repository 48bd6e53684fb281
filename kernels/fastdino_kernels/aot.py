"""Every kernel compiled for A100, H100 and B200, on a machine without a GPU: `python -m fastdino_kernels.aot`.

Prints a line per kernel, configuration and architecture. A stack above 0 is a register spill; a widest global load
below 128 bits means that the compiler lost sight of an alignment. Either ends the run with exit code 1, unless the
room wrote down why its load is narrow. The assembler and `cuobjdump` are the ones inside Triton's package.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module

from fastdino_kernels.launch import INTERPRETED, AotCase

ROOMS = (
    "dino_loss",
    "patch_loss",
    "sinkhorn",
    "center",
    "ema",
    "clip_adamw_ema",
    "attention",
    "mlp",
    "layer_norm",
    "column_sums",
    "augment.resize",
    "augment.color",
    "augment.blur",
)  # by name: in the package, `dino_loss` is the function
WIDE_BITS = 128

_GLOBAL_LOAD = re.compile(r"\bld\.global\S*?(?:\.v(\d+))?\.[busf](\d+)\s")
_ASYNC_COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    widest_load_bits: int


def aot_cases() -> Iterator[AotCase]:
    """The cases of every room."""
    for room in ROOMS:
        yield from import_module(f"fastdino_kernels.{room}").aot_cases()


def widest_global_load(ptx: str) -> int:
    """Bits of the widest load from global memory in a PTX text, asynchronous copies included; 0 where none is."""
    loads = [int(n or 1) * int(bits) for n, bits in _GLOBAL_LOAD.findall(ptx)]
    return max(loads + [8 * int(n_bytes, 0) for n_bytes in _ASYNC_COPY.findall(ptx)], default=0)


def compile_case(case: AotCase, arch: int) -> Usage:
    """Machine code for sm_<arch>, and what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {}  # of an argument, or of all that a tuple holds
    for i, name in enumerate(case.kernel.arg_names):
        kind = case.signature.get(name)
        places[name] = [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names},
        constexprs=dict(case.constexprs),
        attrs={place: [["tt.divisibility", 16]] for name in case.aligned for place in places.get(name, ())},
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.fp_fusion,
        "maxnreg": case.max_registers,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", report)}
    return Usage(used["REG"], used["STACK"], compiled.metadata.shared, widest_global_load(compiled.asm["ptx"]))


def faults(case: AotCase, usage: Usage) -> list[str]:
    """What must not be: spills, and narrow loads that nobody explained."""
    found = []
    if usage.stack_bytes > 0:
        found.append(f"{usage.stack_bytes} bytes of stack: registers spill")
    if usage.widest_load_bits < WIDE_BITS and not case.narrow_load:
        found.append(f"widest global load is {usage.widest_load_bits} bits, expected {WIDE_BITS}")
    return found


def main() -> int:
    if INTERPRETED:  # an interpreted kernel cannot be compiled, and the choice was made when triton was imported
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "fastdino_kernels.aot"], env=env).returncode

    jobs = [(case, arch) for case in aot_cases() for arch in case.archs]
    width = max(len(case.name) for case, _ in jobs)
    print(f"{'kernel':{width}}  {'arch':>6}  {'registers':>9}  {'stack B':>7}  {'shared B':>8}  {'widest load b':>13}")
    healthy = True
    with ThreadPoolExecutor() as pool:  # ptxas and cuobjdump run as processes of their own
        for (case, arch), usage in zip(jobs, pool.map(lambda job: compile_case(*job), jobs)):
            found = faults(case, usage)
            healthy = healthy and not found
            note = "  <- " + "; ".join(found) if found else f"  ({case.narrow_load})" if case.narrow_load else ""
            print(
                f"{case.name:{width}}  sm_{arch:<3}  {usage.registers:9}  {usage.stack_bytes:7}  "
                f"{usage.shared_bytes:8}  {usage.widest_load_bits:13}{note}",
                flush=True,
            )
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
