"""Accuracy by class and shot, and selection statistics, on examples small enough to count."""

import math

import numpy as np

from sfa import evaluation


def test_accuracy_by_class_and_shot():
    labels = np.repeat(np.arange(10), 2)
    predicted = labels.copy()
    predicted[[0, 14, 15, 16]] = 5  # one of class 0, both of class 7, one of class 8
    report = evaluation.accuracies(predicted, labels, np.arange(10))
    assert report["test_accuracy"] == 80
    assert report["class_0"] == 50 and report["class_7"] == 0 and report["class_8"] == 50
    assert report["many_accuracy"] == 75 and report["medium_accuracy"] == 100 and report["few_accuracy"] == 50


def test_shots_of_other_numbers_of_classes_go_by_observed_counts():
    found = evaluation.shots(np.array([101, 100, 20, 19]))
    assert [np.flatnonzero(found[shot]).tolist() for shot in evaluation.SHOTS] == [[0], [1, 2], [3]]


def test_selection_statistics_count_clean_and_selected():
    observed, clean = np.array([0, 0, 1, 1, 8, 8]), np.array([0, 1, 1, 1, 8, 2])
    selected = np.array([True, True, True, False, False, False])
    probability = np.array([0.9, 0.8, 0.7, 0.4, 0.3, 0.1])
    report = evaluation.selection_statistics(probability, selected, observed, clean, 10)
    assert report["selected"] == 3
    assert report["precision"] == 2 / 3 and report["recall"] == 2 / 4
    assert report["many_precision"] == 2 / 3 and report["many_recall"] == 2 / 3
    assert report["few_precision"] == 0 and report["few_recall"] == 0
    assert report["medium_precision"] == 0 and math.isnan(report["medium_recall"])
    assert tuple(report) == evaluation.SELECTION_STATISTICS


def test_auc_is_undefined_where_every_label_is_clean():
    labels = np.array([0, 1])
    report = evaluation.selection_statistics(np.array([0.2, 0.9]), labels > 0, labels, labels, 10)
    assert math.isnan(report["auc"]) and report["precision"] == 1
