"""Manifold DivideMix on images with wrong labels and images from elsewhere (CVPR-W 2024); also on the embedded digits.

    python manifold_dividemix/train_semisup.py --dataset digits --pretrained none --epochs 20      # no data, no weights needed
    python manifold_dividemix/train_semisup.py --pretrained .../encoder.safetensors                # CIFAR-100 with ImageNet 32x32

The encoder is pretrain.py's. The sections in brackets are those of the method's description in manifold_dividemix/README.md.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.optim import SGD, Optimizer

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.datasets import posterior
from common.datasets.mini_imagenet import NAME as MINI_IMAGENET
from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.augment import crop_and_flip, training_augmentation
from common.gpu.encoders import load_encoder
from common.gpu.loader import Batches, Images
from common.gpu.policies import four_views
from common.noise import POSTERIOR_TYPES
from common.runs import cli, selection_report
from common.runs.cli import UserError
from common.runs.run import Run, run_name
from common.runs.selection_report import PATIENCE, Selected
from manifold_dividemix import corpus as data
from manifold_dividemix.corpus import Corpus
from manifold_dividemix.flags import add_training_flags, settle
from manifold_dividemix.losses import learning_rate, position, ramp_steps, ramp_up
from manifold_dividemix.mixematch import Weights
from manifold_dividemix.networks import Network, make_encoder
from manifold_dividemix.outliers import (
    kept_samples,
    knn_scores,
    outlier_auroc,
    removal_count,
    split_epochs,
)
from manifold_dividemix.selection import clean_probability, divide
from manifold_dividemix.training import (
    Look,
    Step,
    all_logits,
    look,
    set_mode,
    top_accuracy,
    train_divided,
    warm_up,
    without_single,
)

PRESETS = Path(__file__).with_name("presets.toml")
PARTS = ("labelled", "unlabelled", "labelled_embedding", "unlabelled_embedding", "contrastive", "penalty")
STATISTICS = (
    *("test_top5", "removed", "removal_precision", "removal_recall"),
    *("labelled", "unlabelled", "labelled_precision", "labelled_ood", "clean_auc"),
)
SHOWN = 2000  # samples whose embeddings are kept for the figure


def make_parser() -> cli.Parser:
    """The release's flags and defaults, flags for its single quirks, and the flags all scripts share."""
    parser = cli.Parser(prog="train_semisup.py", description=__doc__)
    data.add_open_set_flags(parser)
    data.add_noise_flags(
        parser,
        ["sym", "asym", "superclass", *POSTERIOR_TYPES, "no", "given"],
        "sym",
        "sym: a class drawn from all; asym: the look-alike of 10 classes, else the next of a block of five; superclass: the next "
        "of CIFAR-100's superclass; "
        f"{posterior.HELP}; given: the labels of --noise_file or of the .npz",
    )
    add_training_flags(parser, epochs=300, warm_up=5, start_factor=10)
    parser.add_argument("--workers", type=int, default=8, help="ignored: the images stay on the device")
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    data.settle_corruption(parser, args)
    settle(parser, args, released_bn="frozen", released_mask="batch")
    return args


def initial_network(corpus: Corpus, args: Namespace) -> Network:
    """The network for the images, its encoder pre-trained; classifier and projection begin at random [Sec. 3].

    UserError: no encoder there, or one that does not fit.
    """
    channels, size = corpus.images.shape[3], corpus.images.shape[1]
    encoder = make_encoder(args.arch, channels, size)
    network = Network(encoder, encoder.width, corpus.num_classes)
    if args.pretrained != "none":
        if not Path(args.pretrained).is_file():
            raise UserError(
                f"--pretrained {args.pretrained}: no such file; make an encoder with python manifold_dividemix/pretrain.py and "
                "name its encoder.safetensors, or use --pretrained none"
            )
        load_encoder(network.encoder, args.pretrained)
    return network


class Setting(NamedTuple):
    """What every pass over the training set shares."""

    args: Namespace
    device: gpu.Device
    run: Run
    train: Images
    labels: Tensor  # observed, int [N]
    loader: torch.Generator  # order, augmentation and mixing partners, alike in all processes
    draws: np.random.Generator  # mixture weights and starts of the GMM, alike in all processes

    def crop(self):
        """The crop-and-flip that all training views begin with; of mini-ImageNet by 4 pixels at any size, as in the release."""
        if self.args.dataset == MINI_IMAGENET:
            return crop_and_flip
        return training_augmentation(self.args.dataset, self.train.pixels.shape[2])

    def batches(self, augmentation, subset: Tensor | None = None) -> Batches:
        """Shuffled, augmented batches. A smaller last one is trained on, but cannot be cut into pieces for processes."""
        return Batches(
            self.train,
            self.args.batch_size,
            subset=subset,
            shuffle=True,
            augmentation=augmentation,
            generator=self.loader,
            drop_last=processes.world() > 1,
        )

    def plain(self, name: str):
        """All training images as they are, dealt out to the processes."""
        batches = Batches(self.train, 512, rank=processes.rank(), world=processes.world())
        return self.run.progress(batches, name, training=False)


