"""The parts of train_semisup.py that are no pass over the data: sizes, network, optimiser, columns of log and results."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from common.gpu import processes
from common.gpu.device import Device
from common.gpu.loader import Images
from common.runs.cli import UserError
from manifold_dividemix import flags, report, train_semisup
from manifold_dividemix.choices import Lambdas
from manifold_dividemix.dataset import Dataset
from manifold_dividemix.networks import Network, make_encoder
from manifold_dividemix.training import Setting, Step, set_mode, train_divided, warm_up

CPU = Device(torch.device("cpu"), "fp32", "tests")
K = 3


def parsed(words: str = "") -> Namespace:
    return train_semisup.parse_args(words.split())


def dataset_of(observed: list[int], clean: list[int] | None = None, ood: list[int] | None = None) -> Dataset:
    """A training set of these labels; images do not matter. ood: the positions of OOD images."""
    size = len(observed)
    pixels = np.random.default_rng(0).integers(256, size=(size, 8, 8, 1), dtype=np.uint8)
    return Dataset(
        name="few",
        index=np.arange(size),
        images=pixels,
        test_images=pixels,
        observed=np.array(observed),
        test_labels=np.array(observed),
        clean=None if clean is None else np.array(clean),
        ood=None if ood is None else np.isin(np.arange(size), ood),
        num_classes=K,
        mean=(0.5,),
        std=(0.25,),
        origin={},
    )


def positions(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def network() -> Network:
    torch.manual_seed(1)
    return Network(make_encoder("resnet18", 1, 8), 64, K)


def test_there_are_no_splits_without_a_selection():
    words = "--epochs 20 --warmup-epoch 5 --interval 5"
    for more, splits in (("--clustering", [5, 10, 15]), ("", [5]), ("--clustering --selection none", [])):
        assert flags.splits_of(parsed(f"{words} {more}")) == splits


@pytest.mark.parametrize(
    ("words", "size", "removed"),
    [
        # 10 % at once, 1 % more at each of the splits in epochs 5, 6, ..., 94
        ("--epochs 95 --warmup-epoch 5 --interval 1 --clustering", 100, 100),
        ("--epochs 93 --warmup-epoch 5 --interval 1 --clustering", 100, None),
        ("--remove-ood 0.1 --epochs 3 --warmup-epoch 2", 50, 55),
        ("--remove-ood 0.049 --ood-start-factor 20 --epochs 3 --warmup-epoch 3", 50, 49),
        ("--remove-ood 0.048 --ood-start-factor 20 --epochs 3 --warmup-epoch 3", 50, None),
        # no split, so no further removal
        ("--epochs 200 --warmup-epoch 5 --interval 1 --clustering --selection none", 100, None),
        ("--remove-ood 0", 2, None),
    ],
)
def test_a_removal_of_all_but_one_image_is_refused(words, size, removed):
    args = parsed(words)
    if removed is None:
        flags.check_sizes(args, size)
        return
    with pytest.raises(UserError, match=f"--remove-ood {args.remove_ood}: {removed} of {size} images would"):
        flags.check_sizes(args, size)


def test_several_processes_need_equal_pieces_and_a_whole_batch(monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: 3)
    flags.check_sizes(parsed("--batch-size 66"), 99)
    with pytest.raises(UserError, match="--batch-size 64: cannot be cut into equal pieces for 3 processes"):
        flags.check_sizes(parsed("--batch-size 64"), 99)
    with pytest.raises(UserError, match="--batch-size 66: more than all 65 images, which 3 processes share"):
        flags.check_sizes(parsed("--batch-size 66"), 65)


def test_the_network_starts_from_the_encoder_it_is_given_and_is_random_else(tmp_path):
    torch.manual_seed(5)
    encoder, path = make_encoder("resnet18", 1, 8), tmp_path / "encoder.safetensors"
    safetensors.torch.save_file(encoder.state_dict(), path)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(train_semisup.initial_network(dataset_of([0, 1]), parsed(f"--pretrained {path}")))
        for name, value in made[-1].encoder.state_dict().items():
            assert torch.equal(value, encoder.state_dict()[name]), name
    assert made[0].classifier.weight.shape == (K, 64)
    assert not torch.equal(made[0].classifier.weight, made[1].classifier.weight)
    assert not torch.equal(made[0].projection.weight, made[1].projection.weight)
    with pytest.raises(UserError, match=r"no such file; make an encoder with .*pretrain\.py"):
        train_semisup.initial_network(dataset_of([0, 1]), parsed(f"--pretrained {tmp_path}"))  # a folder


@pytest.mark.parametrize(("ramp", "steps"), [("fixed", 2), ("released", 3)])
def test_the_ramp_counts_the_steps_of_an_epoch_and_as_released_one_too_many(ramp, steps, monkeypatch):
    """Eight labelled samples in batches of four, two epochs after the warm-up; the ramp takes sixteen."""
    taken = []

    def train_divided(_network, _optimizer, batches, _unlabelled, step, **_more):
        taken.append([step.ramp(number) for number, _ in enumerate(batches)])
        return torch.zeros(1, 7)

    monkeypatch.setattr(train_semisup, "train_divided", train_divided)
    dataset = dataset_of([0, 1] * 10)
    images = Images(dataset.images, dataset.mean, dataset.std, torch.device("cpu"))
    run = SimpleNamespace(progress=lambda batches, *_, **__: batches)
    args = parsed(f"--dataset digits --batch-size 4 --warmup-epoch 20 --ramp {ramp}")
    s = Setting(args, CPU, run, images, torch.zeros(20), torch.Generator(), None)
    epoch = 22 if ramp == "fixed" else 11  # the release counts it twice
    sides = torch.arange(8), torch.arange(12, 20)
    train_semisup.mixematch_epoch(network(), None, *sides, torch.ones(20), epoch, s)
    assert taken == [[pytest.approx((2 + step / steps) / 16) for step in range(2)]]


def test_head_and_encoder_are_two_groups_with_their_own_rates():
    own, words = network(), "--lr-head 0.2 --lr-backbone 0.002 --momentum 0.5 --weight-decay 0.1"
    head, encoder = train_semisup.make_optimizer(own, parsed(words)).param_groups
    assert [p.shape for p in head["params"]] == [p.shape for p in own.head()] and len(head["params"]) == 6
    assert {id(p) for p in encoder["params"]} == {id(p) for p in own.encoder.parameters()}
    for group, rate in ((head, 0.2), (encoder, 0.002)):  # of all weights, those of norms and biases included
        assert (group["lr"], group["initial_lr"], group["nesterov"]) == (rate, rate, False)
        assert (group["momentum"], group["weight_decay"], group["dampening"]) == (0.5, 0.1, 0)


def pass_over(size: int, views: int) -> list:
    generator = torch.Generator().manual_seed(3)
    images = tuple(torch.randn(size, 1, 8, 8, generator=generator) for _ in range(views))
    return [(images, torch.arange(size))]


@pytest.mark.parametrize("mode", ["train", "warm-up"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_stays_as_it_is_in_both_kinds_of_epochs(frozen, mode):
    own = network()
    optimizer = train_semisup.make_optimizer(own, parsed("--weights freeze" if frozen else ""))
    assert len(optimizer.param_groups) == 2 - frozen
    before = {name: value.clone() for name, value in own.state_dict().items()}
    labels = torch.arange(6) % K
    set_mode(own, mode, True, frozen)
    warm_up(own, optimizer, pass_over(6, 1), labels, torch.ones(6, dtype=torch.bool), CPU)
    set_mode(own, mode, False, frozen)
    step = Step(lambda: 0.3, torch.randperm, lambda _: 1.0, Lambdas(), 0.5, 0.0, "RL", "released", CPU)
    sides = pass_over(6, 4), iter(pass_over(5, 4))
    train_divided(own, optimizer, *sides, step, labels=labels, clean=torch.ones(6))
    changed = {name for name, value in own.state_dict().items() if not torch.equal(value, before[name])}
    assert {"classifier.weight", "projection.weight", "projection_bn.weight"} <= changed
    of_encoder = {name for name in changed if name.startswith("encoder.")}
    trained = {f"encoder.{name}" for name, _ in own.encoder.named_parameters()}
    assert of_encoder == set() if frozen else trained <= of_encoder


def kept(size: int, *removed: int) -> Tensor:
    return ~torch.isin(torch.arange(size), torch.tensor(removed))


@pytest.mark.parametrize(
    ("removed", "ood", "expected"),
    [
        ((1, 2, 4), [1, 4, 6, 7], (3, 2 / 3, 2 / 4)),
        ((), [1, 4], (0, None, 0.0)),
        ((2, 3), [], (2, 0.0, None)),
        ((1, 4), [1, 4], (2, 1.0, 1.0)),
        ((3, 5), None, (2, None, None)),  # OOD images are unknown
    ],
)
def test_precision_and_recall_of_the_removal(removed, ood, expected):
    members = None if ood is None else np.isin(np.arange(10), ood)
    columns = report.removal_columns(kept(10, *removed), members)
    assert tuple(columns) == ("removed", "removal_precision", "removal_recall")
    assert tuple(columns.values()) == expected
    assert {type(value) for value in columns.values()} <= {int, float, type(None)}


def test_removed_samples_are_counted_by_their_given_label():
    found = report.removed_by_class(kept(6, 0, 1, 3), dataset_of([0, 0, 1, 1, 1, 0], clean=[2] * 6, ood=[]))
    assert found == {"removed_class_0": 2, "removed_class_1": 1, "removed_class_2": 0}
    assert {type(n) for n in found.values()} == {int}


def test_a_class_is_lost_when_more_than_half_of_its_correctly_labelled_samples_are():
    # class 0: positions 0 to 3; class 1: 4 to 6; none of 2. 7 and 8 are mislabelled as 1, 9 and 10 are OOD with label 0
    observed, clean = [0] * 4 + [1] * 5 + [0, 0], [0] * 4 + [1] * 3 + [0, 2, 0, 0]
    dataset, half = dataset_of(observed, clean, ood=[9, 10]), kept(11, 0, 1, 4, 9, 10)
    sides = positions(2, 6, 7, 8), positions(3, 5)
    for given, lost in (
        (None, []),  # two of four, one of three
        ((positions(2, 3, 5, 6, 8), positions(7)), []),
        ((positions(2, 5, 6, 7, 8), positions(3)), [0]),  # and a third one unlabelled
        (sides, [0, 1]),
    ):
        assert report.lost_classes(half, given, dataset).tolist() == lost
    # if the true labels are unknown, by all with the given label: five of six, and two of five
    assert report.lost_classes(half, sides, dataset_of(observed)).tolist() == [0]


@pytest.mark.parametrize(
    ("lost", "clean", "line"),
    [
        ([], None, ""),
        ([0], [0], "more than half of the correctly labelled samples of 1 of 3 classes are removed or unlabelled: 0\n"),
        (range(12), None, "more than half of the samples of 12 of 3 classes are removed or unlabelled: "
         "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...\n"),
    ],
)  # fmt: skip
def test_lost_classes_are_named_in_one_line(lost, clean, line, monkeypatch, capsys):
    monkeypatch.setattr(report, "lost_classes", lambda *_: np.array(lost))
    report.warn_of_lost_classes(kept(1), None, dataset_of([0], clean, []))
    assert capsys.readouterr().out == (line and f"warning: {line}")


def test_the_columns_of_a_split():
    # right labels: 0, 1, 2; wrong ones: 3, 4; 5 to 7 are OOD, two of them with the label of their place
    dataset = dataset_of([0, 1, 2, 0, 1, 2, 0, 1], clean=[0, 1, 2, 1, 2, 2, 0, 2], ood=[5, 6, 7])
    clean = torch.tensor([0.9, 0.8, 0.2, 0.6, 0.1, 0.95, 0.05, 0.3], dtype=torch.float64)
    sides = positions(0, 1, 3, 5), positions(2, 4)
    found = report.split_columns(sides, clean, dataset)
    # an OOD image is not right, whatever its label; of the pairs of a right and a wrong one 0.9 and 0.8 beat both, 0.2 beats 0.1
    expected = {"labelled": 4, "unlabelled": 2, "labelled_precision": 2 / 4, "labelled_ood": 1 / 4}
    assert found == {**expected, "clean_auc": pytest.approx(5 / 6)}
    assert [type(value) for value in found.values()] == [int, int, float, float, float]
    assert report.split_columns(None, None, dataset) == dict.fromkeys(found)
    unknown = report.split_columns(sides, clean, dataset_of([0] * 8))
    assert tuple(unknown.values()) == (4, 2, None, None, None)


@pytest.mark.parametrize(
    ("observed", "ood", "sides", "expected"),
    [
        ([0, 0], [], ([], [0, 1]), (0, 2, None, None, 1.0)),  # an empty side
        ([0, 1], [], ([0], [1]), (1, 1, 1.0, 0.0, None)),  # all right
        ([1, 0], [], ([0], [1]), (1, 1, 0.0, 0.0, None)),  # all wrong
        ([0, 0], [1], ([0], [1]), (1, 1, 1.0, 0.0, None)),  # one left in distribution
        ([0, 1], [0, 1], ([0], [1]), (1, 1, 0.0, 1.0, None)),  # none left
    ],
)
def test_a_split_of_one_kind_alone(observed, ood, sides, expected):
    clean = torch.tensor([0.9, 0.1], dtype=torch.float64)
    dataset = dataset_of(observed, clean=[0, 1], ood=ood)
    found = report.split_columns(tuple(positions(*side) for side in sides), clean, dataset)
    assert tuple(found.values()) == expected
