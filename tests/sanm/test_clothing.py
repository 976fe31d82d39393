"""Train_clothing1M.py and clothing.py: what is refused, lists, subsets, label quality, divisions, best weights."""

import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from common.datasets.file_lists import make_split
from common.gpu.device import Device
from common.runs.cli import UserError
from sanm import Train_clothing1M, clothing
from sanm.choices import MaskRule
from sanm.clothing import Data, balanced_subset, subset_size
from sanm.masking import draw_clothing_masks, mask_clothing
from sanm.networks import Outputs
from sanm.selection import clean_probability, normalised
from sanm.Train_clothing1M import Division, Setting, co_divide, label_quality, parse_args
from tests.common.small_file_data import make_clothing1m, plant, write_lines
from tests.end_to_end.runs import result, table
from tests.end_to_end.small_networks import masked_network
from tests.lines import refused

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

CPU = Device(torch.device("cpu"), "fp32", "tests")
QUICK = (
    "--network resnet18 --pretrained none --image_size 64 --batch_size 2 --num_batches 42 --num_epochs 1 --device cpu "
    "--workers 0"
)


@pytest.fixture
def root(tmp_path) -> Path:
    """Clothing1M of 12 noisy images of three classes; two validation and two test images of each."""
    make_clothing1m(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--batch_size 7", "--batch_size 7: .*balanced subset has only 12 images.*use a smaller batch"),
        ("--num_batches 1", "--batch_size 2: .*balanced subset has only 2 images.*more --num_batches"),
        ("--limit_train 3", "--batch_size 2: .*balanced subset has only 3 images.*or more images"),
        ("--noise_file nosuch.npy", "--noise_file nosuch.npy: no such file"),
        ("--image_cache nosuch", "no image cache in nosuch"),
        ("--pretrained data/clean_val_key_list.txt", "--pretrained data/clean_val_key_list.txt: damaged"),
        ("", "image 3 of the validation list.*or use --on_bad_image skip"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(
    words, line, root, capsys, monkeypatch
):
    monkeypatch.chdir(root.parent)
    if not words:
        plant(root / (root / "clean_val_key_list.txt").read_text().split()[3], "missing")
    before = sorted(root.parent.rglob("*"))
    found = refused(capsys, Train_clothing1M.main, *f"{QUICK} --data_path data --out run {words}".split())
    assert re.search(line, found), found
    assert sorted(root.parent.rglob("*")) == before


def released_layout(root: Path) -> None:
    """The release's lists in place of the official ones."""
    pairs = {"noisy_train.txt": "noisy", "clean_val.txt": "clean", "clean_test.txt": "clean"}
    labels = {}
    for kind in ("noisy", "clean"):
        lines = (root / f"{kind}_label_kv.txt").read_text().splitlines()
        labels[kind] = dict(line.rsplit(" ", 1) for line in lines)
    for file, kind in pairs.items():
        keys = (root / file.replace(".txt", "_key_list.txt")).read_text().split()
        write_lines(root / file, [f"{key} {labels[kind][key]}" for key in keys])
    for path in (*root.glob("*_key_list.txt"), *root.glob("*_kv.txt")):
        path.unlink()


def splits_of(data) -> list[tuple]:
    splits = data.train, data.validation, data.test
    return [(s.part, [str(s.path(i)) for i in range(len(s.paths))], s.labels.tolist()) for s in splits]


def test_both_layouts_of_the_lists_give_the_same_splits_and_images_may_lie_without_their_folder(root, capsys):
    official = clothing.read_lists(root, "error", 0)
    told = capsys.readouterr().out
    released_layout(root)
    found = clothing.read_lists(root, "error", 0)
    assert capsys.readouterr().out == told
    expected = splits_of(official)
    assert splits_of(found) == expected and [len(paths) for _, paths, _ in expected] == [12, 6, 6]
    assert found.positions.tolist() == list(range(12)) and found.listed == 12
    assert (found.name, found.num_classes, found.classes) == (official.name, 14, official.classes)
    assert found.verified.tolist() == official.verified.tolist()
    for folder in (root / "images").iterdir():
        folder.rename(root / folder.name)
    (root / "images").rmdir()
    bare = [(part, [p.replace("images/", "") for p in paths], labels) for part, paths, labels in expected]
    assert splits_of(clothing.read_lists(root, "error", 0)) == bare


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["images/a.jpg 3", "images/b.jpg 14"], r"noisy_train.txt: line 2: .* a label 0\.\.13"),
        (["images/a.jpg"], "noisy_train.txt: line 1: 'images/a.jpg' is not a key, a blank and a label"),
        ([], "noisy_train.txt: no image in it"),
        (["images/none.jpg 3"], "image 0 of the train list, .*images/none.jpg, is missing"),
    ],
)
def test_a_released_list_that_cannot_be_used_is_named_with_its_line(lines, error, root):
    released_layout(root)
    write_lines(root / "noisy_train.txt", lines)
    with pytest.raises(UserError, match=error):
        clothing.read_lists(root, "error", 0)


