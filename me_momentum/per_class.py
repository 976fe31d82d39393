"""Clothing1M's confident examples: every class has the checkpoint that knows it best (Sec. 8).

After each epoch the network is scored on each class of the clean validation images; the epoch with a class's best score in
this outer loop is the model of that class. A training sample is confident where the model of its noisy class predicts that
class.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """How well a network does on a labelled split; percentages. NaN where there is nothing to take a share of."""

    accuracy: float  # over samples
    std: float  # population standard deviation over classes of the recall, before rounding
    recall: Tensor  # float64 [K], rounded to 2 decimals; NaN for a class without a sample
    precision: Tensor  # float64 [K], rounded to 2 decimals; NaN for a class that is never predicted


def scores(predicted: Tensor, labels: Tensor, num_classes: int) -> Scores:
    """Accuracy, and recall and precision by class, of predictions and true labels, both int [N]; one transfer to the CPU."""
    counted = (labels[predicted == labels], labels, predicted)
    counts = torch.stack([torch.bincount(found, minlength=num_classes) for found in counted])
    hits, given, claimed = counts.cpu().double()
    recall = hits / given * 100
    return Scores(
        accuracy=float(hits.sum() / given.sum() * 100),
        std=float(recall[given > 0].std(correction=0)),
        recall=recall.round(decimals=2),
        precision=(hits / claimed * 100).round(decimals=2),
    )


def class_score(recall: Tensor, precision: Tensor, beta: float) -> Tensor:
    """What the models of the classes are chosen by: beta recall + (1 - beta) precision, [K]; NaN stays NaN."""
    return beta * recall + (1 - beta) * precision


# which epoch is the model of which class ------------------------------------------------------------------------------


class ClassModels(NamedTuple):
    """The best epochs of an outer loop so far; as a dict (_asdict) it is plain data for a checkpoint."""

    best_score: Tensor  # float64 [K]
    epoch: Tensor  # int64 [K], the epoch of that score, from 1; 0: none has beaten 0 yet
    best_accuracy: float = -1.0
    best_epoch: int = 0  # the epoch of that accuracy: the model of the classes that have none


def no_models(num_classes: int) -> ClassModels:
    """What an outer loop begins with."""
    return ClassModels(
        torch.zeros(num_classes, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.int64)
    )


def update(models: ClassModels, epoch: int, score: Tensor, accuracy: float) -> ClassModels:
    """The models after an epoch (from 1) with these scores, float64 [K]: only a strictly better one wins, NaN never."""
    better = score > models.best_score
    models = models._replace(
        best_score=torch.where(better, score, models.best_score),
        epoch=torch.where(better, epoch, models.epoch),
    )
    if accuracy > models.best_accuracy:
        models = models._replace(best_accuracy=accuracy, best_epoch=epoch)
    return models


def model_of_class(models: ClassModels) -> Tensor:
    """The epoch whose checkpoint judges the samples of each class, int64 [K].

    A class whose score never beat 0, for which the release tries to load a file without a name, is judged by the epoch with the
    best validation accuracy of the outer loop.
    """
    return torch.where(models.epoch > 0, models.epoch, models.best_epoch)


def in_use(models: ClassModels) -> set[int]:
    """The epochs whose checkpoints are still referred to."""
    return set(model_of_class(models).tolist())


# confident examples ---------------------------------------------------------------------------------------------------


def samples_by_model(labels: Tensor, model_of: Tensor) -> dict[int, Tensor]:
    """Which samples each checkpoint has to look at: by epoch, ascending positions in labels; each is looked at once.

    labels: noisy, int [N]; model_of: the model of each class, int [K]. A checkpoint without samples is left out.
    """
    assigned = model_of[labels]
    return {int(epoch): (assigned == epoch).nonzero()[:, 0] for epoch in assigned.unique()}