def warm_up_epoch(network: Network, optimizer: Optimizer, kept: Tensor, epoch: int, s: Setting) -> list:
    """Symmetric cross-entropy on all samples that are not removed [Sec. 4.3]: mean loss, and no parts."""
    args = s.args
    set_mode(network, args.bn_mode, True, args.weights == "freeze")
    batches = s.run.progress(s.batches(s.crop()), f"epoch {epoch} warm-up", whole=True)
    losses = warm_up(
        network,
        optimizer,
        batches,
        s.labels,
        kept,
        s.device,
        loss=args.warmup_loss,
        mask=args.warmup_mask,
        # MixEMatch uses the projection's statistics frozen: they have to be collected before
        project=args.bn_mode == "warm-up",
    )
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
    """One epoch on the split [Sec. 4.5]: the mean of each loss, the total first."""
    args = s.args
    set_mode(network, args.bn_mode, False, args.weights == "freeze")
    views = partial(four_views, crop=s.crop())
    batches = s.batches(views, labelled)
    others = s.batches(views, unlabelled).endless()
    steps = ramp_steps(len(labelled), args.batch_size, len(batches), args.ramp)
    weights = (args.lambda_x, args.lambda_u, args.lambda_xe, args.lambda_ue, args.lambda_c)
    step = Step(
        draw_share=lambda: s.draws.beta(args.alpha, args.alpha),
        draw_permutation=lambda rows: torch.randperm(rows, generator=s.loader, device=s.device.device),
        ramp=lambda number: ramp_up(position(epoch, number, steps, args.ramp), args.warmup_epoch),
        weights=Weights(*weights),
        temperature=args.temperature,
        threshold=args.thr_un,
        kind=args.LN_loss,
        rce=args.rce,
        device=s.device,
    )
    losses = train_divided(
        network,
        optimizer,
        s.run.progress(batches, f"epoch {epoch} training", whole=True),
        without_single(others) if network.training else others,
        step,
        labels=s.labels,
        clean=clean,
    )
    return losses.mean(dim=0).tolist()


def make_optimizer(network: Network, args: Namespace) -> SGD:
    """SGD with two groups: classifier and projection, and the encoder where it is trained [Sec. 4.1]."""
    groups = [{"params": network.head(), "initial_lr": args.lr_head, "lr": args.lr_head}]
    if args.weights == "finetune":
        encoder = list(network.encoder.parameters())
        groups.append({"params": encoder, "initial_lr": args.lr_backbone, "lr": args.lr_backbone})
    network.encoder.requires_grad_(args.weights == "finetune")
    return SGD(groups, momentum=args.momentum, weight_decay=args.weight_decay)


class Judgement(NamedTuple):
    """What is known of the training samples until they are looked at again."""

    kept: Tensor  # bool [N]: not removed
    clean: Tensor | None  # float64 [N]: clean probabilities; None before the first split
    scores: Tensor  # float32 [N]: outlier scores
    auroc: float | None  # of the outlier scores


def judge(
    network: Network, corpus: Corpus, epoch: int, splits: list[int], scores: Tensor | None, s: Setting
) -> Judgement:
    """Outliers are removed, from scratch each time [Sec. 4.2]; clean probabilities too, where a split is due [Sec. 4.4].

    scores: float32 [N], to be used again; None: those of the network's embeddings now.
    """
    args, clean = s.args, None
    seen = look(network, s.plain(f"epoch {epoch} embeddings"), s.labels, s.device)
    if scores is None:
        scores = knn_scores(seen.embeddings, args.knn_k)
    removed = removal_count(epoch, len(scores), args.remove_ood, args.ood_start_factor, splits)
    kept = kept_samples(scores, removed)
    if epoch in splits:
        if args.fidelity == "released":  # each new data set seeds the global generator again [Sec. 10, 9]
            s.draws.bit_generator.state = np.random.default_rng(args.seed).bit_generator.state
        clean = clean_probability(seen.losses, int(s.draws.integers(2**31)))
    save_outliers(s.run, "last" if epoch else "first", seen, scores, kept, clean, args.seed)
    return Judgement(kept, clean, scores, outlier_auroc(scores, corpus.ood))


