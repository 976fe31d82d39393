"""The command line of afm/train.py: the release's flags, ours, and what is refused before anything is written."""

import re
from pathlib import Path

import pytest

from afm import train
from afm.data import FOLDERS
from afm.flags import PRESETS, directory_name, make_parser, method, parse_args
from common.runs import cli

# names and defaults, frozen: a change of one is a change for every user
FLAGS = """
-h/--help='==SUPPRESS==' --dataset='food' --data-root/--data_path=None --train-on='noisy' --noise-type='symmetric'
--noise-rate=0.5 --posterior=None --on_bad_image='error' --image-cache=None --workers=4
--image_size=32 --test_split=0.2
--network='resnet50' --pretrained=None --shared-classifier/--no-shared-classifier=True --group-size=2
--group-rounds=None --group-order=None --pair-chunks=None --interaction='sum' --attention=None
--attn-hidden=0 --weights='attentive' --mix-alpha=1.0 --mix-target=None --detach-target=False
--mix-at='feature' --weight-mixed=None --weight-plain=None --lam=None --lam-scale=2.0 --weight-naive=None
--weight-afm=None --train-batch=256 --test-batch=200 --lr=0.01 --schedule=[15,25] --gamma=0.1 --epochs=30
--finetune-epochs=5 --finetune-lr=0.001 --momentum=0.9 --weight-decay=0.0001 --sync-bn/--no-sync-bn=None
--save-every=0 --checkpoint=None --device_ids=None --out=None --seed=0 --device='auto' --precision='auto'
--compile=False --fidelity='paper' --preset=None --noise_file=None -r/--resume='auto' --limit_train=None
--limit_test=None --full_test_at_end=False
"""
NETWORKS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "preact_resnet18", "preact_narrow"]
# typed values of the release's flags, and what they are read as
RELEASED = (
    "--network resnet152 --train-batch 128 --test-batch 100 --lr 0.1 --schedule 5 10 20 --epochs 40 --workers 0 "
    "--gamma 0.5 --momentum 0 --weight-decay 5e-4 --dataset food --data-root here"
)
READ = {
    **{"network": "resnet152", "train_batch": 128, "test_batch": 100, "lr": 0.1, "schedule": [5, 10, 20]},
    **{"num_epochs": 40, "workers": 0, "gamma": 0.5, "momentum": 0.0, "weight_decay": 5e-4},
    **{"dataset": "food", "data_root": "here"},
}
DIGITS = "--dataset digits --limit_train 8 --train-batch 8 --epochs 1 --device cpu"


def parsed(words: str):
    return parse_args(words.split())


def test_flags_and_defaults_are_the_frozen_ones_and_every_flag_has_a_help_line(capsys):
    actions = make_parser()._actions
    found = [f"{'/'.join(action.option_strings)}={action.default!r}".replace(" ", "") for action in actions]
    assert found == FLAGS.split()
    assert [list(action.choices) for action in actions if action.dest == "network"] == [NETWORKS]
    assert all(action.help and action.help.strip() and "\n" not in action.help for action in actions)
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [option for action in actions for option in action.option_strings if option not in text] == []


def test_the_released_flags_keep_their_names_and_types():
    args = vars(parsed(RELEASED))
    assert {name: (args[name], type(args[name])) for name in READ} == {
        n: (v, type(v)) for n, v in READ.items()
    }


def test_the_released_data_folder_is_the_default():
    assert parsed("").data_root is None and FOLDERS["food"] == "./data/food"


def test_the_released_checkpoint_flag_is_a_name_for_out():
    assert parsed("").out is None
    args = parsed("--checkpoint here")
    assert (args.out, args.checkpoint) == ("here", None)
    assert parsed("--checkpoint here --out there").out == "there"


