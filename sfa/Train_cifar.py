"""Stochastic Feature Averaging on CIFAR-10/100 with long-tailed noisy labels (IJCAI 2023); also on the embedded digits.

    python sfa/Train_cifar.py --dataset digits                                # minutes on a laptop, no data needed
    python sfa/Train_cifar.py --noise_ratio 0.5 --imb_factor 0.01             # CIFAR-10 under ./data
    python sfa/Train_cifar.py --selection gmm                                 # DivideMix's selection instead of SFA's
    python sfa/Train_cifar.py --loss gce                                      # SFA with a noise-robust loss

sfa/README.md describes the method in numbered sections.
"""

import random
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli
from sfa.flags import make_cifar_parser as make_parser

cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
from torch.optim import SGD

from common import datasets, noise
from common.datasets import Data, posterior
from common.gpu import device as gpu
from common.gpu.augment import training_augmentation
from common.gpu.loader import Batches, Images, Labelled, test_batches
from common.runs import selection_report
from common.runs.cli import UserError
from common.runs.label_quality import save_label_quality
from common.runs.run import Run
from common.runs.selection_report import Selected
from sfa import small_loss
from sfa.evaluation import SHOTS, accuracies, estimate_label_quality
from sfa.flags import cifar_cell, cifar_directory, note_schedule, settle_draw_count
from sfa.flags import cifar_method as method
from sfa.flags import parse_cifar_args as parse_args
from sfa.losses import ramp_up
from sfa.networks import CosineHead, PreActResNet, preact_resnet18, preact_resnet_narrow
from sfa.record import classes_last, empty_memory, note_warm_up, quality_columns, remember, save_selections
from sfa.robust_losses import standard_loss
from sfa.selection import (
    POSTERIORS,
    Moments,
    Selection,
    confidence_threshold,
    incoming_moments,
    stochastic_feature_averaging,
)
from sfa.small_loss import SmallLoss
from sfa.training import features_and_confidence, sample_losses, summed_logits, train_semi, warm_up

NETWORK1 = ("precision", "recall", "auc", *(f"{shot}_recall" for shot in SHOTS))


class Setting(NamedTuple):
    """What every pass over the training set shares."""

    args: Namespace
    device: gpu.Device
    run: Run
    train: Images
    labels: torch.Tensor  # observed, int [N]
    loader: torch.Generator  # shuffles, crops, flips and mixing partners
    draws: np.random.Generator  # centroids and mixture weights
    loss: Callable[..., torch.Tensor]  # of the standard head

    def batches(self, size: int, **options) -> Batches:
        """Shuffled, augmented batches of the training set."""
        augmentation = training_augmentation(self.args.dataset, self.train.pixels.shape[2])
        return Batches(
            self.train, size, shuffle=True, augmentation=augmentation, generator=self.loader, **options
        )

    def plain(self, name: str):
        """All training images in order, without augmentation."""
        return self.run.progress(Batches(self.train, 4 * self.args.batch_size), name, training=False)


