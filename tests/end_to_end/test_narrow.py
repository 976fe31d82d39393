"""All five scripts with the narrow network that is asked for by its name, on digits, for an epoch or two each.

Each with label noise from a posterior.
"""

import json
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch

import afm.train
import me_momentum.main
import sanm.Train_cifar
import sanm.visualize
import sfa.Train_cifar
from benchmarks import baseline
from common import datasets, noise
from common.datasets.posterior import out_of_fold
from manifold_dividemix import pretrain, train_semisup
from tests.end_to_end.runs import label_quality, result
from tests.lines import refused

COMMON = split("--dataset digits --device cpu --limit_train 160")
MANIFOLD = [*COMMON, *split("--ood-ratio 0 --epochs 2 --lr-backbone 0.01 --warmup-epoch 1 --batch-size 32")]
RUNS = {
    "sfa": (sfa.Train_cifar, "--imb_factor 0.5 --num_epochs 2 --warm_up 1 --arch narrow"),
    "sanm": (sanm.Train_cifar, "--base dividemix --num_epochs 1 --warm_up 1 --batch_size 32 --arch narrow"),
    "afm": (afm.train, "--epochs 1 --train-batch 32 --pretrained none --network preact_narrow"),
    "me_momentum": (
        me_momentum.main,
        "--n_epoch 1 --max_outer_loop 1 --data_percent 0.5 --network preact_narrow",
    ),
}


# the flag of the noise type, a type, and the rate as a flag
NOISE = {
    "sfa": ("--noise_mode", "margin1", "--noise_ratio 0.4"),
    "sanm": ("--noise_mode", "margin2", "--r 0.4"),
    "afm": ("--noise-type", "hard", "--noise-rate 0.4"),
    "me_momentum": ("--noise_type", "margin3", "--noise_rate 0.4"),
    "manifold_dividemix": ("--noise-type", "hard", "--noise-ratio 0.4"),
}


@pytest.fixture(scope="module")
def eta() -> np.ndarray:
    return out_of_fold(datasets.load("digits").train, 10)[0]


def noise_flags(paper: str) -> list[str]:
    flag, kind, rate = NOISE[paper]
    return [flag, kind, *rate.split()]


def arguments(run: Path) -> dict:
    return json.loads((run / "args.json").read_text())["arguments"]


