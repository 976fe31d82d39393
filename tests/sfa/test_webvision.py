"""Train_webvision.py step by step: who trains on what, selections and moments, the data, and the files of a run."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop, resize

from common import datasets, noise
from common.datasets.file_lists import make_split
from common.datasets.image_cache import build_caches
from common.gpu import processes
from common.gpu.device import Device
from common.gpu.loader import Labelled
from sfa import Train_webvision, learners, webvision
from sfa.learners import Learner, make_learner
from sfa.selection import Moments, stochastic_feature_averaging
from sfa.Train_webvision import Setting, co_divide, parse_args
from sfa.webvision import Data, load
from tests.common.small_file_data import make_doubtful_webvision, make_webvision, write_lines
from tests.end_to_end.runs import log_without_seconds, result, state, table
from tests.end_to_end.small_networks import WebvisionNetwork

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

CPU = Device(torch.device("cpu"), "fp32", "tests")
K, SIZE = 4, 32  # classes and training images, eight of each class
OBSERVED = torch.arange(SIZE) % K  # in the order of the list
QUICK = f"--num_class {K} --network resnet18 --image_size 64 --batch_size 4 --num_epochs 4 --lr_drop 3"
ARGS = [*QUICK.split(), "--workers", "0", "--device", "cpu"]
SHOTS = ("many_accuracy", "medium_accuracy", "few_accuracy")
NETS = ("net1_selected", "net1_drawn_classes", "net2_selected", "net2_drawn_classes")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("webvision") / "data"
    make_doubtful_webvision(folder, classes=K, per_class=SIZE // K)
    return folder


def run_small(root: Path, run: Path, words: str = "") -> Path:
    """With the small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "webvision_network", WebvisionNetwork)
        Train_webvision.main([*ARGS, "--data_path", str(root), "--out", str(run), *words.split()])
    return run


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def momentum(optimizer) -> list[Tensor]:
    return [own["momentum_buffer"].clone() for own in optimizer.state.values()]


def recorded(root: Path, run: Path, words: str) -> list[dict]:
    """A run's steps in their order: what went in, the networks before, and what came out."""
    events: list[dict] = []
    numbers: dict[int, int] = {}  # 1 and 2, by the identity of the networks
    real = SimpleNamespace(**vars(Train_webvision))

    def passing(batches, seen):
        for views, index in batches:
            seen.append((views, index))
            yield views, index

    def training(what, network, optimizer, train, **event):
        event |= {"what": what, "batches": [], "lr": optimizer.param_groups[0]["lr"]}
        event |= {"network": numbers.setdefault(id(network), len(numbers) + 1)}
        event |= {"before": weights(network), "momentum": momentum(optimizer)}
        events.append(event)
        event["losses"] = train(event["batches"])
        event |= {"after": weights(network), "momentum_after": momentum(optimizer)}
        return event["losses"]

    def warm_up(network, optimizer, batches, labels, counts, device):
        def train(seen):
            return real.warm_up(network, optimizer, passing(batches, seen), labels, counts, device)

        return training("warm-up", network, optimizer, train, labels=labels, counts=counts)

    def train_semi(network, peer, optimizer, labelled, unlabelled, **options):
        assert id(peer) not in numbers  # a copy
        others = []

        def train(seen):
            both = passing(labelled, seen), None if unlabelled is None else passing(unlabelled, others)
            return real.train_semi(network, peer, optimizer, *both, **options)

        event = {"peer": weights(peer), "unlabelled": others, **options}
        return training("training", network, optimizer, train, **event)

    def features_and_confidence(network, *options):
        event = {"what": "features", "network": numbers[id(network)], "before": weights(network)}
        event["outputs"] = real.features_and_confidence(network, *options)
        events.append(event)
        return event["outputs"]

    def stochastic_feature_averaging(features, labels, confidence, moments, **options):
        selection = real.stochastic_feature_averaging(features, labels, confidence, moments, **options)
        inputs = features, confidence
        events.append({"what": "selection", "inputs": inputs, "selection": selection, **options})
        return selection

    def summed_logits(networks, *options):
        assert [numbers[id(network)] for network in networks] == [1, 2]
        events.append({"what": "test", "before": [weights(network) for network in networks]})
        return real.summed_logits(networks, *options)

    spies = warm_up, train_semi, features_and_confidence, stochastic_feature_averaging, summed_logits
    with pytest.MonkeyPatch.context() as patch:
        for spy in spies:
            patch.setattr(Train_webvision, spy.__name__, spy)
        run_small(root, run, words)
    return events


