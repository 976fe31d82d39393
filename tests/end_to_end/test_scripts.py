"""The scripts as a user starts them: by path, from anywhere, on data of their own, with labels of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shlex import split

import numpy as np
import pytest

from sfa import Train_cifar

pytestmark = pytest.mark.slow

SCRIPT = Path(Train_cifar.__file__).resolve()


def start(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    variables = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | environment
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def test_by_path_the_script_uses_its_own_clone_even_where_another_copy_is_installed(tmp_path):
    for package in ("sfa", "common"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong copy')")
    process = start("--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert "--imb_factor" in process.stdout


def test_missing_data_ends_in_one_line_and_leaves_nothing(tmp_path):
    process = start("--noise_ratio", "0.5", "--imb_factor", "0.01", cwd=tmp_path)
    assert process.returncode == 2
    (line,) = process.stderr.strip().splitlines()
    assert "cifar-10-batches-py" in line and "data_batch_1" in line
    assert "python -m common.datasets download cifar10 --data_path data" in line
    assert list(tmp_path.iterdir()) == []


def test_cifar_from_npz_with_given_labels_in_the_released_networks_and_fidelity(tmp_path):
    rng, clean, arrays = np.random.default_rng(0), np.arange(30) % 10, {}
    for part, labels in (("train", clean), ("test", clean[:10])):
        images = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    noisy = (clean + (np.arange(30) % 3 == 0)) % 10
    (tmp_path / "labels.json").write_text(json.dumps(noisy.tolist()))
    words = split(
        "--imb_type none --num_epochs 2 --warm_up 1 --batch_size 16 --fidelity released --device cpu"
    )
    for flag, place in (("--data_path", ""), ("--noise_file", "labels.json"), ("--out", "run")):
        words += [flag, str(tmp_path / place)]
    Train_cifar.main(words)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["noise"]["realised_rate"] == pytest.approx(1 / 3)
    assert result["profile"] == "short" and result["fidelity"] == "released" and result["noise_rate"] is None
    index, observed = (np.load(tmp_path / "run" / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    assert np.array_equal(observed, noisy[index])
    kept = np.load(tmp_path / "run" / "clean_probability.npz")
    assert np.array_equal(kept["clean"], clean[index]) and kept["net1"].shape == (30,)


def test_on_digits_with_a_subset_and_every_draw_of_a_class(tmp_path):
    data = "--dataset digits --imb_factor 0.1 --noise_mode sym --limit_train 120 --num_epochs 3 --warm_up 1"
    words = [*split(data), *split("--min_draw_count 0 --sample_rate 3 --mixture sklearn --device cpu --out")]
    Train_cifar.main([*words, str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["profile"] == "embedded+limit_train=120" and result["noise"]["samples"] == 120
    heading, *_, last = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert dict(zip(heading.split(","), last.split(","), strict=True))["net1_drawn_classes"] == "10"
