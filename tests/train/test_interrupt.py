"""Signals to real processes: the first is answered at once, the second ends the run and leaves nothing half done."""

import signal
import subprocess
import sys

import pytest
import torch

from fastdino import files

# Saving becomes one long call into C, which Python's own handlers of signals have to wait for.
DEAF = """
import hashlib, sys
import torch
from fastdino.cli import main

def save(content, file):
    file.write(b"half a checkpoint")
    file.flush()
    print("saving", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    print("saved", flush=True)

torch.save = save
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_are_heard_in_the_middle_of_a_long_call(number, tiny_flags, tmp_path):
    command = [sys.executable, "-u", "-c", DEAF, *tiny_flags, "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = iter(process.stdout.readline, "")
    assert any(line == "saving\n" for line in lines)
    assert [path.name for path in (tmp_path / "run").glob(".*.partial")]
    process.send_signal(number)
    assert f"{number.name}: saving" in next(lines)  # while the call goes on
    process.send_signal(number)
    rest = list(lines)
    assert process.wait() == 128 + number, rest
    assert "saved\n" not in rest
    assert not list((tmp_path / "run").glob(".*.partial"))
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_ctrl_c_while_torch_writes_is_ctrl_c_and_no_error_of_its_writer(tmp_path):
    class Interrupted:
        def __init__(self, file):
            self.file, self.n_writes = file, 0

        def write(self, content):
            self.n_writes += 1
            if self.n_writes == 3:
                raise KeyboardInterrupt
            return self.file.write(content)

        def flush(self):
            self.file.flush()

    with pytest.raises(KeyboardInterrupt):
        files.replace(tmp_path / "weights.pth", lambda file: torch.save(torch.zeros(2**20), Interrupted(file)))
    assert not list(tmp_path.iterdir())
