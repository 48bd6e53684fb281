"""The doctor answers on any machine, and a folder that is none is a user's mistake."""

import numpy as np
from PIL import Image

from fastdino.cli import main


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


def test_doctor_refuses_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("fastdino doctor: ")
