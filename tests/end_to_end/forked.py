"""Run sanm/Train_cifar.py several times, in a process of its own each, but with one import for all.

Takes [[MOMENT, FLAGS], ...] as JSON. MOMENT: null, or EPOCH:WHERE as in `killed`, where the run is killed; the passes of an
epoch are training (warm-up too) and losses. Prints the exit status of each.
"""

import json
import os
import sys

from sanm import Train_cifar
from tests.end_to_end.killed import MortalRun

if __name__ == "__main__":
    Train_cifar.Run = MortalRun
    for moment, flags in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            epoch, where = (moment or "0:never").split(":")
            MortalRun.moment = (int(epoch), where)
            Train_cifar.main(flags)
            os._exit(0)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
