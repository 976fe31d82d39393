"""me_momentum/Clothing.py with a small network in float64: [EPOCH:WHERE ...] FLAGS.

Two processes differ from one by the last digits then; in float32 the gradients of a ResNet on smooth images agree to one to three
digits, and a selection can tip over. With moments, as killed.py has them, it is started once for each, killed there, and once
more to run to its end.
"""

import os
import sys

import torch
import torch._dynamo
from torch import nn

from common.gpu import augment
from common.runs import cli
from me_momentum import Clothing
from tests.end_to_end.killed import MortalRun


def small_network(num_classes: int, name: str, pretrained: str) -> nn.Module:
    """In place of clothing_network."""
    assert (name, pretrained) == ("resnet18", "none")
    layers = [nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, num_classes))


if __name__ == "__main__":
    start = next(number for number, word in enumerate(sys.argv) if word.startswith("--"))
    words, normalise = sys.argv[start:], augment.normalise
    augment.normalise = lambda *arguments: normalise(*arguments).double()
    Clothing.clothing_network = small_network
    torch.set_default_dtype(torch.float64)
    for moment in sys.argv[1:start]:
        child = os.fork()
        if child == 0:
            epoch, where = moment.split(":")
            Clothing.Run, MortalRun.moment = MortalRun, (int(epoch), where)
            cli.exit_cleanly(Clothing.main, words)
            os._exit(0)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    cli.exit_cleanly(Clothing.main, words)
