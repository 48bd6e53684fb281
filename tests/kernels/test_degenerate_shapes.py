"""Launchers at the smallest and oddest shapes they accept: as machine code, without a GPU.

A launch turns an argument of 1 into a constant and marks pointers and sizes that 16 divides; neither the interpreter
nor a list of cases does. Here a launch is caught, compiled for sm_90 as it would be, and its grid looked at.
"""

import os
import subprocess
import sys
import textwrap

import pytest

from fastdino_kernels.launch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton's compiler")

CATCH = """
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from unittest import mock
    import torch
    from triton.runtime.jit import JITFunction
    import fastdino_kernels as fk
    from fastdino_kernels import launch
    from fastdino_kernels.aot import compile_case

    def type_and_address(value):
        address = value if isinstance(value, int) else value.data_ptr()
        return ("i32" if address < 2**31 else "i64") if isinstance(value, int) else TYPES[value.dtype], address

    TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    launch.TRITON_DEVICES.add("cpu")
    caught = {}

    def catch(kernel, *args, grid, warmup, num_warps=4, num_stages=3, maxnreg=None, **constexprs):
        assert len(grid) <= 3 and all(1 <= n < limit for n, limit in zip(grid, (2**31, 2**16, 2**16))), grid
        types, aligned = {}, []
        for parameter, value in zip(kernel.params, args):
            if parameter.is_constexpr or isinstance(value, int) and value == 1:
                constexprs[parameter.name] = value
                continue
            if isinstance(value, float):
                types[parameter.name] = "fp32"
                continue
            several = isinstance(value, tuple)
            found, addresses = zip(*map(type_and_address, value if several else [value]))
            types[parameter.name] = found if several else found[0]
            aligned += [parameter.name] if not any(address % 16 for address in addresses) else []
        case = launch.AotCase(name=kernel.__name__, kernel=kernel, signature=types, constexprs=constexprs,
                              aligned=tuple(aligned), num_warps=num_warps, num_stages=num_stages,
                              max_registers=maxnreg)
        caught[repr((kernel.__name__, types, constexprs, aligned))] = case

    def loss(v, t, b, k, dtype):
        student, teacher = (torch.zeros(n, b, k, dtype=dtype) for n in (v, t))
        temps = torch.tensor(0.1), torch.tensor(0.04)
        fk.dino_loss(student.requires_grad_(), teacher, torch.zeros(k), *temps).backward()

    def patch_loss(m, k, dtype):
        student, teacher = (torch.zeros(m, k, dtype=dtype) for _ in range(2))
        rest = torch.zeros(k), torch.ones(m), torch.tensor(0.1), torch.tensor(0.04)
        fk.patch_loss(student.requires_grad_(), teacher, *rest).backward()
        fk.patch_loss_and_grad_(student.detach(), teacher, *rest, torch.tensor(1.0))

    def sinkhorn(m, k, dtype):
        fk.sinkhorn_center(torch.zeros(m, k, dtype=dtype), torch.tensor(0.04), 2)

    def center(t, b, k, dtype):
        fk.batch_center(torch.zeros(t, b, k, dtype=dtype))
        fk.center_update_(torch.zeros(k), torch.zeros(t, b, k, dtype=dtype), torch.tensor(0.9))
        fk.center_ema_(torch.zeros(k), torch.zeros(k), torch.tensor(0.9))

    def attention(n, size, heads, dim, dtype):
        qkv = torch.zeros(n * size, 3, heads, dim, dtype=dtype, requires_grad=True)
        for rotation in (None, (torch.zeros(size, dim // 2),) * 2):
            fk.short_attention(qkv, [(n, size)], rotation=rotation).backward(torch.zeros_like(qkv[:, 0]))
        q, kv = qkv.detach()[:n, 0].requires_grad_(), qkv.detach()[:, 1:].requires_grad_()
        fk.cls_attention(q, kv, [(n, size)]).backward(torch.zeros_like(q))

    def norm(m, d, dtype):
        x, weight, scale = torch.zeros(m, d, dtype=dtype), torch.zeros(d, dtype=dtype), torch.zeros(m, dtype=dtype)
        fk.layer_norm(x.requires_grad_(), weight, weight).backward(x)
        numbers = torch.zeros(m)
        rows = x.detach()
        torch.ops.fastdino.layer_norm_backward(rows, rows, numbers, numbers, weight, rows, scale, weight, rows)

    def mlp(m, d, h, dtype):
        x, w1, w2 = (torch.zeros(shape, dtype=dtype) for shape in ((m, d), (h, d), (d, h)))
        fk.mlp(x, w1, w1[:, 0].contiguous(), w2, w2[:, 0].contiguous())
        fk.mlp(x.requires_grad_(), w1, w1[:, 0].contiguous(), w2, w2[:, 0].contiguous()).sum().backward()

    with mock.patch.object(JITFunction, "run", catch):
        for call in sys.argv[1:]:
            op, *shape, dtype = call.split()
            globals()[op](*map(int, shape), getattr(torch, dtype))
            with ThreadPoolExecutor() as pool:
                stacks = pool.map(lambda case: compile_case(case, 90).stack_bytes, caught.values())
            for case, stack in zip(caught.values(), stacks):
                print(f"{call}: {case.name} {stack}")
            caught.clear()
"""
LOSS = ("_dino_loss_fwd_kernel", "_dino_loss_join_kernel", "_dino_loss_mean_kernel", "_dino_loss_bwd_kernel")
PATCH_LOSS = tuple(f"_patch_loss_{part}_kernel" for part in ("fwd", "sum", "bwd", "fwd"))
SINKHORN = ("_column_exps_kernel", "_row_norm_kernel", "_column_probs_kernel")
CENTER = ("_batch_center_kernel", "_center_update_kernel", "_center_ema_kernel")
ATTENTION = tuple(f"_{op}_attention_{way}_kernel" for op in ("short", "short", "cls") for way in ("fwd", "bwd"))
MLP = ("_linear_gelu_kernel", "_linear_gelu_kernel", "_linear_gelu_bwd_kernel", "_column_sums_kernel")
NORM = ("_layer_norm_bwd_kernel", "_column_sums_kernel", "_layer_norm_bwd_kernel")
CALLS = {
    "loss 2 1 1 1 float32": LOSS,  # V, T, B, K: everything is 1
    "loss 13 3 2 17 bfloat16": LOSS,  # a program per student view
    "loss 10 2 1 4099 bfloat16": LOSS,  # a masked tail
    "loss 12 2 1 1000 float32": LOSS,  # one split, masked
    "loss 12 2 1 65536 float16": LOSS,  # the most views of a program
    "patch_loss 1 1 float32": PATCH_LOSS,  # M, K
    "patch_loss 3 4099 bfloat16": PATCH_LOSS,
    "patch_loss 2 131072 float16": PATCH_LOSS,
    "sinkhorn 1 1 float32": SINKHORN,  # M, K
    "sinkhorn 5 4099 bfloat16": SINKHORN,
    "center 1 1 1 float32": CENTER,  # T, B, K
    "center 3 65 17 bfloat16": CENTER,
    "attention 1 1 1 16 bfloat16": ATTENTION,  # images, tokens, heads, channels of a head
    "attention 1 256 1 64 float16": ATTENTION,
    "attention 3 129 5 32 bfloat16": ATTENTION,
    "norm 1 1 float32": NORM,  # M, D
    "norm 33 4095 bfloat16": NORM,  # wider than any model's
    "mlp 1 1 1 bfloat16": MLP,  # M, D, H
    "mlp 37 33 129 float16": MLP,  # tails everywhere, and nothing is aligned
    "mlp 130 384 1536 bfloat16": MLP,  # ViT-S, and two tokens in the last tile
}


def test_launches_compile_without_spills():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(CATCH), *CALLS]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = [f"{call}: {kernel} 0" for call, kernels in CALLS.items() for kernel in kernels]
    assert result.stdout.splitlines() == expected