@pytest.mark.parametrize(
    ("counts", "num_samples"),
    [
        ([10, 10, 10], 9),  # whole quota
        ([10, 10, 10], 10),  # four of a class at most, ten in all
        ([10, 2, 10], 12),  # a short class
        ([10, 0, 1], 12),  # an empty one
        ([3, 3, 3], 100),  # more than there are
        ([30, 30, 30], 1),
    ],
)
def test_a_subset_is_balanced_over_classes_and_has_the_size_that_is_said(counts, num_samples):
    labels, most = np.repeat(np.arange(3), counts), np.minimum(counts, -(-num_samples // 3))
    for seed in range(20):
        found = balanced_subset(labels, num_samples, 3, random.Random(seed))
        assert len({*found.tolist()}) == len(found) == subset_size(labels, num_samples, 3)
        assert len(found) == min(num_samples, most.sum())
        assert (np.bincount(labels[found], minlength=3) <= most).all()


class Reader(nn.Module):
    def forward(self, images: Tensor) -> Outputs:
        return Outputs(images, images, None)


def setting(labels: list[int], margins: list[float], *words: str, seed: int = 0) -> Setting:
    """A setting of images that are their own scores: `margins` for the observed label and 0 for all others.

    The loss of an image is log(1 + 13 / e^margin), whatever the label.
    """
    images = torch.tensor(margins)[:, None] * torch.eye(14)[labels]
    args = parse_args(list(words))

    def batches(split, _cache, _transform, size, **_):
        rows = images[[int(path) for path in split.paths]]
        return [((rows[piece],), piece) for piece in torch.arange(len(rows)).split(size)]

    run = SimpleNamespace(progress=lambda batches, *_, **__: batches)
    split = make_split(Path(), [str(i) for i in range(len(labels))], labels)
    data = Data(None, split, None, None, None, (), None, batches)
    return Setting(args, CPU, run, data, np.random.default_rng(seed), CPU.generator(0))


# 20 images of class 0, 12 of class 1, two of class 2; those of a multiple of 3 have low losses
LABELS = [0] * 20 + [1] * 12 + [2] * 2
MARGINS = [(4.0 if i % 3 == 0 else -2.0) + 0.01 * i for i in range(len(LABELS))]


@pytest.mark.parametrize(("batches", "seed"), [(21, 0), (21, 1), (42, 2)])
def test_clean_probabilities_stay_with_their_images(batches, seed):
    """Of 84 or 168 that are asked for, 6 or 12 of a class, 14 or 26 are there."""
    s = setting(LABELS, MARGINS, "--batch_size", "4", "--num_batches", str(batches), seed=seed)
    found = label_quality(Reader(), "losses", s)
    positions = found.positions.tolist()
    assert found.positions.dtype == torch.int64 and len(set(positions)) == len(positions)
    assert len(positions) == subset_size(np.array(LABELS), 4 * batches, 14) == {21: 14, 42: 26}[batches]
    assert positions != sorted(positions)
    assert (found.clean > 0.5).tolist() == [i % 3 == 0 for i in positions]
    # the mixture of the losses themselves, by another way to them; its input is float32
    losses = np.log1p(13 / np.exp(np.array(MARGINS)[positions]))
    again = np.random.default_rng(seed)
    again.integers(2**63)
    expected = clean_probability(normalised(torch.from_numpy(losses)), int(again.integers(2**31)))
    torch.testing.assert_close(found.clean, expected, rtol=0, atol=1e-4)
    fresh = label_quality(Reader(), "losses", s).positions
    assert sorted(fresh.tolist()) != sorted(positions)


def test_as_released_the_probabilities_are_paired_with_the_first_images_and_short_classes_leave_zeros():
    words = ("--batch_size", "4", "--num_batches", "6")  # 24 asked for, two of a class: six are found
    s = setting(LABELS, MARGINS, *words, "--fidelity", "released")
    found = label_quality(Reader(), "losses", s)
    assert found.positions.tolist() == list(range(24))
    again = np.random.default_rng(0)
    subset = balanced_subset(np.array(LABELS), 24, 14, random.Random(int(again.integers(2**63))))
    assert len(subset) == 6
    losses = np.zeros(24)
    losses[:6] = np.log1p(13 / np.exp(np.array(MARGINS)[subset]))
    expected = clean_probability(normalised(torch.from_numpy(losses)), int(again.integers(2**31)))
    torch.testing.assert_close(found.clean, expected, rtol=0, atol=1e-4)
    assert (found.clean[6:] > 0.5).all()  # nothing is as clean as no loss at all
    s = setting(LABELS, MARGINS, "--batch_size", "4", "--num_batches", "42", "--fidelity", "released")
    found = label_quality(Reader(), "losses", s)
    assert found.positions.tolist() == list(range(34)), "never more positions than images"


def divided(monkeypatch, clean: list[float], *words: str):
    """What `co_divide` gives to the epoch of images 30, 29, ... with these clean probabilities, and what it returns."""
    seen = {}

    def epoch(network, peer, optimizer, labelled, unlabelled, step, **more):
        unlabelled = [next(unlabelled) for _ in range(3)]
        seen.update(networks=(network, peer), optimizer=optimizer, labelled=list(labelled))
        seen.update(unlabelled=unlabelled, step=step, **more)
        return torch.tensor([[1.0, 2, 3, 4, 5], [3.0, 4, 5, 6, 7]])

    monkeypatch.setattr(Train_clothing1M, "train_divided", epoch)
    # margins are the numbers of the images, so a view tells which image it is of
    s = setting([i % 14 for i in range(40)], [float(i) for i in range(40)], "--batch_size", "4", *words)
    division = Division(torch.arange(30, 30 - len(clean), -1), torch.tensor(clean, dtype=torch.float64))
    nets, parallel, optimizer = [nn.Linear(1, 1), nn.Linear(1, 1)], nn.Linear(1, 1), object()
    losses, selected = co_divide(nets, parallel, optimizer, division, "epoch 1", s)
    assert torch.equal(selected.given, seen["labels"]) and selected.right is None
    assert seen["networks"] == tuple(nets) and seen["optimizer"] is optimizer and seen["parallel"] is parallel
    return seen, (losses, int(selected.chosen.sum()))


def test_images_labels_and_probabilities_of_a_division_belong_together(monkeypatch):
    clean = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.95, 0.5, 0.6, 0.05, 0.02]
    seen, (losses, selected) = divided(monkeypatch, clean)
    assert losses == [2, 3, 4, 5, 6] and selected == 5
    assert seen["clean"].tolist() == clean
    assert seen["labels"].tolist() == [(30 - i) % 14 for i in range(11)]
    sides = []
    for batches in (seen["labelled"], seen["unlabelled"]):
        numbers = torch.cat([index for _, index in batches]).tolist()
        images = torch.cat([views[0] for views, _ in batches]).sum(dim=1).tolist()
        assert images == [30 - i for i in numbers]
        sides.append(numbers)
    below = [i for i, value in enumerate(clean) if value <= 0.5]
    assert sides[0] == [i for i in range(11) if i not in below]
    assert sides[1] == [*below, *below[:4]]  # six, in batches of four and two, and again from the start


@pytest.mark.parametrize("words", [(), ("--p_threshold", "1"), ("--p_threshold", "0")])
@pytest.mark.parametrize("clean", [[0.0] * 8, [0.9] * 9 + [0.1], [0.1] * 9 + [0.9]])
def test_both_sides_of_a_split_have_a_batch_at_least(clean, words, monkeypatch):
    seen, (_, selected) = divided(monkeypatch, clean, *words)
    assert 4 <= selected <= len(clean) - 4
    assert sum(len(index) for _, index in seen["labelled"]) == selected
    assert len(seen["labelled"][0][1]) == len(seen["unlabelled"][0][1]) == 4


def test_an_epoch_is_set_as_described(monkeypatch):
    seen, _ = divided(monkeypatch, list(np.linspace(0, 1, 20)), "--T", "0.4", "--recon-weight", "0.2")
    step = seen["step"]
    assert (step.temperature, step.reconstruction_weight, step.forward_unlabelled) == (0.4, 0.2, False)
    assert step.weight(0) == step.weight(10**6) == 0  # no unlabelled loss
    lams = [step.draw_lam() for _ in range(200)]
    # Beta(0.5, 0.5): 0.41 of its mass is within a tenth of 0 or 1, of Beta(4, 4) less than a hundredth
    assert 0.25 < np.mean([lam < 0.1 or lam > 0.9 for lam in lams]) < 0.57
    assert sorted(step.draw_permutation(9).tolist()) == list(range(9))
    samples = step.as_samples(("first", "second"), "clean")
    assert samples == (("first", "second"), ("first", "second"), "clean")


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("", MaskRule(0.06, 0.13, 0.1, "centre", False, False)),
        ("--fidelity released", MaskRule(0.06, 0.13, 0.1, "corner", False, True)),
        ("--mask-lo 0.3 --mask-hi 0.4 --mask-quality 0.5", MaskRule(0.3, 0.4, 0.5)),
        ("--mask-anchor corner --clamp-targets", MaskRule(0.06, 0.13, 0.1, "corner", True)),
    ],
)
def test_masks_are_those_of_clothing1m_by_the_rule_of_the_flags(words, rule, monkeypatch):
    masks = divided(monkeypatch, [0.9] * 10, *words.split())[0]["step"].masks
    assert (masks.draw, masks.apply, masks.rule) == (draw_clothing_masks, mask_clothing, rule)
    assert divided(monkeypatch, [0.9] * 10, *words.split(), "--masking", "none")[0]["step"].masks is None


