"""A run's output folder: one run at a time, every write whole, and patience with a full disk."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import filelock

from fastdino import files
from fastdino.errors import TrainingError, UserError
from fastdino.train.interrupt import Stop

FULL = {errno.ENOSPC, errno.EDQUOT}
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
RETRY_EVERY = 5.0  # seconds between tries on a full disk


class RunFolder:
    """Where everything of a run is written.

    wait_s: how long a full disk is waited for, in seconds, unless `stop` comes. say: is told when that begins.
    checkpoint: what the last one is called. Attribute: holds, what of the run is on the disk, in words; for messages.
    """

    def __init__(
        self,
        path: str | Path,
        wait_s: float,
        say: Callable[[str], object],
        stop: Stop,
        checkpoint: str = "checkpoint.pth",
    ) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / checkpoint
        self._wait_s, self._say, self._stop = wait_s, say, stop
        self._lock_file = self.path / ".lock"
        self._lock = filelock.FileLock(self._lock_file, blocking=False)
        self._is_new = True
        self.holds = "nothing was saved"

    def kept(self, epoch: int) -> Path:
        """The checkpoint of an epoch, counted from 0, that stays."""
        return self.path / f"checkpoint{epoch:04}.pth"

    def check(self) -> None:
        """Raise UserError unless the folder is there, or can be made, and takes files. Makes nothing."""
        existing = self.path
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"--output_dir: expected a folder, got the file {existing}")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"--output_dir: {existing} is not writable")

    def lock(self) -> None:
        """Keep other runs out until `unlock`, or until this process ends, however it ends.

        A folder without a checkpoint has nothing to keep yet, and is left to `make`. Raises UserError where another run
        has it.
        """
        if self.checkpoint.exists():
            self._acquire()

    def _acquire(self) -> None:
        if self._lock.is_locked:
            return
        self._is_new = self._is_new and not self._lock_file.exists()
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise UserError(
                f"--output_dir: another run is writing into {self.path}; wait for it, stop it, or take another folder"
            ) from error
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno in READ_ONLY:
                raise UserError(f"--output_dir: {self.path} is not writable: {error.strerror}") from error
            self._say(f"{self.path} cannot be locked ({error}): see to it that no other run writes there")

    def make(self) -> None:
        """Make the folder where it is missing, lock it, and remove what killed runs left half written."""
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be made: {error.strerror}") from error
        self._acquire()
        self._is_new = False
        for folder in {self.path, self.checkpoint.parent}:
            files.remove_temporaries(folder)

    def unlock(self) -> None:
        """Let other runs in. Where nothing was written, the lock's file goes, too."""
        if self._is_new and self._lock.is_locked:
            self._lock_file.unlink(missing_ok=True)
        self._lock.release()

    def replace(self, name: str, text: str) -> None:
        """Write a text file anew. Raises TrainingError as `write` does."""
        self.write(name, lambda path: files.replace(path, lambda file: file.write(text.encode())))

    def write(self, name: str, how: Callable[[Path], object]) -> None:
        """Call `how` with the path of a file, and again and again while the disk is full.

        Raises TrainingError with path and reason where it cannot be written.
        """
        path, started, is_waiting = self.path / name, time.monotonic(), False
        while True:
            try:
                how(path)
                return
            except OSError as error:
                words = f"{path} cannot be written: {error.strerror or error}"
                patience = self._wait_s - (time.monotonic() - started)
                if error.errno not in FULL or patience <= 0 or self._stop.requested:
                    raise TrainingError(f"{words} ({self.holds})") from error
                if not is_waiting:
                    self._say(f"{words}. Trying again for {self._wait_s / 60:g} minutes: make room")
                is_waiting = True
                time.sleep(min(RETRY_EVERY, patience))
