"""SimCLR pre-training of Manifold DivideMix's encoder on the corrupted images, without labels; also on the embedded digits.

    python manifold_dividemix/pretrain.py --preset embedded/digits-ood0.2/simclr      # a minute on a laptop, no data needed
    python manifold_dividemix/pretrain.py --corruption imagenet32              # CIFAR-100 and the pool under ./data
    python manifold_dividemix/pretrain.py --dataset mini_imagenet --noise-type red --data-dir DIR

The encoder is in encoder.safetensors of the run directory. The release does not include this step, and the paper's recipe could
not be read. The recipe is this project's choice: SimCLR as SupContrast documents it.
"""

import sys
from pathlib import Path

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli
from manifold_dividemix.flags import make_pretrain_parser as make_parser

cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
from torch import Tensor

from common.gpu import device as gpu
from common.gpu.loader import Images
from common.pretraining import simclr
from common.pretraining.simclr import SimCLR
from common.runs.cli import UserError
from common.runs.data_flags import MINI_IMAGENET
from common.runs.run import Run
from manifold_dividemix import dataset as data
from manifold_dividemix.flags import parse_pretrain_args as parse_args
from manifold_dividemix.flags import pretrain_cell, pretrain_directory
from manifold_dividemix.networks import make_encoder
from manifold_dividemix.outliers import knn_scores, outlier_auroc

DIMENSIONS = 128  # of the embeddings that the loss compares; the head is dropped afterwards


@cli.script
def main(argv=None) -> None:
    """Pre-train an encoder and write its run directory (README, section 4.0)."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, args.gpu, fidelity=args.fidelity)
    mini = args.dataset == MINI_IMAGENET
    dataset = data.load_mini_imagenet(args) if mini else data.load_open_set(args)
    size = len(dataset.observed)
    if size < 2:
        raise UserError("one training image has no neighbours: use a larger --limit_train or data set")
    if args.drop_last and size < args.batch_size:
        raise UserError(f"--drop_last: a batch of {args.batch_size} is more than all {size} images")
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    encoder = make_encoder(args.arch, dataset.images.shape[3], dataset.images.shape[1])
    network = SimCLR(encoder, encoder.width, DIMENSIONS)
    run = Run(
        args,
        device,
        paper="manifold_dividemix",
        method="SimCLR",
        name=pretrain_directory(args),
        cell=pretrain_cell(args, dataset.name),
    )
    data.save(dataset, run)

    train, test = (
        Images(pixels, dataset.mean, dataset.std, device.device)
        for pixels in (dataset.images, dataset.test_images)
    )
    # only kNN uses labels: the true ones if they are known, of images in distribution
    compared = dataset.observed if dataset.clean is None else dataset.clean
    in_distribution = np.arange(size) if dataset.ood is None else np.flatnonzero(~dataset.ood)
    labels, test_labels, bank = (
        torch.from_numpy(array).to(device.device)
        for array in (compared, dataset.test_labels, in_distribution)
    )

    def measure(features: Tensor) -> dict[str, float | None]:
        return {"ood_auroc": outlier_auroc(knn_scores(features, args.knn_k), dataset.ood)}

    simclr.pre_train(
        run,
        args,
        device,
        device.prepare(network, args.compile),
        train,
        test,
        labels,
        test_labels,
        dataset.num_classes,
        # a mirrored digit is another sign or none
        flip=args.dataset not in ("digits", "mnist"),
        bank=bank,
        tested=dataset.tested,
        measure=measure,
        measured_names=("ood_auroc",),
    )


if __name__ == "__main__":
    cli.exit_cleanly(main)
