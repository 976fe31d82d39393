"""The parts of train_semisup.py that are no pass over the data: refusals, optimiser, statistics, names of result rows."""

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
from manifold_dividemix import train_semisup, train_semisup_miniimagenet
from manifold_dividemix.corpus import Corpus
from manifold_dividemix.losses import learning_rate
from manifold_dividemix.mixematch import Weights
from manifold_dividemix.networks import Network, make_encoder
from manifold_dividemix.training import Step, set_mode, train_divided, warm_up

CPU = Device(torch.device("cpu"), "fp32", "tests")
K = 3


def parsed(words: str = "") -> Namespace:
    return train_semisup.parse_args(words.split())


def corpus_of(
    observed: list[int],
    clean: list[int] | None = None,
    ood: list[int] | None = None,
    shape: tuple[int, int, int] = (8, 8, 1),
    name: str = "few",
) -> Corpus:
    """A training set of these labels; images do not matter. ood: the positions of those from elsewhere."""
    size = len(observed)
    pixels = np.random.default_rng(0).integers(256, size=(size, *shape), dtype=np.uint8)
    return Corpus(
        name=name,
        index=np.arange(size),
        images=pixels,
        observed=np.array(observed),
        clean=None if clean is None else np.array(clean),
        ood=None if ood is None else np.isin(np.arange(size), ood),
        test_images=pixels,
        test_labels=np.array(observed),
        num_classes=K,
        mean=(0.5,) * shape[2],
        std=(0.25,) * shape[2],
        origin={},
    )


def positions(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


# sides that cannot be trained on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "small"),
    [(0, 9, True), (9, 0, True), (0, 0, True), (9, 1, True), (1, 2, False), (1, 9, False), (9, 9, False)],
)
def test_an_empty_side_or_one_unlabelled_sample_means_warm_up_and_is_told(
    labelled, unlabelled, small, capsys
):
    assert train_semisup.too_small(torch.arange(labelled), torch.arange(unlabelled), 64) is small
    told = capsys.readouterr().out
    line = f"note: warm-up in place of MixEMatch, the split is {labelled} labelled and {unlabelled} unlabelled samples\n"
    assert told == (line if small else "")


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "small"), [(7, 8, True), (8, 7, True), (8, 8, False), (99, 99, False)]
)
def test_several_processes_need_a_whole_batch_on_each_side(labelled, unlabelled, small, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: 2)
    assert train_semisup.too_small(torch.arange(labelled), torch.arange(unlabelled), 8) is small


@pytest.mark.parametrize(
    ("words", "splits"),
    [
        ("--epochs 20 --warmup-epoch 5 --interval 5 --clustering", [5, 10, 15]),
        ("--epochs 20 --warmup-epoch 5 --interval 5", [5]),
        ("--epochs 20 --warmup-epoch 20 --clustering", []),
        ("--epochs 20 --warmup-epoch 5 --interval 5 --clustering --selection none", []),
    ],
)
def test_there_are_no_splits_without_a_selection(words, splits):
    assert train_semisup.splits_of(parsed(words)) == splits


# sizes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "size", "removed"),
    [
        # 10 % at once, 1 % more at each of the splits in epochs 5, 6, ..., 94
        ("--epochs 95 --warmup-epoch 5 --interval 1 --clustering", 100, 100),
        ("--epochs 95 --warmup-epoch 5 --interval 1 --clustering", 1000, 1000),
        ("--remove-ood 0.1 --epochs 3 --warmup-epoch 3", 50, 50),
        ("--remove-ood 0.1 --epochs 3 --warmup-epoch 2", 50, 55),
        ("--remove-ood 0.049 --ood-start-factor 20 --epochs 3 --warmup-epoch 3", 50, 49),
    ],
)
def test_a_removal_of_all_but_one_image_is_refused(words, size, removed):
    text = f"{removed} of {size} images would be removed in the end; use a smaller one"
    args = parsed(words)
    with pytest.raises(UserError, match=f"--remove-ood {args.remove_ood}: {text}") as error:
        train_semisup.check_sizes(corpus_of([0] * size), args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("", 50000),
        ("--epochs 93 --warmup-epoch 5 --interval 1 --clustering", 100),
        ("--remove-ood 0.048 --ood-start-factor 20 --epochs 3 --warmup-epoch 3", 50),
        # no split, so no further removal
        ("--epochs 200 --warmup-epoch 5 --interval 1 --clustering --selection none", 100),
        ("--remove-ood 0 --epochs 300 --interval 1 --clustering", 2),
    ],
)
def test_what_leaves_two_images_is_not(words, size):
    train_semisup.check_sizes(corpus_of([0] * size), parsed(words))


