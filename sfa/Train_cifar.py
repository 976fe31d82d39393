"""Stochastic Feature Averaging on CIFAR-10/100 with long-tailed noisy labels (IJCAI 2023); also on the embedded digits.

    python sfa/Train_cifar.py --dataset digits                                # minutes on a laptop, no data needed
    python sfa/Train_cifar.py --noise_ratio 0.5 --imb_factor 0.01             # CIFAR-10 under ./data
    python sfa/Train_cifar.py --selection gmm                                 # DivideMix's selection in the place of SFA's
    python sfa/Train_cifar.py --loss gce                                      # SFA with a noise-robust loss

The sections in brackets are those of the method's description in sfa/README.md.
"""

import random
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.optim import SGD

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets, noise
from common.datasets import Data, posterior
from common.gpu import device as gpu
from common.gpu.augment import training_augmentation
from common.gpu.loader import Batches, Images, Labelled, test_batches
from common.gpu.mixture import sklearn_upper_posterior, upper_posterior
from common.runs import cli, selection_report
from common.runs.cli import UserError
from common.runs.run import Run, run_name
from common.runs.selection_report import Selected
from sfa import losses as standard_losses
from sfa.evaluation import SELECTION_STATISTICS, SHOTS, accuracies, selection_statistics
from sfa.flags import add_averaging_flags
from sfa.losses import ramp_up
from sfa.networks import CosineHead, PreActResNet, preact_resnet18, preact_resnet_narrow
from sfa.selection import (
    Moments,
    Selection,
    confidence_threshold,
    incoming_moments,
    stochastic_feature_averaging,
)
from sfa.small_loss import SmallLoss, small_loss_selection
from sfa.training import features_and_confidence, sample_losses, summed_logits, train_semi, warm_up

