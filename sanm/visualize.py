"""What the masks hide, and what they bring: `python -m sanm.visualize RUN [RUN ...] [--out FIGURE.png]`.

Above, test accuracy by epoch for each setting (data set and noise): the mean of each method over the runs given, with the range
over seeds. Pre-training runs have their kNN accuracy. Below, for the first finished run with masks: the clean probabilities of
the last epoch, correctly labelled against mislabelled, and some training images with the first network's activation map, both
masked copies and the reconstruction.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m sanm.visualize", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories of SANM's scripts")
    parser.add_argument(
        "--out", default="sanm.png", metavar="FILE", help="the figure to write (.png, .pdf or .svg)"
    )
    parser.add_argument(
        "--samples", type=cli.count, default=6, metavar="N", help="training images to show masks of"
    )
    parser.add_argument(
        "--data_path", metavar="DIR", help="where the data sets are, if not where the runs found them"
    )
    return parser


cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from common import datasets
from common.datasets import Data
from common.datasets.arrays import read_npy, read_npz
from common.gpu.loader import Images
from common.noise import POSTERIOR_TYPES
from common.runs import checkpoint, figures
from common.runs.cli import UserError
from common.runs.figures import RunResult, read_run
from sanm.choices import MaskRule
from sanm.masking import draw_masks, mask, quantised_activation
from sanm.networks import MaskedNetwork, make_network

CLEAN, MISLABELLED = "tab:blue", "tab:orange"
AT_MAX, AT_MIN = "tab:red", "deepskyblue"  # outlines of the masks
NOISE = {"sym": "symmetric", "asym": "asymmetric", **{kind: kind for kind in POSTERIOR_TYPES}}
COLUMNS = {
    "image": "black",
    "activation": "black",
    "mask at\nmaximum": AT_MAX,
    "mask at\nminimum": AT_MIN,
    "rebuilt from\nmask at max.": "black",
}
SEED = 0  # of the samples shown, and of their masks
ROW = 1.05  # inches, of a row of images


# reading --------------------------------------------------------------------------------------------------------------


def setting(run: RunResult) -> str:
    """Data set and noise of a run, in words."""
    arguments = run.curve.arguments
    if "dataset" not in arguments:
        return "Clothing1M"
    kind = arguments.get("noise_mode")
    noise = f"{NOISE[kind]} noise, r = {arguments.get('r')}" if kind in NOISE else "given labels"
    return f"{arguments['dataset']}, {noise}"


def title(run: RunResult) -> str:
    """Method, setting and seed of a run."""
    return f"{run.curve.method}, {setting(run)}, seed {run.curve.arguments.get('seed')}"


def has_masks(run: RunResult) -> bool:
    """Whether a run that made a split has masks, and weights to show them with."""
    files = [run.folder / name for name in (checkpoint.CURRENT, checkpoint.PREVIOUS)]
    return run.curve.arguments["masking"] == "adversarial" and any(path.is_file() for path in files)


def run_to_show(runs: list[RunResult]) -> RunResult | None:
    """The first run with a split and masks; if none has masks, the first with a split. Finished runs leave splits."""
    split = [
        run
        for run in runs
        if "masking" in run.curve.arguments and (run.folder / "clean_probability.npz").is_file()
    ]
    return next(iter([run for run in split if has_masks(run)] or split), None)


def read_split(folder: Path) -> dict[str, np.ndarray]:
    """Clean probabilities net1 and net2, observed and clean labels, each [N]. UserError: damaged."""
    path = folder / "clean_probability.npz"
    try:
        arrays = read_npz(path)
        arrays = {name: arrays[name] for name in ("net1", "net2", "observed", "clean")}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged, or not of SANM ({error})") from None
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or len(arrays["net1"].shape) != 1 or not len(arrays["net1"]):
        raise UserError(f"{path} is damaged: its arrays are of shapes {sorted(shapes)}")
    return arrays


def read_labels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where a run's training images stand in the data set, and their observed labels, int [N] each. UserError: damaged."""
    arrays = []
    for path in (folder / "train_index.npy", folder / "noisy_labels.npy"):
        try:
            arrays.append(read_npy(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    return arrays[0], arrays[1]


def load_data(run: RunResult, data_path: str | None) -> Data:
    """The data set of a run, at data_path if it is given, else where the run found it. UserError: not there."""
    arguments = run.curve.arguments
    try:
        return datasets.from_arguments(arguments, data_path)
    except UserError as error:
        raise UserError(
            f"{error}; or say where the training images of {run.folder} are with --data_path DIR"
        ) from None


def load_network(run: RunResult, data: Data) -> MaskedNetwork:
    """Network 1 with the weights of the last epoch, in eval mode on the CPU. UserError: none there, or of another shape."""
    arguments, (size, channels) = run.curve.arguments, data.train.images.shape[2:]
    arch = arguments.get("arch", "auto")  # older runs have no such flag
    network = make_network(
        arguments["base"], data.num_classes, channels, size, arguments["released_softmax"], arch
    )
    try:
        saved = checkpoint.load(run.folder)
        network.load_state_dict(saved["state"]["nets"][0])
    except UserError:
        raise UserError(f"{run.folder}: no checkpoint in it can be read, so no masks can be shown") from None
    except (RuntimeError, KeyError, IndexError, TypeError, AttributeError):
        raise UserError(
            f"{run.folder / checkpoint.CURRENT} does not fit the network for {data.name} that args.json describes"
        ) from None
    return network.eval()


# samples --------------------------------------------------------------------------------------------------------------


class Views(NamedTuple):
    """B training images with the maps, masks and reconstructions of network 1: float32 [B, C, H, W], normalised."""

    image: Tensor
    activation: Tensor  # [B, H, W], from 0 to 255
    at_max: Tensor  # the image with the mask at the activation's maximum
    at_min: Tensor
    reconstruction: Tensor  # of at_max
    ratio: Tensor  # float64 [B]: what the label loses; each mask covers half as much of the image


class Shown(NamedTuple):
    """The samples of the figure: their views, labels and clean probabilities, [B]."""

    views: Views
    observed: np.ndarray
    clean: np.ndarray  # true labels
    probability: np.ndarray  # clean probability by network 2's losses, which network 1 was trained with
    mean: Tensor  # per channel: what the images are normalised with
    std: Tensor


def choose(right: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` samples, drawn from right, bool [N]: half with right labels, which come first, half with wrong ones.

    Where one kind has too few the other has more; of each kind in ascending order.
    """
    order = np.random.default_rng(SEED).permutation(len(right))
    kinds = order[right[order]], order[~right[order]]
    wrong = min(count // 2, len(kinds[1]))
    numbers = min(count - wrong, len(kinds[0])), count - min(count - wrong, len(kinds[0]))
    return np.concatenate([np.sort(kind[:number]) for kind, number in zip(kinds, numbers, strict=True)])


@torch.no_grad()
def make_views(
    network: MaskedNetwork, images: Tensor, labels: Tensor, clean: Tensor, rule: MaskRule
) -> Views:
    """Activation, masks and reconstruction of normalised images [B, C, H, W] (README, section 5), with masks of a fixed seed.

    labels int [B]; clean: their clean probabilities [B], which decide how large the masks are.
    """
    maps, scores, _ = network(images)
    targets = F.one_hot(labels, scores.shape[1]).double()
    draws = draw_masks(len(images), images.shape[1], rule, torch.Generator().manual_seed(SEED))
    masked = mask(images, maps, clean, targets, draws, rule)
    rebuilt = network.reconstruct(network.encoder(masked.at_max), images.shape[2:])
    ratio = 1 - masked.targets_max.gather(1, labels[:, None])[:, 0]
    activation = quantised_activation(maps, *images.shape[2:])
    return Views(images, activation, masked.at_max, masked.at_min, rebuilt, ratio)


def read_samples(run: RunResult, split: dict[str, np.ndarray], count: int, data_path: str | None) -> Shown:
    """Training images of a run and their views by its first network. UserError: something is missing or does not fit."""
    arguments = run.curve.arguments
    try:
        flags = ("mask_lo", "mask_hi", "mask_quality", "mask_anchor", "clamp_targets")
        rule = MaskRule(*(arguments[flag] for flag in flags))
        data = load_data(run, data_path)
        network = load_network(run, data)
    except KeyError as error:
        raise UserError(f"{run.folder / 'args.json'} is damaged: it has no {error.args[0]}") from None
    index, observed = read_labels(run.folder)
    if (
        not np.array_equal(observed, split["observed"])
        or index.shape != observed.shape
        or not 0 <= index.min() <= index.max() < len(data.train.labels)
        or not np.array_equal(data.train.labels[index], split["clean"])
    ):
        raise UserError(
            f"{run.folder} was not trained on the {data.name} that is here, or is damaged: name the data with --data_path"
        )
    images = Images(data.train.images, data.mean, data.std, torch.device("cpu"))
    chosen = choose(observed == split["clean"], min(count, len(observed)))
    views = make_views(
        network,
        images.view(torch.from_numpy(index[chosen])),
        torch.from_numpy(observed[chosen]).long(),
        torch.from_numpy(split["net2"][chosen]),
        rule,
    )
    clean, probability = split["clean"][chosen], split["net2"][chosen]
    return Shown(views, observed[chosen], clean, probability, images.mean, images.std)


# drawing --------------------------------------------------------------------------------------------------------------


def draw_histogram(axes, probability: np.ndarray, right: np.ndarray, threshold: float) -> None:
    """One network's clean probabilities [N], of the samples with right labels, bool [N], and of the others, in two colours."""
    bins = np.linspace(0, 1, 41)
    for kind, label, color in (
        (right, "truly clean", CLEAN),
        (~right, "mislabelled", MISLABELLED),
    ):
        axes.hist(
            probability[kind], bins, alpha=0.6, color=color, label=f"{label}: {kind.sum()} images", log=True
        )
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold}")
    axes.set(xlabel="clean probability", ylabel="training images (log scale)", xlim=(0, 1), ylim=(0.5, None))
    axes.legend(fontsize=8, loc="upper center")


def draw_split(figure, run: RunResult, split: dict[str, np.ndarray]) -> None:
    """A histogram for each network."""
    right = split["observed"] == split["clean"]
    panels = figure.subplots(1, 2, sharey=True)
    for number, axes in enumerate(panels, start=1):
        probability = split[f"net{number}"]
        draw_histogram(axes, probability, right, run.curve.arguments["p_threshold"])
        auc = f", AUC {roc_auc_score(right, probability):.3f}" if 0 < right.sum() < len(right) else ""
        axes.set_title(
            f"By the losses of network {number}, for network {3 - number} to train on{auc}", fontsize=9
        )
    figure.suptitle(f"Clean probability in the last epoch ({title(run)})", fontsize=10)


def picture(image: Tensor, mean: Tensor, std: Tensor) -> np.ndarray:
    """A normalised image [C, H, W] as one to draw: float [H, W, 3], or [H, W] of a grey one, from 0 to 1."""
    image = (image * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    return image.permute(1, 2, 0).squeeze(2).numpy()


def outline(axes, before: Tensor, after: Tensor, color: str) -> None:
    """A frame around what the mask painted over."""
    rows, columns = (before != after).any(dim=0).nonzero(as_tuple=True)
    if len(rows):
        left, right, top, bottom = (int(edge) for edge in (*columns.aminmax(), *rows.aminmax()))
        corner, width, height = (left - 0.5, top - 0.5), right - left + 1, bottom - top + 1
        axes.add_patch(
            figures.plt.Rectangle(
                corner, width, height, fill=False, edgecolor=color, linewidth=1.5, clip_on=False
            )
        )


def draw_sample(row, shown: Shown, i: int) -> None:
    """Sample i in five panels: the image, its activation, the two masked copies, and the reconstruction of the first."""
    views, image = shown.views, shown.views.image[i]
    row[1].imshow(views.activation[i].numpy(), cmap="viridis", vmin=0, vmax=255)
    copies = views.at_max[i], views.at_min[i], views.reconstruction[i]
    for axes, view in zip(row[[0, 2, 3, 4]], (image, *copies), strict=True):
        axes.imshow(picture(view, shown.mean, shown.std), cmap="gray", vmin=0, vmax=1)
    for k in (1, 2):
        outline(row[k], image, views.at_max[i], AT_MAX)
    for k in (1, 3):
        outline(row[k], image, views.at_min[i], AT_MIN)
    for axes in row:
        axes.set(xticks=[], yticks=[])
    text = f"label {shown.observed[i]}, true {shown.clean[i]}\nclean prob. {shown.probability[i]:.2f}"
    row[0].set_ylabel(
        f"{text}\nmask ratio {100 * views.ratio[i]:.1f} %", rotation=0, ha="right", va="center", fontsize=8
    )


def sample_blocks(shown: Shown) -> list[tuple[str, str, np.ndarray]]:
    """Title, colour and samples of each block: rightly and wrongly labelled ones; halves where all are of a kind."""
    right = shown.observed == shown.clean
    kinds = (("rightly labelled", CLEAN, right), ("wrongly labelled", MISLABELLED, ~right))
    blocks = [(text, color, np.flatnonzero(kind)) for text, color, kind in kinds if kind.any()]
    if len(blocks) == 1:
        text, color, samples = blocks[0]
        blocks = [(text, color, half) for half in np.array_split(samples, 2) if len(half)]
    return blocks


def highest(blocks: list[tuple[str, str, np.ndarray]]) -> int:
    """Rows of the higher block."""
    return max(len(samples) for _, _, samples in blocks)


def draw_samples(figure, run: RunResult, shown: Shown) -> None:
    """Two blocks of rows side by side."""
    blocks = sample_blocks(shown)
    for part, (text, color, samples) in zip(figure.subfigures(1, 2), blocks, strict=False):
        grid = part.subplots(highest(blocks), 5, squeeze=False)
        for row, i in zip(grid, samples, strict=False):
            draw_sample(row, shown, i)
        for axes in grid[len(samples) :].ravel():
            axes.axis("off")
        for axes, (column, shade) in zip(grid[0], COLUMNS.items(), strict=True):
            axes.set_title(column, fontsize=8, color=shade)
        part.suptitle(text, fontsize=9, color=color)
    figure.suptitle(
        f"Where network 1 looks (activation from dark to bright) and what the masks hide ({title(run)})",
        fontsize=10,
    )


def draw(
    runs: list[RunResult],
    run: RunResult | None,
    split: dict[str, np.ndarray] | None,
    shown: Shown | None,
    out: Path,
) -> None:
    """Write the figure: the curves of the runs, and the split and the samples of one of them, if there are any."""
    panels = figures.panels(runs, lambda run: f"Test accuracy: {setting(run)}")
    parts = [
        (figures.panel_grid(panels).height, partial(figures.draw_panels, by_title=panels, warm_up="warm_up"))
    ]
    if split is not None:
        parts.append((2.9, partial(draw_split, run=run, split=split)))
    if shown is not None:
        parts.append((0.9 + ROW * highest(sample_blocks(shown)), partial(draw_samples, run=run, shown=shown)))
    figures.write_parts(parts, out)


def main(argv=None) -> None:
    """Parse the command line and draw."""
    args = make_parser().parse_args(argv)
    out = figures.checked_path(args.out)
    runs = [read_run(Path(run)) for run in args.runs]
    run = run_to_show(runs)
    split = None if run is None else read_split(run.folder)
    shown = (
        read_samples(run, split, args.samples, args.data_path) if run is not None and has_masks(run) else None
    )
    draw(runs, run, split, shown, out)
    print(f"figure in {out}")


if __name__ == "__main__":
    cli.exit_cleanly(main)