def long_tailed_noisy(data: Data, args: Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The long-tailed noisy training set (README, section 2): positions in data.train [N] and observed labels [N]."""
    labels, num_classes = data.train.labels, data.num_classes
    python_rng, rng = random.Random(args.seed), np.random.RandomState(args.seed)
    counts = noise.class_counts(len(labels), num_classes, args.imb_type, args.imb_factor)
    if args.imb_type == "none":
        # the same on balanced data; all images of other data
        counts = np.bincount(labels, minlength=num_classes)
    index = noise.long_tailed(labels, counts, rng)
    clean = labels[index]
    if args.noise_file:
        # a release's label file has no index; it is of these images if exactly the release's number of labels is changed
        changed = int(args.noise_ratio * len(index))
        observed = datasets.labels_of(
            args.noise_file,
            index,
            len(labels),
            num_classes,
            is_subset=lambda file: (file != clean).sum() == changed,
            otherwise=clean,
            paths=data.files(index),
        )
    elif args.noise_mode == "given":
        if data.noisy_labels is None:
            raise UserError(f"--noise_mode given: {data.name} brings no noisy_labels; use --noise_file")
        observed = data.noisy_labels[index]
    elif args.noise_mode in noise.POSTERIOR_TYPES:
        eta = posterior.posterior_for(args.noise_mode, data, args.data_path, args.posterior)[index]
        try:
            observed = noise.from_posterior(
                args.noise_mode, clean, args.noise_ratio, num_classes, args.seed, eta
            )
        except ValueError as error:
            raise UserError(f"--noise_mode {args.noise_mode}: {error}; use another") from None
    else:
        try:
            observed = noise.long_tailed_noise(
                args.noise_mode, clean, num_classes, args.noise_ratio, python_rng, rng
            )
        except ValueError as error:
            raise UserError(f"{data.name}: {error}; use --noise_ratio 0, or data of more classes") from None
    kept = datasets.kept_images(args, np.arange(len(index)), index)
    return index[kept], observed[kept]


def make_network(data: Data, args: Namespace) -> PreActResNet:
    """The two-headed network for a data set's images (README, section 3.1)."""
    height, width, channels = data.train.images.shape[1:]
    if min(height, width) < 5:  # on maps of one pixel, batch normalisation fails on a last batch of one image
        raise UserError(
            f"{data.name}: images of {height} x {width} pixels are too small, 5 x 5 at least are needed"
        )
    make = preact_resnet_narrow if args.arch == "narrow" or height < 16 else preact_resnet18
    network = make(data.num_classes, channels)
    if args.loss == "ldam":
        network.heads.standard = CosineHead(network.heads.feature_size, data.num_classes, args.ldam_scale)
    return network


def warm_up_epoch(
    network: PreActResNet, optimizer: SGD, class_counts: torch.Tensor, epoch: int, setting: Setting
) -> torch.Tensor:
    """One epoch of a network on all samples (README, section 4): each step's loss. class_counts [K]: observed labels."""
    batches = setting.run.progress(setting.batches(2 * setting.args.batch_size), f"epoch {epoch} warm-up")
    return warm_up(network, optimizer, batches, setting.labels, class_counts, setting.device, setting.loss)


def select(
    network: PreActResNet, moments: Moments | None, num_classes: int, epoch: int, setting: Setting
) -> Selection | SmallLoss:
    """Clean samples according to one network: by stochastic feature averaging (README, section 6), or by small losses."""
    args, labels = setting.args, setting.labels
    plain = setting.plain(f"epoch {epoch} selection")
    if args.selection == "gmm":
        losses = sample_losses(network, plain, labels, setting.device)
        clean = small_loss.clean_probability(losses, seed=int(setting.draws.integers(2**31)))
        return small_loss.divide(clean, labels, num_classes, args.p_threshold)
    features, confidence = features_and_confidence(network, plain, labels, setting.device)
    normals = setting.draws.normal(size=(args.sample_rate, num_classes, features.shape[1]))
    return stochastic_feature_averaging(
        features,
        labels,
        confidence,
        moments,
        normals=torch.from_numpy(normals).to(gpu.home(setting.device.device)),
        threshold=confidence_threshold(num_classes, args.phi, epoch),
        beta=args.beta,
        min_draw_count=args.min_draw_count,
        p_threshold=args.p_threshold,
        posterior=POSTERIORS[args.mixture],
    )


def co_divide(
    network: PreActResNet,
    peer: PreActResNet,
    optimizer: SGD,
    split: Selection | SmallLoss,
    epoch: int,
    setting: Setting,
) -> torch.Tensor:
    """One epoch of a network on the selection of its peer (README, section 4): each step's total loss."""
    args, draws = setting.args, setting.draws
    if not split.selected.any():
        print(f"warning: epoch {epoch}: no sample selected, one network is not trained", file=sys.stderr)
        return torch.empty(0, device=setting.device.device)
    selected, others = split.selected.nonzero()[:, 0], (~split.selected).nonzero()[:, 0]
    labelled = setting.batches(args.batch_size, subset=selected, views=2)
    unlabelled = setting.batches(args.batch_size, subset=others, views=2).endless() if len(others) else None
    steps = len(selected) // args.batch_size + 1  # num_iter of the release's ramp
    losses = train_semi(
        network,
        peer,
        optimizer,
        setting.run.progress(labelled, f"epoch {epoch} training"),
        unlabelled,
        labels=setting.labels,
        clean=split.clean,
        class_counts=split.counts,
        weight=lambda step: ramp_up(args.lambda_u, epoch + step / steps, args.warm_up),
        draw_lam=lambda: draws.beta(args.alpha, args.alpha),
        draw_permutation=partial(setting.device.permutation, generator=setting.loader),
        temperature=args.T,
        device=setting.device,
        loss=setting.loss,
    )
    return losses[:, 0]


def test(
    networks: list[PreActResNet], tested: Labelled, observed_counts: torch.Tensor, device: gpu.Device
) -> dict[str, float]:
    """Accuracies in percent by the summed logits of both networks: overall, by shot and by class (README, section 8)."""
    labels = tested.labels.cpu().numpy()
    logits = summed_logits(networks, tested.batches, len(labels), len(observed_counts), device)
    return accuracies(logits.argmax(dim=1).cpu().numpy(), labels, observed_counts.cpu().numpy())


def full_test(
    networks: list[PreActResNet], tested: Labelled, observed_counts: torch.Tensor, device: gpu.Device
) -> dict[str, float]:
    """The accuracies on all test images, overall and by shot, for --full_test_at_end."""
    report = test(networks, tested, observed_counts, device)
    shots = {f"full_test_{shot}_accuracy": report[f"{shot}_accuracy"] for shot in SHOTS}
    return {"full_test": report["test_accuracy"], "full_test_images": len(tested.labels), **shots}


@cli.script
def main(argv: list[str] | None = None) -> None:
    """Train SFA and write its run directory."""
    args = parse_args(argv)
    note_schedule(args)
    device = gpu.pick(args.device, args.precision, args.gpuid, fidelity=args.fidelity, fixed_shapes=False)
    data = datasets.from_arguments(vars(args))
    index, observed = long_tailed_noisy(data, args)
    clean = data.true_labels(index, args.noise_mode)
    settle_draw_count(args, len(index), data.num_classes)
    name, cell = cifar_directory(args), cifar_cell(args, data)
    run = Run(args, device, paper="sfa", method=method(args), name=name, cell=cell)
    run.save_labels(index, clean, observed, data.num_classes)
    run.save_skipped(data.skipped)

    train = Images(data.train.images[index], data.mean, data.std, device.device)
    tests = test_batches(data, args.limit_test, args.seed, 4 * args.batch_size, device.device)
    labels = torch.from_numpy(observed).to(device.device)
    right = None if clean is None else torch.from_numpy(observed == clean).to(device.device)
    observed_counts = torch.bincount(labels, minlength=data.num_classes)

    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    nets = [device.prepare(make_network(data, args), args.compile) for _ in range(2)]
    for net in nets if args.cuda_graphs and not args.compile else ():  # two views, labelled and unlabelled
        device.replay(net, (4 * args.batch_size, *train.pixels.shape[1:]))
    fused = device.on_cuda()
    optimizers = [SGD(net.parameters(), args.lr, 0.9, weight_decay=5e-4, fused=fused) for net in nets]
    loader, draws = device.generator(args.seed), np.random.default_rng(args.seed)
    memory = empty_memory(data.num_classes)
    run.resume({"nets": nets, "optimizers": optimizers, "loader": loader, "draws": draws, "memory": memory})
    setting = Setting(args, device, run, train, labels, loader, draws, standard_loss(args))
    note_warm_up(args, len(setting.batches(2 * args.batch_size)))

    for epoch in run.epochs(args.num_epochs):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.lr if epoch <= args.lr_drop else args.lr / 10
        selections = []
        if epoch <= args.warm_up or args.selection == "none":
            losses = [warm_up_epoch(nets[i], optimizers[i], observed_counts, epoch, setting) for i in (0, 1)]
        else:
            moments = [incoming_moments(own, args.ema_mode, device.device) for own in memory["moments"]]
            # both networks select before either is trained
            selections = [select(nets[i], moments[i], data.num_classes, epoch, setting) for i in (0, 1)]
            losses = [
                co_divide(nets[i], nets[1 - i], optimizers[i], selections[1 - i], epoch, setting)
                for i in (0, 1)
            ]
            remember(memory, selections)
        chosen = [Selected(selection.selected, labels, right) for selection in selections]
        memory["streaks"] = selection_report.follow(memory["streaks"], chosen, "a longer --warm_up")
        report = test(nets, tests.limited, observed_counts, device)
        report |= quality_columns(selections, observed, clean) | selection_report.columns(chosen)
        steps = torch.cat(losses)
        run.log(epoch, loss=float(steps.mean()) if len(steps) else None, **classes_last(report))

    save_selections(run, memory, observed=observed, clean=clean)
    size, plain = (len(labels), data.num_classes), setting.plain("label quality")
    of_networks = nets, memory["clean"], plain, size, args.p_threshold, device
    save_label_quality(run, lambda: estimate_label_quality(*of_networks), data.paths, data.classes)
    last = [*(f"{shot}_accuracy" for shot in SHOTS), *(f"net1_{name}" for name in NETWORK1)]
    full = run.full_test(lambda: full_test(nets, tests.whole, observed_counts, device))
    run.finish(**{f"last_{name}": run.rows[-1][name] for name in last}, **full)


if __name__ == "__main__":
    cli.exit_cleanly(main)
