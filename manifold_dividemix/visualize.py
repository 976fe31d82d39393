"""Which samples are removed as outliers: `python -m manifold_dividemix.visualize RUN [RUN ...] [--out FIGURE.png]`.

Above: test accuracy by epoch for each setting (images and noise), the mean of each method over the runs with the range over
seeds; and the kNN accuracy of pre-training runs. Below, for one finished run: outlier scores, a projection of the embeddings and
clean probabilities at the first and the last removal; precision and recall of the removal by epoch. Colours show which samples
are clean, mislabelled or OOD, if the true labels are known.
"""

import csv
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m manifold_dividemix.visualize", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories of this paper's scripts")
    parser.add_argument(
        "--out",
        default="manifold_dividemix.png",
        metavar="FILE",
        help="the figure to write (.png, .pdf or .svg)",
    )
    parser.add_argument(
        "--projection", choices=["tsne", "pca"], default="tsne", help="of the embeddings, to the plane"
    )
    return parser


cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import roc_auc_score

from common.datasets.arrays import is_integer, read_npz
from common.runs import figures
from common.runs.cli import UserError
from common.runs.data_flags import MINI_IMAGENET
from common.runs.figures import RunResult, naming
from manifold_dividemix.choices import split_epochs
from manifold_dividemix.outliers import outlier_auroc

PAPER = "manifold_dividemix"
NOISE = {"sym": "symmetric", "asym": "asymmetric"}
CLEAN, NOISY, OUTSIDE = "clean", "noisy label, in distribution", "out of distribution"
COLORS = {CLEAN: "tab:blue", NOISY: "tab:orange", OUTSIDE: "#6a1b6a"}
PRECISION, RECALL = "tab:green", "tab:red"
PROJECTIONS = {"tsne": "t-SNE", "pca": "principal component"}
SEED = 0  # of the projection
PERPLEXITY = 30  # t-SNE's, where there are samples enough
ROW = 3.4  # inches, of a row of panels on one run


class Kind(NamedTuple):
    """Samples that are alike: their name in the figure, their colour, and which they are, bool [N]."""

    name: str
    color: str
    members: np.ndarray


class Scored(NamedTuple):
    """Scores of the N training samples at the first or the last removal."""

    title: str  # which one, and at the start of which epoch
    score: np.ndarray  # float [N], small: an outlier
    kept: np.ndarray  # bool [N]: not removed
    embedding: np.ndarray  # float32 [S, D], of the samples shown
    shown: np.ndarray  # int [S]: their positions
    clean: np.ndarray | None  # clean probability, float [N], where there was a split


class Removal(NamedTuple):
    """The removal by epoch, float [E] each; NaN where it is not defined."""

    removed: np.ndarray  # samples
    precision: np.ndarray  # ratio of OOD images among them
    recall: np.ndarray  # ratio of removed images among the OOD images


class Shown(NamedTuple):
    """The run of the lower part, and its training samples."""

    run: RunResult
    kinds: list[Kind]
    ood: np.ndarray | None  # bool [N]: out of distribution; None if unknown
    removals: list[Scored]  # one or two
    curve: Removal | None  # None if the OOD images are unknown, or there are none


# reading --------------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> RunResult:
    """A run of any of this directory's scripts. UserError: it is none, damaged, or of another paper."""
    run = figures.read_run(folder)
    description = json.loads((folder / "args.json").read_text())
    paper = description.get("paper")
    if paper != PAPER:
        raise UserError(f"{folder} is a run of {paper or 'an unknown paper'}, not of {PAPER}")
    with naming(folder / "args.json"):
        # pre-training knows no labels, but the lists of mini-ImageNet name the images too
        of_list = run.curve.arguments["dataset"] == MINI_IMAGENET
        words = images(run) if run.pretraining and not of_list else setting(run)
    method = f"{description['method']} on {words}" if run.pretraining else run.curve.method
    return run._replace(curve=run.curve._replace(method=method))


def percent(ratio: float) -> str:
    """A ratio in percent, at most four digits."""
    return f"{100 * ratio:.4g} %"


def images(run: RunResult) -> str:
    """The training images of a run, in words."""
    arguments = run.curve.arguments
    name = arguments["dataset"]
    if name == MINI_IMAGENET:
        return f"{name} at {arguments['img_size']} pixels"
    ratio = arguments["ood_ratio"]
    return f"{name} with {percent(ratio)} {arguments['corruption']}" if ratio else name


