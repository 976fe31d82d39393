"""Run a script several times, in a process of its own each, but with one import for all: JSON [MODULE].

JSON is [[MOMENT, FLAGS], ...], MODULE by default sanm.Train_cifar. MOMENT: null, or EPOCH:WHERE[:SIGNAL] as in `killed`, where
the run gets the signal; the passes of an epoch are training (warm-up too) and losses. Prints the exit status of each.
"""

import importlib
import json
import os
import signal
import sys

from common.runs import cli
from tests.end_to_end.killed import MortalRun

if __name__ == "__main__":
    script = importlib.import_module([*sys.argv, "sanm.Train_cifar"][2])
    script.Run = MortalRun
    for moment, flags in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            epoch, where, name = [*(moment or "0:never").split(":"), "SIGKILL"][:3]
            MortalRun.moment, MortalRun.signal = (int(epoch), where), signal.Signals[name]
            cli.exit_cleanly(script.main, flags)
            os._exit(0)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
