"""Count what a training step starts and waits for on a GPU, without one: on the pretend card of the tests.

A step with its augmentation: forward, backward, optimiser; ResNet-18, batches of two 16 x 16 colour images, bfloat16.
The host starts each operator by itself, and a wait stops it until the GPU has caught up.
"""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from common.gpu.device import Device
from common.gpu.image_operations import cubic
from common.runs.cli import UserError
from common.runs.run import command, git_commit

ROOT = Path(__file__).resolve().parents[1]


def launches(_args: Namespace) -> Iterator[dict]:
    """A row for each kind of step. UserError: there is a GPU, or this torch has no CUDA in it."""
    from tests.card_steps import STEPS, Bench  # noqa: PLC0415 (a clone has them, an installed copy does not)
    from tests.pretend_card import PretendCard, let_autograd_believe, usable  # noqa: PLC0415

    if not usable():
        raise UserError(
            "launches are counted on a pretend card: on a machine without a GPU, with a CUDA build of torch"
        )
    let_autograd_believe()
    card = Device(torch.device("cuda", 0), "bf16", "pretended")
    commit = git_commit()  # before the first row is in a file
    for name, step in STEPS.items():
        with PretendCard(ROOT) as pretend:
            cubic(card.device)  # a table that is made once
            marks: list[tuple[int, int]] = []

            def watch(marks=marks, pretend=pretend) -> None:
                marks.append((pretend.operators.total(), len(pretend.syncs)))

            step(Bench(card, 16, 3, 2, watch))  # the second of its two steps is counted
            (operators, waits), (operators_after, waits_after) = marks
        yield {
            "step": name,
            "operators": operators_after - operators,
            "waits": waits_after - waits,
            "torch": torch.__version__,
            "git": commit,
            "command": command(),
        }


def launch_line(row: dict) -> str:
    """A row as it is printed."""
    return f"{row['step']:28} {row['operators']:5} operators, {row['waits']} waits"
