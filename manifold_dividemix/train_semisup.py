"""Manifold DivideMix on images with wrong labels and OOD images (CVPR-W 2024); also on the embedded digits.

    python manifold_dividemix/train_semisup.py --dataset digits --pretrained none --epochs 20      # no data, no weights needed
    python manifold_dividemix/train_semisup.py --pretrained .../encoder.safetensors                # CIFAR-100 with ImageNet 32x32

pretrain.py makes the encoder.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli
from manifold_dividemix.flags import make_cifar_parser as make_parser

cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.encoders import load_encoder
from common.gpu.loader import Images
from common.gpu.policies import four_views
from common.runs import selection_report
from common.runs.cli import UserError
from common.runs.label_quality import Estimate, save_label_quality
from common.runs.run import Run
from common.runs.selection_report import PATIENCE, Selected
from manifold_dividemix import dataset as data
from manifold_dividemix import report
from manifold_dividemix.choices import Lambdas, removal_count
from manifold_dividemix.dataset import Dataset
from manifold_dividemix.flags import check_sizes, cifar_cell, cifar_directory, method, splits_of
from manifold_dividemix.flags import parse_cifar_args as parse_args
from manifold_dividemix.losses import learning_rate, position, ramp_steps, ramp_up
from manifold_dividemix.mixematch import Loss
from manifold_dividemix.networks import Network, make_encoder
from manifold_dividemix.outliers import kept_samples, knn_scores, outlier_auroc
from manifold_dividemix.selection import clean_probability, divide, too_small
from manifold_dividemix.training import (
    Setting,
    Step,
    all_logits,
    embed,
    plain_batches,
    set_mode,
    top_accuracy,
    train_divided,
    warm_up,
    without_single,
)

PARTS = Loss._fields[1:]
# columns of the log whose last values are in the result
STATISTICS = (
    *("test_top5", "removed", "removal_precision", "removal_recall"),
    *("labelled", "unlabelled", "labelled_precision", "labelled_ood", "clean_auc"),
)


@cli.script
def main(argv=None) -> None:
    """Train Manifold DivideMix and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(
        args.device, args.precision, args.gpu, several=True, fidelity=args.fidelity, fixed_shapes=False
    )
    dataset = data.load_open_set(args)
    start(dataset, args, device, cifar_directory(args), cifar_cell(args, dataset.name))


def start(dataset: Dataset, args: Namespace, device: gpu.Device, name: str, cell: dict) -> None:
    """The run of both scripts, once the images are loaded. name: of the run directory; cell: columns of its result rows."""
    check_sizes(args, len(dataset.observed))
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    network = initial_network(dataset, args)
    run = Run(args, device, paper="manifold_dividemix", method=method(args), name=name, cell=cell)
    data.save(dataset, run)
    train(network, dataset, run, args, device)


def initial_network(dataset: Dataset, args: Namespace) -> Network:
    """The network for the images with a pre-trained encoder; classifier and projection start at random.

    UserError: no encoder there, or one that does not fit.
    """
    channels, size = dataset.images.shape[3], dataset.images.shape[1]
    encoder = make_encoder(args.arch, channels, size)
    network = Network(encoder, encoder.width, dataset.num_classes)
    if args.pretrained != "none":
        if not Path(args.pretrained).is_file():
            raise UserError(
                f"--pretrained {args.pretrained}: no such file; make an encoder with "
                "python manifold_dividemix/pretrain.py and name its encoder.safetensors, or use --pretrained none"
            )
        load_encoder(network.encoder, args.pretrained)
    return network


def make_optimizer(network: Network, args: Namespace) -> SGD:
    """SGD with two groups: classifier and projection, and the encoder if it is trained (README, section 4.1)."""
    groups = [{"params": network.head(), "initial_lr": args.lr_head, "lr": args.lr_head}]
    if args.weights == "finetune":
        encoder = list(network.encoder.parameters())
        groups.append({"params": encoder, "initial_lr": args.lr_backbone, "lr": args.lr_backbone})
    network.encoder.requires_grad_(args.weights == "finetune")
    fused = next(network.parameters()).is_cuda
    # the warm-up does not train the projection
    return gpu.sgd(groups, momentum=args.momentum, weight_decay=args.weight_decay, fused=fused)


