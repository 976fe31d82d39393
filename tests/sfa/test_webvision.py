"""Train_webvision.py step by step: what is trained on what, selections and moments, parts of the data, what is written."""

import csv
import json
from pathlib import Path

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
from common.gpu.loader import Labelled, Part
from common.runs import cli
from sfa import Train_webvision, learners, webvision
from sfa.learners import Learner, make_learner
from sfa.selection import Moments, stochastic_feature_averaging
from sfa.Train_webvision import Setting, co_divide, load, parse_args
from sfa.webvision import Data
from tests.common.small_file_data import image_files, make_webvision, plant
from tests.end_to_end.outcome import log_without_seconds
from tests.end_to_end.webvision_float64 import SmallNetwork, make_doubtful_webvision

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

CPU = Device(torch.device("cpu"), "fp32", "tests")
K, SIZE = 4, 32  # classes and training images, eight of each class
QUICK = f"--num_class {K} --network resnet18 --image_size 64 --batch_size 4 --num_epochs 4 --lr_drop 3 --workers 0 --device cpu"
ARGS = QUICK.split()
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
        patch.setattr(learners, "webvision_network", SmallNetwork)
        Train_webvision.main(f"{QUICK} --data_path {root} --out {run} {words}".split())
    return run


def table(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def state(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# every step of a run --------------------------------------------------------------------------------------------------


def recorded(root: Path, run: Path, words: str) -> list[dict]:
    """A run's steps in their order: what went in, the networks before, and what came out."""
    events: list[dict] = []
    numbers: dict[int, int] = {}  # 1 and 2, by the identity of the networks
    real = {
        name: getattr(Train_webvision, name)
        for name in ("warm_up", "train_semi", "features_and_confidence", "summed_logits", "stochastic_feature_averaging")
    }  # fmt: skip

    def passing(batches, event):
        for views, index in batches:
            event["batches"].append((views, index))
            yield views, index

    def trained(event, network, optimizer):
        event["network"] = numbers.setdefault(id(network), len(numbers) + 1)
        event["lr"] = optimizer.param_groups[0]["lr"]
        event["before"], event["momentum"] = weights(network), momentum(optimizer)
        event["batches"], event["gradient_rows"] = [], []
        events.append(event)

    def warm_up(network, optimizer, batches, labels, counts, device):
        event = {"what": "warm-up", "labels": labels, "counts": counts}
        trained(event, network, optimizer)
        event["found"] = real["warm_up"](network, optimizer, passing(batches, event), labels, counts, device)
        event["after"], event["momentum_after"] = weights(network), momentum(optimizer)
        return event["found"]

    def train_semi(network, peer, optimizer, labelled, unlabelled, **options):
        event = {"what": "training", "peer": weights(peer), "unlabelled": [], **options}
        assert id(peer) not in numbers  # a copy
        trained(event, network, optimizer)

        def doubtful():
            for views, index in unlabelled:
                event["unlabelled"].append((views, index))
                yield views, index

        def count(_network, inputs):
            if torch.is_grad_enabled():
                event["gradient_rows"].append(inputs[0])

        hook = network.register_forward_pre_hook(count)
        labelled = passing(labelled, event)
        event["found"] = real["train_semi"](
            network, peer, optimizer, labelled, None if unlabelled is None else doubtful(), **options
        )
        hook.remove()
        event["after"], event["momentum_after"] = weights(network), momentum(optimizer)
        assert same(event["peer"], weights(peer))
        return event["found"]

    def features_and_confidence(network, batches, labels, device):
        event = {"what": "features", "network": numbers[id(network)], "before": weights(network)}
        events.append(event)
        event["found"] = real["features_and_confidence"](network, batches, labels, device)
        return event["found"]

    def averaging(features, labels, confidence, moments, **options):
        event = {"what": "selection", "features": features, "confidence": confidence, "moments": moments}
        events.append(event | options)
        found = real["stochastic_feature_averaging"](features, labels, confidence, moments, **options)
        events[-1]["found"] = found
        return found

    def summed_logits(networks, batches, size, *options):
        event = {"what": "test", "size": size, "before": [weights(network) for network in networks]}
        assert [numbers[id(network)] for network in networks] == [1, 2]
        events.append(event)
        return real["summed_logits"](networks, batches, size, *options)

    with pytest.MonkeyPatch.context() as patch:
        for name, spy in {
            "warm_up": warm_up,
            "train_semi": train_semi,
            "features_and_confidence": features_and_confidence,
            "stochastic_feature_averaging": averaging,
            "summed_logits": summed_logits,
        }.items():
            patch.setattr(Train_webvision, name, spy)
        run_small(root, run, words)
    return events


def momentum(optimizer) -> list[Tensor]:
    return [own["momentum_buffer"].clone() for own in optimizer.state.values()]


OPTIONS = "--T 0.4 --beta 0.8 --phi 1.1 --p_threshold 0.4 --sample_rate 2 --imagenet none"


@pytest.fixture(scope="module")
def paper(root, tmp_path_factory) -> tuple[list[dict], Path]:
    run = tmp_path_factory.mktemp("paper") / "run"
    return recorded(root, run, OPTIONS), run


@pytest.fixture(scope="module")
def released(root, tmp_path_factory) -> tuple[list[dict], Path]:
    run = tmp_path_factory.mktemp("released") / "run"
    return recorded(root, run, f"{OPTIONS} --fidelity released"), run


@pytest.fixture(params=["paper", "released"])
def either(request) -> tuple[str, list[dict], Path]:
    return request.param, *request.getfixturevalue(request.param)


def of(events: list[dict], *kinds: str) -> list[dict]:
    return [event for event in events if event["what"] in kinds]


def test_each_epoch_trains_both_networks_tests_them_and_then_selects(paper):
    events, _ = paper
    steps = [(event["what"], event.get("network")) for event in events]
    end = [("test", None), ("features", 1), ("selection", None), ("features", 2), ("selection", None)]
    first = [("warm-up", 1), ("warm-up", 2), *end]
    assert steps == first + 3 * [("training", 1), ("training", 2), *end]


def test_the_learning_rate_is_a_tenth_from_the_drop_on(paper):
    events, run = paper
    expected = [0.01, 0.01, 0.001, 0.001]
    for network in (1, 2):
        found = [e["lr"] for e in of(events, "warm-up", "training") if e["network"] == network]
        assert found == pytest.approx(expected, rel=1e-12)
    assert [float(row["lr"]) for row in table(run)] == pytest.approx(expected, rel=1e-12)


def test_the_warm_up_is_on_all_images_in_batches_twice_as_large(paper):
    observed = torch.arange(SIZE) % K  # the order of the list
    for event in of(paper[0], "warm-up"):
        assert torch.equal(event["labels"], observed)
        assert event["counts"].tolist() == [SIZE // K] * K
        assert [len(index) for _, index in event["batches"]] == [8] * 4
        assert [len(views) for views, _ in event["batches"]] == [1] * 4
        order = torch.cat([index for _, index in event["batches"]]).tolist()
        assert sorted(order) == list(range(SIZE)) != order
        assert len(event["found"]) == 4
    first, second = of(paper[0], "warm-up")
    assert not same(first["before"], second["before"])
    assert not torch.equal(first["batches"][0][1], second["batches"][0][1])


def test_a_network_learns_from_the_selection_of_its_peer_at_the_end_of_the_epoch_before(paper):
    trainings, selections = (of(paper[0], kind) for kind in ("training", "selection"))
    leftovers = 0
    for call, event in enumerate(trainings):
        epoch, learner = divmod(call, 2)  # the first is epoch 2
        split = selections[2 * epoch + 1 - learner]["found"]
        assert torch.equal(event["clean"], split.clean)
        assert not torch.equal(event["clean"], selections[2 * epoch + learner]["found"].clean)
        chosen = split.clean > 0.4
        counts = torch.bincount((torch.arange(SIZE) % K)[chosen], minlength=K)
        assert torch.equal(event["class_counts"], counts)
        assert torch.equal(event["labels"], torch.arange(SIZE) % K)
        for batches, side in ((event["batches"], chosen), (event["unlabelled"], ~chosen)):
            assert all(len(views) == 2 and not torch.equal(*views) for views, _ in batches)
            assert all(side[index].all() for _, index in batches)
        # one pass, a smaller last batch left out; as many unlabelled batches, again and again
        steps, size = divmod(int(chosen.sum()), 4)
        leftovers += size
        assert [len(index) for _, index in event["batches"]] == [4] * steps
        order = torch.cat([index for _, index in event["batches"]]).tolist()
        assert len(set(order)) == len(order) and order != sorted(order)
        doubtful = min(4, int((~chosen).sum()))
        assert [len(index) for _, index in event["unlabelled"]] == [doubtful] * steps * (doubtful > 0)
        assert len(event["found"]) == steps
    assert leftovers > 0 and any(event["unlabelled"] for event in trainings)


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
    for event, end in zip(of(paper[0], "features"), ends, strict=True):
        assert same(event["before"], end)


def test_only_labelled_rows_are_forwarded_and_unlabelled_ones_are_partners(paper):
    """Half of the eight mixed rows of a step and more is of a labelled view, the rest of any of the stacked rows."""
    foreign = 0
    for event in of(paper[0], "training"):
        assert [len(rows) for rows in event["gradient_rows"]] == [8] * len(event["batches"])
        assert event["forward_unlabelled"] is False and event["weight"](0) == event["weight"](10**6) == 0
        assert event["temperature"] == 0.4
        for step, mixed in enumerate(event["gradient_rows"]):
            own = torch.cat(event["batches"][step][0])
            stacked = own
            if event["unlabelled"]:
                stacked = torch.cat([own, *event["unlabelled"][step][0]])
            partners = []
            for row, base in zip(mixed.flatten(1), own.flatten(1), strict=True):
                # row = share base + (1 - share) partner, so it lies between the two
                along = stacked.flatten(1) - base
                length = along.square().sum(dim=1)
                share = ((row - base) * along).sum(dim=1) / length.clamp_min(1e-12)
                rest = (row - base - share[:, None] * along).abs().amax(dim=1)
                best = int((rest + (length == 0) * 1e-6).argmin())
                assert rest[best] < 1e-4 and -1e-4 < share[best] < 0.5 + 1e-4
                partners.append(best)
            assert len(set(partners)) >= 5  # of a permutation, up to rows that are hardly mixed
            foreign += sum(partner >= 8 for partner in partners)
    assert foreign > 0


def test_momentum_outlives_the_epoch_unless_it_is_reset(either):
    fidelity, events, _ = either
    trainings = of(events, "warm-up", "training")
    assert trainings[0]["momentum"] == trainings[1]["momentum"] == []
    for before, after in zip(trainings[:-2], trainings[2:], strict=True):
        assert before["network"] == after["network"]
        assert len(before["momentum_after"]) == 12  # tensors of weights
        kept = [] if fidelity == "released" else before["momentum_after"]
        assert len(after["momentum"]) == len(kept)
        assert all(torch.equal(*pair) for pair in zip(after["momentum"], kept, strict=True))


def test_moments_begin_anew_in_two_epochs_and_then_go_on_or_from_zeros(either):
    """By hand, from the features that were seen."""
    fidelity, events, run = either
    seen, selections = of(events, "features"), of(events, "selection")
    assert [event["network"] for event in seen] == [1, 2] * 4
    labels, moments = torch.arange(SIZE) % K, [None, None]
    for call, (look, event) in enumerate(zip(seen, selections, strict=True)):
        i, epoch = call % 2, call // 2 + 1
        features, confidence = look["found"]
        assert torch.equal(event["features"], features) and torch.equal(event["confidence"], confidence)
        start = None if epoch <= 2 else moments[i]
        if start is not None and fidelity == "released":
            start = Moments(*(torch.zeros(K, 16, dtype=torch.float64) for _ in range(2)))
        # the release has 0.02 whatever the number of classes
        threshold = (0.02 if fidelity == "released" else 1 / K) * 1.1**epoch
        assert event["threshold"] == pytest.approx(threshold, rel=1e-12)
        assert event["normals"].shape == (2, K, 16) and event["normals"].dtype == torch.float64
        expected = stochastic_feature_averaging(
            features, labels, confidence, start, normals=event["normals"], threshold=threshold, beta=0.8,
            min_draw_count=0, p_threshold=0.4,
        )  # fmt: skip
        assert expected.drawn.all() and event["found"].drawn.all()
        assert torch.equal(event["found"].clean, expected.clean)
        assert all(torch.equal(*pair) for pair in zip(event["found"].moments, expected.moments, strict=True))
        moments[i] = expected.moments
        row = table(run)[epoch - 1]
        assert int(row[f"net{i + 1}_selected"]) == int((expected.clean > 0.4).sum())
        assert int(row[f"net{i + 1}_drawn_classes"]) == K
    normals = torch.stack([event["normals"] for event in selections])
    assert len(normals.unique()) == normals.numel()
    assert abs(float(normals.mean())) < 0.1 and 0.9 < float(normals.std()) < 1.1
    kept = state(run)["memory"]
    for i in (0, 1):
        assert all(torch.equal(*pair) for pair in zip(kept["moments"][i], moments[i], strict=True))
        assert torch.equal(kept["clean"][i], selections[-2 + i]["found"].clean)


def test_features_and_confidence_are_those_of_plain_images_by_the_balanced_head(paper, root):
    event = of(paper[0], "features")[-1]
    network = SmallNetwork("resnet18", K).eval()
    network.load_state_dict(event["before"])
    data = load(parse_args([*ARGS, "--data_path", str(root)]), CPU)
    [((images,), index)] = data.plain(parse_args(ARGS))
    with torch.no_grad():
        features, _, balanced = network(images)
    assert index.tolist() == list(range(SIZE))
    torch.testing.assert_close(event["found"][0], features)
    confidence = balanced.softmax(dim=1)[torch.arange(SIZE), torch.arange(SIZE) % K]
    torch.testing.assert_close(event["found"][1], confidence)


def test_the_selection_is_what_the_first_process_found(root, monkeypatch):
    """On cards sums come out in another order in each process."""
    monkeypatch.setattr(learners, "webvision_network", SmallNetwork)
    learner, s = on_few_images(root, "--limit_train 8")
    with monkeypatch.context() as patch:
        patch.setattr(processes, "from_first", lambda make: (make(), "of the first"))
        found, whose = Train_webvision.select(learner, None, s.data.plain(s.args), "epoch 1", s)
    assert whose == "of the first" and len(found.clean) == 8


def test_what_a_run_leaves_behind(paper):
    events, run = paper
    rows, last = table(run), of(events, "selection")[-2:]
    probability = np.load(run / "clean_probability.npz")
    assert sorted(probability.files) == ["net1", "net2", "observed"]
    for i in (0, 1):
        assert probability[f"net{i + 1}"].tolist() == last[i]["found"].clean.tolist()
    assert probability["observed"].tolist() == (np.arange(SIZE) % K).tolist()
    centroids = np.load(run / "centroids.npz")
    assert centroids.files == ["net1"] and centroids["net1"].shape == (4, K, 16)
    for event, kept in zip(of(events, "selection")[::2], centroids["net1"], strict=True):
        # those of network 1, the mean of both draws
        np.testing.assert_allclose(kept, event["found"].centroids.mean(dim=0), rtol=2e-3, atol=1e-4)
    assert np.load(run / "train_index.npy").tolist() == list(range(SIZE))
    assert np.load(run / "noisy_labels.npy").tolist() == (np.arange(SIZE) % K).tolist()
    losses = [[float(e["found"].sum()) for e in of(events, "warm-up")]]
    trainings = of(events, "training")
    losses += [
        [float(e["found"][:, 0].sum()) for e in pair]
        for pair in zip(trainings[::2], trainings[1::2], strict=True)
    ]
    steps = [8] + [sum(len(e["found"]) for e in trainings[i : i + 2]) for i in (0, 2, 4)]
    for row, own, count in zip(rows, losses, steps, strict=True):
        assert float(row["loss"]) == pytest.approx(sum(own) / count, rel=1e-5)
    assert result(run)["images"] == 2 * SIZE + sum(4 * count for count in steps[1:])
    assert not (run / "skipped_images.csv").exists()


# columns and metrics --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(root, tmp_path_factory) -> Path:
    """Two epochs as they come."""
    return run_small(root, tmp_path_factory.mktemp("plain") / "run", "--num_epochs 2")


def test_the_columns_of_the_log_and_the_metrics_of_the_result(plain_run, paper):
    classes = [f"class_{k}" for k in range(K)]
    imagenet = ["imagenet_accuracy", "imagenet_top5_accuracy"]
    head, end = (
        ["epoch", "loss", "test_accuracy", "top5_accuracy"],
        [*SHOTS, *NETS, "right_selected_min", "classes_unselected", "lr", *classes, "seconds"],
    )
    assert list(table(plain_run)[0]) == [*head, *imagenet, *end]
    assert list(table(paper[1])[0]) == [*head, *end]
    # the true labels are unknown; a warm-up ends with a selection too
    assert {(r["right_selected_min"], r["classes_unselected"]) for r in table(plain_run)} == {("", "0")}
    for run, names in ((plain_run, ["top5_accuracy", *imagenet]), (paper[1], ["top5_accuracy"])):
        rows, found = table(run), result(run)
        expected = {
            "best": max(float(row["test_accuracy"]) for row in rows),
            "last": float(rows[-1]["test_accuracy"]),
            "last10": pytest.approx(np.mean([float(row["test_accuracy"]) for row in rows])),
        }
        for name in names:
            values = [float(row[name]) for row in rows]
            expected |= {f"last_{name}": values[-1], f"best_{name}": max(values)}
        for name in (*SHOTS, "net1_selected", "net2_selected"):
            expected[f"last_{name}"] = float(rows[-1][name]) if rows[-1][name] else None
        assert found["metrics"] == expected
        assert (found["paper"], found["method"], found["dataset"]) == ("sfa", "SFA", "webvision")
        assert (found["noise_type"], found["noise_rate"], found["profile"]) == ("real", None, "short")


def test_the_best_of_an_accuracy_is_not_its_last():
    shots = dict.fromkeys((*SHOTS, "net1_selected", "net2_selected"), 1.0)
    rows = [shots | {"top5_accuracy": 90.0}, shots | {"top5_accuracy": 80.0, "net1_selected": 7}]
    found = Train_webvision.further_metrics(rows)
    assert (found["best_top5_accuracy"], found["last_top5_accuracy"]) == (90, 80)
    assert (found["last_net1_selected"], found["last_net2_selected"]) == (7, 1)
    assert not [name for name in found if "imagenet" in name]


def test_the_same_command_again_changes_nothing(root, tmp_path, plain_run):
    kept = ("result.json", "result.csv", "log.csv", "clean_probability.npz", "centroids.npz")
    before = {name: (plain_run / name).read_bytes() for name in kept}
    run_small(root, plain_run, "--num_epochs 2")
    assert {name: (plain_run / name).read_bytes() for name in kept} == before


def test_workers_change_nothing_and_another_seed_everything(root, tmp_path, plain_run):
    by_workers = run_small(root, tmp_path / "workers" / "run", "--num_epochs 2 --workers 2")
    assert log_without_seconds(by_workers) == log_without_seconds(plain_run)
    ours, theirs = state(by_workers), state(plain_run)
    assert all(same(ours["learners"][i]["network"], theirs["learners"][i]["network"]) for i in (0, 1))
    words = "--num_epochs 1 --lr 1e-12"  # weights stay as they begin
    one, other = (
        state(run_small(root, tmp_path / seed, f"{words} --seed {seed}"))["learners"] for seed in "34"
    )
    for learner in other:
        for name in ("images", "partners"):
            assert not any(torch.equal(learner[name], its[name]) for its in one)
        begun = [its["network"]["heads.standard.weight"] for its in (learner, *one)]
        assert not any(torch.allclose(begun[0], its, atol=1e-3) for its in begun[1:])


class Given(nn.Module):
    """Takes images for what both heads say, one a tenth of the other."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return images, images, 0.1 * images


class Stub:
    """What is needed of a run."""

    rows = ()

    def progress(self, batches, _description, training=True):
        return batches


def test_both_test_sets_are_judged_by_their_first_and_first_five():
    """Ranks of the labels 1, 2, 5, 6 and 7 of seven classes in one set; 1, 1 and 3 in the other."""

    def ranked(ranks: list[int]) -> Labelled:
        """Labels 0, 1, ..., the logit of each the largest but rank - 1."""
        logits = torch.stack([torch.arange(7.0).roll(k - (7 - rank)) for k, rank in enumerate(ranks)])
        halves = torch.arange(len(ranks)).split(2)
        return Labelled([((logits[half],), half) for half in halves], torch.arange(len(ranks)))

    def tested(num_class: int, **tests: Labelled) -> dict[str, float]:
        split = make_split(Path(), [""] * 30, [0] * 10 + [1] * 20)
        args = parse_args(["--num_class", str(num_class), "--device", "cpu"])
        data = Data(None, split, None, tests, (), None)
        both = [Learner(Given(), None, None, None, None, None) for _ in range(2)]
        return Train_webvision.test(both, tests, "epoch 1", Setting(args, CPU, Stub(), data, None))

    found = tested(7, test=ranked([1, 2, 5, 6, 7]), imagenet=ranked([1, 1, 3]))
    assert (found["test_accuracy"], found["top5_accuracy"]) == pytest.approx((20, 60))
    assert (found["imagenet_accuracy"], found["imagenet_top5_accuracy"]) == pytest.approx((200 / 3, 100))
    # by class and by shot on the first set alone; class 1 has 20 training images and is no few shot
    assert [found[f"class_{k}"] for k in range(5)] == [100, 0, 0, 0, 0]
    assert (found["medium_accuracy"], found["few_accuracy"]) == (0, 25)
    found = tested(3, test=Labelled([((torch.eye(3),), torch.arange(3))], torch.arange(3)))
    assert found["top5_accuracy"] == 100 and "imagenet_accuracy" not in found


# parts of the training set ----------------------------------------------------------------------------------------------


def stub_data(count: int) -> tuple[Data, list[dict]]:
    """A training set of images that are their own numbers, and what is asked of its batches."""
    asked = []

    def batches(split, cache, transform, size, **options):
        asked.append({"split": split, "cache": cache, "transform": transform, "size": size, **options})
        rows = torch.tensor([float(path) for path in split.paths])
        pieces = [index for index in torch.arange(len(rows)).split(size) if len(index) == size]
        views = options.get("views", 1)
        return Stubs([((rows[index],) * views, index) for index in pieces])

    split = make_split(Path(), [str(i) for i in range(count)], np.arange(count) % K)
    return Data(np.arange(count), split, None, {}, (), batches), asked


class Stubs(list):
    """Batches that say where they are."""

    device = torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "world", "size", "steps"),
    [(10, 1, 4, 2), (4, 1, 4, 1), (3, 1, 3, 1), (1, 1, 1, 1), (0, 1, None, 0), (3, 2, 2, 1), (2, 2, 2, 1), (1, 2, None, 0)],
)  # fmt: skip
def test_a_part_has_whole_batches_or_one_of_all_that_there_are(count, world, size, steps, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: world)
    data, asked = stub_data(40)
    generator, positions = torch.Generator(), np.arange(39, 39 - count, -1)
    part = data.training(positions, 4, 2, generator, parse_args(ARGS))
    if size is None:
        assert part is None and not asked
        return
    [options] = asked
    assert (options["size"], options["views"], options["shuffle"], options["drop_last"]) == (
        size,
        2,
        True,
        True,
    )
    assert options["generator"] is generator and len(part) == steps
    assert options["split"].labels.tolist() == (positions % K).tolist()
    # the numbers that come with the images are those of the whole training set
    for views, index in part:
        assert all(torch.equal(view.long(), index) for view in views)


@pytest.mark.parametrize(
    ("fidelity", "world", "drops"), [("paper", 1, True), ("released", 1, False), ("released", 2, True)]
)
def test_as_released_one_process_keeps_a_smaller_last_batch(fidelity, world, drops, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: world)
    data, asked = stub_data(40)
    data.training(np.arange(10), 4, 2, torch.Generator(), parse_args([*ARGS, "--fidelity", fidelity]))
    assert asked[0]["drop_last"] is drops


def test_a_part_can_be_gone_through_without_end():
    data, _ = stub_data(40)
    part = data.training(np.array([7, 3, 9, 1, 5, 8, 30, 31, 2]), 4, 1, torch.Generator(), parse_args(ARGS))
    assert isinstance(part, Part)
    endless = part.endless()
    passed = [next(endless)[1].tolist() for _ in range(5)]
    assert passed == [[7, 3, 9, 1], [5, 8, 30, 31], [7, 3, 9, 1], [5, 8, 30, 31], [7, 3, 9, 1]]


def test_images_are_resized_before_they_are_cropped(root, monkeypatch):
    """To 320 pixels for a crop of 299: to 68 for one of 64."""
    assert webvision.before_crop(parse_args([])) == 320
    args = parse_args([*ARGS, "--data_path", str(root)])
    data = load(args, CPU)
    pixels = [center_crop(resize(data.split.read(i), [68], antialias=True), [64, 64]) for i in range(SIZE)]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = torch.cat([views[0] for views, _ in data.plain(args)])
    torch.testing.assert_close(found, (torch.stack(pixels) / 255 - mean) / std, rtol=0, atol=1e-5)
    assert [len(index) for _, index in data.plain(args)] == [SIZE]  # eight batches in one
    seen = []
    monkeypatch.setattr(webvision, "resize_random_resized_crop_and_flip", lambda *sizes: seen.append(sizes))
    data.training(np.arange(8), 4, 2, torch.Generator(), args)
    assert seen == [(68, 64)]
    for part, count in (("test", 2 * K), ("imagenet", 2 * K)):
        assert data.tests[part].labels.tolist() == [k % K for k in range(count)] if part == "test" else True
        assert len(data.tests[part].labels) == count


# one epoch on a split -------------------------------------------------------------------------------------------------


def divided(monkeypatch, clean: list[float], *words: str) -> tuple[dict, Tensor]:
    """What `co_divide` gives to the epoch of ten images or so with these clean probabilities, and what it returns."""
    seen: dict = {}

    def train_semi(network, peer, optimizer, labelled, unlabelled, **options):
        seen.update(network=network, peer=peer, optimizer=optimizer, labelled=list(labelled), **options)
        seen["unlabelled"] = None if unlabelled is None else [next(unlabelled) for _ in range(5)]
        return torch.tensor([[1.0, 2, 3, 4, 5], [3.0, 4, 5, 6, 7]])

    monkeypatch.setattr(Train_webvision, "train_semi", train_semi)
    data, _ = stub_data(len(clean))
    labels = torch.from_numpy(data.split.labels)
    s = Setting(parse_args([*ARGS, *words]), CPU, Stub(), data, labels)
    learner = Learner(
        nn.Linear(1, 1), nn.Linear(1, 1), object(), torch.Generator(), torch.Generator(), np.random.default_rng(0)
    )  # fmt: skip
    peer = nn.Linear(1, 1)
    found = co_divide(learner, peer, torch.tensor(clean, dtype=torch.float64), "epoch 2 of one", s)
    if seen:
        assert seen["network"] is learner.network and seen["parallel"] is learner.parallel
        assert seen["peer"] is peer and seen["optimizer"] is learner.optimizer
    return seen, found


def numbers(batches) -> list[int]:
    return torch.cat([index for _, index in batches]).tolist()


def test_nothing_selected_trains_nothing_and_says_so(monkeypatch, capsys):
    seen, losses = divided(monkeypatch, [0.5] * 10)  # not above the threshold
    assert seen == {} and losses.shape == (0,)
    assert (
        capsys.readouterr().err == "warning: epoch 2 of one: no sample selected, one network is not trained\n"
    )


def test_everything_selected_trains_without_partners_from_elsewhere(monkeypatch, capsys):
    seen, losses = divided(monkeypatch, [0.51] * 10)
    assert seen["unlabelled"] is None and numbers(seen["labelled"]) == list(range(8))
    assert losses.tolist() == [1, 3] and capsys.readouterr().err == ""


def test_fewer_selected_than_a_batch_are_one(monkeypatch):
    seen, _ = divided(monkeypatch, [0.1, 0.9, 0.2, 0.3, 0.8, 0.1, 0.2, 0.1, 0.3, 0.4, 0.2])
    assert [index.tolist() for _, index in seen["labelled"]] == [[1, 4]]
    assert [index.tolist() for _, index in seen["unlabelled"]] == [
        [0, 2, 3, 5], [6, 7, 8, 9], [0, 2, 3, 5], [6, 7, 8, 9], [0, 2, 3, 5]
    ]  # fmt: skip
    assert seen["class_counts"].tolist() == [1, 1, 0, 0]
    seen, _ = divided(monkeypatch, [0.9] * 10 + [0.2])
    assert [index.tolist() for _, index in seen["unlabelled"]] == [[10]] * 5


def test_fewer_selected_than_processes_train_nothing(monkeypatch, capsys):
    monkeypatch.setattr(processes, "world", lambda: 2)
    seen, losses = divided(monkeypatch, [0.9] + [0.1] * 9)
    assert seen == {} and len(losses) == 0 and "no sample selected" in capsys.readouterr().err
    # and doubtful ones that are too few to share are no partners
    assert divided(monkeypatch, [0.9] * 9 + [0.1])[0]["unlabelled"] is None


def test_the_draws_of_a_mixture_are_those_of_the_learner(monkeypatch):
    seen, _ = divided(monkeypatch, [0.9] * 10, "--alpha", "0.25", "--p_threshold", "0.8")
    expected = np.random.default_rng(0).beta(0.25, 0.25, size=3).tolist()
    assert [seen["draw_lam"]() for _ in range(3)] == expected
    again = torch.randperm(9, generator=torch.Generator())
    assert torch.equal(seen["draw_permutation"](9), again)
    assert divided(monkeypatch, [0.9] * 10, "--p_threshold", "0.9")[0] == {}


def test_an_epoch_in_which_nothing_is_selected_leaves_its_loss_empty(root, tmp_path, capsys):
    run = run_small(root, tmp_path / "run", "--p_threshold 1 --num_epochs 2")
    rows = table(run)
    assert float(rows[0]["loss"]) > 0 and rows[1]["loss"] == ""
    assert (rows[1]["net1_selected"], rows[1]["net2_selected"]) == ("0", "0")
    assert rows[1]["test_accuracy"] == rows[0]["test_accuracy"]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"warning: epoch 2 training of network {i}: no sample selected, one network is not trained"
        for i in (1, 2)
    ]


def test_everything_selected_goes_through(tmp_path):
    """A class with one image selects it."""
    make_webvision(tmp_path / "data", classes=K, per_class=1)
    row = table(run_small(tmp_path / "data", tmp_path / "run", "--num_epochs 2"))[1]
    assert (row["net1_selected"], row["net2_selected"]) == ("4", "4") and float(row["loss"]) > 0


def test_features_that_are_not_finite_end_a_run_in_one_line(root, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(lambda _: run_small(root, tmp_path / "run", "--lr 1e30"))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: features of training samples are not finite: lower --lr or try --precision fp32" in line
    assert not (tmp_path / "run" / "result.json").exists()


# learners and networks ------------------------------------------------------------------------------------------------


def test_the_two_learners_differ_in_weights_and_draws(monkeypatch):
    monkeypatch.setattr(learners, "webvision_network", SmallNetwork)
    torch.manual_seed(5)
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
    again = make_learner(1, args, CPU)
    assert again.draws.random(4).tolist() == drawn[5]  # whatever another learner draws


def on_few_images(root: Path, words: str) -> tuple[Learner, Setting]:
    args = parse_args([*ARGS, "--data_path", str(root), *words.split()])
    data = load(args, CPU)
    torch.manual_seed(args.seed)
    s = Setting(args, CPU, Stub(), data, torch.from_numpy(data.split.labels))
    return make_learner(0, args, CPU), s


@pytest.mark.parametrize(
    ("network", "size", "parameters"), [("resnet18", 33, 11_180_616), ("inception_resnet_v2", 107, 54_318_760)]
)  # fmt: skip
def test_the_real_networks_train_on_a_single_image_of_the_smallest_size(network, size, parameters, root):
    """One row has statistics, as the last maps are 2 x 2; an epoch after the warm-up, and a selection."""
    learner, s = on_few_images(
        root, f"--network {network} --image_size {size} --batch_size 1 --limit_train 3"
    )
    assert sum(p.numel() for p in learner.network.parameters()) == parameters
    before = weights(learner.network)
    clean = torch.tensor([0.9, 0.1, 0.2], dtype=torch.float64)
    losses = co_divide(learner, Train_webvision.deepcopy(learner.network), clean, "epoch 2", s)
    assert losses.shape == (1,) and torch.isfinite(losses).all()
    assert not same(before, weights(learner.network))
    found = Train_webvision.select(learner, None, s.data.plain(s.args), "epoch 2", s)
    width = {"resnet18": 512, "inception_resnet_v2": 1536}[network]
    assert found.moments.mean.shape == (K, width) and torch.isfinite(found.clean).all()


# which images, and from where -------------------------------------------------------------------------------------------


def kept_of(root: Path, words: str) -> np.ndarray:
    return load(parse_args([*ARGS, "--data_path", str(root), *words.split()]), CPU).index


@pytest.mark.parametrize(("kind", "factor"), [("exp", 0.2), ("step", 0.25), ("exp", 0.99)])
def test_a_long_tail_keeps_the_budget_of_each_class(kind, factor, tmp_path):
    """The classes have 8, 2, 6 and 4 images, so that the tail is not that of the class ids."""
    make_webvision(tmp_path, classes=K, per_class=8)
    lines = (tmp_path / "info/train_filelist_google.txt").read_text().splitlines(keepends=True)
    sizes, kept = [8, 2, 6, 4], []
    for line in lines:
        label = int(line.split()[1])
        if label >= K or sizes[label] > 0:
            kept.append(line)
            sizes[label : label + 1] = [sizes[label] - 1] if label < K else []
    (tmp_path / "info/train_filelist_google.txt").write_text("".join(kept))
    labels = np.array([int(line.split()[1]) for line in kept if int(line.split()[1]) < K])
    assert np.bincount(labels).tolist() == [8, 2, 6, 4]
    budget = noise.web_class_budget(np.array([8, 2, 6, 4]), kind, factor)
    words = f"--imb_type {kind} --imb_factor {factor}"
    found = kept_of(tmp_path, words)
    assert found.tolist() == sorted(found.tolist())
    assert np.bincount(labels[found], minlength=K).tolist() == budget.tolist()
    expected = noise.long_tailed(labels, budget, np.random.RandomState(123))
    assert found.tolist() == sorted(expected.tolist())
    assert kept_of(tmp_path, "--imb_factor 1").tolist() == list(range(20))
    if factor < 0.5:
        assert kept_of(tmp_path, words).tolist() != kept_of(tmp_path, f"{words} --seed 4").tolist()
        assert len(found) < 20
        few = kept_of(tmp_path, f"{words} --limit_train 5")  # of the long tail
        assert few.tolist() == datasets.limited(found, 5, 123).tolist() and len(few) == 5


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


def test_bad_images_are_left_out_from_the_start(tmp_path):
    data = tmp_path / "data"
    make_webvision(data, classes=K, per_class=4)
    lines = (data / "info/train_filelist_google.txt").read_text().splitlines()
    train = [data / line.split()[0] for line in lines if int(line.split()[1]) < K]
    test = image_files(data / "val_images_256")[3]
    for image, kind in ((train[4], "truncated"), (train[1], "missing"), (test, "text")):
        plant(image, kind)
    run = run_small(data, tmp_path / "run", "--on_bad_image skip --num_epochs 1 --batch_size 2")
    with (run / "skipped_images.csv").open(newline="") as file:
        skipped = list(csv.DictReader(file))
    assert list(skipped[0]) == ["path", "position", "reason"]
    found = {(row["path"], row["position"]): row["reason"] for row in skipped}
    assert found.keys() == {(str(train[1]), "1"), (str(train[4]), "4"), (str(test), "3")}
    assert found.pop((str(train[1]), "1")) == "missing" and "missing" not in found.values()
    assert np.load(run / "train_index.npy").tolist() == [i for i in range(16) if i not in (1, 4)]
    assert len(np.load(run / "clean_probability.npz")["net1"]) == 14


def test_a_cache_of_320_pixels_gives_the_run_that_the_files_give(root, tmp_path):
    data = datasets.load_webvision(root, K)
    for size in (320, 256):
        build_caches(tmp_path / str(size), data, size=size)
    words = "--image_size 299 --num_epochs 1 --limit_train 9 --limit_test 3"
    files = run_small(root, tmp_path / "files" / "run", words)
    cached = run_small(root, tmp_path / "cached" / "run", f"{words} --image_cache {tmp_path / '320'}")
    assert log_without_seconds(cached) == log_without_seconds(files)
    ours, theirs = (state(run)["learners"] for run in (cached, files))
    assert all(same(ours[i]["network"], theirs[i]["network"]) for i in (0, 1))
    smaller = run_small(root, tmp_path / "smaller", f"{words} --image_cache {tmp_path / '256'}")
    assert not same(state(smaller)["learners"][0]["network"], theirs[0]["network"])
