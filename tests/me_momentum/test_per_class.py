"""Scores by class, which epoch is the model of which class, and the samples it judges."""

import numpy as np
import pytest
import torch

from common.runs import checkpoint
from me_momentum.confident import confident_examples
from me_momentum.per_class import (
    ClassModels,
    class_score,
    in_use,
    model_of_class,
    no_models,
    samples_by_model,
    scores,
    update,
)

NAN = float("nan")


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values)


def updated(models: ClassModels, epoch: int, score: list[float], accuracy: float = 50.0) -> ClassModels:
    return update(models, epoch, torch.tensor(score, dtype=torch.float64), accuracy)


# scores ---------------------------------------------------------------------------------------------------------------


def test_scores_against_a_loop_over_the_samples():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(5, size=(2, 1000))
    found = scores(torch.from_numpy(predicted), torch.from_numpy(labels), 5)
    recall = [
        100 * np.mean([p == y for p, y in zip(predicted, labels, strict=True) if y == c]) for c in range(5)
    ]
    precision = [
        100 * np.mean([p == y for p, y in zip(predicted, labels, strict=True) if p == c]) for c in range(5)
    ]
    assert found.recall.tolist() == np.round(recall, 2).tolist()
    assert found.precision.tolist() == np.round(precision, 2).tolist()
    assert found.recall.dtype == found.precision.dtype == torch.float64
    assert found.std == pytest.approx(np.std(recall), rel=1e-12)
    assert found.accuracy == pytest.approx(100 * np.mean(predicted == labels), rel=1e-12)


def test_the_accuracy_is_not_rounded_and_weighs_samples_not_classes():
    found = scores(tensor(0, 0, 1), tensor(0, 0, 0), 2)
    assert found.accuracy == pytest.approx(200 / 3, abs=1e-12)
    assert found.recall[0] == 66.67


def test_a_class_never_predicted_has_no_precision_and_an_absent_one_no_recall():
    found = scores(tensor(0, 0, 2, 2), tensor(0, 1, 1, 0), 4)
    torch.testing.assert_close(found.recall, tensor(50.0, 0.0, NAN, NAN).double(), equal_nan=True)
    torch.testing.assert_close(found.precision, tensor(50.0, NAN, 0.0, NAN).double(), equal_nan=True)
    assert found.std == 25.0  # over the two classes that there are


def test_the_score_weighs_recall_with_beta_and_keeps_nan():
    score = class_score(tensor(80.0, 80.0, NAN), tensor(40.0, NAN, 40.0), beta=0.45)
    torch.testing.assert_close(score, tensor(0.45 * 80 + 0.55 * 40, NAN, NAN), equal_nan=True)


# models ---------------------------------------------------------------------------------------------------------------


def test_only_a_strictly_better_epoch_becomes_the_model_of_a_class():
    models = updated(no_models(3), 1, [10.0, 20.0, 30.0])
    models = updated(models, 2, [10.0, 20.1, 29.0])
    assert model_of_class(models).tolist() == [1, 2, 1]
    assert models.best_score.tolist() == [10.0, 20.1, 30.0]
    assert in_use(models) == {1, 2}


def test_nan_and_zero_never_win():
    models = updated(no_models(3), 1, [NAN, 0.0, 5.0])
    models = updated(models, 2, [NAN, -1.0, NAN])
    assert models.epoch.tolist() == [0, 0, 1]
    assert models.best_score.tolist() == [0.0, 0.0, 5.0]


def test_a_class_without_a_model_is_judged_by_the_epoch_of_the_best_accuracy():
    models = updated(no_models(3), 1, [NAN, 5.0, 0.0], accuracy=40.0)
    models = updated(models, 2, [NAN, 4.0, 0.0], accuracy=60.0)
    models = updated(models, 3, [NAN, 3.0, 0.0], accuracy=60.0)  # no better
    assert model_of_class(models).tolist() == [2, 1, 2]
    assert in_use(models) == {1, 2}
    models = updated(models, 4, [NAN, 3.0, 0.1], accuracy=10.0)  # a model at last, whatever the accuracy
    assert model_of_class(models).tolist() == [2, 1, 4]


def test_there_is_a_model_after_an_epoch_without_a_single_hit():
    assert model_of_class(updated(no_models(2), 1, [NAN, 0.0], accuracy=0.0)).tolist() == [1, 1]


def test_the_best_epoch_is_not_kept_for_its_accuracy_where_every_class_has_a_model():
    models = updated(updated(no_models(2), 1, [9.0, 9.0], accuracy=10.0), 2, [8.0, 8.0], accuracy=90.0)
    assert in_use(models) == {1}


def test_models_go_through_a_checkpoint(tmp_path):
    models = updated(no_models(2), 3, [1.5, NAN], accuracy=12.5)
    checkpoint.save(tmp_path, {"state": checkpoint.collect({"models": models._asdict()})})
    state = {"models": no_models(2)._asdict()}
    checkpoint.restore(state, checkpoint.load(tmp_path)["state"])
    again = ClassModels(**state["models"])
    assert torch.equal(again.best_score, models.best_score)
    assert model_of_class(again).tolist() == model_of_class(models).tolist() == [3, 3]
    assert (again.best_accuracy, again.best_epoch) == (12.5, 3)


# samples --------------------------------------------------------------------------------------------------------------


def test_each_checkpoint_looks_once_at_all_samples_of_its_classes():
    labels = torch.randint(6, (500,), generator=torch.Generator().manual_seed(0))
    models = tensor(4, 1, 4, 2, 2, 9)
    found = samples_by_model(labels, models)
    assert list(found) == [1, 2, 4, 9]
    assert torch.equal(torch.cat(list(found.values())).sort().values, torch.arange(500))
    for epoch, positions in found.items():
        assert (models[labels[positions]] == epoch).all()
        assert (positions.diff() > 0).all()


def test_a_class_without_samples_and_one_with_a_single_one():
    labels = tensor(0, 2, 0, 0)
    found = samples_by_model(labels, tensor(3, 5, 7))
    assert {epoch: positions.tolist() for epoch, positions in found.items()} == {3: [0, 2, 3], 7: [1]}
    predicted = torch.full_like(labels, -1)
    for epoch, positions in found.items():
        predicted[positions] = {3: 1, 7: 2}[epoch]  # the model of class 0 finds nothing, that of class 2 all
    assert confident_examples(predicted, labels).tolist() == [1]
    assert samples_by_model(labels[:0], tensor(3, 5, 7)) == {}
