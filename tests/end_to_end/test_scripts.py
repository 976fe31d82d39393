"""The scripts as a user starts them: by path, from anywhere, on data of their own, with labels of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shlex import split

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "sfa" / "Train_cifar.py"


def start(*words, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    variables = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | environment
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def small_cifar(folder: Path) -> np.ndarray:
    """A cifar10.npz of 30 training and 10 test images; returns the clean training labels."""
    rng = np.random.default_rng(0)
    train, test = np.arange(30) % 10, np.arange(10) % 10
    images = [rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8) for labels in (train, test)]
    np.savez(
        folder / "cifar10.npz",
        train_images=images[0],
        train_labels=train,
        test_images=images[1],
        test_labels=test,
    )
    return train


def test_by_path_the_script_uses_its_own_clone_even_where_another_copy_is_installed(tmp_path):
    for package in ("sfa", "common"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong copy')")
    process = start(SCRIPT, "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert "--imb_factor" in process.stdout


def test_cifar_from_npz_with_given_labels_in_the_released_networks_and_fidelity(tmp_path):
    clean = small_cifar(tmp_path)
    noisy = (clean + (np.arange(30) % 3 == 0)) % 10
    (tmp_path / "labels.json").write_text(json.dumps(noisy.tolist()))
    settings = split("--imb_type none --num_epochs 2 --warm_up 1 --batch_size 16 --fidelity released")
    files = ["--data_path", tmp_path, "--noise_file", tmp_path / "labels.json", "--out", tmp_path / "run"]
    process = start(SCRIPT, *settings, *files, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["noise"]["realised_rate"] == pytest.approx(1 / 3)
    assert result["profile"] == "short" and result["fidelity"] == "released" and result["noise_rate"] is None
    index, observed = (np.load(tmp_path / "run" / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    assert np.array_equal(observed, noisy[index])
    arrays = np.load(tmp_path / "run" / "clean_probability.npz")
    assert np.array_equal(arrays["clean"], clean[index]) and arrays["net1"].shape == (30,)


def test_missing_data_ends_in_one_line_and_leaves_nothing(tmp_path):
    process = start(SCRIPT, "--noise_ratio", "0.5", "--imb_factor", "0.01", cwd=tmp_path)
    assert process.returncode == 2
    (line,) = process.stderr.strip().splitlines()
    assert "cifar-10-batches-py" in line and "data_batch_1" in line
    assert "python -m common.datasets download cifar10 --data_path data" in line
    assert list(tmp_path.iterdir()) == []


def test_as_a_module_on_digits_with_a_subset_and_every_draw_of_a_class(tmp_path):
    data = split(
        "--dataset digits --imb_factor 0.1 --noise_mode sym --limit_train 120 --num_epochs 3 --warm_up 1"
    )
    selection = split("--min_draw_count 0 --sample_rate 3 --mixture sklearn")
    process = start("-m", "sfa.Train_cifar", *data, *selection, "--out", tmp_path / "run", cwd=ROOT)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["profile"] == "embedded+limit_train=120" and result["noise"]["samples"] == 120
    last = (tmp_path / "run" / "log.csv").read_text().splitlines()
    row = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
    assert row["net1_drawn_classes"] == "10"
