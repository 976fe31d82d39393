"""What the flags of train.py choose between. No torch here: `--help` needs none."""

from argparse import Namespace

from common.runs.data_flags import FOLDER

INTERACTIONS = ("sum", "concat", "mul")
ATTENTIONS = ("relu-sigmoid", "sigmoid", "softmax", "complement")
WEIGHTS = ("attentive", "uniform", "random")
ORDERS = ("halves", "random")
TARGETS = ("soft", "both")
PREACT = ("preact_resnet18", "preact_narrow")
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", *PREACT)
ON_DISK = ("food", "clothing1m")
IMAGE_SIZE = 224  # of crops of image files


def reads_files(args: Namespace) -> bool:
    """Whether a run reads its images from their files in every epoch; a folder's at the size of Food-101N's crops alone."""
    return args.dataset in ON_DISK or (args.dataset == FOLDER and args.image_size == IMAGE_SIZE)
