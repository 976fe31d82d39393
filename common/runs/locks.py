"""A lock file for one process at a time, which names its holder and has its heartbeat.

On one machine flock decides, if the file system has it. Between machines, and without flock, a heartbeat decides: the holder
updates the file's modification time every few seconds. Another process takes over a lock without a heartbeat.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.runs.cli import UserError

try:
    import fcntl
except ImportError:  # no Unix: only the heartbeat decides
    fcntl = None  # type: ignore[assignment]

BEAT = 3.0  # seconds between two heartbeats
STALE = 15.0  # seconds without a heartbeat after which a lock is taken over
OLD = 3600.0  # seconds since the last heartbeat after which a lock is taken over at once, whatever the clocks of two machines


class InUse(UserError):
    """Another process holds the lock."""


class Sight(NamedTuple):
    """A lock file at one moment."""

    content: bytes  # process, host and start of the lock, a line each
    heartbeat: int  # ns since 1970
    held_here: bool  # a living process of this machine holds it by flock

    def holder(self) -> str:
        """The holder and the start of the lock, in words."""
        process, host = _read(self.content) or (None, None)
        name = f"process {process} on {host}" if process else "another process"
        beat = time.strftime("%F %T", time.localtime(self.heartbeat / 1e9))
        return f"{name} (last heartbeat {beat})"


class Lock:
    """A lock file. It exists while a process holds the lock. `with Lock(...)` holds it for a block."""

    def __init__(self, path: Path, advice: str):
        """advice: what a user may do instead of waiting."""
        self.path, self.advice = path, advice
        self._content = b""
        self._handle: int | None = None  # open while flock holds it
        self._process = os.getpid()
        self._released = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lock. InUse: another process holds it, and still does after `patience` seconds.

        It takes up to STALE seconds to notice that a holder on another machine is dead. OSError: the file cannot be written.
        """
        deadline = time.monotonic() + patience
        first, since, stale, printed = None, 0.0, None, False
        while (sight := self._try(stale)) is not None:
            now, stale = time.monotonic(), None
            if first is None and not sight.held_here:
                first, since = sight, now
                if not printed:
                    print(f"waiting up to {STALE:.0f} s: {self.path} is of {sight.holder()}", flush=True)
                printed = True
            if sight.held_here or sight != first:
                first = None
                if now >= deadline:
                    raise InUse(
                        f"{self.path.parent} is in use by {sight.holder()}: wait, {self.advice}, "
                        f"or remove {self.path} if that process is gone"
                    )
            elif now - since > STALE or time.time() - sight.heartbeat / 1e9 > OLD:
                first, stale = None, sight
                continue
            time.sleep(min(0.2, BEAT / 4))

    def _try(self, stale: Sight | None) -> Sight | None:
        """Take the lock if it is free or looks like `stale`, and return None; else return its sight."""
        handle: int | None
        handle, new = _open(self.path)
        try:
            locked = _flock(handle)
            holder, sight = _look(handle, locked)
            free = new or (locked and (holder is None or holder[1] == socket.gethostname()))
            if locked is not False and (free or (locked and sight == stale)):
                self._take(handle, new)
                # another process may have removed the file meanwhile
                if _content(self.path) == self._content:
                    if locked:
                        self._handle, handle = handle, None
                    self._begin()
                    return None
            elif sight == stale and _content(self.path) == stale.content:
                self.path.unlink(missing_ok=True)
            return sight
        finally:
            if handle is not None:
                os.close(handle)

    def _take(self, handle: int, new: bool) -> None:
        self._content = f"{os.getpid()}\n{socket.gethostname()}\n{time.strftime('%F %T')}\n".encode()
        try:
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, self._content)
        except OSError:
            if new:
                self.path.unlink(missing_ok=True)
            raise

    def _begin(self) -> None:
        self._process, self._released = os.getpid(), threading.Event()
        arguments = self.path, self._content, self._released
        self._heart = threading.Thread(target=_beat, args=arguments, name="heartbeat", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Raise InUse if another process took the lock over after too long without a heartbeat."""
        content = _content(self.path)
        if content not in (None, self._content):
            raise InUse(
                f"{self.path.parent} was taken over by {Sight(content, time.time_ns(), False).holder()}"
            )

    def release(self) -> None:
        """Release the lock, also after an interrupted `acquire`."""
        if os.getpid() != self._process:  # a forked process holds no lock
            return
        self._released.set()
        if self._heart is not None and self._heart.is_alive():
            self._heart.join(1.0)
        content, self._content = self._content, b""
        with suppress(OSError):  # for example a disk that became read-only: the heartbeat ends all the same
            if content and _content(self.path) == content:
                self.path.unlink()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    __del__ = release

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, *_):
        self.release()


def _open(path: Path) -> tuple[int, bool]:
    """The lock file's handle, and whether this call made the file."""
    while True:
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        with suppress(FileNotFoundError):  # removed between the two
            return os.open(path, os.O_RDWR), False


def _flock(handle: int) -> bool | None:
    """Whether flock gave this process the file; None on a file system without flock."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOSYS, ENOTSUP, ENOLCK, EINVAL: they differ by file system
        return None
    return True


def _look(handle: int, locked: bool | None) -> tuple[tuple[int, str] | None, Sight]:
    """Holder and sight of an open lock file."""
    content = os.read(handle, 1000)
    holder = _read(content)
    here = holder is None or (holder[1] == socket.gethostname() and _lives(holder[0]))
    return holder, Sight(content, os.fstat(handle).st_mtime_ns, locked is False and here)


def _read(content: bytes) -> tuple[int, str] | None:
    """Process and host; None if the file does not name them."""
    lines = content.decode(errors="replace").splitlines()
    return (int(lines[0]), lines[1]) if len(lines) > 1 and lines[0].isdecimal() else None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True


def _beat(path: Path, content: bytes, released: threading.Event) -> None:
    """Update the file's modification time until the lock is released or taken over."""
    while not released.wait(BEAT):
        with suppress(OSError):  # only other processes notice a missed heartbeat
            if _content(path) == content:
                os.utime(path)
