"""Self-supervised Adversarial Noisy Masking on CIFAR-10/100 with noisy labels (CVPR 2023); also on the embedded digits.

python sanm/Train_cifar.py --base dividemix --dataset digits --num_epochs 20                     # no data, no weights needed
python sanm/pretrain.py && python sanm/Train_cifar.py --pretrained .../encoder.safetensors       # CIFAR-10 under ./data
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli
from sanm import flags

make_parser = partial(flags.cifar_parser, __doc__)
cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD

from common import datasets
from common.datasets import Data, posterior
from common.gpu import device as gpu
from common.gpu.augment import training_augmentation, warm_up_view
from common.gpu.encoders import load_encoder
from common.gpu.loader import Batches, Images, test_batches
from common.gpu.policies import six_views
from common.runs import selection_report
from common.runs.cli import UserError
from common.runs.label_quality import save_label_quality
from common.runs.run import Run
from common.runs.selection_report import Selected
from sanm.losses import ramp_up
from sanm.masking import draw_masks, mask
from sanm.mixmatch import Samples
from sanm.networks import MaskedNetwork, make_network
from sanm.report import final_metrics, quality, save_clean_probability
from sanm.selection import (
    clean_probability,
    divide,
    normalised,
    remember,
    split_statistics,
)
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

NOISE_TYPES = {"sym": "symmetric_inclusive", "asym": "asymmetric"}
CLIP = 1.0  # largest gradient norm of the warm-up
LOSSES = ("labelled_loss", "unlabelled_loss", "prior_loss", "reconstruction_loss")


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    return flags.cifar_args(argv, __doc__)


# data and networks ----------------------------------------------------------------------------------------------------


def training_index(data: Data, args: Namespace) -> np.ndarray:
    """Positions of the images that are trained on, int [N]. UserError: too few to be split."""
    index = datasets.kept_images(args, np.arange(len(data.train.labels)))
    if args.selection == "gmm" and len(index) < 2:
        raise UserError(f"--limit_train {args.limit_train}: one image cannot be split into two sets")
    return index


def observed_labels(data: Data, index: np.ndarray, args: Namespace) -> np.ndarray:
    """The labels that training sees, int [n], of the training images at `index` (README, section 2).

    UserError: labels that are not there; asymmetric noise on classes that it has no rule for.
    """
    kind = NOISE_TYPES.get(args.noise_mode, args.noise_mode)
    if kind == "asymmetric" and data.name == "cifar100":
        kind = "superclass"
    elif kind == "asymmetric" and data.num_classes != 10:
        raise UserError(
            f"--noise_mode asym: is for 10 classes (CIFAR-10's look-alikes) and cifar100, {data.name} has "
            f"{data.num_classes}; use sym or --noise_file"
        )
    eta = posterior.posterior_for(kind, data, args.data_path, args.posterior)
    return datasets.observed_labels(
        data, index, kind, args.r, args.seed, args.noise_file, "--noise_mode", eta
    )


def initial_network(data: Data, args: Namespace) -> MaskedNetwork:
    """The network of the base for a data set's images, of base C2D with a pre-trained encoder (README, sections 3 and 10).

    UserError: no pre-trained encoder there, or one that does not fit.
    """
    channels, size = data.train.images.shape[3], data.train.images.shape[1]
    network = make_network(args.base, data.num_classes, channels, size, args.released_softmax, args.arch)
    if args.base == "c2d" and args.pretrained != "none":
        load_encoder(network.encoder, flags.pretrained_file(args))
    return network


# the method -----------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What every pass over the training set shares."""

    args: Namespace
    device: gpu.Device
    run: Run
    train: Images
    labels: Tensor  # observed, int [N]
    loader: torch.Generator  # order, augmentation, masks and mixing partners
    draws: np.random.Generator  # mixture weights and starts of the GMM

    def batches(self, size: int, augmentation, **options) -> Batches:
        """Shuffled, augmented batches of the training set."""
        return Batches(
            self.train, size, shuffle=True, augmentation=augmentation, generator=self.loader, **options
        )

    def plain(self, name: str):
        """All training images in order, without augmentation."""
        return self.run.progress(Batches(self.train, 512), name, training=False)

    def crop(self):
        """The crop-and-flip that all training views begin with."""
        return training_augmentation(self.args.dataset, self.train.pixels.shape[2])