PRESETS = Path(__file__).with_name("presets.toml")
SELECTIONS = {"sfa": "SFA", "gmm": "GMM", "none": "no selection"}  # as a result row calls them
LOSSES = {
    "ce": "CE",
    "ldam": "LDAM",
    "gce": "GCE",
    "sce": "SCE",
    "logit_adjusted": "logit adjustment",
    "balanced_softmax": "balanced softmax",
}
POSTERIORS = {"em": upper_posterior, "sklearn": sklearn_upper_posterior}


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
        "--imb_type", choices=["exp", "step", "none"], default="exp", help="shape of the long tail"
    )
    data.add_argument("--imb_factor", type=cli.positive, default=0.01, help="smallest class / largest class")
    data.add_argument(
        "--noise_mode",
        choices=["imb", "sym", *noise.POSTERIOR_TYPES, "given"],
        default="imb",
        help="imb: flips follow the class sizes; sym: all other classes alike; "
        f"{posterior.HELP}; given: the labels of --noise_file or of the .npz",
    )
    data.add_argument(
        "--noise_ratio", type=cli.fraction, default=0.5, help="fraction of labels that are flipped"
    )
    posterior.add_flag(data)
    data.add_argument(
        "--num_class", type=cli.count, default=10, help="ignored, as in the release: the data set decides"
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch_size", type=cli.count, default=64, help="batch size; warm-up uses twice that"
    )
    training.add_argument(
        "--lr", "--learning_rate", type=cli.positive, default=0.02, help="initial learning rate"
    )
    training.add_argument(
        "--lr_drop", type=cli.count, default=150, help="the learning rate is a tenth after this epoch"
    )
    training.add_argument("--num_epochs", type=cli.count, default=200, help="epochs, warm-up included")
    training.add_argument("-w", "--warm_up", type=cli.count, default=30, help="epochs of warm-up")
    training.add_argument(
        "--alpha", type=cli.positive, default=4, help="parameter of the Beta distribution of the mixture"
    )
    training.add_argument(
        "--lambda_u", type=cli.non_negative, default=25, help="final weight of both unlabelled losses"
    )
    training.add_argument("--T", type=cli.positive, default=0.5, help="sharpening temperature")
    training.add_argument(
        "--arch",
        choices=["resnet18", "narrow"],
        default="resnet18",
        help="resnet18: PreAct ResNet-18, its narrow form on images below 16 pixels; narrow: that form at any size",
    )
    training.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")

    loss = parser.add_argument_group("loss of the standard head")
    loss.add_argument(
        "--loss",
        choices=list(LOSSES),
        default="ce",
        help="on observed labels and on the labelled rows; robust to the distribution of classes: ldam, logit_adjusted, "
        "balanced_softmax; to label noise: gce, sce",
    )
    loss.add_argument("--ldam_margin", type=cli.positive, default=0.5, help="ldam: of the rarest class")
    loss.add_argument("--ldam_scale", type=cli.positive, default=30, help="ldam: of the cosines")
    loss.add_argument("--gce_q", type=cli.positive, default=0.7, help="gce: exponent, at most 1")
    loss.add_argument(
        "--sce_ce", type=cli.non_negative, help="sce: weight of CE, by default 0.1; 6 on cifar100"
    )
    loss.add_argument(
        "--sce_rce", type=cli.non_negative, help="sce: weight of reverse CE, by default 1; 0.1 on cifar100"
    )
    loss.add_argument(
        "--adjustment_tau", type=cli.positive, default=1, help="logit_adjusted: weight of the log prior"
    )

    selection = parser.add_argument_group("selection of clean samples")
    selection.add_argument(
        "--selection",
        choices=list(SELECTIONS),
        default="sfa",
        help="sfa: stochastic feature averaging; gmm: DivideMix's small losses; none: all labels are trained on as they are",
    )
    add_averaging_flags(
        selection, beta=0.99, min_draw_count=None, classes_drawn="; by default 300, and 9 on digits"
    )
    selection.add_argument(
        "--mixture",
        choices=list(POSTERIORS),
        default="em",
        help="em: all classes at once on the device; sklearn: the reference path",
    )
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    if args.imb_factor > 1:
        parser.error(f"argument --imb_factor: must be at most 1, got {args.imb_factor}")
    if args.gce_q > 1:
        parser.error(f"argument --gce_q: must be at most 1, got {args.gce_q}")
    if args.noise_file:
        args.noise_mode = "given"
    posterior.check_flag(parser, args, args.noise_mode, "--noise_mode")
    # Wang et al. weigh the two for CIFAR-100 the other way round
    weights = (6, 0.1) if args.dataset == "cifar100" else (0.1, 1)
    args.sce_ce = weights[0] if args.sce_ce is None else args.sce_ce
    args.sce_rce = weights[1] if args.sce_rce is None else args.sce_rce
    if args.ema_mode is None:
        args.ema_mode = "released" if args.fidelity == "released" else "persist"
    if args.min_draw_count is None:
        # 300 of CIFAR-10's 5000 images per class, scaled to the 143 of digits
        args.min_draw_count = 9 if args.dataset == "digits" else 300
    return args


def note_schedule(args: Namespace) -> None:
    """Say so where a schedule made for 200 epochs does not fit the number asked for."""
    if args.warm_up >= args.num_epochs and args.selection != "none":
        print(f"note: warm-up only, --warm_up {args.warm_up} is not below --num_epochs {args.num_epochs}")
    if args.lr_drop >= args.num_epochs:
        print(
            f"note: the learning rate never drops, --lr_drop {args.lr_drop}, --num_epochs {args.num_epochs}"
        )


