"""Clothing1M's confident examples: each class has its own best checkpoint (README, section 8).

After each epoch the network is scored on each class of the clean validation images. The epoch with a class's best score in
this outer loop is the model of that class. A training sample is confident if the model of its noisy label predicts that label.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """A network's scores on a labelled split, in percent. NaN if the denominator is 0."""

    accuracy: float  # over samples
    std: float  # population standard deviation over classes of the recall, before rounding
    recall: Tensor  # float64 [K], rounded to 2 decimals; NaN for a class without a sample
    precision: Tensor  # float64 [K], rounded to 2 decimals; NaN for a class that is never predicted


def scores(predicted: Tensor, labels: Tensor, num_classes: int) -> Scores:
    """Accuracy, and recall and precision by class, of predictions and true labels, both int [N]; one transfer to the CPU."""
    counted = (labels[predicted == labels], labels, predicted)
    counts = torch.stack([torch.bincount(of, minlength=num_classes) for of in counted])
    hits, given, claimed = counts.cpu().double()
    recall = hits / given * 100
    return Scores(
        accuracy=float(hits.sum() / given.sum() * 100),
        std=float(recall[given > 0].std(correction=0)),
        recall=recall.round(decimals=2),
        precision=(hits / claimed * 100).round(decimals=2),
    )


def class_score(recall: Tensor, precision: Tensor, beta: float) -> Tensor:
    """The score that chooses the models of the classes: beta recall + (1 - beta) precision, [K]; NaN stays NaN."""
    return beta * recall + (1 - beta) * precision


# which epoch is the model of which class ------------------------------------------------------------------------------


class ClassModels(NamedTuple):
    """The best epochs of an outer loop so far, for each class and over all classes."""

    best_score: Tensor  # float64 [K], of each class
    epoch: Tensor  # int64 [K], the epoch of best_score, from 1; 0: no score was above 0 yet
    best_accuracy: float = -1.0  # over all classes
    best_epoch: int = 0  # the epoch of best_accuracy: the model of classes whose `epoch` is 0


def no_models(num_classes: int) -> ClassModels:
    """The models at the start of an outer loop."""
    return ClassModels(
        torch.zeros(num_classes, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.int64)
    )


def update(models: ClassModels, epoch: int, score: Tensor, accuracy: float) -> ClassModels:
    """The models after an epoch (from 1) with these scores, float64 [K]: only a higher score replaces one, NaN never."""
    better = score > models.best_score
    models = models._replace(
        best_score=torch.where(better, score, models.best_score),
        epoch=torch.where(better, epoch, models.epoch),
    )
    if accuracy > models.best_accuracy:
        models = models._replace(best_accuracy=accuracy, best_epoch=epoch)
    return models


def model_of_class(models: ClassModels) -> Tensor:
    """The epoch whose checkpoint predicts the samples of each class, int64 [K].

    A class whose score was never above 0 has the epoch with the best validation accuracy of the outer loop. The release fails
    there: it tries to load a file without a name.
    """
    return torch.where(models.epoch > 0, models.epoch, models.best_epoch)


def in_use(models: ClassModels) -> set[int]:
    """The epochs that are the model of some class."""
    return set(model_of_class(models).tolist())


# confident examples ---------------------------------------------------------------------------------------------------


def samples_by_model(labels: Tensor, model_of: Tensor) -> dict[int, Tensor]:
    """Which samples each checkpoint predicts: by epoch, ascending positions in labels; each sample has one checkpoint.

    labels: noisy, int [N]; model_of: the model of each class, int [K]. A checkpoint without samples is left out.
    """
    assigned = model_of[labels]
    return {int(epoch): (assigned == epoch).nonzero()[:, 0] for epoch in assigned.unique()}