def test_the_released_devices_are_those_cuda_sees_and_the_swapped_names_say_so_once(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train.main(
        [*DIGITS.split(), "--weight-naive", "1", "--device_ids", "0,3", "--out", str(tmp_path / "run")]
    )
    assert train.os.environ["CUDA_VISIBLE_DEVICES"] == "0,3"
    assert capsys.readouterr().out.count("--weight-naive scales the mixed loss") == 1
    parsed("--weight-afm 0.5")
    [line] = capsys.readouterr().out.splitlines()
    assert "--weight-afm scales the plain loss" in line and "--weight-plain" in line


@pytest.mark.parametrize(
    ("words", "mixed", "plain"),
    [
        ("", 1.5, 0.5),
        ("--weight-mixed 2", 2.0, 0.5),
        ("--weight-plain 0", 1.5, 0.0),
        ("--lam 0.75", 1.5, 0.5),
        ("--lam 0", 0.0, 2.0),
        ("--lam 0.25 --lam-scale 1", 0.25, 0.75),
        ("--lam-scale 1", 1.5, 0.5),
        ("--weight-naive 3", 3.0, 0.5),
        ("--weight-naive 0 --weight-afm 1", 0.0, 1.0),
        ("--weight-naive 3 --weight-plain 1", 3.0, 1.0),
    ],
)
def test_the_weights_of_the_losses(words, mixed, plain):
    """However they are said, the run is the same."""
    same = parsed(f"--weight-mixed {mixed} --weight-plain {plain}")
    assert (same.weight_mixed, same.weight_plain) == (mixed, plain)
    assert vars(parsed(words)) == vars(same)


# presets and settled defaults -------------------------------------------------------------------------------------------


def test_every_preset_parses_and_its_values_arrive():
    for name, section in cli.read_presets(PRESETS).items():
        expected = {flag.replace("-", "_"): value for flag, value in section.items()}
        if "lam" in expected:
            lam = expected.pop("lam")
            expected |= {"weight_mixed": 2 * lam, "weight_plain": 2 * (1 - lam)}
        if "epochs" in expected:
            expected["num_epochs"] = expected.pop("epochs")
        args = vars(parse_args(["--preset", name]))
        assert {flag: args.get(flag) for flag in expected} == expected != {}, name
    args = parsed("--lr 0.2 --preset embedded/digits-sym0.5/afm-k3 --group-size 4")
    assert (args.lr, args.group_size, args.dataset) == (0.2, 4, "digits")


PAPER = {"attention": "relu-sigmoid", "mix_target": "soft", "group_order": "random", "group_rounds": 4}
PAPER |= {"pair_chunks": 1, "sync_bn": True}
RELEASE = {"attention": "complement", "mix_target": "both", "group_order": "halves", "group_rounds": 1}
RELEASE |= {"pair_chunks": 1, "sync_bn": False}
MIXUP = "--mix-at input --weights random --lam 1"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", PAPER),
        ("--fidelity released", RELEASE),
        ("--fidelity released --attention sigmoid", RELEASE | {"attention": "sigmoid"}),
        ("--mix-target soft --fidelity released", RELEASE | {"mix_target": "soft"}),
        ("--fidelity released --pair-chunks 8", RELEASE | {"pair_chunks": 8}),
        ("--fidelity released --sync-bn", RELEASE | {"sync_bn": True}),
        ("--fidelity released --group-rounds 3", RELEASE | {"group_rounds": 3}),
        (f"{MIXUP} --group-rounds 1", PAPER | {"group_order": "halves", "group_rounds": 1}),
        ("", {"pretrained": "imagenet", "noise_type": "given"}),
        ("--dataset clothing1m", {"pretrained": "imagenet", "noise_type": "given"}),
        ("--dataset cifar10 --pretrained here.pt", {"pretrained": "here.pt", "noise_type": "symmetric"}),
        ("--dataset digits --noise_file labels.npy", {"pretrained": "none", "noise_type": "given"}),
    ],
)
def test_fidelity_and_data_set_decide_unless_a_flag_is_typed(words, expected):
    args = vars(parsed(words))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(("fidelity", "chunks"), [("paper", 1), ("released", 8)])
def test_under_torchrun_the_releases_pairs_are_inside_each_processs_piece(
    fidelity, chunks, monkeypatch, capsys
):
    for name, value in {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "8", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert parsed(f"--fidelity {fidelity}").pair_chunks == chunks
    assert parsed(f"--fidelity {fidelity} --group-order random").pair_chunks == 1
    assert parsed(f"--fidelity {fidelity} --group-order halves --pair-chunks 2").pair_chunks == 2
    with pytest.raises(SystemExit) as stop:
        parsed(MIXUP)
    assert stop.value.code == 2 and "runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "AFM (K=2)"),
        ("--lam 0", "CE"),
        ("--weights random --group-size 4", "feature mixup, random weights (K=4)"),
        ("--weights uniform --group-rounds 2", "feature mixup, uniform weights (K=2, group_rounds 2)"),
        ("--detach-target --interaction concat", "AFM (K=2, detach_target True, interaction concat)"),
        ("--fidelity released --group-rounds 4", "AFM (K=2, group_rounds 4)"),
        ("--fidelity released --mix-target soft", "AFM (K=2, mix_target soft)"),
        (MIXUP, "mixup"),
    ],
)
def test_the_method_is_named_after_what_is_left_of_it(words, name):
    assert method(parsed(words)) == name


