"""The doctor answers on any machine, and a folder that is none is a user's mistake."""

import re
import shlex
import tarfile

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from kept import Storages
from PIL import Image
from torch._dynamo.backends.common import aot_autograd

from fastdino import VisionTransformer
from fastdino.cli import main
from fastdino.doctor import COMPILED_KEEPS, EAGER_KEEPS, NEEDS, advice_for_gpu, measured_run
from fastdino.train.config import TrainConfig


def test_doctor_reads_a_folder_and_counts_what_it_cannot(tmp_path, capsys):
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    assert main(["doctor", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 read, 1 unreadable, of 4" in next(line for line in lines if line.startswith("loading"))
    (named,) = (line for line in lines if line.startswith("unreadable"))
    assert named.endswith(f"{tmp_path / 'bad.jpg'}: is no JPEG, PNG, WebP, GIF, BMP, TIFF or PPM")
    assert "fewer than the 32 of one step" in lines[-1]
    assert len(lines) <= 24  # one screen


def test_doctor_reads_shards(tmp_path, capsys):
    for i in range(3):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as shard:
            Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / "image.png")
            shard.add(tmp_path / "image.png", f"{i}.png")
    (tmp_path / "image.png").unlink()
    assert main(["doctor", str(tmp_path)]) == 0
    assert "3 read, 0 unreadable, of 3" in capsys.readouterr().out


def test_doctor_names_the_folder_times_a_run_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my photos"
    folder.mkdir()
    for i in range(96):
        Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(folder / f"{i}.png")
    assert main(["doctor", "my photos"]) == 0
    out = capsys.readouterr().out
    assert "fastdino train --data_path 'my photos'\n" in out
    assert "FOLDER" not in out
    found = re.search(r"about .* on this CPU without evaluations \((\d+) epochs x 3 steps of [\d.]+ s", out)
    assert int(found[1]) > 1
    assert re.search(r"memory +[\d.]+ GiB at most", out)
    assert sorted(tmp_path.iterdir()) == [folder]


def test_doctor_times_nothing_on_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    ((what, said),) = measured_run(TrainConfig(), None)
    assert what == "time"
    assert "not measured on a GPU" in said


def test_doctor_says_why_on_a_machine_without_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.count("needs a CUDA device") == 2  # Triton, graphs
    assert out.count("has kernels for CUDA only") == 2  # xformers, varlen
    assert "fastdino train" in out


def test_the_flags_for_a_cpu_train(tmp_path, capsys, photo_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("your images"))
    words = shlex.split(line.removeprefix("your images").strip().replace("FOLDER", str(photo_folder)))
    small = ["--epochs", "1", "--knn_freq", "0", "--attention_images", "0", "--output_dir", str(tmp_path)]
    assert main([*words[1:], *small]) == 0


def kept_by_blocks(sides, depth, dim=192, n_images=2):
    """Bytes, in eager mode, of so many blocks more than none."""
    net = VisionTransformer([224], embed_dim=dim, depth=depth + 1, num_heads=3).bfloat16()
    crops = [torch.randn(n_images * n, 3, side, side).bfloat16() for side, n in sides.items()]
    with Storages(net) as storages:
        features = net(crops)
    assert features.requires_grad
    return storages.alive_bytes


def test_an_eager_block_keeps_what_the_doctor_says():
    """The difference of depths: what is kept around the blocks drops out."""
    kept = kept_by_blocks({224: 2, 96: 8}, 3) - kept_by_blocks({224: 2, 96: 8}, 1)
    need = NEEDS["vit_tiny"]
    assert kept / (2 * 2 * 2 * need.tokens * need.dim) == pytest.approx(EAGER_KEEPS, rel=0.03)  # images, blocks, bytes


def kept_by_a_compiler(depth, sides=(32, 16), n_images=8, dim=64, patch=8):
    """Numbers that AOTAutograd's partition hands from forward to backward, but for weights, in D per token."""
    torch._dynamo.reset()
    net = VisionTransformer([sides[0]], patch, embed_dim=dim, depth=depth, num_heads=2)
    seen = []

    def forward(module, inputs):
        return make_boxed_func(module.forward)

    def backward(module, inputs):
        names = [node.name for node in module.graph.find_nodes(op="placeholder")]
        seen.extend(x.numel() for x, name in zip(inputs, names) if not name.startswith(("primals", "tangents")))
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=backend)
    compiled([torch.randn(n_images, 3, side, side) for side in sides]).sum().backward()
    return sum(seen) / (dim * sum(n_images * (1 + (side // patch) ** 2) for side in sides))


def test_a_compiled_block_keeps_what_the_doctor_says():
    """Attention counts as SDPA on a CPU in fp32 keeps it."""
    per_block = kept_by_a_compiler(4) - kept_by_a_compiler(3)
    assert per_block == pytest.approx(COMPILED_KEEPS, rel=0.03)


@pytest.mark.parametrize(
    ("gib", "flags"), [(140, "vit_base"), (12, "vit_small"), (2, "vit_tiny"), (0.1, "hold no image")]
)
def test_flags_for_a_gpu_follow_its_memory_and_say_that_they_are_computed(gib, flags):
    advice = advice_for_gpu(gib * 2**30)
    assert flags in advice
    if found := re.search(r"--batch_size_per_gpu (\d+)", advice):
        assert int(found[1]) >= 1
        assert "computed, not measured" in advice


def test_doctor_refuses_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("fastdino doctor: ")
