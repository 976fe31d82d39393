"""`python -m common.datasets download cifar10 --data_path ./data` downloads a data set; `check` only checks it.

`cache food101n --data_path DIR --out CACHE` makes small copies of the images of a data set of image files.
"""

from pathlib import Path

from common import datasets
from common.datasets import clothing1m, folder, food101n, image_cache, pools, webvision
from common.datasets.given_labels import label_notes
from common.runs.cli import Parser, UserError, count, count_or_zero, exit_cleanly

CACHED = (food101n.NAME, clothing1m.NAME, webvision.NAME)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m common.datasets", description=__doc__)
    parser.add_argument(
        "action",
        choices=["download", "check", "cache"],
        help="download it, check it, or make small copies of its images",
    )
    parser.add_argument(
        "name",
        help=f"one of {', '.join((*datasets.NAMES, *datasets.FILE_NAMES, *pools.FOLDERS, folder.NAME))}, or NAME for "
        "DATA_PATH/NAME.npz",
    )
    parser.add_argument("--data_path", default="./data", metavar="DIR", help="the folder of the data sets")
    group = parser.add_argument_group(f"for {', '.join((*datasets.FILE_NAMES, folder.NAME))}")
    group.add_argument("--images", action="store_true", help="check: decode every image")
    group.add_argument(
        "--workers", type=count_or_zero, default=4, metavar="N", help="processes that decode images"
    )
    group.add_argument("--out", metavar="DIR", help="cache: the folder to write to")
    group.add_argument(
        "--size",
        type=count,
        default=image_cache.SIZE,
        metavar="N",
        help="cache: pixels of the shorter side; training on webvision uses 320",
    )
    group.add_argument(
        "--on_bad_image",
        choices=["error", "skip"],
        default="error",
        help="cache: stop at a missing or damaged image, or leave it out",
    )
    group.add_argument(
        "--train_on",
        choices=clothing1m.TRAIN_ON,
        default="noisy",
        help="cache: the training images of clothing1m",
    )
    group.add_argument(
        "--imagenet",
        metavar="DIR|none",
        help="of webvision: where val/ of ILSVRC12 is; by default DATA_PATH/imagenet",
    )
    group.add_argument(
        "--num_class",
        type=count,
        default=webvision.CLASSES,
        metavar="N",
        help="of webvision: its first N classes",
    )
    return parser


def main(argv=None):
    """Download or check a data set and print its content, or make a cache of its images."""
    args = make_parser().parse_args(argv)
    name = datasets.ALIASES.get(args.name, args.name)
    if args.action == "cache" and name not in CACHED:
        raise UserError(f"{name} needs no cache: only {', '.join(CACHED)} have large images in files")
    if name == folder.NAME:
        if args.action == "download":
            raise UserError(f"{name} stands for your own images: put them into {folder.LAYOUT}")
        folder.check(args.data_path, args.images, args.workers)
        return
    if name in datasets.FILE_NAMES:
        image_files(name, args)
        return
    if name in pools.FOLDERS:
        if args.action == "download":
            raise UserError(
                f"{name} cannot be fetched by a script: see python -m common.datasets check {name}"
            )
        print(f"{name}: {pools.open_pool(name, Path(args.data_path)).size} images")
        return
    if args.action == "download":
        datasets.download(name, args.data_path)
    data = datasets.load(name, args.data_path)
    for split in ("train", "test"):
        images, labels = getattr(data, split)
        print(
            f"{data.name} {split}: images {list(images.shape)}, {len(labels)} labels of {data.num_classes} classes"
        )
    for note in label_notes(data.train.labels, data.train.labels, data.num_classes, from_file=False):
        print(f"note: {note}")


def image_files(name: str, args) -> None:
    """The same for a data set of image files."""
    if args.action == "download":
        raise UserError(f"{name} cannot be fetched by a script: get it from {datasets.source(name)}")
    only_webvision = {"imagenet": args.imagenet, "num_class": args.num_class}
    if not 2 <= args.num_class <= webvision.ALL_CLASSES:
        raise UserError(
            f"--num_class {args.num_class}: WebVision has {webvision.ALL_CLASSES} classes, 2 at least are needed"
        )
    if args.action == "check":
        datasets.check(name, args.data_path, args.images, args.workers, **only_webvision)
        return
    if args.out is None:
        raise UserError("cache needs --out DIR, the folder to write to")
    data = datasets.load_files(
        name, args.data_path, args.train_on, args.on_bad_image, args.workers, **only_webvision
    )
    image_cache.build_caches(args.out, data, args.workers, args.size)


if __name__ == "__main__":
    exit_cleanly(main)
