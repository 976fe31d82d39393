"""The command lines of the three scripts: the release's flags, ours, and what is refused before anything is written."""

import re

import pytest
import safetensors.torch
import torch

from common.gpu import processes
from common.pretraining.flags import add_recipe_flags
from common.runs import cli
from manifold_dividemix import flags, pretrain, train_semisup, train_semisup_miniimagenet
from manifold_dividemix.networks import make_encoder

CIFAR, MINI = "train_semisup.py", "train_semisup_miniimagenet.py"
SCRIPTS = {CIFAR: train_semisup, MINI: train_semisup_miniimagenet, "pretrain.py": pretrain}

# frozen: a change of a name, a default, a type or a choice is a change for every user. *: a flag of the release
OPEN_SET = """--dataset cifar100
* --data-dir,--data_path ./data place
* --corruption None
--ood-dir None place
* --ood-ratio 0.2 fraction
--open-set-cache None place
* --num-class 100 count
"""
NOISE = """* --noise-type {default} {types}
* --noise-ratio 0.2 fraction
"""
DRAWN = """--posterior None place
--noise-seed 0 seed
--label-rng python python|numpy
"""
FILES = """--img-size 32 count
--on_bad_image error error|skip
--decoded None place
"""
TRAINING = """* --arch resnet18 resnet18|resnet34|resnet50|resnet101|narrow
* --pretrained save/last.pth place
* --weights finetune finetune|freeze
* --epochs {epochs} count
* --warmup-epoch {warm_up} count_or_zero
* --batch-size 64 count
* --lr-backbone 0.03 positive
* --lr-head 0.3 positive
* --weight-decay 0.0005 non_negative
* --momentum 0.9 fraction
--bn-mode None train|frozen|warm-up
* --gpu 0 count_or_zero
* --remove-ood 0.01 fraction
--ood-start-factor {factor} non_negative
--knn-k 10 count
--knn-encoder current current|pretrained
* --clustering False _switch
--no-clustering True
* --interval 30 count
* --p-threshold 0.3 fraction
--selection gmm gmm|none
* --lambda_x 1 non_negative
* --lambda_u 100 non_negative
* --lambda_xe 1 non_negative
* --lambda_ue 100 non_negative
* --lambda_c 1 non_negative
* --temperature 0.5 positive
* --alpha 4 positive
* --thr_un 0.9 fraction
* --LN-loss RL RL|CE
--rce released released|log
--ramp None fixed|released
--warmup-mask None sample|released
--warmup-loss SCE SCE|CE
--cuda_graphs None
--eval-train,--no-eval-train False
* --exp-dir None place
* --print-freq 100 int
* --drops 0.005 float
* --lambda_ce 1 float
* --emb-loss no str
"""
TYPES = "sym|asym|superclass|margin1|margin2|margin3|hard|no|given"
FLAGS = {
    CIFAR: OPEN_SET
    + NOISE.format(default="sym", types=TYPES)
    + DRAWN
    + TRAINING.format(epochs=300, warm_up=5, factor=10)
    + "* --workers 8 count_or_zero\n--image_size 32 count\n--test_split 0.2 fraction\n--on_bad_image error error|skip\n",
    MINI: FILES
    + "* --data-dir,--data_path ./data place\n* --num-class 100 count\n* --workers 8 count_or_zero\n"
    + NOISE.format(default="red", types="red|blue")
    + TRAINING.format(epochs=50, warm_up=10, factor=1),
    "pretrain.py": (OPEN_SET + NOISE.format(default=None, types=f"{TYPES}|red|blue") + DRAWN + FILES)
    .replace("* ", "")
    .replace("--img-size", "--img-size,--image_size")
    + "--test_split 0.2 fraction\n",
}  # fmt: skip


def lines_of(parser: cli.Parser) -> list[str]:
    """The flags of a parser as in the tables."""
    groups = [group for group in parser._action_groups if group.title == "of the release"]
    released = [action for group in groups for action in group._group_actions]
    lines = []
    for action in parser._actions:
        kind = "|".join(action.choices or []) or getattr(action.type, "__name__", "")
        mark = "* " if action in released else ""
        lines.append(f"{mark}{','.join(action.option_strings)} {action.default} {kind}".rstrip())
    return lines