OPTIONS = "--T 0.4 --beta 0.8 --phi 1.1 --p_threshold 0.4 --sample_rate 2 --imagenet none"


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory) -> dict[str, tuple[list[dict], Path]]:
    """The steps and the directory of a run by its fidelity."""
    folders = {fidelity: tmp_path_factory.mktemp(fidelity) / "run" for fidelity in ("paper", "released")}
    return {name: (recorded(root, run, f"{OPTIONS} --fidelity {name}"), run) for name, run in folders.items()}


@pytest.fixture
def paper(runs) -> tuple[list[dict], Path]:
    return runs["paper"]


each_fidelity = pytest.mark.parametrize("fidelity", ["paper", "released"])


def of(events: list[dict], *kinds: str) -> list[dict]:
    return [event for event in events if event["what"] in kinds]


def test_each_epoch_trains_both_networks_tests_them_and_then_selects(paper):
    events, run = paper
    end = [("test", None), ("features", 1), ("selection", None), ("features", 2), ("selection", None)]
    first = [("warm-up", 1), ("warm-up", 2), *end]
    expected = first + 3 * [("training", 1), ("training", 2), *end]
    assert [(event["what"], event.get("network")) for event in events] == expected
    rates = pytest.approx([0.01, 0.01, 0.001, 0.001], rel=1e-12)
    for network in (1, 2):
        assert [e["lr"] for e in of(events, "warm-up", "training") if e["network"] == network] == rates
    assert [float(row["lr"]) for row in table(run)] == rates


