"""SIGTERM and Ctrl-C while a run trains: noted for its next step, and a way out where no step comes."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# seconds after the first signal: what blocks in Python is interrupted; the process ends
INTERRUPT, END = 25.0, 30.0


class StopSignals:
    """From its making until `close`: the first signal is kept in `number`, a second one raises SystemExit at once.

    If neither leads to `close` within END seconds, the process ends. Only the main thread can have signals: made in another
    one, this does nothing.
    """

    def __init__(self, told: Callable[[str], str]):
        """told: makes the line for standard error of a few words on what happened."""
        self.number: int | None = None
        self._told, self._closed = told, threading.Event()
        self._main_thread = threading.main_thread()
        if threading.current_thread() is not self._main_thread:
            self._closed.set()
            return
        # Python's handlers wait for what blocks; the byte that a signal writes to this pipe does not
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def _note(self, number: int, _frame) -> None:
        if self.number is not None:
            self._say(number, "ended at once")
            sys.exit(128 + number)
        self.number = number

    def _say(self, number: int, what: str) -> None:
        # past sys.stderr, which the signal may have interrupted; nobody may be there to read
        with suppress(OSError):
            os.write(2, f"{self._told(f'{signal.Signals(number).name}: {what}')}\n".encode())

    def _watch(self) -> None:
        byte = b"\0"
        while byte[0] not in SIGNALS and not self._closed.is_set():
            byte = os.read(self._read, 1)
        if not self._closed.wait(INTERRUPT):
            signal.pthread_kill(self._main_thread.ident, byte[0])
            if not self._closed.wait(END - INTERRUPT):
                self._say(byte[0], f"ended, as something blocks since {END:.0f} s")
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(128 + byte[0])

    def close(self) -> None:
        """Give the signals back to their former handlers."""
        if self._closed.is_set():
            return
        self._closed.set()
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, b"\0")  # wakes the thread
        self._thread.join(1.0)
        os.close(self._write)
        os.close(self._read)