def parse(script: str, words: str = ""):
    return SCRIPTS[script].parse_args(words.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_defaults_types_and_choices_are_the_frozen_ones(script):
    found, usual = lines_of(SCRIPTS[script].make_parser()), cli.Parser()
    if script == "pretrain.py":
        add_recipe_flags(usual)
        usual.add_argument("--arch", choices=TRAINING.split()[3].split("|"), default="resnet18")
        usual.add_argument("--gpu", type=cli.count_or_zero, default=0)
        usual.add_argument("--knn-k", type=cli.count, default=10)
        usual.add_argument("--workers", type=cli.count_or_zero, default=8)
    cli.add_shared_flags(usual, default_seed=123)  # which have tests of their own
    assert found[1:] == FLAGS[script].splitlines() + lines_of(usual)[1:]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_line_and_help_shows_them_all(script, capsys):
    actions = SCRIPTS[script].make_parser()._actions
    for action in actions:
        assert action.help and action.help.strip() and "\n" not in action.help, action.option_strings
        if {*action.option_strings} & {*flags.WITHOUT_EFFECT}:
            assert "no effect" in action.help or script == "pretrain.py"
    with pytest.raises(SystemExit) as stop:
        parse(script, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [option for action in actions for option in action.option_strings if option not in text] == []


@pytest.mark.parametrize("script", [CIFAR, MINI])
def test_switches_are_true_booleans_and_exp_dir_is_out(script):
    for words, value in (("", False), ("--clustering", True), ("--clustering --no-clustering", False),
                         ("--clustering True", True), ("--clustering False", False)):  # fmt: skip
        assert parse(script, words).clustering is value
    assert parse(script, "--out one --exp-dir two").out == "two"
    assert parse(script, "--exp-dir one --out two").out == "two"


# settled defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words", "bn_mode", "ramp", "mask"),
    [
        (CIFAR, "", "train", "fixed", "sample"),
        (MINI, "", "train", "fixed", "sample"),
        (CIFAR, "--fidelity released", "frozen", "released", "batch"),
        (MINI, "--fidelity released", "warm-up", "released", "all"),
        # each quirk alone
        (CIFAR, "--bn-mode frozen", "frozen", "fixed", "sample"),
        (CIFAR, "--ramp released", "train", "released", "sample"),
        (CIFAR, "--warmup-mask released", "train", "fixed", "batch"),
        (MINI, "--warmup-mask released", "train", "fixed", "all"),
        # and typed flags win
        (CIFAR, "--fidelity released --bn-mode train", "train", "released", "batch"),
        (CIFAR, "--ramp fixed --fidelity released", "frozen", "fixed", "batch"),
        (MINI, "--fidelity released --warmup-mask sample", "warm-up", "released", "sample"),
    ],
)
def test_fidelity_decides_each_quirk_unless_it_is_typed(script, words, bn_mode, ramp, mask):
    args, usual = parse(script, words), vars(parse(script))
    assert (args.bn_mode, args.ramp, args.warmup_mask) == (bn_mode, ramp, mask)
    differing = {name for name, value in vars(args).items() if value != usual[name]}
    assert differing <= {"fidelity", "bn_mode", "ramp", "warmup_mask"}
    assert args.num_epochs == args.epochs


@pytest.mark.parametrize(
    ("script", "words", "name", "value"),
    [
        *(
            (script, words, "corruption", pool)
            for script in (CIFAR, "pretrain.py")
            for words, pool in (("", "imagenet32"), ("--dataset digits", "photographs"), ("--corruption mnist", "mnist"))
        ),
        (MINI, "", "dataset", "mini_imagenet"),
        ("pretrain.py", "", "noise_type", "sym"),
        ("pretrain.py", "--dataset mini_imagenet", "noise_type", "red"),
        ("pretrain.py", "--noise-type asym", "noise_type", "asym"),
        ("pretrain.py", "--noise-type margin1", "noise_type", "no"),
        ("pretrain.py", "", "warm", True),
        ("pretrain.py", "--batch_size 256", "warm", False),
        ("pretrain.py", "", "knn_every", 10),
        ("pretrain.py", "--dataset digits", "knn_every", 1),
        ("pretrain.py", "--epochs 7", "num_epochs", 7),
    ],
)  # fmt: skip
def test_settled_defaults(script, words, name, value):
    assert getattr(parse(script, words), name) == value


@pytest.mark.parametrize("script", [CIFAR, MINI])
def test_a_warm_up_that_never_ends_gives_one_note(script, capsys, monkeypatch):
    parse(script, "--selection none --warmup-epoch 300")
    assert capsys.readouterr().out == ""
    parse(script, "--epochs 5 --warmup-epoch 5")
    assert capsys.readouterr().out == "note: warm-up only, --warmup-epoch 5 is not below --epochs 5\n"
    monkeypatch.setattr(processes, "rank", lambda: 1)  # of several processes the first alone says so
    parse(script, "--epochs 5 --warmup-epoch 5")
    assert capsys.readouterr().out == ""


# names of runs and results ----------------------------------------------------------------------------------------------

IN_MEMORY = "dataset_cifar100-corruption_imagenet32-noise_ratio_0.2-ood_ratio_0.2-seed_123"
OF_FILES = "dataset_mini_imagenet-noise_type_red-noise_ratio_0.2-img_size_32-seed_123"


@pytest.mark.parametrize(
    ("name", "script", "words", "directory"),
    [
        ("cifar", CIFAR, "", IN_MEMORY),
        ("cifar", CIFAR, "--out somewhere --noise-type asym --seed 123", f"{IN_MEMORY}-noise_type_asym"),
        # in the order of the flags, whatever the order in which they are typed
        ("cifar", CIFAR, "--fidelity released --rce log --clustering --noise-seed 2",
         f"{IN_MEMORY}-noise_seed_2-clustering_True-rce_log-fidelity_released"),
        ("mini_imagenet", MINI, "", OF_FILES),
        ("mini_imagenet", MINI, "--fidelity released", f"{OF_FILES}-fidelity_released"),
        ("mini_imagenet", MINI, "--warmup-mask released", f"{OF_FILES}-warmup_mask_all"),
        ("pretrain", "pretrain.py", "", "pretrain-dataset_cifar100-epochs_1000-seed_123-corruption_imagenet32-ood_ratio_0.2"),
        ("pretrain", "pretrain.py", "--dataset digits --epochs 30 --batch_size 64",
         "pretrain-dataset_digits-epochs_30-seed_123-corruption_photographs-ood_ratio_0.2-batch_size_64"),
        ("pretrain", "pretrain.py", "--dataset mini_imagenet --noise-type blue",
         "pretrain-dataset_mini_imagenet-epochs_1000-seed_123-noise_type_blue-noise_ratio_0.2"),
    ],
)  # fmt: skip
def test_the_run_directory_is_named_by_what_differs(name, script, words, directory):
    assert getattr(flags, f"{name}_directory")(parse(script, words)) == directory


OURS = "Manifold DivideMix"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--warmup-loss CE --lambda_xe 0", OURS),
        ("--lambda_ue 0", OURS),
        ("--lambda_xe 0 --lambda_ue 0", f"{OURS} without manifold mixup"),
        ("--lambda_c 0", f"{OURS} without contrastive loss"),
        ("--remove-ood 0 --lambda_xe 0 --lambda_ue 0", f"{OURS} without OOD removal and manifold mixup"),
        ("--knn-encoder pretrained --remove-ood 0", f"{OURS} without OOD removal, scored by the pre-trained encoder"),
        ("--selection none --remove-ood 0 --pretrained none --warmup-loss CE", "CE"),
        ("--selection none --remove-ood 0", "SCE (pre-trained)"),
        ("--selection none --warmup-loss CE", "CE (pre-trained) with OOD removal"),
    ],
)  # fmt: skip
def test_the_method_is_named_by_what_is_left_out(words, name):
    for script in (CIFAR, MINI):
        assert flags.method(parse(script, words)) == name