def train(network: Network, corpus: Corpus, run: Run, args: Namespace, device: gpu.Device) -> None:
    """The training that both scripts share, up to the end of the run [Sec. 4]."""
    network = device.prepare(network, args.compile)
    network.encoder = processes.synchronised(network.encoder)
    optimizer = make_optimizer(network, args)
    train_images, test_images = (
        Images(pixels, corpus.mean, corpus.std, device.device)
        for pixels in (corpus.images, corpus.test_images[corpus.tested])
    )
    labels, test_labels = (
        torch.from_numpy(given).to(device.device)
        for given in (corpus.observed, corpus.test_labels[corpus.tested])
    )
    test = Batches(test_images, 512, rank=processes.rank(), world=processes.world())
    loader, draws = device.generator(args.seed), np.random.default_rng(args.seed)
    # scores: those of the encoder before training, where they are used to the end
    memory = {"kept": None, "clean": None, "scores": None, "first_auroc": None, "auroc": None}
    memory["streaks"] = selection_report.no_streaks(1, corpus.num_classes)
    state = {"network": network, "optimizer": optimizer, "loader": loader, "draws": draws}
    run.resume({**state, "memory": memory})
    kept, clean, scores = (
        value if value is None else value.to(device.device)
        for value in (memory[name] for name in ("kept", "clean", "scores"))
    )
    s = Setting(args, device, run, train_images, labels, loader, draws)
    splits = splits_of(args)
    right = right_labels(corpus, device)
    note_warm_up(splits, s)

    for number in run.epochs(args.epochs):
        epoch, auroc = number - 1, None  # the release counts from 0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, group["initial_lr"], args.epochs)
        if epoch == 0 or epoch in splits:
            kept, clean, found, auroc = judge(network, corpus, epoch, splits, scores, s)
            scores = found if args.knn_encoder == "pretrained" else None
            first = auroc if epoch == 0 else memory["first_auroc"]
            memory |= {"kept": kept, "clean": clean, "scores": scores, "first_auroc": first, "auroc": auroc}

        sides = None if clean is None else divide(clean, kept, args.p_threshold)
        if epoch == 0 or epoch in splits:
            warn_of_lost_classes(kept, sides, corpus)
        chosen = [] if sides is None else [Selected(sides[0], labels, right)]
        if sides is None or too_small(*sides, args.batch_size):
            losses = warm_up_epoch(network, optimizer, kept, epoch, s)
        else:
            if epoch in splits:
                memory["streaks"] = selection_report.follow(
                    memory["streaks"], chosen, "a longer --warmup-epoch", min(PATIENCE, len(splits))
                )
            losses = mixematch_epoch(network, optimizer, *sides, clean, epoch, s)

        passing = run.progress(test, f"epoch {epoch} test", training=False)
        logits = all_logits(network, passing, len(test_labels), corpus.num_classes, device)
        report = {"loss": losses[0], "test_accuracy": top_accuracy(logits, test_labels)}
        report |= {"test_top5": top_accuracy(logits, test_labels, 5), "ood_auroc": auroc}
        report |= removal_statistics(kept, corpus.ood) | split_statistics(sides, clean, corpus)
        report |= selection_report.columns(chosen)
        report |= {f"{name}_loss": value for name, value in zip(PARTS, losses[1:], strict=True)}
        if args.eval_train:
            seen = look(network, s.plain(f"epoch {epoch} training accuracy"), labels, device)
            report["train_accuracy"] = 100 * float(seen.hits.float().mean())
        by_class = removed_by_class(kept, corpus)
        run.log(number, **report, lr_head=optimizer.param_groups[0]["lr"], **by_class)
    last = {f"last_{name}": run.rows[-1][name] for name in STATISTICS}
    last |= run.full_test(lambda: full_test(network, corpus, run, device))
    run.finish(first_ood_auroc=memory["first_auroc"], last_ood_auroc=memory["auroc"], **last)


def note_warm_up(splits: list[int], s: Setting) -> None:
    """Say so where a split follows a warm-up of few steps."""
    if splits:
        steps = s.args.warmup_epoch * len(s.batches(s.crop()))
        selection_report.note_short_warm_up(steps, f"--warmup-epoch {s.args.warmup_epoch}")


