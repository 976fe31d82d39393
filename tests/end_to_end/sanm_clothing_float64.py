"""sanm/Train_clothing1M.py with a small network in float64: [EPOCH:WHERE ...] FLAGS.

Two processes then differ from one by the last digits; in float32 gradients agree to one to three digits, and a division can
change. With moments, as in killed.py, it is started once for each, killed there, and once more to run to its end. Two more
moments: 0:start, before the first checkpoint, and LAST:weights, in the test of the best weights.
"""

import os
import sys

import torch
import torch._dynamo
from torch import nn

from common.gpu import augment
from common.runs import cli
from sanm import Train_clothing1M
from sanm.networks import MaskedNetwork
from tests.end_to_end.killed import MortalRun, die


class MortalClothingRun(MortalRun):
    """A run that may also end before its first checkpoint."""

    def resume(self, state: dict) -> None:
        """As ever, but for a run that is to end at its start."""
        if self.moment == (0, "start"):
            die()
        super().resume(state)


def small_network(name: str, num_classes: int, pretrained: str) -> MaskedNetwork:
    """In place of clothing_network: maps of 7 x 7 of images of 64 pixels."""
    assert (name, pretrained) == ("resnet18", "none")
    encoder = [nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU()]
    encoder += [nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()]
    return MaskedNetwork(nn.Sequential(*encoder), 16, num_classes, nn.ConvTranspose2d(16, 3, 4, stride=4))


if __name__ == "__main__":
    start = next(number for number, word in enumerate(sys.argv) if word.startswith("--"))
    words, normalise = sys.argv[start:], augment.normalise
    augment.normalise = lambda *arguments: normalise(*arguments).double()
    Train_clothing1M.clothing_network = small_network
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = (
        torch.Tensor.double
    )  # what is taken out of the autocast, scores and losses among them
    for moment in sys.argv[1:start]:
        child = os.fork()
        if child == 0:
            epoch, where = moment.split(":")
            Train_clothing1M.Run, MortalRun.moment = MortalClothingRun, (int(epoch), where)
            cli.exit_cleanly(Train_clothing1M.main, words)
            os._exit(0)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    cli.exit_cleanly(Train_clothing1M.main, words)