def noise(run: RunResult) -> str:
    """The label noise of a run, in words; of mini-ImageNet its list."""
    arguments = run.curve.arguments
    if arguments.get("noise_file"):
        return "given labels"
    kind, rate = arguments["noise_type"], arguments["noise_ratio"]
    return f"{percent(rate)} {NOISE.get(kind, kind)} noise" if kind != "no" and rate else "no label noise"


def setting(run: RunResult) -> str:
    """Images and label noise of a run, in words."""
    return f"{images(run)}, {noise(run)}"


def run_to_show(runs: list[RunResult]) -> RunResult | None:
    """The first finished run with removed samples at two epochs; else with removed samples; else with scores."""

    def lacks(run: RunResult) -> tuple[bool, bool]:
        return run.curve.arguments.get("remove_ood") == 0, not (run.folder / "outliers_last.npz").is_file()

    files = ("outliers_first.npz", "result.json")
    finished = [run for run in runs if all((run.folder / name).is_file() for name in files)]
    return min(finished, key=lacks, default=None)


def read_samples(folder: Path) -> dict[str, np.ndarray]:
    """Observed labels int [N]; clean labels int [N] and ood bool [N] if they are known. UserError: damaged."""
    path = folder / "samples.npz"
    with naming(path):
        arrays = read_npz(path)
        samples: dict[str, np.ndarray] = {n: arrays[n] for n in ("observed", "clean", "ood") if n in arrays}
        shapes = {array.shape for array in samples.values()}
        if len(shapes) != 1 or samples["observed"].ndim != 1 or ("clean" in samples) != ("ood" in samples):
            raise ValueError(f"{', '.join(samples)} of shapes {sorted(shapes)}")
        if samples.get("ood", np.zeros(1, bool)).dtype != bool:
            raise ValueError("ood is not boolean")
    return samples


def make_kinds(samples: dict[str, np.ndarray]) -> list[Kind]:
    """The kinds of samples, without empty ones; one kind if the true labels are unknown."""
    if "ood" not in samples:
        return [Kind("training images", "tab:blue", np.ones(len(samples["observed"]), bool))]
    right, ood = samples["observed"] == samples["clean"], samples["ood"]
    members = {CLEAN: right & ~ood, NOISY: ~right & ~ood, OUTSIDE: ood}
    return [Kind(name, COLORS[name], which) for name, which in members.items() if which.any()]


def read_scored(path: Path, title: str, size: int) -> Scored:
    """One file of outliers of `size` samples. UserError: damaged, or of other samples."""
    with naming(path):
        arrays = read_npz(path)
        score, kept, embedding, shown = (arrays[name] for name in ("score", "kept", "embedding", "shown"))
        clean = arrays.get("clean_probability")
        numbers = [score, embedding] + ([] if clean is None else [clean])
        if any(array.dtype.kind != "f" or not np.isfinite(array).all() for array in numbers):
            raise ValueError("not all of its scores, embeddings and probabilities are finite numbers")
        if {array.shape for array in (score, kept, score if clean is None else clean)} != {(size,)}:
            raise ValueError(f"it is not of the {size} samples in samples.npz")
        if kept.dtype != bool or not is_integer(shown) or embedding.ndim != 2 or min(embedding.shape) < 2:
            raise ValueError("kept, shown or embedding is of another kind")
        if shown.shape != embedding.shape[:1] or not 0 <= shown.min() <= shown.max() < size:
            raise ValueError("shown is not the positions of the embeddings")
    return Scored(title, score, kept, embedding.astype(np.float32), shown, clean)


def read_removals(run: RunResult, size: int) -> list[Scored]:
    """The first removal, and the last if there were several. UserError: damaged."""
    first = read_scored(run.folder / "outliers_first.npz", "first look (epoch 1)", size)
    path = run.folder / "outliers_last.npz"
    if not path.is_file():
        return [first]
    with naming(run.folder / "args.json"):
        flags = (run.curve.arguments[flag] for flag in ("epochs", "warmup_epoch", "interval", "clustering"))
        epoch = 1 + max(split_epochs(*flags))  # the release counts from 0
    return [first, read_scored(path, f"last look (epoch {epoch})", size)]


def read_removal(folder: Path) -> Removal:
    """The removal by epoch, from log.csv. UserError: damaged."""
    path = folder / "log.csv"
    with naming(path), path.open(newline="") as file:
        rows = list(csv.DictReader(file))
        columns = [f"removal_{name}" for name in Removal._fields[1:]]
        return Removal(
            *(np.array([float(row[name] or "nan") for row in rows]) for name in ("removed", *columns))
        )


