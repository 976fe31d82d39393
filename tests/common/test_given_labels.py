"""Observed labels from a file: four forms that say the same, and what is refused with which words."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from common.datasets import labels_of, read_labels

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
    with pytest.raises(UserError) as error:
        read_labels(path, lengths, K)
    text = str(error.value)
    assert text.startswith(f"--noise_file {path}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("int64.npy", LABELS),
        ("uint8.npy", LABELS.astype(np.uint8)),
        ("one.npz", {"whatever": LABELS}),
        ("several.npz", {"clean": LABELS * 0, "noisy_label": LABELS}),
        ("two_known.npz", {"label": LABELS * 0, "noisy_labels": LABELS}),
        ("list.json", json.dumps(LABELS.tolist())),
        ("plain.csv", lines(LABELS)),
        ("windows.csv", lines(LABELS).replace("\n", "\r\n")),
        ("heading.csv", lines(["label", *LABELS])),
        ("marked.csv", "\ufeff" + lines(LABELS)),
        ("signed.csv", lines([f"+{LABELS[0]}", *LABELS[1:]])),
        ("columns.csv", lines([("id", "clean", "noisy_labels"), *((i, 0, v) for i, v in enumerate(LABELS))])),
        ("blank_lines.csv", lines([" label ", "", *(f" {v} " for v in LABELS), ""])),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_every_form_gives_the_same_int64_labels(tmp_path, file, content):
    labels = read_labels(save(tmp_path / file, content), (N,), K)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, LABELS)


def test_a_file_may_have_any_of_the_expected_lengths(tmp_path):
    path = save(tmp_path / "labels.npy", LABELS)
    assert np.array_equal(read_labels(str(path), (40, N), K), LABELS)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.npy", LABELS[:-1]),
        ("a.npz", {"labels": LABELS[:-1]}),
        ("a.json", json.dumps(LABELS[:-1].tolist())),
        ("a.csv", lines(LABELS[:-1])),
    ],
    ids=["npy", "npz", "json", "csv"],
)
def test_a_wrong_length_is_refused_with_both_lengths(tmp_path, file, content):
    path = save(tmp_path / file, content)
    assert re.search(r"\b49 labels.* 50$", message(path))
    assert re.search(r"\b49 labels.* 50 or 45$", message(path, (50, 45, 50)))


@pytest.mark.parametrize(
    ("file", "content"),
    [("empty.npy", LABELS[:0]), ("empty.json", "[]"), ("empty.csv", ""), ("heading_only.csv", "label\n")],
)
def test_a_file_without_labels_is_refused(tmp_path, file, content):
    assert re.search(r"\b0 labels.* 50$", message(save(tmp_path / file, content)))


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
        ("floats.npy", LABELS / 1, "float64"),
        ("nan.npy", np.array(with_one(np.nan)), "float64"),
        ("booleans.npy", LABELS > 4, "bool"),
        ("text.npy", LABELS.astype(str), "<U"),
        ("two_dimensions.npy", np.stack([LABELS, LABELS]), r"\[2, 50\]"),
        ("scalar.npy", np.array(3), r"\[\]"),
        ("objects.npy", np.array(with_one(None), dtype=object), "Object arrays cannot be loaded"),
        ("floats.npz", {"labels": LABELS / 1}, "float64"),
        ("objects.npz", {"labels": np.array(with_one(None), dtype=object)}, "Object arrays cannot be loaded"),
        ("unnamed.npz", {"a": LABELS, "b": LABELS}, "holds 2 arrays and none called noisy_labels"),
        ("floats.json", json.dumps(with_one(1.0)), "not a list of integers"),
        ("nan.json", json.dumps(with_one(float("nan"))), "not a list of integers"),
        ("booleans.json", json.dumps(with_one(True)), "not a list of integers"),
        ("null.json", json.dumps(with_one(None)), "not a list of integers"),
        ("huge.json", json.dumps(with_one(10**30)), "too (large|big)"),
        ("deep.json", "[" * 200_000, "recursion"),
        ("heading_nan.csv", lines(["nan", *LABELS]), "'nan'"),
        ("nested.json", json.dumps([LABELS.tolist()]), "not a list of integers"),
        ("dictionary.json", json.dumps({"labels": LABELS.tolist()}), "not a list of integers"),
        ("floats.csv", lines(with_one(1.5)), r"'1\.5'"),
        ("nan.csv", lines(with_one("nan")), "'nan'"),
        ("words.csv", lines(["label", *with_one("cat")]), "'cat'"),
        ("unnamed.csv", lines([("id", "mine"), *enumerate(LABELS)]), "no heading that names one noisy_labels"),
        ("no_heading.csv", lines(enumerate(LABELS)), "several columns and no heading"),
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


def test_a_truncated_json_file_is_refused(tmp_path):
    path = save(tmp_path / "a.json", json.dumps(LABELS.tolist())[:-1])
    assert "cannot be read as .json labels" in message(path)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_bytes_that_are_no_text_are_refused(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", b"\xff\xfe\x00\x01")
    assert f"cannot be read as {suffix} labels" in message(path)


@pytest.mark.parametrize("file", ["labels.txt", "labels.pt", "labels"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, file):
    text = message(save(tmp_path / file, lines(LABELS)))
    assert all(suffix in text for suffix in (".npy", ".npz", ".json", ".csv"))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json", ".csv"])
def test_a_file_that_is_not_there_is_refused(tmp_path, suffix):
    assert message(tmp_path / f"nowhere{suffix}").endswith("no such file")
    (tmp_path / f"folder{suffix}").mkdir()
    assert message(tmp_path / f"folder{suffix}").endswith("no such file")


# whose labels they are --------------------------------------------------------------------------------------------------

INDEX = np.array([4, 0, 7])


def test_labels_of_the_whole_data_set_are_picked_by_image_and_labels_of_the_subset_taken_as_they_are(
    tmp_path,
):
    np.save(tmp_path / "all.npy", np.arange(8))
    np.save(tmp_path / "subset.npy", np.array([1, 2, 3]))
    assert labels_of(tmp_path / "all.npy", INDEX, 8, 10).tolist() == [4, 0, 7]
    assert labels_of(tmp_path / "subset.npy", INDEX, 8, 10).tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="holds 3 labels, the training set needs 9 or 2"):
        labels_of(tmp_path / "subset.npy", INDEX[:2], 9, 10)


def test_a_runs_labels_are_matched_by_the_images_they_belong_to(tmp_path):
    """Also where a run kept every image in another order: by length alone its labels would be taken for the data set's."""
    order = np.array([3, 1, 4, 0, 7, 5, 2, 6])
    np.save(tmp_path / "train_index.npy", order)
    np.save(tmp_path / "noisy_labels.npy", order + 1)
    assert labels_of(tmp_path / "noisy_labels.npy", INDEX, 8, 10).tolist() == [5, 1, 8]


def test_a_runs_labels_of_other_images_are_refused(tmp_path):
    np.save(tmp_path / "train_index.npy", np.array([0, 4, 99]))
    np.save(tmp_path / "noisy_labels.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(UserError, match="no label of training image 7"):
        labels_of(tmp_path / "noisy_labels.npy", INDEX, 8, 10)
