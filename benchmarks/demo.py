"""Find the wrong labels in a folder of images, from nothing: make the folder, train on it, rank its labels, show them.

    python -m benchmarks.demo --out results/demo

The images are scikit-learn's handwritten digits as PNGs. 15 % of the training labels are wrong: margin1 noise, which mislabels
images between two classes. train.csv has the true labels too, so that the ranking can be measured; training does not use them.
"""

import csv
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets
from common.datasets import Split
from common.datasets.posterior import posterior_for
from common.noise import add_noise
from common.runs import cli
from common.runs.cli import UserError
from common.runs.files import write_atomic

NOISE_TYPE, NOISE_RATE = "margin1", 0.15
TRAINING = "--image_size 8 --num_epochs 40 --warm_up 10 --lr_drop 30"
ROOT = Path(__file__).resolve().parents[1]


def make_parser() -> cli.Parser:
    """The flags of the demonstration."""
    parser = cli.Parser(prog="demo.py", description=__doc__)
    parser.add_argument("--out", default="results/demo", metavar="DIR", help="the folder of images and run")
    parser.add_argument("--seed", type=cli.seed, default=1, help="seed of the noise and of training")
    parser.add_argument("--device", choices=cli.DEVICES, default="auto", help="where to train")
    return parser


def write_digits(folder: Path, seed: int) -> None:
    """Digits as a folder of images: images/ with PNGs of 8 x 8 pixels, train.csv with noisy and true labels, test.csv."""
    data = datasets.load("digits")
    eta = posterior_for(NOISE_TYPE, data, folder)
    labels = data.train.labels
    noisy = add_noise(NOISE_TYPE, labels, NOISE_RATE, data.num_classes, seed, posterior=eta)
    write_part(folder, "train", data.train, label=noisy, true_label=labels)
    write_part(folder, "test", data.test, label=data.test.labels)


def write_part(folder: Path, part: str, split: Split, **columns: np.ndarray) -> None:
    """<part>.csv with the columns path and `columns` [N], and the images [N, H, W, 1] that it names."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    paths = [f"images/{part}_{i:04}.png" for i in range(len(split.labels))]
    for path, image in zip(paths, split.images, strict=True):
        Image.fromarray(image[..., 0]).save(folder / path)
    rows = zip(paths, *(values.tolist() for values in columns.values()), strict=True)
    lines = [",".join(("path", *columns)), *(",".join(map(str, row)) for row in rows)]
    write_atomic(folder / f"{part}.csv", "".join(f"{line}\n" for line in lines).encode())


def call(*words: str) -> None:
    """Run python with these words, after printing them. UserError: it fails; it has told why."""
    print("\n$ python", shlex.join(words), flush=True)
    status = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if status:
        raise UserError(f"python {shlex.join(words)} ended with exit status {status}")


@cli.script
def main(argv=None) -> None:
    """Make the folder, train, rank, and write the gallery."""
    args = make_parser().parse_args(argv)
    begin = time.perf_counter()
    folder, run = Path(args.out).resolve() / "digits", Path(args.out).resolve() / "run"
    write_digits(folder, args.seed)
    with (folder / "train.csv").open(newline="") as file:
        wrong = sum(row["label"] != row["true_label"] for row in csv.DictReader(file))
    print(f"{folder}: {wrong} training labels are wrong")
    shared = ["--seed", str(args.seed), "--device", args.device, "--out", str(run)]
    call("sfa/Train_cifar.py", "--dataset", "folder", "--data_path", str(folder), *TRAINING.split(), *shared)
    call("-m", "benchmarks.label_errors", str(run))
    call("-m", "benchmarks.gallery", str(run))
    galleries = (
        ", ".join(str(path) for path in sorted(run.glob("*.html"))) or f"as the last line of {run} says"
    )
    print(f"\n{time.perf_counter() - begin:.0f} s; open the gallery in a browser: {galleries}")


if __name__ == "__main__":
    cli.exit_cleanly(main)
