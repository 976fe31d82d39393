"""Self-supervised Adversarial Noisy Masking on Clothing1M (CVPR 2023): the intended algorithm, the release's defects mended.

    python sanm/Train_clothing1M.py --data_path data/Clothing1M                          # official lists, or the release's
    torchrun --nproc_per_node=8 sanm/Train_clothing1M.py --data_path data/Clothing1M     # the same on eight cards

The labels of the clean validation images choose the weights that are reported. The sections in brackets are those of the
method's description in sanm/README.md.
"""

import math
import random
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets
from common.datasets import FileData, FileSplit
from common.datasets.clothing1m import CLASSES, NAME
from common.datasets.image_cache import ImageCache, open_caches
from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.augment import resize_and_center_crop, resize_random_crop_and_flip
from common.gpu.device import Device
from common.gpu.loader import FileBatches, Labelled, Part
from common.runs import cli, selection_report
from common.runs.cli import UserError
from common.runs.run import Run, run_name
from common.runs.selection_report import Selected
from sanm import clothing
from sanm.flags import add_mask_flags, mask_rule, settle_mask_flags
from sanm.masking import CLOTHING_RULE, draw_clothing_masks, mask_clothing
from sanm.mixmatch import Samples
from sanm.networks import clothing_network
from sanm.selection import clean_probability, divide, normalised
from sanm.training import (
    Masks,
    Step,
    accuracy,
    learning_rate,
    network_scores,
    sample_losses,
    train_divided,
    warm_up,
)

PRESETS = Path(__file__).with_name("presets.toml")


def make_parser() -> cli.Parser:
    """The release's flags and defaults, flags of our own, and the flags all scripts share."""
    parser = cli.Parser(prog="Train_clothing1M.py", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        default="./Dataset/noise_label_data/Clothing1M",
        metavar="DIR",
        type=cli.place,
        help="the official lists of Clothing1M are in it or in its annotations/, or the release's lists are in it",
    )
    data.add_argument(
        "--num_batches", type=cli.count, default=15625, help="batches that a class-balanced subset fills"
    )
    data.add_argument(
        "--num_class", type=cli.count, default=len(CLASSES), help="of Clothing1M; no other number fits"
    )
    data.add_argument(
        "--image_size",
        type=cli.count,
        default=224,
        help="pixels of both sides of a crop; images are resized to 8/7 of it (256) before",
    )
    cli.add_image_file_flags(data, workers=5)
    data.add_argument("--id", default="clothing1m", help="ignored: logs go to --out")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--network", choices=["resnet50", "resnet18"], default="resnet50", help="torchvision's"
    )
    network.add_argument(
        "--pretrained",
        metavar="PATH|imagenet|none",
        type=cli.place,
        default="imagenet",
        help="initial weights of the encoder; a file is read as pre-trained encoders of Train_cifar.py are",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch_size",
        type=cli.count,
        default=8,
        help="labelled = unlabelled batch, over all processes; the warm-up uses twice that. A smaller last batch is dropped, so "
        "that any number of processes trains alike; under --fidelity released one process keeps it",
    )
    training.add_argument(
        "--lr", "--learning_rate", type=cli.positive, default=0.0009, help="initial learning rate"
    )
    training.add_argument(
        "--lr_drop", type=cli.count, default=40, help="epoch, counted from 0, that a tenth of it begins with"
    )
    training.add_argument(
        "--num_epochs", type=cli.count, default=80, help="the last epoch, counted from 0, as in the release"
    )
    training.add_argument(
        "--alpha", type=cli.positive, default=0.5, help="parameter of the Beta distribution of the mixture"
    )
    training.add_argument(
        "--lambda_u", type=cli.non_negative, default=0, help="ignored, as in the release: no unlabelled loss"
    )
    training.add_argument("--T", type=cli.positive, default=0.5, help="sharpening temperature")
    training.add_argument(
        "--p_threshold", type=cli.fraction, default=0.5, help="clean probability above which a label is kept"
    )
    training.add_argument(
        "--sync_bn",
        action=BooleanOptionalAction,
        help="batch statistics over all processes; by default yes, under --fidelity released no",
    )
    training.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")

    add_mask_flags(parser, CLOTHING_RULE, recon_weight=0.3)
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    settle_mask_flags(parser, args)
    if args.num_class != len(CLASSES):
        parser.error(f"argument --num_class: Clothing1M has {len(CLASSES)} classes, got {args.num_class}")
    if args.image_size < 64:
        parser.error(f"argument --image_size: must be at least 64, got {args.image_size}")
    args.sync_bn = args.fidelity != "released" if args.sync_bn is None else args.sync_bn
    return args