@pytest.mark.parametrize("size", [0, 1])
def test_one_image_is_refused_even_where_none_is_removed(size):
    with pytest.raises(UserError, match="one training image has no neighbours: use a larger --limit_train"):
        train_semisup.check_sizes(corpus_of([0] * size), parsed("--remove-ood 0"))


def test_several_processes_need_equal_pieces_and_a_whole_batch(monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: 3)
    train_semisup.check_sizes(corpus_of([0] * 99), parsed("--batch-size 66"))
    with pytest.raises(UserError, match="--batch-size 64: cannot be cut into equal pieces for 3 processes"):
        train_semisup.check_sizes(corpus_of([0] * 99), parsed("--batch-size 64"))
    with pytest.raises(UserError, match="--batch-size 66: more than all 65 images, which 3 processes share"):
        train_semisup.check_sizes(corpus_of([0] * 65), parsed("--batch-size 66"))


# the network ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "width"), [((8, 8, 1), 64), ((8, 8, 3), 64), ((28, 28, 1), 512), ((32, 32, 3), 512)]
)
def test_the_network_fits_the_images(shape, width):
    network = train_semisup.initial_network(corpus_of([0, 1], shape=shape), parsed("--pretrained none"))
    assert network.encoder.conv1.in_channels == shape[2]
    assert network.classifier.weight.shape == (K, width)


def test_the_network_begins_from_the_encoder_it_is_given_and_is_random_else(tmp_path):
    torch.manual_seed(5)
    encoder, path = make_encoder("resnet18", 1, 8), tmp_path / "encoder.safetensors"
    safetensors.torch.save_file(encoder.state_dict(), path)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        args = parsed(f"--pretrained {path}")
        made.append(train_semisup.initial_network(corpus_of([0, 1]), args))
        for name, value in made[-1].encoder.state_dict().items():
            assert torch.equal(value, encoder.state_dict()[name]), name
    assert not torch.equal(made[0].classifier.weight, made[1].classifier.weight)
    assert not torch.equal(made[0].projection.weight, made[1].projection.weight)


def test_an_encoder_that_is_not_there_says_how_to_make_one(tmp_path):
    for path in (tmp_path / "last.pth", tmp_path):  # a folder is none either
        with pytest.raises(
            UserError, match=r"no such file; make an encoder with .*pretrain\.py .*none"
        ) as error:
            train_semisup.initial_network(corpus_of([0, 1]), parsed(f"--pretrained {path}"))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_encoder_of_other_images_is_refused(tmp_path):
    path = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file(make_encoder("resnet18", 3, 8).state_dict(), path)
    with pytest.raises(UserError, match=r"conv1.weight has shape \[16, 3, 3, 3\], expected \[16, 1, 3, 3\]"):
        train_semisup.initial_network(corpus_of([0, 1]), parsed(f"--pretrained {path}"))


