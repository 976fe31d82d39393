"""Observed labels from a file: four forms that say the same, and what is refused with which words."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common.datasets import labels_of, read_labels
from common.datasets.given_labels import label_notes, labels_sha256, own_file
from common.runs.cli import UserError
from tests import lines as lines_of
from tests.common.payload import Payload

K = 10
LABELS = np.random.RandomState(0).randint(0, K, size=50)
N = len(LABELS)


def lines(rows) -> str:
    return "\n".join(",".join(map(str, row)) if isinstance(row, tuple) else str(row) for row in rows) + "\n"


def save(path: Path, content) -> Path:
    """Text, bytes, an array, or (for .npz) a dictionary of arrays, into a file."""
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content, allow_pickle=True)
    return path


def message(path: Path, lengths: tuple[int, ...] = (N,)) -> str:
    """The one line that reading this file ends in; it always names the flag and the file."""
    text = lines_of.message(read_labels, path, lengths, K)
    assert text.startswith(f"--noise_file {path}: ")
    return text


SHUFFLED = np.random.RandomState(1).permutation(N)


def table(*heading, order=SHUFFLED, end="\n", delimiter=",", of=lambda i: (i, LABELS[i])) -> str:
    return end.join([delimiter.join(heading), *(delimiter.join(map(str, of(i))) for i in order)]) + end


BY_INDEX = {str(i): int(LABELS[i]) for i in SHUFFLED}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("int64.npy", LABELS),
        ("uint8.npy", LABELS.astype(np.uint8)),
        ("floats.npy", LABELS / 1),
        ("column.npy", LABELS[:, None]),
        ("one.npz", {"whatever": LABELS}),
        ("several.npz:noisy_label", {"clean": LABELS * 0, "noisy_label": LABELS}),
        ("index.npz", {"dataset_index": SHUFFLED, "labels": LABELS[SHUFFLED]}),
        ("confidence.npz", {"confidence": LABELS / 11, "given": LABELS}),
        ("list.json", json.dumps(LABELS.tolist())),
        ("floats.json", json.dumps((LABELS / 1).tolist())),
        ("column.json", json.dumps(LABELS[:, None].tolist())),
        ("by_index.json", json.dumps(BY_INDEX)),
        ("columns.json:noisy", json.dumps({"noisy": BY_INDEX, "label": [0] * N})),
        ("records.json", json.dumps({"idx": SHUFFLED.tolist(), "noisy": LABELS[SHUFFLED].tolist()})),
        ("plain.csv", lines(LABELS)),
        ("plain.txt", lines(LABELS / 1)),
        ("windows.csv", lines(LABELS).replace("\n", "\r\n")),
        ("heading.csv", lines(["label", *LABELS])),
        ("marked.csv", "\ufeff" + lines(LABELS)),
        ("signed.csv", lines([f"+{LABELS[0]}", *LABELS[1:]])),
        ("floats.csv", lines(["noisy", *(LABELS / 1)])),
        ("blank_lines.csv", lines([" label ", "", *(f" {v} " for v in LABELS), ""])),
        ("index.csv", table("Index", "noisy_label")),
        ("image_id.csv", table("image_id", "noisy_label", end="\r\n")),
        ("semicolons.csv", table("ID", "y", delimiter=";")),
        ("tabs.tsv", table("idx", "y", delimiter="\t")),
        ("pandas.csv", table("", "0")),
        ("unnamed.csv", table("Unnamed: 0", "noisy")),
        ("twice.csv", table("", "index", "y", of=lambda i: (N - 1 - i, i, LABELS[i]))),
        ("path.csv", table("path", "label", order=range(N), of=lambda i: (f"{i}.png", LABELS[i]))),
        ("typed.csv:noisy", table("index", "label", "noisy", of=lambda i: (i, 0, LABELS[i]))),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 24 else "",
)
def test_every_form_gives_the_same_int64_labels(tmp_path, file, content):
    name, _, column = file.partition(":")
    path = save(tmp_path / name, content)
    labels = read_labels(f"{path}:{column}" if column else path, (N,), K)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, LABELS)
    assert np.array_equal(read_labels(f"{path}:{column}" if column else path, (40, N), K), LABELS)


@pytest.mark.parametrize(
    ("file", "content"), [("a.npy", LABELS[:-1]), ("a.json", "[" + "1," * 48 + "1]"), ("a.csv", lines(LABELS[:-1]))]
)  # fmt: skip
def test_a_wrong_length_is_refused_with_both_lengths(tmp_path, file, content):
    path = save(tmp_path / file, content)
    assert re.search(r"\b49 labels.* 50, one per image", message(path))
    assert re.search(r"\b49 labels.* 50 or 45, one", message(path, (50, 45, 50)))
    assert re.search(r"\b0 labels.* 50, one", message(save(tmp_path / "empty.csv", "label\n")))


@pytest.mark.parametrize("wrong", [-1, 10, 255])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json", ".csv"])
def test_a_label_out_of_range_is_refused_with_its_position(tmp_path, suffix, wrong):
    labels = LABELS.copy()
    labels[[7, 20]] = wrong
    content = {".npz": {"labels": labels}, ".json": json.dumps(labels.tolist()), ".csv": lines(labels)}
    text = message(save(tmp_path / f"a{suffix}", content.get(suffix, labels)))
    assert f"label {wrong} at position 7 is outside 0..9" in text


def with_one(value) -> list:
    return [*LABELS[:30].tolist(), value, *LABELS[31:].tolist()]


@pytest.mark.parametrize(
    ("file", "content", "offending"),
    [
        ("halves.npy", LABELS / 2, "needs whole numbers, holds [0-9]\\.5 at position"),
        ("nan.npy", np.array(with_one(np.nan)), "holds nan at position 30"),
        ("booleans.npy", LABELS > 4, "bool"),
        ("text.npy", np.array(with_one("cat"), dtype=str), "'cat'"),
        ("one_hot.npy", np.eye(K)[LABELS], r"one-hot rows of shape \[50, 10\]: save their argmax"),
        ("two_dimensions.npy", np.stack([LABELS, LABELS]), r"\[2, 50\]"),
        ("scalar.npy", np.array(3), r"\[\]"),
        ("objects.npy", np.array(with_one(None), dtype=object), "Object arrays cannot be loaded"),
        ("CIFAR-10_human_ordered.npy", LABELS, r"TensorFlow's order.*CIFAR-10_human\.pt:worse_label"),
        ("from_one.npy", LABELS + 1, r"labels are 1\.\.10, classes count from 0: subtract 1"),
        ("objects.npz", {"labels": np.array(with_one(None), dtype=object)}, "Object arrays cannot be loaded"),
        ("several.npz", {"a": LABELS, "b": LABELS}, r"could be the labels, a, b: name one, such as FILE:b"),
        ("label_and_noisy.csv", table("label", "noisy", of=lambda i: (0, LABELS[i])), "labels, label, noisy: name one"),
        ("beside_the_index.csv", table("id", "given_label", "noise_label", of=lambda i: (i, 0, 1)), "FILE:noise_label"),
        ("only_index.csv", table("index", "path", of=lambda i: (i, "x.png")), "column path: .*'x.png'"),
        ("twice.csv", table("index", "y", of=lambda i: (0, 1)), r"index column index is no permutation of 0\.\.49"),
        ("from_one.csv", table("idx", "y", of=lambda i: (i + 1, 1)), r"index column idx is no permutation.*from 0"),
        ("names.csv", table("image_id", "y", of=lambda i: (f"img{i}", 1)), "column image_id: .*'img"),
        ("differ.csv", table("id", "index", "y", of=lambda i: (i, N - 1 - i, 1)), "id and index differ"),
        ("half.json", json.dumps(with_one(1.5)), "holds 1.5 at position 30"),
        ("nan.json", json.dumps(with_one(float("nan"))), "not a list of integers"),
        ("booleans.json", json.dumps(with_one(True)), "not a list of integers"),
        ("null.json", json.dumps(with_one(None)), "not a list of integers"),
        ("huge.json", json.dumps(with_one(10**30)), "too (large|big)"),
        ("deep.json", "[" * 200_000, "recursion"),
        ("missing_key.json", json.dumps({str(i): 1 for i in range(1, N + 1)}), "no permutation"),
        ("paths.json", json.dumps({f"{i}.png": 1 for i in range(N)}), "no image numbers"),
        ("heading_nan.csv", lines(["nan", *LABELS]), "holds nan at position 0"),
        ("nested.json", json.dumps([LABELS.tolist()]), "not a list of integers"),
        ("floats.csv", lines(with_one(1.5)), r"1\.5 at position 30"),
        ("words.csv", lines(["label", *with_one("cat")]), "'cat'"),
        ("no_heading.csv", lines(enumerate(LABELS)), "several columns and no heading"),
        ("same_names.csv", table("y", "Y"), "the same name"),
        ("short_line.csv", lines([("id", "label"), *enumerate(LABELS), "3"]), "its lines differ in length"),
    ],
    ids=lambda value: value if isinstance(value, str) and re.fullmatch(r"\w+\.\w+", value) else "",
)  # fmt: skip
def test_what_is_not_one_integer_per_sample_is_refused(tmp_path, file, content, offending):
    assert re.search(offending, message(save(tmp_path / file, content)))


@pytest.mark.parametrize("keep", [0, 40, 300], ids=lambda keep: f"{keep} bytes")
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_truncated_array_file_is_refused(tmp_path, suffix, keep):
    path = save(tmp_path / f"a{suffix}", LABELS if suffix == ".npy" else {"labels": LABELS})
    path.write_bytes(path.read_bytes()[:keep])
    assert f"cannot be read as {suffix} labels" in message(path)


def test_an_unknown_suffix_is_refused_with_the_known_ones_and_a_file_that_is_not_there(tmp_path):
    for file in ("labels.dat", "labels.pkl", "labels"):
        text = message(save(tmp_path / file, lines(LABELS)))
        assert all(suffix in text for suffix in (".npy", ".npz", ".pt", ".json", ".csv"))
    for suffix in (".npy", ".npz", ".json", ".csv"):
        assert message(tmp_path / f"nowhere{suffix}").endswith("no such file")
        (tmp_path / f"folder{suffix}").mkdir()
        assert message(tmp_path / f"folder{suffix}").endswith("no such file")


@pytest.mark.parametrize("asked", ["clean", "Noisy", ""])
def test_a_column_that_is_not_there_is_refused_with_those_there_are(tmp_path, asked):
    path = save(tmp_path / "a.npz", {"noisy": LABELS, "label": LABELS})
    with pytest.raises(UserError, match=f"has no column {asked}: choose from 'noisy', 'label'"):
        read_labels(f"{path}:{asked}", (N,), K)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_official_pickles_of_numpy_vectors_are_read_and_nothing_else_is_run(tmp_path, legacy):
    path = tmp_path / "CIFAR-10_human.pt"
    official = {"clean_label": LABELS * 0, "worse_label": LABELS}
    official["as_tensor"] = torch.from_numpy(LABELS[:, None])
    torch.save(official, path, _use_new_zipfile_serialization=not legacy)
    for name in ("worse_label", "as_tensor"):
        assert np.array_equal(read_labels(f"{path}:{name}", (N,), K), LABELS)
    assert "worse_label: name one" in message(path) or "as_tensor: name one" in message(path)
    if legacy:  # of an older NumPy
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert np.array_equal(read_labels(f"{path}:worse_label", (N,), K), LABELS)
    harm = Payload(pytest.fail, "code of a label file was run")
    torch.save({"worse_label": harm}, path, _use_new_zipfile_serialization=not legacy)
    assert "not loaded" in message(path)
    path.write_bytes(b"junk")
    assert "cannot be read as .pt labels" in message(path)


INDEX = np.array([4, 0, 7])


def test_labels_as_long_as_a_subset_are_refused_unless_they_are_provably_those_of_its_images(tmp_path):
    whole = save(tmp_path / "all.npy", np.arange(8))
    assert labels_of(whole, INDEX, 8, 10).tolist() == [4, 0, 7]
    path = save(tmp_path / "subset.npy", np.array([1, 2, 3]))
    with pytest.raises(UserError, match="holds 3 labels, the training set needs 8"):
        labels_of(path, INDEX, 8, 10)
    with pytest.raises(UserError, match="nothing shows which 3 of the 8 training images"):
        labels_of(path, INDEX, 8, 10, is_subset=lambda labels: labels[0] == 7)
    assert labels_of(path, INDEX, 8, 10, is_subset=lambda labels: labels[0] == 1).tolist() == [1, 2, 3]


def test_a_runs_labels_are_matched_by_the_images_they_belong_to(tmp_path):
    """Also where a run kept every image in another order: by length alone its labels would be taken for the data set's."""
    order = np.array([3, 1, 4, 0, 7, 5, 2, 6])
    path = tmp_path / "noisy_labels.npz"
    path.write_bytes(own_file(order + 1, order))
    assert labels_of(path, INDEX, 8, 10).tolist() == [5, 1, 8]
    assert labels_of(path.rename(tmp_path / "any.npz"), INDEX, 8, 10).tolist() == [5, 1, 8]
    path.write_bytes(own_file(np.array([1, 2]), np.array([4, 0])))
    with pytest.raises(UserError, match="no label of training image 7"):
        labels_of(path, INDEX, 8, 10)
    np.savez(path, labels=order + 2, index=order, sha256=np.array(labels_sha256(order + 1)))
    with pytest.raises(UserError, match="do not match its sha256"):
        labels_of(path, INDEX, 8, 10)
    np.save(tmp_path / "train_index.npy", order)
    np.save(tmp_path / "noisy_labels.npy", order + 1)
    assert labels_of(tmp_path / "noisy_labels.npy", INDEX, 8, 10).tolist() == [5, 1, 8]


@pytest.mark.parametrize(
    ("clean", "observed", "from_file", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 2], True, []),
        ([0, 1, 2, 3], [0, 1, 2, 3], True, ["true labels"]),
        ([0, 1, 2, 3], [0, 1, 2, 3], False, []),
        ([0, 1, 2, 3], [1, 2, 3, 3], True, ["75.0 % .* another order"]),
        ([1, 2, 3, 3], [1, 2, 3, 3], False, ["class 0 has no training image: labels may start at 1"]),
        (None, [0, 1, 1, 3], True, ["class 2 has no training image$"]),
    ],
)
def test_suspicious_labels_get_a_note(clean, observed, from_file, expected):
    clean = None if clean is None else np.array(clean)
    notes = label_notes(clean, np.array(observed), 4, from_file)
    assert len(notes) == len(expected)
    assert all(re.search(words, note) for words, note in zip(expected, notes, strict=True))
