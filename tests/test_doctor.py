"""The doctor answers on any machine, and a folder that is none is a user's mistake."""

import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import DINOHead, MultiCropWrapper, vit_tiny
from fastdino.cli import main
from fastdino.doctor import NEEDS, advice_for_gpu
from fastdino.train.precision import low_precision_twin


def test_doctor_reads_a_folder_and_counts_what_it_cannot(tmp_path, capsys):
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    assert main(["doctor", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 read, 1 unreadable, of 4" in next(line for line in lines if line.startswith("loading"))
    assert len(lines) <= 24  # one screen


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


def test_what_a_batch_needs_is_what_autograd_keeps():
    torch.manual_seed(0)
    need, n_images = NEEDS["vit_tiny"], 2
    student = MultiCropWrapper(vit_tiny(), DINOHead(192, 256))
    twin, _ = low_precision_twin(student, torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in twin.parameters()}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    crops = [torch.randn(n_images, 3, side, side).bfloat16() for side in [224] * 2 + [96] * 8]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = twin(crops)
    without_logits = need.bytes_per_image - 2 * 22 * need.prototypes
    assert sum(kept.values()) == pytest.approx(n_images * without_logits, rel=0.15)
    del out


@pytest.mark.parametrize(
    ("gib", "flags"), [(140, "vit_base"), (8, "vit_small"), (2, "vit_tiny"), (0.1, "hold no image")]
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
