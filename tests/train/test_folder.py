"""The output folder: one run at a time, every write whole, and words where the disk does not take it."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from fastdino import files
from fastdino.errors import TrainingError, UserError
from fastdino.train import folder as module
from fastdino.train.folder import RunFolder
from fastdino.train.interrupt import Stop
from fastdino.train.loop import train


def open_folder(path, said=None, wait_s=0.0, stop=None):
    return RunFolder(path, wait_s, (lambda text: said.append(text)) if said is not None else print, stop or Stop())


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(tmp_path, tiny):
    first = open_folder(tmp_path / "run")
    first.make()
    with pytest.raises(UserError, match=r"--output_dir: another run is writing into .*run"):
        train(tiny())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    first.unlock()
    assert train(tiny(epochs=1, warmup_epochs=0)).epochs == 1


def test_the_lock_goes_with_the_process_that_held_it(tmp_path):
    tmp_path.joinpath("held").touch()
    pid = os.fork()
    if not pid:
        folder = open_folder(tmp_path)
        folder.make()
        tmp_path.joinpath("held").unlink()
        time.sleep(60)
        os._exit(0)
    while tmp_path.joinpath("held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="another run"):
        open_folder(tmp_path).make()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    open_folder(tmp_path).make()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    said = []
    folder = open_folder(tmp_path, said)
    failure = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(folder._lock, "acquire", lambda: (_ for _ in ()).throw(failure))
    folder.make()
    assert said == [
        f"{tmp_path} cannot be locked ([Errno {errno.ENOLCK}] No locks available): "
        "see to it that no other run writes there"
    ]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / ".checkpoint.pth.4711.partial").write_bytes(b"half")
    (tmp_path / "checkpoint.pth").write_bytes(b"whole")
    open_folder(tmp_path).make()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint.pth"]


def fails(times, number):
    """A write that fails so many times."""
    calls = [0]

    def write(path: Path) -> None:
        calls[0] += 1
        if calls[0] <= times:
            raise OSError(number, os.strerror(number))
        path.write_text("written")

    return write


def test_a_full_disk_is_waited_for_and_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRY_EVERY", 0.01)
    said = []
    open_folder(tmp_path, said, wait_s=90).write("log.txt", fails(3, errno.ENOSPC))
    assert (tmp_path / "log.txt").read_text() == "written"
    assert said == [
        f"{tmp_path}/log.txt cannot be written: No space left on device. Trying again for 1.5 minutes: make room"
    ]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOENT, errno.EIO])
def test_what_waiting_does_not_mend_ends_the_run_with_path_and_reason(tmp_path, number):
    folder = open_folder(tmp_path, wait_s=90)
    folder.holds = "checkpoint.pth holds 3 epochs"
    words = rf"log.txt cannot be written: {os.strerror(number)} \(checkpoint.pth holds 3 epochs\)"
    with pytest.raises(TrainingError, match=words):
        folder.write("log.txt", fails(1, number))


def test_somebody_who_wants_to_stop_does_not_wait_for_a_disk(tmp_path):
    stop = Stop()
    stop.signal = signal.SIGTERM
    with pytest.raises(TrainingError, match="No space left on device"):
        open_folder(tmp_path, wait_s=90, stop=stop).write("log.txt", fails(1, errno.ENOSPC))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.replace(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.replace(path, half)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_appended_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    files.append(path, "one\n")

    def fail(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.append(path, "two\n")
    assert path.read_text() == "one\n"
