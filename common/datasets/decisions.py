"""Decisions of a person about labels: `decisions.csv`, as the page of benchmarks.gallery exports it.

A table of the columns index, path, given_label, decision, new_label, with one row per training image of a run. index: the
position in the data set. decision: keep, relabel (to new_label) or remove (leave the image out of training).
"""

from collections.abc import Callable, Sequence
from os.path import basename
from typing import Any, NamedTuple

import numpy as np

KEEP, RELABEL, REMOVE = DECISIONS = ("keep", "relabel", "remove")
COLUMNS = ("index", "path", "given_label", "decision", "new_label")
REQUIRED = {"index", "given_label", "decision", "new_label"}


class Decisions(NamedTuple):
    """What is decided about each listed image."""

    images: np.ndarray  # int64 [N]: positions of the images in the data set, each once
    labels: np.ndarray  # int64 [N]: new labels of relabelled images, given labels of the others
    relabelled: np.ndarray  # bool [N]
    removed: np.ndarray  # bool [N]
    paths: np.ndarray | None = None  # str [N], empty for data in memory

    def without_removed(self, index: np.ndarray) -> np.ndarray:
        """Which training images, given by their positions [n], are not removed: bool [n]. ValueError: one is not listed."""
        missing = index[~np.isin(index, self.images)]
        if len(missing):
            raise ValueError(
                f"does not list training image {missing[0]}: export it from a run on the same images"
            )
        return ~np.isin(index, self.images[self.removed])

    def check_files(self, index: np.ndarray, paths: Sequence[str]) -> None:
        """ValueError: a training image, given by its position [n] and its file [n], is another file here."""
        named = (
            {} if self.paths is None else dict(zip(self.images.tolist(), self.paths.tolist(), strict=True))
        )
        for image, path in zip(index.tolist(), paths, strict=True):
            own = named.get(image)
            # by name alone: the folder may have moved
            if own and basename(own) != basename(path):
                raise ValueError(
                    f"image {image} is {own} there, and {path} in this data set: export it from a run on the "
                    "same images, with the same ones left out"
                )


def is_decisions(names: list[str]) -> bool:
    """Whether a table with these columns holds decisions."""
    return {name.strip().lower() for name in names} >= REQUIRED


def make_decisions(table: dict[str, Any], whole_numbers: Callable[[Any, str], np.ndarray]) -> Decisions:
    """Decisions from columns of text. ValueError: an unknown decision, no number where one is needed, an image that is twice.

    whole_numbers: makes int64 of a column of text, given its name.
    """
    columns = {name.lower(): values for name, values in table.items()}
    index = whole_numbers(columns["index"], "index")
    given = whole_numbers(columns["given_label"], "given_label")
    decision, new = columns["decision"], columns["new_label"]
    unknown = np.flatnonzero(~np.isin(decision, DECISIONS))
    if len(unknown):
        raise ValueError(
            f"the decision about image {index[unknown[0]]} is {str(decision[unknown[0]])!r}: use one of {', '.join(DECISIONS)}"
        )
    values, counts = np.unique(index, return_counts=True)
    if (counts > 1).any() or (index < 0).any():
        wrong = index[index < 0][0] if (index < 0).any() else values[counts > 1][0]
        raise ValueError(f"column index: names image {wrong} {'twice' if wrong >= 0 else ''}".rstrip())
    relabelled = decision == RELABEL
    empty = np.flatnonzero(relabelled & (new == ""))
    if len(empty):
        raise ValueError(f"image {index[empty[0]]} is relabelled without a new_label: give one")
    labels = given.copy()
    if relabelled.any():
        labels[relabelled] = whole_numbers(new[relabelled], "new_label")
    return Decisions(index, labels, relabelled, decision == REMOVE, columns.get("path"))
