"""Data sets: `load(name, root)` gives train and test splits with clean labels, `labels_of(file, ...)` observed ones.

Terms. digits: scikit-learn's copy of the UCI optical digits, CC BY 4.0, shipped with scikit-learn. MNIST:
LeCun, Cortes and Burges, usually quoted as CC BY-SA 3.0. Fashion-MNIST: Zalando, MIT. CIFAR-10/100:
Krizhevsky 2009, no licence stated, cite the report. None of the latter four is part of this repository.
"""

from common.datasets.given_labels import labels_of, read_labels
from common.datasets.in_memory import NAMES, Data, Split, download, load

__all__ = ["NAMES", "Data", "Split", "download", "labels_of", "load", "read_labels"]
