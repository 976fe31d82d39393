"""Stochastic Feature Averaging on mini-WebVision (IJCAI 2023), tested on WebVision and on ILSVRC12.

    python sfa/Train_webvision.py --data_path ./webvision/                                 # one card, or a network on each of two
    torchrun --nproc_per_node=4 sfa/Train_webvision.py --data_path ./webvision/            # both networks on all of four

The labels are those of the web search, as they are. The sections in brackets are those of the method's description in
sfa/README.md; this script's is Sec. 7.
"""

import io
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets, noise
from common.datasets import FileData, FileSplit
from common.datasets.image_cache import ImageCache, open_caches
from common.datasets.webvision import NAME
from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.augment import resize_and_center_crop, resize_random_resized_crop_and_flip
from common.gpu.device import Device
from common.gpu.loader import FileBatches, Labelled, Part
from common.runs import checkpoint, cli, selection_report
from common.runs.cli import UserError
from common.runs.run import Run, run_name
from common.runs.selection_report import Selected
from sfa.evaluation import accuracies, top_k_accuracy
from sfa.flags import add_averaging_flags
from sfa.networks import webvision_network
from sfa.selection import (
    Moments,
    Selection,
    confidence_threshold,
    incoming_moments,
    stochastic_feature_averaging,
)
from sfa.training import features_and_confidence, summed_logits, train_semi, warm_up

PRESETS = Path(__file__).with_name("presets.toml")
WARM_UP = 1  # epochs
CACHE_SIZES = (320, 256)


def make_parser() -> cli.Parser:
    """The release's flags and defaults, flags of our own, and the flags all scripts share."""
    parser = cli.Parser(prog="Train_webvision.py", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        default="./webvision/",
        metavar="DIR",
        type=cli.place,
        help="info/, val_images_256/ and the training images of WebVision 1.0 are in it",
    )
    data.add_argument(
        "--imagenet",
        metavar="DIR|none",
        type=cli.place,
        help="val/ of ILSVRC12 is in it; none: test on WebVision alone; by default DATA_PATH/imagenet",
    )
    data.add_argument("--num_class", type=cli.count, default=50, help="train on the first so many classes")
    data.add_argument(
        "--imb_type",
        choices=["exp", "step"],
        default="exp",
        help="shape of the long tail, if one is asked for",
    )
    data.add_argument(
        "--imb_factor",
        type=cli.positive,
        default=1,
        help="below 1: make the training set long-tailed, smallest class / largest class; 1: all images",
    )
    data.add_argument(
        "--image_size",
        type=cli.count,
        default=299,
        help="pixels of both sides of a crop; images are resized to 320/299 of it (320) before",
    )
    cli.add_image_file_flags(data, workers=8, how=" webvision --size 320 (or 256)")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--network",
        choices=["inception_resnet_v2", "resnet50", "resnet18"],
        default="inception_resnet_v2",
        help="the protocol's, or a lighter one of torchvision; from random weights",
    )
    network.add_argument(
        "--feat_size", type=cli.count, default=1536, help="ignored: the network decides (1536; 2048; 512)"
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch_size",
        type=cli.count,
        default=32,
        help="labelled = unlabelled batch, over all processes; the warm-up uses twice that. A smaller last batch is left out, so "
        "that any number of processes trains alike; under --fidelity released one process keeps it",
    )
    training.add_argument(
        "--lr", "--learning_rate", type=cli.positive, default=0.01, help="initial learning rate"
    )
    training.add_argument(
        "--lr_drop", type=cli.count, default=50, help="the learning rate is a tenth from this epoch on"
    )
    training.add_argument("--num_epochs", type=cli.count, default=100, help="epochs, one of warm-up included")
    training.add_argument(
        "--alpha", type=cli.positive, default=0.5, help="parameter of the Beta distribution of the mixture"
    )
    training.add_argument(
        "--lambda_u", type=cli.non_negative, default=0, help="ignored, as in the release: no unlabelled loss"
    )
    training.add_argument("--T", type=cli.positive, default=0.5, help="sharpening temperature")
    training.add_argument(
        "--reset_momentum",
        choices=["yes", "no"],
        help="whether momentum starts from zero at every epoch; by default no, under --fidelity released yes",
    )
    training.add_argument(
        "--gpuid1", type=cli.count_or_zero, default=0, help="CUDA device of the first network"
    )
    training.add_argument(
        "--gpuid2", type=cli.count_or_zero, default=1, help="CUDA device of the second, if it is there"
    )
    training.add_argument(
        "--parallel",
        choices=["none", "networks", "data"],
        help="none: one process; networks: two, each trains a network; data: those of torchrun, each trains both on its piece of "
        "every batch. By default data under torchrun, networks where both cards are there, else none",
    )

    selection = parser.add_argument_group("stochastic feature averaging")
    add_averaging_flags(selection, beta=0.9, min_draw_count=0)
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    if not 2 <= args.num_class <= 1000:
        parser.error(
            f"argument --num_class: WebVision has 1000 classes, 2 at least are needed, got {args.num_class}"
        )
    if args.imb_factor > 1:
        parser.error(f"argument --imb_factor: must be at most 1, got {args.imb_factor}")
    # that leaves maps of 2 x 2: of one image with a map of one pixel batch norms have no statistics
    smallest = 107 if args.network == "inception_resnet_v2" else 33
    if args.image_size < smallest:
        parser.error(
            f"argument --image_size: must be at least {smallest} for {args.network}, got {args.image_size}"
        )
    released = args.fidelity == "released"
    args.ema_mode = args.ema_mode or ("released" if released else "persist")
    args.reset_momentum = args.reset_momentum or ("yes" if released else "no")
    args.parallel = args.parallel or _usual_parallel(args)
    if args.parallel == "data" and not processes.launched():
        parser.error("argument --parallel: data needs several processes: start the script with torchrun")
    if args.parallel == "none" and processes.launched():
        parser.error(
            "argument --parallel: none is one process: start the script with python, not with torchrun"
        )
    if args.parallel == "networks" and processes.planned() not in (1, 2):
        parser.error(
            f"argument --parallel: networks needs two processes, torchrun started {processes.planned()}"
        )
    on_cards = args.device == "cuda" or (args.device == "auto" and torch.cuda.device_count() > 0)
    if args.parallel == "networks" and not processes.launched() and on_cards and not _both_cards(args):
        parser.error(
            f"argument --parallel: networks needs two CUDA devices, {args.gpuid1} and {args.gpuid2} by --gpuid1 and --gpuid2 "
            f"(found {torch.cuda.device_count()})"
        )
    return args


