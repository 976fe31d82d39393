"""label_quality.csv: what a run estimates about the given label of each of its training images.

One row per training image, in the order of train_index.npy. Cells are empty where something is unknown.

index                   position in the official training set
path                    of the image file; empty for data sets in memory
given_label             the label that was trained on, from 0
given_class             its name, where the data set has names
score                   in [0, 1]: the higher, the more likely the given label is right; the method's own estimate
selected                1: the method's last selection takes the label as right, 0: it does not; of two networks, both must
predicted_label         the most likely class by the networks that the method predicts with
predicted_class         its name
predicted_probability   its probability
ood_score               in [0, 1]: the higher, the more likely no class is right (Manifold DivideMix)
true_label              where it is known; -1: the image is known to be of no class
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common.datasets.file_lists import FileSplit
from common.gpu import processes
from common.runs.run import Labels, Run

NAME = "label_quality.csv"
COLUMNS = (
    *("index", "path", "given_label", "given_class", "score", "selected"),
    *("predicted_label", "predicted_class", "predicted_probability", "ood_score", "true_label"),
)
TOLERANCE = 1e-6  # by which rounding may carry a probability over 0 or 1


class Estimate(NamedTuple):
    """What a method estimates about the N given labels of a run, in the order of its training images."""

    probabilities: Tensor  # [N, K]: of the classes
    score: Tensor | None = None  # [N], NaN where unknown; None: the probability of the given label
    selected: Tensor | None = None  # bool [N], or int [N] with -1 for images that it does not choose from
    ood_score: Tensor | None = None  # [N]


def save_label_quality(
    run: Run,
    estimate: Callable[[], Estimate],
    paths: Sequence[str] = (),
    classes: Sequence[str] = (),
    *,
    files: FileSplit | None = None,
    true_labels: np.ndarray | None = None,
) -> None:
    """Write label_quality.csv of the images that `run.save_labels` got, before `run.finish`.

    A finished run that has the file keeps it. estimate: is called in every process, and may draw nothing from generators that
    a checkpoint holds. paths: of the whole official training set, if it comes from files; or files: the training images. classes:
    names. true_labels: int [N], -1 for an image of no class, where they are not those of `save_labels`. ValueError: wrong
    shapes, or a score outside [0, 1].
    """
    if not processes.from_first(lambda: not (run.is_finished() and (run.folder / NAME).exists())):
        return
    found = estimate()
    if processes.rank() == 0:
        labels = run.labels if true_labels is None else run.labels._replace(clean=true_labels)
        own = [paths[i] for i in run.labels.positions.tolist()] if paths else ()
        if files is not None:
            own = [str(files.path(i)) for i in range(len(files.paths))]
        run.save_file(NAME, to_csv(labels, found, own, classes))


def to_csv(
    labels: Labels, estimate: Estimate, paths: Sequence[str] = (), classes: Sequence[str] = ()
) -> bytes:
    """The content of the file. The order of the cells is that of COLUMNS. ValueError: as `save_label_quality`."""
    index, given, count = labels.positions, labels.given, len(labels.given)
    probabilities = _array(estimate.probabilities)
    if probabilities.shape != (count, labels.num_classes):
        raise ValueError(
            f"probabilities {probabilities.shape} of {count} images, {labels.num_classes} classes"
        )
    if len(paths) not in (0, count):
        raise ValueError(f"{len(paths)} paths of {count} images")
    score = probabilities[np.arange(count), given] if estimate.score is None else _array(estimate.score)
    predicted = probabilities.argmax(axis=1)
    finite = np.isfinite(probabilities).all(axis=1)
    empty = [""] * count
    columns = (
        index.tolist(),
        paths or empty,
        given.tolist(),
        _names(given.tolist(), classes),
        _numbers("score", score, count),
        empty if estimate.selected is None else _flags(_array(estimate.selected), count),
        predicted_labels := [
            label if known else "" for label, known in zip(predicted.tolist(), finite, strict=True)
        ],
        _names(predicted_labels, classes),
        _numbers("predicted_probability", np.where(finite, probabilities.max(axis=1), np.nan), count),
        empty if estimate.ood_score is None else _numbers("ood_score", _array(estimate.ood_score), count),
        empty if labels.clean is None else labels.clean.tolist(),
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue().encode("utf-8", "surrogateescape")


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _names(labels: Iterable[int | str], classes: Sequence[str]) -> list[str]:
    return ["" if label == "" or not classes else classes[int(label)] for label in labels]


def _flags(values: np.ndarray, count: int) -> list[str]:
    """1, 0, and an empty cell for -1."""
    if values.shape != (count,):
        raise ValueError(f"selected {values.shape} of {count} images")
    return ["" if value < 0 else str(value) for value in values.astype(int).tolist()]


def _numbers(name: str, values: np.ndarray, count: int) -> list[str]:
    """Numbers of [0, 1] with six digits; NaN leaves the cell empty."""
    outside = (values < -TOLERANCE) | (values > 1 + TOLERANCE)
    if values.shape != (count,) or outside.any():
        raise ValueError(f"{name} {values.shape} of {count} images, {outside.sum()} outside [0, 1]")
    return ["" if np.isnan(value) else f"{value:.6g}" for value in values.clip(0, 1).tolist()]
