"""Attentive Feature Mixup (ECCV 2020) on Food-101N, Clothing1M, CIFAR-10/100, MNIST and the embedded digits.

    python afm/train.py --preset embedded/digits-sym0.5/afm-k2                # under a minute, no data needed
    python afm/train.py                                                       # Food-101N under ./data/food
    torchrun --nproc_per_node=8 afm/train.py                                  # the same on eight cards

The sections in brackets are those of the method's description in afm/README.md.
"""

import os
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from afm.attention import ATTENTIONS, INTERACTIONS, WEIGHTS, drawn_weights
from afm.data import ON_DISK, Data, load
from afm.grouping import ORDERS, draw_groups
from afm.losses import TARGETS
from afm.networks import NETWORKS, AttentiveFeatureMixup, load_weights, make_network
from afm.training import (
    Epoch,
    attention_of_samples,
    attention_statistics,
    evaluate,
    mean_peak,
    mean_weights,
    pooled_features,
    train_epoch,
    train_epoch_mixing_inputs,
)
from common.datasets import posterior
from common.gpu import device as gpu
from common.gpu import processes
from common.noise import NOISE_TYPES
from common.runs import cli
from common.runs.run import Run, run_name

PRESETS = Path(__file__).with_name("presets.toml")
# what --fidelity decides where the flag is not typed
DEFAULTS = {
    "paper": {"attention": "relu-sigmoid", "mix_target": "soft", "group_order": "random", "group_rounds": 4},
    "released": {"attention": "complement", "mix_target": "both", "group_order": "halves", "group_rounds": 1},
}
ROUNDS = 20  # random groups that a sample's attention is averaged over at the end of a run


