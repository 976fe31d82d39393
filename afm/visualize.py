"""Who gets how much attention: `python -m afm.visualize RUN [RUN ...] [--out FIGURE.png]`.

Above, for each setting (data set and noise), test accuracy by epoch: the mean of each method over the runs given, with the
range over seeds. In the middle, for the first run of each method that learnt an attention, the mean weights of its samples:
right labels against wrong ones, with their AUC. Below, the images with the highest and the lowest weights, of the one of
these runs that has the highest AUC. With `--list FILE --images-root DIR` the attention weights of
all ordered pairs of some images of your own are written too, as the release's vis.py does.
"""

import io
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m afm.visualize", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--out", default="afm.png", metavar="FILE", help="the figure to write (.png, .pdf or .svg)"
    )
    parser.add_argument(
        "--data-root", metavar="DIR", help="where the images are, if not where the runs found them"
    )
    parser.add_argument(
        "--list", metavar="FILE", help="images whose pairs are weighed by the first run's network"
    )
    parser.add_argument(
        "--images-root", default=".", metavar="DIR", help="the folder that --list's paths are below"
    )
    return parser


cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch

from afm.choices import IMAGE_SIZE, ON_DISK
from afm.data import images_at
from afm.networks import AttentiveFeatureMixup, make_network
from afm.training import attention_statistics, pair_weights
from common.datasets.arrays import read_npz
from common.datasets.file_lists import IMAGENET_MEAN, IMAGENET_STD
from common.datasets.images import DamagedImage, read_image
from common.gpu.augment import normalise, resize_and_center_crop
from common.gpu.weights import read_weights
from common.runs import figures
from common.runs.cli import UserError
from common.runs.files import write_atomic

SHOWN = 8  # images at each end


class RunResult(NamedTuple):
    """What is read of a run directory."""

    folder: Path
    method: str
    arguments: dict
    accuracy: np.ndarray  # test accuracy by epoch
    attention: dict[str, np.ndarray] | None  # the arrays of attention.npz


def read_run(folder: Path, data_root: str | None = None) -> RunResult:
    """Method, arguments, accuracy curve and attention of a run directory. UserError: it is none.

    data_root: where the data set is now, if it is not where the run found it.
    """
    method, arguments, accuracy = figures.read_curve(folder)
    attention = None
    try:
        if (folder / "attention.npz").is_file():
            arrays = read_npz(folder / "attention.npz")
            attention = {name: arrays[name] for name in ("position", "weight", "known", "observed")}
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder / 'attention.npz'} is damaged, or not of AFM ({error})") from None
    arguments |= {"data_root": data_root} if data_root else {}
    return RunResult(folder, method, arguments, accuracy, attention)


def setting(run: RunResult) -> str:
    """Data set and noise of a run, in words."""
    arguments = run.arguments
    if arguments["noise_type"] in ("given", "none"):
        return f"{arguments['dataset']}, {arguments['noise_type']} labels"
    return f"{arguments['dataset']}, {arguments['noise_type']} noise, rate {arguments['noise_rate']}"


def auc(run: RunResult) -> float | None:
    """AUC of a run's attention weights as a detector of right labels; None if the true labels are unknown."""
    weight, known = (torch.from_numpy(run.attention[name]) for name in ("weight", "known"))
    return attention_statistics(weight, known)["attention_auc"]


def draw_weights(axes, run: RunResult) -> None:
    """Histogram of the samples' mean attention weights: right against wrong labels where the truth is known."""
    weight, known = run.attention["weight"], run.attention["known"]
    # a margin, or the bins have no width where all weights are equal
    bins = np.linspace(float(np.nanmin(weight)) - 1e-3, float(np.nanmax(weight)) + 1e-3, 31)
    for truth, label, color in (
        (1, "right", "tab:blue"),
        (0, "wrong", "tab:orange"),
        (-1, "not known", "tab:gray"),
    ):
        if (known == truth).any():
            axes.hist(
                weight[known == truth], bins, alpha=0.6, color=color, label=f"{label} labels", density=True
            )
    value = auc(run)
    text = "true labels unknown" if value is None else f"AUC {value:.3f}"
    axes.set_title(f"{setting(run)}\n{run.method}, {run.folder.name}: {text}", fontsize=8)
    axes.set_xlabel("mean attention weight of a sample", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)


