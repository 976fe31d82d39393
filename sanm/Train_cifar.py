"""Self-supervised Adversarial Noisy Masking on CIFAR-10/100 with noisy labels (CVPR 2023); also on the embedded digits.

    python sanm/Train_cifar.py --base dividemix --dataset digits --num_epochs 20                     # no data, no weights needed
    python sanm/pretrain.py && python sanm/Train_cifar.py --pretrained .../encoder.safetensors       # CIFAR-10 under ./data

The sections in brackets are those of the method's description in sanm/README.md.
"""

import sys
from argparse import BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.optim import SGD

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets
from common.datasets import Data, posterior
from common.gpu import device as gpu
from common.gpu.augment import training_augmentation, warm_up_view
from common.gpu.encoders import load_encoder
from common.gpu.loader import Batches, Images, Labelled, test_batches
from common.gpu.policies import six_views
from common.noise import POSTERIOR_TYPES
from common.runs import cli, selection_report
from common.runs.cli import UserError
from common.runs.run import Run, run_name
from common.runs.selection_report import Selected
from sanm.activation import concentration_statistics, map_concentrations
from sanm.flags import add_mask_flags, mask_rule, settle_mask_flags
from sanm.losses import ramp_up
from sanm.masking import MaskRule, draw_masks, mask
from sanm.mixmatch import Samples
from sanm.networks import ARCHS, BASES, MaskedNetwork, make_network
from sanm.selection import HISTORY, averages_history, clean_probability, divide, normalised, remember
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
NOISE_TYPES = {"sym": "symmetric_inclusive", "asym": "asymmetric"}
BASE_NAMES = {"dividemix": "DivideMix", "c2d": "C2D"}
CLIP = 1.0  # largest gradient norm of the warm-up
STATISTICS = ("selected", "auc", "precision", "recall")


