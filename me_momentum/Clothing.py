"""Me-Momentum (ICCV 2021) on Clothing1M: confident examples by class, each class judged by the checkpoint that knows it best.

    python me_momentum/Clothing.py                                     # Clothing1M under data/Clothing1M_Official/
    torchrun --nproc_per_node=8 me_momentum/Clothing.py                # the same on eight cards

The labels of the clean validation images choose the checkpoints and weigh the loss. The sections in brackets are those of the
method's description in me_momentum/README.md.
"""

import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from functools import partial
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
from common.datasets.clothing1m import CLASSES, NAME, folder_of_lists
from common.datasets.file_lists import missing_files, without_bad_images
from common.datasets.image_cache import ImageCache, open_caches
from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.augment import resize_crop_and_flip, resize_to_square
from common.gpu.device import Device
from common.gpu.loader import FileBatches, Labelled
from common.runs import cli, selection_report
from common.runs.cli import UserError
from common.runs.run import Run, run_name
from common.runs.selection_report import Selected
from me_momentum.ClothingData import DATA_ROOT, INDEX, LISTS, read_index
from me_momentum.confident import confident_examples
from me_momentum.losses import prior_weights, weighted_cross_entropy
from me_momentum.networks import clothing_network
from me_momentum.per_class import (
    ClassModels,
    Scores,
    class_score,
    in_use,
    model_of_class,
    no_models,
    samples_by_model,
    scores,
    update,
)
from me_momentum.training import predict
from me_momentum.validation import accuracy, batch_mean_accuracy

PRESETS = Path(__file__).with_name("presets.toml")
MOMENTUM = 0.9
MILESTONES = (10, 20)  # epochs of an outer loop after which the learning rate is a tenth of what it was


def make_parser() -> cli.Parser:
    """The release's flags and defaults, flags of our own, and the flags all scripts share."""
    parser = cli.Parser(prog="Clothing.py", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_root",
        default=DATA_ROOT,
        metavar="DIR",
        type=cli.place,
        help=f"the lists of Clothing1M are in it or in its annotations/; without lists its {INDEX} is read",
    )
    data.add_argument(
        "--num_classes", type=cli.count, default=len(CLASSES), help="of Clothing1M; no other number fits"
    )
    data.add_argument(
        "--image_size",
        type=cli.count,
        default=256,
        help="pixels of both sides; training crops pad an eighth of it (32)",
    )
    cli.add_image_file_flags(data, workers=8)

    network = parser.add_argument_group("network")
    network.add_argument(
        "--network", choices=["resnet50", "resnet18"], default="resnet50", help="torchvision's"
    )
    network.add_argument(
        "--pretrained",
        metavar="PATH|imagenet|none",
        type=cli.place,
        help="initial weights; by default imagenet",
    )
    network.add_argument(
        "--pretrain",
        action="store_false",
        help="the release's inverted switch: giving it turns ImageNet weights off (%(default)s without it)",
    )
    network.add_argument(
        "--no_pretrain",
        action="store_false",
        dest="pretrain",
        help="the same by a clear name (%(default)s without it)",
    )

    method = parser.add_argument_group("Me-Momentum")
    method.add_argument(
        "--selection",
        choices=["confident", "none"],
        default="confident",
        help="none: no confident examples, the same weighted cross-entropy on all noisy images for one outer loop",
    )
    method.add_argument(
        "--beta",
        type=cli.fraction,
        default=0.45,
        help="weight of recall, against precision, in the score of a class",
    )
    method.add_argument("--n_epoch", type=cli.count, default=5, help="epochs of an inner loop")
    method.add_argument(
        "--max_inner_loop", type=cli.count, default=6, help="inner loops; confident examples between them"
    )
    method.add_argument(
        "--max_outer_loop", type=cli.count, default=3, help="how often a fresh network begins"
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--lr",
        type=cli.positive,
        default=0.005,
        help="learning rate of SGD; a tenth of it after 10 and after 20 epochs of an outer loop",
    )
    training.add_argument(
        "--weight_decay", type=cli.non_negative, default=0.001, help="of SGD, on everything"
    )
    training.add_argument(
        "--batch_size",
        type=cli.count,
        default=32,
        help="over all processes. A smaller last batch of training images is dropped, so that any number of processes "
        "trains alike; under --fidelity released one process keeps it",
    )
    training.add_argument(
        "--sync_bn",
        action=BooleanOptionalAction,
        help="batch statistics over all processes; by default yes, under --fidelity released no",
    )
    training.add_argument(
        "--legacy_batch_mean",
        action=BooleanOptionalAction,
        help="report the mean over test batches, as the release does; by default under --fidelity released alone",
    )
    training.add_argument(
        "--model_dir",
        metavar="DIR",
        type=cli.place,
        help="the release's folder of weights: here a name for --out",
    )
    cli.add_shared_flags(parser, default_seed=1)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, settle the defaults that depend on other flags, and count the epochs of all loops as num_epochs."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    if not args.pretrain and args.pretrained not in (None, "none"):
        parser.error(
            f"argument --pretrained: --pretrain and --no_pretrain both mean none, got {args.pretrained} beside one of them"
        )
    args.pretrained = args.pretrained or ("imagenet" if args.pretrain else "none")
    args.pretrain = args.pretrained != "none"
    released = args.fidelity == "released"
    args.sync_bn = not released if args.sync_bn is None else args.sync_bn
    args.legacy_batch_mean = released if args.legacy_batch_mean is None else args.legacy_batch_mean
    if args.model_dir and args.out and args.model_dir != args.out:
        parser.error(
            f"argument --model_dir: is a name for --out, give one of them, got {args.model_dir} and {args.out}"
        )
    args.out, args.model_dir = args.out or args.model_dir, None
    if args.num_classes != len(CLASSES):
        parser.error(f"argument --num_classes: Clothing1M has {len(CLASSES)} classes, got {args.num_classes}")
    if args.image_size < 64:
        parser.error(f"argument --image_size: must be at least 64, got {args.image_size}")
    if args.selection == "none":
        args.max_outer_loop = 1
    args.num_epochs = args.max_outer_loop * args.max_inner_loop * args.n_epoch
    return args