def read_shown(run: RunResult) -> Shown:
    """All that the lower part shows of a run. UserError: a file of it is damaged."""
    samples = read_samples(run.folder)
    ood = samples.get("ood")
    with naming(run.folder / "args.json"):
        float(run.curve.arguments["p_threshold"])
    return Shown(
        run=run,
        kinds=make_kinds(samples),
        ood=ood,
        removals=read_removals(run, len(samples["observed"])),
        curve=read_removal(run.folder) if ood is not None and ood.any() else None,
    )


# drawing --------------------------------------------------------------------------------------------------------------


def draw_scores(axes, scored: Scored, kinds: list[Kind], ood: np.ndarray | None) -> None:
    """Outlier scores of each kind, and the score up to which samples are removed (README, section 4.2)."""
    bins = np.linspace(float(scored.score.min()), float(scored.score.max()) + 1e-9, 41)
    draw_kinds(axes, scored.score, kinds, bins)
    removed = scored.score[~scored.kept]
    if len(removed):
        axes.axvspan(bins[0], removed.max(), color="gray", alpha=0.15, linewidth=0)
        label = f"up to here {len(removed)} removed"
        axes.axvline(removed.max(), color="black", linestyle="--", linewidth=1, label=label)
        axes.legend(fontsize=8)
    axes.set(
        xlabel="outlier score (small: far from all others)", ylabel="training images", xlim=bins[[0, -1]]
    )
    axes.locator_params(axis="x", nbins=5)
    auroc = outlier_auroc(torch.from_numpy(scored.score), ood)
    measured = "" if auroc is None else f"\nAUROC against true OOD {auroc:.3f}"
    axes.set_title(f"Outlier score, {scored.title}{measured}", fontsize=9)


def draw_kinds(axes, values: np.ndarray, kinds: list[Kind], bins: np.ndarray) -> None:
    """Histograms of values [N], one for each kind of samples, over one another."""
    for kind in kinds:
        chosen = values[kind.members]
        axes.hist(chosen, bins, color=kind.color, alpha=0.3)
        axes.hist(chosen, bins, color=kind.color, histtype="step", linewidth=1.2)


def draw_clean(axes, scored: Scored, kinds: list[Kind], threshold: float) -> None:
    """Clean probabilities of each kind, removed samples included (README, section 4.4)."""
    draw_kinds(axes, scored.clean, kinds, np.linspace(0, 1, 41))
    axes.set_yscale("log")
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    axes.set(xlabel="clean probability", ylabel="training images (log scale)", xlim=(0, 1), ylim=(0.5, None))
    axes.legend(fontsize=8, loc="upper center")
    axes.set_title(f"Clean probability, {scored.title}{auc_of_clean(scored.clean, kinds)}", fontsize=9)


def auc_of_clean(clean: np.ndarray, kinds: list[Kind]) -> str:
    """AUC of clean probabilities against clean labels, in distribution: a second line of a title."""
    by_name = {kind.name: kind.members for kind in kinds}
    if not {CLEAN, NOISY} <= by_name.keys():
        return ""
    inside = by_name[CLEAN] | by_name[NOISY]
    return f"\nAUC {roc_auc_score(by_name[CLEAN][inside], clean[inside]):.3f} of clean against noisy labels"


def project(embedding: np.ndarray, projection: str) -> np.ndarray:
    """Embeddings [S, D], S >= 2, in the plane: [S, 2]. They get unit length first, as the outlier score compares angles."""
    rows = embedding / np.linalg.norm(embedding, axis=1, keepdims=True).clip(1e-12)
    if (rows == rows[0]).all():  # t-SNE would divide by their spread
        return np.zeros((len(rows), 2))
    if projection == "pca":
        return PCA(2, svd_solver="full").fit_transform(rows)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=SEED).fit_transform(rows)