def run_small(root: Path, monkeypatch, words: str = "") -> Path:
    monkeypatch.setattr(Train_clothing1M, "clothing_network", masked_network)
    run = root.parent / "run"
    Train_clothing1M.main(f"{QUICK} --data_path {root} --out {run} {words}".split())
    return run


def test_each_network_learns_from_the_division_that_its_peer_made_at_the_end_of_the_epoch_before(
    root, monkeypatch
):
    divisions, used, ratings = [], [], []
    rate, train = Train_clothing1M.label_quality, Train_clothing1M.co_divide

    def label_quality(network, name, s):
        divisions.append(rate(network, name, s))
        ratings.append((id(network), name))
        return divisions[-1]

    def co_divide(nets, parallel, optimizer, peers, name, s):
        before = [next(net.parameters()).detach().clone() for net in nets]
        returned = train(nets, parallel, optimizer, peers, name, s)
        moved = [not torch.equal(next(n.parameters()), old) for n, old in zip(nets, before, strict=True)]
        assert isinstance(optimizer, SGD) and moved == [True, False]
        used.append(([id(net) for net in nets], peers, len(divisions), int(returned[1].chosen.sum())))
        return returned

    monkeypatch.setattr(Train_clothing1M, "label_quality", label_quality)
    monkeypatch.setattr(Train_clothing1M, "co_divide", co_divide)
    run = run_small(root, monkeypatch, "--num_epochs 3 --lr_drop 2")
    first, second = ratings[0][0], ratings[1][0]
    assert first != second
    # none after the last epoch, where nobody would use it
    assert ratings == [(net, f"epoch {epoch} losses") for epoch in (0, 1, 2) for net in (first, second)]
    assert [nets for nets, *_ in used] == [[first, second], [second, first]] * 3
    for call, (_, peers, done, _) in enumerate(used):
        epoch, learner = divmod(call, 2)
        assert done == 2 * (epoch + 1)
        expected = divisions[2 * epoch + 1 - learner]
        assert torch.equal(peers.positions, expected.positions) and torch.equal(peers.clean, expected.clean)
    rows = table(run)
    # net2's losses select what net1 learns from
    for row, (of_first, of_second) in zip(rows[1:], zip(used[::2], used[1::2], strict=True), strict=True):
        assert (int(row["net2_selected"]), int(row["net1_selected"])) == (of_first[3], of_second[3])
    assert [float(row["lr"]) for row in rows] == pytest.approx([9e-4, 9e-4, 9e-5, 9e-5], rel=1e-12)


