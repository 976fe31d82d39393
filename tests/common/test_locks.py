"""Lock files: who may have one, what a refusal says, and locks whose holder is gone; with and without flock."""

import errno
import fcntl
import os
import socket
import threading
import time

import pytest

from common.runs import locks
from common.runs.locks import InUse, Lock

# two of the answers of file systems without flock
NO_FLOCK = [errno.ENOSYS, errno.ENOLCK]


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    monkeypatch.setattr(locks, "STALE", 0.2)


@pytest.fixture(params=[None, *NO_FLOCK], ids=lambda code: "flock" if code is None else errno.errorcode[code])
def path(request, monkeypatch, tmp_path):
    """A lock file's place, on a file system with and without flock."""

    def refused(*_):
        raise OSError(request.param, os.strerror(request.param))

    if request.param is not None:
        monkeypatch.setattr(fcntl, "flock", refused)
    return tmp_path / ".lock"


def lock(path) -> Lock:
    return Lock(path, "choose another --out")


def hold(path, host: str, process: int = 4242) -> None:
    path.write_text(f"{process}\n{host}\n2026-01-30 12:00:00\n")


def test_one_holds_it_and_the_next_after_that(path):
    with lock(path):
        assert path.read_text().splitlines()[:2] == [str(os.getpid()), socket.gethostname()]
        line = f"{path.parent} .*process {os.getpid()} on {socket.gethostname()} .*remove {path}"
        with pytest.raises(InUse, match=line):
            lock(path).acquire()
    assert not path.exists()
    with lock(path):
        assert path.exists()


def test_a_lock_of_another_host_is_respected_as_long_as_it_has_a_heartbeat(path, monkeypatch):
    # a busy machine may stop this process, and its beats, for a while
    monkeypatch.setattr(locks, "STALE", 1000.0)
    hold(path, "node017")
    stop = threading.Event()
    beats = threading.Thread(target=lambda: [os.utime(path) for _ in iter(lambda: stop.wait(0.05), True)])
    beats.start()
    try:
        line = r"process 4242 on node017 \(last heartbeat 20\d\d-\d\d-\d\d \d\d:.*remove"
        with pytest.raises(InUse, match=line):
            lock(path).acquire()
    finally:
        stop.set()
        beats.join()
    assert "node017" in path.read_text()


@pytest.mark.parametrize("host", ["node017", None], ids=["another host", "this host"])
def test_a_lock_without_a_heartbeat_is_taken_over(path, host, capsys):
    hold(path, host or socket.gethostname(), process=2**22 + 1)  # above all process ids
    with lock(path):
        assert path.read_text().startswith(f"{os.getpid()}\n")
    assert capsys.readouterr().out.count(f"is of process {2**22 + 1} on ") <= 1


def test_an_old_lock_is_taken_over_at_once(path, monkeypatch):
    monkeypatch.setattr(locks, "STALE", 1000.0)
    hold(path, "node017")
    os.utime(path, (time.time() - 7200,) * 2)
    with lock(path):
        assert path.exists()


def test_a_file_that_names_no_holder_is_no_lock_where_flock_says_so(tmp_path):
    (tmp_path / ".lock").touch()
    with lock(tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text()


def test_a_process_that_was_killed_holds_nothing(path):
    child = os.fork()
    if child == 0:
        held = lock(path)
        held.acquire()
        os._exit(0)
    os.waitpid(child, 0)
    assert path.exists()
    with lock(path):
        assert path.read_text().startswith(f"{os.getpid()}\n")


def test_a_lock_shows_its_heartbeat_and_notices_that_it_was_taken_over(path):
    held = lock(path)
    held.acquire()
    before = path.stat().st_mtime_ns
    deadline = time.monotonic() + 120
    while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_mtime_ns > before
    held.check()
    hold(path, "node018")
    with pytest.raises(InUse, match=f"{path.parent} was taken over by process 4242 on node018"):
        held.check()
    held.release()
    assert "node018" in path.read_text()  # which is not its own to remove


def test_with_patience_it_is_waited_for(path):
    held = lock(path)
    held.acquire()
    released = []
    threading.Timer(0.3, lambda: released.append(True) or held.release()).start()
    lock(path).acquire(patience=120)
    assert released


def test_a_process_lives_until_it_has_ended():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert locks._lives(os.getpid()) and not locks._lives(child)


def test_a_forked_process_does_not_give_its_parents_lock_back(tmp_path):
    with lock(tmp_path / ".lock") as held:
        child = os.fork()
        if child == 0:
            held.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / ".lock").exists()
