"""What all training scripts have alike: spellings of flags, and the precision of --fidelity released."""

import json

import numpy as np
import pytest

from afm import train
from benchmarks import baseline
from common.gpu import device as gpu
from manifold_dividemix import pretrain as manifold_pretrain
from manifold_dividemix import train_semisup, train_semisup_miniimagenet
from me_momentum import Clothing, main
from sanm import Train_cifar as sanm_cifar
from sanm import Train_clothing1M, pretrain
from sfa import Train_cifar, Train_webvision

SCRIPTS = (
    *(train, Train_cifar, Train_webvision, main, Clothing, train_semisup, train_semisup_miniimagenet),
    *(manifold_pretrain, sanm_cifar, Train_clothing1M, pretrain),
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_can_be_typed_with_hyphens_and_with_underscores(script):
    parser, options = script.make_parser(), []
    for action in parser._actions:
        words = [] if action.nargs == 0 else [str([*(action.choices or "1")][-1])]
        for option in action.option_strings:
            if option.startswith("--") and option not in ("--help", "--preset"):
                spellings = option, *(f"--{option[2:].replace(*pair)}" for pair in ("-_", "_-"))
                own, *others = (parser.parse_known_args([typed, *words]) for typed in spellings)
                assert others == [own, own] and not own[1], option
            options.append(option.replace("_", "-"))
    assert len(options) == len({*options}), "a doubled spelling"
    assert {"--noise-file", "--limit-train"} < {*options}


@pytest.fixture
def picking(monkeypatch):
    """Ends a script where it picks its device, with what it asked for."""

    def pick(device, precision, *_, fidelity, **__):
        raise LookupError(precision, fidelity)

    monkeypatch.setattr(gpu, "pick", pick)


@pytest.mark.parametrize("fidelity", ["paper", "released"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_precision_follows_fidelity(script, fidelity, picking):
    with pytest.raises(LookupError) as stop:
        script.main(["--device", "cpu", "--fidelity", fidelity])
    assert stop.value.args == ("auto", fidelity)


def test_the_baselines_precision_follows_the_fidelity_of_the_run_it_is_like(tmp_path, picking):
    arguments = {"seed": 1, "num_epochs": 2, "fidelity": "released"}
    (tmp_path / "args.json").write_text(json.dumps({"arguments": arguments, "cell": {}}))
    for name in ("train_index", "noisy_labels"):
        np.save(tmp_path / f"{name}.npy", np.arange(3))
    with pytest.raises(LookupError) as stop:
        baseline.main(["--like", str(tmp_path), "--device", "cpu"])
    assert stop.value.args == ("auto", "released")