def full_test(network: Network, corpus: Corpus, run: Run, device: gpu.Device) -> dict[str, float]:
    """Accuracy on all test images, for --full_test_at_end."""
    images = Images(corpus.test_images, corpus.mean, corpus.std, device.device)
    labels = torch.from_numpy(corpus.test_labels).to(device.device)
    batches = Batches(images, 512, rank=processes.rank(), world=processes.world())
    passing = run.progress(batches, "full test", training=False)
    logits = all_logits(network, passing, len(labels), corpus.num_classes, device)
    return {"full_test": top_accuracy(logits, labels), "full_test_images": len(labels)}


def right_labels(corpus: Corpus, device: gpu.Device) -> Tensor | None:
    """Whose given label is the true one, bool [N]; of no image from elsewhere. None if the true labels are unknown."""
    if corpus.clean is None:
        return None
    return torch.from_numpy((corpus.observed == corpus.clean) & ~corpus.ood).to(device.device)


def splits_of(args: Namespace) -> list[int]:
    """The epochs, from 0, that begin with a split [Sec. 4.4]."""
    if args.selection == "none":
        return []
    return split_epochs(args.epochs, args.warmup_epoch, args.interval, args.clustering)


def too_small(labelled: Tensor, unlabelled: Tensor, batch_size: int) -> bool:
    """Whether a side of a split cannot be trained on, so that the epoch is one of warm-up: empty, of one sample, or smaller than
    the batch that several processes share. Says so."""
    least = batch_size if processes.world() > 1 else 1
    if len(labelled) >= least and len(unlabelled) >= max(least, 2):
        return False
    processes.say(
        f"note: warm-up in place of MixEMatch, the split is {len(labelled)} labelled and {len(unlabelled)} unlabelled samples"
    )
    return True


# what is written down -------------------------------------------------------------------------------------------------


def save_outliers(
    run: Run, name: str, seen: Look, scores: Tensor, kept: Tensor, clean: Tensor | None, seed: int
) -> None:
    """Keep the first or the last removal and split as outliers_first.npz or outliers_last.npz, with some samples' embeddings."""
    arrays = {"score": scores, "kept": kept, "loss": seen.losses}
    if clean is not None:
        arrays["clean_probability"] = clean
    shown = np.sort(np.random.default_rng(seed).permutation(len(scores))[:SHOWN])
    embedding = seen.embeddings[torch.from_numpy(shown).to(scores.device)]
    arrays = {key: value.cpu().numpy() for key, value in {**arrays, "embedding": embedding}.items()}
    run.save_arrays(f"outliers_{name}", **arrays, shown=shown)


def removal_statistics(kept: Tensor, ood: np.ndarray | None) -> dict[str, float | None]:
    """How many samples are removed; share of them that are from elsewhere; share of those from elsewhere that are removed."""
    removed = ~kept.cpu().numpy()
    report = {"removed": int(removed.sum()), "removal_precision": None, "removal_recall": None}
    if ood is not None and removed.any():
        report["removal_precision"] = float(ood[removed].mean())
    if ood is not None and ood.any():
        report["removal_recall"] = float(removed[ood].mean())
    return report


def removed_by_class(kept: Tensor, corpus: Corpus) -> dict[str, int]:
    """How many samples of each given label are removed: removed_class_0, removed_class_1, ..."""
    counts = np.bincount(corpus.observed[~kept.cpu().numpy()], minlength=corpus.num_classes)
    return {f"removed_class_{k}": int(count) for k, count in enumerate(counts)}


def lost_classes(kept: Tensor, sides: tuple[Tensor, Tensor] | None, corpus: Corpus) -> np.ndarray:
    """The classes of which more than half of the correctly labelled samples are removed or unlabelled, int [L], ascending.

    Where true labels are unknown: of all samples given the label. sides None: no split yet, what is not removed counts as kept.
    """
    lost = ~kept.cpu().numpy()
    if sides is not None:
        lost[sides[1].cpu().numpy()] = True
    members = np.ones(len(lost), bool) if corpus.clean is None else correctly_labelled(corpus)
    size, out = (
        np.bincount(corpus.observed[which], minlength=corpus.num_classes)
        for which in (members, members & lost)
    )
    return np.flatnonzero(2 * out > size)


def warn_of_lost_classes(kept: Tensor, sides: tuple[Tensor, Tensor] | None, corpus: Corpus) -> None:
    """Print a warning that names the lost classes, the first ten of many."""
    classes = lost_classes(kept, sides, corpus)
    if len(classes):
        names = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
        which = "samples" if corpus.clean is None else "correctly labelled samples"
        processes.say(
            f"warning: more than half of the {which} of {len(classes)} of {corpus.num_classes} classes are removed or "
            f"unlabelled: {names}"
        )


