"""Start me_momentum/main.py again and again, each time killed at a moment of its own: EPOCH:WHERE ... -- FLAGS.

WHERE is the pass of that epoch that does not end (training, selection, validation), or log: after the epoch's row is
written, before its checkpoint is. Prints the exit status of each start. A process of its own each, but one import for all.
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator

import torch._dynamo  # noqa: F401  (what an optimiser imports when it is made, for seconds: here once for all)

from common.runs.run import Run
from me_momentum import main


def die() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


class MortalRun(Run):
    """A run that gets a signal in one epoch, kill -9 by default."""

    moment: tuple[int, str]
    signal = signal.SIGKILL

    def progress(
        self, batches: Iterable, description: str, training: bool = True, whole: bool = False
    ) -> Iterator:
        """As ever, up to the second batch of the moment."""
        what = "training" if training else description.rpartition(" ")[2]
        for number, batch in enumerate(super().progress(batches, description, training, whole)):
            if number == 1 and self.moment == (len(self.rows) + 1, what):
                os.kill(os.getpid(), self.signal)
            yield batch

    def log(self, epoch: int, **values: float | int | None) -> None:
        """As ever, but it may be the last."""
        super().log(epoch, **values)
        if self.moment == (epoch, "log"):
            os.kill(os.getpid(), self.signal)


if __name__ == "__main__":
    end = sys.argv.index("--")
    main.Run = MortalRun
    for word in sys.argv[1:end]:
        epoch, where = word.split(":")
        child = os.fork()
        if child == 0:
            MortalRun.moment = (int(epoch), where)
            main.main(sys.argv[end + 1 :])
            os._exit(0)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