def test_the_readme_names_the_presets_it_shows():
    text = (PRESETS.parent / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"--preset ([a-z0-9/.+-]+)", text))
    assert shown and shown <= set(cli.read_presets(PRESETS))


def test_the_learning_rate_of_the_release_and_of_fine_tuning():
    rates = [train.learning_rate(parsed(""), epoch) for epoch in range(1, 31)]
    assert rates == pytest.approx([0.01] * 15 + [0.001] * 10 + [0.0001] * 5)
    args = parsed("--preset clothing1m/noisy+clean/afm --finetune-lr 0.5")
    rates = [train.learning_rate(args, epoch) for epoch in range(1, 21)]
    assert rates == pytest.approx([0.01] * 5 + [0.001] * 5 + [0.0001] * 5 + [0.5] * 5)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--data-root elsewhere", "dataset_food-seed_0"),
        ("--dataset digits --seed 3", "dataset_digits-noise_type_symmetric-noise_rate_0.5-seed_3"),
        ("--fidelity released", "dataset_food-fidelity_released-seed_0"),
        ("--dataset clothing1m --lr 0.1", "dataset_clothing1m-train_on_noisy-seed_0-lr_0.1"),
    ],
)
def test_the_run_directory_says_what_was_run(words, name):
    assert directory_name(parsed(words)) == name


# refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--group-size 1", "--group-size: .*at least 2.*got 1"),
        ("--group-size 3 --fidelity released", "--group-size: .*got 3.*--attention relu-sigmoid"),
        ("--train-on noisy+clean", "--train-on: .*clothing1m.*digits"),
        (
            "--dataset clothing1m --train-on noisy+clean --finetune-epochs 1",
            "--finetune-epochs: .*below --epochs 1",
        ),
        ("--lam 0.5 --weight-mixed 1", "--lam: .*--weight-mixed"),
        ("--lam 0.5 --weight-afm 1", "--lam: .*--weight-plain"),
        ("--lam 1.1", "--lam: .*got 1.1"),
        ("--lam-scale 0", "--lam-scale: .*got 0"),
        ("--weight-naive 1 --weight-mixed 1", "--weight-naive: .*--weight-mixed"),
        ("--weight-afm 1 --weight-plain 1", "--weight-afm: .*--weight-plain"),
        ("--weight-mixed 0 --weight-plain 0", "--weight-plain: .*both"),
        ("--weight-mixed -1", "--weight-mixed: .*got -1"),
        ("--mix-at input", "--mix-at: .*--weights random"),
        ("--mix-at input --weights random", "--mix-at: .*--lam 1"),
        (f"{MIXUP} --group-size 3", "--mix-at: .*--group-size 2"),
        (f"{MIXUP} --group-rounds 2", "--mix-at: .*--group-rounds 2"),
        (f"{MIXUP} --group-order random", "--mix-at: .*--group-order random"),
        ("--mix-alpha 0", "--mix-alpha: .*got 0"),
        ("--interaction max", "--interaction: .*max.*choose from .*sum.*concat.*mul"),
        ("--pair-chunks 0", "--pair-chunks: .*got 0"),
        ("--pair-chunks 2", "--pair-chunks: 2 pieces .*--group-order halves"),
        (
            "--network preact_resnet18 --pretrained imagenet",
            "--pretrained imagenet: .*--network preact_resnet18; use",
        ),
        ("--pretrained imagenet", "--pretrained imagenet"),
        ("--pretrained nosuch.pt", "--pretrained nosuch.pt: no such file"),
        ("--noise-type given", "--noise-type given: .*--noise_file"),
        ("--dataset nosuch", "nosuch"),
        ("--dataset food --data-root /nosuch", "/nosuch"),
        ("--train-batch 9", "--train-batch 9: there are only 8"),
        ("--schedule 0", "--schedule: .*got 0"),
        ("--gamma 0", "--gamma: .*got 0"),
        ("--lr inf", "--lr: .*got inf"),
        ("--momentum 2", "--momentum: .*got 2"),
        ("--epochs 0", "--epochs: .*got 0"),
        ("--workers -1", "--workers: .*got -1"),
        ("--preset nosuch", "preset nosuch: choose from .*embedded/"),
        ("--weight-deca 1", "unrecognized arguments: --weight-deca"),
    ],
)
def test_what_cannot_be_is_refused_with_status_2_and_one_line(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(train.main, [*DIGITS.split(), "--out", "run", *words.split()])
    assert stop.value.code == 2
    assert re.fullmatch(rf"[^\n]*error: [^\n]*{line}[^\n]*\n", capsys.readouterr().err)
    assert not Path("run").exists()
