"""SIGTERM and Ctrl-C: the first is noted, the second ends at once, and what blocks does not keep a process."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.runs.signals import SIGNALS, StopSignals

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import ctypes, sys, time
from common.runs import signals
signals.INTERRUPT, signals.END = map(float, sys.argv[1:3])
stop = signals.StopSignals(lambda what: f"{what}; told")
stop.start()
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
print("ready", flush=True)
if sys.argv[3] == "python":
    while stop.number is None:
        time.sleep(0.01)
    print("noted", flush=True)
    time.sleep(600)
lock(mutex)  # waits for itself, and signals do not change that
"""


@pytest.mark.parametrize(
    ("blocks", "number", "times", "line"),
    [
        ("python", signal.SIGINT, 2, "ended at once; told"),
        ("python", signal.SIGTERM, 1, "ended at once; told"),
        ("c", signal.SIGTERM, 1, "ended, as something blocks since 1 s; told"),
        ("c", signal.SIGINT, 1, "ended, as something blocks since 1 s; told"),
    ],
    ids=["second signal", "python", "c", "c-interrupt"],
)
def test_a_process_that_something_blocks_ends(blocks, number, times, line):
    # where the signals end it, the end must not come first on a busy machine
    interrupt, end = ("0.5", "0.9") if blocks == "c" else ("600" if times == 2 else "0.2", "600")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, interrupt, end, blocks],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    if times == 2:  # two signals of a kind before Python's handler runs would be one
        assert process.stdout.readline() == "noted\n"
        process.send_signal(number)
    assert process.communicate(timeout=120)[1] == f"{number.name}: {line}\n"
    assert process.returncode == 128 + number


def test_the_first_signal_is_noted_and_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in SIGNALS], signal.set_wakeup_fd(-1)
    stop = StopSignals(str)
    stop.start()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    stop.close()
    stop.close()
    assert ([signal.getsignal(number) for number in SIGNALS], signal.set_wakeup_fd(-1)) == before
    assert "signals" not in [thread.name for thread in threading.enumerate()]
