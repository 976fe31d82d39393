"""SIGTERM and Ctrl-C during training: the run stops at its next step, and after END seconds without one."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# seconds after the first signal: a blocking Python call is interrupted; the process ends
INTERRUPT, END = 25.0, 30.0


class StopSignals:
    """From `start` until `close`: `number` keeps the first signal, a second one raises SystemExit at once.

    Without `close` within END seconds the process ends. Only the main thread can handle signals: in another thread `start`
    does nothing.
    """

    def __init__(self, message: Callable[[str], str]):
        """message: makes the line for standard error from a few words about the event."""
        self.number: int | None = None
        self._message, self._closed = message, threading.Event()
        self._handlers: dict[int, Any] = {}
        self._pipe: tuple[int, ...] = ()
        self._wakeup = -1
        self._thread = threading.Thread()

    def start(self) -> None:
        """Replace the handlers of the signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        # Python's handlers wait for a blocking call; the byte that a signal writes to this pipe does not
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            self._handlers[number] = signal.getsignal(number)
            signal.signal(number, self._note)
        self._thread = threading.Thread(
            target=self._watch, args=(self._pipe[0],), name="signals", daemon=True
        )
        self._thread.start()

    def _note(self, number: int, _frame) -> None:
        if self.number is not None:
            self._say(number, "ended at once")
            sys.exit(128 + number)
        self.number = number

    def _say(self, number: int, what: str) -> None:
        # not sys.stderr, which the signal may have interrupted; the reader may be gone
        with suppress(OSError):
            os.write(2, f"{self._message(f'{signal.Signals(number).name}: {what}')}\n".encode())

    def _watch(self, pipe: int) -> None:
        byte = b"\0"
        while byte[0] not in SIGNALS and not self._closed.is_set():
            byte = os.read(pipe, 1)
        if not self._closed.wait(INTERRUPT):
            signal.pthread_kill(threading.main_thread().ident or 0, byte[0])
            if not self._closed.wait(END - INTERRUPT):
                self._say(byte[0], f"ended, as something blocks since {END:.0f} s")
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(128 + byte[0])

    def close(self) -> None:
        """Restore the former handlers."""
        self._closed.set()
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        pipe, self._pipe = self._pipe, ()
        if pipe:
            signal.set_wakeup_fd(self._wakeup)
            os.write(pipe[1], b"\0")  # wakes the thread
            if self._thread.is_alive():
                self._thread.join(1.0)
            for end in pipe:
                os.close(end)