def test_the_weights_that_are_best_on_validation_are_kept_and_tested_at_the_end(root, monkeypatch):
    """By accuracies of ours: net1 is best in epochs 1 and 2 alike, net2 in the last; the test's own never count."""
    given = iter([10, 5, 99, 30, 5, 98, 30, 5, 97, 20, 50, 96, 77])
    monkeypatch.setattr(Train_clothing1M, "accuracy", lambda _scores, _labels: float(next(given)))
    seen, plain_scores = [], Train_clothing1M.scores

    def scores(nets, split, name, s):
        kept = [{key: value.clone() for key, value in net.state_dict().items()} for net in nets]
        seen.append((name, len(split.labels), kept))
        return plain_scores(nets, split, name, s)

    monkeypatch.setattr(Train_clothing1M, "scores", scores)
    keys = root / "clean_test_key_list.txt"
    write_lines(keys, keys.read_text().split()[:4])
    run = run_small(root, monkeypatch, "--num_epochs 3")
    names = [f"epoch {epoch} {what}" for epoch in range(4) for what in ("validation", "test")]
    names += ["label quality", "test of the best weights"]
    assert [(name, count) for name, count, _ in seen] == [*zip(names, 4 * [6, 4] + [12, 4], strict=True)]
    at_validation = [kept for name, _, kept in seen if name.endswith("validation")]
    expected = [at_validation[1][0], at_validation[3][1]]
    assert not all(torch.equal(value, at_validation[2][0][key]) for key, value in expected[0].items())
    for i, wanted in enumerate(expected):
        saved = torch.load(run / f"net{i + 1}_best.pt", weights_only=True)
        for weights in (saved, seen[-1][2][i]):
            assert weights.keys() == wanted.keys()
            assert all(torch.equal(value, wanted[key]) for key, value in weights.items())
    metrics = result(run)["metrics"]
    expected = {"at_best_validation": 77, "best": 99, "last": 96}
    expected |= {"best_validation_net1": 30, "best_validation_net2": 50}
    assert expected.items() <= metrics.items()
    assert next(given, None) is None
    # the same command again: nothing is left to do, and nothing is done
    files = run / "result.json", run / "log.csv", run / "net1_best.pt"
    before = [path.read_bytes() for path in files]
    run_small(root, monkeypatch, "--num_epochs 3")
    assert len(seen) == 10 and [path.read_bytes() for path in files] == before


@pytest.mark.parametrize(("fidelity", "images"), [("paper", 2 * 10), ("released", 2 * 12)])
def test_the_release_keeps_a_smaller_last_batch(fidelity, images, root, monkeypatch):
    seen, train = [], Train_clothing1M.warm_up

    def warm_up(network, optimizer, batches, labels, device, **options):
        assert options == {"penalise_confidence": True, "clip": None}
        return train(network, optimizer, counted(batches), labels, device, **options)

    def counted(batches):
        for views, index in batches:
            seen.append(len(index))
            yield views, index

    monkeypatch.setattr(Train_clothing1M, "warm_up", warm_up)
    run_small(root, monkeypatch, f"--batch_size 5 --fidelity {fidelity}")
    assert sum(seen) == images and max(seen) == 10