def assert_noisy(run: Path, kind: str, eta: np.ndarray) -> None:
    """The run's labels are those of the noise type, of which the result row has the name."""
    index, observed = (np.load(run / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    clean, seed = datasets.load("digits").train.labels, arguments(run)["seed"]
    drawn = np.arange(1437)
    if run.parent.name == "sfa":  # for the long-tailed set
        drawn = noise.long_tailed(
            clean, noise.class_counts(1437, 10, "exp", 0.5), np.random.RandomState(seed)
        )
    seed = 0 if run.name == "run" else seed  # Manifold DivideMix's --noise-seed
    noisy = noise.from_posterior(kind, clean[drawn], 0.4, 10, seed, eta[drawn])
    of = dict(zip(drawn.tolist(), noisy.tolist(), strict=True))
    assert observed.tolist() == [of[i] for i in index.tolist()]
    assert (result(run)["noise_type"], result(run)["noise_rate"]) == (kind, 0.4)


@pytest.mark.parametrize("paper", NOISE)
def test_a_posterior_is_refused_where_no_noise_is_drawn_from_it(paper, capsys):
    parse_args = (train_semisup if paper == "manifold_dividemix" else RUNS[paper][0]).parse_args
    words, (flag, kind, _) = [*COMMON, "--posterior", "eta.npy"], NOISE[paper]
    for more, got in (([flag, "given"], "given"), ([flag, kind, "--noise_file", "a.npy"], "given"), ([], "")):
        with pytest.raises(SystemExit) as stop:
            parse_args([*words, *more])
        assert stop.value.code == 2
        error = f"argument --posterior: is for {flag} margin1, margin2, margin3, hard, got {got}"
        assert error in capsys.readouterr().err
    assert parse_args([*words, flag, kind]).posterior == "eta.npy"


def state(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the run's network, of several the first one's."""
    found = torch.load(run / "checkpoint.pt", weights_only=True)["state"]
    return found["nets"][0] if "nets" in found else found["network"]


def widths(weights: dict[str, torch.Tensor]) -> list[int]:
    """Of the encoder's 3x3 convolutions, in their order."""
    own = {name: value for name, value in weights.items() if not name.startswith("decoder.")}
    return [len(value) for value in own.values() if value.dim() == 4 and value.shape[2] == 3]


@pytest.mark.slow
@pytest.mark.parametrize("paper", RUNS)
def test_a_run_with_the_narrow_network_ends_and_says_so(paper, eta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("eta.npy", eta)
    script, flags = RUNS[paper]
    given = [] if paper == "me_momentum" else ["--posterior", "eta.npy"]  # one makes it
    words = [*COMMON, *noise_flags(paper), *given, *flags.split()]
    script.main([*words, "--limit_test", "30", "--full_test_at_end"])
    assert not Path("data").exists()
    [run] = (tmp_path / "results" / "runs" / paper).iterdir()
    assert f"_{flags.split()[-1]}-" in run.name and "-limit_test_30-" in run.name
    assert flags.split()[-1] in (arguments(run).get("arch"), arguments(run).get("network"))
    assert widths(state(run)) == [16, 16, 16, 32, 32, 64, 64]
    found = result(run)
    assert found["profile"] == "embedded+limit_train=160+limit_test=30"
    assert found["metrics"]["last"] * 0.3 == pytest.approx(round(found["metrics"]["last"] * 0.3), abs=1e-4)
    script.main([*words, "--out", "whole"])
    whole = result(tmp_path / "whole")["metrics"]
    assert found["metrics"]["full_test"] == pytest.approx(whole["last"]) and 0 < whole["last"] <= 100
    assert found["metrics"]["full_test_images"] == 360 and "full_test" not in whole
    assert_noisy(run, NOISE[paper][1], eta)
    quality, truth = label_quality(run), datasets.load("digits").train.labels
    assert quality.true_label.tolist() == truth[quality["index"]].tolist()
    assert quality.selected.isna().all() == (paper == "afm") and quality.ood_score.isna().all()
    if paper == "sfa":  # cross-entropy on its labels is tested on the same images
        baseline.main(["--like", str(run), "--device", "cpu"])
        beside, plain = result(run / "baseline"), label_quality(run / "baseline")
        assert plain.true_label.tolist() == quality.true_label.tolist() and plain.selected.isna().all()
        sure = plain.predicted_label == plain.given_label
        assert (plain.score[sure] == plain.predicted_probability[sure]).all()
        assert (plain.score[~sure] <= plain.predicted_probability[~sure]).all() and not sure.all()
        assert beside["profile"] == found["profile"]
        assert beside["metrics"]["last"] * 0.3 == pytest.approx(round(beside["metrics"]["last"] * 0.3))
    if paper == "sanm":  # its figure shows masks, for which the network is made again
        sanm.visualize.main([str(run), "--out", str(tmp_path / "sanm.png")])
        assert (tmp_path / "sanm.png").is_file()


@pytest.mark.slow
def test_manifold_dividemix_begins_from_the_narrow_encoder_and_no_other_network_does(
    eta, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    np.save("eta.npy", eta)
    kind = [*noise_flags("manifold_dividemix"), "--posterior", "eta.npy"]
    flags = split("--ood-ratio 0 --epochs 1 --batch_size 64 --lr 0.05 --arch narrow --out")
    pretrain.main([*COMMON, *kind, *flags, str(tmp_path / "encoder")])
    drawn = json.loads((tmp_path / "encoder" / "noise.json").read_text())
    assert drawn["realised_rate"] == 0, "no label is used"
    file = tmp_path / "encoder" / "encoder.safetensors"
    words = [*MANIFOLD, *kind, "--pretrained", str(file), "--out"]
    for out, limit in (("run", []), ("limited", ["--limit_test", "30", "--full_test_at_end"])):
        train_semisup.main([*words, str(tmp_path / out), "--arch", "narrow", *limit])
    assert "encoder.safetensors: 44 tensors taken, 0 others left" in capsys.readouterr().out
    whole, limited = (result(tmp_path / out) for out in ("run", "limited"))
    assert limited["profile"] == "embedded+limit_train=160+limit_test=30"
    assert limited["metrics"]["full_test"] == pytest.approx(whole["metrics"]["last"])
    assert limited["metrics"]["last"] != limited["metrics"]["full_test"]
    assert_noisy(tmp_path / "run", "hard", eta)
    assert widths(state(tmp_path / "run")) == [16, 16, 16, 32, 32, 64, 64]
    assert "has no layer1.0." in refused(capsys, train_semisup.main, *words, tmp_path / "other")
    assert not (tmp_path / "other").exists()