def note_warm_up(s: Setting) -> None:
    """Print a note if a selection follows a warm-up of few steps."""
    if s.args.selection == "gmm" and s.args.warm_up <= s.args.num_epochs:
        steps = s.args.warm_up * len(s.batches(2 * s.args.batch_size, s.crop()))
        selection_report.note_short_warm_up(steps, f"--warm_up {s.args.warm_up}")


def warm_up_epoch(network: MaskedNetwork, optimizer: SGD, epoch: int, s: Setting) -> Tensor:
    """Cross-entropy on all samples; under asymmetric noise with a penalty on confident predictions (README, section 4)."""
    view = partial(warm_up_view, crop=s.crop()) if s.args.warm_up_views == "strong" else s.crop()
    batches = s.run.progress(s.batches(2 * s.args.batch_size, view), f"epoch {epoch} warm-up")
    penalise = s.args.noise_mode == "asym"
    return warm_up(network, optimizer, batches, s.labels, s.device, penalise_confidence=penalise, clip=CLIP)


def label_quality(network: MaskedNetwork, history: list[Tensor], epoch: int, s: Setting) -> Tensor:
    """The clean probability of each sample by one network's losses on plain images, float64 [N] (README, section 6).

    history: the network's loss vectors of earlier epochs; this epoch's is added to it.
    """
    plain = s.plain(f"epoch {epoch} losses")
    losses = normalised(sample_losses(network, plain, s.labels, len(s.labels), s.device))
    history[:] = remember(history, losses)
    if flags.uses_history(s.args):
        losses = torch.stack(history).mean(dim=0)
    return clean_probability(losses, int(s.draws.integers(2**31)))


def six_as_samples(views: tuple[Tensor, ...], clean: Tensor) -> Samples:
    """AutoAugment and RandAugment views are trained on; reference views make targets, maps and masks (README, section 2.1)."""
    return Samples(views[:4], views[4:], clean)


def co_divide(
    network: MaskedNetwork,
    peer: MaskedNetwork,
    optimizer: SGD,
    clean: Tensor,
    selected: Tensor,
    epoch: int,
    s: Setting,
) -> Tensor:
    """One epoch on the split that the peer's losses made (README, section 4): each step's losses [steps, 5]."""
    args = s.args
    augmentation = partial(six_views, crop=s.crop(), weak_reference=args.ref_views == "weak")
    labelled, unlabelled = (
        s.batches(args.batch_size, augmentation, subset=side.nonzero()[:, 0])
        for side in (selected, ~selected)
    )
    steps = int(selected.sum()) // args.batch_size + 1  # num_iter of the release's ramp
    masks = Masks(draw_masks, mask, flags.mask_rule(args), s.loader)
    step = Step(
        six_as_samples,
        masks=masks if args.masking == "adversarial" else None,
        draw_lam=lambda: s.draws.beta(args.alpha, args.alpha),
        draw_permutation=partial(s.device.permutation, generator=s.loader),
        weight=lambda number: ramp_up(args.lambda_u, epoch + number / steps, args.warm_up),
        temperature=args.T,
        reconstruction_weight=args.recon_weight,
        device=s.device,
    )
    labelled = s.run.progress(labelled, f"epoch {epoch} training")
    return train_divided(
        network, peer, optimizer, labelled, unlabelled.endless(), step, labels=s.labels, clean=clean
    )


def on_device(
    nets: list[MaskedNetwork], train: Images, args: Namespace, device: gpu.Device
) -> list[MaskedNetwork]:
    """The networks ready for training; on a GPU, if asked, their steps of two full batches are recorded."""
    nets = [device.prepare(net, args.compile) for net in nets]
    masked = [2] if args.masking == "adversarial" else []  # copies of each image, which are also rebuilt
    if args.cuda_graphs and not args.compile:
        for net in nets:
            copies = (4 + sum(masked), *masked)
            device.replay(net, *((2 * args.batch_size * n, *train.pixels.shape[1:]) for n in copies))
    return nets


