"""Ctrl-C, SIGTERM and SIGHUP: the first asks a run to save and end, the second ends it."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from fastdino import files

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE = 2.0  # seconds that Python has to end by itself after the second signal
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides


class Interrupted(BaseException):
    """Raised by the first signal where the work can be left at any point: `Stop.interruptible`."""


class Stop:
    """Whether somebody asked the run to end. speaks: whether this process says that it heard.

    Python hears a signal when the main thread is back from C++, which in a backward pass on a CPU can take a minute. A
    thread hears it at once: it says so, and after the second it ends a process that does not end by itself.
    Attribute: signal, the number of the first that came, or 0.
    """

    def __init__(self, speaks: bool = False) -> None:
        self.signal = 0
        self._count = 0
        self._speaks, self._may_raise = speaks, False

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal > 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            self.signal = number
            if self._may_raise:
                raise Interrupted
        elif self._count == 2:  # a third would interrupt the tidying up
            raise KeyboardInterrupt

    def _say(self, number: int, words: str) -> None:
        if self._speaks:
            # Not printed: the terminal may be gone, and a print of the main thread may be half done.
            with suppress(OSError):
                os.write(2, f"{signal.Signals(number).name}: {words}\n".encode())

    def _hear(self, ear: socket.socket, is_over: threading.Event) -> None:
        """The thread: a byte is a signal's number, 0 the end."""
        heard = 0
        while number := ear.recv(1)[0]:
            heard += 1
            if heard == 1:
                self._say(number, "saving, then the run ends; once more ends it without")
            elif heard == 2 and not is_over.wait(PATIENCE):
                files.abandon()
                if os.isatty(1):
                    os.write(1, SHOW_CURSOR)
                os._exit(128 + number)

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
        mouth, ear = socket.socketpair()
        mouth.setblocking(False)
        is_over = threading.Event()
        thread = threading.Thread(target=self._hear, args=(ear, is_over), name="signals", daemon=True)
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in heard}
        woken = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in previous.items():
                signal.signal(number, handler)
            is_over.set()
            mouth.send(b"\0")
            thread.join()
            mouth.close()
            ear.close()
