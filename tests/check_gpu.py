"""Check on a machine with a CUDA device that everything computes there what it computes on the CPU, and how fast.

    make check-gpu                       # prints a table, writes results/check_gpu.csv

Exit status: 0, 1 if a check failed or differs, 2 without a CUDA device. The tests run the same checks on a pretend card.
"""

import argparse
import csv
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.gpu import augment, graphs, policies
from common.gpu.device import Device, exact_products
from common.runs import cli
from common.runs.cli import UserError
from common.runs.files import write_atomic
from tests.card_steps import STEPS, Bench

ROOT = Path(__file__).resolve().parents[1]
CPU = Device(torch.device("cpu"), "fp32", "check")
# largest relative difference of a loss: float32 without TF32, bfloat16, and a graph or a compiled network beside eager
FLOAT32, BFLOAT16, SAME = 1e-4, 0.05, 1e-3
LEVELS = 2.0  # mean difference of pixels that two decoders and two ways to resize make, of 255
VIEWS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "crop and flip": augment.crop_and_flip,
    "AutoAugment": policies.auto_augment,
    "RandAugment": policies.rand_augment,
    "SimCLR": augment.simclr_view,
    "SANM warm-up": partial(augment.warm_up_view, crop=augment.crop_and_flip),
}


# rows of each argument of a network, in batches
RECORDED = {"Me-Momentum": (1,), "SFA": (4,), "SANM": (12, 4), "SimCLR": (2,)}


class Recorded(Bench):
    """Networks replay a recorded graph: in the first step beside the eager pass, in the second alone."""

    def __init__(self, rows: tuple[int, ...], *sizes):
        super().__init__(*sizes)
        self.rows, self.networks = rows, []

    def network(self, made):
        network, optimizer = super().network(made)
        side = self.size
        with patch.object(graphs, "CHECKED", 1):
            self.device.replay(network, *((n * self.batch, self.channels, side, side) for n in self.rows))
        self.networks.append(network)
        return network, optimizer

    def dropped(self) -> bool:
        """Whether a graph was not recorded, or found to be wrong."""
        return any(graphs.unrecorded(network) for network in self.networks)


class Check(NamedTuple):
    """A line of the table."""

    check: str
    what: str
    status: str  # ok, differs, failed or skipped
    detail: str


def compared(check: str, what: str, found: Tensor, wanted: Tensor, tolerance: float) -> Check:
    """Whether tensors on the CPU agree to a relative tolerance."""
    difference = float(((found - wanted).abs() / wanted.abs().clamp_min(1e-3)).max())
    good = bool(found.isfinite().all()) and difference <= tolerance
    return Check(check, what, "ok" if good else "differs", f"largest relative difference {difference:.1e}")


def guarded(check: str, what: str, run: Callable[[], Check]) -> Check:
    """The check, or what it failed with: one broken path must not hide the others."""
    try:
        return run()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return Check(check, what, "failed", f"{type(error).__name__}: {first[:150]}")


def steps(card: Device, size: int, batch: int) -> Iterator[Check]:
    """Two steps of each training function against the CPU, in float32 and in bfloat16."""
    for name, step in STEPS.items():
        wanted = step(Bench(CPU, size, 3, batch))

        def exact(step=step, name=name, wanted=wanted) -> Check:
            with exact_products():
                found = step(Bench(card._replace(precision="fp32"), size, 3, batch))
            return compared("float32 step", name, found, wanted, FLOAT32)

        def rounded(step=step, name=name, wanted=wanted) -> Check:
            # of many losses the mean: single samples may differ more
            found = step(Bench(card._replace(precision="bf16"), size, 3, batch))
            return compared("bfloat16 step", name, found.mean()[None], wanted.mean()[None], BFLOAT16)

        yield guarded("float32 step", name, exact)
        yield guarded("bfloat16 step", name, rounded)


def views(card: Device, count: int = 64) -> Iterator[Check]:
    """Augmented images on the card against those of the CPU, which the tests compare with PIL's."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
    for name, view in VIEWS.items():

        def run(name=name, view=view) -> Check:
            found = view(pixels.to(card.device), torch.Generator().manual_seed(1)).cpu()
            wrong = int((found != view(pixels, torch.Generator().manual_seed(1))).sum())
            return Check(
                "views", name, "differs" if wrong else "ok", f"{wrong} of {found.numel()} values differ"
            )

        yield guarded("views", name, run)


def decoded(card: Device, folder: Path) -> Iterator[Check]:
    """Image files decoded and cropped by the card (--decode gpu) against the CPU's: mean difference in levels of 255."""
    from common.datasets import load_food101n  # noqa: PLC0415  (only here: files are written for it)
    from common.gpu.loader import FileBatches  # noqa: PLC0415
    from tests.common.small_file_data import make_food101n  # noqa: PLC0415

    def pixels(device: torch.device, decoded_on: str) -> Tensor:
        levels = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
        made = FileBatches(
            *(load_food101n(folder).train, 12, augment.random_resized_crop_and_flip(64)),
            **{"device": device, "workers": 0, "decoded_on": decoded_on, **levels},
        )
        return torch.cat([views[0].cpu() for views, _ in made])

    def run() -> Check:
        make_food101n(folder, size=(256, 192))
        found, wanted = pixels(card.device, "gpu"), pixels(CPU.device, "cpu")
        mean, most = float((found - wanted).abs().mean()), float((found - wanted).abs().max())
        detail = f"mean difference {mean:.2f} levels of 255, largest {most:.0f}"
        return Check("files", "--decode gpu", "ok" if mean <= LEVELS else "differs", detail)

    yield guarded("files", "--decode gpu", run)


