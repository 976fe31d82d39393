"""`python -m benchmarks.speed steps`: the cost of a training step of each method, part by part, beside a plain path.

Each method and cross-entropy run twice, as two processes that take turns epoch by epoch, so that a drift of the machine
affects both. One process is the script as it is. The other is the plain path: views by PIL and torchvision, image by image
in the workers of a DataLoader, float32, PyTorch's memory format, no recorded graphs. benchmarks.timed_script starts both by
the script's command line.

PIL makes the views of all passes, selection and test included; all else that a method does to a batch stays on the device.
On a GPU both paths let cuDNN choose the fastest algorithm; convolutions of the plain path use TF32, PyTorch's default.

Images have 32 x 32 pixels, the network is a ResNet-18, the batch sizes are those of the papers' CIFAR cells, on a CPU a part
of them. "images" are the samples of a step's (labelled) batch; unlabelled samples and views are the cost of the step. A long
pass is cut short after --pass_seconds; seconds_per_epoch then counts each missing step as the mean of those made. Not
counted: the first step of each pass, which starts the workers, and steps with a batch that is not full.
"""

import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
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


class Method(NamedTuple):
    """How a method is run, and what its rows say beside figures."""

    script: str
    flags: (
        str  # {b64}: the paper's batch size of 64, divided; {more}: an epoch more, for a warm-up of one epoch
    )
    note: str = ""
    not_plain: str = ""  # what of the plain path is not plain
    graphs: bool = False  # on a GPU its steps are recorded


METHODS = {
    "ce": Method(
        "benchmarks/baseline.py",
        "--like {folder}/like --num_epochs {epochs} --data_path {folder} --batch_size {b128}",
    ),
    "afm": Method(
        "afm/train.py",
        "--dataset squares --data-root {folder} --network resnet18 --train-batch {b128} --epochs {epochs}",
    ),
    "sfa": Method(
        "sfa/Train_cifar.py",
        "--dataset squares --data_path {folder} --imb_type none --noise_mode sym --batch_size {b64} --warm_up 1 "
        "--num_epochs {more}",
        "two networks: an epoch trains both",
    ),
    # early stopping, then one round; the validation part must have all classes
    "me_momentum": Method(
        "me_momentum/main.py",
        "--dataset squares --data_path {folder} --batch_size {b128} --data_percent {training_part} --noise_rate 0 "
        "--n_epoch {epochs} --max_inner_loop 2 --max_outer_loop 1",
        "early stopping and one round; the confident set of a network that has hardly been trained is small; on a card forward "
        "and backward replay recorded graphs, timed as a whole each",
        "on a card the optimiser is the fused one",
        graphs=True,
    ),
    "manifold_dividemix": Method(
        "manifold_dividemix/train_semisup.py",
        "--dataset squares --data_path {folder} --corruption photographs --open-set-cache none --pretrained none "
        "--batch-size {b64} --warmup-epoch 1 --epochs {more} --clustering --interval 1",
        "outliers and split again in every epoch; in the papers' cells every fifth",
    ),
    # epochs count from 0
    "sanm": Method(
        "sanm/Train_cifar.py",
        "--dataset squares --data_path {folder} --pretrained none --batch_size {b64} --warm_up 1 --num_epochs {epochs}",
        "two networks: an epoch trains both; base c2d",
    ),
}


