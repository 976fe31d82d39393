"""sfa/Train_webvision.py with a small network in float64: [EPOCH:WHERE ...] FLAGS.

Two processes differ from one by the last digits then; in float32 a selection can tip over. With moments, as killed.py has them,
it is started once for each, killed there, and once more to run to its end; a moment of our own: 0:start, before the first
checkpoint.
"""

import os
import sys

import torch
import torch._dynamo
from torch import nn

from common import augment, cli
from sfa import Train_webvision
from sfa.networks import TwoHeads
from tests.end_to_end.killed import MortalRun, die


class MortalWebVisionRun(MortalRun):
    """A run that may also end before its first checkpoint."""

    def resume(self, state: dict) -> None:
        """As ever, but for a run that is to end at its start."""
        if self.moment == (0, "start"):
            die()
        super().resume(state)


class SmallNetwork(nn.Module):
    """In place of webvision_network: 16 features."""

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        assert name == "resnet18"
        layers = [nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()]
        self.layers, self.heads = nn.Sequential(*layers), TwoHeads(16, num_classes)

    def forward(self, images):
        return self.heads(self.layers(images).mean(dim=(2, 3)))


if __name__ == "__main__":
    start = next(number for number, word in enumerate(sys.argv) if word.startswith("--"))
    words, normalise = sys.argv[start:], augment.normalise
    augment.normalise = lambda *arguments: normalise(*arguments).double()
    Train_webvision.webvision_network = SmallNetwork
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # what the heads take out of the autocast
    for moment in sys.argv[1:start]:
        child = os.fork()
        if child == 0:
            epoch, where = moment.split(":")
            Train_webvision.Run, MortalRun.moment = MortalWebVisionRun, (int(epoch), where)
            cli.exit_cleanly(Train_webvision.main, words)
            os._exit(0)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    cli.exit_cleanly(Train_webvision.main, words)
