"""Files written whole or not at all, on file systems that refuse."""

import errno
import os
import resource
import stat
from contextlib import contextmanager

import pytest
import torch

from common.runs import checkpoint, files
from common.runs.events import EventFile
from common.runs.files import WriteError, append, cannot_write, write_atomic


@contextmanager
def limit(size: int):
    """No file may grow beyond `size` bytes: what a full disk does to a file, without a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse_folders(monkeypatch, code: int) -> None:
    """Have fsync of a folder fail."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EBADF", "EACCES", "EIO", "ENOSPC", "not opened"])
def test_a_folder_that_cannot_be_synced_is_no_error_but_one_whose_sync_fails_is(name, monkeypatch, tmp_path):
    path, real = tmp_path / "file", os.open

    def refused(place, *arguments):
        if place == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(place, *arguments)

    if name == "not opened":
        monkeypatch.setattr(files.os, "open", refused)
    else:
        refuse_folders(monkeypatch, getattr(errno, name))
    if name in ("EIO", "ENOSPC"):
        with pytest.raises(WriteError) as error:
            write_atomic(path, b"content")
        assert (error.value.errno, error.value.filename) == (getattr(errno, name), str(path))
    else:
        write_atomic(path, b"content")
    assert path.read_bytes() == b"content"


WRITERS = {
    "whole": lambda path: write_atomic(path, bytes(2000)),
    "added": lambda path: append(path, bytes(2000)),
    "checkpoint": lambda path: checkpoint.save(path.parent, {"weights": torch.zeros(500)}),
    "checkpoint of small tensors": lambda path: checkpoint.save(path.parent, {"all": list(torch.zeros(400))}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_does_not_fit_is_named_and_what_was_there_stays(write, tmp_path):
    path = tmp_path / checkpoint.CURRENT
    path.write_bytes(b"what was there")
    with limit(1000), pytest.raises(WriteError) as error:
        write(path)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_an_event_file_never_holds_half_an_epoch(tmp_path):
    events = EventFile(tmp_path, 1)
    events.add(1, {"loss": 0.5})
    before = events.path.read_bytes()
    with limit(len(before) + 10), pytest.raises(WriteError):
        events.add(2, {"loss": 0.25})
    assert events.path.read_bytes() == before
    events.add(2, {"loss": 0.125, "accuracy": 50})
    assert scalars(tmp_path) == {"loss": [(1, 0.5), (2, 0.125)], "accuracy": [(2, 50.0)]}


def test_a_later_event_file_takes_the_place_of_the_epochs_it_does_again(tmp_path):
    first = EventFile(tmp_path, 1)
    for epoch in (1, 2):
        first.add(epoch, {"loss": 1.0})
    EventFile(tmp_path, 2).add(2, {"loss": 0.5})
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 0.5)]}


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("ENOSPC", "make room"), ("EDQUOT", "make room"), ("EROFS", "another --out"), ("EIO", "another --out")],
)
def test_the_remedy_for_a_full_disk_is_room(name, remedy):
    code = getattr(errno, name)
    line = cannot_write("run/log.csv", OSError(code, os.strerror(code)), "another --out")
    assert line == f"run/log.csv cannot be written ({os.strerror(code)}): {remedy}"
