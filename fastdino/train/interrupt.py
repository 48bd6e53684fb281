"""Ctrl-C, SIGTERM and SIGHUP: the first asks a run to save and end, the second insists."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(BaseException):
    """Raised by the first signal where the work can be left at any point: `Stop.interruptible`."""


class Stop:
    """Whether somebody asked the run to end. speaks: whether this process says that it heard.

    Attribute: signal, the number of what came, or 0.
    """

    def __init__(self, speaks: bool = False) -> None:
        self.signal = 0
        self._speaks, self._may_raise = speaks, False

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal > 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if self._speaks:
            # Not printed: the signal may have come in the middle of a print, or because the terminal is gone.
            with suppress(OSError):
                os.write(2, f"{signal.Signals(number).name}: saving; once more ends without\n".encode())
        if self._may_raise:
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise Interrupted as soon as a signal comes, or at once where one has come: nothing in here needs its end."""
        self._may_raise = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._may_raise = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals that are not ignored (as by nohup); only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
