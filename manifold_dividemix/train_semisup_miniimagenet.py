"""Manifold DivideMix on mini-ImageNet with controlled web noise, CNWL (CVPR-W 2024).

    python manifold_dividemix/train_semisup_miniimagenet.py --data-dir DIR --pretrained .../encoder.safetensors
    torchrun --nproc_per_node=4 manifold_dividemix/train_semisup_miniimagenet.py ...        # the same on four cards

DIR, by default data/mini-imagenet, holds split/, all_images/ and validation/. Images are decoded once and stay on the device.
The training is that of train_semisup.py. The true labels are unknown, so the log has no figures that need them.
"""

import sys
from pathlib import Path

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli
from manifold_dividemix.flags import make_mini_imagenet_parser as make_parser

cli.show_help(__name__, make_parser)  # before imports that take seconds

from common.gpu import device as gpu
from manifold_dividemix import dataset as data
from manifold_dividemix.flags import mini_imagenet_cell, mini_imagenet_directory
from manifold_dividemix.flags import parse_mini_imagenet_args as parse_args
from manifold_dividemix.train_semisup import start


@cli.script
def main(argv=None) -> None:
    """Train Manifold DivideMix on mini-ImageNet and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(
        args.device, args.precision, args.gpu, several=True, fidelity=args.fidelity, fixed_shapes=False
    )
    dataset = data.load_mini_imagenet(args)
    start(dataset, args, device, mini_imagenet_directory(args), mini_imagenet_cell(args, dataset.name))


if __name__ == "__main__":
    cli.exit_cleanly(main)
