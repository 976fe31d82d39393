"""The Clothing1M half of Me-Momentum against cases recorded from the authors' release."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.datasets.arrays import read_npz
from common.datasets.file_lists import make_split
from me_momentum import Clothing, ClothingData, per_class
from me_momentum.Clothing import learning_rate, parse_args, place_of
from me_momentum.clothing_images import Data, Labelled, shuffled
from me_momentum.confident import confident_examples
from me_momentum.losses import prior_weights, weighted_cross_entropy
from tests.common.small_file_data import write_lines
from tests.conftest import golden_folder

CLASSES = 14


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def counts(labels) -> torch.Tensor:
    return torch.bincount(tensor(labels), minlength=CLASSES)


def test_validation(golden):
    for case in golden("me_momentum", "clothing_val"):
        logits, labels, weights = (tensor(case[name]) for name in ("logits", "labels", "class_weights"))
        found = per_class.scores(logits.argmax(dim=1), labels, CLASSES)
        assert found.recall.tolist() == case["class_recall"].tolist(), case.name
        np.testing.assert_array_equal(found.precision.numpy(), case["class_precision"], case.name)
        assert found.accuracy == pytest.approx(float(case["acc"]), rel=1e-12)
        assert found.std == pytest.approx(float(case["std"]), rel=1e-7)  # recorded with 8 decimals
        beta = float(case["beta"])
        assert beta == parse_args([]).beta
        score = per_class.class_score(found.recall, found.precision, beta)
        np.testing.assert_allclose(score.numpy(), case["score"], rtol=1e-12, err_msg=case.name)
        # what the release prints as its loss: 100 times the sum over batches of our loss, over the samples
        pieces = (values.split(int(case["batch_size"])) for values in (logits, labels))
        loss = sum(float(weighted_cross_entropy(*piece, weights)) for piece in zip(*pieces, strict=True))
        assert 100 * loss / len(labels) == pytest.approx(float(case["loss"]), abs=1e-4)


def test_selection(golden):
    if not list((golden_folder() or Path()).glob("me_momentum/clothing_select_*.json")):
        pytest.skip("the cases of kind clothing_select are too large for tests/golden")
    for case in golden("me_momentum", "clothing_select"):
        noisy = tensor(case["noisy"])
        predicted, looked_at = torch.full_like(noisy, -1), 0
        for model, positions in per_class.samples_by_model(noisy, tensor(case["model_of_class"])).items():
            predicted[positions] = tensor(case["logits_per_model"][model - 1]).argmax(dim=1)[positions]
            looked_at += len(positions)
        assert looked_at == len(noisy)
        confident = confident_examples(predicted, noisy)
        assert confident.tolist() == case["selected_sorted"].tolist(), case.name
        in_order = case["selected_in_order"]
        assert np.array_equal(noisy.numpy()[in_order], case["labels_in_order"])
        assert sorted(in_order.tolist()) == confident.tolist()


def flags(case) -> list[str]:
    names = ("seed", "n_epoch", "max_inner_loop", "max_outer_loop")
    return [word for name in names for word in (f"--{name}", str(int(case[name])))]


def test_the_schedule(golden):
    for case in golden("me_momentum", "schedules"):
        args = parse_args([])
        expected = case["clothing_outer_loop"]
        assert len(expected) * args.max_outer_loop == args.num_epochs == 90
        found = [learning_rate(place_of(epoch, args), args.lr) for epoch in range(1, 91)]
        np.testing.assert_allclose(found, np.tile(expected, 3), rtol=1e-12)


def test_models_weights_and_order(golden):
    """The functions alone, the selection after the last inner loop included, which the script leaves out."""
    for case in golden("me_momentum", "clothing_control"):
        args = parse_args(flags(case))
        labels, validation = case["train_labels"], counts(case["val_labels"])
        assert shuffled(len(labels), args.seed).tolist() == case["shuffle_order"].tolist()
        subsets = np.split(case["subset_concat"], np.cumsum(case["subset_sizes"])[:-1])
        current = [np.arange(len(labels)), *subsets]
        found = torch.stack([prior_weights(counts(labels[index]), validation) for index in current])
        np.testing.assert_array_equal(found.numpy(), case["loss_weights"], case.name)

        models, selections = per_class.no_models(CLASSES), []
        by_epoch = zip(tensor(case["class_recall"]), tensor(case["class_precision"]), strict=True)
        for epoch, (recall, precision) in enumerate(by_epoch, start=1):
            place = place_of(epoch, args)
            if place.epoch == 1:
                models = per_class.no_models(CLASSES)
            score = per_class.class_score(recall, precision, args.beta)
            models = per_class.update(models, place.epoch, score, case["val_acc"][epoch - 1])
            if place.epoch % args.n_epoch == 0:
                selections.append(per_class.model_of_class(models).tolist())
        assert selections == case["model_of_class"].tolist(), case.name


class Scripted:
    """In place of training, validation and selection: what a case scripts goes in, what the script does is written down."""

    def __init__(self, case):
        self.case, self.epoch, self.networks = case, 0, 0
        self.subsets = iter(np.split(case["subset_concat"], np.cumsum(case["subset_sizes"])[:-1]))
        self.tests = dict(zip(case["test_epochs"].tolist(), case["test_acc"].tolist(), strict=True))
        self.seen = defaultdict(list)

    def network(self, *_arguments) -> nn.Module:
        self.networks += 1
        return nn.Linear(1, CLASSES)

    def load(self, args, device) -> Data:
        labels, validation = (tensor(self.case[name]) for name in ("train_labels", "val_labels"))
        split = make_split(Path(), [b"none"] * len(labels), labels.numpy())
        nothing = Labelled([], validation)
        index, rest = np.arange(len(labels)), (nothing, nothing, (), torch.Generator(), lambda *_, **__: [])
        return Data(index, labels.numpy(), split, None, labels, *rest, order=index)

    def train_weighted_epoch(self, network, optimizer, batches, labels, weights, device) -> float:
        values = (optimizer.param_groups[0]["lr"], len(labels), weights.tolist(), self.networks)
        for name, value in zip(("lr", "train_size", "loss_weights", "model_number"), values, strict=True):
            self.seen[name].append(value)
        assert bool(optimizer.state) == (self.epoch % self.epochs_per_outer_loop > 0)
        optimizer.state[next(network.parameters())] = {"momentum_buffer": None}
        return 1.0

    def test(self, network, split, what, run) -> dict[str, float]:
        self.epoch += 1
        return {"test_accuracy": self.tests.get(self.epoch - 1, 0.0), "test_accuracy_batchmean": 0.0}

    def validate(self, network, split, what, run) -> per_class.Scores:
        recall, precision = (tensor(self.case[f"class_{of}"][self.epoch]) for of in ("recall", "precision"))
        return per_class.Scores(float(self.case["val_acc"][self.epoch]), 0.0, recall, precision)

    def select(self, network, memory, data, what, run) -> None:
        models = per_class.model_of_class(per_class.ClassModels(**memory["models"])).tolist()
        self.seen["model_of_class"].append(models)
        assert set(models) == set(memory["weights"])
        memory["confident"] = tensor(next(self.subsets))

    @property
    def epochs_per_outer_loop(self) -> int:
        return int(self.case["n_epoch"] * self.case["max_inner_loop"])


def test_the_script(golden, monkeypatch, tmp_path):
    for case in golden("me_momentum", "clothing_control"):
        scripted = Scripted(case)
        for name in ("load", "train_weighted_epoch", "validate", "test", "select"):
            monkeypatch.setattr(Clothing, name, getattr(scripted, name))
        monkeypatch.setattr(Clothing, "clothing_network", scripted.network)
        run = tmp_path / case.name
        Clothing.main([*flags(case), "--out", str(run), "--device", "cpu"])
        seen, epochs = scripted.seen, len(case["lr"])
        np.testing.assert_allclose(seen["lr"], case["lr"], rtol=1e-12)
        assert seen["train_size"] == case["train_size"].tolist(), case.name
        assert seen["model_number"] == case["model_number"].tolist()
        # without the selection after the very last inner loop, which nothing is trained on
        assert seen["model_of_class"] == case["model_of_class"][:-1].tolist()
        assert len(list(scripted.subsets)) == 1
        by_inner_loop = seen["loss_weights"][:: int(case["n_epoch"])]
        assert by_inner_loop == case["loss_weights"][:-1].tolist()
        with (run / "log.csv").open(newline="") as file:
            best = [row["new_best"] == "1" for row in csv.DictReader(file)]
        assert np.flatnonzero(best).tolist() == case["test_epochs"].tolist() and len(best) == epochs
        reported = json.loads((run / "result.json").read_text())["metrics"]["at_best_validation"]
        assert reported == case["final_test_acc"]


FILES = [f"{part}_key_list" for part in ("noisy_train", "clean_val", "clean_test")]
FILES += ["noisy_label_kv", "clean_label_kv"]


@pytest.mark.parametrize("below", ["", "annotations"])
def test_the_index(below, golden, tmp_path, capsys):
    for case in golden("me_momentum", "clothing_index"):
        root = tmp_path / case.name
        for name in FILES:
            write_lines(root / below / f"{name}.txt", case[f"in_{name}"].tolist())
        ClothingData.main(["--data_root", str(root)])
        found = read_npz(root / "Clothing1m-data.npz")
        expected = {name for name in case.arrays if not name.startswith("in_")}
        assert found.keys() == expected
        for name in expected:
            assert found[name].dtype == case[name].dtype, name
            assert np.array_equal(found[name], case[name]), name
        out = capsys.readouterr().out
        broken = sum(len(line.split(" ")) != 2 for name in FILES[3:] for line in case[f"in_{name}"].tolist())
        assert broken == 1 and "noisy_label_kv.txt: 1 lines that are not" in out
        assert f"train: {len(case['train_data'])} images" in out
