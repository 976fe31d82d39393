"""What all scripts have alike: flags with help in both spellings, light imports for it, the precision of --fidelity released."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import baseline
from common.gpu import device as gpu
from common.runs import cli

SCRIPTS = (
    *("afm.train", "sfa.Train_cifar", "sfa.Train_webvision", "me_momentum.main", "me_momentum.Clothing"),
    *("manifold_dividemix.pretrain", "manifold_dividemix.train_semisup"),
    *("manifold_dividemix.train_semisup_miniimagenet", "sanm.pretrain", "sanm.Train_cifar"),
    "sanm.Train_clothing1M",
)
every_script = pytest.mark.parametrize(
    "script", [importlib.import_module(name) for name in SCRIPTS], ids=SCRIPTS
)


def parser_of(script, monkeypatch) -> cli.Parser:
    """What the script parses its command line with."""

    def parse(parser, *_):
        raise LookupError(parser)

    with monkeypatch.context() as patch, pytest.raises(LookupError) as stop:
        patch.setattr(cli, "parse_args", parse)
        script.parse_args([])
    return stop.value.args[0]


@every_script
def test_every_flag_has_help_both_spellings_and_the_type_of_a_place_where_it_names_one(
    script, monkeypatch, capsys
):
    parser, options = parser_of(script, monkeypatch), []
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for action in parser._actions:
        assert action.help and action.help.strip() and "\n" not in action.help, action.option_strings
        assert all(option in text for option in action.option_strings)
        words = [] if action.nargs == 0 else [str([*(action.choices or "1")][-1])]
        for option in action.option_strings:
            if option.startswith("--") and option not in ("--help", "--preset"):
                spellings = option, *(f"--{option[2:].replace(*pair)}" for pair in ("-_", "_-"))
                own, *others = (parser.parse_known_args([typed, *words]) for typed in spellings)
                assert others == [own, own] and not own[1], option
            options.append(option.replace("_", "-"))
        described = str(action.metavar) + (action.default if isinstance(action.default, str) else "")
        names_a_place = any(word in described for word in ("DIR", "FILE", "PATH", "/"))
        assert (action.type is cli.place) == names_a_place, action.option_strings
    assert len(options) == len({*options}), "a doubled spelling"
    assert {"--noise-file", "--limit-train"} < {*options}


HEAVY = {"torch", "torchvision", "scipy", "sklearn", "pandas", "matplotlib", "tensorboard", "tqdm", "PIL"}
FIGURES = tuple(f"{paper}.visualize" for paper in ("afm", "sfa", "manifold_dividemix", "sanm"))
# the scripts' help, one after the other in one process, with what is imported after each
HELP = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv, text = [script, "--help"], io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    print(script, text.getvalue()[:6], *sys.modules)
"""


def test_help_imports_nothing_that_takes_seconds():
    scripts = [*SCRIPTS, *FIGURES, "benchmarks.gallery", "benchmarks.label_errors"]
    command, root = [sys.executable, "-c", HELP, *scripts], Path(cli.__file__).parents[2]
    lines = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[script, "usage:"] for script in scripts]
    for line in lines:
        assert not HEAVY & {*line.split()[2:]}, line.split()[0]


@pytest.fixture
def picking(monkeypatch):
    """Ends a script where it picks its device, with what it asked for."""

    def pick(device, precision, *_, fidelity, **__):
        raise LookupError(precision, fidelity)

    monkeypatch.setattr(gpu, "pick", pick)


@every_script
@pytest.mark.parametrize("fidelity", ["paper", "released"])
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
