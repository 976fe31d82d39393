"""Atomic writes of files, safe against a crash of the process or the machine."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

# remedies for any file
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on the size of files",
}
# errors of file systems that cannot sync a folder: CIFS, some of FUSE, folders without read permission
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


class WriteError(OSError):
    """A file that cannot be written; `filename` names it."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError inside it a WriteError that names the file."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from None


def cannot_write(path: str | Path, error: OSError, otherwise: str) -> str:
    """The error line of a file that cannot be written. otherwise: the remedy unless a disk is full or a limit is reached."""
    remedy = REMEDIES.get(error.errno or 0, otherwise)
    return f"{path} cannot be written ({error.strerror or error}): {remedy}"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file atomically: at every moment it has the old content or the complete new one. WriteError on failure."""
    write_whole(path, lambda file: file.write(content))


def write_whole(path: Path, write: Callable[[BinaryIO], Any], keep_as: Path | None = None) -> None:
    """As write_atomic, with a function that writes into an open file; keep_as: path that keeps the old content."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if keep_as is not None and path.exists():
                os.replace(path, keep_as)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def append(path: Path, content: bytes) -> None:
    """Write at the end of a file, all of the content or nothing. WriteError on failure."""
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            with suppress(OSError):
                file.truncate(before)
            raise


def _sync_folder(folder: Path) -> None:
    """Sync the folder's entries, with the new name, to the disk if the file system can sync a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