def long_tailed_noisy(data: Data, args: Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The long-tailed noisy training set [Sec. 2]: positions in data.train [N], clean labels [N], observed labels [N]."""
    labels, num_classes = data.train.labels, data.num_classes
    python_rng, rng = random.Random(args.seed), np.random.RandomState(args.seed)
    counts = noise.class_counts(len(labels), num_classes, args.imb_type, args.imb_factor)
    if args.imb_type == "none":
        # the same on balanced data; all there is on other data
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
    kept = datasets.limited(np.arange(len(index)), args.limit_train, args.seed)
    return index[kept], clean[kept], observed[kept]


def make_network(data: Data, args: Namespace) -> PreActResNet:
    """The two-headed network for a data set's images [Sec. 3.1]."""
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


def standard_loss(args: Namespace) -> Callable[..., torch.Tensor]:
    """The loss of the standard head [Sec. 9]."""
    return {
        "ce": standard_losses.cross_entropy,
        "ldam": partial(standard_losses.ldam, largest_margin=args.ldam_margin, scale=args.ldam_scale),
        "gce": partial(standard_losses.generalised_cross_entropy, q=args.gce_q),
        "sce": partial(
            standard_losses.symmetric_cross_entropy, ce_weight=args.sce_ce, rce_weight=args.sce_rce
        ),
        "logit_adjusted": partial(standard_losses.logit_adjusted, tau=args.adjustment_tau),
        "balanced_softmax": standard_losses.balanced_softmax,
    }[args.loss]


class Setting(NamedTuple):
    """What every pass over the training set shares."""

    args: Namespace
    device: gpu.Device
    run: Run
    train: Images
    labels: torch.Tensor  # observed, int [N]
    loader: torch.Generator  # shuffles, crops, flips and mixing partners
    draws: np.random.Generator  # centroids and mixture weights

    def batches(self, size: int, **options) -> Batches:
        """Shuffled, augmented batches of the training set."""
        augmentation = training_augmentation(self.args.dataset, self.train.pixels.shape[2])
        return Batches(
            self.train, size, shuffle=True, augmentation=augmentation, generator=self.loader, **options
        )


def note_warm_up(s: Setting) -> None:
    """Say so where a selection follows a warm-up of few steps."""
    if s.args.selection != "none" and s.args.warm_up < s.args.num_epochs:
        steps = s.args.warm_up * len(s.batches(2 * s.args.batch_size))
        selection_report.note_short_warm_up(steps, f"--warm_up {s.args.warm_up}")


def select(
    network: PreActResNet, moments: Moments | None, num_classes: int, epoch: int, s: Setting
) -> Selection | SmallLoss:
    """Clean samples in the eyes of one network [Sec. 6]: features of the plain images, then feature averaging.

    Or, to compare with, small losses of the plain images [Sec. 9].
    """
    args = s.args
    ordered = s.run.progress(
        Batches(s.train, 4 * args.batch_size), f"epoch {epoch} selection", training=False
    )
    if args.selection == "gmm":
        losses, seed = sample_losses(network, ordered, s.labels, s.device), int(s.draws.integers(2**31))
        return small_loss_selection(losses, s.labels, num_classes, p_threshold=args.p_threshold, seed=seed)
    features, confidence = features_and_confidence(network, ordered, s.labels, s.device)
    normals = s.draws.normal(size=(args.sample_rate, num_classes, features.shape[1]))
    return stochastic_feature_averaging(
        features,
        s.labels,
        confidence,
        moments,
        normals=torch.from_numpy(normals).to(s.device.device),
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
    s: Setting,
) -> torch.Tensor:
    """One epoch of semi-supervised training of a network on the split its peer made [Sec. 4]: each step's total loss."""
    args = s.args
    if not split.selected.any():
        print(f"warning: epoch {epoch}: no sample selected, one network is not trained", file=sys.stderr)
        return torch.empty(0, device=s.device.device)
    confident, doubtful = split.selected.nonzero()[:, 0], (~split.selected).nonzero()[:, 0]
    labelled = s.batches(args.batch_size, subset=confident, views=2)
    unlabelled = s.batches(args.batch_size, subset=doubtful, views=2).endless() if len(doubtful) else None
    steps = len(confident) // args.batch_size + 1  # num_iter of the release's ramp
    losses = train_semi(
        network,
        peer,
        optimizer,
        s.run.progress(labelled, f"epoch {epoch} training"),
        unlabelled,
        labels=s.labels,
        clean=split.clean,
        class_counts=split.counts,
        weight=lambda step: ramp_up(args.lambda_u, epoch + step / steps, args.warm_up),
        draw_lam=lambda: s.draws.beta(args.alpha, args.alpha),
        draw_permutation=lambda rows: torch.randperm(rows, generator=s.loader, device=s.device.device),
        temperature=args.T,
        device=s.device,
        loss=standard_loss(args),
    )
    return losses[:, 0]


def selection_columns(
    selections: list[Selection | SmallLoss], observed: np.ndarray, clean: np.ndarray
) -> dict[str, float | None]:
    """Columns net1_..., net2_... of the log: selection statistics and the number of drawn classes; None in warm-up.

    Without drawn classes where none was drawn, since losses were looked at.
    """
    columns = {}
    for i in (1, 2):
        report = dict.fromkeys((*SELECTION_STATISTICS, "drawn_classes"))
        if selections:
            found = selections[i - 1]
            arrays = found.clean.cpu().numpy(), found.selected.cpu().numpy()
            report |= selection_statistics(*arrays, observed, clean, len(found.counts))
            report["drawn_classes"] = int(found.drawn.sum()) if isinstance(found, Selection) else None
        columns |= {f"net{i}_{name}": value for name, value in report.items()}
    return columns


@cli.script
def main(argv=None) -> None:
    """Train SFA and write its run directory."""
    args = parse_args(argv)
    note_schedule(args)
    device = gpu.pick(args.device, args.precision, args.gpuid, fidelity=args.fidelity)
    data = datasets.load(args.dataset, args.data_path)
    index, clean, observed = long_tailed_noisy(data, args)
    run = Run(
        args, device, paper="sfa", method=method(args), name=directory_name(args), cell=cell(args, data)
    )
    run.save_labels(index, clean, observed, data.num_classes)

    train = Images(data.train.images[index], data.mean, data.std, device.device)
    tests = test_batches(data, args.limit_test, args.seed, 4 * args.batch_size, device.device)
    labels, right = (torch.from_numpy(of).to(device.device) for of in (observed, observed == clean))
    observed_counts = torch.bincount(labels, minlength=data.num_classes)

    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    nets = [device.prepare(make_network(data, args), args.compile) for _ in range(2)]
    optimizers = [SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=5e-4) for net in nets]
    loader, draws = device.generator(args.seed), np.random.default_rng(args.seed)
    memory = {"moments": [None, None], "clean": [None, None], "centroids": []}
    memory["streaks"] = selection_report.no_streaks(2, data.num_classes)
    run.resume({"nets": nets, "optimizers": optimizers, "loader": loader, "draws": draws, "memory": memory})
    s = Setting(args, device, run, train, labels, loader, draws)
    loss = standard_loss(args)
    note_warm_up(s)

    for epoch in run.epochs(args.num_epochs):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.lr if epoch <= args.lr_drop else args.lr / 10
        if epoch <= args.warm_up or args.selection == "none":
            selections, losses = [], []
            for net, optimizer in zip(nets, optimizers, strict=True):
                batches = run.progress(s.batches(2 * args.batch_size), f"epoch {epoch} warm-up")
                losses.append(warm_up(net, optimizer, batches, labels, observed_counts, device, loss))
        else:
            known = [None if kept is None else Moments(*kept) for kept in memory["moments"]]
            moments = [incoming_moments(kept, args.ema_mode, device.device) for kept in known]
            # both networks select before either is trained
            selections = [select(nets[i], moments[i], data.num_classes, epoch, s) for i in (0, 1)]
            losses = [
                co_divide(nets[i], nets[1 - i], optimizers[i], selections[1 - i], epoch, s) for i in (0, 1)
            ]
            if args.selection == "sfa":
                memory["moments"] = [list(found.moments) for found in selections]
                memory["centroids"].append(selections[0].centroids.mean(dim=0).half().cpu())  # to look at
            memory["clean"] = [found.clean for found in selections]
        chosen = [Selected(found.selected, labels, right) for found in selections]
        memory["streaks"] = selection_report.follow(memory["streaks"], chosen, "a longer --warm_up")
        report = test(nets, tests.limited, observed_counts, device)
        classes = {name: report.pop(name) for name in list(report) if name.startswith("class_")}
        losses = torch.cat(losses)
        mean_loss = float(losses.mean()) if len(losses) else None
        report |= selection_columns(selections, observed, clean) | selection_report.columns(chosen)
        run.log(epoch, loss=mean_loss, **report, **classes)

    save_selection(run, memory, observed, clean)
    last = [f"{shot}_accuracy" for shot in SHOTS]
    last += [f"net1_{name}" for name in ("precision", "recall", "auc", *(f"{shot}_recall" for shot in SHOTS))]
    full = run.full_test(lambda: full_test(nets, tests.whole, observed_counts, device))
    run.finish(**{f"last_{name}": run.rows[-1][name] for name in last}, **full)