def correctly_labelled(corpus: Corpus) -> np.ndarray:
    """Which samples are in distribution and have their true label, bool [N]; of a corpus whose true labels are known."""
    return (corpus.observed == corpus.clean) & ~corpus.ood


def split_statistics(
    sides: tuple[Tensor, Tensor] | None, clean: Tensor | None, corpus: Corpus
) -> dict[str, float | None]:
    """Sizes of the split; shares of the labelled samples whose label is right, and that are from elsewhere; the AUC of the clean
    probability against right labels, of all that are not from elsewhere. None in the warm-up, and where nobody knows."""
    report = dict.fromkeys(("labelled", "unlabelled", "labelled_precision", "labelled_ood", "clean_auc"))
    if sides is None:
        return report
    labelled, unlabelled = (side.cpu().numpy() for side in sides)
    report |= {"labelled": len(labelled), "unlabelled": len(unlabelled)}
    if corpus.clean is None:
        return report
    right = correctly_labelled(corpus)
    if len(labelled):
        report["labelled_precision"] = float(right[labelled].mean())
        report["labelled_ood"] = float(corpus.ood[labelled].mean())
    own = right[~corpus.ood]
    if 0 < own.sum() < len(own):
        report["clean_auc"] = float(roc_auc_score(own, clean.cpu().numpy()[~corpus.ood]))
    return report


def method(args: Namespace) -> str:
    """What a result row calls the method."""
    if args.selection == "none":
        begun = "" if args.pretrained == "none" else " (pre-trained)"
        return args.warmup_loss + begun + (" with OOD removal" if args.remove_ood else "")
    parts = {
        "OOD removal": args.remove_ood == 0,
        "manifold mixup": args.lambda_xe == args.lambda_ue == 0,
        "contrastive loss": args.lambda_c == 0,
    }
    left_out = " and ".join(part for part, is_out in parts.items() if is_out)
    scored = ", scored by the pre-trained encoder" if args.knn_encoder == "pretrained" else ""
    return "Manifold DivideMix" + (f" without {left_out}" if left_out else "") + scored


# the script -----------------------------------------------------------------------------------------------------------


@cli.script
def main(argv=None) -> None:
    """Train Manifold DivideMix and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, args.gpu, several=True, fidelity=args.fidelity)
    corpus = data.load_open_set(args)
    start(corpus, args, device, directory_name(args), cell(args, corpus))


def start(corpus: Corpus, args: Namespace, device: gpu.Device, name: str, columns: dict) -> None:
    """What both scripts do once the images are there; name: of the run directory; columns: of its result rows."""
    check_sizes(corpus, args)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    network = initial_network(corpus, args)
    run = Run(args, device, paper="manifold_dividemix", method=method(args), name=name, cell=columns)
    data.keep(corpus, run)
    train(network, corpus, run, args, device)


def check_sizes(corpus: Corpus, args: Namespace) -> None:
    """UserError: a removal that leaves too little to train on, or batches that cannot be shared out."""
    size = len(corpus.observed)
    if size < 2:
        raise UserError("one training image has no neighbours: use a larger --limit_train or data set")
    removed = removal_count(args.epochs - 1, size, args.remove_ood, args.ood_start_factor, splits_of(args))
    if size - removed < 2:
        raise UserError(
            f"--remove-ood {args.remove_ood}: {removed} of {size} images would be removed in the end; use a smaller one"
        )
    if args.batch_size % processes.world():
        raise UserError(
            f"--batch-size {args.batch_size}: cannot be cut into equal pieces for {processes.world()} processes"
        )
    if processes.world() > 1 and size < args.batch_size:
        raise UserError(
            f"--batch-size {args.batch_size}: more than all {size} images, which {processes.world()} processes share"
        )


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, corruption, noise and seed, then whatever differs from the defaults."""
    always = ("dataset", "corruption", "noise_ratio", "ood_ratio", "seed")
    defaults = vars(parse_args(["--dataset", args.dataset, "--fidelity", args.fidelity]))
    return run_name(args, {**defaults, "fidelity": "paper"}, always)


def cell(args: Namespace, corpus: Corpus) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    noise = Path(args.noise_file).name if args.noise_file else args.noise_type
    rate = {"no": 0.0, "given": None}.get(args.noise_type, args.noise_ratio)
    return {
        "dataset": corpus.name,
        "noise_type": f"{noise} + {args.corruption}" if args.ood_ratio else noise,
        "noise_rate": None if args.noise_file else rate,
        "imb_factor": None,
        "ood_ratio": args.ood_ratio,
        "profile": "embedded" if args.dataset == "digits" else "paper" if args.epochs >= 300 else "short",
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
