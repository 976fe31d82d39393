"""SimCLR: pre-training of an encoder without labels, measured by kNN accuracy.

It replaces the encoders of papers that publish neither the encoder nor its recipe. Loss, schedule, head and
defaults follow the SimCLR recipe that SupContrast documents.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from common.gpu import graphs
from common.gpu.augment import simclr_view
from common.gpu.device import Device
from common.gpu.loader import Batches, Images
from common.runs.run import Run

QUERIES = 512  # queries of kNN per matrix product: 100 MB at a bank of 50000


class SimCLR(nn.Module):
    """Encoder and projection head, under the names `encoder.*` and `head.*` of the published checkpoints."""

    def __init__(self, encoder: nn.Module, width: int, dimensions: int):
        """encoder: images -> maps [B, width, h, w]; dimensions: of the embeddings."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dimensions))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> embeddings [B, dimensions] of length 1, float32 whatever the autocast."""
        embeddings = self.head(self.features(images))
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(embeddings.float(), dim=1)

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> pooled maps [B, width], float32: the features."""
        return self.encoder(images).float().mean(dim=(2, 3))


def nt_xent(embeddings: Tensor, temperature: float, base_temperature: float = 0.07) -> Tensor:
    """NT-Xent over the 2B views of B images, times temperature / base_temperature as in SupContrast.

    embeddings: [B, 2, D], rows of length 1. For each view, the cross-entropy of the other view of its image among the
    2B - 1 other views, by exp(cosine / temperature); the mean over all 2B, float32. For B = 1 loss and gradient are 0.
    ValueError for a temperature <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    images = len(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        views = embeddings.float().transpose(0, 1).flatten(0, 1)  # all first views, then all second ones
        same_view = torch.eye(2 * images, dtype=torch.bool, device=views.device)
        logits = (views @ views.T / temperature).masked_fill(same_view, -math.inf)
        other_view = torch.arange(2 * images, device=views.device).roll(images)
        return temperature / base_temperature * F.cross_entropy(logits, other_view)


def learning_rate(
    epoch: int,
    batch: int,
    *,
    base: float,
    epochs: int,
    batches_per_epoch: int,
    cosine: bool = True,
    warm: bool = True,
    warm_epochs: int = 10,
    decay_epochs: Sequence[int] = (700, 800, 900),
    decay_rate: float = 0.1,
) -> float:
    """The rate of a step, as in SupContrast; epochs from 1, batches from 0.

    cosine: from base to base / 1000 in the last epoch, constant within an epoch; else times decay_rate after each of
    decay_epochs. warm: in the first warm_epochs linearly from 0.01 to the rate of the last of them, step by step. The
    recipe has no rule for fewer epochs than that: then the first half (rounded down) is warm-up, to the rate of its last
    epoch.
    """

    def scheduled(epoch: int) -> float:
        if not cosine:
            return base * decay_rate ** sum(epoch > end for end in decay_epochs)
        lowest = base * 1e-3
        return lowest + (base - lowest) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    last = warm_epochs if epochs >= warm_epochs else epochs // 2
    if not warm or epoch > last:
        return scheduled(epoch)
    progress = (batch + (epoch - 1) * batches_per_epoch) / (last * batches_per_epoch)
    return 0.01 + progress * (scheduled(last) - 0.01)


def knn_accuracy(
    bank_features: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Accuracy in percent of k nearest neighbours by cosine, each with a vote exp(cosine / temperature).

    bank_features [N, D] with bank_labels [N]: the possible neighbours, all of them if fewer than k; features [M, D] with
    labels [M]: the classified images. The recipe does not report it; no training depends on it.
    """
    bank = F.normalize(bank_features.float(), dim=1)
    hits = torch.zeros((), dtype=torch.int64, device=features.device)
    for queries, wanted in zip(features.split(QUERIES), labels.split(QUERIES), strict=True):
        cosines, neighbours = (F.normalize(queries.float(), dim=1) @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(queries), num_classes, device=features.device)
        # relative to the nearest, against overflow at low temperatures
        votes.scatter_add_(1, bank_labels[neighbours], ((cosines - cosines[:, :1]) / temperature).exp())
        hits += (votes.argmax(dim=1) == wanted).sum()
    return 100 * float(hits) / len(labels)


# the recipe -------------------------------------------------------------------------------------------------------------


def pre_train(
    run: Run,
    args: Namespace,
    device: Device,
    network: SimCLR,
    train: Images,
    test: Images,
    labels: Tensor,
    test_labels: Tensor,
    num_classes: int,
    *,
    flip: bool,
    bank: Tensor | None = None,
    tested: np.ndarray | slice = slice(None),
    measure: Callable[[Tensor], dict[str, float | None]] | None = None,
    measured_names: Sequence[str] = (),
) -> None:
    """Train or resume the network until the end of the run, which keeps its encoder in encoder.safetensors.

    args: the recipe's flags after `settle`, dataset and seed. Only kNN uses labels [N] and test_labels: it searches the
    neighbours of test images among the training images at the positions bank [M], by default all. tested: positions of the
    test images that kNN classifies; --full_test_at_end adds all test images at the end. flip: whether views are mirrored.
    measure: called with the features [N, D] of the training images whenever kNN is measured. Its values under measured_names
    become columns of the log, and their last values become metrics last_<name> of the result.
    """
    if args.cuda_graphs and not args.compile:
        device.replay(network, (2 * args.batch_size, *train.pixels.shape[1:]))
    optimizer = SGD(
        network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=device.on_cuda()
    )
    generator = device.generator(args.seed)
    run.resume({"network": network, "optimizer": optimizer, "generator": generator})

    batches = Batches(
        train,
        args.batch_size,
        views=2,
        augmentation=partial(simclr_view, flip=flip),
        shuffle=True,
        drop_last=args.drop_last,
        generator=generator,
    )
    plain, every = (Batches(images, 2 * args.batch_size) for images in (train, test))
    chosen = torch.arange(len(test), device=test.device)[tested]
    few = Batches(test, 2 * args.batch_size, subset=chosen)
    rate = partial(
        learning_rate,
        base=args.lr,
        epochs=args.epochs,
        batches_per_epoch=len(batches),
        cosine=args.cosine,
        warm=args.warm,
        warm_epochs=args.warmup_epochs,
        decay_epochs=args.lr_decay_epochs,
        decay_rate=args.lr_decay_rate,
    )
    among = slice(None) if bank is None else bank
    for epoch in run.epochs(args.epochs):
        steps = run.progress(batches, f"epoch {epoch}")
        loss = train_epoch(network, optimizer, steps, partial(rate, epoch), args.temp, device)
        measured = epoch % args.knn_every == 0 or epoch == args.epochs
        values = dict.fromkeys(("knn_accuracy", *measured_names))
        if measured:
            passes = (run.progress(i, f"epoch {epoch} features", training=False) for i in (plain, few))
            features, queries = (pooled_features(network, images, device) for images in passes)
            neighbours = features[among], labels[among]
            values["knn_accuracy"] = knn_accuracy(*neighbours, queries, test_labels[chosen], num_classes)
            extra = {} if measure is None else measure(features)
            values |= {name: extra[name] for name in measured_names}
        run.log(epoch, loss=loss, **values, lr=optimizer.param_groups[0]["lr"])
        if measured:  # after the log, which refuses a loss that is not finite
            origin = {"dataset": args.dataset, "epochs": str(epoch), "seed": str(args.seed)}
            run.save_file("encoder.safetensors", encoder_file(network, origin))
    # the last epoch is a measured one
    last = {f"last_{name}": run.rows[-1][name] for name in ("loss", *measured_names)}

    def full_test() -> dict[str, float]:
        features, queries = (pooled_features(network, images, device) for images in (plain, every))
        accuracy = knn_accuracy(features[among], labels[among], queries, test_labels, num_classes)
        return {"full_test": accuracy, "full_test_images": len(test)}

    run.finish("knn_accuracy", **last, **run.full_test(full_test))


def train_epoch(
    network: SimCLR,
    optimizer: Optimizer,
    batches: Iterable,
    rate: Callable[[int], float],
    temperature: float,
    device: Device,
) -> float:
    """One pass over batches of two views; rate(batch): the learning rate of a step. Returns the mean loss over images."""
    network.train()
    losses, images = [], 0
    for batch, (views, index) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate(batch)
        with device.autocast(*graphs.unrecorded(network)):
            embeddings = network(torch.cat(views))  # both views share batch-norm statistics, as in the recipe
        loss = nt_xent(torch.stack(embeddings.chunk(2), dim=1), temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() * len(index))
        images += len(index)
    return float(torch.stack(losses).sum()) / images


@torch.no_grad()
def pooled_features(network: SimCLR, batches: Iterable, device: Device) -> Tensor:
    """Features [N, D] of plain images, in eval mode."""
    network.eval()
    with device.autocast():
        return torch.cat([network.features(images) for (images,), _ in batches])


def encoder_file(network: SimCLR, origin: dict[str, str]) -> bytes:
    """The encoder's tensors by name, with `origin` (its training), as a .safetensors file."""
    weights = {name: value.cpu().contiguous() for name, value in network.encoder.state_dict().items()}
    return safetensors.torch.save(weights, origin)
