"""`python -m benchmarks.speed steps`: what a training step of each method costs, part by part, and beside it a plain path.

Each method, and cross-entropy, is run twice, as two processes that take turns epoch by epoch, so that a machine that drifts
does so for both: once as it is, once as plain scripts do it, with views made by PIL and torchvision image by image in the
workers of a DataLoader, float32, PyTorch's memory format, no recorded graphs. Both are started through the script's
command line inside benchmarks.timed_script, which knows the borders that all scripts have in common.

The views by PIL are those of all passes, selection and test included; what a method does to a batch beyond its views stays
on the device. On a card both keep cuDNN's choice of the fastest algorithm, and the plain path's convolutions TF32, which is
PyTorch's default.

Images of 32 x 32 pixels, ResNet-18 and the batch sizes of the papers' CIFAR cells, on a CPU a part of them. "images" are
the samples of a step's (labelled) batch: unlabelled ones, views, and whatever is made of them are the cost of the step. A long
pass is cut short after --pass_seconds, and seconds_per_epoch then has the steps left out at the mean of those made. The first
step of each pass, which starts the workers, and steps with a batch that is not whole are not counted.
"""

import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.cells import ROOT
from benchmarks.speed_inputs import make_small_images, surroundings
from benchmarks.timed_script import PARTS, WAITING
from common.gpu import device as gpu
from common.gpu.device import Device
from common.runs import cli
from common.runs.cli import UserError

DATASET = "squares"
CLASSES = 10
PATHS = ("ours", "plain")


