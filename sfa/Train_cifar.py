"""Stochastic Feature Averaging on CIFAR-10/100 with long-tailed noisy labels (IJCAI 2023); also on the embedded digits.

    python sfa/Train_cifar.py --dataset digits                                # minutes on a laptop, no data needed
    python sfa/Train_cifar.py --noise_ratio 0.5 --imb_factor 0.01             # CIFAR-10 under ./data

The sections in brackets are those of the method's description in sfa/README.md.
"""

import random
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run by path, the script uses the clone it stands in

from common import cli, datasets, gpu, noise
from common.augment import training_augmentation
from common.cli import UserError
from common.datasets import Data
from common.loader import Batches, Images
from common.mixture import sklearn_upper_posterior, upper_posterior
from common.run import Run, run_name
from sfa.evaluation import SELECTION_STATISTICS, SHOTS, accuracies, selection_statistics
from sfa.losses import ramp_up
from sfa.networks import PreActResNet, preact_resnet18, preact_resnet_narrow
from sfa.selection import Moments, Selection, confidence_threshold, stochastic_feature_averaging
from sfa.training import features_and_confidence, summed_logits, train_semi, warm_up

PRESETS = Path(__file__).with_name("presets.toml")
POSTERIORS = {"em": upper_posterior, "sklearn": sklearn_upper_posterior}