# data -----------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What a run trains and tests on."""

    index: np.ndarray  # int64 [N]: where the training images stand in the official list, ascending
    observed: np.ndarray  # int64 [N]: their noisy labels
    split: FileSplit  # the same images in the order of training
    cache: ImageCache | None  # of `split`
    labels: Tensor  # noisy labels of `split`, int [N], on the CPU
    validation: Labelled
    test: Labelled  # all test images, or those of --limit_test
    skipped: tuple[tuple[str, int, str], ...]  # images left out: path, position in its list, reason
    generator: torch.Generator  # orders, crops and flips the training images
    batches: Callable  # (split, cache, transform, **training) -> FileBatches
    whole_test: Labelled | None = None  # all test images

    def training(self, positions: Tensor, args: Namespace) -> FileBatches:
        """Augmented batches of the training images at `positions`, in a new order at every pass."""
        transform = resize_crop_and_flip(args.image_size)
        training = {"shuffle": True, "drop_last": drops_last(args), "generator": self.generator}
        return self.batches(*self._only(positions), transform, **training)

    def plain(self, positions: Tensor, args: Namespace) -> FileBatches:
        """The training images at `positions` as the test has them, in order."""
        return self.batches(*self._only(positions), resize_to_square(args.image_size))

    def _only(self, positions: Tensor) -> tuple[FileSplit, ImageCache | None]:
        keep = positions.numpy()
        return self.split.only(keep), None if self.cache is None else self.cache.only(keep)


