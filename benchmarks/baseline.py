"""Plain cross-entropy on the same images and observed labels as another run.

    python -m benchmarks.baseline --like results/runs/sfa/embedded/digits-if0.1-imb0.5/sfa/seed1

The other run's directory gives the data set, the training images and the observed labels; this script draws none. One
pre-activation ResNet-18 (a narrow one below 16 pixels), SGD with momentum 0.9 and weight decay 5e-4, crop and flip. The
learning rate drops by 10x for the last quarter of the epochs.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets
from common.gpu import device as gpu
from common.gpu.augment import training_augmentation
from common.gpu.loader import Batches, Images, test_batches
from common.runs import cli
from common.runs.cli import UserError
from common.runs.label_quality import Estimate, save_label_quality
from common.runs.run import Run


class Block(nn.Module):
    """Basic pre-activation block."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H / stride, W / stride]."""
        x = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(x)))) + self.skip(x)


class Network(nn.Sequential):
    """Pre-activation ResNet: a stem, stages that halve the resolution, mean over the map, a linear classifier."""

    def __init__(self, num_classes: int, in_channels: int, size: int):
        widths, repeats = ((64, 128, 256, 512), 2) if size >= 16 else ((16, 32, 64), 1)
        stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        layers = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU()]
        before = widths[0]
        for width in widths:
            for _ in range(repeats):
                layers.append(Block(before, width, stride=2 if width != before else 1))
                before = width
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)]
        super().__init__(*layers, *pool)


def make_parser() -> cli.Parser:
    """The baseline's flags."""
    parser = cli.Parser(prog="baseline.py", description=__doc__)
    add = parser.add_argument
    auto: dict[str, Any] = {"default": "auto"}
    precision = "as in the scripts; auto: float32 if that run has --fidelity released"
    add("--like", required=True, metavar="RUN", help="run directory to take data and labels from")
    add("--data_path", metavar="DIR", help="where the data sets are; by default as in that run")
    add("--num_epochs", type=cli.count, help="epochs; by default as in that run")
    add("--batch_size", type=cli.count, default=128, help="batch size")
    add("--lr", type=cli.positive, default=0.02, help="initial learning rate")
    add("--out", metavar="DIR", help="run directory; by default baseline/ beside that run")
    add("--device", choices=cli.DEVICES, **auto, help="where to train")
    add("--precision", choices=["auto", "fp32", "bf16"], **auto, help=precision)
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("-r", "--resume", choices=["auto", "never"], **auto, help="as in the scripts")
    return parser


def read_run(folder: Path) -> tuple[dict, np.ndarray, np.ndarray]:
    """args.json, training positions [N] and observed labels [N] of a run directory. UserError: it is none."""
    arrays = ("train_index.npy", "noisy_labels.npy")
    if missing := [name for name in ("args.json", *arrays) if not (folder / name).is_file()]:
        remedy = "name the directory of a run that has begun"
        raise UserError(f"--like {folder}: no {', '.join(missing)} in it; {remedy}")
    index, observed = (np.load(folder / name, allow_pickle=False) for name in arrays)
    return json.loads((folder / "args.json").read_text()), index, observed


@torch.no_grad()
def predict(network: nn.Module, batches: Iterable, device: gpu.Device) -> Tensor:
    """Logits of images in order, float32 [N, K]."""
    network.eval()
    logits = []
    for (images,), _ in batches:
        with device.autocast():
            logits.append(network(images))
    return torch.cat(logits).float()


def accuracy(network: nn.Module, test: Iterable, labels: Tensor, device: gpu.Device) -> float:
    """Top-1 accuracy in percent."""
    return 100 * float(gpu.wide(predict(network, test, device).argmax(dim=1) == labels).mean())


def estimate_label_quality(network: nn.Module, plain: Batches, device: gpu.Device) -> Estimate:
    """Class probabilities of the training images in order, without augmentation."""
    return Estimate(F.softmax(predict(network, plain, device), dim=1))


def train_epoch(network, optimizer: SGD, batches, labels: Tensor, device: gpu.Device) -> float:
    """One epoch of cross-entropy on the observed labels: the mean loss."""
    network.train()
    losses = []
    for (images,), index in batches:
        with device.autocast(network):
            loss = F.cross_entropy(network(images).float(), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def learning_rate(lr: float, epoch: int, epochs: int) -> float:
    """`lr`, 10x lower for the last quarter of the epochs; these count from 1."""
    return lr if epoch <= 0.75 * epochs else lr / 10


@cli.script
def main(argv=None) -> None:
    """Train the baseline and write its run directory."""
    args = make_parser().parse_args(argv)
    like = Path(args.like)
    description, index, observed = read_run(like)
    arguments, cell = description["arguments"], description["cell"]
    args.seed = arguments["seed"]
    args.num_epochs = args.num_epochs or arguments["num_epochs"]
    args.out = args.out or str(like / "baseline")
    device = gpu.pick(args.device, args.precision, fidelity=arguments.get("fidelity", "paper"))
    data = datasets.from_arguments(arguments, args.data_path)
    columns = ("table", "cell", "dataset", "noise_type", "noise_rate", "imb_factor", "ood_ratio", "profile")
    own = {column: cell[column] for column in columns}
    run = Run(args, device, paper=description["paper"], method="CE", name="", cell=own)
    drawn = arguments.get("noise_type") or arguments.get("noise_mode") or "given"
    truth = data.true_labels(index, "given" if arguments.get("noise_file") else drawn)
    run.save_labels(index, truth, observed, data.num_classes)

    train = Images(data.train.images[index], data.mean, data.std, device.device)
    tests = test_batches(data, arguments.get("limit_test"), args.seed, 256, device.device)
    labels = torch.from_numpy(observed).to(device.device)
    size, channels = data.train.images.shape[2:]
    torch.manual_seed(args.seed)
    network = device.prepare(Network(data.num_classes, channels, size), args.compile)
    optimizer = SGD(network.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    loader = device.generator(args.seed)
    run.resume({"network": network, "optimizer": optimizer, "loader": loader})
    augmentation = training_augmentation(data.name, size)
    batches = Batches(train, args.batch_size, augmentation=augmentation, shuffle=True, generator=loader)
    for epoch in run.epochs(args.num_epochs):
        optimizer.param_groups[0]["lr"] = learning_rate(args.lr, epoch, args.num_epochs)
        loss = train_epoch(network, optimizer, run.progress(batches, f"epoch {epoch}"), labels, device)
        run.log(epoch, loss=loss, test_accuracy=accuracy(network, *tests.limited, device))
    plain = Batches(train, 256)
    save_label_quality(run, lambda: estimate_label_quality(network, plain, device), data.paths, data.classes)
    run.finish()


if __name__ == "__main__":
    cli.exit_cleanly(main)
