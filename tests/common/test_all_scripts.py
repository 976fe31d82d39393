"""What all training scripts have alike: spellings of flags."""

import pytest

from afm import train
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