def draw_images(figure, run: RunResult) -> None:
    """The images with the highest weights above, with the lowest below, with observed label and what is known of it."""
    weight = run.attention["weight"]
    order = np.argsort(np.where(np.isnan(weight), np.nanmedian(weight), weight), kind="stable")
    count = min(SHOWN, len(order))
    shown = np.concatenate([order[::-1][:count], order[:count]])
    # attention.npz counts the run's training images, whose places in the data set are in train_index.npy
    index = np.load(run.folder / "train_index.npy", allow_pickle=False)
    images = images_at(Namespace(**run.arguments), index[run.attention["position"][shown]])
    grid = figure.subplots(2, SHOWN, squeeze=False)
    for axes, image, sample in zip(grid[:, :count].ravel(), images, shown, strict=True):
        known = {1: "right", 0: "wrong", -1: "?"}[int(run.attention["known"][sample])]
        axes.imshow(image.squeeze(), cmap="gray" if image.shape[2] == 1 else None)
        axes.set_title(
            f"{weight[sample]:.3f}\nlabel {run.attention['observed'][sample]}, {known}", fontsize=7
        )
    for axes in grid.ravel():
        axes.axis("off")
    figure.suptitle(
        f"{setting(run)}: {run.method}, {run.folder.name}: highest weights above, lowest below", fontsize=9
    )


def draw(runs: list[RunResult], out: Path) -> None:
    """Write the figure of the given runs."""
    settings, attentive = {}, {}
    for run in runs:
        settings.setdefault(setting(run), []).append(run)
        if run.attention is not None:
            attentive.setdefault((setting(run), run.method), run)
    width = max(11, 3.7 * max(len(settings), len(attentive)))
    figure = figures.plt.figure(figsize=(width, 9 if attentive else 4), layout="constrained")
    upper = figure
    if attentive:
        upper, middle, lower = figure.subfigures(3, 1, squeeze=False, height_ratios=[1.1, 0.9, 1])[:, 0]
        panels = middle.subplots(1, len(attentive), squeeze=False)[0]
        for axes, run in zip(panels, attentive.values(), strict=True):
            draw_weights(axes, run)
        draw_images(lower, max(attentive.values(), key=lambda run: auc(run) or 0.0))
    panels = upper.subplots(1, len(settings), squeeze=False)[0]
    for axes, (name, members) in zip(panels, settings.items(), strict=True):
        figures.draw_curves(axes, [(run.method, run.accuracy) for run in members])
        axes.set_title(name, fontsize=9)
    figures.write(figure, out)


# the release's vis.py ---------------------------------------------------------------------------------------------------


def write_pairs(network: AttentiveFeatureMixup, listing: Path, images_root: Path, out: Path) -> None:
    """features.npy (float32 [T, D]) and weight.npy (float32 [T, T, 2]) of T images for all ordered pairs.

    listing: a line per image, whitespace between columns; the second column is its path below images_root, or the first
    where there is only one. UserError: no such image.
    """
    try:
        lines = [line.split() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--list {listing}: cannot be read ({error})") from None
    if not lines:
        raise UserError(f"--list {listing}: names no image")
    transform = resize_and_center_crop()
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    rows = []
    for columns in lines:
        path = images_root / columns[min(1, len(columns) - 1)]
        try:
            image = transform(read_image(path))
        except (OSError, DamagedImage) as error:
            raise UserError(f"--list {listing}: {path} cannot be read ({error})") from None
        with torch.no_grad():
            rows.append(network.features(normalise(image[None], mean, std)))
    features = torch.cat(rows)
    for name, array in (("features.npy", features), ("weight.npy", pair_weights(network, features))):
        content = io.BytesIO()
        np.save(content, array.numpy())
        write_atomic(out / name, content.getvalue())
        print(f"{name} {list(array.shape)} in {out}")


def best_network(run: RunResult) -> AttentiveFeatureMixup:
    """The network of a run on image files with the weights of model_best.pt, in eval mode on the CPU."""
    if run.attention is None or run.arguments["group_size"] != 2 or run.arguments["dataset"] not in ON_DISK:
        raise UserError(
            f"{run.folder}: --list needs a finished run of AFM on image files with --group-size 2"
        )
    weights = read_weights(run.folder / "model_best.pt", "--list: the run's weights")
    args = Namespace(**{**run.arguments, "pretrained": "none"})
    network = make_network(args, len(weights["classifier.bias"]), IMAGE_SIZE)
    network.load_state_dict(weights)
    return network.eval()


def main(argv=None) -> None:
    """Parse the command line and draw."""
    args = make_parser().parse_args(argv)
    out = figures.checked_path(args.out)
    runs = [read_run(Path(run), args.data_root) for run in args.runs]
    if args.list:
        write_pairs(best_network(runs[0]), Path(args.list), Path(args.images_root), out.parent)
    draw(runs, out)
    print(f"figure in {out}")


if __name__ == "__main__":
    cli.exit_cleanly(main)