def load(args: Namespace, device: Device) -> Data:
    """The noisy training list, the clean validation and the clean test list [Sec. 8]. UserError: data or flags do not fit.

    The training list is shuffled once, as in the release, before anything else is drawn.
    """
    files = processes.from_first(lambda: _load_files(args))
    kept = datasets.limited(np.arange(len(files.positions)), args.limit_train, args.seed)
    order = kept[shuffled(len(kept), args.seed)]
    caches = open_caches(args.image_cache, files) if args.image_cache else {}
    loading = {"mean": files.mean, "std": files.std, "device": device.device, "workers": args.workers}
    loading |= {"rank": processes.rank(), "world": processes.world()}

    def batches(split: FileSplit, cache: ImageCache | None, transform: Callable, **training) -> FileBatches:
        return FileBatches(split, args.batch_size, transform, cache=cache, **loading, **training)

    def in_order(split: FileSplit, keep: np.ndarray | slice = slice(None)) -> Labelled:
        cache, split = caches[split.part].only(keep) if caches else None, split.only(keep)
        whole = batches(split, cache, resize_to_square(args.image_size))
        return Labelled(whole, torch.from_numpy(split.labels).to(device.device))

    train = files.train.only(order)
    return Data(
        files.positions[kept],
        files.train.labels[kept],
        train,
        caches["train"].only(order) if caches else None,
        torch.from_numpy(train.labels),
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
    root = Path(args.data_root)
    if missing_files(folder_of_lists(root, LISTS), LISTS) and (root / INDEX).is_file():
        data = without_bad_images(read_index(root), root, args.on_bad_image, args.workers)
    else:
        data = datasets.load_clothing1m(root, "noisy", args.on_bad_image, args.workers)
    if args.noise_file:
        labels = datasets.labels_of(args.noise_file, data.positions, data.listed, data.num_classes)
        data = data._replace(train=data.train._replace(labels=labels))
    count = min(len(data.positions), args.limit_train or len(data.positions))
    if count < smallest_set(args):
        raise UserError(
            f"--batch_size {args.batch_size}: there are only {count} training images, and a partial batch is dropped; "
            "use a smaller batch"
        )
    return data


def shuffled(count: int, seed: int) -> np.ndarray:
    """Positions 0 .. count - 1 in the order in which the release keeps its training list."""
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    return order


def drops_last(args: Namespace) -> bool:
    """Whether a smaller last batch of training images is left out: it cannot be cut into equal pieces for processes."""
    return args.fidelity != "released" or processes.world() > 1


def smallest_set(args: Namespace) -> int:
    """The fewest images that can be trained on."""
    return args.batch_size if drops_last(args) else 1


# the loops ------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an epoch of the run is; all from 1."""

    outer: int
    inner: int
    epoch: int  # of the outer loop: checkpoints are numbered so
    first: bool  # of the inner loop


def place_of(epoch: int, args: Namespace) -> Place:
    """Outer and inner loop of an epoch of the run, from 1 [Sec. 8]."""
    outer, before = divmod(epoch - 1, args.max_inner_loop * args.n_epoch)
    inner, of_inner = divmod(before, args.n_epoch)
    return Place(outer + 1, inner + 1, before + 1, of_inner == 0)


def name_of(place: Place) -> str:
    """The place in words."""
    return f"outer loop {place.outer}, inner loop {place.inner}"


def learning_rate(place: Place, lr: float) -> float:
    """A tenth after each milestone; the count goes on from inner loop to inner loop, and restarts with an outer loop."""
    for milestone in MILESTONES:
        if place.epoch > milestone:
            lr *= 0.1
    return lr


def is_new_best(accuracy: float, rows: list[dict]) -> bool:
    """Whether a validation accuracy beats those of all epochs before, strictly, whatever loop they were in."""
    return accuracy > max((row["validation_accuracy"] for row in rows), default=0.0)


def fresh_memory(num_classes: int) -> dict:
    """What is carried from epoch to epoch, beside network and optimiser."""
    return {
        "confident": None,  # positions of the images that are trained on, ascending; None: all
        "models": no_models(num_classes)._asdict(),
        "weights": {},  # of the epochs that are the model of a class, on the CPU
        "streaks": selection_report.no_streaks(1, num_classes),
    }


def begin_inner_loop(
    place: Place,
    network: nn.Module,
    optimizer: SGD,
    memory: dict,
    fresh_network: Callable,
    data: Data,
    run: Run,
) -> None:
    """New confident examples; and in a new outer loop a fresh network, to be trained on them."""
    if run.args.selection == "confident" and (place.outer, place.inner) != (1, 1):
        select(network, memory, data, name_of(place), run)
    if place.outer > 1 and place.inner == 1:
        network.load_state_dict(fresh_network().state_dict())
        optimizer.state.clear()
        memory["models"] = no_models(run.args.num_classes)._asdict()
        memory["weights"] = {}


def select(network: nn.Module, memory: dict, data: Data, what: str, run: Run) -> None:
    """Extract confident examples from the whole noisy list: they are trained on from here on [Sec. 8].

    Each checkpoint in use goes once through the samples of all its classes; the network ends with the weights it came with.
    A set that is too small to train on is not taken: the one before is kept, with a warning.
    """
    models = model_of_class(ClassModels(**memory["models"]))
    own, predicted = copy_of(network), torch.full_like(data.labels, -1)
    for epoch, positions in samples_by_model(data.labels, models).items():
        network.load_state_dict(memory["weights"][epoch])
        batches = run.progress(data.plain(positions, run.args), f"{what} selection", training=False)
        predicted[positions] = predict(network, batches, len(positions), run.device).cpu()
    network.load_state_dict(own)
    confident = confident_examples(predicted, data.labels)
    if len(confident) >= smallest_set(run.args):
        memory["confident"] = confident
        chosen = [Selected(confident, data.labels, None)]
        memory["streaks"] = selection_report.follow(
            memory["streaks"], chosen, "longer inner loops (--n_epoch)"
        )
    elif processes.rank() == 0:
        print(
            f"warning: {what}: {len(confident)} confident examples are too few for a batch, the set before is kept",
            file=sys.stderr,
        )


def keep_models(network: nn.Module, memory: dict, epoch: int, score: Tensor, accuracy: float) -> None:
    """Make this epoch the model of the classes that it is the best for; of the others keep the weights still in use."""
    models = update(ClassModels(**memory["models"]), epoch, score, accuracy)
    used = in_use(models)
    if epoch in used:
        memory["weights"][epoch] = copy_of(network)
    memory["weights"] = {of: weights for of, weights in memory["weights"].items() if of in used}
    memory["models"] = models._asdict()


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights on the CPU."""
    return {name: value.to("cpu", copy=True) for name, value in network.state_dict().items()}


def train_epoch(
    network: nn.Module, optimizer: SGD, batches: Iterable, labels: Tensor, weights: Tensor, device: Device
) -> float:
    """One pass of weighted cross-entropy on the noisy labels, int [N] on the device: the mean loss of its steps.

    weights: of the classes, [K]. Under torchrun the loss of every step is that of the global batch.
    """
    network.train()
    losses = []
    for (images,), piece in batches:
        given = labels[processes.gather_rows(piece)]
        with device.autocast():
            logits = network(images)
        loss = weighted_cross_entropy(processes.gather_rows(logits.float()), given, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


# the script -----------------------------------------------------------------------------------------------------------


@cli.script
def main(argv=None) -> None:
    """Train Me-Momentum on Clothing1M and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, several=True, fidelity=args.fidelity)
    data = load(args, device)
    fresh_network = partial(clothing_network, args.num_classes, args.network, args.pretrained)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    network = fresh_network()
    run = Run(
        args, device, paper="me_momentum", method=method(args), name=directory_name(args), cell=cell(args)
    )
    run.save_labels(data.index, None, data.observed, args.num_classes)
    run.save_skipped(data.skipped)

    network = device.prepare(network, args.compile)
    if args.sync_bn:
        network = processes.synchronised(network)
    parallel = processes.parallel(network, device.device)
    optimizer = SGD(
        network.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay, fused=device.on_cuda()
    )
    memory = fresh_memory(args.num_classes)
    run.resume({"network": network, "optimizer": optimizer, "generator": data.generator, "memory": memory})

    batches = None
    for epoch in run.epochs(args.num_epochs):
        place = place_of(epoch, args)
        if place.first:
            begin_inner_loop(place, network, optimizer, memory, fresh_network, data, run)
        current = training_set(memory, len(data.labels))
        if place.first or batches is None:
            batches = data.training(current, args)
        optimizer.param_groups[0]["lr"] = learning_rate(place, args.lr)
        labels = data.labels[current].to(device.device)
        weights = loss_weights(labels, data.validation.labels, args.num_classes)
        loss = train_epoch(
            parallel, optimizer, run.progress(batches, name_of(place)), labels, weights, device
        )
        processes.share_buffers(network)

        validation = validate(network, data.validation, f"{name_of(place)} validation", run)
        if args.selection == "confident":
            score = class_score(validation.recall, validation.precision, args.beta)
            keep_models(network, memory, place.epoch, score, validation.accuracy)
        new_best = is_new_best(validation.accuracy, run.rows)
        if new_best:
            run.save_weights("model_best.pt", network.state_dict())
        report = {"outer": place.outer, "inner": place.inner, "loss": loss}
        report |= {"validation_accuracy": validation.accuracy}
        report |= test(network, data.test, f"{name_of(place)} test", run)
        report |= set_columns(memory, data.labels, args.num_classes)
        report |= {"validation_std": validation.std, "lr": learning_rate(place, args.lr)}
        run.log(epoch, **report, new_best=int(new_best))

    metric = "test_accuracy_batchmean" if args.legacy_batch_mean else "test_accuracy"
    full = run.full_test(lambda: full_test(network, data, run))
    run.finish(metric, **summary(run.rows, metric), **full)