def save_selection(run: Run, memory: dict, observed: np.ndarray, clean: np.ndarray) -> None:
    """Write clean_probability.npz and centroids.npz, of a run that selected."""
    if memory["clean"][0] is not None:
        first, second = (probability.cpu().numpy() for probability in memory["clean"])
        run.save_arrays("clean_probability", net1=first, net2=second, observed=observed, clean=clean)
    if memory["centroids"]:
        run.save_arrays("centroids", net1=torch.stack(memory["centroids"]).numpy())


def test(
    nets: list[PreActResNet], tested: Labelled, observed_counts: torch.Tensor, device: gpu.Device
) -> dict[str, float]:
    """Accuracies in percent by the summed logits of both networks: overall, by shot and by class [Sec. 8]."""
    labels = tested.labels.cpu().numpy()
    logits = summed_logits(nets, tested.batches, len(labels), len(observed_counts), device)
    return accuracies(logits.argmax(dim=1).cpu().numpy(), labels, observed_counts.cpu().numpy())


def full_test(
    nets: list[PreActResNet], whole: Labelled, observed_counts: torch.Tensor, device: gpu.Device
) -> dict[str, float]:
    """The accuracies on all test images, overall and by shot, for --full_test_at_end."""
    report = test(nets, whole, observed_counts, device)
    shots = {f"full_test_{shot}_accuracy": report[f"{shot}_accuracy"] for shot in SHOTS}
    return {"full_test": report["test_accuracy"], "full_test_images": len(whole.labels), **shots}


def method(args: Namespace) -> str:
    """What a result row calls the method."""
    usual = "released" if args.fidelity == "released" else "persist"
    moments = f" (ema_mode {args.ema_mode})" if args.selection == "sfa" and args.ema_mode != usual else ""
    return SELECTIONS[args.selection] + moments + (f" + {LOSSES[args.loss]}" if args.loss != "ce" else "")


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, noise and seed, then whatever differs from the defaults."""
    always = ("dataset", "imb_type", "imb_factor", "noise_mode", "noise_ratio", "seed")
    return run_name(args, vars(parse_args(["--dataset", args.dataset])), always)


def cell(args: Namespace, data: Data) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    given = args.noise_mode == "given"
    profile = "embedded" if args.dataset == "digits" else "paper" if args.num_epochs >= 200 else "short"
    return {
        "dataset": data.name,
        "noise_type": Path(args.noise_file).name if args.noise_file else args.noise_mode,
        "noise_rate": None if given else args.noise_ratio,
        "imb_factor": args.imb_factor if args.imb_type != "none" else 1.0,
        "ood_ratio": None,
        "profile": profile,
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