def _usual_parallel(args: Namespace) -> str:
    if processes.launched():
        return "data"
    return "networks" if args.device != "cpu" and _both_cards(args) else "none"


def _both_cards(args: Namespace) -> bool:
    return args.gpuid1 != args.gpuid2 and max(args.gpuid1, args.gpuid2) < torch.cuda.device_count()


def start_both(args: Namespace, argv: list[str]) -> None:
    """Become two processes with a network each, on both cards: this command under torchrun."""
    cards = [str(i) for i in (args.gpuid1, args.gpuid2)]
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # what is hidden stays hidden
        visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        cards = [visible[i] for i in (args.gpuid1, args.gpuid2) if i < len(visible)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    sys.stdout.flush()
    command = [*launcher, str(Path(__file__).resolve()), *argv]
    os.execve(sys.executable, command, {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(cards)})


# data -----------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What a run trains and tests on."""

    index: np.ndarray  # int64 [N]: where the training images stand in the list of these classes, ascending
    split: FileSplit  # the training images with the labels of the search
    cache: ImageCache | None  # of `split`
    tests: dict[str, Labelled]  # test, and imagenet if it is there; all images, or those of --limit_test
    skipped: tuple[tuple[str, int, str], ...]  # images left out: path, position in its list, reason
    batches: Callable  # (split, cache, transform, batch_size, **training) -> FileBatches
    whole_tests: dict[str, Labelled] | None = None  # all images

    def training(
        self,
        positions: np.ndarray,
        batch_size: int,
        views: int,
        generator: torch.Generator,
        args: Namespace,
    ) -> Part | None:
        """Shuffled batches of augmented training images at `positions` [n], whose index counts within the training set.

        Of batch_size or, where that is more, of all that there are; None without any.
        """
        world = processes.world()
        size = min(batch_size, len(positions) // world * world)
        if size == 0:
            return None
        transform = resize_random_resized_crop_and_flip(before_crop(args), args.image_size)
        options = {"shuffle": True, "drop_last": drops_last(args), "generator": generator, "views": views}
        batches = self.batches(*self._only(positions), transform, size, **options)
        return Part(batches, torch.from_numpy(positions).to(batches.device))

    def plain(self, args: Namespace) -> FileBatches:
        """All training images as the test has them, in order."""
        return self.batches(self.split, self.cache, test_transform(args), 8 * args.batch_size)

    def _only(self, positions: np.ndarray) -> tuple[FileSplit, ImageCache | None]:
        return self.split.only(positions), None if self.cache is None else self.cache.only(positions)


def drops_last(args: Namespace) -> bool:
    """Whether a smaller last batch of training images is left out: it cannot be cut into equal pieces for processes."""
    return args.fidelity != "released" or processes.world() > 1


def before_crop(args: Namespace) -> int:
    """Pixels of the shorter side that an image is resized to: 320 for a crop of 299."""
    return round(args.image_size * 320 / 299)


def test_transform(args: Namespace) -> Callable:
    """Resize and centre crop."""
    return resize_and_center_crop(before_crop(args), args.image_size)


def load(args: Namespace, device: Device) -> Data:
    """The training images of the first classes, and both test sets [Sec. 7]. UserError: data or flags do not fit."""
    files = processes.from_first(lambda: _load_files(args))
    kept = _kept(args, files)
    caches = open_caches(args.image_cache, files, CACHE_SIZES) if args.image_cache else {}
    loading = {"mean": files.mean, "std": files.std, "device": device.device, "workers": args.workers}

    def batches(split: FileSplit, cache: ImageCache | None, transform, size: int, **training) -> FileBatches:
        share = {"world": processes.world(), "rank": processes.rank() if processes.world() > 1 else 0}
        return FileBatches(split, size, transform, cache=cache, **loading, **share, **training)

    def in_order(split: FileSplit, limit: int | None = None) -> Labelled:
        keep = datasets.limited_test(split.labels, limit, args.seed)
        cache, split = caches[split.part].only(keep) if caches else None, split.only(keep)
        whole = batches(split, cache, test_transform(args), 8 * args.batch_size)
        return Labelled(whole, torch.from_numpy(split.labels).to(device.device))

    splits = [split for split in (files.test, files.imagenet) if split is not None]
    tests = {split.part: in_order(split, args.limit_test) for split in splits}
    whole_tests = {split.part: in_order(split) for split in splits}
    train_cache = caches["train"].only(kept) if caches else None
    train = (files.positions[kept], files.train.only(kept), train_cache)
    return Data(*train, tests, files.skipped, batches, whole_tests)


def _load_files(args: Namespace) -> FileData:
    if args.parallel == "data" and args.batch_size % processes.world():
        raise UserError(
            f"--batch_size {args.batch_size}: cannot be cut into equal pieces for {processes.world()} processes"
        )
    data = datasets.load_webvision(
        args.data_path, args.num_class, args.on_bad_image, args.workers, args.imagenet
    )
    if args.noise_file:
        labels = datasets.labels_of(args.noise_file, data.positions, data.listed, data.num_classes)
        data = data._replace(train=data.train._replace(labels=labels))
    if len(_kept(args, data)) < processes.planned():
        raise UserError(
            f"{len(_kept(args, data))} training images are too few for {processes.planned()} processes"
        )
    return data


def _kept(args: Namespace, data: FileData) -> np.ndarray:
    """Which of the images are trained on: positions, ascending; fewer than all in a long tail or by --limit_train."""
    kept = np.arange(len(data.positions))
    if args.imb_factor < 1:
        labels = data.train.labels
        counts = np.bincount(labels, minlength=args.num_class)
        budget = noise.web_class_budget(counts, args.imb_type, args.imb_factor)
        kept = np.sort(noise.long_tailed(labels, budget, np.random.RandomState(args.seed)))
    return datasets.limited(kept, args.limit_train, args.seed)


# the method -----------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """A network with all that its training draws and remembers, so that either process can go on with it."""

    network: nn.Module
    parallel: nn.Module  # around it, averages gradients over processes
    optimizer: SGD
    images: torch.Generator  # orders, crops and flips; on the CPU
    partners: torch.Generator  # of the mixture; on the device
    draws: np.random.Generator  # centroids and mixture weights

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return {name: value for name, value in self._asdict().items() if name != "parallel"}


class Setting(NamedTuple):
    """What every pass over the training images shares."""

    args: Namespace
    device: Device
    run: Run
    data: Data
    labels: Tensor  # observed, int [N]


def make_learner(number: int, args: Namespace, device: Device) -> Learner:
    """Network 0 or 1 with its optimiser; its draws are its own, so that it makes no difference which process trains it."""
    network = device.prepare(webvision_network(args.network, args.num_class), args.compile)
    parallel = network
    if args.parallel == "data":
        network = processes.synchronised(network)
        parallel = processes.parallel(network, device.device)
    optimizer = SGD(network.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    images, partners, draws = np.random.SeedSequence((args.seed, number)).spawn(3)
    seeds = [int(sequence.generate_state(1, np.uint64)[0] >> 1) for sequence in (images, partners)]
    return Learner(
        network,
        parallel,
        optimizer,
        torch.Generator().manual_seed(seeds[0]),
        device.generator(seeds[1]),
        np.random.default_rng(draws),
    )


def warm_up_epoch(learner: Learner, name: str, s: Setting) -> Tensor:
    """All images with their observed labels, in batches twice as large: each step's loss."""
    everything = np.arange(len(s.labels))
    batches = s.data.training(everything, 2 * s.args.batch_size, 1, learner.images, s.args)
    counts = torch.bincount(s.labels, minlength=s.args.num_class)
    return warm_up(
        learner.parallel, learner.optimizer, s.run.progress(batches, name), s.labels, counts, s.device
    )


def warm_up_steps(s: Setting) -> int:
    """The optimiser steps of the warm-up of a network."""
    batches = len(s.labels) / (2 * s.args.batch_size)
    return WARM_UP * max(1, math.floor(batches) if drops_last(s.args) else math.ceil(batches))


def co_divide(learner: Learner, peer: nn.Module, clean: Tensor, name: str, s: Setting) -> Tensor:
    """One epoch of a network on its peer's split, the peer as it was at the end of the epoch before: each step's loss.

    clean [N]: by the peer. Only labelled rows are mixed and trained on; unlabelled ones are partners.
    """
    args = s.args
    selected = clean > args.p_threshold
    sides = [side.nonzero()[:, 0].cpu().numpy() for side in (selected, ~selected)]
    labelled, unlabelled = (s.data.training(side, args.batch_size, 2, learner.images, args) for side in sides)
    if labelled is None:
        print(f"warning: {name}: no sample selected, one network is not trained", file=sys.stderr)
        return torch.empty(0, device=s.device.device)
    losses = train_semi(
        learner.network,
        peer,
        learner.optimizer,
        s.run.progress(labelled, name),
        None if unlabelled is None else unlabelled.endless(),
        labels=s.labels,
        clean=clean,
        class_counts=torch.bincount(s.labels[selected], minlength=args.num_class),
        weight=lambda _: 0.0,
        draw_lam=lambda: learner.draws.beta(args.alpha, args.alpha),
        draw_permutation=lambda rows: torch.randperm(
            rows, generator=learner.partners, device=s.device.device
        ),
        temperature=args.T,
        device=s.device,
        forward_unlabelled=False,
        parallel=learner.parallel,
    )
    return losses[:, 0]


def train_both(learners: list[Learner], clean: list[Tensor | None], epoch: int, s: Setting) -> Tensor:
    """One epoch of both networks, side by side or one after the other, with the same outcome: the losses of all steps."""
    peers = [deepcopy(learner.network) for learner in learners]

    def train(i: int) -> Tensor:
        if s.args.reset_momentum == "yes":
            learners[i].optimizer.state.clear()
        if epoch <= WARM_UP:
            return warm_up_epoch(learners[i], f"epoch {epoch} warm-up of network {i + 1}", s)
        split = clean[1 - i].to(s.device.device)
        return co_divide(learners[i], peers[1 - i], split, f"epoch {epoch} training of network {i + 1}", s)

    if s.args.parallel != "networks":
        return torch.cat([train(i) for i in (0, 1)])
    before = s.run.images
    with processes.alone():
        own = train(processes.rank())
    trained = torch.tensor(s.run.images - before, device=s.device.device)
    s.run.images = before + int(processes.total(trained))
    return share(learners, own)


def packed(learner: Learner, losses: Tensor) -> bytes:
    """A learner and the losses of its last epoch, to be sent to another process."""
    content = io.BytesIO()
    checkpoint.write({"state": checkpoint.collect(learner.state()), "losses": losses}, content)
    return content.getvalue()


def share(learners: list[Learner], losses: Tensor) -> Tensor:
    """Bring both learners up to date in both processes, each of which trained the one of its number: the losses of both."""
    everyone = []
    for i, learner in enumerate(learners):
        content = processes.from_first(partial(packed, learner, losses), source=i)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if processes.rank() != i:
            checkpoint.restore(learner.state(), found["state"])
        everyone.append(found["losses"])
    return torch.cat(everyone)


def select(learner: Learner, moments: Moments | None, plain: FileBatches, name: str, s: Setting) -> Selection:
    """Clean samples in the eyes of one network [Sec. 6]: the same in all processes, on the CPU.

    moments: to go on from, None at the first selections.
    """
    args, epoch = s.args, len(s.run.rows) + 1
    ordered = s.run.progress(plain, name, training=False)
    features, confidence = features_and_confidence(learner.network, ordered, s.labels, s.device)
    normals = learner.draws.normal(size=(args.sample_rate, args.num_class, features.shape[1]))
    # the release has 0.02 whatever the number of classes
    classes = 50 if args.fidelity == "released" else args.num_class

    def found() -> Selection:
        selection = stochastic_feature_averaging(
            features,
            s.labels,
            confidence,
            moments,
            normals=torch.from_numpy(normals).to(s.device.device),
            threshold=confidence_threshold(classes, args.phi, epoch),
            beta=args.beta,
            min_draw_count=args.min_draw_count,
            p_threshold=args.p_threshold,
        )
        *tensors, new_moments = selection
        return Selection(*(own.cpu() for own in tensors), Moments(*(own.cpu() for own in new_moments)))

    return processes.from_first(found)  # sums on a card come out in another order each time


def test(learners: list[Learner], tests: dict[str, Labelled], name: str, s: Setting) -> dict[str, float]:
    """Top-1 and top-5 accuracy on both test sets, by the summed logits of both heads of both networks [Sec. 8]."""
    report, counts = {}, np.bincount(s.data.split.labels, minlength=s.args.num_class)
    networks = [learner.network for learner in learners]
    for part, (batches, labels) in tests.items():
        seen = s.run.progress(batches, f"{name} {part}", training=False)
        logits = summed_logits(networks, seen, len(labels), s.args.num_class, s.device)
        own = accuracies(logits.argmax(dim=1).cpu().numpy(), labels.cpu().numpy(), counts)
        prefix = "" if part == "test" else f"{part}_"
        report[f"{prefix or 'test_'}accuracy"] = own.pop("test_accuracy")
        report[f"{prefix}top5_accuracy"] = top_k_accuracy(logits, labels, min(5, s.args.num_class))
        if part == "test":
            shots_and_classes = own
    return report | shots_and_classes


# the script -----------------------------------------------------------------------------------------------------------


@cli.script
def main(argv=None) -> None:
    """Train SFA on mini-WebVision and write its run directory."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.parallel == "networks" and not processes.launched():
        with redirect_stdout(None):  # what is wrong with the data is told before, in one line
            load(args, Device(torch.device("cpu"), "fp32", ""))
        start_both(args, argv)
    device = gpu.pick(args.device, args.precision, args.gpuid1, several=True, fidelity=args.fidelity)
    data = load(args, device)
    run = Run(args, device, paper="sfa", method="SFA", name=directory_name(args), cell=cell(args))
    run.save_labels(data.index, None, data.split.labels, args.num_class)
    run.save_skipped(data.skipped)

    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    learners = [make_learner(i, args, device) for i in (0, 1)]
    plain, labels = data.plain(args), torch.from_numpy(data.split.labels).to(device.device)
    memory = {"moments": [None, None], "clean": [None, None], "centroids": []}
    memory["streaks"] = selection_report.no_streaks(2, args.num_class)
    run.resume({"learners": [learner.state() for learner in learners], "memory": memory})
    s = Setting(args, device, run, data, labels)
    if args.num_epochs > WARM_UP:
        selection_report.note_short_warm_up(warm_up_steps(s), f"one epoch, --batch_size {args.batch_size}")

    for epoch in run.epochs(args.num_epochs):
        for learner in learners:
            learner.optimizer.param_groups[0]["lr"] = args.lr if epoch < args.lr_drop else args.lr / 10
        losses = train_both(learners, memory["clean"], epoch, s)
        report = test(learners, data.tests, f"epoch {epoch}", s)
        # at the end of the epoch, for the next one; until the first after the warm-up the moments begin anew
        moments = [None if epoch <= WARM_UP + 1 else Moments(*kept) for kept in memory["moments"]]
        selections = [
            select(
                learner,
                incoming_moments(known, args.ema_mode, device.device),
                plain,
                f"epoch {epoch} selection of network {i}",
                s,
            )
            for i, (learner, known) in enumerate(zip(learners, moments, strict=True), start=1)
        ]
        memory["moments"] = [list(found.moments) for found in selections]
        memory["clean"] = [found.clean for found in selections]
        memory["centroids"].append(selections[0].centroids.mean(dim=0).half())  # to look at
        for i, found in enumerate(selections, start=1):
            report[f"net{i}_selected"] = int(found.selected.sum())
            report[f"net{i}_drawn_classes"] = int(found.drawn.sum())
        chosen = [Selected(found.selected, labels.cpu(), None) for found in selections]
        report |= selection_report.columns(chosen)
        memory["streaks"] = selection_report.follow(memory["streaks"], chosen, "a lower --p_threshold")
        classes = {name: report.pop(name) for name in list(report) if name.startswith("class_")}
        loss = float(losses.mean()) if len(losses) else None
        run.log(epoch, loss=loss, **report, lr=learners[0].optimizer.param_groups[0]["lr"], **classes)

    first, second = (probability.numpy() for probability in memory["clean"])
    run.save_arrays("clean_probability", net1=first, net2=second, observed=data.split.labels)
    run.save_arrays("centroids", net1=torch.stack(memory["centroids"]).numpy())
    full = run.full_test(lambda: full_test(learners, s))
    run.finish(**reported(run.rows), **full)


def full_test(learners: list[Learner], s: Setting) -> dict[str, float]:
    """Top-1 accuracy on all images of both test sets, for --full_test_at_end."""
    report = test(learners, s.data.whole_tests, "full", s)
    names = {"test_accuracy": "full_test", "imagenet_accuracy": "full_test_imagenet_accuracy"}
    images = {"full_test_images": len(s.data.whole_tests["test"].labels)}
    return {new: report[old] for old, new in names.items() if old in report} | images


def reported(rows: list[dict]) -> dict[str, float]:
    """Of the accuracies that are not the main one the last and the best."""
    more = {}
    for name in ("top5_accuracy", "imagenet_accuracy", "imagenet_top5_accuracy"):
        if name in rows[0]:
            values = [row[name] for row in rows]
            more |= {f"last_{name}": values[-1], f"best_{name}": max(values)}
    shots = ("many_accuracy", "medium_accuracy", "few_accuracy")
    return more | {f"last_{name}": rows[-1][name] for name in (*shots, "net1_selected", "net2_selected")}


def directory_name(args: Namespace) -> str:
    """The run directory's name: data and seed, then whatever differs from the defaults."""
    always = [*(["fidelity"] if args.fidelity == "released" else []), "seed"]
    return f"{NAME}-{run_name(args, vars(parse_args(['--fidelity', args.fidelity])), always)}"


def cell(args: Namespace) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    usual = parse_args([])
    same = ("network", "num_class", "imb_factor")
    whole = all(getattr(args, flag) == getattr(usual, flag) for flag in same)
    whole = whole and args.num_epochs >= usual.num_epochs and args.image_size >= usual.image_size
    return {
        "dataset": NAME,
        "noise_type": Path(args.noise_file).name if args.noise_file else "real",
        "noise_rate": None,
        "imb_factor": args.imb_factor if args.imb_factor < 1 else None,
        "ood_ratio": None,
        "profile": "paper" if whole else "short",
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