def recorded(card: Device, size: int, batch: int) -> Iterator[Check]:
    """A recorded CUDA graph, and a compiled network, beside the eager one."""
    card = card._replace(precision="fp32")

    class Compiled(Bench):
        def network(self, made):
            network, optimizer = super().network(made)
            network.compile()
            return network, optimizer

    kinds = [("recorded graph", name, partial(Recorded, rows)) for name, rows in RECORDED.items()]
    for name, step, kind in [*kinds, ("--compile", "Me-Momentum", Compiled)]:

        def run(name=name, step=step, kind=kind) -> Check:
            with exact_products():
                wanted = STEPS[step](Bench(card, size, 3, batch)).flatten()
                bench = kind(card, size, 3, batch)
                found = STEPS[step](bench).flatten()
            if isinstance(bench, Recorded) and bench.dropped():
                raise RuntimeError("the graph was dropped: see the warning")
            losses = slice(1) if step == "Me-Momentum" else slice(None)  # its other figure is an accuracy
            return compared(name, step, found[losses], wanted[losses], SAME)

        yield guarded(name, step, run)


def speed(card: Device, size: int = 32, batch: int = 128) -> Iterator[Check]:
    """Images per second of a step with its augmentation, its share of the measured matrix-product peak, and peak memory."""
    a, b = torch.randn(2, 4096, 4096, device=card.device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    peak = 20 * 2 * 4096**3 / (time.perf_counter() - begin)
    for name, step in STEPS.items():

        def run(name=name, step=step) -> Check:
            marks: list[float] = []

            def watch() -> None:
                torch.cuda.synchronize()
                marks.append(time.perf_counter())

            with FlopCounterMode(display=False) as counter:
                step(Bench(card, size, 3, batch))  # also the first pass, which chooses algorithms
            torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                step(Bench(card, size, 3, batch, watch))
            seconds = min(after - before for before, after in zip(marks[::2], marks[1::2], strict=True))
            share = counter.get_total_flops() / 2 / seconds / peak
            memory = torch.cuda.max_memory_allocated() / 2**20
            detail = f"{batch / seconds:.0f} images/s, {100 * share:.1f} % of {peak / 1e12:.0f} TFLOP/s, {memory:.0f} MiB"
            return Check("speed", name, "ok", detail)

        yield guarded("speed", name, run)


def resumed(folder: Path) -> Iterator[Check]:
    """A run that is killed after its first epoch and resumed, against one that is not."""
    words = "sfa/Train_cifar.py --dataset digits --imb_factor 0.1 --noise_ratio 0.4 --limit_train 300 --num_epochs 6 --warm_up 3"
    words += " --batch_size 16 --device cuda --precision fp32"

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, *words.split(), "--out", str(folder / name)]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def rows(name: str) -> np.ndarray:
        with (folder / name / "log.csv").open(newline="", encoding="utf-8") as file:
            return np.array(
                [[float(row["loss"]), float(row["test_accuracy"])] for row in csv.DictReader(file)]
            )

    def run() -> Check:
        killed = start("killed")
        while killed.poll() is None and not (folder / "killed" / "checkpoint.previous.pt").exists():
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        for name in ("killed", "alone"):
            process = start(name)
            _, error = process.communicate()
            if process.returncode:
                raise RuntimeError(error.strip().splitlines()[-1])
        return compared(
            "killed and resumed", "SFA, 6 epochs", *(torch.tensor(rows(n)) for n in ("killed", "alone")), SAME
        )

    yield guarded("killed and resumed", "SFA, 6 epochs", run)


def two_cards(folder: Path) -> Iterator[Check]:
    """The same run by one process and by two, a card each."""
    what = "AFM, 2 epochs"
    if torch.cuda.device_count() < 2:
        yield Check("two cards", what, "skipped", "one card is here")
        return
    # the small data set of the tests in Food-101N's layout: only images in files train by several processes
    from tests.common.small_file_data import make_food101n  # noqa: PLC0415

    make_food101n(folder / "food")
    words = "afm/train.py --dataset food101n --epochs 2 --network resnet18 --pretrained none --train-batch 4 --device cuda"
    words += f" --precision fp32 --workers 0 --data-root {folder / 'food'}"
    starts = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    }

    def run() -> Check:
        losses = []
        for name, start in starts.items():
            command = [*start, *words.split(), "--out", str(folder / name)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            with (folder / name / "log.csv").open(newline="", encoding="utf-8") as file:
                losses.append(torch.tensor([float(row["loss"]) for row in csv.DictReader(file)]))
        return compared("two cards", what, *losses, SAME)

    yield guarded("two cards", what, run)


def to_csv(checks: list[Check], device: str) -> bytes:
    """The table with the device, the commit's versions and the date of each line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Check._fields, "device", "torch", "date"])
    writer.writerows([*check, device, torch.__version__, time.strftime("%Y-%m-%d")] for check in checks)
    return text.getvalue().encode()


@cli.script
def main(argv=None) -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(prog="make check-gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/check_gpu.csv"))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("no CUDA device is here: run this on a machine with one")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    card = Device(torch.device("cuda", 0), "bf16", "check")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = args.out.parent / f"check_gpu-{os.getpid()}"
    checks = []
    for group in (
        steps(card, 32, 8),
        views(card),
        decoded(card, folder / "decoded"),
        recorded(card, 32, 8),
        speed(card),
        resumed(folder),
        two_cards(folder),
    ):
        for check in group:
            print(f"{check.status:8} {check.check:20} {check.what:28} {check.detail}", flush=True)
            checks.append(check)
            write_atomic(args.out, to_csv(checks, torch.cuda.get_device_name(0)))
    bad = sum(check.status in ("differs", "failed") for check in checks)
    print(f"{len(checks)} checks, {bad} not ok; written to {args.out}")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.exit_cleanly(main)