class Workload(NamedTuple):
    """What all methods are run on, and for how long."""

    folder: Path
    images: int
    size: int
    epochs: int  # of the main phase
    batch_divisor: int

    def batch(self, of_paper: int) -> str:
        """A batch size of a paper, or its part: a flag's value."""
        return str(max(of_paper // self.batch_divisor, 2))


class Method(NamedTuple):
    """How a method is run, and what its rows say beside figures."""

    script: str
    flags: Callable[[Workload], list[str]]
    note: str = ""
    not_plain: str = ""  # what of the plain path is not plain
    graphs: bool = False  # on a card its steps are recorded


def cross_entropy(w: Workload) -> list[str]:
    """Flags of benchmarks/baseline.py."""
    words = ["--like", str(w.folder / "like"), "--num_epochs", str(w.epochs)]
    return [*words, "--data_path", str(w.folder), "--batch_size", w.batch(128)]


def afm(w: Workload) -> list[str]:
    """Flags of afm/train.py."""
    words = ["--dataset", DATASET, "--data-root", str(w.folder), "--network", "resnet18"]
    return [*words, "--train-batch", w.batch(128), "--epochs", str(w.epochs)]


def sfa(w: Workload) -> list[str]:
    """Flags of sfa/Train_cifar.py."""
    words = ["--dataset", DATASET, "--data_path", str(w.folder), "--imb_type", "none", "--noise_mode", "sym"]
    return [*words, "--batch_size", w.batch(64), "--warm_up", "1", "--num_epochs", str(1 + w.epochs)]


def me_momentum(w: Workload) -> list[str]:
    """Flags of me_momentum/main.py: early stopping, then one round; the validation part must have all classes."""
    words = ["--dataset", DATASET, "--data_path", str(w.folder), "--batch_size", w.batch(128)]
    words += ["--data_percent", "0.9" if w.images >= 1000 else "0.5", "--noise_rate", "0"]
    return [*words, "--n_epoch", str(w.epochs), "--max_inner_loop", "2", "--max_outer_loop", "1"]


def manifold_dividemix(w: Workload) -> list[str]:
    """Flags of manifold_dividemix/train_semisup.py."""
    words = ["--dataset", DATASET, "--data_path", str(w.folder), "--corruption", "photographs"]
    words += ["--open-set-cache", "none", "--pretrained", "none", "--batch-size", w.batch(64)]
    return [*words, "--warmup-epoch", "1", "--epochs", str(1 + w.epochs), "--clustering", "--interval", "1"]


def sanm(w: Workload) -> list[str]:
    """Flags of sanm/Train_cifar.py, whose epochs count from 0."""
    words = ["--dataset", DATASET, "--data_path", str(w.folder), "--pretrained", "none"]
    return [*words, "--batch_size", w.batch(64), "--warm_up", "1", "--num_epochs", str(w.epochs)]


METHODS = {
    "ce": Method("benchmarks/baseline.py", cross_entropy),
    "afm": Method("afm/train.py", afm),
    "sfa": Method("sfa/Train_cifar.py", sfa, "two networks: an epoch trains both"),
    "me_momentum": Method(
        "me_momentum/main.py",
        me_momentum,
        "early stopping and one round; the confident set of a network that has hardly been trained is small; on a card forward "
        "and backward replay recorded graphs, timed as a whole each",
        "on a card the optimiser is the fused one",
        graphs=True,
    ),
    "manifold_dividemix": Method(
        "manifold_dividemix/train_semisup.py",
        manifold_dividemix,
        "outliers and split anew in every epoch; in the papers' cells every fifth",
    ),
    "sanm": Method("sanm/Train_cifar.py", sanm, "two networks: an epoch trains both; base c2d"),
}


def add_step_flags(parser: cli.Parser) -> None:
    """The flags of this measurement; where the default is None it depends on the device."""
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="which to measure"
    )
    parser.add_argument("--images", type=cli.count, metavar="N", help="by default 96 on a CPU, 16384 on CUDA")
    parser.add_argument(
        "--size",
        type=cli.count,
        default=32,
        metavar="PIXELS",
        help="of both sides; below 16 networks are narrow",
    )
    parser.add_argument(
        "--epochs", type=cli.count, default=3, metavar="N", help="of the main phase, 2 or more"
    )
    parser.add_argument(
        "--batch_divisor",
        type=cli.count,
        metavar="N",
        help="the papers' batch sizes are divided by it; by default 16 on a CPU, 1 on CUDA",
    )
    parser.add_argument(
        "--pass_seconds",
        type=cli.positive,
        metavar="S",
        help="cut a training pass short after that time; by default 2 on a CPU, 20 on CUDA",
    )
    parser.add_argument(
        "--workers",
        type=cli.count_or_zero,
        metavar="N",
        help="of each DataLoader of the plain path; by default one per core, 8 at most",
    )


def steps(args: Namespace) -> Iterator[dict]:
    """Two rows for each method, ours and the plain path: rows of the CSV."""
    device = gpu.pick(args.device)
    settle(args, device)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the processes too
    # one yardstick for all methods
    peaks = {precision: matmul_peak(device.device, precision) for precision in precisions_of(device).values()}
    print(HEADING)
    try:
        for name in args.methods:
            with tempfile.TemporaryDirectory() as folder:
                workload = Workload(Path(folder), args.images, args.size, args.epochs, args.batch_divisor)
                make_workload(workload)
                reports = run_in_turns(METHODS[name], name, workload, args, device)
            yield from rows(name, reports, args, device, peaks)
    finally:
        signal.signal(signal.SIGTERM, before)


def precisions_of(device: Device) -> dict[str, str]:
    """By path, what its matrix products are made in: on a card the plain path's are TF32, as its convolutions."""
    return {"ours": device.precision, "plain": "tf32" if device.on_cuda() else "fp32"}


def settle(args: Namespace, device: Device) -> None:
    """The defaults that depend on the device. UserError: too few epochs."""
    if args.epochs < 2:
        raise UserError(f"--epochs {args.epochs}: the first is not among those timed, use 2 or more")
    usual = (16384, 1, 20.0) if device.on_cuda() else (96, 16, 2.0)
    args.images, args.batch_divisor, args.pass_seconds = (
        default if given is None else given
        for given, default in zip((args.images, args.batch_divisor, args.pass_seconds), usual, strict=True)
    )
    if args.workers is None:
        args.workers = min(surroundings(device.device)["cpu_count"], 8)


def make_workload(w: Workload) -> None:
    """The data set, and what the baseline reads of a run: its arguments, training images and observed labels."""
    images = make_small_images(w.images + max(w.images // 5, CLASSES), w.size)
    labels = np.arange(len(images)) % CLASSES
    cut = w.images
    arrays = {"train_images": images[:cut], "train_labels": labels[:cut]}
    arrays |= {"test_images": images[cut:], "test_labels": labels[cut:]}
    np.savez(w.folder / f"{DATASET}.npz", **arrays)
    like = w.folder / "like"
    like.mkdir()
    columns = ("table", "cell", "dataset", "noise_type", "noise_rate", "imb_factor", "ood_ratio", "profile")
    description = {"paper": "speed", "arguments": {"dataset": DATASET, "seed": 1}}
    (like / "args.json").write_text(json.dumps(description | {"cell": dict.fromkeys(columns)}))
    np.save(like / "train_index.npy", np.arange(cut))
    np.save(like / "noisy_labels.npy", labels[:cut])


# two processes that take turns ----------------------------------------------------------------------------------------


def command_line(method: Method, path: str, workload: Workload, args: Namespace, device: Device) -> list[str]:
    """The command that runs a method by one of the paths, and writes <folder>/<path>.json."""
    words = [
        sys.executable,
        "-m",
        "benchmarks.timed_script",
        "--turns",
        "--pass_seconds",
        str(args.pass_seconds),
    ]
    # operations are counted where no worker begins inside a step, and where the network's are not in a recorded graph
    words += ["--count_flops"] if path == ("plain" if method.graphs else "ours") else []
    words += ["--plain", "--workers", str(args.workers)] if path == "plain" else []
    words += [str(workload.folder / f"{path}.json"), method.script, *method.flags(workload)]
    words += ["--device", device.device.type, "--out", str(workload.folder / path)]
    plain = ["--precision", "fp32", *(["--no-cuda_graphs"] if method.graphs else [])]
    return [*words, *(plain if path == "plain" else [])]


class Process:
    """A script that waits for its turns."""

    def __init__(self, name: str, words: list[str]):
        """name: how it is called where it fails."""
        self.name, self.words, self.last_line, self.waiting = name, words, "", True
        self.child = subprocess.Popen(
            words, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )  # fmt: skip

    def until_waiting(self) -> None:
        """Read what it says until it waits for a turn, or is over. UserError: it is over before its end."""
        for line in self.child.stdout:
            if line.strip() == WAITING:
                return
            self.last_line = line.strip() or self.last_line
        self.waiting = False
        if code := self.child.wait():
            command = shlex.join(["python", *self.words[1:]])
            raise UserError(f"{self.name}: {self.last_line} (exit status {code} of {command})")

    def turn(self) -> None:
        """Let it do one epoch."""
        with suppress(BrokenPipeError):  # it is over: what it last said tells why
            self.child.stdin.write("\n")
            self.child.stdin.flush()
        self.until_waiting()

    def end(self) -> None:
        """End it, wherever it is."""
        self.child.kill()
        self.child.wait()
        with suppress(BrokenPipeError):
            self.child.stdin.close()
        self.child.stdout.close()


def run_in_turns(
    method: Method, name: str, workload: Workload, args: Namespace, device: Device
) -> dict[str, dict]:
    """What benchmarks.timed_script reports of each path. UserError: one of the two did not come to its end."""
    order = [
        Process(f"{name}, {path} path", command_line(method, path, workload, args, device)) for path in PATHS
    ]
    try:
        for process in order:
            process.until_waiting()
        while any(process.waiting for process in order):
            for process in order:
                if process.waiting:
                    process.turn()
            order.reverse()  # neither is always the first
    finally:
        for process in order:
            process.end()
    return {path: json.loads((workload.folder / f"{path}.json").read_text()) for path in PATHS}


# figures --------------------------------------------------------------------------------------------------------------


def timed_steps(training: dict, batch_size: int | None) -> list[dict]:
    """The steps of a training pass that count: not the first, and those whose batches are all whole."""
    return [
        step
        for step in training["steps"][1:]
        if step["whole"] and (batch_size is None or step["images"] == batch_size)
    ]


def speed(steps: list[dict]) -> float:
    """Images per second over some steps."""
    return sum(step["images"] for step in steps) / sum(step["seconds"] for step in steps)


def main_epochs(report: dict) -> list[dict]:
    """The epochs of the main phase, without those in which no step counts."""
    size = report["batch_size"]
    return [
        epoch
        for epoch in report["epochs"]
        if not epoch["warm_up"] and any(timed_steps(training, size) for training in epoch["training"])
    ]


def ratios(ours: dict, plain: dict) -> list[float]:
    """Images per second of ours over those of the plain path, for each pair of passes that were made in turn."""
    size, found = ours["batch_size"], []
    for own, other in zip(ours["epochs"], plain["epochs"], strict=False):
        if own["warm_up"]:
            continue
        for pair in zip(own["training"], other["training"], strict=False):
            own_steps, other_steps = (timed_steps(training, size) for training in pair)
            if own_steps and other_steps:
                found.append(speed(own_steps) / speed(other_steps))
    return found


def whole_seconds(training: dict) -> float:
    """The seconds of a training pass, had it not been cut short: the steps left out are like those behind the first."""
    steps = training["steps"]
    if len(steps) == training["length"]:
        return training["seconds"]
    return training["seconds"] + (training["length"] - len(steps)) * np.mean(
        [s["seconds"] for s in steps[1:]]
    )


def epoch_parts(epoch: dict) -> dict[str, float]:
    """The seconds of an epoch, had no pass of it been cut short, and its parts, which add up to them."""
    training = sum(whole_seconds(one) for one in epoch["training"])
    as_cut = sum(one["seconds"] for one in epoch["training"])
    parts = {"selection": epoch["selection"], "evaluation": epoch["evaluation"]}
    rest = epoch["seconds"] - as_cut - sum(parts.values())
    return {"whole": training + sum(parts.values()) + rest, "training": training, **parts, "rest": rest}


def rows(
    name: str, reports: dict[str, dict], args: Namespace, device: Device, peaks: dict[str, float]
) -> Iterator[dict]:
    """The two rows of a method. peaks: of `matmul_peak` by precision. UserError: too few images for a step that counts."""
    found = ratios(reports["ours"], reports["plain"])
    flops = next((report["flops"] for report in reports.values() if report["flops"]), None)
    if not found or flops is None:
        raise UserError(
            f"{name}: no step that counts, {args.images} images are too few for its batches: use more --images"
        )
    precisions = precisions_of(device)
    for path, report in reports.items():
        ours, method = path == "ours", METHODS[name]
        yield {
            "what": "steps",
            "method": name,
            "path": path,
            "views": "batches on the device" if ours else "PIL, image by image in DataLoader workers",
            "workers": 0 if ours else args.workers,
            "images": args.images,
            "image_size": args.size,
            "batch_size": report["batch_size"],
            **step_columns(report),
            **epoch_columns(report),
            "peak_memory_mb": round(report["peak_memory_mb"], 1),
            **arithmetic_columns(report, flops, precisions[path], peaks[precisions[path]]),
            "ours_over_plain_median": round(float(np.median(found)), 3) if ours else None,
            "ours_over_plain_min": round(min(found), 3) if ours else None,
            "ours_over_plain_max": round(max(found), 3) if ours else None,
            "pairs": len(found) if ours else None,
            "not_plain": None if ours else method.not_plain,
            "note": method.note,
            **surroundings(device.device),
        }


def step_columns(report: dict) -> dict:
    """Images per second of the steps that count, and the milliseconds of the mean step, the parts of which add up to it."""
    size = report["batch_size"]
    steps = [
        s for e in main_epochs(report) for training in e["training"] for s in timed_steps(training, size)
    ]
    warm_up = [
        step
        for epoch in report["epochs"]
        if epoch["warm_up"]
        for training in epoch["training"]
        for step in timed_steps(training, None)
    ]
    q1, median, q3 = np.percentile([step["images"] / step["seconds"] for step in steps], [25, 50, 75])
    total = np.mean([step["seconds"] for step in steps])
    parts = {part: np.mean([step[part] for step in steps]) for part in PARTS}
    parts["rest"] = total - sum(parts.values())
    return {
        "median_images_per_second": round(float(median), 3),
        "q1": round(float(q1), 3),
        "q3": round(float(q3), 3),
        "timed_steps": len(steps),
        "warm_up_images_per_second": round(speed(warm_up), 3) if warm_up else None,
        "step_ms": round(1000 * float(total), 3),
        **{f"{part}_ms": round(1000 * float(seconds), 3) for part, seconds in parts.items()},
    }


def epoch_columns(report: dict) -> dict:
    """The mean epoch of the main phase, its parts, and one selection.

    Without the first epoch, in which memory is laid out and operations are counted.
    """
    epochs = main_epochs(report)[1:] or main_epochs(report)
    parts = [epoch_parts(epoch) for epoch in epochs]
    mean = {name: round(float(np.mean([part[name] for part in parts])), 4) for name in parts[0]}
    selections = [e["selection"] for e in report["epochs"] if not e["warm_up"] and e["selection"]]
    passes = [one for epoch in epochs for one in epoch["training"]]
    trained = sum(one["length"] for one in passes) * report["batch_size"] / len(epochs)
    return {
        "seconds_per_epoch": mean.pop("whole"),
        **{f"epoch_{name}_seconds": seconds for name, seconds in mean.items()},
        "one_selection_seconds": round(float(np.mean(selections or [0])), 4),
        "images_trained_per_epoch": round(trained),
        "timed_epochs": len(epochs),
        "passes_cut_short": sum(len(one["steps"]) < one["length"] for one in passes),
    }


def arithmetic_columns(report: dict, flops: dict, precision: str, peak: float) -> dict:
    """Floating point operations of a step, and by the second, of matrix products and convolutions.

    peak: those by the second that the device's matrix products of that precision reach.
    """
    per_image = flops["flops"] / flops["images"]
    size = report["batch_size"]
    steps = [
        s for e in main_epochs(report) for training in e["training"] for s in timed_steps(training, size)
    ]
    reached = per_image * speed(steps)
    return {
        "precision": precision,
        "step_gflop": round(per_image * size / 1e9, 3),
        "gflop_per_second": round(reached / 1e9, 3),
        "matmul_gflop_per_second": round(peak / 1e9, 3),
        "share_of_matmul": round(reached / peak, 4),
    }


def matmul_peak(device: torch.device, precision: str) -> float:
    """Floating point operations per second of the fastest of some large matrix products. precision: fp32, tf32 or bf16."""
    side, dtype = (8192 if device.type == "cuda" else 1536), torch.float32
    if precision == "bf16":
        dtype = torch.bfloat16
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(20):
        wait(device)
        start = time.perf_counter()
        left @ right
        wait(device)
        seconds.append(time.perf_counter() - start)
    torch.set_float32_matmul_precision(usual)
    return 2 * side**3 / min(seconds)


def wait(device: torch.device) -> None:
    """Until a card has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


HEADING = (
    "method              path   images/s      (q1 to q3)   augment forward backward optimiser  rest  "
    "selection   epoch  memory  of peak  ours/plain (range)"
)


def step_line(row: dict) -> str:
    """A row as it is printed: the parts as shares of the step; selection and epoch in seconds, memory in MiB."""
    shares = [
        f"{100 * row[f'{part}_ms'] / row['step_ms']:{width}.1f}%"
        for part, width in zip((*PARTS, "rest"), (6, 6, 7, 8, 5), strict=True)
    ]
    ratio = ""
    if row["path"] == "ours":
        low, high = row["ours_over_plain_min"], row["ours_over_plain_max"]
        ratio = f"  {row['ours_over_plain_median']:.2f} ({low:.2f} to {high:.2f})"
    return (
        f"{row['method']:<18}  {row['path']:<5}{row['median_images_per_second']:10.2f}  "
        f"({row['q1']:.2f} to {row['q3']:.2f})  {' '.join(shares)}  {row['one_selection_seconds']:8.2f}s"
        f"{row['seconds_per_epoch']:7.1f}s {row['peak_memory_mb']:7.0f}  {100 * row['share_of_matmul']:6.1f}%{ratio}"
    )