@pytest.mark.parametrize(
    ("script", "words", "noise", "rate", "profile"),
    [
        (CIFAR, "", "sym + imagenet32", 0.2, "paper"),
        (CIFAR, "--epochs 299", "sym + imagenet32", 0.2, "short"),
        (CIFAR, "--dataset digits --epochs 300", "sym + photographs", 0.2, "embedded"),
        (CIFAR, "--ood-ratio 0 --noise-type asym --noise-ratio 0.4", "asym", 0.4, "paper"),
        # the default ratio is not of labels then
        (CIFAR, "--noise-type no", "no + imagenet32", 0.0, "paper"),
        (CIFAR, "--noise-type given", "given + imagenet32", None, "paper"),
        (CIFAR, "--noise_file some/labels.npy", "labels.npy + imagenet32", None, "paper"),
        (MINI, "--img-size 84", "red", 0.2, "paper"),
        (MINI, "--noise-type blue --noise-ratio 0.6 --epochs 49", "blue", 0.6, "short"),
        (MINI, "--noise_file some/labels.csv --img-size 16", "labels.csv", None, "short"),
    ],
)
def test_a_result_row_names_what_was_trained_on(script, words, noise, rate, profile):
    args, cell = parse(script, words), flags.cifar_cell if script == CIFAR else flags.mini_imagenet_cell
    columns = {
        "dataset": "few",
        "noise_type": noise,
        "noise_rate": rate,
        "imb_factor": None,
        "profile": profile,
    }
    assert cell(args, "few") == {**columns, "ood_ratio": args.ood_ratio if script == CIFAR else None}