def test_the_warm_up_is_on_all_images_in_batches_twice_as_large(paper):
    for event in of(paper[0], "warm-up"):
        assert torch.equal(event["labels"], OBSERVED) and event["counts"].tolist() == [SIZE // K] * K
        assert [(len(index), len(views)) for views, index in event["batches"]] == [(8, 1)] * 4
        order = torch.cat([index for _, index in event["batches"]]).tolist()
        assert sorted(order) == list(range(SIZE)) != order
    first, second = of(paper[0], "warm-up")
    assert not same(first["before"], second["before"])
    assert not torch.equal(first["batches"][0][1], second["batches"][0][1])


def test_a_network_learns_from_the_selection_of_its_peer_at_the_end_of_the_epoch_before(paper):
    trainings, selections = (of(paper[0], kind) for kind in ("training", "selection"))
    for call, event in enumerate(trainings):
        epoch, learner = divmod(call, 2)  # the first is epoch 2
        split = selections[2 * epoch + 1 - learner]["selection"]
        assert torch.equal(event["clean"], split.clean)
        assert not torch.equal(event["clean"], selections[2 * epoch + learner]["selection"].clean)
        chosen = split.clean > 0.4
        assert torch.equal(event["class_counts"], torch.bincount(OBSERVED[chosen], minlength=K))
        assert torch.equal(event["labels"], OBSERVED) and event["temperature"] == 0.4
        # unlabelled rows are partners only, and have no loss
        assert event["forward_unlabelled"] is False and event["weight"](0) == event["weight"](10**6) == 0
        for batches, side in ((event["batches"], chosen), (event["unlabelled"], ~chosen)):
            assert all(len(views) == 2 and not torch.equal(*views) for views, _ in batches)
            assert all(side[index].all() for _, index in batches)
        # one pass, and as many unlabelled batches, again and again
        steps = int(chosen.sum()) // 4
        assert [len(index) for _, index in event["batches"]] == [4] * steps and len(event["losses"]) == steps
        order = torch.cat([index for _, index in event["batches"]]).tolist()
        assert len(set(order)) == len(order) and order != sorted(order)
        others = min(4, int((~chosen).sum()))
        assert [len(index) for _, index in event["unlabelled"]] == [others] * steps * (others > 0)
    assert any(event["unlabelled"] for event in trainings)


def test_the_peer_is_as_it_was_at_the_end_of_the_epoch_before(paper):
    events = of(paper[0], "warm-up", "training")
    for i in range(2, len(events), 2):
        old_first, old_second, first, second = events[i - 2 : i + 2]
        assert same(first["peer"], old_second["after"]) and same(first["before"], old_first["after"])
        # not as the first network has become in this epoch
        assert same(second["peer"], old_first["after"]) and not same(second["peer"], first["after"])
    # and both are tested and select as they are at the end
    ends = [event["after"] for event in events]
    for epoch, test in enumerate(of(paper[0], "test")):
        assert all(same(*pair) for pair in zip(test["before"], ends[2 * epoch : 2 * epoch + 2], strict=True))
    assert all(same(e["before"], end) for e, end in zip(of(paper[0], "features"), ends, strict=True))


@each_fidelity
def test_momentum_outlives_the_epoch_unless_it_is_reset(fidelity, runs):
    trainings = of(runs[fidelity][0], "warm-up", "training")
    assert trainings[0]["momentum"] == trainings[1]["momentum"] == []
    for before, after in zip(trainings[:-2], trainings[2:], strict=True):
        assert len(before["momentum_after"]) == 12  # tensors of weights
        kept = [] if fidelity == "released" else before["momentum_after"]
        assert len(after["momentum"]) == len(kept)
        assert all(torch.equal(*pair) for pair in zip(after["momentum"], kept, strict=True))


@each_fidelity
def test_moments_begin_again_in_two_epochs_and_then_go_on_or_from_zeros(fidelity, runs):
    """By hand, from the features."""
    events, run = runs[fidelity]
    moments, selections = [None, None], of(events, "selection")
    for call, (features_of, event) in enumerate(zip(of(events, "features"), selections, strict=True)):
        i, epoch = call % 2, call // 2 + 1
        features, confidence = features_of["outputs"]
        assert all(torch.equal(*pair) for pair in zip(event["inputs"], features_of["outputs"], strict=True))
        start = None if epoch <= 2 else moments[i]
        if start is not None and fidelity == "released":
            start = Moments(*(torch.zeros(K, 16, dtype=torch.float64) for _ in range(2)))
        # the release has 0.02 whatever the number of classes
        threshold = (0.02 if fidelity == "released" else 1 / K) * 1.1**epoch
        assert event["threshold"] == pytest.approx(threshold, rel=1e-12)
        settings = {"threshold": threshold, "beta": 0.8, "min_draw_count": 0, "p_threshold": 0.4}
        settings["normals"] = event["normals"]
        expected = stochastic_feature_averaging(features, OBSERVED, confidence, start, **settings)
        assert torch.equal(event["selection"].clean, expected.clean) and event["selection"].drawn.all()
        assert all(torch.equal(*p) for p in zip(event["selection"].moments, expected.moments, strict=True))
        moments[i] = expected.moments
        row = table(run)[epoch - 1]
        assert int(row[f"net{i + 1}_selected"]) == int((expected.clean > 0.4).sum())
        assert int(row[f"net{i + 1}_drawn_classes"]) == K
    normals = torch.stack([event["normals"] for event in selections])
    assert normals.shape == (8, 2, K, 16) and len(normals.unique()) == normals.numel()
    assert abs(float(normals.mean())) < 0.1 and 0.9 < float(normals.std()) < 1.1
    kept = state(run)["memory"]
    for i in (0, 1):
        assert all(torch.equal(*pair) for pair in zip(kept["moments"][i], moments[i], strict=True))
        assert torch.equal(kept["clean"][i], selections[-2 + i]["selection"].clean)


def test_what_a_run_leaves_behind(paper):
    events, run = paper
    selections, trainings = of(events, "selection"), of(events, "warm-up", "training")
    probability, centroids = (dict(np.load(run / f"{n}.npz")) for n in ("clean_probability", "centroids"))
    assert sorted(probability) == ["net1", "net2", "observed"]
    for name, event in zip(("net1", "net2"), selections[-2:], strict=True):
        assert probability[name].tolist() == event["selection"].clean.tolist()
    assert list(centroids) == ["net1"] and centroids["net1"].shape == (4, K, 16)
    for event, kept in zip(selections[::2], centroids["net1"], strict=True):
        # those of network 1, the mean of both draws
        mean = event["selection"].centroids.mean(dim=0)
        np.testing.assert_allclose(kept, mean, rtol=2e-3, atol=1e-4)
    for array in (probability["observed"], np.load(run / "noisy_labels.npy")):
        assert array.tolist() == OBSERVED.tolist()
    assert np.load(run / "train_index.npy").tolist() == list(range(SIZE))
    losses = [event["losses"] if event["losses"].ndim == 1 else event["losses"][:, 0] for event in trainings]
    for epoch, row in enumerate(table(run)):
        mean = torch.cat(losses[2 * epoch : 2 * epoch + 2]).mean()
        assert float(row["loss"]) == pytest.approx(float(mean), rel=1e-5)
    assert result(run)["images"] == 2 * SIZE + sum(4 * len(own) for own in losses[2:])
    assert not (run / "skipped_images.csv").exists()


@pytest.fixture(scope="module")
def plain_run(root, tmp_path_factory) -> Path:
    """Two epochs as they come."""
    return run_small(root, tmp_path_factory.mktemp("plain") / "run", "--num_epochs 2")


def test_the_columns_of_the_log_and_the_metrics_of_the_result(plain_run, paper):
    classes, imagenet = [f"class_{k}" for k in range(K)], ["imagenet_accuracy", "imagenet_top5_accuracy"]
    head = ["epoch", "loss", "test_accuracy", "top5_accuracy"]
    end = [*SHOTS, *NETS, "right_selected_min", "classes_unselected", "lr", *classes, "seconds"]
    assert list(table(plain_run)[0]) == [*head, *imagenet, *end]
    assert list(table(paper[1])[0]) == [*head, *end]
    # the true labels are unknown; a warm-up ends with a selection too
    assert {(r["right_selected_min"], r["classes_unselected"]) for r in table(plain_run)} == {("", "0")}
    for run, names in ((plain_run, ["top5_accuracy", *imagenet]), (paper[1], ["top5_accuracy"])):
        rows, written = table(run), result(run)
        curve = [float(row["test_accuracy"]) for row in rows]
        expected = {"best": max(curve), "last": curve[-1], "last10": pytest.approx(np.mean(curve))}
        for name in names:
            values = [float(row[name]) for row in rows]
            expected |= {f"last_{name}": values[-1], f"best_{name}": max(values)}
        for name in (*SHOTS, "net1_selected", "net2_selected"):
            expected[f"last_{name}"] = float(rows[-1][name]) if rows[-1][name] else None
        assert written["metrics"] == expected
        assert (written["paper"], written["method"], written["dataset"]) == ("sfa", "SFA", "webvision")
        assert (written["noise_type"], written["noise_rate"], written["profile"]) == ("real", None, "short")
    shots = dict.fromkeys((*SHOTS, "net1_selected", "net2_selected"), 1.0)
    rows = [shots | {"top5_accuracy": 90.0}, shots | {"top5_accuracy": 80.0, "net1_selected": 7}]
    last = {f"last_{name}": value for name, value in rows[-1].items()}
    assert Train_webvision.further_metrics(rows) == {"best_top5_accuracy": 90, **last}


class Given(nn.Module):
    """Takes images for the logits of both heads, one a tenth of the other."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return images, images, 0.1 * images


class Stub:
    """What is needed of a run."""

    rows = ()

    def progress(self, batches, _description, training=True):
        return batches


def test_both_test_sets_have_top_1_and_top_5():
    """Ranks of the labels 1, 2, 5, 6 and 7 of seven classes in one set; 1, 1 and 3 in the other."""

    def ranked(ranks: list[int]) -> Labelled:
        """Labels 0, 1, ..., the logit of each the largest but rank - 1."""
        logits = torch.stack([torch.arange(7.0).roll(k - (7 - rank)) for k, rank in enumerate(ranks)])
        halves = torch.arange(len(ranks)).split(2)
        return Labelled([((logits[half],), half) for half in halves], torch.arange(len(ranks)))

    def tested(num_class: int, **tests: Labelled) -> dict[str, float]:
        split = make_split(Path(), [""] * 30, [0] * 10 + [1] * 20)
        args = parse_args(["--num_class", str(num_class), "--device", "cpu"])
        both = [Learner(Given(), None, None, None, None, None)] * 2
        setting = Setting(args, CPU, Stub(), Data(None, split, None, tests, (), None), None)
        return Train_webvision.test(both, tests, "epoch 1", setting)

    report = tested(7, test=ranked([1, 2, 5, 6, 7]), imagenet=ranked([1, 1, 3]))
    assert (report["test_accuracy"], report["top5_accuracy"]) == pytest.approx((20, 60))
    assert (report["imagenet_accuracy"], report["imagenet_top5_accuracy"]) == pytest.approx((200 / 3, 100))
    # by class and by shot on the first set alone; class 1 has 20 training images and is no few shot
    assert [report[f"class_{k}"] for k in range(5)] == [100, 0, 0, 0, 0]
    assert (report["medium_accuracy"], report["few_accuracy"]) == (0, 25)
    report = tested(3, test=Labelled([((torch.eye(3),), torch.arange(3))], torch.arange(3)))
    assert report["top5_accuracy"] == 100 and "imagenet_accuracy" not in report


class Stubs(list):
    """Batches with a device."""

    device = torch.device("cpu")


def stub_data(count: int) -> tuple[Data, list[dict]]:
    """A training set of images that are their own numbers, and what is asked of its batches."""
    asked = []

    def batches(split, cache, transform, size, **options):
        asked.append({"split": split, "size": size, **options})
        rows = torch.tensor([float(path) for path in split.paths])
        pieces = [index for index in torch.arange(len(rows)).split(size) if len(index) == size]
        return Stubs([((rows[index],) * options.get("views", 1), index) for index in pieces])

    split = make_split(Path(), [str(i) for i in range(count)], np.arange(count) % K)
    return Data(np.arange(count), split, None, {}, (), batches), asked


@pytest.mark.parametrize(
    ("count", "world", "size", "steps"),
    [(10, 1, 4, 2), (3, 1, 3, 1), (1, 1, 1, 1), (0, 1, None, 0), (3, 2, 2, 1), (1, 2, None, 0)],
)
@each_fidelity
def test_a_part_has_batches_of_a_size_or_one_of_all(fidelity, count, world, size, steps, monkeypatch):
    """As released one process keeps a smaller last batch."""
    monkeypatch.setattr(processes, "world", lambda: world)
    data, asked = stub_data(40)
    generator, positions = torch.Generator(), np.arange(39, 39 - count, -1)
    part = data.training(positions, 4, 2, generator, parse_args([*ARGS, "--fidelity", fidelity]))
    if size is None:
        assert part is None and not asked
        return
    [options] = asked
    expected = {"size": size, "views": 2, "shuffle": True, "generator": generator}
    expected["drop_last"] = fidelity == "paper" or world > 1
    assert {name: options[name] for name in expected} == expected and len(part) == steps
    assert options["split"].labels.tolist() == (positions % K).tolist()
    # the numbers that come with the images count within the training set, pass after pass
    endless = part.endless()
    for views, index in [next(endless) for _ in range(2 * steps + 1)]:
        assert all(torch.equal(view.long(), index) for view in views)


def test_images_are_resized_before_they_are_cropped(root, monkeypatch):
    """To 320 pixels for a crop of 299: to 68 for one of 64."""
    assert webvision.before_crop(parse_args([])) == 320
    args = parse_args([*ARGS, "--data_path", str(root)])
    data = load(args, CPU)
    pixels = [center_crop(resize(data.split.read(i), [68], antialias=True), [64, 64]) for i in range(SIZE)]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    [((images,), index)] = data.plain(args)  # eight batches in one
    torch.testing.assert_close(images, (torch.stack(pixels) / 255 - mean) / std, rtol=0, atol=1e-5)
    assert index.tolist() == list(range(SIZE))
    seen = []
    monkeypatch.setattr(webvision, "resize_random_resized_crop_and_flip", lambda *sizes: seen.append(sizes))
    data.training(np.arange(8), 4, 2, torch.Generator(), args)
    assert seen == [(68, 64)]
    assert {part: len(labels) for part, (_, labels) in data.tests.items()} == {"test": 8, "imagenet": 8}


def divided(monkeypatch, clean: list[float], *words: str) -> tuple[dict, Tensor]:
    """What `co_divide` gives to the epoch of images with these clean probabilities, and what it returns."""
    seen: dict = {}

    def train_semi(network, peer, optimizer, labelled, unlabelled, **options):
        seen.update(network=network, peer=peer, optimizer=optimizer, labelled=list(labelled), **options)
        seen["unlabelled"] = None if unlabelled is None else [next(unlabelled) for _ in range(5)]
        return torch.tensor([[1.0, 2, 3, 4, 5], [3.0, 4, 5, 6, 7]])

    monkeypatch.setattr(Train_webvision, "train_semi", train_semi)
    data, _ = stub_data(len(clean))
    setting = Setting(parse_args([*ARGS, *words]), CPU, Stub(), data, torch.from_numpy(data.split.labels))
    network, parallel, peer = (nn.Linear(1, 1) for _ in range(3))
    generators = torch.Generator(), torch.Generator(), np.random.default_rng(0)
    learner = Learner(network, parallel, object(), *generators)
    losses = co_divide(learner, peer, torch.tensor(clean, dtype=torch.float64), "epoch 2 of one", setting)
    if seen:
        assert seen["network"] is network and seen["parallel"] is parallel
        assert seen["peer"] is peer and seen["optimizer"] is learner.optimizer
    return seen, losses


def numbers(batches) -> list[list[int]]:
    return [index.tolist() for _, index in batches]


@pytest.mark.parametrize(("world", "clean"), [(1, [0.5] * 10), (2, [0.9] + [0.1] * 9)])
def test_fewer_selected_than_processes_train_nothing_and_say_so(world, clean, monkeypatch, capsys):
    monkeypatch.setattr(processes, "world", lambda: world)
    seen, losses = divided(monkeypatch, clean)
    assert seen == {} and losses.shape == (0,)
    line = "warning: epoch 2 of one: no sample selected, one network is not trained\n"
    assert capsys.readouterr().err == line
    if world == 2:  # and unlabelled ones that are too few for both are no partners
        assert divided(monkeypatch, [0.9] * 9 + [0.1])[0]["unlabelled"] is None


def test_everything_selected_trains_without_partners(monkeypatch, capsys):
    seen, losses = divided(monkeypatch, [0.51] * 10)
    assert seen["unlabelled"] is None and numbers(seen["labelled"]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert losses.tolist() == [1, 3] and capsys.readouterr().err == ""


def test_the_draws_of_a_mixture_are_those_of_the_learner(monkeypatch):
    seen, _ = divided(monkeypatch, [0.9] * 10, "--alpha", "0.25", "--p_threshold", "0.8")
    expected = np.random.default_rng(0).beta(0.25, 0.25, size=3).tolist()
    assert [seen["draw_lam"]() for _ in range(3)] == expected
    again = torch.randperm(9, generator=torch.Generator())
    assert torch.equal(seen["draw_permutation"](9), again)
    assert divided(monkeypatch, [0.9] * 10, "--p_threshold", "0.9")[0] == {}


def test_an_epoch_in_which_nothing_is_selected_leaves_its_loss_empty(root, tmp_path, capsys):
    rows = table(run_small(root, tmp_path / "run", "--p_threshold 1 --num_epochs 2"))
    assert float(rows[0]["loss"]) > 0 and rows[1]["loss"] == ""
    assert (rows[1]["net1_selected"], rows[1]["net2_selected"]) == ("0", "0")
    assert rows[1]["test_accuracy"] == rows[0]["test_accuracy"]
    warning = "warning: epoch 2 training of network {}: no sample selected, one network is not trained"
    assert capsys.readouterr().err.splitlines() == [warning.format(i) for i in (1, 2)]


def test_the_two_learners_differ_in_weights_and_draws(monkeypatch):
    monkeypatch.setattr(learners, "webvision_network", WebvisionNetwork)
    args = parse_args([*ARGS, "--lr", "0.3", "--seed", "5"])
    one, two = (make_learner(i, args, CPU) for i in (0, 1))
    assert not same(weights(one.network), weights(two.network))
    drawn = []
    for learner in (one, two):
        assert learner.parallel is learner.network
        options = learner.optimizer.param_groups[0]
        assert (options["lr"], options["momentum"], options["weight_decay"]) == (0.3, 0.9, 5e-4)
        assert [id(p) for p in options["params"]] == [id(p) for p in learner.network.parameters()]
        drawn += [torch.rand(4, generator=g).tolist() for g in (learner.images, learner.partners)]
        drawn += [learner.draws.random(4).tolist()]
        assert set(learner.state()) == {"network", "optimizer", "images", "partners", "draws"}
    assert len({tuple(values) for values in drawn}) == 6
    again, other = make_learner(1, args, CPU), make_learner(1, parse_args([*ARGS, "--seed", "6"]), CPU)
    assert again.draws.random(4).tolist() == drawn[5]  # whatever another learner draws
    for generator, values in zip((other.images, other.partners), drawn[3:5], strict=True):
        assert torch.rand(4, generator=generator).tolist() != values
    assert other.draws.random(4).tolist() != drawn[5]


@pytest.mark.parametrize(
    ("network", "size", "width", "parameters"),
    [
        ("resnet18", 33, 512, 11_180_616),
        pytest.param("inception_resnet_v2", 107, 1536, 54_318_760, marks=pytest.mark.slow),
    ],
)
def test_the_real_networks_train_on_a_single_small_image(network, size, width, parameters, root, monkeypatch):
    """One row has statistics, as the last maps are 2 x 2; an epoch after the warm-up, and a selection."""
    words = f"--network {network} --image_size {size} --batch_size 1 --limit_train 3".split()
    args = parse_args([*ARGS, "--data_path", str(root), *words])
    data = load(args, CPU)
    setting = Setting(args, CPU, Stub(), data, torch.from_numpy(data.split.labels))
    learner = make_learner(0, args, CPU)
    assert sum(p.numel() for p in learner.network.parameters()) == parameters
    before = weights(learner.network)
    clean = torch.tensor([0.9, 0.1, 0.2], dtype=torch.float64)
    losses = co_divide(learner, Train_webvision.deepcopy(learner.network), clean, "epoch 2", setting)
    assert losses.shape == (1,) and torch.isfinite(losses).all()
    assert not same(before, weights(learner.network))
    # on cards sums come out in another order in each process, so all take the selection of the first
    monkeypatch.setattr(processes, "from_first", lambda make: (make(), "of the first"))
    selection, whose = Train_webvision.select(learner, None, data.plain(args), "epoch 2", setting)
    assert whose == "of the first" and torch.isfinite(selection.clean).all()
    assert selection.moments.mean.shape == (K, width)


def kept_of(root: Path, words: str) -> np.ndarray:
    return load(parse_args([*ARGS, "--data_path", str(root), *words.split()]), CPU).index


@pytest.mark.parametrize(("kind", "factor"), [("exp", 0.2), ("step", 0.25)])
def test_a_long_tail_keeps_the_budget_of_each_class(kind, factor, tmp_path):
    """The classes have 8, 2, 6 and 4 images, so that the tail is not that of the class ids."""
    make_webvision(tmp_path, classes=K, per_class=8)
    path, sizes = tmp_path / "info/train_filelist_google.txt", np.array([8, 2, 6, 4])
    lines = path.read_text().splitlines()
    labels = np.array([int(line.split()[1]) for line in lines])
    kept = np.sort(np.concatenate([np.flatnonzero(labels == k)[:size] for k, size in enumerate(sizes)]))
    write_lines(path, [lines[i] for i in kept])
    labels, budget = labels[kept], noise.web_class_budget(sizes, kind, factor)
    words = f"--imb_type {kind} --imb_factor {factor}"
    index = kept_of(tmp_path, words)
    expected = noise.long_tailed(labels, budget, np.random.RandomState(123))
    assert index.tolist() == sorted(expected.tolist()) and len(index) < 20
    assert np.bincount(labels[index], minlength=K).tolist() == budget.tolist()
    assert kept_of(tmp_path, "--imb_factor 1").tolist() == list(range(20))
    assert kept_of(tmp_path, f"{words} --seed 4").tolist() != index.tolist()
    few = kept_of(tmp_path, f"{words} --limit_train 5")  # of the long tail
    assert few.tolist() == datasets.limited(index, 5, 123).tolist() and len(few) == 5


def test_part_of_the_images_with_labels_of_a_file_and_a_long_tail(root, tmp_path):
    given = np.repeat(np.arange(K), [16, 8, 4, 4])
    np.save(tmp_path / "labels.npy", given)
    words = f"--noise_file {tmp_path / 'labels.npy'} --imb_factor 0.1 --num_epochs 1"
    run = run_small(root, tmp_path / "run", words)
    index, observed = (np.load(run / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    budget = noise.web_class_budget(np.bincount(given), "exp", 0.1)
    assert observed.tolist() == given[index].tolist()
    assert np.bincount(observed).tolist() == budget.tolist() != np.bincount(given).tolist()
    assert np.load(run / "clean_probability.npz")["observed"].tolist() == observed.tolist()
    assert (result(run)["noise_type"], result(run)["imb_factor"]) == ("labels.npy", 0.1)
    words = "--limit_train 9 --num_epochs 1 --limit_test 3 --full_test_at_end"
    limited = run_small(root, tmp_path / "limited", words)
    assert len(np.load(limited / "train_index.npy")) == 9
    assert result(limited)["profile"] == "short+limit_train=9+limit_test=3"
    metrics = result(limited)["metrics"]
    assert metrics["full_test_images"] == len(datasets.load_webvision(root, K).test.labels) > 3
    assert {"full_test", "full_test_imagenet_accuracy"} <= metrics.keys()


@pytest.mark.slow
def test_a_cache_of_320_pixels_gives_the_run_that_the_files_give(root, tmp_path):
    data = datasets.load_webvision(root, K)
    build_caches(tmp_path / "320", data, size=320)
    words = "--image_size 299 --num_epochs 1 --limit_train 9 --limit_test 3"
    files = run_small(root, tmp_path / "files" / "run", words)
    cached = run_small(root, tmp_path / "cached" / "run", f"{words} --image_cache {tmp_path / '320'}")
    assert log_without_seconds(cached) == log_without_seconds(files)
    ours, theirs = (state(run)["learners"] for run in (cached, files))
    assert all(same(ours[i]["network"], theirs[i]["network"]) for i in (0, 1))
