"""`python -m common.datasets download cifar10 --data_path ./data` fetches; `check` in its place only looks."""

from common import datasets
from common.cli import Parser, exit_cleanly


def main(argv=None):
    """Fetch a data set, or look at one, and print what it holds."""
    parser = Parser(prog="python -m common.datasets", description=__doc__)
    parser.add_argument("action", choices=["download", "check"], help="fetch it, or only look at it")
    parser.add_argument("name", help=f"one of {', '.join(datasets.NAMES)}, or NAME for DATA_PATH/NAME.npz")
    parser.add_argument("--data_path", default="./data", metavar="DIR", help="the folder of the data sets")
    args = parser.parse_args(argv)
    if args.action == "download":
        datasets.download(args.name, args.data_path)
    data = datasets.load(args.name, args.data_path)
    for split in ("train", "test"):
        images, labels = getattr(data, split)
        print(
            f"{data.name} {split}: images {list(images.shape)}, {len(labels)} labels of {data.num_classes} classes"
        )


if __name__ == "__main__":
    exit_cleanly(main)