# presets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.read_presets(flags.PRESETS))
def test_every_preset_parses_by_its_own_script_alone_and_its_values_arrive(name, capsys):
    section = cli.read_presets(flags.PRESETS)[name]
    for script in SCRIPTS:
        if script == section.get("script", CIFAR):
            args = vars(parse(script, f"--preset {name}"))
            continue
        with pytest.raises(SystemExit) as stop:
            parse(script, f"--preset {name}")
        assert stop.value.code == 2 and f"preset {name} is for " in capsys.readouterr().err
    values = {flag: value for flag, value in section.items() if flag not in ("script", "encoder")}
    for flag, value in values.items():
        dest = {"data-dir": "data_path", "exp-dir": "out"}.get(flag, flag.replace("-", "_"))
        assert args[dest] == value, flag


def test_an_encoder_of_a_preset_is_that_of_a_preset_of_pre_training_on_the_same_images():
    sections = cli.read_presets(flags.PRESETS)
    using = {name: section["encoder"] for name, section in sections.items() if "encoder" in section}
    assert using
    encoders = {name: parse("pretrain.py", f"--preset {name}") for name in {*using.values()}}
    for name, encoder in using.items():
        script = sections[name].get("script", CIFAR)
        own, its = parse(script, f"--preset {name}"), encoders[encoder]
        # what decides the images: the pool, or the list
        alike = ["noise_type", "noise_ratio", "img_size"] if script == MINI else ["corruption", "ood_ratio"]
        for flag in ("dataset", "arch", *alike):
            assert getattr(own, flag) == getattr(its, flag), name


# refusals ---------------------------------------------------------------------------------------------------------------


