"""Clothing.py and ClothingData.py: transforms, the index, the selection, and short runs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import datasets
from common.datasets.file_lists import make_split
from common.gpu import augment
from common.gpu.device import Device
from common.runs.cli import UserError
from common.runs.selection_report import no_streaks
from me_momentum import Clothing, ClothingData
from me_momentum.Clothing import begin_inner_loop, select
from me_momentum.clothing_images import Data, load
from me_momentum.ClothingData import index_part, read_index, read_labels
from me_momentum.flags import parse_clothing_args as parse_args
from me_momentum.per_class import no_models
from tests.common.small_file_data import make_clothing1m
from tests.end_to_end.runs import result, state, table
from tests.end_to_end.small_networks import clothing_network
from tests.lines import message

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

CPU = Device(torch.device("cpu"), "fp32", "tests")


@pytest.mark.parametrize(("width", "height"), [(500, 300), (48, 40)])
def test_both_sides_are_resized_as_pillow_resizes(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((width // 8, height // 8)).resize((width, height))
    found = augment.resize_to_square()(torch.from_numpy(np.array(smooth)).permute(2, 0, 1))
    expected = np.array(smooth.resize((256, 256), Image.Resampling.BILINEAR))
    assert found.dtype == torch.uint8 and found.shape == (3, 256, 256)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_training_shifts_by_an_eighth_at_most_pads_with_zeros_and_mirrors_half():
    size, padding = 64, 8
    place = torch.arange(1, size + 1, dtype=torch.uint8)
    planes = [place[:, None].expand(-1, size), place.expand(size, -1), torch.full((size, size), 200)]
    image, transform = torch.stack(planes).to(torch.uint8), augment.resize_crop_and_flip(size)
    padded = nn.functional.pad(image.long(), [padding] * 4)
    torch.manual_seed(0)
    shifts, mirrored = [], 0
    for _ in range(200):
        found = transform(image).long()
        assert found.shape == (3, size, size)
        if found[1, size // 2, size // 2 + 1] < found[1, size // 2, size // 2]:  # the columns run backwards
            mirrored, found = mirrored + 1, found.flip(2)
        top, left = (found[:2, size // 2, size // 2] - 1 - size // 2 + padding).tolist()
        assert torch.equal(found, padded[:, top : top + size, left : left + size])
        shifts.append((top, left))
    for shift in np.array(shifts).T:
        assert set(shift.tolist()) == set(range(2 * padding + 1))
    assert 70 < mirrored < 130
    both = augment.resize_crop_and_flip()(torch.full((3, 30, 90), 7, dtype=torch.uint8))
    assert both.shape == (3, 256, 256) and (both == 7).float().mean() > (1 - 32 / 256) ** 2


def test_lines_and_keys_that_do_not_fit_are_left_out_and_counted():
    lines = ["a.jpg 3", "b.jpg", "", "c d 5", "d.jpg  1", "e.jpg 13 ", "a.jpg 4"]
    assert read_labels(lines) == ({"a.jpg": 4, "e.jpg": 13}, 3)
    for label in ("14", "-1", "1.0"):
        with pytest.raises(ValueError, match=f"line 2: '{label}' is not a label 0..13"):
            read_labels(["a.jpg 3", f"b.jpg {label}"])
    keys, labels, dropped = index_part(["a", "b", "c"], {"c": 2, "a": 0})
    assert (keys.tolist(), labels.tolist(), dropped) == (["a", "c"], [0, 2], 1)
    assert (keys.dtype.kind, labels.dtype) == ("U", np.int64)


@pytest.fixture
def root(tmp_path) -> Path:
    """Clothing1M of 12 noisy images of three classes; two validation and two test images of each."""
    make_clothing1m(tmp_path / "data")
    return tmp_path / "data"


def build_index(root: Path) -> Path:
    ClothingData.main(["--data_root", str(root)])
    return root / "Clothing1m-data.npz"


def without_lists(root: Path) -> None:
    for path in root.glob("*.txt"):
        path.unlink()


def test_dropped_keys_and_ignored_lines_are_told(root, capsys):
    keys = (root / "clean_val_key_list.txt").read_text().split()
    labels = (root / "clean_label_kv.txt").read_text().splitlines()
    kept = [line for line in labels if not line.startswith(keys[1])]
    (root / "clean_label_kv.txt").write_text("\n".join([*kept, "one two three"]))
    index, out = build_index(root), capsys.readouterr().out
    assert "clean_val_key_list.txt: 1 keys have no label in clean_label_kv.txt" in out
    assert "clean_label_kv.txt: 1 lines that are not a key, a blank and a label" in out
    assert "train: 12 images\nnote:" in out and "clean_val: 5 images\ntest: 6 images\n" in out
    with np.load(index, allow_pickle=False) as file:
        assert file["clean_val_data"].tolist() == [key for key in keys if key != keys[1]]
        assert file["clean_val_labels"].tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("clean_label_kv.txt", None, "looked in .* for clean_label_kv.txt; get it from"),
        ("noisy_label_kv.txt", "images/none.jpg 3\n", "train_key_list.txt: no key has a label in noisy"),
    ],
)
def test_lists_that_do_not_serve_are_told_in_one_line_and_nothing_is_written(file, content, line, root):
    (root / file).unlink() if content is None else (root / file).write_text(content)
    assert re.search(line, message(build_index, root)) and not list(root.glob("*.npz*"))


def test_the_index_names_the_same_images_as_the_lists_and_serves_without_them(root):
    expected, index = datasets.load_clothing1m(root, "noisy"), build_index(root)
    found, args = read_index(root), parse_args(f"--data_root {root} --batch_size 4 --workers 0".split())
    for split, wanted in zip(found.splits(), expected.splits(), strict=True):
        assert split.part == wanted.part and split.folder == wanted.folder
        assert np.array_equal(split.paths, wanted.paths) and np.array_equal(split.labels, wanted.labels)
    assert np.array_equal(found.positions, expected.positions) and found.listed == expected.listed == 12
    assert np.array_equal(found.verified, expected.verified)

    content = index.read_bytes()
    index.write_bytes(b"damaged")  # lists come first
    assert len(load(args, CPU).observed) == 12
    without_lists(root)
    with pytest.raises(UserError, match=r"data.npz cannot be read .*: remove it and run ClothingData.py"):
        load(args, CPU)
    index.write_bytes(content)
    assert load(args, CPU).observed.tolist() == [1, 0, 0, 0, 2, 1, 1, 1, 0, 2, 2, 2]
    index.unlink()
    with pytest.raises(UserError, match="clothing1m not found in"):
        load(args, CPU)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"test_labels": None}, "no test_labels in it"),
        ({"test_labels": np.array([0, 1])}, "test_data and test_labels are not keys and their labels"),
        ({"train_labels": np.full(12, 14)}, "train_data and train_labels are not keys"),
        ({"train_labels": np.full(12, -1)}, "train_data and train_labels are not keys"),
        ({"train_labels": np.full(12, 0.5)}, "train_data and train_labels are not keys"),
        ({"clean_val_data": np.arange(6)}, "clean_val_data and clean_val_labels are not keys"),
        ({"clean_val_data": np.array("a"), "clean_val_labels": np.array(1)}, "clean_val_data and clean"),
    ],
)
def test_an_index_of_another_kind_is_told_in_one_line(change, line, root):
    with np.load(build_index(root)) as file:
        arrays = {**file, **change}
    np.savez(root / "Clothing1m-data.npz", **{n: own for n, own in arrays.items() if own is not None})
    assert line in message(read_index, root)


class Stub:
    """What `select` needs of a run."""

    def __init__(self, words: str):
        self.args, self.device = parse_args(words.split()), CPU

    def progress(self, batches, _description, training=True):
        assert not training
        return batches


def toy(labels: list[int], true: list[int]) -> tuple[Data, list[int]]:
    """Images that are one-hot vectors of their true class, in batches of two; and a list of those looked at."""
    looked_at: list[int] = []

    def batches(split, _cache, _transform):
        images = torch.stack([torch.eye(14)[true[int(path)]] for path in split.paths])
        looked_at.extend(int(path) for path in split.paths)
        return [((images[piece],), piece) for piece in torch.arange(len(images)).split(2)]

    split = make_split(Path(), [str(i) for i in range(len(labels))], labels)
    return Data(None, None, split, None, torch.tensor(labels), None, None, (), None, batches), looked_at


def reading(shift: int) -> dict[str, torch.Tensor]:
    """Weights that take class c for class c + shift."""
    return {"weight": torch.eye(14).roll(shift, dims=0)}


def memory_of(model_of: list[int], weights: dict) -> dict:
    epochs = torch.tensor(model_of + [0] * (14 - len(model_of)))
    models = no_models(14)._replace(epoch=epochs, best_epoch=7)._asdict()
    return {"confident": None, "models": models, "weights": weights, "streaks": no_streaks(1, 14)}


def linear() -> nn.Linear:
    return nn.Linear(14, 14, bias=False)


def test_each_class_is_predicted_by_its_own_model(capsys):
    # one sample of class 2, none of class 3; class 4, which has no model, by the epoch of the best accuracy
    data, looked_at = toy([0, 0, 0, 1, 1, 2, 4, 4], [0, 1, 0, 1, 0, 2, 4, 0])
    memory = memory_of([1, 2, 1, 2, 0], {1: reading(0), 2: reading(1), 7: reading(4)})
    network = linear()
    before = network.weight.detach().clone()
    select(network, memory, data, "outer loop 1, inner loop 2", Stub("--batch_size 2"))
    # of class 1 the model that takes class 0 for it; of class 4 the one that takes class 0 for that
    assert memory["confident"].tolist() == [0, 2, 4, 5, 7]
    assert sorted(looked_at) == list(range(8)) and torch.equal(network.weight, before)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "hits", "taken"),
    [("", 3, False), ("", 4, True), ("--fidelity released", 0, False), ("--fidelity released", 1, True)],
)
def test_a_set_too_small_to_train_on_leaves_the_one_before(words, hits, taken, capsys):
    data, _ = toy([0] * 6, [0] * hits + [1] * (6 - hits))
    memory = memory_of([1], {1: reading(0), 7: reading(0)})
    before = memory["confident"] = torch.tensor([0, 1, 2, 3, 4])
    select(linear(), memory, data, "there", Stub(f"--batch_size 4 {words}"))
    err = capsys.readouterr().err
    if taken:
        assert memory["confident"].tolist() == list(range(hits)) and err == ""
    else:
        assert memory["confident"] is before and err.count("\n") == 1
        assert err.startswith(f"warning: there: {hits} confident examples are too few")


def test_a_new_outer_loop_has_a_fresh_network_and_keeps_the_set():
    data, network, fresh = toy([0, 0], [0, 0])[0], linear(), linear()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.eye(14)).sum().backward()
    optimizer.step()
    memory, run = memory_of([1], {1: reading(0), 7: reading(0)}), Stub("--batch_size 2")
    place = Clothing.place_of(31, run.args)
    assert place == (2, 1, 1, True) and optimizer.state
    begin_inner_loop(place, network, optimizer, memory, lambda: fresh, data, run)
    assert torch.equal(network.weight, fresh.weight) and not optimizer.state
    assert memory["weights"] == {} and memory["models"]["epoch"].tolist() == [0] * 14
    assert memory["models"]["best_epoch"] == 0 and memory["confident"].tolist() == [0, 1]


def run_clothing(root: Path, words: str) -> Path:
    run = root.parent / "run"
    words += f" --no_pretrain --network resnet18 --image_size 64 --n_epoch 1 --data_root {root} --out {run}"
    Clothing.main([*words.split(), "--device", "cpu", "--workers", "0"])
    return run


def test_cross_entropy_on_an_index(root):
    """With the real network. The same loss on all noisy images throughout, and no checkpoints of epochs."""
    build_index(root)
    without_lists(root)
    run = run_clothing(root, "--selection none --batch_size 5 --max_inner_loop 2")
    rows = table(run)
    assert [(row["outer"], row["inner"]) for row in rows] == [("1", "1"), ("1", "2")]
    assert {row["confident_size"] for row in rows} == {row["class_models"] for row in rows} == {""}
    assert result(run)["images"] == 2 * 10 and result(run)["method"] == "CE"
    memory = state(run)["memory"]
    assert memory["weights"] == {} and memory["confident"] is None


@pytest.mark.parametrize(
    ("fidelity", "images", "metric"),
    [("paper", 10, "test_accuracy"), ("released", 12, "test_accuracy_batchmean")],
)
def test_the_release_keeps_a_smaller_batch_and_reports_means(fidelity, images, metric, root, monkeypatch):
    monkeypatch.setattr(Clothing, "clothing_network", clothing_network)
    monkeypatch.setattr(Clothing, "predict", lambda _, batches, count, *__: torch.zeros(count).long())
    run = run_clothing(root, f"--fidelity {fidelity} --batch_size 5 --max_inner_loop 1 --max_outer_loop 1")
    # of test labels 0 0 1 1 2 2 the first two are hits: two of the first five, none of the last one
    [row] = table(run)
    accuracies = {"test_accuracy": 100 / 3, "test_accuracy_batchmean": 20}
    assert {name: float(row[name]) for name in accuracies} == pytest.approx(accuracies)
    assert (result(run)["images"], result(run)["metric"]) == (images, metric)
    for name in ("best", "last", "at_best_validation"):
        assert result(run)["metrics"][name] == pytest.approx(accuracies[metric])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--batch_size 13 --no_pretrain", "--batch_size 13: there are only 12 training images"),
        ("--batch_size 4 --limit_train 3 --no_pretrain", "--batch_size 4: there are only 3 training images"),
        ("--batch_size 4 --noise_file none.npy --no_pretrain", "none.npy"),
        ("--batch_size 4 --image_cache none --no_pretrain", "no image cache in none"),
        ("--batch_size 4 --pretrained none.pt", "none.pt: no such file"),
    ],
)
def test_what_cannot_be_trained_on_leaves_nothing_behind(words, line, root, monkeypatch):
    monkeypatch.chdir(root.parent)
    before = sorted(root.parent.rglob("*"))
    words = f"--data_root {root} --network resnet18 --device cpu --workers 0 --out run {words}"
    assert line in message(Clothing.main, words.split())
    assert sorted(root.parent.rglob("*")) == before