# data -----------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What a run trains and tests on."""

    index: np.ndarray  # int64 [N]: where the training images stand in the training list, ascending
    split: FileSplit  # the training images with their noisy labels
    cache: ImageCache | None  # of `split`
    validation: Labelled
    test: Labelled  # all test images, or those of --limit_test
    skipped: tuple[tuple[str, int, str], ...]  # images left out: path, position in its list, reason
    generator: torch.Generator  # orders, crops and flips the training images
    batches: Callable  # (split, cache, transform, batch_size, **training) -> FileBatches
    whole_test: Labelled | None = None  # all test images

    def training(self, positions: np.ndarray, batch_size: int, views: int, args: Namespace) -> FileBatches:
        """Shuffled batches of augmented training images at `positions` [n]; their index counts from 0 to n - 1."""
        transform = resize_random_crop_and_flip(before_crop(args), args.image_size)
        options = {
            "shuffle": True,
            "drop_last": drops_last(args),
            "generator": self.generator,
            "views": views,
        }
        return self.batches(*self._only(positions), transform, batch_size, **options)

    def plain(self, positions: np.ndarray, args: Namespace) -> FileBatches:
        """The training images at `positions` [n] as the test has them, in order; their index counts from 0 to n - 1."""
        return self.batches(*self._only(positions), test_transform(args), test_batch_size(args))

    def _only(self, positions: np.ndarray) -> tuple[FileSplit, ImageCache | None]:
        return self.split.only(positions), None if self.cache is None else self.cache.only(positions)


def before_crop(args: Namespace) -> int:
    """Pixels of the shorter side that an image is resized to: 256 for a crop of 224."""
    return args.image_size * 8 // 7


def test_transform(args: Namespace) -> Callable:
    """Resize and centre crop."""
    return resize_and_center_crop(before_crop(args), args.image_size)


def test_batch_size(args: Namespace) -> int:
    """Of passes without gradients, where the size changes nothing."""
    return 8 * args.batch_size


def load(args: Namespace, device: Device) -> Data:
    """The noisy training list, the clean validation and the clean test list [section 9]. UserError: data or flags do not fit."""
    files = processes.from_first(lambda: _load_files(args))
    kept = datasets.limited(np.arange(len(files.positions)), args.limit_train, args.seed)
    caches = open_caches(args.image_cache, files) if args.image_cache else {}
    loading = {"mean": clothing.MEAN, "std": clothing.STD, "device": device.device, "workers": args.workers}
    loading |= {"rank": processes.rank(), "world": processes.world()}

    def batches(split: FileSplit, cache: ImageCache | None, transform, size: int, **training) -> FileBatches:
        return FileBatches(split, size, transform, cache=cache, **loading, **training)

    def in_order(split: FileSplit, keep: np.ndarray | slice = slice(None)) -> Labelled:
        cache, split = caches[split.part].only(keep) if caches else None, split.only(keep)
        whole = batches(split, cache, test_transform(args), test_batch_size(args))
        return Labelled(whole, torch.from_numpy(split.labels).to(device.device))

    return Data(
        files.positions[kept],
        files.train.only(kept),
        caches["train"].only(kept) if caches else None,
        in_order(files.validation),
        in_order(files.test, datasets.limited_test(files.test.labels, args.limit_test, args.seed)),
        files.skipped,
        torch.Generator().manual_seed(args.seed),
        batches,
        in_order(files.test),
    )


