"""Short runs of all methods on a pretend card (tests/pretend_card.py), as on a CUDA GPU and as on MPS, which has no float64."""

from shlex import split

import pandas as pd
import pytest
import torch

import afm.train
import me_momentum.main
import sanm.Train_cifar
import sfa.Train_cifar
from common.gpu import device as gpu
from common.gpu.device import Device
from common.runs.run import ROOT, Run
from manifold_dividemix import train_semisup
from tests.end_to_end.runs import label_quality
from tests.pretend_card import PretendCard, usable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not usable(), reason="a card is there, or this torch has no CUDA in it"),
]
CARD = Device(torch.device("cuda", 0), "fp32", "tests")
# the last epoch follows a selection
RUNS = {
    "afm": (afm.train, "--preset embedded/digits-sym0.5/afm-k2 --epochs 2 --limit_train 160", 2),
    "sfa": (
        sfa.Train_cifar,
        "--preset embedded/digits-if0.1-imb0.5/sfa --num_epochs 3 --warm_up 1 --limit_train 200",
        3,
    ),
    "me_momentum": (
        me_momentum.main,
        "--preset embedded/digits-sym0.4/me-momentum --n_epoch 2 --max_outer_loop 1 --limit_train 300",
        6,
    ),
    "manifold_dividemix": (
        train_semisup,
        "--preset embedded/digits-sym0.2-ood0.2/manifold-dividemix --pretrained none --epochs 3 --warmup-epoch 1 "
        "--limit_train 200",
        3,
    ),
    "sanm": (
        sanm.Train_cifar,
        "--preset embedded/digits-sym0.5/sanm-dividemix --num_epochs 1 --warm_up 1 --limit_train 96",
        2,
    ),
}


@pytest.mark.parametrize("paper", RUNS)
def test_a_run_on_a_card_comes_to_its_end(paper, tmp_path):
    script, words, epochs = RUNS[paper]
    with PretendCard(ROOT):
        script.main([*split(words), "--device", "cuda", "--limit_test", "60", "--out", str(tmp_path)])
    assert len(pd.read_csv(tmp_path / "log.csv")) == epochs
    label_quality(tmp_path)


@pytest.mark.parametrize("paper", RUNS)
def test_a_stopped_run_on_a_device_without_float64_resumes_and_ends_as_on_the_cpu(
    paper, tmp_path, monkeypatch
):
    script, words, epochs = RUNS[paper]
    argv = [*split(words), "--limit_test", "60", "--out"]
    script.main([*argv, str(tmp_path / "cpu"), "--device", "cpu"])
    monkeypatch.setattr(gpu, "has_float64", lambda device: device.type == "cpu")
    monkeypatch.setattr(gpu, "pick", lambda *_, **__: CARD)
    monkeypatch.setattr(Device, "on_cuda", lambda self: False)

    def stop(run, epoch, log=Run.log, **values):
        if epoch == epochs:
            raise LookupError("stopped")
        log(run, epoch, **values)

    with PretendCard(ROOT, float64=False) as card:
        with monkeypatch.context() as patch, pytest.raises(LookupError, match="stopped"):
            patch.setattr(Run, "log", stop)
            script.main([*argv, str(tmp_path / "card")])
        script.main([*argv, str(tmp_path / "card")])
    assert card.operators

    # clean probabilities are float32 there, and the AUC of SFA's selection differs more; we have not tested why
    found, wanted = (
        pd.read_csv(tmp_path / name / "log.csv").drop(columns="seconds") for name in ("card", "cpu")
    )
    assert len(found) == epochs
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-4, atol=5e-3)
    found, wanted = (label_quality(tmp_path / name) for name in ("card", "cpu"))
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-3, atol=1e-3)
