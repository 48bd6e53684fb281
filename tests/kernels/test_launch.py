"""Where ops run, and what importing them costs and drags in."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from fastdino_kernels import launch
from fastdino_kernels.launch import INTERPRETED, Launch, device_scalar, use_triton


def python(script: str) -> str:
    """What a fresh interpreter prints, without TRITON_INTERPRET."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=kept, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.strip()


USE_EVERY_OP = """
    import torch
    from fastdino_kernels import batch_center, center_update_, dino_loss, dino_loss_and_grad_, ema_update_
    from fastdino_kernels.launch import use_triton

    torch.manual_seed(0)
    student, teacher, center = torch.randn(3, 2, 33, requires_grad=True), torch.randn(2, 2, 33), torch.zeros(33)
    loss = dino_loss(student, teacher, center, 0.1, 0.04)
    loss.backward()
    owned = student.detach().clone()
    dino_loss_and_grad_(owned, teacher, center, 0.1, 0.04)
    center_update_(center, teacher, 0.9)
    ema_update_([teacher], [teacher.clone()], 0.9)
    print(use_triton(student), f"{loss.item():.4f} {student.grad.norm():.4f} {owned.norm():.4f} {center.norm():.4f}")
"""


def test_ops_work_where_triton_cannot_be_installed(capsys, monkeypatch):
    """A `None` in sys.modules makes `import triton` an ImportError; the numbers are those of Triton's interpreter."""
    without = python(f"import sys; sys.modules['triton'] = None\n{textwrap.dedent(USE_EVERY_OP)}")
    exec(textwrap.dedent(USE_EVERY_OP), {})
    interpreted = capsys.readouterr().out.strip()
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    exec(textwrap.dedent(USE_EVERY_OP), {})
    reference = capsys.readouterr().out.strip()
    assert without == reference
    assert reference.split() == ["False", *interpreted.split()[1:]]
    assert interpreted.startswith(str(INTERPRETED))


def test_import_is_quick_and_takes_torch_and_triton_alone():
    seconds, modules = python("""
        import sys, time
        import torch, triton
        before, start = set(sys.modules), time.perf_counter()
        import fastdino_kernels
        print(time.perf_counter() - start, *{name.partition(".")[0] for name in set(sys.modules) - before})
    """).split(maxsplit=1)
    assert float(seconds) < 1
    foreign = set(modules.split()) - set(sys.stdlib_module_names) - {"fastdino_kernels", "torch", "triton", "numpy"}
    assert foreign == set()


def test_fp64_and_meta_tensors_take_the_reference(device):
    x = torch.zeros(1, device=device)
    assert use_triton(x, x.bfloat16())
    assert not use_triton(x, x.double())
    assert not use_triton(x.to("meta"))
    assert (device.type == "cpu") == INTERPRETED


def test_device_scalar_keeps_tensors_and_fills_floats(device):
    like = torch.zeros(1, device=device)
    scalar = torch.tensor(0.3, device=device, requires_grad=True)
    assert device_scalar(scalar, like).data_ptr() == scalar.data_ptr()
    assert not device_scalar(scalar, like).requires_grad
    assert device_scalar(0.3, like) == torch.tensor(0.3, device=device)


@pytest.mark.parametrize(("n", "block"), [(1, 16), (16, 16), (17, 32), (1000, 1024), (1024, 1024), (65536, 1024)])
def test_block_is_no_larger_than_needed(n, block):
    assert Launch(block=1024, num_warps=1).block_for(n) == block