def warm_up_epoch(network: Network, optimizer: Optimizer, kept: Tensor, epoch: int, s: Setting) -> list:
    """Warm-up on all samples that are not removed (README, section 4.3): the mean loss, and no parts."""
    args = s.args
    set_mode(network, args.bn_mode, True, args.weights == "freeze")
    batches = s.run.progress(s.batches(s.crop()), f"epoch {epoch} warm-up", whole=True)
    # MixEMatch uses the projection's statistics frozen: the warm-up has to collect them
    how = {"loss": args.warmup_loss, "mask": args.warmup_mask, "project": args.bn_mode == "warm-up"}
    losses = warm_up(network, optimizer, batches, s.labels, kept, s.device, **how)
    return [float(losses.mean()), *[None] * len(PARTS)]


def mixematch_epoch(
    network: Network,
    optimizer: Optimizer,
    labelled: Tensor,
    unlabelled: Tensor,
    clean: Tensor,
    epoch: int,
    s: Setting,
) -> list[float]:
    """One epoch on the split (README, section 4.5): the mean of each loss, the total first."""
    args = s.args
    set_mode(network, args.bn_mode, False, args.weights == "freeze")
    views = partial(four_views, crop=s.crop())
    batches, others = s.batches(views, labelled), s.batches(views, unlabelled).endless()
    steps = ramp_steps(len(labelled), args.batch_size, len(batches), args.ramp)
    step = Step(
        draw_lam=lambda: s.draws.beta(args.alpha, args.alpha),
        draw_permutation=partial(s.device.permutation, generator=s.loader),
        ramp=lambda number: ramp_up(position(epoch, number, steps, args.ramp), args.warmup_epoch),
        lambdas=Lambdas(args.lambda_x, args.lambda_u, args.lambda_xe, args.lambda_ue, args.lambda_c),
        temperature=args.temperature,
        threshold=args.thr_un,
        kind=args.LN_loss,
        rce=args.rce,
        device=s.device,
    )
    batches = s.run.progress(batches, f"epoch {epoch} training", whole=True)
    others = without_single(others) if network.training else others
    losses = train_divided(network, optimizer, batches, others, step, labels=s.labels, clean=clean)
    return losses.mean(dim=0).tolist()


class Selection(NamedTuple):
    """What removal and split use until the next one."""

    kept: Tensor  # bool [N]: not removed
    clean: Tensor | None  # float64 [N]: clean probabilities; None before the first split
    scores: Tensor  # float32 [N]: outlier scores
    auroc: float | None  # of the outlier scores


def select(
    network: Network, dataset: Dataset, epoch: int, splits: list[int], scores: Tensor | None, s: Setting
) -> Selection:
    """Remove outliers, from scratch each time (README, section 4.2); at a split also clean probabilities (section 4.4).

    scores: float32 [N], of the last removal, or None; --knn_encoder pretrained uses the first ones again.
    """
    args, clean = s.args, None
    embedded = embed(network, s.plain(f"epoch {epoch} embeddings"), s.labels, s.device)
    if scores is None or args.knn_encoder != "pretrained":
        scores = knn_scores(embedded.embeddings, args.knn_k)
    removed = removal_count(epoch, len(scores), args.remove_ood, args.ood_start_factor, splits)
    kept = kept_samples(scores, removed)
    if epoch in splits:
        if args.fidelity == "released":  # every split seeds the generator again (README, difference 9)
            s.draws.bit_generator.state = np.random.default_rng(args.seed).bit_generator.state
        clean = clean_probability(embedded.losses, int(s.draws.integers(2**31)))
    report.save_outliers(s.run, "last" if epoch else "first", embedded, scores, kept, clean, args.seed)
    return Selection(kept, clean, scores, outlier_auroc(scores, dataset.ood))


def evaluate(network: Network, images: Images, name: str, num_classes: int, s: Setting) -> Tensor:
    """The logits of test images, float32 [M, K]."""
    batches = s.run.progress(plain_batches(images), name, training=False)
    return all_logits(network, batches, len(images), num_classes, s.device)


def quality(network: Network, num_classes: int, memory: dict, s: Setting) -> Estimate:
    """What the last removal and split and the network at the end say about the given labels."""
    logits = evaluate(network, s.train, "label quality", num_classes, s)
    kept, clean, scores = (memory[name] for name in ("kept", "clean", "scores"))
    return report.estimate_label_quality(logits, kept, clean, scores, s.args.p_threshold)


def full_test(network: Network, dataset: Dataset, s: Setting) -> dict[str, float]:
    """Accuracy on all test images, for --full_test_at_end."""
    images = Images(dataset.test_images, dataset.mean, dataset.std, s.device.device)
    labels = torch.from_numpy(dataset.test_labels).to(s.device.device)
    logits = evaluate(network, images, "full test", dataset.num_classes, s)
    return {"full_test": top_accuracy(logits, labels), "full_test_images": len(labels)}