def _load_files(args: Namespace) -> FileData:
    if args.batch_size % processes.world():
        raise UserError(
            f"--batch_size {args.batch_size}: cannot be cut into equal pieces for {processes.world()} processes"
        )
    data = clothing.load(Path(args.data_path), args.on_bad_image, args.workers)
    if args.noise_file:
        labels = datasets.labels_of(args.noise_file, data.positions, data.listed, data.num_classes)
        data = data._replace(train=data.train._replace(labels=labels))
    kept = datasets.limited(np.arange(len(data.positions)), args.limit_train, args.seed)
    size = clothing.subset_size(data.train.labels[kept], args.num_batches * args.batch_size, args.num_class)
    if size < 2 * args.batch_size:
        raise UserError(
            f"--batch_size {args.batch_size}: the class-balanced subset has only {size} images, and both sides of the split need "
            "a batch; use a smaller batch, more --num_batches or more images"
        )
    return data


def drops_last(args: Namespace) -> bool:
    """Whether a smaller last batch of training images is left out: it cannot be cut into equal pieces for processes."""
    return args.fidelity != "released" or processes.world() > 1


# the method -----------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What every pass over the training images shares."""

    args: Namespace
    device: Device
    run: Run
    data: Data
    draws: np.random.Generator  # subsets, mixture weights, starts of the GMM
    masks: torch.Generator  # masks and mixing partners, on the device, alike in all processes

    def subset(self, num_samples: int) -> np.ndarray:
        """A fresh class-balanced subset of the training images: positions, int64 [n]."""
        rng = random.Random(int(self.draws.integers(2**63)))
        return clothing.balanced_subset(self.data.split.labels, num_samples, self.args.num_class, rng)

    def labels(self, positions: np.ndarray) -> Tensor:
        """Their noisy labels, int [n], on the device."""
        return torch.from_numpy(self.data.split.labels[positions]).to(self.device.device)


class Division(NamedTuple):
    """What one network's losses say about a class-balanced subset."""

    positions: Tensor  # int64 [n]: of the images, on the CPU
    clean: Tensor  # float64 [n]


def warm_up_epoch(network: nn.Module, optimizer: SGD, name: str, s: Setting) -> float:
    """Cross-entropy with a penalty on confident predictions, on a class-balanced subset twice as large [section 9]: mean loss."""
    args = s.args
    positions = s.subset(2 * args.num_batches * args.batch_size)
    batches = s.run.progress(s.data.training(positions, 2 * args.batch_size, 1, args), name)
    labels = s.labels(positions)
    losses = warm_up(network, optimizer, batches, labels, s.device, penalise_confidence=True, clip=None)
    return float(losses.mean())


def warm_up_steps(s: Setting) -> int:
    """The optimiser steps of the warm-up of a network."""
    labels, batch_size = s.data.split.labels, 2 * s.args.batch_size
    batches = clothing.subset_size(labels, s.args.num_batches * batch_size, s.args.num_class) / batch_size
    return math.floor(batches) if drops_last(s.args) else math.ceil(batches)


def label_quality(network: nn.Module, name: str, s: Setting) -> Division:
    """The clean probabilities of a fresh class-balanced subset by one network's losses [sections 6 and 9].

    They stay with the images that they belong to. The release pairs them with the first images of the list; and where classes are
    short of images, it leaves the rest of the losses at zero [row 8 of the table of differences].
    """
    args = s.args
    asked = args.num_batches * args.batch_size
    positions = s.subset(asked)
    plain = s.run.progress(s.data.plain(positions, args), name, training=False)
    losses = sample_losses(network, plain, s.labels(positions), len(positions), s.device)
    if args.fidelity == "released":
        asked = min(asked, len(s.data.split.labels))
        losses = torch.cat([losses, losses.new_zeros(asked - len(losses))])
        positions = np.arange(asked)
    clean = clean_probability(normalised(losses), int(s.draws.integers(2**31)))
    return Division(torch.from_numpy(positions), clean.cpu())