# the script -----------------------------------------------------------------------------------------------------------


@cli.script
def main(argv=None) -> None:
    """Train SANM and write its run directory."""
    args = parse_args(argv)
    for note in flags.cifar_notes(args):
        print(note)
    device = gpu.pick(args.device, args.precision, args.gpuid, fidelity=args.fidelity, fixed_shapes=False)
    data = datasets.from_arguments(vars(args))
    index = training_index(data, args)
    true_labels, observed = data.true_labels(index, args.noise_mode), observed_labels(data, index, args)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    nets = [initial_network(data, args) for _ in range(2)]
    method, name = flags.cifar_method(args), flags.cifar_directory(args)
    run = Run(args, device, paper="sanm", method=method, name=name, cell=flags.cifar_cell(args, data.name))
    run.save_labels(index, true_labels, observed, data.num_classes)
    run.save_skipped(data.skipped)

    train = Images(data.train.images[index], data.mean, data.std, device.device)
    tests = test_batches(data, args.limit_test, args.seed, 512, device.device)
    labels = torch.from_numpy(observed).to(device.device)
    right = None if true_labels is None else torch.from_numpy(observed == true_labels).to(device.device)
    nets = on_device(nets, train, args, device)
    # the warm-up does not train the decoder
    optimizers = [
        gpu.sgd(net.parameters(), args.lr, 0.9, weight_decay=5e-4, fused=device.on_cuda()) for net in nets
    ]
    loader, draws = device.generator(args.seed), np.random.default_rng(args.seed)
    memory: dict[str, Any] = {"history": [[], []], "clean": [None, None]}
    memory["streaks"] = selection_report.no_streaks(2, data.num_classes)
    run.resume({"nets": nets, "optimizers": optimizers, "loader": loader, "draws": draws, "memory": memory})
    memory["history"] = [[losses.to(device.device) for losses in kept] for kept in memory["history"]]
    s = Setting(args, device, run, train, labels, loader, draws)
    note_warm_up(s)

    for number in run.epochs(args.num_epochs + 1):
        epoch = number - 1  # the release counts from 0
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(epoch, args.lr, args.lr_drop)
        clean, selected = [], []
        if epoch < args.warm_up or args.selection == "none":
            losses = [warm_up_epoch(*pair, epoch, s) for pair in zip(nets, optimizers, strict=True)]
            parts = [float(torch.cat(losses).mean()), *[None] * len(LOSSES)]
        else:
            # both networks estimate clean probabilities before either is trained
            memory["clean"] = clean = [label_quality(nets[i], memory["history"][i], epoch, s) for i in (0, 1)]
            selected = [divide(probability, args.p_threshold) for probability in clean]
            losses = [
                co_divide(nets[i], nets[1 - i], optimizers[i], clean[1 - i], selected[1 - i], epoch, s)
                for i in (0, 1)
            ]
            parts = torch.cat(losses).mean(dim=0).tolist()
        chosen = [Selected(own, labels, right) for own in selected]
        memory["streaks"] = selection_report.follow(memory["streaks"], chosen, "a longer --warm_up")
        test, test_labels = tests.limited
        scores = network_scores(nets, test, len(test_labels), data.num_classes, device)
        report = {"loss": parts[0], "test_accuracy": accuracy(scores.sum(dim=0), test_labels)}
        report |= split_statistics(clean, selected, right)
        report |= {f"net{i + 1}_accuracy": accuracy(scores[i], test_labels) for i in (0, 1)}
        report |= dict(zip(LOSSES, parts[1:], strict=True)) | selection_report.columns(chosen)
        run.log(number, **report, lr=optimizers[0].param_groups[0]["lr"])

    save_clean_probability(run, memory["clean"], observed, true_labels)
    estimate = partial(quality, nets, memory["clean"], data.num_classes, s)
    save_label_quality(run, estimate, data.paths, data.classes)
    run.finish(**final_metrics(nets, right, tests.whole, data.num_classes, s))


if __name__ == "__main__":
    cli.exit_cleanly(main)