def finish(network: Network, dataset: Dataset, memory: dict, s: Setting) -> None:
    """The end of the run: label_quality.csv, then the result."""
    run, estimate = s.run, partial(quality, network, dataset.num_classes, memory, s)
    names, truth = (dataset.paths, dataset.classes), dataset.true_labels()
    save_label_quality(run, estimate, *names, files=dataset.files, true_labels=truth)
    last = {f"last_{name}": run.rows[-1][name] for name in STATISTICS}
    last |= run.full_test(lambda: full_test(network, dataset, s))
    run.finish(first_ood_auroc=memory["first_auroc"], last_ood_auroc=memory["auroc"], **last)


def train(network: Network, dataset: Dataset, run: Run, args: Namespace, device: gpu.Device) -> None:
    """The training of both scripts, up to the end of the run (README, section 4)."""
    network = device.prepare(network, args.compile)
    network.encoder = processes.synchronised(network.encoder)
    optimizer = make_optimizer(network, args)
    images_of = partial(Images, mean=dataset.mean, std=dataset.std, device=device.device)
    train_images, test_images = images_of(dataset.images), images_of(dataset.test_images[dataset.tested])
    labels, test_labels, right = (
        None if known is None else torch.from_numpy(known).to(device.device)
        for known in (
            dataset.observed,
            dataset.test_labels[dataset.tested],
            report.correctly_labelled(dataset),
        )
    )
    loader, draws = device.generator(args.seed), np.random.default_rng(args.seed)
    memory = dict.fromkeys(("kept", "clean", "scores", "first_auroc", "auroc"))
    memory["streaks"] = selection_report.no_streaks(1, dataset.num_classes)
    state = {"network": network, "optimizer": optimizer, "loader": loader, "draws": draws}
    run.resume({**state, "memory": memory})
    for name in ("kept", "clean", "scores"):
        memory[name] = None if memory[name] is None else gpu.put(memory[name], device.device)
    s = Setting(args, device, run, train_images, labels, loader, draws)
    splits = splits_of(args)
    if splits:
        steps = args.warmup_epoch * len(s.batches(s.crop()))
        selection_report.note_short_warm_up(steps, f"--warmup-epoch {args.warmup_epoch}")

    for number in run.epochs(args.epochs):
        epoch, auroc = number - 1, None  # the release counts from 0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, group["initial_lr"], args.epochs)
        selecting = epoch == 0 or epoch in splits
        if selecting:
            memory |= select(network, dataset, epoch, splits, memory["scores"], s)._asdict()
            auroc = memory["auroc"]
            memory["first_auroc"] = auroc if epoch == 0 else memory["first_auroc"]

        kept, clean = memory["kept"], memory["clean"]
        sides = None if clean is None else divide(clean, kept, args.p_threshold)
        if selecting:
            report.warn_of_lost_classes(kept, sides, dataset)
        selected = [] if sides is None else [Selected(sides[0], labels, right)]
        if sides is None or too_small(*sides, args.batch_size):
            losses = warm_up_epoch(network, optimizer, kept, epoch, s)
        else:
            if epoch in splits:
                memory["streaks"] = selection_report.follow(
                    memory["streaks"], selected, "a longer --warmup-epoch", min(PATIENCE, len(splits))
                )
            losses = mixematch_epoch(network, optimizer, *sides, clean, epoch, s)

        logits = evaluate(network, test_images, f"epoch {epoch} test", dataset.num_classes, s)
        columns = {"loss": losses[0], "test_accuracy": top_accuracy(logits, test_labels)}
        columns |= {"test_top5": top_accuracy(logits, test_labels, 5), "ood_auroc": auroc}
        columns |= report.removal_columns(kept, dataset.ood) | report.split_columns(sides, clean, dataset)
        columns |= selection_report.columns(selected)
        columns |= {f"{name}_loss": value for name, value in zip(PARTS, losses[1:], strict=True)}
        if args.eval_train:
            embedded = embed(network, s.plain(f"epoch {epoch} training accuracy"), labels, device)
            columns["train_accuracy"] = 100 * float(embedded.hits.float().mean())
        columns |= {"lr_head": optimizer.param_groups[0]["lr"], **report.removed_by_class(kept, dataset)}
        run.log(number, **columns)

    finish(network, dataset, memory, s)


if __name__ == "__main__":
    cli.exit_cleanly(main)
