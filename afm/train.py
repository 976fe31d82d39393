"""Attentive Feature Mixup (ECCV 2020) on Food-101N, Clothing1M, CIFAR-10/100, MNIST and the embedded digits.

python afm/train.py --preset embedded/digits-sym0.5/afm-k2                # under a minute, no data needed
python afm/train.py                                                       # Food-101N under ./data/food
torchrun --nproc_per_node=8 afm/train.py                                  # the same on eight GPUs
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from afm.flags import cell, directory_name, make_parser, method, parse_args
from common.runs import cli

cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from afm.attention import ablation_weights
from afm.choices import reads_files
from afm.data import Data, load
from afm.grouping import form_groups
from afm.networks import AttentiveFeatureMixup, load_weights, make_network
from afm.training import (
    Epoch,
    attention_of_samples,
    attention_statistics,
    estimate_label_quality,
    evaluate,
    mean_peak,
    mean_weights,
    pooled_features,
    train_epoch,
    train_epoch_mixing_inputs,
)
from common.gpu import device as gpu
from common.gpu import processes
from common.runs.label_quality import save_label_quality
from common.runs.run import Run

ROUNDS = 20  # random groups that a sample's attention is averaged over at the end of a run


def groups_of_batch(
    rows: int, args: Namespace, mixing: bool, generator: torch.Generator, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """The groups of a batch of `rows` samples and their mixing weights (README, section 4, steps 1 and 8).

    The weights are None if the attention gives them. Without `mixing` there are no groups.
    """
    if not mixing:
        groups = torch.empty((0, args.group_size), dtype=torch.int64, device=generator.device)
    elif args.mix_at == "input":
        partners = torch.randperm(rows, generator=generator, device=generator.device)
        groups = torch.stack([torch.arange(rows, device=generator.device), partners], dim=1)
    else:
        shape = {"order": args.group_order, "rounds": args.group_rounds, "chunks": args.pair_chunks}
        groups = form_groups(rows, args.group_size, generator, **shape)
    if mixing and args.weights == "attentive":
        return groups, None
    kind = args.weights if mixing else "uniform"
    weights = ablation_weights(len(groups), args.group_size, kind, args.mix_alpha, rng)
    return groups, weights.to(generator.device)


def learning_rate(args: Namespace, epoch: int) -> float:
    """The initial rate times gamma for each epoch of the schedule that is over (README, section 6); fine-tuning has its own."""
    if is_finetuning(args, epoch):
        return args.finetune_lr
    return args.lr * args.gamma ** sum(epoch > milestone for milestone in args.schedule)


def is_finetuning(args: Namespace, epoch: int) -> bool:
    """Whether an epoch is one of the last ones, which train on clean images."""
    return args.train_on == "noisy+clean" and epoch > args.num_epochs - args.finetune_epochs


def train(
    epoch: int, args: Namespace, data: Data, network: nn.Module, optimizer: SGD, grouping: Callable, run: Run
) -> Epoch:
    """One epoch: attentive feature mixup on the noisy images, or fine-tuning with cross-entropy on the clean ones."""
    finetuning = is_finetuning(args, epoch)
    batches, labels = data.clean_train if finetuning else data.train
    batches = run.progress(batches, f"epoch {epoch} {'fine-tuning' if finetuning else 'training'}")
    if args.mix_at == "input":
        return train_epoch_mixing_inputs(
            network,
            optimizer,
            batches,
            labels,
            partial(grouping, mixing=True),
            weight=args.weight_mixed,
            device=run.device,
        )
    return train_epoch(
        network,
        optimizer,
        batches,
        labels,
        partial(grouping, mixing=args.weight_mixed > 0 and not finetuning),
        loss_weights=(args.weight_mixed, 1.0 if finetuning else args.weight_plain),
        target=args.mix_target,
        detach_target=args.detach_target,
        device=run.device,
    )


def test(network: AttentiveFeatureMixup, data: Data, run: Run, epoch: int) -> tuple[dict, dict]:
    """Columns of the log: the accuracies on the test and validation images (None without these), and further test columns."""
    batches = run.progress(data.test.batches, f"epoch {epoch} test", training=False)
    of_test = evaluate(network, batches, data.test.labels, run.device)
    validation = None
    if data.validation is not None:
        batches = run.progress(data.validation.batches, f"epoch {epoch} validation", training=False)
        validation = evaluate(network, batches, data.validation.labels, run.device).accuracy
    further = {"test_loss": of_test.loss, "test_loss_batchmean": of_test.loss_batchmean}
    further["test_accuracy_mixed_classifier"] = of_test.mixed_accuracy
    return {"test_accuracy": of_test.accuracy, "validation_accuracy": validation}, further


def keep_weights(network: nn.Module, report: dict, epoch: int, args: Namespace, run: Run) -> None:
    """Save model_best.pt if this epoch beats all before it, and every N-th epoch's weights for --save-every N.

    Epochs are compared on the validation images, or on the test images without these, as in the release.
    """
    column = "test_accuracy" if report["validation_accuracy"] is None else "validation_accuracy"
    names = ["model_best.pt"] if report[column] > max((row[column] for row in run.rows), default=0.0) else []
    names += [f"model_{epoch}.pt"] if args.save_every and epoch % args.save_every == 0 else []
    for name in names:
        run.save_weights(name, network.state_dict())


def full_test(network: AttentiveFeatureMixup, data: Data, run: Run) -> dict[str, float]:
    """Accuracy on all test images, for --full_test_at_end."""
    batches = run.progress(data.whole_test.batches, "full test", training=False)
    labels = data.whole_test.labels
    accuracy = evaluate(network, batches, labels, run.device).accuracy
    return {"full_test": accuracy, "full_test_images": len(labels)}


def measure_attention(network: AttentiveFeatureMixup, data: Data, run: Run) -> dict[str, float | None]:
    """Write attention.npz, each sample's mean attention weight over ROUNDS groups; return its statistics (README, section 7)."""
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