def draw_projection(axes, scored: Scored, kinds: list[Kind], projection: str) -> None:
    """Embeddings of the samples shown, in the plane: coloured by kind, removed ones as crosses."""
    points = project(scored.embedding, projection)
    colors = np.zeros((len(scored.score), 3))
    for kind in kinds:
        colors[kind.members] = to_rgb(kind.color)
    kept, colors = scored.kept[scored.shown], colors[scored.shown]
    # all kinds at once, or the last would hide the others
    axes.scatter(*points[kept].T, c=colors[kept], s=7, linewidth=0, alpha=0.7)
    axes.scatter(*points[~kept].T, c=colors[~kept], s=22, marker="x", linewidth=1)
    axes.set(
        xticks=[], yticks=[], xlabel=f"{PROJECTIONS[projection]} 1", ylabel=f"{PROJECTIONS[projection]} 2"
    )
    some = "" if len(points) == len(scored.score) else f"\n{len(points)} of {len(scored.score)} samples"
    axes.set_title(f"Embeddings, {scored.title}{some}", fontsize=9)


def draw_removal(axes, removal: Removal, ood: np.ndarray) -> None:
    """Precision and recall of the removal by epoch, and those of as many samples drawn at random."""
    epochs = np.arange(1, len(removal.removed) + 1)
    at_random = f"precision at random: OOD ratio {percent(ood.mean())}"
    curves = (
        ("precision", removal.precision, PRECISION, "-"),
        (at_random, np.full(len(epochs), ood.mean()), PRECISION, ":"),
        ("recall", removal.recall, RECALL, "-"),
        ("recall at random", removal.removed / len(ood), RECALL, ":"),
    )
    for label, values, color, style in curves:
        axes.step(epochs, 100 * values, style, where="mid", color=color, label=label)
    axes.set(xlabel="epoch", ylabel="percent", ylim=(0, 102))
    axes.set_title("Removal against true OOD", fontsize=9)
    figures.legend_below(axes, ncols=2, fontsize=7.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def panels_of(shown: Shown, projection: str) -> list[Callable]:
    """The functions that draw the panels on the run: histograms, then projections and the removal."""
    kinds, removals = shown.kinds, shown.removals
    panels: list[Callable] = [
        partial(draw_scores, scored=scored, kinds=kinds, ood=shown.ood) for scored in removals
    ]
    if removals[-1].clean is not None:
        threshold = shown.run.curve.arguments["p_threshold"]
        panels.append(partial(draw_clean, scored=removals[-1], kinds=kinds, threshold=threshold))
    panels += [
        partial(draw_projection, scored=scored, kinds=kinds, projection=projection) for scored in removals
    ]
    if shown.curve is not None:
        panels.append(partial(draw_removal, removal=shown.curve, ood=shown.ood))
    return panels


def grid_of(panels: int) -> tuple[int, int]:
    """Rows and columns of the panels on the run: at most three in a row, four in two rows of two."""
    columns = 2 if panels == 4 else min(panels, 3)
    return -(-panels // columns), columns


def draw_shown(figure, shown: Shown, panels: list[Callable]) -> None:
    """The panels on the run, with one legend of the samples."""
    grid = figure.subplots(*grid_of(len(panels)), squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    marks: list[Artist] = [
        Patch(color=kind.color, label=f"{kind.name}: {kind.members.sum()}") for kind in shown.kinds
    ]
    for marker, name in ((".", "kept"), ("x", "removed")):
        marks.append(Line2D([], [], color="black", marker=marker, linestyle="", label=name))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=9, frameon=False)
    curve = shown.run.curve
    figure.suptitle(
        f"Training images as seen by {curve.method}: {setting(shown.run)}, seed {curve.arguments.get('seed')}",
        fontsize=10,
    )


def draw(runs: list[RunResult], shown: Shown | None, projection: str, out: Path) -> None:
    """Write the figure: the curves of the runs, and the removal of one of them if there is any."""
    curves = figures.panels(runs, lambda run: f"Test accuracy: {images(run)}\n{noise(run)}")
    panels = [] if shown is None else panels_of(shown, projection)
    parts = [
        (
            figures.panel_grid(curves).height,
            partial(figures.draw_panels, by_title=curves, warm_up="warmup_epoch"),
        )
    ]
    if panels:
        height = 0.7 + ROW * grid_of(len(panels))[0]
        parts.append((height, partial(draw_shown, shown=shown, panels=panels)))
    figures.write_parts(parts, out)


def main(argv=None) -> None:
    """Parse the command line and draw."""
    args = make_parser().parse_args(argv)
    out = figures.checked_path(args.out)
    runs = [read_run(Path(run)) for run in args.runs]
    run = run_to_show(runs)
    draw(runs, None if run is None else read_shown(run), args.projection, out)
    print(f"figure in {out}")


if __name__ == "__main__":
    cli.exit_cleanly(main)