def full_test(network: nn.Module, data: Data, run: Run) -> dict[str, float]:
    """Accuracy on all test images of the reported network, for --full_test_at_end.

    That is the one in model_best.pt; the last one, where no epoch's validation accuracy was above 0.
    """
    path = run.folder / "model_best.pt"
    processes.wait()  # the first process has written it
    if path.is_file():
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    accuracy = test(network, data.whole_test, "full test", run)["test_accuracy"]
    return {"full_test": accuracy, "full_test_images": len(data.whole_test.labels)}


def training_set(memory: dict, count: int) -> Tensor:
    """Positions of the images that are trained on, int [n], ascending."""
    return torch.arange(count) if memory["confident"] is None else memory["confident"]


def loss_weights(labels: Tensor, validation_labels: Tensor, num_classes: int) -> Tensor:
    """The weights of the classes for the current training set's noisy labels, float32 [K] [Sec. 5]."""
    counts = (torch.bincount(given, minlength=num_classes) for given in (labels, validation_labels))
    return prior_weights(*counts)


def predictions(network: nn.Module, split: Labelled, what: str, run: Run) -> Tensor:
    """The class that the network predicts for each image of a split, int [N]."""
    batches = run.progress(split.batches, what, training=False)
    return predict(network, batches, len(split.labels), run.device)