def refused(script: str, argv: list[str], capsys) -> str:
    """The one line that the script ends with, and status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(SCRIPTS[script].main, argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", text), text
    return text


# what would end soon if it were not refused
QUICK = {
    CIFAR: "--dataset digits --ood-ratio 0 --pretrained none --epochs 1 --warmup-epoch 1 --limit_train 32 --device cpu",
    MINI: "--data-dir nosuch --pretrained none --epochs 1 --warmup-epoch 1 --device cpu",
    "pretrain.py": "--dataset digits --ood-ratio 0 --epochs 1 --batch_size 16 --limit_train 32 --device cpu",
}
REFUSED = [
    *(
        (script, *case)
        for script in (CIFAR, MINI)
        for case in (
            ("--batch-size 1", "--batch-size: must be at least 2, got 1"),
            ("--knn-encoder pretrained", "--knn-encoder: pretrained needs .*got --pretrained none"),
            ("--clustering perhaps", "--clustering: .*perhaps"),
            ("--cuda_graphs", "--cuda_graphs: .*five forward passes"),
            ("--lr-head nan", "--lr-head.*: .*got nan"),
            ("--warmup-mask batch", "--warmup-mask.*: .*batch.*choose from .*sample.*released"),
            ("--preset nosuch", "preset nosuch: choose from .*embedded/"),
        )
    ),
    (CIFAR, "--dataset nosuch", "nosuch: choose from .*cifar100"),
    (CIFAR, "--dataset cifar100 --data-dir nosuch", "cifar100 not found.*nosuch"),
    (CIFAR, "--noise-type superclass", "--noise-type superclass.*10 classes"),
    (CIFAR, "--ood-ratio 0.6 --noise-ratio 0.5", "--noise-ratio 0.5 and --ood-ratio 0.6 .* together at most 1"),
    (CIFAR, "--ood-ratio 0.6 --noise-ratio 0.5 --noise_file nosuch.npy", "nosuch.npy: no such file"),
    (CIFAR, "--noise-type given", "--noise_file"),  # digits have no noisy labels
    (CIFAR, "--ood-ratio 0.2 --corruption nosuch", "nosuch: choose from .*imagenet32"),
    (CIFAR, "--ood-ratio 0.2 --corruption digits", "--corruption digits: .*training images themselves"),
    (CIFAR, "--ood-ratio 0.2 --corruption imagenet32", "not found.*imagenet32.*train_data_batch_1.*--ood-dir"),
    (CIFAR, "--ood-ratio 0.2 --corruption place365", "no images found in .*places365: .* --ood-dir"),
    (CIFAR, "--pretrained save/last.pth", "--pretrained save/last.pth: no such file; make an encoder .*pretrain.py.*none"),
    (CIFAR, "--remove-ood 0.1", "--remove-ood 0.1: 32 of 32 images would be removed.*smaller"),
    (CIFAR, "--limit_train 1", "one training image has no neighbours: use a larger --limit_train"),
    (CIFAR, "--img-size 32", "unrecognized arguments: --img-size"),
    (MINI, "", "not found.*nosuch"),
    (MINI, "--ood-ratio 0.2", "unrecognized arguments: --ood-ratio"),  # as in the release
    ("pretrain.py", "--noise_file labels.npy", "--noise_file: no label is used .*got labels.npy"),
    ("pretrain.py", "--noise-type red", "--noise-type: red is not for --dataset digits"),
    ("pretrain.py", "--dataset mini_imagenet --noise-type asym", "asym is not for --dataset mini_imagenet"),
    ("pretrain.py", "--drop_last --batch_size 64", "--drop_last: a batch of 64 is more than all 32 images"),
    ("pretrain.py", "--limit_train 1", "one training image has no neighbours"),
    # a run that diverges: its embeddings are not finite either, of which there is no area under a curve
    (CIFAR, "--ood-ratio 0.2 --lr-backbone 1e30 --lr-head 1e30 --epochs 2", "losses of training samples are not finite"),
    ("pretrain.py", "--ood-ratio 0.2 --lr 1e30 --no-warm", "loss is nan at epoch 1"),
    (CIFAR, "--ood-ratio 0.2 --pretrained nan.safetensors", "loss is nan at epoch 1"),
    (CIFAR, "--pretrained damaged.safetensors", "damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "words", "line"), REFUSED)
def test_what_cannot_be_ends_in_status_2_and_one_line_naming_it(
    script, words, line, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if ".safetensors" in words:
        weights = make_encoder("resnet18", 1, 8).state_dict()
        weights["conv1.weight"] *= torch.nan
        path = tmp_path / words.split()[-1]
        path.write_bytes(b"no weights" if "damaged" in words else safetensors.torch.save(weights))
    before = {*tmp_path.iterdir()}
    text = refused(script, f"{QUICK[script]} --out run {words}".split(), capsys)
    assert re.search(line, text), text
    if "is nan" in line or "not finite" in line:
        assert not (tmp_path / "run" / "result.json").exists()
    else:
        assert {*tmp_path.iterdir()} == before