def make_parser() -> cli.Parser:
    """The release's flags and defaults, flags for its single quirks, and the flags all scripts share."""
    parser = cli.Parser(prog="Train_cifar.py", description=__doc__)
    data = parser.add_argument_group("data and label noise")
    data.add_argument(
        "--dataset",
        default="cifar10",
        help="cifar10, cifar100, digits, mnist, fashion_mnist, or NAME for DATA_PATH/NAME.npz",
    )
    data.add_argument(
        "--data_path", default="./data", metavar="DIR", type=cli.place, help="where the data sets are"
    )
    data.add_argument(
        "--noise_mode",
        choices=["sym", "asym", *POSTERIOR_TYPES, "given"],
        default="sym",
        help="sym: a class drawn from all; asym: the look-alike, on CIFAR-100 another class of the superclass; "
        f"{posterior.HELP}; given: the labels of --noise_file or of the .npz",
    )
    data.add_argument(
        "--r",
        type=cli.fraction,
        default=0.5,
        help="noise rate: share of samples that get a new label. From 0.9 on, clean probabilities come from the mean of the "
        "last 5 loss vectors (the 90 %% rule); with labels from a file --r decides only this",
    )
    posterior.add_flag(data)
    data.add_argument("--num_class", type=cli.count, default=10, help="ignored: the data set decides")
    data.add_argument("--check_path", default="", help="ignored, as in the release: logs go to --out")
    data.add_argument("--id", default="", help="ignored, as in the release")

    base = parser.add_argument_group("base")
    base.add_argument(
        "--base",
        choices=BASES,
        default="c2d",
        help="c2d: SimCLR-style ResNet-18 from a pre-trained encoder; dividemix: PreAct ResNet-18 from random weights",
    )
    base.add_argument(
        "--arch",
        choices=ARCHS,
        default="auto",
        help="auto: the base's network, narrow below 16 pixels; narrow: of --base dividemix, a PreAct ResNet of three blocks at "
        "any size",
    )
    base.add_argument(
        "--pretrained",
        metavar="FILE|none",
        type=cli.place,
        help="the encoder of --base c2d: encoder.safetensors of pretrain.py or a published SimCLR checkpoint; "
        "by default pretrained/ckpt_DATASET_resnet18.pth, as in the release",
    )
    base.add_argument(
        "--released-softmax",
        action=BooleanOptionalAction,
        help="--base c2d returns probabilities, of which softmax is taken once more; by default under --fidelity released",
    )
    base.add_argument(
        "--selection",
        choices=["gmm", "none"],
        default="gmm",
        help="none: no split, the warm-up goes on to the end: cross-entropy of the same network",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch_size",
        type=cli.count,
        default=64,
        help="labelled = unlabelled batch; warm-up uses twice that",
    )
    training.add_argument(
        "--lr", "--learning_rate", type=cli.positive, default=0.02, help="initial learning rate"
    )
    training.add_argument(
        "--lr_drop", type=cli.count, default=150, help="epoch, counted from 0, that a tenth of it begins with"
    )
    training.add_argument(
        "--num_epochs", type=cli.count, default=360, help="the last epoch, counted from 0, as in the release"
    )
    training.add_argument(
        "--warm_up", type=cli.count, help="epochs of warm-up; by default 10, and 20 on cifar100"
    )
    training.add_argument(
        "--warm-up-views",
        choices=["strong", "weak"],
        default="strong",
        help="strong: colour jitter, crop, flip and affine, as in the release; weak: crop and flip, as DivideMix and C2D",
    )
    training.add_argument(
        "--alpha", type=cli.positive, default=4, help="parameter of the Beta distribution of the mixture"
    )
    training.add_argument(
        "--lambda_u", type=cli.non_negative, default=25, help="final weight of the unlabelled loss"
    )
    training.add_argument("--T", type=cli.positive, default=0.5, help="sharpening temperature")
    training.add_argument(
        "--p_threshold", type=cli.fraction, default=0.5, help="clean probability above which a label is kept"
    )
    training.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")

    masks = add_mask_flags(parser, MaskRule(), recon_weight=0.02)
    masks.add_argument(
        "--ref-views",
        choices=["strong", "weak"],
        default="strong",
        help="the views that give targets, maps and masked images: AutoAugment as in the release, or crop and flip",
    )
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    settle_mask_flags(parser, args)
    if args.noise_file:
        args.noise_mode = "given"
    posterior.check_flag(parser, args, args.noise_mode, "--noise_mode")
    if args.arch == "narrow" and args.base == "c2d":
        parser.error(
            "argument --arch: narrow is for --base dividemix; encoders for --base c2d are of another shape"
        )
    if args.base == "dividemix" and args.pretrained not in (None, "none"):
        parser.error(f"argument --pretrained: is for --base c2d, got {args.pretrained} with --base dividemix")
    if args.released_softmax is None:
        args.released_softmax = args.fidelity == "released" and args.base == "c2d"
    if args.released_softmax and args.base == "dividemix":
        parser.error("argument --released-softmax: --base dividemix returns logits in the release too")
    if args.warm_up is None:
        args.warm_up = 20 if args.dataset == "cifar100" else 10
    return args


def note_schedule(args: Namespace) -> None:
    """Say so where a schedule made for 361 epochs does not fit the number asked for."""
    if args.selection == "gmm" and args.warm_up > args.num_epochs:
        print(f"note: warm-up only, --warm_up {args.warm_up} is not within --num_epochs {args.num_epochs}")
    if args.lr_drop > args.num_epochs:
        print(
            f"note: the learning rate never drops, --lr_drop {args.lr_drop}, --num_epochs {args.num_epochs}"
        )


def uses_history(args: Namespace) -> bool:
    """Whether the 90 % rule holds. Labels from a file do not set --r, so for them it holds only where --r is typed."""
    return averages_history(args.r, args.fidelity == "released")


def note_quality(args: Namespace) -> None:
    """Say what the clean probabilities are estimated from."""
    if uses_history(args):
        print(
            f"90 % rule on, --r {args.r}: clean probabilities come from the mean of the last {HISTORY} loss vectors"
        )
    else:
        given = args.noise_mode == "given"
        more = " (given labels do not set --r: type --r 0.9 if 90 % are wrong)" if given else ""
        print(f"90 % rule off, --r {args.r}: clean probabilities come from the losses of each epoch{more}")