def make_parser() -> cli.Parser:
    """The release's flags and defaults, flags for its single quirks and the ablations, and the flags all scripts share."""
    parser = cli.Parser(prog="train.py", description=__doc__)
    add_data_flags(parser)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--network",
        choices=NETWORKS,
        default="resnet50",
        help="backbone; torchvision's have a 3x3 stem below 64 pixels and are one narrow ResNet below 16; preact_resnet18 "
        "always has that stem, and a narrow form of its own below 16; preact_narrow is that form at any size",
    )
    network.add_argument(
        "--pretrained",
        metavar="PATH|imagenet|none",
        type=cli.place,
        help="initial weights; by default imagenet for food and clothing1m, else none",
    )
    network.add_argument(
        "--shared-classifier",
        action=BooleanOptionalAction,
        default=True,
        help="one classifier for mixed and plain features",
    )

    method = parser.add_argument_group("attentive feature mixup")
    method.add_argument("--group-size", type=cli.count, default=2, metavar="K", help="samples in a group")
    method.add_argument(
        "--group-rounds",
        type=cli.count,
        help="groups that each sample is in, per batch; by default 4, a number of our choice, for the paper's is not known; 1 "
        "under --fidelity released",
    )
    method.add_argument(
        "--group-order",
        choices=ORDERS,
        help="how the first round's groups are formed; by default random, halves under --fidelity released",
    )
    method.add_argument(
        "--pair-chunks",
        type=cli.count,
        help="form halves inside so many pieces of the batch, as the release does on so many GPUs; by default 1, and "
        "one per process under --fidelity released; for --group-order halves",
    )
    method.add_argument(
        "--interaction", choices=INTERACTIONS, default="sum", help="how projected members are fused"
    )
    method.add_argument(
        "--attention",
        choices=ATTENTIONS,
        help="attention of the scores: relu-sigmoid (Figure 2) is the default; complement (for pairs) under --fidelity "
        "released",
    )
    method.add_argument(
        "--attn-hidden",
        type=cli.count_or_zero,
        default=0,
        metavar="N",
        help="width of one more layer; 0: none",
    )
    method.add_argument(
        "--weights", choices=WEIGHTS, default="attentive", help="mixing weights: learnt, 1/K, or Dirichlet"
    )
    method.add_argument(
        "--mix-alpha", type=cli.positive, default=1.0, help="parameter of the random weights' distribution"
    )
    method.add_argument(
        "--mix-target",
        choices=TARGETS,
        help="label of a mixture: soft, by the mixing weights, is the default; both, all labels alike, under --fidelity "
        "released",
    )
    method.add_argument("--detach-target", action="store_true", help="no gradient through a mixture's label")
    method.add_argument(
        "--mix-at", choices=["feature", "input"], default="feature", help="input: plain mixup of random pairs"
    )
    method.add_argument("--weight-mixed", type=cli.non_negative, help="weight of the mixed loss (1.5)")
    method.add_argument("--weight-plain", type=cli.non_negative, help="weight of the plain loss (0.5)")
    method.add_argument("--lam", type=cli.fraction, help="sets the weights to S LAM and S (1 - LAM)")
    method.add_argument("--lam-scale", type=cli.positive, default=2.0, metavar="S", help="S of --lam")
    method.add_argument(
        "--weight-naive",
        type=cli.non_negative,
        help="the release's name for --weight-mixed (swapped, as there)",
    )
    method.add_argument(
        "--weight-afm",
        type=cli.non_negative,
        help="the release's name for --weight-plain (swapped, as there)",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--train-batch", type=cli.count, default=256, help="batch size over all processes")
    training.add_argument("--test-batch", type=cli.count, default=200, help="batch size of the test")
    training.add_argument("--lr", type=cli.positive, default=0.01, help="initial learning rate")
    training.add_argument(
        "--schedule",
        type=cli.count,
        nargs="+",
        default=[15, 25],
        help="multiply it by gamma after these epochs",
    )
    training.add_argument("--gamma", type=cli.positive, default=0.1, help="factor of the learning rate")
    training.add_argument(
        "--epochs",
        type=cli.count,
        default=30,
        dest="num_epochs",
        help="epochs, those of fine-tuning included",
    )
    training.add_argument(
        "--finetune-epochs", type=cli.count, default=5, help="last epochs on clean images, for noisy+clean"
    )
    training.add_argument(
        "--finetune-lr", type=cli.positive, default=0.001, help="learning rate of those epochs"
    )
    training.add_argument("--momentum", type=cli.fraction, default=0.9, help="of SGD")
    training.add_argument("--weight-decay", type=cli.non_negative, default=1e-4, help="of SGD, on everything")
    training.add_argument(
        "--sync-bn",
        action=BooleanOptionalAction,
        help="batch statistics over all processes; by default yes, under --fidelity released no",
    )
    training.add_argument(
        "--save-every",
        type=cli.count_or_zero,
        default=0,
        metavar="N",
        help="keep every N-th epoch's weights too",
    )
    training.add_argument(
        "--checkpoint", metavar="DIR", type=cli.place, help="the release's unused flag: here a name for --out"
    )
    training.add_argument(
        "--device_ids",
        metavar="IDS",
        help="which CUDA devices, as CUDA_VISIBLE_DEVICES; by default all visible",
    )
    cli.add_shared_flags(parser, default_seed=0)
    return parser


def add_data_flags(parser: cli.Parser) -> None:
    """Which images and labels."""
    data = parser.add_argument_group("data and label noise")
    data.add_argument(
        "--dataset",
        default="food",
        help="food (Food-101N, tested on Food-101), clothing1m, cifar10, cifar100, mnist, fashion_mnist, digits, or NAME "
        "for DATA_ROOT/NAME.npz",
    )
    data.add_argument(
        "--data-root",
        metavar="DIR",
        type=cli.place,
        help="where the data set is; by default ./data/food, ./data/clothing1m, and ./data for the others",
    )
    data.add_argument(
        "--train-on",
        choices=["noisy", "noisy+verified", "noisy+clean"],
        default="noisy",
        help="Clothing1M: the million noisy images; with the images verified to be right; with fine-tuning on 50k clean",
    )
    data.add_argument(
        "--noise-type",
        choices=[*NOISE_TYPES, "given", "none"],
        default="symmetric",
        help="label noise of the data sets that are clean; "
        f"{posterior.HELP}; given: the noisy_labels of an .npz",
    )
    data.add_argument("--noise-rate", type=cli.fraction, default=0.5, help="rate of that noise")
    posterior.add_flag(data)
    data.add_argument(
        "--on_bad_image",
        choices=["error", "skip"],
        default="error",
        help="images that are missing or damaged: stop, or leave them out from the start",
    )
    data.add_argument(
        "--image-cache",
        metavar="DIR",
        type=cli.place,
        help="read images from a cache made by python -m common.datasets cache",
    )
    data.add_argument("--workers", type=cli.count_or_zero, default=4, help="processes that decode images")


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    released = args.fidelity == "released"
    settle_loss_weights(parser, args)
    defaults = dict(DEFAULTS[args.fidelity])
    if args.mix_at == "input":  # mixup has partners, not groups
        defaults |= {"group_order": "halves", "group_rounds": 1}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    halves = args.group_order == "halves"
    args.pair_chunks = args.pair_chunks or (processes.planned() if released and halves else 1)
    args.sync_bn = not released if args.sync_bn is None else args.sync_bn
    args.pretrained = args.pretrained or ("imagenet" if args.dataset in ON_DISK else "none")
    args.out, args.checkpoint = args.out or args.checkpoint, None
    if args.dataset in ON_DISK or args.noise_file:
        args.noise_type = "given"
    posterior.check_flag(parser, args, args.noise_type, "--noise-type")
    if args.group_size < 2:
        parser.error(f"argument --group-size: a group has at least 2 members, got {args.group_size}")
    if args.attention == "complement" and args.weights == "attentive" and args.group_size != 2:
        parser.error(
            f"argument --group-size: --attention complement is for pairs, got {args.group_size}: add --attention relu-sigmoid"
        )
    if args.pair_chunks > 1 and not halves:
        parser.error(
            f"argument --pair-chunks: {args.pair_chunks} pieces are for halves, not for random groups: add --group-order halves"
        )
    if args.train_on != "noisy" and args.dataset != "clothing1m":
        parser.error(
            f"argument --train-on: {args.train_on} is a setting of clothing1m, not of {args.dataset}"
        )
    if args.train_on == "noisy+clean" and args.finetune_epochs >= args.num_epochs:
        parser.error(
            f"argument --finetune-epochs: must be below --epochs {args.num_epochs}, got {args.finetune_epochs}"
        )
    if args.mix_at == "input":
        check_mixup(parser, args)
    return args


def settle_loss_weights(parser: cli.Parser, args: Namespace) -> None:
    """W_mix and W_plain [Sec. 5] from --weight-mixed and --weight-plain, the release's swapped names, or --lam."""
    for old, new in (("weight_naive", "weight_mixed"), ("weight_afm", "weight_plain")):
        if getattr(args, old) is None:
            continue
        flags = f"--{old.replace('_', '-')}", f"--{new.replace('_', '-')}"
        if getattr(args, new) is not None:
            parser.error(f"argument {flags[0]}: is the release's name for {flags[1]}, give one of them")
        processes.say(
            f"note: {flags[0]} scales the {new.removeprefix('weight_')} loss, as in the release: {flags[1]}"
        )
        setattr(args, new, getattr(args, old))
        setattr(args, old, None)
    given = [name for name in ("weight_mixed", "weight_plain") if getattr(args, name) is not None]
    if args.lam is not None and given:
        parser.error(
            f"argument --lam: sets both loss weights, so --{given[0].replace('_', '-')} cannot be given too"
        )
    scaled = (1.5, 0.5) if args.lam is None else (args.lam_scale * args.lam, args.lam_scale * (1 - args.lam))
    args.weight_mixed = scaled[0] if args.weight_mixed is None else args.weight_mixed
    args.weight_plain = scaled[1] if args.weight_plain is None else args.weight_plain
    args.lam, args.lam_scale = None, 2.0  # said by the two weights from here on
    if args.weight_mixed == args.weight_plain == 0:
        parser.error("argument --weight-plain: both losses have weight 0")


def check_mixup(parser: cli.Parser, args: Namespace) -> None:
    """--mix-at input is mixup as published: pairs, random weights, no plain loss."""
    if args.weights != "random" or args.group_size != 2 or args.weight_plain != 0:
        parser.error(
            "argument --mix-at: input is plain mixup and needs --weights random --group-size 2 --lam 1 (no plain loss)"
        )
    without = {"mix_target": "soft", "detach_target": False, "group_rounds": 1, "group_order": "halves"}
    for name, value in {**without, "pair_chunks": 1}.items():
        if getattr(args, name) != value:
            parser.error(
                f"argument --mix-at: input goes without --{name.replace('_', '-')} {getattr(args, name)}"
            )
    if processes.launched():
        parser.error("argument --mix-at: input runs in one process; start it with python")


def method(args: Namespace) -> str:
    """What a result row calls the method: AFM with the switches that are not at their default, or what they leave of it."""
    if args.mix_at == "input":
        return "mixup"
    if args.weight_mixed == 0:
        return "CE"
    usual = DEFAULTS[args.fidelity] | {"detach_target": False, "shared_classifier": True}
    name = "AFM"
    if args.weights == "attentive":
        usual |= {"interaction": "sum", "attn_hidden": 0}
    else:
        del usual["attention"]
        name = f"feature mixup, {args.weights} weights"
    switches = [
        f"{flag} {getattr(args, flag)}" for flag, value in usual.items() if getattr(args, flag) != value
    ]
    return f"{name} ({', '.join([f'K={args.group_size}', *switches])})"


def draw(
    rows: int, args: Namespace, mixing: bool, generator: torch.Generator, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """The groups of a batch of `rows` [Sec. 4, step 1], none unless mixing, and their weights where they are not learnt."""
    if not mixing:
        groups = torch.empty((0, args.group_size), dtype=torch.int64, device=generator.device)
    elif args.mix_at == "input":
        partners = torch.randperm(rows, generator=generator, device=generator.device)
        groups = torch.stack([torch.arange(rows, device=generator.device), partners], dim=1)
    else:
        shape = {"order": args.group_order, "rounds": args.group_rounds, "chunks": args.pair_chunks}
        groups = draw_groups(rows, args.group_size, generator, **shape)
    if mixing and args.weights == "attentive":
        return groups, None
    kind = args.weights if mixing else "uniform"
    weights = drawn_weights(len(groups), args.group_size, kind, args.mix_alpha, rng)
    return groups, weights.to(generator.device)


def learning_rate(args: Namespace, epoch: int) -> float:
    """Multiplied by gamma after each epoch of the schedule [Sec. 6]; fine-tuning has its own."""
    if is_finetuning(args, epoch):
        return args.finetune_lr
    return args.lr * args.gamma ** sum(epoch > milestone for milestone in args.schedule)


def is_finetuning(args: Namespace, epoch: int) -> bool:
    """Whether an epoch is one of the last, on clean images."""
    return args.train_on == "noisy+clean" and epoch > args.num_epochs - args.finetune_epochs


def train(
    epoch: int, args: Namespace, data: Data, network: nn.Module, optimizer: SGD, draws: Callable, run: Run
) -> Epoch:
    """One epoch: attentive feature mixup on the noisy images, or cross-entropy where it fine-tunes on the clean ones."""
    finetuning = is_finetuning(args, epoch)
    batches, labels = data.clean_train if finetuning else data.train
    batches = run.progress(batches, f"epoch {epoch} {'fine-tuning' if finetuning else 'training'}")
    if args.mix_at == "input":
        return train_epoch_mixing_inputs(
            network,
            optimizer,
            batches,
            labels,
            partial(draws, mixing=True),
            weight=args.weight_mixed,
            device=run.device,
        )
    return train_epoch(
        network,
        optimizer,
        batches,
        labels,
        partial(draws, mixing=args.weight_mixed > 0 and not finetuning),
        loss_weights=(args.weight_mixed, 1.0 if finetuning else args.weight_plain),
        target=args.mix_target,
        detach_target=args.detach_target,
        device=run.device,
    )


@cli.script
def main(argv=None) -> None:
    """Train AFM and write its run directory."""
    args = parse_args(argv)
    if args.device_ids:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.device_ids
    device = gpu.pick(args.device, args.precision, several=True, fidelity=args.fidelity)
    on_disk = args.dataset in ON_DISK
    loader = torch.Generator().manual_seed(args.seed) if on_disk else device.generator(args.seed)
    data = load(args, device, loader)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    network = make_network(args, data.num_classes, data.image_size, data.channels)
    if args.pretrained not in ("imagenet", "none"):
        left = load_weights(network, Path(args.pretrained))
        processes.say(f"weights of {args.pretrained}; initialised at random: {', '.join(left) or 'nothing'}")
    run = Run(
        args, device, paper="afm", method=method(args), name=directory_name(args), cell=cell(args, data)
    )
    run.save_labels(data.index, data.clean, data.observed, data.num_classes)
    run.save_skipped(data.skipped)

    network = device.prepare(network)
    if args.compile:
        network.backbone.compile()
    if args.sync_bn:
        network = processes.synchronised(network)
    parallel = processes.parallel(network, device.device, unused_parameters=args.train_on == "noisy+clean")
    optimizer = SGD(network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    groups, rng = device.generator(args.seed), np.random.default_rng(args.seed)
    run.resume({"network": network, "optimizer": optimizer, "loader": loader, "groups": groups, "rng": rng})
    draws = partial(draw, args=args, generator=groups, rng=rng)
    known = torch.from_numpy(data.known).to(device.device)

    for epoch in run.epochs(args.num_epochs):
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
        done = train(epoch, args, data, parallel, optimizer, draws, run)
        processes.share_buffers(network)
        attention = mean_weights(done.members, done.weights, len(known))
        accuracies, losses = test(network, data, run, epoch)
        report = {"loss": done.loss, "train_accuracy": done.accuracy, **accuracies}
        report |= {"attention_peak": mean_peak(done.weights)}
        report |= {"attention_dead": done.dead if args.attention == "relu-sigmoid" else None}
        report |= attention_statistics(attention, known)
        report |= {"mixed_loss": done.mixed_loss, "plain_loss": done.plain_loss, **losses}
        report |= {"lr": learning_rate(args, epoch)}
        keep_weights(network, report, epoch, args, run)
        run.log(epoch, **report)

    last = {} if run.is_finished() else measure_attention(network, data, run)
    last |= run.full_test(lambda: full_test(network, data, run))
    run.finish(**last, attention_peak=run.rows[-1]["attention_peak"], **at_best_validation(run.rows))


def full_test(network: AttentiveFeatureMixup, data: Data, run: Run) -> dict[str, float]:
    """Accuracy on all test images, for --full_test_at_end."""
    batches = run.progress(data.whole_test.batches, "full test", training=False)
    labels = data.whole_test.labels
    accuracy = evaluate(network, batches, labels, run.device).accuracy
    return {"full_test": accuracy, "full_test_images": len(labels)}


def test(network: AttentiveFeatureMixup, data: Data, run: Run, epoch: int) -> tuple[dict, dict]:
    """Columns of the log: accuracy on the test images and on the validation images, if any; and further ones of the test."""
    batches = run.progress(data.test.batches, f"epoch {epoch} test", training=False)
    found = evaluate(network, batches, data.test.labels, run.device)
    validation = None
    if data.validation is not None:
        batches = run.progress(data.validation.batches, f"epoch {epoch} validation", training=False)
        validation = evaluate(network, batches, data.validation.labels, run.device).accuracy
    further = {"test_loss": found.loss, "test_loss_batchmean": found.loss_batchmean}
    further["test_accuracy_mixed_classifier"] = found.mixed_accuracy
    return {"test_accuracy": found.accuracy, "validation_accuracy": validation}, further


def keep_weights(network: nn.Module, report: dict, epoch: int, args: Namespace, run: Run) -> None:
    """model_best.pt where this epoch is strictly better than all before, on validation images or else, as in the release,
    on the test images; and every N-th epoch's weights for --save-every N."""
    column = "test_accuracy" if report["validation_accuracy"] is None else "validation_accuracy"
    names = ["model_best.pt"] if report[column] > max((row[column] for row in run.rows), default=0.0) else []
    names += [f"model_{epoch}.pt"] if args.save_every and epoch % args.save_every == 0 else []
    for name in names:
        run.save_weights(name, network.state_dict())


def at_best_validation(rows: list[dict]) -> dict[str, float]:
    """The test accuracy of the epoch that is best on the validation images, the first of equals [Sec. 8]."""
    if rows[0]["validation_accuracy"] is None:
        return {}
    return {"at_best_validation": max(rows, key=lambda row: row["validation_accuracy"])["test_accuracy"]}


def measure_attention(network: AttentiveFeatureMixup, data: Data, run: Run) -> dict[str, float | None]:
    """Write attention.npz, every sample's weight by the trained network over several groups; its statistics [Sec. 7]."""
    statistics = dict.fromkeys(("attention_auc", "attention_right", "attention_wrong"))
    if network.attention is None:
        return statistics
    batches = run.progress(data.sampled_batches, "attention", training=False)
    features = pooled_features(network, batches, len(data.sampled), run.device)
    generator = run.device.generator(run.args.seed)
    weights = attention_of_samples(network, features, ROUNDS, generator)
    known = data.known[data.sampled]
    arrays = {"position": data.sampled, "weight": weights.cpu().numpy(), "known": known}
    run.save_arrays("attention", **arrays, observed=data.observed[data.sampled])
    return attention_statistics(weights, torch.from_numpy(known).to(weights.device))


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, noise and seed, then whatever differs from the defaults."""
    always = ["dataset", *(["train_on"] if args.dataset == "clothing1m" else [])]
    always += [] if args.dataset in ON_DISK else ["noise_type", "noise_rate"]
    always += ["fidelity"] if args.fidelity == "released" else []
    defaults = parse_args(["--dataset", args.dataset, "--fidelity", args.fidelity])
    return run_name(args, vars(defaults), [*always, "seed"])


def cell(args: Namespace, data: Data) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    drawn = args.noise_type not in ("given", "none")
    noise_type = {"food": "web", "clothing1m": args.train_on}.get(args.dataset, args.noise_type)
    whole = args.dataset in ON_DISK and args.num_epochs >= (30 if args.dataset == "food" else 15)
    return {
        "dataset": data.name,
        "noise_type": Path(args.noise_file).name if args.noise_file else noise_type,
        "noise_rate": args.noise_rate if drawn else None,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": "embedded" if args.dataset == "digits" else "paper" if whole else "short",
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
