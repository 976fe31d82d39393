"""The commands of the releases' READMEs, word for word: they parse."""

import importlib
import shlex

import pytest

COMMANDS = {
    "afm.train": [""],
    "sfa.Train_cifar": [
        "--dataset cifar10 --noise_ratio 0.5 --imb_factor 0.01 --data_path path_to_your_data",
        "--noise_ratio 0.5 --imb_factor 0.01",
    ],
    "sfa.Train_webvision": ["--data_path path_to_your_data"],
    "me_momentum.main": [
        "--dataset mnist --noise_type instance --noise_rate 0.2",
        "--dataset cifar10 --noise_type symmetric --noise_rate 0.2",
        "--dataset cifar100 --noise_type symmetric --noise_rate 0.4",
    ],
    "me_momentum.Clothing": [""],
    "manifold_dividemix.train_semisup": [
        "--weights finetune --data-dir /path/to/cifar100 --exp-dir --pretrained --arch resnet18 --ood-ratio 0.2 "
        "--noise-ratio 0.2 --warmup-epoch 20 --epochs 300 --clustering True --lr-head 0.2 --lr-backbone 0.002 --interval 10"
    ],
    "manifold_dividemix.train_semisup_miniimagenet": [
        "--weights finetune --data-dir /path/to/mini --exp-dir --pretrained --arch resnet18 --noise-ratio 0.2 --warmup-epoch 10 "
        "--epochs 50 --clustering True --lr-head 0.2 --lr-backbone 0.002 --interval 10"
    ],
}


@pytest.mark.parametrize(
    ("script", "words"), [(script, words) for script, of in COMMANDS.items() for words in of]
)
def test_the_releases_own_commands_are_understood(script, words):
    module = importlib.import_module(script)
    args, usual = module.parse_args(shlex.split(words)), module.parse_args([])
    if "--exp-dir" in words:  # placeholders in the release's README
        assert (args.out, args.pretrained, args.clustering) == (usual.out, usual.pretrained, True)
        assert module.parse_args(["--no-clustering"]).clustering is False
        with pytest.raises(SystemExit):
            module.parse_args(["--clustering", "perhaps"])