def flags_of(name: str, w: Workload) -> list[str]:
    """The flags of a method's script."""
    values = {"folder": w.folder, "epochs": w.epochs, "more": 1 + w.epochs}
    values |= {f"b{size}": max(size // w.batch_divisor, 2) for size in (64, 128)}
    values |= {"training_part": 0.9 if w.images >= 1000 else 0.5}
    return [word.format(**values) for word in METHODS[name].flags.split()]


def add_step_flags(parser: cli.Parser) -> None:
    """The flags of this measurement; a default of None depends on the device."""
    add = parser.add_argument
    count: dict[str, Any] = {"type": cli.count, "metavar": "N"}
    divisor = "the papers' batch sizes are divided by it; by default 16 on a CPU, 1 on CUDA"
    cut = "cut a training pass short after that time; by default 2 on a CPU, 20 on CUDA"
    workers = "of each DataLoader of the plain path; by default one per core, 8 at most"
    pixels = "of both sides; networks are narrow below 16"
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="which to measure")
    add("--images", **count, help="by default 96 on a CPU, 16384 on CUDA")
    add("--size", type=cli.count, default=32, metavar="PIXELS", help=pixels)
    add("--epochs", **count, default=3, help="of the main phase, 2 or more")
    add("--batch_divisor", **count, help=divisor)
    add("--pass_seconds", type=cli.positive, metavar="S", help=cut)
    add("--workers", type=cli.count_or_zero, metavar="N", help=workers)


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
                reports = run_in_turns(name, workload, args, device)
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
    images, divisor, seconds = (16384, 1, 20.0) if device.on_cuda() else (96, 16, 2.0)
    usual = {"images": images, "batch_divisor": divisor, "pass_seconds": seconds}
    usual["workers"] = min(surroundings(device.device)["cpu_count"], 8)
    vars(args).update({name: value for name, value in usual.items() if vars(args)[name] is None})


def make_workload(w: Workload) -> None:
    """The data set, and what the baseline reads of a run: its arguments, training images and observed labels."""
    images = make_small_images(w.images + max(w.images // 5, CLASSES), w.size)
    labels = np.arange(len(images)) % CLASSES
    cut = w.images
    arrays: dict[str, Any] = {"train_images": images[:cut], "train_labels": labels[:cut]}
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


def command_line(name: str, path: str, workload: Workload, args: Namespace, device: Device) -> list[str]:
    """The command that runs a method by one of the paths, and writes <folder>/<path>.json."""
    method, plain = METHODS[name], path == "plain"
    timed = f"-m benchmarks.timed_script --turns --pass_seconds {args.pass_seconds}"
    words = [sys.executable, *timed.split()]
    # operations are counted on the path where no worker starts inside a step and no recorded graph has the network's
    words += ["--count_flops"] if plain == (method.graphs and device.on_cuda()) else []
    words += ["--plain", "--workers", str(args.workers)] if plain else []
    words += [str(workload.folder / f"{path}.json"), method.script, *flags_of(name, workload)]
    words += ["--device", device.device.type, "--out", str(workload.folder / path)]
    words += ["--precision", "fp32"] if plain else []
    return [*words, *(["--cuda_graphs"] if method.graphs and not plain else [])]


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


def run_in_turns(name: str, workload: Workload, args: Namespace, device: Device) -> dict[str, dict]:
    """What benchmarks.timed_script reports of each path. UserError: one of the two processes failed."""
    commands = {path: command_line(name, path, workload, args, device) for path in PATHS}
    order = [Process(f"{name}, {path} path", words) for path, words in commands.items()]
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


def timed_steps(report: dict) -> pd.DataFrame:
    """The training steps that count, with epoch, pass (0, 1, ...) and warm_up: see the module's docstring.

    In the main phase the labelled batch is full, too.
    """
    size, names = report["batch_size"], ["epoch", "pass", "warm_up", "images", "whole", "seconds", *PARTS]
    steps = [
        step | {"epoch": number, "pass": place, "warm_up": epoch["warm_up"]}
        for number, epoch in enumerate(report["epochs"])
        for place, training in enumerate(epoch["training"])
        for step in training["steps"][1:]
        if step["whole"] and (epoch["warm_up"] or size in (None, step["images"]))
    ]
    return pd.DataFrame(steps, columns=names)


def main_steps(report: dict) -> pd.DataFrame:
    """Those of the main phase."""
    steps = timed_steps(report)
    return steps[~steps["warm_up"].astype(bool)]


def speed(steps: pd.DataFrame) -> float:
    """Images per second over some steps."""
    return float(steps["images"].sum() / steps["seconds"].sum())


def ratios(ours: dict, plain: dict) -> list[float]:
    """Images per second of ours over those of the plain path, for each pair of passes that were made in turn."""
    passes = [main_steps(report).groupby(["epoch", "pass"]) for report in (ours, plain)]
    own, other = (steps["images"].sum() / steps["seconds"].sum() for steps in passes)
    return (own / other).dropna().tolist()


def whole_seconds(training: dict) -> float:
    """The seconds of a training pass as if it were not cut short: each missing step takes the mean of those after the first."""
    steps, missing = training["steps"], training["length"] - len(training["steps"])
    return training["seconds"] + (missing and missing * np.mean([step["seconds"] for step in steps[1:]]))


def epoch_parts(epoch: dict) -> dict[str, float]:
    """The seconds of an epoch as if no pass of it were cut short, and its parts, which add up to them."""
    parts = {"training": sum(whole_seconds(one) for one in epoch["training"])}
    parts |= {"selection": epoch["selection"], "evaluation": epoch["evaluation"]}
    as_cut = sum(one["seconds"] for one in epoch["training"])
    parts["rest"] = epoch["seconds"] - as_cut - parts["selection"] - parts["evaluation"]
    return {"whole": sum(parts.values()), **parts}


def rows(
    name: str, reports: dict[str, dict], args: Namespace, device: Device, peaks: dict[str, float]
) -> Iterator[dict]:
    """The two rows of a method. peaks: of `matmul_peak` by precision. UserError: too few images for a step to count."""
    found = ratios(reports["ours"], reports["plain"])
    flops = next((report["flops"] for report in reports.values() if report["flops"]), None)
    if not found or flops is None:
        raise UserError(
            f"{name}: no step counts, {args.images} images are too few for its batches: use more --images"
        )
    ends = {"median": np.median(found), "min": min(found), "max": max(found)}
    ratio = {f"ours_over_plain_{which}": round(float(value), 3) for which, value in ends.items()}
    ratio["pairs"] = len(found)
    for path, report in reports.items():
        ours, method, precision = path == "ours", METHODS[name], precisions_of(device)[path]
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
            **operator_columns(report),
            "peak_memory_mb": round(report["peak_memory_mb"], 1),
            **arithmetic_columns(report, flops, precision, peaks[precision]),
            **(ratio if ours else dict.fromkeys(ratio)),
            "not_plain": None if ours else method.not_plain,
            "note": method.note,
            **surroundings(device.device),
        }


def step_columns(report: dict) -> dict:
    """Images per second of the steps that count, and the milliseconds of the mean step, the parts of which add up to it."""
    timed, steps = timed_steps(report), main_steps(report)
    warm_up = timed.drop(steps.index)
    speeds = (steps["images"] / steps["seconds"]).quantile([0.5, 0.25, 0.75]).round(3).tolist()
    mean = steps[["seconds", *PARTS]].mean()
    mean["rest"] = mean["seconds"] - mean[list(PARTS)].sum()
    milliseconds = (1000 * mean.astype(float)).round(3).rename({"seconds": "step"}).add_suffix("_ms")
    return {
        **dict(zip(("median_images_per_second", "q1", "q3"), speeds, strict=True)),
        "timed_steps": len(steps),
        "warm_up_images_per_second": round(speed(warm_up), 3) if len(warm_up) else None,
        **milliseconds.to_dict(),
    }


def operator_columns(report: dict) -> dict:
    """The network's own operators of a step, replayed alone (benchmarks.operators), and their share of the fastest step."""
    own = report["operators_seconds"]
    share = None if own is None else round(own / main_steps(report)["seconds"].min(), 3)
    return {"operators_ms": own and round(1000 * own, 3), "operators_share": share}


def epoch_columns(report: dict) -> dict:
    """The mean epoch of the main phase, its parts, and one selection.

    Without the first epoch, in which memory is laid out and operations are counted.
    """
    numbers = main_steps(report)["epoch"].unique()
    epochs = [report["epochs"][number] for number in (numbers[1:] if len(numbers) > 1 else numbers)]
    mean = pd.DataFrame([epoch_parts(epoch) for epoch in epochs]).mean().astype(float).round(4).to_dict()
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
    reached = per_image * speed(main_steps(report))
    return {
        "precision": precision,
        "step_gflop": round(per_image * report["batch_size"] / 1e9, 3),
        "gflop_per_second": round(reached / 1e9, 3),
        "matmul_gflop_per_second": round(peak / 1e9, 3),
        "share_of_matmul": round(reached / peak, 4),
    }


def matmul_peak(device: torch.device, precision: str) -> float:
    """Floating point operations per second of the fastest of some large matrix products. precision: fp32, tf32 or bf16."""
    side = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
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
    "selection   epoch  memory  of peak   own  ours/plain (range)"
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
    own = " " * 6 if row["operators_share"] is None else f"{100 * row['operators_share']:5.0f}%"
    return (
        f"{row['method']:<18}  {row['path']:<5}{row['median_images_per_second']:10.2f}  "
        f"({row['q1']:.2f} to {row['q3']:.2f})  {' '.join(shares)}  {row['one_selection_seconds']:8.2f}s"
        f"{row['seconds_per_epoch']:7.1f}s {row['peak_memory_mb']:7.0f}  {100 * row['share_of_matmul']:6.1f}%{own}{ratio}"
    )