# the ramp ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labelled", "released"), [(7, 2), (8, 3), (9, 3)])
@pytest.mark.parametrize("ramp", ["fixed", "released"])
def test_the_ramp_counts_the_steps_of_an_epoch_and_as_released_one_too_many(
    ramp, labelled, released, monkeypatch
):
    """In batches of 4, two epochs after the warm-up; the ramp takes sixteen."""
    steps = {"fixed": -(-labelled // 4), "released": released}[ramp]
    taken = []

    def train_divided(_network, _optimizer, batches, _unlabelled, step, **_more):
        taken.append([step.ramp(number) for number, _ in enumerate(batches)])
        return torch.zeros(1, 7)

    monkeypatch.setattr(train_semisup, "train_divided", train_divided)
    corpus = corpus_of([0, 1] * 10)
    images = Images(corpus.images, corpus.mean, corpus.std, torch.device("cpu"))
    run = SimpleNamespace(progress=lambda batches, *_, **__: batches)
    args = parsed(f"--dataset digits --batch-size 4 --warmup-epoch 20 --ramp {ramp}")
    s = train_semisup.Setting(args, CPU, run, images, torch.zeros(20), torch.Generator(), None)
    sides = torch.arange(labelled), torch.arange(12, 20)
    epoch = 22 if ramp == "fixed" else 11  # the release counts it twice
    train_semisup.mixematch_epoch(network(), None, *sides, torch.ones(20), epoch, s)
    assert taken == [[pytest.approx((2 + step / steps) / 16) for step in range(-(-labelled // 4))]]


# the optimiser ----------------------------------------------------------------------------------------------------------


def network() -> Network:
    torch.manual_seed(1)
    return Network(make_encoder("resnet18", 1, 8), 64, K)


def test_head_and_encoder_are_two_groups_with_their_own_rates():
    own = network()
    optimizer = train_semisup.make_optimizer(own, parsed("--lr-head 0.2 --lr-backbone 0.002"))
    head, encoder = optimizer.param_groups
    assert [p.shape for p in head["params"]] == [p.shape for p in own.head()] and len(head["params"]) == 6
    assert {id(p) for p in encoder["params"]} == {id(p) for p in own.encoder.parameters()}
    assert (head["lr"], head["initial_lr"]) == (0.2, 0.2)
    assert (encoder["lr"], encoder["initial_lr"]) == (0.002, 0.002)
    for group in (head, encoder):  # of all weights, those of norms and biases included
        assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
        assert not group["nesterov"] and group["dampening"] == 0
    assert all(p.requires_grad for p in own.parameters())
    other = train_semisup.make_optimizer(network(), parsed("--momentum 0.5 --weight-decay 0.1"))
    assert {(g["momentum"], g["weight_decay"]) for g in other.param_groups} == {(0.5, 0.1)}


def pass_over(size: int, views: int) -> list:
    generator = torch.Generator().manual_seed(3)
    return [
        (tuple(torch.randn(size, 1, 8, 8, generator=generator) for _ in range(views)), torch.arange(size))
    ]


@pytest.mark.parametrize("mode", ["train", "frozen", "warm-up"])
@pytest.mark.parametrize("weights", ["freeze", "finetune"])
def test_a_frozen_encoder_stays_as_it_is_in_both_kinds_of_epochs(weights, mode):
    own = network()
    optimizer = train_semisup.make_optimizer(own, parsed(f"--weights {weights}"))
    assert len(optimizer.param_groups) == (1 if weights == "freeze" else 2)
    assert all(p.requires_grad is (weights == "finetune") for p in own.encoder.parameters())
    before = {name: value.clone() for name, value in own.state_dict().items()}
    labels, frozen = torch.arange(6) % K, weights == "freeze"
    set_mode(own, mode, True, frozen)
    warm_up(own, optimizer, pass_over(6, 1), labels, torch.ones(6, dtype=torch.bool), CPU)
    set_mode(own, mode, False, frozen)
    step = Step(lambda: 0.3, torch.randperm, lambda _: 1.0, Weights(), 0.5, 0.0, "RL", "released", CPU)
    train_divided(
        own, optimizer, pass_over(6, 4), iter(pass_over(5, 4)), step, labels=labels, clean=torch.ones(6)
    )
    changed = {name for name, value in own.state_dict().items() if not torch.equal(value, before[name])}
    assert {"classifier.weight", "projection.weight", "projection_bn.weight"} <= changed
    of_encoder = {name for name in changed if name.startswith("encoder.")}
    if frozen:
        assert not of_encoder
    else:
        assert {f"encoder.{name}" for name, _ in own.encoder.named_parameters()} <= of_encoder


def test_both_rates_follow_the_same_cosine():
    optimizer = train_semisup.make_optimizer(network(), parsed("--lr-head 0.2 --lr-backbone 0.002"))
    for epoch in (0, 7, 299):
        rates = [learning_rate(epoch, group["initial_lr"], 300) for group in optimizer.param_groups]
        assert rates[0] == pytest.approx(100 * rates[1])


# statistics -------------------------------------------------------------------------------------------------------------


def kept(size: int, *removed: int) -> Tensor:
    return ~torch.isin(torch.arange(size), torch.tensor(removed))


def test_removal_is_measured_by_what_is_from_elsewhere():
    ood = np.isin(np.arange(10), [1, 4, 6, 7])
    found = train_semisup.removal_statistics(kept(10, 1, 2, 4), ood)
    assert found == {"removed": 3, "removal_precision": 2 / 3, "removal_recall": 2 / 4}
    assert {type(value) for value in found.values()} == {int, float}


@pytest.mark.parametrize(
    ("removed", "ood", "expected"),
    [
        ((), [1, 4], (0, None, 0.0)),
        ((2, 3), [], (2, 0.0, None)),
        ((), [], (0, None, None)),
        ((1, 4), [1, 4], (2, 1.0, 1.0)),
    ],
)
def test_removal_where_there_is_nothing_to_be_measured(removed, ood, expected):
    found = train_semisup.removal_statistics(kept(10, *removed), np.isin(np.arange(10), ood))
    assert tuple(found.values()) == expected


def test_of_images_from_the_web_only_the_number_of_removed_ones_is_known():
    found = train_semisup.removal_statistics(kept(10, 3, 5), None)
    assert found == {"removed": 2, "removal_precision": None, "removal_recall": None}


def test_removed_samples_are_counted_by_their_given_label():
    corpus = corpus_of([0, 0, 1, 1, 1, 0], clean=[2] * 6, ood=[])
    assert train_semisup.removed_by_class(kept(6, 0, 1, 3), corpus) == {
        "removed_class_0": 2, "removed_class_1": 1, "removed_class_2": 0,
    }  # fmt: skip
    assert {type(n) for n in train_semisup.removed_by_class(kept(6), corpus).values()} == {int}


def test_a_class_is_lost_when_more_than_half_of_its_correctly_labelled_samples_are():
    # class 0: positions 0 to 3; class 1: 4 to 6; none of 2. 7 and 8 are mislabelled as 1, 9 and 10 are OOD with label 0
    observed, clean = [0] * 4 + [1] * 5 + [0, 0], [0] * 4 + [1] * 3 + [0, 2, 0, 0]
    corpus = corpus_of(observed, clean, ood=[9, 10])
    half, sides = kept(11, 0, 1, 4, 9, 10), (positions(2, 3, 5, 6, 8), positions(7))
    assert train_semisup.lost_classes(half, None, corpus).tolist() == []  # two of four, one of three
    assert train_semisup.lost_classes(half, sides, corpus).tolist() == []
    sides = positions(2, 5, 6, 7, 8), positions(3)  # and a third one unlabelled
    assert train_semisup.lost_classes(half, sides, corpus).tolist() == [0]
    sides = positions(2, 6, 7, 8), positions(3, 5)
    assert train_semisup.lost_classes(half, sides, corpus).tolist() == [0, 1]
    # where nobody knows, by all that are given the label: five of six, and two of five
    unknown = corpus_of(observed)
    assert train_semisup.lost_classes(half, sides, unknown).tolist() == [0]


@pytest.mark.parametrize(
    ("lost", "clean", "line"),
    [
        ([], None, ""),
        ([1, 2], None, "more than half of the samples of 2 of 3 classes are removed or unlabelled: 1, 2\n"),
        ([0], [0], "more than half of the correctly labelled samples of 1 of 3 classes are removed or unlabelled: 0\n"),
        (range(12), None, "more than half of the samples of 12 of 3 classes are removed or unlabelled: "
         "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...\n"),
    ],
)  # fmt: skip
def test_lost_classes_are_named_in_one_line(lost, clean, line, monkeypatch, capsys):
    monkeypatch.setattr(train_semisup, "lost_classes", lambda *_: np.array(lost))
    train_semisup.warn_of_lost_classes(kept(1), None, corpus_of([0], clean, []))
    assert capsys.readouterr().out == (line and f"warning: {line}")


NAMES = ("labelled", "unlabelled", "labelled_precision", "labelled_ood", "clean_auc")


def test_a_split_is_measured_by_right_labels_and_by_what_is_from_elsewhere():
    # right labels: 0, 1, 2; wrong ones: 3, 4; 5 to 7 are from elsewhere, two of them with the label of their place
    corpus = corpus_of([0, 1, 2, 0, 1, 2, 0, 1], clean=[0, 1, 2, 1, 2, 2, 0, 2], ood=[5, 6, 7])
    clean = torch.tensor([0.9, 0.8, 0.2, 0.6, 0.1, 0.95, 0.05, 0.3], dtype=torch.float64)
    sides = positions(0, 1, 3, 5), positions(2, 4)
    found = train_semisup.split_statistics(sides, clean, corpus)
    assert tuple(found) == NAMES
    # an image from elsewhere is not right, whatever its label
    expected = {"labelled": 4, "unlabelled": 2, "labelled_precision": 2 / 4, "labelled_ood": 1 / 4}
    # of the pairs of a right and a wrong one: 0.9 and 0.8 beat both, 0.2 beats 0.1 alone
    assert found == {**expected, "clean_auc": pytest.approx(5 / 6)}
    assert [type(value) for value in found.values()] == [int, int, float, float, float]


def test_a_split_where_nothing_is_known_or_there_is_none():
    clean = torch.tensor([0.9, 0.1])
    assert train_semisup.split_statistics(None, None, corpus_of([0, 1], [0, 1], [])) == dict.fromkeys(NAMES)
    found = train_semisup.split_statistics((positions(0), positions(1)), clean, corpus_of([0, 1]))
    assert tuple(found.values()) == (1, 1, None, None, None)


@pytest.mark.parametrize(
    ("observed", "ood", "sides", "expected"),
    [
        ([0, 0], [], ([], [0, 1]), (0, 2, None, None, 0.0)),  # an empty side
        ([0, 1], [], ([0], [1]), (1, 1, 1.0, 0.0, None)),  # all right
        ([1, 0], [], ([0], [1]), (1, 1, 0.0, 0.0, None)),  # all wrong
        ([0, 0], [1], ([0], [1]), (1, 1, 1.0, 0.0, None)),  # one left that is not from elsewhere
        ([0, 1], [0, 1], ([0], [1]), (1, 1, 0.0, 1.0, None)),  # none left
    ],
)
def test_a_split_of_one_kind_alone(observed, ood, sides, expected):
    clean = torch.tensor([0.9, 0.1], dtype=torch.float64)
    if expected[4] == 0.0:
        clean = clean.flip(0)
    corpus = corpus_of(observed, clean=[0, 1], ood=ood)
    found = train_semisup.split_statistics(tuple(positions(*side) for side in sides), clean, corpus)
    assert tuple(found.values()) == expected


# result rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "Manifold DivideMix"),
        ("--remove-ood 0", "Manifold DivideMix without OOD removal"),
        ("--lambda_xe 0 --lambda_ue 0", "Manifold DivideMix without manifold mixup"),
        ("--lambda_xe 0", "Manifold DivideMix"),
        ("--lambda_ue 0", "Manifold DivideMix"),
        ("--lambda_c 0", "Manifold DivideMix without contrastive loss"),
        ("--knn-encoder pretrained", "Manifold DivideMix, scored by the pre-trained encoder"),
        (
            "--knn-encoder pretrained --lambda_xe 0 --lambda_ue 0",
            "Manifold DivideMix without manifold mixup, scored by the pre-trained encoder",
        ),
        (
            "--remove-ood 0 --lambda_xe 0 --lambda_ue 0",
            "Manifold DivideMix without OOD removal and manifold mixup",
        ),
        ("--selection none --remove-ood 0 --pretrained none", "SCE"),
        ("--selection none --remove-ood 0 --pretrained none --warmup-loss CE", "CE"),
        ("--selection none --remove-ood 0 --warmup-loss CE", "CE (pre-trained)"),
        ("--selection none --pretrained none", "SCE with OOD removal"),
        ("--selection none --warmup-loss CE", "CE (pre-trained) with OOD removal"),
        ("--warmup-loss CE", "Manifold DivideMix"),
    ],
)
def test_the_method_is_named_by_what_is_left_out(words, name):
    for script in (train_semisup, train_semisup_miniimagenet):
        assert train_semisup.method(script.parse_args(words.split())) == name


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("", {}),
        ("--epochs 299", {"profile": "short"}),
        ("--dataset digits", {"noise_type": "sym + photographs", "profile": "embedded"}),
        ("--ood-ratio 0", {"noise_type": "sym", "ood_ratio": 0}),
        ("--noise-type asym --noise-ratio 0.4", {"noise_type": "asym + imagenet32", "noise_rate": 0.4}),
        # the ratio that stands there by default is not of labels then
        ("--noise-type no", {"noise_type": "no + imagenet32", "noise_rate": 0.0}),
        ("--noise-type given", {"noise_type": "given + imagenet32", "noise_rate": None}),
        (
            "--noise_file elsewhere/labels.npy",
            {"noise_type": "labels.npy + imagenet32", "noise_rate": None},
        ),
    ],
)
def test_a_result_row_says_what_was_trained_on(words, changed):
    expected = {
        "dataset": "few",
        "noise_type": "sym + imagenet32",
        "noise_rate": 0.2,
        "imb_factor": None,
        "ood_ratio": 0.2,
        "profile": "paper",
    }
    assert train_semisup.cell(parsed(words), corpus_of([0, 1])) == {**expected, **changed}


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("", {}),
        ("--noise-type blue --noise-ratio 0.6", {"noise_type": "blue", "noise_rate": 0.6}),
        ("--epochs 49", {"profile": "short"}),
        ("--img-size 16", {"profile": "short"}),
        ("--img-size 84", {}),
        ("--noise_file elsewhere/labels.csv", {"noise_type": "labels.csv", "noise_rate": None}),
    ],
)
def test_a_result_row_of_mini_imagenet(words, changed):
    expected = {
        "dataset": "few",
        "noise_type": "red",
        "noise_rate": 0.2,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": "paper",
    }
    args = train_semisup_miniimagenet.parse_args(words.split())
    assert train_semisup_miniimagenet.cell(args, corpus_of([0, 1])) == {**expected, **changed}