def two_samples(views: tuple[Tensor, ...], clean: Tensor) -> Samples:
    """The two weak views are trained on, and make targets, maps and masked images [section 9]."""
    return Samples(views, views, clean)


def co_divide(
    networks: list[nn.Module], parallel: nn.Module, optimizer: SGD, peers: Division, name: str, s: Setting
) -> tuple[list[float], Selected]:
    """One epoch of the first network on the division by the second's losses [section 9]: mean losses [5], labelled images."""
    args, device = s.args, s.device.device
    positions, clean = peers.positions.numpy(), peers.clean.to(device)
    selected = divide(peers.clean, args.p_threshold, args.batch_size)
    numbers = [side.nonzero()[:, 0] for side in (selected, ~selected)]
    labelled, unlabelled = (
        Part(s.data.training(positions[own.numpy()], args.batch_size, 2, args), own.to(device))
        for own in numbers
    )
    rule = mask_rule(args)._replace(as_released=args.fidelity == "released")
    masks = Masks(draw_clothing_masks, mask_clothing, rule, s.masks)
    step = Step(
        two_samples,
        masks=masks if args.masking == "adversarial" else None,
        draw_share=lambda: s.draws.beta(args.alpha, args.alpha),
        draw_permutation=lambda rows: torch.randperm(rows, generator=s.masks, device=device),
        weight=lambda _: 0.0,
        temperature=args.T,
        reconstruction_weight=args.recon_weight,
        device=s.device,
        forward_unlabelled=False,
    )
    losses = train_divided(
        *networks,
        optimizer,
        s.run.progress(labelled, name),
        unlabelled.endless(),
        step,
        labels=s.labels(positions),
        clean=clean,
        parallel=parallel,
    )
    return losses.mean(dim=0).tolist(), Selected(selected, s.labels(positions).cpu(), None)


def scores(networks: list[nn.Module], split: Labelled, name: str, s: Setting) -> Tensor:
    """The scores of each network, [networks, N, K]."""
    batches = s.run.progress(split.batches, name, training=False)
    return network_scores(networks, batches, len(split.labels), s.args.num_class, s.device)


# the script -----------------------------------------------------------------------------------------------------------