def observed_labels(data: Data, index: np.ndarray, args: Namespace) -> np.ndarray:
    """The labels that training sees, int [n], of the training images at `index` [section 2].

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
    """The network of the base for a data set's images, its encoder pre-trained where the base has it so [sections 3 and 10].

    UserError: no pre-trained encoder there, or one that does not fit.
    """
    channels, size = data.train.images.shape[3], data.train.images.shape[1]
    network = make_network(args.base, data.num_classes, channels, size, args.released_softmax, args.arch)
    if args.base == "c2d" and args.pretrained != "none":
        load_encoder(network.encoder, pretrained_file(args))
    return network


def pretrained_file(args: Namespace) -> Path:
    """Where the encoder is read from; the release reads CIFAR-10's for CIFAR-100 too. UserError: not there."""
    if args.pretrained:
        return Path(args.pretrained)
    name = "cifar10" if args.fidelity == "released" else args.dataset
    usual = Path("pretrained") / f"ckpt_{name}_resnet18.pth"
    if not usual.is_file():
        raise UserError(
            f"--base c2d begins from a pre-trained encoder, and there is no {usual}: make one with "
            f"python sanm/pretrain.py --dataset {args.dataset} and name its encoder.safetensors with --pretrained FILE, "
            "or use --pretrained none or --base dividemix"
        )
    return usual


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

    def crop(self):
        """The crop-and-flip that all training views begin with."""
        return training_augmentation(self.args.dataset, self.train.pixels.shape[2])


def label_quality(network: MaskedNetwork, history: list[Tensor], epoch: int, s: Setting) -> Tensor:
    """The clean probability of each sample by one network's losses on plain images, float64 [N] [section 6].

    history: the network's loss vectors of earlier epochs; this epoch's is added to it.
    """
    plain = s.run.progress(Batches(s.train, 512), f"epoch {epoch} losses", training=False)
    losses = normalised(sample_losses(network, plain, s.labels, len(s.labels), s.device))
    history[:] = remember(history, losses)
    if uses_history(s.args):
        losses = torch.stack(history).mean(dim=0)
    return clean_probability(losses, int(s.draws.integers(2**31)))


def six_as_samples(views: tuple[Tensor, ...], clean: Tensor) -> Samples:
    """AutoAugment and RandAugment views are trained on, the reference views make targets, maps and masks [section 2.1]."""
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
    """One epoch of training on the split that the peer's losses made [section 4]: each step's losses [steps, 5]."""
    args = s.args
    augmentation = partial(six_views, crop=s.crop(), weak_reference=args.ref_views == "weak")
    labelled = s.batches(args.batch_size, augmentation, subset=selected.nonzero()[:, 0])
    unlabelled = s.batches(args.batch_size, augmentation, subset=(~selected).nonzero()[:, 0])
    steps = int(selected.sum()) // args.batch_size + 1  # num_iter of the release's ramp
    rule = mask_rule(args)
    step = Step(
        six_as_samples,
        masks=Masks(draw_masks, mask, rule, s.loader) if args.masking == "adversarial" else None,
        draw_share=lambda: s.draws.beta(args.alpha, args.alpha),
        draw_permutation=lambda rows: torch.randperm(rows, generator=s.loader, device=s.device.device),
        weight=lambda number: ramp_up(args.lambda_u, epoch + number / steps, args.warm_up),
        temperature=args.T,
        reconstruction_weight=args.recon_weight,
        device=s.device,
    )
    return train_divided(
        network,
        peer,
        optimizer,
        s.run.progress(labelled, f"epoch {epoch} training"),
        unlabelled.endless(),
        step,
        labels=s.labels,
        clean=clean,
    )


def split_statistics(
    clean: list[Tensor], selected: list[Tensor], right: np.ndarray
) -> dict[str, float | None]:
    """Columns net1_..., net2_... of the log, None in warm-up: labelled samples; AUC of the clean probability, and precision
    and recall of the selection, against the labels that are right, bool [N]."""
    columns = {}
    for number in (1, 2):
        report = dict.fromkeys(STATISTICS)
        if clean:
            probability, chosen = (of[number - 1].cpu().numpy() for of in (clean, selected))
            report["selected"] = int(chosen.sum())
            report["precision"] = float(right[chosen].mean())
            if 0 < right.sum() < len(right):
                report["auc"] = float(roc_auc_score(right, probability))
                report["recall"] = float(chosen[right].mean())
        columns |= {f"net{number}_{name}": value for name, value in report.items()}
    return columns