def make_parser() -> cli.Parser:
    """The release's flags and defaults, flags for its single quirks, and the flags all scripts share."""
    parser = cli.Parser(prog="Train_cifar.py", description=__doc__.splitlines()[0])
    data = parser.add_argument_group("data and label noise")
    data.add_argument(
        "--dataset",
        default="cifar10",
        help="cifar10, cifar100, digits, mnist, fashion_mnist, or NAME for DATA_PATH/NAME.npz",
    )
    data.add_argument("--data_path", default="./data", metavar="DIR", help="where the data sets are")
    data.add_argument(
        "--imb_type", choices=["exp", "step", "none"], default="exp", help="shape of the long tail"
    )
    data.add_argument("--imb_factor", type=cli.positive, default=0.01, help="smallest class / largest class")
    data.add_argument(
        "--noise_mode",
        choices=["imb", "sym", "given"],
        default="imb",
        help="imb: flips follow the class sizes; sym: all other classes alike; given: the labels of --noise_file or of the .npz",
    )
    data.add_argument(
        "--noise_ratio", type=cli.fraction, default=0.5, help="fraction of labels that are flipped"
    )
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
        choices=["resnet18"],
        default="resnet18",
        help="PreAct ResNet-18; its narrow form on images below 16 pixels",
    )
    training.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")

    selection = parser.add_argument_group("stochastic feature averaging")
    selection.add_argument(
        "--p_threshold",
        type=cli.fraction,
        default=0.5,
        help="clean probability above which a sample is selected",
    )
    selection.add_argument(
        "--beta", type=cli.fraction, default=0.99, help="smoothing factor of the running moments"
    )
    selection.add_argument(
        "--phi", type=cli.positive, default=1.005, help="growth of the confidence threshold per epoch"
    )
    selection.add_argument(
        "--sample_rate", type=cli.count, default=1, help="Gaussian draws per class and epoch"
    )
    selection.add_argument(
        "--min_draw_count",
        type=cli.count_or_zero,
        help="classes with more confident samples are drawn; 0: all; by default 300, and 9 on digits",
    )
    selection.add_argument(
        "--ema_mode",
        choices=["persist", "released"],
        help="whether the running moments outlive the epoch; by default released under --fidelity released",
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
    if args.noise_file:
        args.noise_mode = "given"
    if args.ema_mode is None:
        args.ema_mode = "released" if args.fidelity == "released" else "persist"
    if args.min_draw_count is None:
        # 300 of CIFAR-10's 5000 images per class, scaled to the 143 of digits
        args.min_draw_count = 9 if args.dataset == "digits" else 300
    return args


def long_tailed_noisy(data: Data, args: Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The long-tailed noisy training set [Sec. 2]: positions in data.train [N], clean labels [N], observed labels [N]."""
    labels, num_classes = data.train.labels, data.num_classes
    python_rng, rng = random.Random(args.seed), np.random.RandomState(args.seed)
    counts = noise.class_counts(len(labels), num_classes, args.imb_type, args.imb_factor)
    if args.imb_type == "none":
        counts = np.bincount(
            labels, minlength=num_classes
        )  # the same on balanced data; all there is on other data
    index = noise.long_tailed(labels, counts, rng)
    clean = labels[index]
    if args.noise_file:
        given = datasets.read_labels(args.noise_file, (len(labels), len(index)), num_classes)
        observed = given[index] if len(given) == len(labels) else given
    elif args.noise_mode == "given":
        if data.noisy_labels is None:
            raise UserError(
                f"--noise_mode given: {data.name} brings no noisy_labels; name them with --noise_file"
            )
        observed = data.noisy_labels[index]
    else:
        observed = noise.long_tailed_noise(
            args.noise_mode, clean, num_classes, args.noise_ratio, python_rng, rng
        )
    if args.limit_train and args.limit_train < len(index):
        kept = np.sort(np.random.RandomState(args.seed).permutation(len(index))[: args.limit_train])
        index, clean, observed = index[kept], clean[kept], observed[kept]
    return index, clean, observed


def make_network(data: Data) -> PreActResNet:
    """The two-headed network for a data set's images [Sec. 3.1]."""
    height, channels = data.train.images.shape[1], data.train.images.shape[3]
    make = preact_resnet18 if height >= 16 else preact_resnet_narrow
    return make(data.num_classes, channels)


def select(
    network: PreActResNet,
    batches,
    labels: torch.Tensor,
    moments: Moments | None,
    normals: torch.Tensor,
    epoch: int,
    args: Namespace,
    device: gpu.Device,
) -> Selection:
    """Clean samples in the eyes of one network [Sec. 6]."""
    features, confidence = features_and_confidence(network, batches, labels, device)
    return stochastic_feature_averaging(
        features,
        labels,
        confidence,
        moments,
        normals=normals,
        threshold=confidence_threshold(normals.shape[1], args.phi, epoch),
        beta=args.beta,
        min_draw_count=args.min_draw_count,
        p_threshold=args.p_threshold,
        posterior=POSTERIORS[args.mixture],
    )


def selection_columns(
    selections: list[Selection], observed: np.ndarray, clean: np.ndarray
) -> dict[str, float | None]:
    """Columns net1_..., net2_... of the log: selection statistics and the number of drawn classes; None in warm-up."""
    columns = {}
    for i in (1, 2):
        report = dict.fromkeys((*SELECTION_STATISTICS, "drawn_classes"))
        if selections:
            found = selections[i - 1]
            arrays = found.clean.cpu().numpy(), found.selected.cpu().numpy()
            report |= selection_statistics(*arrays, observed, clean, len(found.counts))
            report["drawn_classes"] = int(found.drawn.sum())
        columns |= {f"net{i}_{name}": value for name, value in report.items()}
    return columns


def main(argv=None) -> None:
    """Train SFA and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, args.gpuid)
    data = datasets.load(args.dataset, args.data_path)
    index, clean, observed = long_tailed_noisy(data, args)
    run = Run(args, device, paper="sfa", method="SFA", name=directory_name(args), cell=cell(args, data))
    run.save_labels(index, clean, observed, data.num_classes)

    train = Images(data.train.images[index], data.mean, data.std, device.device)
    test = Batches(Images(data.test.images, data.mean, data.std, device.device), 4 * args.batch_size)
    labels = torch.from_numpy(observed).to(device.device)
    observed_counts = torch.bincount(labels, minlength=data.num_classes)

    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    networks = [device.prepare(make_network(data), args.compile) for _ in range(2)]
    optimizers = [torch.optim.SGD(n.parameters(), args.lr, momentum=0.9, weight_decay=5e-4) for n in networks]
    loader = device.generator(args.seed)  # shuffles, crops, flips and mixing partners
    draws = np.random.default_rng(args.seed)  # centroids, then mixture weights: the release's order
    memory = {"moments": [None, None], "clean": [None, None]}
    run.resume(
        {"networks": networks, "optimizers": optimizers, "loader": loader, "draws": draws, "memory": memory}
    )

    augmentation = training_augmentation(args.dataset, train.pixels.shape[2])
    feature_size = networks[0].heads.standard.in_features

    def batches(size: int, **options) -> Batches:
        return Batches(train, size, shuffle=True, augmentation=augmentation, generator=loader, **options)

    def selection_of(i: int, epoch: int) -> Selection:
        """Steps of Sec. 6 for network i; its running moments and clean probabilities go into the checkpoints."""
        normals = torch.from_numpy(draws.normal(size=(args.sample_rate, data.num_classes, feature_size)))
        ordered = run.progress(
            Batches(train, 4 * args.batch_size), f"epoch {epoch} selection {i + 1}", training=False
        )
        moments = incoming_moments(memory["moments"][i], args.ema_mode, device)
        found = select(networks[i], ordered, labels, moments, normals.to(device.device), epoch, args, device)
        memory["moments"][i], memory["clean"][i] = list(found.moments), found.clean
        return found

    def train_on(i: int, split: Selection, epoch: int) -> torch.Tensor:
        """Network i learns from the split that its peer made (co-divide)."""
        if not split.selected.any():
            print(
                f"warning: epoch {epoch}: no sample selected, network {i + 1} is not trained", file=sys.stderr
            )
            return torch.empty(0, 5, device=device.device)
        confident, doubtful = split.selected.nonzero()[:, 0], (~split.selected).nonzero()[:, 0]
        steps = len(confident) // args.batch_size + 1  # num_iter of the release's ramp
        return train_semi(
            networks[i],
            networks[1 - i],
            optimizers[i],
            run.progress(
                batches(args.batch_size, subset=confident, views=2), f"epoch {epoch} network {i + 1}"
            ),
            batches(args.batch_size, subset=doubtful, views=2).endless() if len(doubtful) else None,
            labels=labels,
            clean=split.clean,
            class_counts=split.counts,
            weight=lambda step: ramp_up(args.lambda_u, epoch + step / steps, args.warm_up),
            draw_mix_weight=lambda: draws.beta(args.alpha, args.alpha),
            draw_permutation=lambda rows: torch.randperm(rows, generator=loader, device=device.device),
            temperature=args.T,
            device=device,
        )

    for epoch in run.epochs(args.num_epochs):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.lr if epoch <= args.lr_drop else args.lr / 10
        if epoch <= args.warm_up:
            selections = []
            losses = [
                warm_up(
                    n,
                    o,
                    run.progress(batches(2 * args.batch_size), f"epoch {epoch} warm-up"),
                    labels,
                    observed_counts,
                    device,
                )
                for n, o in zip(networks, optimizers, strict=True)
            ]
        else:
            selections = [selection_of(0, epoch), selection_of(1, epoch)]  # both before any training
            losses = [train_on(0, selections[1], epoch)[:, 0], train_on(1, selections[0], epoch)[:, 0]]
        predicted = summed_logits(networks, test, device).argmax(dim=1).cpu().numpy()
        report = accuracies(predicted, data.test.labels, observed_counts.cpu().numpy())
        classes = {name: report.pop(name) for name in list(report) if name.startswith("class_")}
        total = torch.cat(losses)
        loss = float(total.mean()) if len(total) else None
        run.log(epoch, loss=loss, **report, **selection_columns(selections, observed, clean), **classes)

    if memory["clean"][0] is not None:
        first, second = (w.cpu().numpy() for w in memory["clean"])
        run.save_arrays("clean_probability", net1=first, net2=second, observed=observed, clean=clean)
    shots = [f"{shot}_accuracy" for shot in SHOTS]
    selection = [f"net1_{name}" for name in ("precision", "recall", "auc")]
    run.finish(**{f"last_{name}": run.rows[-1][name] for name in shots + selection})


def incoming_moments(kept: list[torch.Tensor] | None, ema_mode: str, device: gpu.Device) -> Moments | None:
    """The running moments an epoch starts from; None at the first selection epoch.

    The release rebinds them inside its routine, so that every later epoch starts from zeros (ema_mode released).
    """
    if kept is None:
        return None
    moments = Moments(*(tensor.to(device.device) for tensor in kept))
    return moments if ema_mode == "persist" else Moments(*(torch.zeros_like(tensor) for tensor in moments))


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
