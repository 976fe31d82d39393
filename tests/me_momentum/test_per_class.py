"""Scores by class, which epoch is the model of which class, and the samples it predicts."""

import pytest
import torch

from common.runs import checkpoint
from me_momentum import per_class

NAN = float("nan")


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values)


def models_after(*epochs: tuple[list[float], float]) -> per_class.ClassModels:
    """The models after epochs of (score by class, accuracy)."""
    models = per_class.no_models(len(epochs[0][0]))
    for epoch, (score, accuracy) in enumerate(epochs, start=1):
        models = per_class.update(models, epoch, torch.tensor(score, dtype=torch.float64), accuracy)
    return models


def test_a_class_never_predicted_has_no_precision_and_an_absent_one_no_recall():
    found = per_class.scores(tensor(0, 0, 2, 2), tensor(0, 1, 1, 0), 4)
    torch.testing.assert_close(found.recall, tensor(50.0, 0.0, NAN, NAN).double(), equal_nan=True)
    torch.testing.assert_close(found.precision, tensor(50.0, NAN, 0.0, NAN).double(), equal_nan=True)
    assert found.std == 25.0  # over the two classes that there are


def test_the_score_weighs_recall_with_beta_and_keeps_nan():
    score = per_class.class_score(tensor(80.0, 80.0, NAN), tensor(40.0, NAN, 40.0), beta=0.45)
    torch.testing.assert_close(score, tensor(0.45 * 80 + 0.55 * 40, NAN, NAN), equal_nan=True)


@pytest.mark.parametrize(
    ("epochs", "model_of"),
    [
        # only a higher score replaces one
        ([([10.0, 20.0, 30.0], 50.0), ([10.0, 20.1, 29.0], 50.0)], [1, 2, 1]),
        # classes whose score was never above 0 have the epoch of the best accuracy
        ([([NAN, 5.0, 0.0], 40.0), ([NAN, 4.0, -1.0], 60.0), ([NAN, 3.0, 0.0], 60.0)], [2, 1, 2]),
        # a model at last, whatever the accuracy
        ([([NAN, 5.0, 0.0], 60.0), ([NAN, 3.0, 0.1], 10.0)], [1, 1, 2]),
        # an epoch without a single hit
        ([([NAN, 0.0], 0.0)], [1, 1]),
        # the best accuracy alone keeps no epoch
        ([([9.0, 9.0], 10.0), ([8.0, 8.0], 90.0)], [1, 1]),
    ],
)
def test_the_model_of_a_class_is_its_best_epoch(epochs, model_of):
    models = models_after(*epochs)
    assert per_class.model_of_class(models).tolist() == model_of
    assert per_class.in_use(models) == set(model_of)


def test_models_go_through_a_checkpoint(tmp_path):
    models = models_after(([NAN, 0.0], 1.0), ([1.5, NAN], 12.5))
    checkpoint.save(tmp_path, {"state": checkpoint.collect({"models": models._asdict()})})
    state = {"models": per_class.no_models(2)._asdict()}
    checkpoint.restore(state, checkpoint.load(tmp_path)["state"])
    again = per_class.ClassModels(**state["models"])
    assert torch.equal(again.best_score, models.best_score) and again.best_score.tolist() == [1.5, 0.0]
    assert per_class.model_of_class(again).tolist() == [2, 2]
    assert (again.best_accuracy, again.best_epoch) == (12.5, 2)


def test_each_checkpoint_predicts_all_samples_of_its_classes_once():
    labels = torch.randint(6, (500,), generator=torch.Generator().manual_seed(0))
    models = tensor(4, 1, 4, 2, 2, 9)
    found = per_class.samples_by_model(labels, models)
    assert list(found) == [1, 2, 4, 9]
    assert torch.equal(torch.cat(list(found.values())).sort().values, torch.arange(500))
    for epoch, positions in found.items():
        assert (models[labels[positions]] == epoch).all() and (positions.diff() > 0).all()
    assert per_class.samples_by_model(labels[:0], models) == {}