def training_index(data: Data, args: Namespace) -> np.ndarray:
    """Positions of the images that are trained on, int [N]. UserError: too few to be split."""
    index = datasets.limited(np.arange(len(data.train.labels)), args.limit_train, args.seed)
    if args.selection == "gmm" and len(index) < 2:
        raise UserError(f"--limit_train {args.limit_train}: one image cannot be split into two sets")
    return index


@cli.script
def main(argv=None) -> None:
    """Train SANM and write its run directory."""
    args = parse_args(argv)
    note_schedule(args)
    if args.selection == "gmm":
        note_quality(args)
    device = gpu.pick(args.device, args.precision, args.gpuid, fidelity=args.fidelity)
    data = datasets.load(args.dataset, args.data_path)
    index = training_index(data, args)
    clean_labels, observed = data.train.labels[index], observed_labels(data, index, args)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    nets = [initial_network(data, args) for _ in range(2)]
    run = Run(
        args, device, paper="sanm", method=method(args), name=directory_name(args), cell=cell(args, data)
    )
    run.save_labels(index, clean_labels, observed, data.num_classes)

    train = Images(data.train.images[index], data.mean, data.std, device.device)
    tests = test_batches(data, args.limit_test, args.seed, 512, device.device)
    test, test_labels = tests.limited
    labels, right = (torch.from_numpy(y).to(device.device) for y in (observed, observed == clean_labels))
    nets = [device.prepare(net, args.compile) for net in nets]
    optimizers = [SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=5e-4) for net in nets]
    loader, draws = device.generator(args.seed), np.random.default_rng(args.seed)
    memory = {"history": [[], []], "clean": [None, None]}
    memory["streaks"] = selection_report.no_streaks(2, data.num_classes)
    run.resume({"nets": nets, "optimizers": optimizers, "loader": loader, "draws": draws, "memory": memory})
    memory["history"] = [[losses.to(device.device) for losses in kept] for kept in memory["history"]]
    s = Setting(args, device, run, train, labels, loader, draws)
    note_warm_up(s)

    for number in run.epochs(args.num_epochs + 1):
        epoch = number - 1  # the release counts from 0
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(epoch, args.lr, args.lr_drop)
        if epoch < args.warm_up or args.selection == "none":
            clean, selected = [], []
            losses = [warm_up_epoch(*pair, epoch, s) for pair in zip(nets, optimizers, strict=True)]
            parts = [float(torch.cat(losses).mean()), None, None, None, None]
        else:
            # both networks judge the labels before either is trained
            clean = [label_quality(nets[i], memory["history"][i], epoch, s) for i in (0, 1)]
            selected = [divide(quality, args.p_threshold) for quality in clean]
            losses = [
                co_divide(nets[i], nets[1 - i], optimizers[i], clean[1 - i], selected[1 - i], epoch, s)
                for i in (0, 1)
            ]
            parts = torch.cat(losses).mean(dim=0).tolist()
            memory["clean"] = clean
        chosen = [Selected(own, labels, right) for own in selected]
        memory["streaks"] = selection_report.follow(memory["streaks"], chosen, "a longer --warm_up")
        scores = network_scores(nets, test, len(test_labels), data.num_classes, device)
        report = {"loss": parts[0], "test_accuracy": accuracy(scores.sum(dim=0), test_labels)}
        report |= split_statistics(clean, selected, observed == clean_labels)
        report |= {f"net{i + 1}_accuracy": accuracy(scores[i], test_labels) for i in (0, 1)}
        names = ("labelled_loss", "unlabelled_loss", "prior_loss", "reconstruction_loss")
        report |= dict(zip(names, parts[1:], strict=True))
        report |= selection_report.columns(chosen)
        run.log(number, **report, lr=optimizers[0].param_groups[0]["lr"])

    save_clean_probability(run, memory, observed, clean_labels)
    run.finish(**final_metrics(nets, observed == clean_labels, tests.whole, data.num_classes, s))


