"""The kernels as machine code: no spills, wide loads, on sm_80, sm_90 and sm_100, without a GPU.

Compiled in processes of their own, because an interpreted kernel cannot be compiled.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastdino_kernels.aot import ROOMS, aot_cases, widest_global_load
from fastdino_kernels.launch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton's compiler")


def run(*arguments: str, interpret: bool) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def test_report_is_clean_and_complete():
    """Also where TRITON_INTERPRET is set, as it is in these tests."""
    report = run("-m", "fastdino_kernels.aot", interpret=True)
    assert report.returncode == 0, report.stdout + report.stderr
    title, *lines = report.stdout.splitlines()
    assert title.split()[:2] == ["kernel", "arch"]
    rows = [re.match(r"(.+?) +sm_(\d+) +(\d+) +(\d+) +(\d+) +(\d+)(.*)", line).groups() for line in lines]
    assert {(name, int(arch)) for name, arch, *_ in rows} == {(c.name, arch) for c in aot_cases() for arch in c.archs}
    for name, arch, registers, stack, _, widest_load, note in rows:
        assert int(registers) > 0, (name, arch)
        assert int(stack) == 0, (name, arch)
        assert int(widest_load) >= 128 or re.search(r"\(.+\)", note), (name, arch)


def test_every_kernel_has_a_case():
    """A kernel is launched as `_name_kernel[grid](...)`, and every such name is compiled."""
    import fastdino_kernels

    folder = Path(fastdino_kernels.__file__).parent
    files = [folder / f"{room.replace('.', '/')}.py" for room in ROOMS]
    launched = {name for file in files for name in re.findall(r"\b(_\w+_kernel)\[", file.read_text())}
    assert {case.kernel.__name__ for case in aot_cases()} == launched


SPILL_AND_NARROW = """
    import triton, triton.language as tl
    from fastdino_kernels.aot import compile_case, faults
    from fastdino_kernels.launch import AotCase

    @triton.jit
    def normalize(x_ptr, y_ptr, BLOCK: tl.constexpr, STEP: tl.constexpr):
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at * STEP)
        tl.store(y_ptr + at, x / tl.sum(x))

    types, aligned = {"x_ptr": "*fp32", "y_ptr": "*fp32"}, ("x_ptr", "y_ptr")
    for block, step, reason in ((256, 1, ""), (256, 3, ""), (256, 3, "every third"), (16384, 1, "")):
        sizes = {"BLOCK": block, "STEP": step}
        case = AotCase(name="normalize", kernel=normalize, signature=types, constexprs=sizes, aligned=aligned,
                       num_warps=1, narrow_load=reason)
        print(";".join(faults(case, compile_case(case, 90))))
"""


def test_a_spill_and_a_narrow_load_are_found(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SPILL_AND_NARROW))
    result = run(str(script), interpret=False)
    assert result.returncode == 0, result.stderr
    clean, narrow, explained, spilled = result.stdout.split("\n")[:4]
    assert clean == ""
    assert narrow == "widest global load is 32 bits, expected 128"
    assert explained == ""
    assert re.fullmatch(r"\d+ bytes of stack: registers spill", spilled)


SIZES_OF_ONE = """
    from dataclasses import replace
    from fastdino_kernels.aot import aot_cases, compile_case

    for case in aot_cases():
        ones = {name: 1 for name, kind in case.signature.items() if kind == "i32" and name in case.kernel.arg_names}
        types = {name: kind for name, kind in case.signature.items() if name not in ones}
        aligned = tuple(name for name in case.aligned if name not in ones)
        compile_case(replace(case, signature=types, constexprs={**case.constexprs, **ones}, aligned=aligned), 90)
        print(case.name)
"""


def test_kernels_compile_where_sizes_are_one(tmp_path):
    """A launch turns an integer 1 (one image, one split) into a constant, which has no methods: only JIT would tell."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SIZES_OF_ONE))
    result = run(str(script), interpret=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [case.name for case in aot_cases()]


@pytest.mark.parametrize(
    ("ptx", "bits"),
    [
        ("ld.global.b16 {%rs1}, [%rd1];", 16),
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 128),
        ("ld.global.L1::evict_last.v2.b64 {%rd1, %rd2}, [%rd3];", 128),
        ("ld.global.nc.L2::cache_hint.v8.f32 {%f1}, [%rd3], %rd4;", 256),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;", 128),
        ("ld.shared.v4.b32 {%r1}, [%r2]; st.global.v4.b32 [%rd1], {%r1};", 0),
        ("ld.global.b32 %r1, [%rd1];\nld.global.v2.b32 {%r2, %r3}, [%rd2];", 64),
    ],
)
def test_width_is_read_from_ptx(ptx, bits):
    assert widest_global_load(ptx) == bits