@cli.script
def main(argv=None) -> None:
    """Train SANM on Clothing1M and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, args.gpuid, several=True, fidelity=args.fidelity)
    data = load(args, device)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    nets = [clothing_network(args.network, args.num_class, args.pretrained) for _ in range(2)]
    run = Run(args, device, paper="sanm", method=method(args), name=directory_name(args), cell=cell(args))
    run.save_labels(data.index, None, data.split.labels, args.num_class)
    run.save_skipped(data.skipped)

    nets = [device.prepare(net, args.compile) for net in nets]
    if args.sync_bn:
        nets = [processes.synchronised(net) for net in nets]
    # the warm-up has no use for the decoder
    parallel = [processes.parallel(net, device.device, unused_parameters=True) for net in nets]
    optimizers = [SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=1e-3) for net in nets]
    draws, masks = np.random.default_rng(args.seed), device.generator(args.seed)
    memory = {"divisions": [None, None], "best": [{"accuracy": -1.0, "weights": {}} for _ in nets]}
    memory["streaks"] = selection_report.no_streaks(2, args.num_class)
    state = {"nets": nets, "optimizers": optimizers, "draws": draws, "masks": masks, "memory": memory}
    run.resume({**state, "images": data.generator})
    s = Setting(args, device, run, data, draws, masks)
    selection_report.note_short_warm_up(warm_up_steps(s), f"one epoch, --num_batches {args.num_batches}")

    for number in run.epochs(args.num_epochs + 1):
        epoch = number - 1  # the release counts from 0
        report, parts, chosen = {}, [None] * 5, []
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(epoch, args.lr, args.lr_drop)
        if epoch == 0:
            losses = [
                warm_up_epoch(p, o, "epoch 0 warm-up", s) for p, o in zip(parallel, optimizers, strict=True)
            ]
            report |= {"loss": sum(losses) / 2, "net1_selected": None, "net2_selected": None}
        else:
            # both divisions come from the end of the epoch before
            divisions = [Division(*kept) for kept in memory["divisions"]]
            trained = [
                co_divide(
                    [nets[i], nets[1 - i]], parallel[i], optimizers[i], divisions[1 - i], f"epoch {epoch}", s
                )
                for i in (0, 1)
            ]
            parts = [sum(values) / 2 for values in zip(*(losses for losses, _ in trained), strict=True)]
            # net2's losses select what net1 is trained on
            chosen = [trained[1][1], trained[0][1]]
            first, second = (int(own.chosen.sum()) for own in chosen)
            report |= {"loss": parts[0], "net1_selected": first, "net2_selected": second}
            memory["streaks"] = selection_report.follow(memory["streaks"], chosen, "more --num_batches")
        for net in nets:
            processes.share_buffers(net)

        own = scores(nets, data.validation, f"epoch {epoch} validation", s)
        for i, best in enumerate(memory["best"]):
            report[f"net{i + 1}_validation"] = accuracy(own[i], data.validation.labels)
            if report[f"net{i + 1}_validation"] > best["accuracy"]:
                best["accuracy"], best["weights"] = report[f"net{i + 1}_validation"], copy_of(nets[i])
        if epoch < args.num_epochs:
            memory["divisions"] = [list(label_quality(net, f"epoch {epoch} losses", s)) for net in nets]
        summed = scores(nets, data.test, f"epoch {epoch} test", s).sum(dim=0)
        report["test_accuracy"] = accuracy(summed, data.test.labels)
        names = ("labelled_loss", "prior_loss", "reconstruction_loss")
        report |= dict(zip(names, (parts[1], parts[3], parts[4]), strict=True))
        report |= selection_report.columns(chosen)
        run.log(number, **report, lr=optimizers[0].param_groups[0]["lr"])

    run.finish(**({} if run.is_finished() else reported(nets, memory["best"], s)))


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights on the CPU."""
    return {name: value.to("cpu", copy=True) for name, value in network.state_dict().items()}


def reported(nets: list[nn.Module], best: list[dict], s: Setting) -> dict[str, float]:
    """The test accuracy that is reported: of both networks' sum, each with the weights that are best on validation."""
    for i, net in enumerate(nets):
        net.load_state_dict(best[i]["weights"])
        s.run.save_weights(f"net{i + 1}_best.pt", best[i]["weights"])
    summed = scores(nets, s.data.test, "test of the best weights", s).sum(dim=0)
    validation = {f"best_validation_net{i + 1}": kept["accuracy"] for i, kept in enumerate(best)}

    def full_test() -> dict[str, float]:
        summed = scores(nets, s.data.whole_test, "full test of the best weights", s).sum(dim=0)
        labels = s.data.whole_test.labels
        return {"full_test": accuracy(summed, labels), "full_test_images": len(labels)}

    reported = {"at_best_validation": accuracy(summed, s.data.test.labels), **validation}
    return reported | s.run.full_test(full_test)


def method(args: Namespace) -> str:
    """What a result row calls the method."""
    return "SANM(DivideMix)" if args.masking == "adversarial" else "DivideMix"


def directory_name(args: Namespace) -> str:
    """The run directory's name: data and seed, then whatever differs from the defaults."""
    always = [*(["fidelity"] if args.fidelity == "released" else []), "seed"]
    return f"{NAME}-{run_name(args, vars(parse_args(['--fidelity', args.fidelity])), always)}"


def cell(args: Namespace) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    defaults = parse_args([])
    bounds = ("num_epochs", "num_batches", "image_size")
    whole = args.network == defaults.network and all(
        getattr(args, bound) >= getattr(defaults, bound) for bound in bounds
    )
    return {
        "dataset": NAME,
        "noise_type": Path(args.noise_file).name if args.noise_file else "real",
        "noise_rate": None,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": "paper" if whole else "short",
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