def validate(network: nn.Module, split: Labelled, what: str, run: Run) -> Scores:
    """The network's scores on the clean validation images."""
    return scores(predictions(network, split, what, run), split.labels, run.args.num_classes)


def test(network: nn.Module, split: Labelled, what: str, run: Run) -> dict[str, float]:
    """Columns of the log: test accuracy over samples, and as the release's mean over batches, in percent."""
    predicted = predictions(network, split, what, run)
    batchmean = batch_mean_accuracy(predicted, split.labels, run.args.batch_size)
    return {"test_accuracy": accuracy(predicted, split.labels), "test_accuracy_batchmean": batchmean}


def set_columns(memory: dict, labels: Tensor, num_classes: int) -> dict[str, float | int | None]:
    """Columns of the log about the set that was trained on, and the number of checkpoints that make the next one.

    confident_size and confident_share, of all noisy images, are empty before the first selection; smallest_class: how
    often the rarest class is in the set, of the classes that the noisy list has.
    """
    confident = memory["confident"]
    current = training_set(memory, len(labels))
    counts = torch.bincount(labels[current], minlength=num_classes)
    return {
        "confident_size": None if confident is None else len(confident),
        "confident_share": None if confident is None else len(confident) / len(labels),
        "smallest_class": int(counts[labels.unique()].min()),
        "class_models": len(memory["weights"]) or None,
        **selection_report.columns([] if confident is None else [Selected(confident, labels, None)]),
    }


def summary(rows: list[dict], metric: str) -> dict[str, float | None]:
    """The reported test accuracy, a column of the log: at the best epoch on the clean validation images, the first of equals."""
    best = max(rows, key=lambda row: row["validation_accuracy"])
    last = {name: rows[-1][name] for name in ("confident_size", "confident_share")}
    return {
        "at_best_validation": best[metric],
        "best_validation": best["validation_accuracy"],
        **last,
    }


def method(args: Namespace) -> str:
    """What a result row calls the method."""
    return "CE" if args.selection == "none" else "Me-Momentum"


def directory_name(args: Namespace) -> str:
    """The run directory's name: data and seed, then whatever differs from the defaults."""
    released, alone = args.fidelity == "released", args.selection == "none"
    always = [*(["selection"] if alone else []), *(["fidelity"] if released else []), "seed"]
    defaults = vars(parse_args(["--fidelity", args.fidelity, "--selection", args.selection]))
    # the loops say how many epochs there are
    return f"{NAME}-{run_name(args, {**defaults, 'num_epochs': args.num_epochs}, always)}"


def cell(args: Namespace) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    defaults = parse_args(["--selection", args.selection])
    bounds = ("n_epoch", "max_inner_loop", "max_outer_loop", "image_size")
    shortened = any(getattr(args, bound) < getattr(defaults, bound) for bound in bounds)
    whole = args.network == defaults.network and not shortened
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