def at_best_validation(rows: list[dict]) -> dict[str, float]:
    """The test accuracy of the epoch that is best on the validation images, the first of equals (README, section 8)."""
    if rows[0]["validation_accuracy"] is None:
        return {}
    return {"at_best_validation": max(rows, key=lambda row: row["validation_accuracy"])["test_accuracy"]}


def network_of(args: Namespace, data: Data) -> AttentiveFeatureMixup:
    """The network with its initial weights; a line says which of them --pretrained PATH does not have."""
    torch.manual_seed(args.seed)  # nothing else draws from the global generator
    network = make_network(args, data.num_classes, data.image_size, data.channels)
    if args.pretrained not in ("imagenet", "none"):
        left = load_weights(network, Path(args.pretrained))
        processes.say(f"weights of {args.pretrained}; initialised at random: {', '.join(left) or 'nothing'}")
    return network


@cli.script
def main(argv=None) -> None:
    """Train AFM and write its run directory."""
    args = parse_args(argv)
    if args.device_ids:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.device_ids
    device = gpu.pick(args.device, args.precision, several=True, fidelity=args.fidelity)
    loader = torch.Generator().manual_seed(args.seed) if reads_files(args) else device.generator(args.seed)
    data = load(args, device, loader)
    network = network_of(args, data)
    run = Run(
        args, device, paper="afm", method=method(args), name=directory_name(args), cell=cell(args, data)
    )
    run.save_labels(data.index, data.clean, data.observed, data.num_classes)
    run.save_skipped(data.skipped)

    if args.compile:
        network.backbone.compile()
    network = device.prepare(network)
    if args.sync_bn:
        network = processes.synchronised(network)
    parallel = processes.parallel(network, device.device, unused_parameters=args.train_on == "noisy+clean")
    optimizer = SGD(
        network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=device.on_cuda()
    )
    groups, rng = device.generator(args.seed), np.random.default_rng(args.seed)
    run.resume({"network": network, "optimizer": optimizer, "loader": loader, "groups": groups, "rng": rng})
    grouping = partial(groups_of_batch, args=args, generator=groups, rng=rng)
    known = torch.from_numpy(data.known).to(device.device)

    for epoch in run.epochs(args.num_epochs):
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
        done = train(epoch, args, data, parallel, optimizer, grouping, run)
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
    estimate = partial(estimate_label_quality, network, data, ROUNDS, run)
    save_label_quality(run, estimate, data.paths, data.classes, files=data.files)
    last |= run.full_test(lambda: full_test(network, data, run))
    run.finish(**last, attention_peak=run.rows[-1]["attention_peak"], **at_best_validation(run.rows))


if __name__ == "__main__":
    cli.exit_cleanly(main)
