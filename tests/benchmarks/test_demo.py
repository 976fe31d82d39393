"""The demonstration: the folder that it writes, and the commands that it runs."""

import numpy as np
import pytest

from benchmarks import demo
from common import datasets
from common.datasets import load_folder
from common.runs.cli import UserError
from sfa.flags import parse_cifar_args

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def test_the_demo_writes_digits_with_known_errors_and_runs_three_commands_on_them(
    tmp_path, monkeypatch, capsys
):
    calls = []
    monkeypatch.setattr(demo, "call", lambda *words: calls.append(words))
    demo.main(["--out", str(tmp_path), "--seed", "3", "--device", "cpu"])
    assert [words[:2] for words in calls[1:]] == [
        ("-m", "benchmarks.label_errors"),
        ("-m", "benchmarks.gallery"),
    ]
    assert calls[1][2:] == calls[2][2:] == (str(tmp_path / "run"),)
    script, *words = calls[0]
    args = parse_cifar_args(words)
    assert (script, args.seed, args.noise_mode, args.imb_type) == ("sfa/Train_cifar.py", 3, "given", "none")
    data, digits = load_folder(args.data_path, args.image_size), datasets.load("digits")
    for own, original in ((data.train, digits.train), (data.test, digits.test)):
        assert np.array_equal(own.labels, original.labels)
        assert np.array_equal(own.images, np.broadcast_to(original.images, own.images.shape))
    assert (data.noisy_labels != data.train.labels).mean() == pytest.approx(0.15, abs=0.03)
    assert (
        f"{(data.noisy_labels != data.train.labels).sum()} training labels are wrong"
        in capsys.readouterr().out
    )


def test_a_command_that_fails_ends_the_demo(capfd):
    with pytest.raises(UserError, match=r"python -m benchmarks\.nothing ended with exit status 1"):
        demo.call("-m", "benchmarks.nothing")