def save_clean_probability(run: Run, memory: dict, observed: np.ndarray, clean: np.ndarray) -> None:
    """Write clean_probability.npz, of a run that selected."""
    if memory["clean"][0] is not None:
        first, second = (probability.cpu().numpy() for probability in memory["clean"])
        run.save_arrays("clean_probability", net1=first, net2=second, observed=observed, clean=clean)


def final_metrics(
    nets: list[MaskedNetwork], right: np.ndarray, whole: Labelled, num_classes: int, s: Setting
) -> dict[str, float | None]:
    """What the result says beside the test accuracy by epoch. right: bool [N]; whole: all test images."""
    metrics = {f"last_net1_{name}": s.run.rows[-1][f"net1_{name}"] for name in STATISTICS}
    metrics |= {} if s.run.is_finished() else map_statistics(nets[0], right, s)
    return metrics | s.run.full_test(partial(full_test, nets, whole, num_classes, s.device))


def map_statistics(network: MaskedNetwork, right: np.ndarray, s: Setting) -> dict[str, float | None]:
    """Whether the activation maps of plain training images with right labels differ from the others; right: bool [N]."""
    plain = s.run.progress(Batches(s.train, 512), "activation maps", training=False)
    values = map_concentrations(network, plain, len(s.labels), s.device)
    return concentration_statistics(values, torch.from_numpy(right).to(s.device.device))


def full_test(
    nets: list[MaskedNetwork], whole: Labelled, num_classes: int, device: gpu.Device
) -> dict[str, float]:
    """Accuracy on all test images by the sum of both networks' scores, for --full_test_at_end."""
    scores = network_scores(nets, whole.batches, len(whole.labels), num_classes, device)
    return {"full_test": accuracy(scores.sum(dim=0), whole.labels), "full_test_images": len(whole.labels)}


def note_warm_up(s: Setting) -> None:
    """Say so where a selection follows a warm-up of few steps."""
    if s.args.selection == "gmm" and s.args.warm_up <= s.args.num_epochs:
        steps = s.args.warm_up * len(s.batches(2 * s.args.batch_size, s.crop()))
        selection_report.note_short_warm_up(steps, f"--warm_up {s.args.warm_up}")


def warm_up_epoch(network: MaskedNetwork, optimizer: SGD, epoch: int, s: Setting) -> Tensor:
    """Cross-entropy on all samples; under asymmetric noise with a penalty on confident predictions [section 4]."""
    view = partial(warm_up_view, crop=s.crop()) if s.args.warm_up_views == "strong" else s.crop()
    batches = s.batches(2 * s.args.batch_size, view)
    return warm_up(
        network,
        optimizer,
        s.run.progress(batches, f"epoch {epoch} warm-up"),
        s.labels,
        s.device,
        penalise_confidence=s.args.noise_mode == "asym",
        clip=CLIP,
    )


def method(args: Namespace) -> str:
    """What a result row calls the method."""
    if args.selection == "none":
        return "CE"
    base = BASE_NAMES[args.base]
    without = " without reconstruction" if args.recon_weight == 0 else ""
    return f"SANM({base}){without}" if args.masking == "adversarial" else base


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, noise, base and seed, then whatever differs from the defaults."""
    fidelity = ["fidelity"] if args.fidelity == "released" else []
    always = ("dataset", "noise_mode", "r", "base", *fidelity, "seed")
    words = ["--dataset", args.dataset, "--base", args.base, "--fidelity", args.fidelity]
    return run_name(args, vars(parse_args(words)), always)


def cell(args: Namespace, data: Data) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    given = args.noise_mode == "given"
    profile = "embedded" if args.dataset == "digits" else "paper" if args.num_epochs >= 360 else "short"
    return {
        "dataset": data.name,
        "noise_type": Path(args.noise_file).name if args.noise_file else args.noise_mode,
        "noise_rate": None if given else args.r,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": profile,
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
