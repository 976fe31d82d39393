"""The command lines of all training scripts, in tables: flags, settled defaults, names of runs and cells, presets, refusals."""

import itertools
import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from afm import flags as afm_flags
from afm import train
from common.runs import cli
from manifold_dividemix import flags as manifold_flags
from manifold_dividemix import pretrain as manifold_pretrain
from manifold_dividemix import train_semisup, train_semisup_miniimagenet
from manifold_dividemix.networks import make_encoder
from me_momentum import Clothing, main
from me_momentum import flags as me_momentum_flags
from sanm import Train_cifar as sanm_cifar
from sanm import Train_clothing1M
from sanm import flags as sanm_flags
from sanm import pretrain as sanm_pretrain
from sanm.networks import simclr_resnet
from sfa import Train_cifar, Train_webvision
from sfa import flags as sfa_flags
from tests.common.small_file_data import make_webvision

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

# of each paper the first one's presets name no script
SCRIPTS = {
    "afm": train,
    "sfa": Train_cifar,
    "sfa_webvision": Train_webvision,
    "me_momentum": main,
    "me_momentum_clothing": Clothing,
    "manifold": train_semisup,
    "manifold_mini": train_semisup_miniimagenet,
    "manifold_pretrain": manifold_pretrain,
    "sanm": sanm_cifar,
    "sanm_clothing": Train_clothing1M,
    "sanm_pretrain": sanm_pretrain,
}
FLAGS = (afm_flags, sfa_flags, me_momentum_flags, manifold_flags, sanm_flags)


def parse(script: str, words: str = "") -> Namespace:
    return SCRIPTS[script].parse_args(words.split())


def cases(table: str) -> list[tuple[str, ...]]:
    """A case of each line, `words => expected => ...`, for each script of the line above it that ends in a colon."""
    scripts, found = [], []
    for line in filter(None, map(str.strip, table.splitlines())):
        if line.endswith(":"):
            scripts = line[:-1].split()
        else:
            found += [(script, *(part.strip() for part in line.split("=>"))) for script in scripts]
    return found


@pytest.fixture(autouse=True)
def without_cards(monkeypatch):
    """As on a machine without cards, where nobody started torchrun."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


# names, defaults, types and choices -------------------------------------------------------------------------------------

# Frozen: a change of one is a change for every user. OPTIONS=DEFAULT:TYPE or CHOICES, with the attribute after -> where it
# has another name; * is a flag of the release, ! one whose help says that it has no effect
SHARED = """
--out=None:place --seed=SEED:seed --device='auto':auto|cpu|cuda|mps --precision='auto':auto|fp32|bf16 --compile=False
--fidelity='paper':paper|released --preset=None --noise_file=None:place -r,--resume='auto':auto|never|anyway
--limit_train=None:count --limit_test=None:count --full_test_at_end=False
"""
SEEDS = {"afm": 0, "me_momentum": 1, "me_momentum_clothing": 1}  # elsewhere 123
NOISE = "symmetric|pairflip|oneflip|symmetric_inclusive|asymmetric|superclass|instance|margin1|margin2|margin3|hard"
SIMCLR = """
--epochs=1000:count --batch_size=1024:count --drop_last,--no-drop_last=False --lr,--learning_rate=0.5:positive
--momentum=0.9:fraction --weight_decay=0.0001:non_negative --temp=0.5:positive --cosine,--no-cosine=True
--lr_decay_epochs=[700,800,900](+):count --lr_decay_rate=0.1:positive --warm,--no-warm=None --warmup_epochs=10:count
--knn_every=None:count --cuda_graphs=None
"""


def mixematch(epochs: int, warm_up: int, start: int) -> str:
    """The flags of both training scripts of Manifold DivideMix."""
    return f"""
*--arch='resnet18':resnet18|resnet34|resnet50|resnet101|narrow *--pretrained='save/last.pth'(?):place
*--weights='finetune':finetune|freeze *--epochs={epochs}:count *--warmup-epoch={warm_up}:count_or_zero *--batch-size=64:count
*--lr-backbone=0.03:positive *--lr-head=0.3:positive *--weight-decay=0.0005:non_negative *--momentum=0.9:fraction
--bn-mode=None:train|frozen|warm-up *--gpu=0:count_or_zero *--remove-ood=0.01:fraction
--ood-start-factor={start}:non_negative --knn-k=10:count --knn-encoder='current':current|pretrained
*--clustering=False(?):_switch --no-clustering->clustering=True *--interval=30:count *--p-threshold=0.3:fraction
--selection='gmm':gmm|none *--lambda_x=1:non_negative *--lambda_u=100:non_negative *--lambda_xe=1:non_negative
*--lambda_ue=100:non_negative *--lambda_c=1:non_negative *--temperature=0.5:positive *--alpha=4:positive
*--thr_un=0.9:fraction *--LN-loss='RL':RL|CE --rce='released':released|log --ramp=None:fixed|released
--warmup-mask=None:sample|released --warmup-loss='SCE':SCE|CE --cuda_graphs=None --eval-train,--no-eval-train=False
*--exp-dir->out=None(?):place *!--print-freq=100:int *!--drops=0.005:float *!--lambda_ce=1:float *!--emb-loss='no':str
"""


FROZEN = {
    "afm": """
*--dataset='food' *--data-root,--data_path=None:place --train-on='noisy':noisy|noisy+verified|noisy+clean
--noise-type='symmetric':NOISE|given|none
--noise-rate=0.5:fraction --posterior=None:place --on_bad_image='error':error|skip --image-cache=None:place
*--workers=4:count_or_zero --decode='cpu':cpu|gpu --image_size=32:count --test_split=0.2:fraction
*--network='resnet50':resnet18|resnet34|resnet50|resnet101|resnet152|preact_resnet18|preact_narrow
--pretrained=None:place --shared-classifier,--no-shared-classifier=True --group-size=2:count --group-rounds=None:count
--group-order=None:halves|random --pair-chunks=None:count --interaction='sum':sum|concat|mul
--attention=None:relu-sigmoid|sigmoid|softmax|complement --attn-hidden=0:count_or_zero
--weights='attentive':attentive|uniform|random --mix-alpha=1.0:positive --mix-target=None:soft|both
--detach-target=False --mix-at='feature':feature|input --weight-mixed=None:non_negative
--weight-plain=None:non_negative --lam=None:fraction --lam-scale=2.0:positive *--weight-naive=None:non_negative
*--weight-afm=None:non_negative *--train-batch=256:count *--test-batch=200:count *--lr=0.01:positive
*--schedule=[15,25](+):count *--gamma=0.1:positive *--epochs->num_epochs=30:count --finetune-epochs=5:count
--finetune-lr=0.001:positive *--momentum=0.9:fraction *--weight-decay=0.0001:non_negative --sync-bn,--no-sync-bn=None
--save-every=0:count_or_zero *--checkpoint=None:place *--device_ids=None
""",
    "sfa": """
*--dataset='cifar10' *--data_path='./data':place *--imb_type='exp':exp|step|none *--imb_factor=0.01:positive
*--noise_mode='imb':imb|sym|margin1|margin2|margin3|hard|given *--noise_ratio=0.5:fraction --posterior=None:place
*!--num_class=10:count *--batch_size=64:count *--lr,--learning_rate=0.02:positive --lr_drop=150:count
*--num_epochs=200:count *-w,--warm_up=30:count *--alpha=4:positive *--lambda_u=25:non_negative *--T=0.5:positive
*--arch='resnet18':resnet18|narrow *--gpuid=0:count_or_zero --cuda_graphs=None
--loss='ce':ce|ldam|gce|sce|logit_adjusted|balanced_softmax --ldam_margin=0.5:positive --ldam_scale=30:positive
--gce_q=0.7:positive --sce_ce=None:non_negative --sce_rce=None:non_negative --adjustment_tau=1:positive
--selection='sfa':sfa|gmm|none *--p_threshold=0.5:fraction *--beta=0.99:fraction *--phi=1.005:positive
*--sample_rate=1:count --min_draw_count=None:count_or_zero --ema_mode=None:persist|released --mixture='em':em|sklearn
--image_size=32:count --test_split=0.2:fraction --on_bad_image='error':error|skip --workers=4:count_or_zero
""",
    "sfa_webvision": """
--dataset='webvision':webvision|folder --test_split=0.2:fraction
*--data_path='./webvision/':place --imagenet=None:place *--num_class=50:count --imb_type='exp':exp|step
--imb_factor=1:positive --image_size=299:count --on_bad_image='error':error|skip --image_cache=None:place
--workers=8:count_or_zero --decode='cpu':cpu|gpu --network='inception_resnet_v2':inception_resnet_v2|resnet50|resnet18
*!--feat_size=1536:count *--batch_size=32:count *--lr,--learning_rate=0.01:positive --lr_drop=50:count
*--num_epochs=100:count *--alpha=0.5:positive *!--lambda_u=0:non_negative *--T=0.5:positive
--reset_momentum=None:yes|no *--gpuid1=0:count_or_zero *--gpuid2=1:count_or_zero --parallel=None:none|networks|data
*--p_threshold=0.5:fraction --beta=0.9:fraction --phi=1.005:positive --sample_rate=1:count
--min_draw_count=0:count_or_zero --ema_mode=None:persist|released
""",
    "me_momentum": """
*--dataset='mnist' *--data_path='./data':place
*--noise_type='symmetric':NOISE|given
*--noise_rate=0.2:fraction --posterior=None:place *--data_percent=0.9:fraction
--network='auto':auto|lenet|resnet18|resnet34|small|preact_resnet18|preact_narrow --stem_padding=0:count_or_zero
*--lr=0.01:positive *--weight_decay=0.0001:non_negative *--batch_size=128:count *--n_epoch->num_epochs=100:count
--cuda_graphs,--no-cuda_graphs=False *--model_dir=None:place --selection='confident':confident|none
*--max_outer_loop=3:count *--max_inner_loop=20:count --es_step=0.1:positive --es_limit=2.0:non_negative
--select_view='train':train|test --val_view='train':train|test --legacy_batch_mean,--no-legacy_batch_mean=None
--image_size=32:count --test_split=0.2:fraction --on_bad_image='error':error|skip --workers=4:count_or_zero
""",
    "me_momentum_clothing": """
*--data_root,--data_path='data/Clothing1M_Official/':place *--num_classes=14:count
--dataset='clothing1m':clothing1m|folder --test_split=0.2:fraction --image_size=256:count
--on_bad_image='error':error|skip --image_cache=None:place --workers=8:count_or_zero --decode='cpu':cpu|gpu
--network='resnet50':resnet50|resnet18 --pretrained=None:place *--pretrain=True --no_pretrain->pretrain=True
--selection='confident':confident|none *--beta=0.45:fraction *--n_epoch=5:count *--max_inner_loop=6:count
*--max_outer_loop=3:count *--lr=0.005:positive *--weight_decay=0.001:non_negative *--batch_size=32:count
--sync_bn,--no-sync_bn=None --legacy_batch_mean,--no-legacy_batch_mean=None *--model_dir=None:place
""",
    "manifold": f"""
--dataset='cifar100' *--data-dir,--data_path='./data':place *--corruption=None --ood-dir=None:place
*--ood-ratio=0.2:fraction --open-set-cache=None:place *!--num-class=100:count
*--noise-type='sym':sym|asym|superclass|margin1|margin2|margin3|hard|no|given *--noise-ratio=0.2:fraction
--posterior=None:place --noise-seed=0:seed --label-rng='python':python|numpy
{mixematch(300, 5, 10)}
*--workers=8:count_or_zero --image_size=32:count --test_split=0.2:fraction --on_bad_image='error':error|skip
""",
    "manifold_mini": f"""
--img-size=32:count --on_bad_image='error':error|skip --decoded=None:place *--data-dir,--data_path='./data':place
*!--num-class=100:count *--workers=8:count_or_zero *--noise-type='red':red|blue *--noise-ratio=0.2:fraction
{mixematch(50, 10, 1)}
""",
    "manifold_pretrain": f"""
--dataset='cifar100' --data-dir,--data_path='./data':place --corruption=None --ood-dir=None:place
--ood-ratio=0.2:fraction --open-set-cache=None:place !--num-class=100:count
--noise-type=None:sym|asym|superclass|margin1|margin2|margin3|hard|no|given|red|blue --noise-ratio=0.2:fraction
--posterior=None:place --noise-seed=0:seed --label-rng='python':python|numpy --img-size,--image_size=32:count
--on_bad_image='error':error|skip --decoded=None:place --test_split=0.2:fraction
{SIMCLR}
--arch='resnet18':resnet18|resnet34|resnet50|resnet101|narrow --gpu=0:count_or_zero
--knn-k=10:count --workers=8:count_or_zero
""",
    "sanm": """
*--dataset='cifar10' *--data_path='./data':place *--noise_mode='sym':sym|asym|margin1|margin2|margin3|hard|given
*--r=0.5:fraction --posterior=None:place *--num_class=10:count *--check_path='' *--id='' --base='c2d':dividemix|c2d
--arch='auto':auto|narrow --pretrained=None:place --released-softmax,--no-released-softmax=None
--selection='gmm':gmm|none *--batch_size=64:count *--lr,--learning_rate=0.02:positive --lr_drop=150:count
*--num_epochs=360:count --warm_up=None:count --warm-up-views='strong':strong|weak *--alpha=4:positive
*--lambda_u=25:non_negative *--T=0.5:positive *--p_threshold=0.5:fraction *--gpuid=0:count_or_zero --cuda_graphs=None
--masking='adversarial':adversarial|none --mask-lo=0.02:fraction --mask-hi=0.07:fraction --mask-quality=0.03:fraction
--mask-anchor=None:corner|centre --clamp-targets=False --recon-weight=0.02:non_negative
--ref-views='strong':strong|weak --image_size=32:count --test_split=0.2:fraction --on_bad_image='error':error|skip
--workers=4:count_or_zero
""",
    "sanm_clothing": """
*--data_path='./Dataset/noise_label_data/Clothing1M':place *--num_batches=15625:count *--num_class=14:count
--dataset='clothing1m':clothing1m|folder --test_split=0.2:fraction
--image_size=224:count --on_bad_image='error':error|skip --image_cache=None:place --workers=5:count_or_zero
--decode='cpu':cpu|gpu
*--id='clothing1m' --network='resnet50':resnet50|resnet18 --pretrained='imagenet':place *--batch_size=8:count
*--lr,--learning_rate=0.0009:positive --lr_drop=40:count *--num_epochs=80:count *--alpha=0.5:positive
*--lambda_u=0:non_negative *--T=0.5:positive *--p_threshold=0.5:fraction --sync_bn,--no-sync_bn=None
*--gpuid=0:count_or_zero --masking='adversarial':adversarial|none --mask-lo=0.06:fraction --mask-hi=0.13:fraction
--mask-quality=0.1:fraction --mask-anchor=None:corner|centre --clamp-targets=False --recon-weight=0.3:non_negative
""",
    "sanm_pretrain": f"""
--dataset='cifar10' --data_path='./data':place --image_size=32:count --test_split=0.2:fraction
--on_bad_image='error':error|skip --workers=4:count_or_zero
{SIMCLR}
--model='resnet18':resnet18 --gpuid=0:count_or_zero
""",
}


def frozen(action, released: list) -> str:
    """A flag as in the table."""
    kind = "|".join(action.choices) if action.choices else getattr(action.type, "__name__", "")
    same = action.dest in {option.lstrip("-").replace("-", "_") for option in action.option_strings}
    mark = "*" * (action in released) + "!" * ("no effect" in action.help)
    nargs = f"({action.nargs})" if action.nargs else ""
    name = ",".join(action.option_strings) + ("" if same else f"->{action.dest}")
    return f"{mark}{name}={action.default!r}{nargs}:{kind}".replace(" ", "").rstrip(":")


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_defaults_types_and_choices_are_the_frozen_ones(script):
    parser = SCRIPTS[script].make_parser()
    groups = [group for group in parser._action_groups if group.title == "of the release"]
    released = [action for group in groups for action in group._group_actions]
    shared = SHARED.replace("SEED", str(SEEDS.get(script, 123)))
    expected = (FROZEN[script].replace("NOISE", NOISE) + shared).split()
    assert [frozen(action, released) for action in parser._actions[1:]] == expected


# settled defaults -------------------------------------------------------------------------------------------------------

MIXUP = "--mix-at input --weights random --lam 1"
SETTLED = f"""
afm:
    => attention=relu-sigmoid mix_target=soft group_order=random group_rounds=4 pair_chunks=1 sync_bn=True
    => pretrained=imagenet noise_type=given data_root=None out=None lam=None lam_scale=2.0
    --fidelity released => attention=complement mix_target=both group_order=halves group_rounds=1 pair_chunks=1 sync_bn=False
    --fidelity released --attention sigmoid => attention=sigmoid mix_target=both group_order=halves
    --mix-target soft --fidelity released => mix_target=soft attention=complement
    --fidelity released --pair-chunks 8 => pair_chunks=8
    --fidelity released --sync-bn => sync_bn=True
    --fidelity released --group-rounds 3 => group_rounds=3
    {MIXUP} --group-rounds 1 => attention=relu-sigmoid group_order=halves group_rounds=1
    --dataset clothing1m => pretrained=imagenet noise_type=given
    --dataset cifar10 --pretrained here.pt => pretrained=here.pt noise_type=symmetric
    --dataset digits --noise_file labels.npy => pretrained=none noise_type=given
    --checkpoint here => out=here checkpoint=None
    --checkpoint here --out there => out=there
    => weight_mixed=1.5 weight_plain=0.5
    --weight-mixed 2 => weight_mixed=2.0 weight_plain=0.5
    --weight-plain 0 => weight_mixed=1.5 weight_plain=0.0
    --lam 0.75 => weight_mixed=1.5 weight_plain=0.5 lam=None
    --lam 0 => weight_mixed=0.0 weight_plain=2.0
    --lam 0.25 --lam-scale 1 => weight_mixed=0.25 weight_plain=0.75 lam_scale=2.0
    --lam-scale 1 => weight_mixed=1.5 weight_plain=0.5 lam_scale=2.0
    --weight-naive 3 => weight_mixed=3.0 weight_plain=0.5 weight_naive=None
    --weight-naive 0 --weight-afm 1 => weight_mixed=0.0 weight_plain=1.0 weight_afm=None
    --weight-naive 3 --weight-plain 1 => weight_mixed=3.0 weight_plain=1.0
    --lr 0.2 --preset embedded/digits-sym0.5/afm-k3 --group-size 4 => lr=0.2 group_size=4 dataset=digits
sfa sfa_webvision:
    => ema_mode=persist
    --fidelity released => ema_mode=released
    --fidelity released --ema_mode persist => ema_mode=persist
    --ema_mode released => ema_mode=released
sfa_webvision:
    => reset_momentum=no
    --fidelity released => reset_momentum=yes
    --reset_momentum yes => reset_momentum=yes
    --fidelity released --reset_momentum no => reset_momentum=no
sfa:
    => min_draw_count=300 sce_ce=0.1 sce_rce=1 noise_mode=imb
    --dataset digits => min_draw_count=9 sce_ce=0.1 sce_rce=1
    --dataset cifar100 => min_draw_count=300 sce_ce=6 sce_rce=0.1
    --dataset digits --min_draw_count 0 => min_draw_count=0
    --dataset cifar100 --sce_ce 0 => sce_ce=0.0 sce_rce=0.1
    --dataset cifar100 --sce_rce 0 => sce_ce=6 sce_rce=0.0
    --noise_file labels.npy => noise_mode=given
me_momentum me_momentum_clothing:
    => legacy_batch_mean=False out=None
    --fidelity released => legacy_batch_mean=True
    --legacy_batch_mean => legacy_batch_mean=True
    --fidelity released --no-legacy_batch_mean => legacy_batch_mean=False
    --model_dir here => out=here model_dir=None
    --model_dir here --out here => out=here model_dir=None
me_momentum:
    => select_view=train val_view=train
    --fidelity released --select_view test => select_view=test val_view=train
    --val_view test => select_view=train val_view=test
    --noise_file labels.npy --noise_type instance => noise_type=given
    --n_epoch 3 --preset embedded/digits-sym0.4/ce --noise_rate 0.1 => num_epochs=3 noise_rate=0.1 dataset=digits selection=none
me_momentum_clothing:
    => num_epochs=90 pretrained=imagenet pretrain=True sync_bn=True
    --fidelity released => sync_bn=False
    --fidelity released --sync_bn => sync_bn=True
    --no-sync_bn => sync_bn=False
    --selection none => max_outer_loop=1 num_epochs=30
    --pretrain => pretrained=none pretrain=False
    --no_pretrain --pretrained none => pretrained=none pretrain=False
    --pretrained weights.pt => pretrained=weights.pt pretrain=True
manifold manifold_mini:
    => clustering=False bn_mode=train ramp=fixed warmup_mask=sample
    --clustering => clustering=True
    --clustering --no-clustering => clustering=False
    --clustering True => clustering=True
    --clustering False => clustering=False
    --out one --exp-dir two => out=two
    --exp-dir one --out two => out=two
    --bn-mode frozen => bn_mode=frozen ramp=fixed warmup_mask=sample
    --ramp released => bn_mode=train ramp=released warmup_mask=sample
    --fidelity released --bn-mode train => bn_mode=train ramp=released
    --ramp fixed --fidelity released => ramp=fixed
    --fidelity released --warmup-mask sample => warmup_mask=sample ramp=released
    --epochs 7 => num_epochs=7 epochs=7
manifold:
    --fidelity released => bn_mode=frozen ramp=released warmup_mask=batch
    --warmup-mask released => bn_mode=train ramp=fixed warmup_mask=batch
manifold_mini:
    => dataset=mini_imagenet
    --fidelity released => bn_mode=warm-up ramp=released warmup_mask=all
    --warmup-mask released => bn_mode=train ramp=fixed warmup_mask=all
manifold manifold_pretrain:
    => corruption=imagenet32
    --dataset digits => corruption=photographs
    --corruption mnist => corruption=mnist
manifold_pretrain:
    => noise_type=sym
    --dataset mini_imagenet => noise_type=red
    --noise-type asym => noise_type=asym
    --noise-type margin1 => noise_type=no
manifold_pretrain sanm_pretrain:
    => warm=True knn_every=10
    --batch_size 256 => warm=False
    --batch-size 257 --no-warm => warm=False
    --dataset digits => knn_every=1
    --dataset digits --knn_every 7 => knn_every=7
    --epochs 3 => num_epochs=3
    --lr_decay_epochs 5 6 => lr_decay_epochs=[5,6]
sanm:
    => released_softmax=False warm_up=10
    --fidelity released => released_softmax=True
    --fidelity released --base dividemix => released_softmax=False
    --no-released_softmax --fidelity released => released_softmax=False
    --released-softmax --pretrained none => released_softmax=True
    --dataset cifar100 => warm_up=20
    --dataset cifar100 --warm_up 3 => warm_up=3
    --noise_file labels.npy --noise_mode asym => noise_mode=given
sanm sanm_clothing:
    => mask_anchor=centre
    --fidelity released => mask_anchor=corner
    --fidelity released --mask-anchor centre => mask_anchor=centre
    --mask_anchor corner => mask_anchor=corner
sanm_clothing:
    => sync_bn=True
    --fidelity released => sync_bn=False
    --fidelity released --sync_bn => sync_bn=True
    --no-sync_bn => sync_bn=False
"""


@pytest.mark.parametrize(("script", "words", "expected"), cases(SETTLED))
def test_other_flags_and_the_data_set_decide_a_default_unless_it_is_typed(script, words, expected):
    args, pairs = parse(script, words), [pair.partition("=")[::2] for pair in expected.split()]
    assert {name: str(getattr(args, name)).replace(" ", "") for name, _ in pairs} == dict(pairs)


@pytest.mark.parametrize(("fidelity", "chunks"), [("paper", 1), ("released", 8)])
def test_under_torchrun_the_releases_pairs_are_inside_each_processs_piece(
    fidelity, chunks, monkeypatch, capsys
):
    for name, value in {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "8", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert parse("afm", f"--fidelity {fidelity}").pair_chunks == chunks
    assert parse("afm", f"--fidelity {fidelity} --group-order random").pair_chunks == 1
    assert parse("afm", f"--fidelity {fidelity} --group-order halves --pair-chunks 2").pair_chunks == 2
    with pytest.raises(SystemExit) as stop:
        parse("afm", MIXUP)
    assert stop.value.code == 2 and "runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "limits"),
    [
        ("", (100, 3, 19, 0.1, 2.0)),
        ("--n_epoch 7 --max_outer_loop 2 --max_inner_loop 1", (7, 2, 0, 0.1, 2.0)),
        ("--es_step 0.5 --es_limit 0", (100, 3, 19, 0.5, 0.0)),
        # one phase without a margin, which nothing ends early
        ("--selection none --n_epoch 7 --es_step 1", (7, 1, 0, 0, 2.0)),
    ],
)
def test_max_inner_loop_is_one_more_than_the_rounds(words, limits):
    assert me_momentum_flags.loop_limits(parse("me_momentum", words)) == limits


def test_the_rule_of_the_masks_is_that_of_the_flags():
    words = "--mask-lo 0.1 --mask-hi 0.2 --mask-quality 0.3 --mask-anchor corner --clamp-targets"
    assert sanm_flags.mask_rule(parse("sanm", words)) == (0.1, 0.2, 0.3, "corner", True, False)


# names of methods, runs and cells ---------------------------------------------------------------------------------------

METHOD = {
    "afm": afm_flags.method,
    "sfa": sfa_flags.cifar_method,
    "manifold": manifold_flags.method,
    "manifold_mini": manifold_flags.method,
    "me_momentum": me_momentum_flags.method,
    "me_momentum_clothing": me_momentum_flags.method,
    "sanm": sanm_flags.cifar_method,
    "sanm_clothing": sanm_flags.clothing_method,
}
METHODS = f"""
afm:
    => AFM (K=2)
    --lam 0 => CE
    --weights random --group-size 4 => feature mixup, random weights (K=4)
    --weights uniform --group-rounds 2 => feature mixup, uniform weights (K=2, group_rounds 2)
    --detach-target --interaction concat => AFM (K=2, detach_target True, interaction concat)
    --fidelity released --group-rounds 4 => AFM (K=2, group_rounds 4)
    --fidelity released --mix-target soft => AFM (K=2, mix_target soft)
    {MIXUP} => mixup
sfa:
    => SFA
    --loss sce --ema_mode released => SFA (ema_mode released) + SCE
    --fidelity released --ema_mode persist => SFA (ema_mode persist)
    --selection gmm --ema_mode released --loss balanced_softmax => GMM + balanced softmax
    --selection none --loss gce => no selection + GCE
me_momentum me_momentum_clothing:
    --selection none => CE
    --fidelity released => Me-Momentum
manifold manifold_mini:
    --warmup-loss CE --lambda_xe 0 => Manifold DivideMix
    --lambda_ue 0 => Manifold DivideMix
    --lambda_xe 0 --lambda_ue 0 => Manifold DivideMix without manifold mixup
    --lambda_c 0 => Manifold DivideMix without contrastive loss
    --lambda_u 0 --lambda_ue 0 => Manifold DivideMix without unlabelled losses
    --remove-ood 0 --lambda_xe 0 --lambda_ue 0 => Manifold DivideMix without OOD removal and manifold mixup
    --knn-encoder pretrained --remove-ood 0 => Manifold DivideMix without OOD removal, scored by the pre-trained encoder
    --selection none --remove-ood 0 --pretrained none --warmup-loss CE => CE
    --selection none --remove-ood 0 => SCE (pre-trained)
    --selection none --warmup-loss CE => CE (pre-trained) with OOD removal
sanm:
    => SANM(C2D)
    --fidelity released --mask-anchor centre --lr 0.1 => SANM(C2D)
    --base dividemix --dataset digits => SANM(DivideMix)
    --masking none => C2D
    --base dividemix --masking none => DivideMix
    --recon-weight 0 => SANM(C2D) without reconstruction
    --selection none => CE
sanm_clothing:
    --fidelity released => SANM(DivideMix)
    --masking none => DivideMix
"""


@pytest.mark.parametrize(("script", "words", "name"), cases(METHODS))
def test_the_method_is_named_after_what_is_left_of_it(script, words, name):
    assert METHOD[script](parse(script, words)) == name


DIRECTORY = {
    "afm": afm_flags.directory_name,
    "sfa": sfa_flags.cifar_directory,
    "sfa_webvision": sfa_flags.webvision_directory,
    "me_momentum": me_momentum_flags.directory_name,
    "me_momentum_clothing": me_momentum_flags.clothing_directory_name,
    "manifold": manifold_flags.cifar_directory,
    "manifold_mini": manifold_flags.mini_imagenet_directory,
    "manifold_pretrain": manifold_flags.pretrain_directory,
    "sanm": sanm_flags.cifar_directory,
    "sanm_clothing": sanm_flags.clothing_directory,
    "sanm_pretrain": sanm_flags.pretrain_directory,
}
LONG_TAIL = "dataset_cifar100-imb_type_exp-imb_factor_0.01-noise_mode_imb-noise_ratio_0.5-seed_123"
IN_MEMORY = "dataset_cifar100-corruption_imagenet32-noise_ratio_0.2-ood_ratio_0.2-seed_123"
OF_FILES = "dataset_mini_imagenet-noise_type_red-noise_ratio_0.2-img_size_32-seed_123"
PRETRAIN = "pretrain-dataset_cifar100-epochs_1000-seed_123-corruption_imagenet32-ood_ratio_0.2"
# what differs, in the order of the flags, whatever the order in which they are typed
DIRECTORIES = f"""
afm:
    --data-root elsewhere => dataset_food-seed_0
    --dataset digits --seed 3 => dataset_digits-noise_type_symmetric-noise_rate_0.5-seed_3
    --fidelity released => dataset_food-fidelity_released-seed_0
    --dataset clothing1m --lr 0.1 => dataset_clothing1m-train_on_noisy-seed_0-lr_0.1
sfa:
    --dataset cifar100 --sce_ce 6 => {LONG_TAIL}
    --dataset cifar100 --selection gmm --loss sce => {LONG_TAIL}-loss_sce-selection_gmm
sfa_webvision:
    => webvision-seed_123
    --fidelity released --T 0.4 --seed 3 => webvision-fidelity_released-seed_3-T_0.4
    --fidelity released --reset_momentum no => webvision-fidelity_released-seed_123-reset_momentum_no
    --gpuid1 2 --gpuid2 3 --parallel networks => webvision-seed_123
me_momentum:
    --selection none --dataset digits --data_path x => {
    "dataset_digits-noise_type_symmetric-noise_rate_0.2-seed_1-selection_none"
}
    --fidelity released --n_epoch 9 => {
    "dataset_mnist-noise_type_symmetric-noise_rate_0.2-fidelity_released-seed_1-num_epochs_9"
}
me_momentum_clothing:
    => clothing1m-seed_1
    --fidelity released --beta 0.5 --n_epoch 4 --seed 3 => clothing1m-fidelity_released-seed_3-beta_0.5-n_epoch_4
    --selection none => clothing1m-selection_none-seed_1
    --pretrain => clothing1m-seed_1-pretrained_none-pretrain_False
manifold:
    => {IN_MEMORY}
    --out somewhere --noise-type asym --seed 123 => {IN_MEMORY}-noise_type_asym
    --fidelity released --rce log --clustering --noise-seed 2 => {IN_MEMORY}-noise_seed_2-clustering_True-{
    "rce_log-fidelity_released"
}
manifold_mini:
    => {OF_FILES}
    --fidelity released => {OF_FILES}-fidelity_released
    --warmup-mask released => {OF_FILES}-warmup_mask_all
manifold_pretrain:
    => {PRETRAIN}
    --epochs 1000 --batch_size 64 => {PRETRAIN}-batch_size_64
    --dataset mini_imagenet --noise-type blue => {
    "pretrain-dataset_mini_imagenet-epochs_1000-seed_123-noise_type_blue-noise_ratio_0.2"
}
sanm:
    => dataset_cifar10-noise_mode_sym-r_0.5-base_c2d-seed_123
    --base dividemix --num_epochs 20 => dataset_cifar10-noise_mode_sym-r_0.5-base_dividemix-seed_123-num_epochs_20
    --masking none => dataset_cifar10-noise_mode_sym-r_0.5-base_c2d-seed_123-masking_none
    --fidelity released --mask-anchor centre --lr 0.1 => {
    "dataset_cifar10-noise_mode_sym-r_0.5-base_c2d-fidelity_released-seed_123-lr_0.1-mask_anchor_centre"
}
sanm_clothing:
    => clothing1m-seed_123
    --masking none => clothing1m-seed_123-masking_none
    --fidelity released --T 0.4 => clothing1m-fidelity_released-seed_123-T_0.4
sanm_pretrain:
    => pretrain-dataset_cifar10-epochs_1000-seed_123
    --batch_size 64 --epochs 999 => pretrain-dataset_cifar10-epochs_999-seed_123-batch_size_64
    --no-warm --temp 0.1 => pretrain-dataset_cifar10-epochs_1000-seed_123-temp_0.1-warm_False
"""


@pytest.mark.parametrize(("script", "words", "name"), cases(DIRECTORIES))
def test_the_run_directory_is_named_after_what_differs(script, words, name, monkeypatch):
    if script == "sfa_webvision":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # not after the processes or cards either
    assert DIRECTORY[script](parse(script, words)) == name


CELL = {
    "afm": afm_flags.cell,
    "sfa": sfa_flags.cifar_cell,
    "sfa_webvision": lambda args, _: sfa_flags.webvision_cell(args),
    "me_momentum": me_momentum_flags.cell,
    "me_momentum_clothing": lambda args, _: me_momentum_flags.clothing_cell(args),
    "manifold": lambda args, data: manifold_flags.cifar_cell(args, data.name),
    "manifold_mini": lambda args, data: manifold_flags.mini_imagenet_cell(args, data.name),
    "manifold_pretrain": lambda args, data: manifold_flags.pretrain_cell(args, data.name),
    "sanm": lambda args, data: sanm_flags.cifar_cell(args, data.name),
    "sanm_clothing": lambda args, _: sanm_flags.clothing_cell(args),
    "sanm_pretrain": lambda args, data: sanm_flags.pretrain_cell(args, data.name),
}
# the columns after the data set's name: noise type and rate, imbalance, share of OOD images, profile
CELLS = """
afm:
    => few, web, None, None, None, paper
    --epochs 29 => few, web, None, None, None, short
    --dataset clothing1m --train-on noisy+verified --epochs 15 => few, noisy+verified, None, None, None, paper
    --dataset clothing1m --epochs 14 => few, noisy, None, None, None, short
    --dataset cifar10 --noise-rate 0.4 => few, symmetric, 0.4, None, None, short
    --dataset digits --noise_file a/own.npy => few, own.npy, None, None, None, embedded
sfa:
    => few, imb, 0.5, 0.01, None, paper
    --imb_type none --num_epochs 199 => few, imb, 0.5, 1.0, None, short
    --dataset digits --noise_file a/own.npy => few, own.npy, None, 0.01, None, embedded
sfa_webvision:
    => webvision, real, None, None, None, paper
    --T 0.4 --num_epochs 101 --fidelity released --image_size 331 --imb_type step => webvision, real, None, None, None, paper
    --num_epochs 99 => webvision, real, None, None, None, short
    --num_class 49 => webvision, real, None, None, None, short
    --image_size 298 => webvision, real, None, None, None, short
    --network resnet50 => webvision, real, None, None, None, short
    --imb_factor 0.1 --noise_file a/own.npy => webvision, own.npy, None, 0.1, None, short
me_momentum:
    => few, symmetric, 0.2, None, None, paper
    --n_epoch 99 => few, symmetric, 0.2, None, None, short
    --es_limit 1 --noise_file a/own.npy => few, own.npy, None, None, None, short
    --dataset digits --noise_type given => few, given, None, None, None, embedded
me_momentum_clothing:
    --selection none => clothing1m, real, None, None, None, paper
    --pretrain => clothing1m, real, None, None, None, paper
    --n_epoch 4 => clothing1m, real, None, None, None, short
    --max_inner_loop 5 => clothing1m, real, None, None, None, short
    --max_outer_loop 2 => clothing1m, real, None, None, None, short
    --image_size 224 => clothing1m, real, None, None, None, short
    --network resnet18 => clothing1m, real, None, None, None, short
manifold:
    => few, sym + imagenet32, 0.2, None, 0.2, paper
    --epochs 299 => few, sym + imagenet32, 0.2, None, 0.2, short
    --dataset digits --epochs 300 => few, sym + photographs, 0.2, None, 0.2, embedded
    --ood-ratio 0 --noise-type asym --noise-ratio 0.4 => few, asym, 0.4, None, 0.0, paper
    --noise-type no => few, no + imagenet32, 0.0, None, 0.2, paper
    --noise-type given => few, given + imagenet32, None, None, 0.2, paper
    --noise_file some/labels.npy => few, labels.npy + imagenet32, None, None, 0.2, paper
manifold_mini:
    --img-size 84 => few, red, 0.2, None, None, paper
    --noise-type blue --noise-ratio 0.6 --epochs 49 => few, blue, 0.6, None, None, short
    --noise_file some/labels.csv --img-size 16 => few, labels.csv, None, None, None, short
manifold_pretrain:
    => few, imagenet32, None, None, 0.2, paper
    --dataset digits --ood-ratio 0 => few, none, None, None, 0.0, embedded
    --dataset mini_imagenet --epochs 999 => few, red, 0.2, None, None, short
sanm:
    => few, sym, 0.5, None, None, paper
    --num_epochs 359 --r 0.8 => few, sym, 0.8, None, None, short
    --dataset digits --noise_mode asym => few, asym, 0.5, None, None, embedded
    --noise_mode given => few, given, None, None, None, paper
    --noise_file a/own.npy => few, own.npy, None, None, None, paper
sanm_clothing:
    => clothing1m, real, None, None, None, paper
    --noise_file a/own.npy --num_epochs 79 => clothing1m, own.npy, None, None, None, short
    --num_batches 15624 => clothing1m, real, None, None, None, short
    --image_size 223 => clothing1m, real, None, None, None, short
    --network resnet18 => clothing1m, real, None, None, None, short
sanm_pretrain:
    --no-warm => few, none, None, None, None, paper
    --dataset digits --epochs 5 => few, none, None, None, None, embedded
    --epochs 999 => few, none, None, None, None, short
"""
COLUMNS = ("dataset", "noise_type", "noise_rate", "imb_factor", "ood_ratio", "profile")


@pytest.mark.parametrize(("script", "words", "expected"), cases(CELLS))
def test_a_result_row_names_what_was_trained_on(script, words, expected):
    found = CELL[script](parse(script, words), SimpleNamespace(name="few"))
    texts = dict(zip(COLUMNS, expected.split(", "), strict=True))
    assert {name: str(value) for name, value in found.items()} == texts


# notes ------------------------------------------------------------------------------------------------------------------


def cifar_notes(words: str) -> list[str]:
    return sanm_flags.cifar_notes(parse("sanm", words))


def test_a_schedule_that_does_not_fit_gets_a_note(capsys, monkeypatch):
    for words, warm_up_only, no_drop in (
        ("--num_epochs 10 --warm_up 9 --lr_drop 9", False, False),
        ("--num_epochs 10 --warm_up 10 --lr_drop 9", True, False),
        ("--num_epochs 10 --warm_up 9 --lr_drop 10", False, True),
        ("--num_epochs 10 --warm_up 10 --lr_drop 9 --selection none", False, False),
    ):
        sfa_flags.note_schedule(parse("sfa", words))
        out = capsys.readouterr().out
        assert ("--warm_up 10 " in out, "--lr_drop 10" in out) == (warm_up_only, no_drop), words
    assert not any(note.startswith("note:") for note in cifar_notes("--num_epochs 10 --lr_drop 10"))
    warm_up, drop = (note for note in cifar_notes("--num_epochs 9 --lr_drop 10") if note.startswith("note:"))
    assert "--warm_up 10 " in warm_up and "--lr_drop 10, --num_epochs 9" in drop
    assert cifar_notes("--num_epochs 5 --selection none --lr_drop 3") == []
    for script in ("manifold", "manifold_mini"):
        for words, count in (("--selection none --warmup-epoch 300", 0), ("--epochs 5 --warmup-epoch 5", 1)):
            parse(script, words)
            assert capsys.readouterr().out.count("--warmup-epoch 5 is not below --epochs 5") == count
    # of several processes the first alone says so
    monkeypatch.setattr("common.gpu.processes.rank", lambda: 1)
    parse("manifold", "--epochs 5 --warmup-epoch 5")
    assert capsys.readouterr().out == ""


def test_the_releases_swapped_names_say_so_once(capsys, monkeypatch, tmp_path):
    parse("afm", "--weight-afm 0.5")
    [line] = capsys.readouterr().out.splitlines()
    assert "--weight-afm scales the plain loss" in line and "--weight-plain" in line
    words = f"{QUICK['afm']} --weight-naive 1 --device_ids 0,3 --out {tmp_path / 'run'}"
    train.main(words.split())
    assert train.os.environ["CUDA_VISIBLE_DEVICES"] == "0,3"  # and these are the devices that CUDA sees
    assert capsys.readouterr().out.count("--weight-naive scales the mixed loss") == 1


@pytest.mark.parametrize(
    ("words", "on", "end"),
    [
        ("--r 0.89", "off, --r 0.89", "of each epoch"),
        ("--r 0.9", "on, --r 0.9", "the last 5 loss vectors"),
        ("--r 0.95 --fidelity released", "off, --r 0.95", "of each epoch"),
        ("--noise_file labels.npy", "off, --r 0.5", "type --r 0.9 if 90 % are wrong)"),
        ("--noise_mode given", "off, --r 0.5", "type --r 0.9 if 90 % are wrong)"),
        ("--noise_file labels.npy --r 0.9", "on, --r 0.9", "the last 5 loss vectors"),
        ("--preset cifar10/cifar10-sym0.9/sanm-c2d --noise_file labels.npy", "on, --r 0.9", "5 loss vectors"),
    ],
)
def test_labels_from_a_file_turn_the_90_percent_rule_on_only_where_r_is_set(words, on, end):
    line = cifar_notes(words)[-1]
    assert line.startswith(f"90 % rule {on}: ") and line.endswith(end)
    assert sanm_flags.uses_history(parse("sanm", words)) is on.startswith("on")


# presets ----------------------------------------------------------------------------------------------------------------

PRESETS = {(flags, name): own for flags in FLAGS for name, own in cli.read_presets(flags.PRESETS).items()}


def own_script(flags, section: dict) -> str:
    """The key in SCRIPTS of the script that a preset's section is for."""
    paper = flags.__name__.partition(".")[0]
    scripts = [name for name, module in SCRIPTS.items() if module.__name__.startswith(paper)]
    named = [name for name in scripts if SCRIPTS[name].make_parser().prog == section.get("script")]
    return (named or scripts)[0]


@pytest.mark.parametrize(("flags", "name"), PRESETS, ids=str)
def test_a_preset_parses_by_its_own_script_alone_and_its_values_arrive(flags, name, capsys):
    section = PRESETS[flags, name]
    own = own_script(flags, section)
    args, parser = parse(own, f"--preset {name}"), SCRIPTS[own].make_parser()
    places = {o.replace("_", "-"): action.dest for action in parser._actions for o in action.option_strings}
    values = {flag: value for flag, value in section.items() if flag not in ("script", "encoder")}
    expected = {places[f"--{flag.replace('_', '-')}"]: value for flag, value in values.items()}
    if "lam" in expected:
        lam = expected.pop("lam")
        expected |= {"weight_mixed": 2 * lam, "weight_plain": 2 * (1 - lam)}
    assert {dest: getattr(args, dest) for dest in expected} == expected
    paper = own.partition("_")[0]
    for other in (script for script in SCRIPTS if script.startswith(paper) and script != own):
        with pytest.raises(SystemExit) as stop:
            parse(other, f"--preset {name}")
        assert stop.value.code == 2 and f"preset {name} is for " in capsys.readouterr().err
    if "encoder" in section:  # pre-training of the same images: of the same pool, or by the same list
        encoder = PRESETS[flags, section["encoder"]]
        its = parse(own_script(flags, encoder), f"--preset {section['encoder']}")
        assert own_script(flags, encoder).endswith("pretrain")
        alike = {"manifold": "arch corruption ood_ratio"}
        alike["manifold_mini"] = "arch noise_type noise_ratio img_size"
        for flag in ("dataset", *alike.get(own, "").split()):
            assert getattr(args, flag) == getattr(its, flag), flag


SANM_METHODS = {"sanm-c2d": "SANM(C2D)", "sanm-dividemix": "SANM(DivideMix)"}
SANM_METHODS |= {"c2d": "C2D", "dividemix": "DivideMix", "ce": "CE"}
PROTOCOL = {"lr": 0.01, "weight_decay": 1e-4, "batch_size": 128, "num_epochs": 100, "data_percent": 0.9}
PROTOCOL |= {"max_outer_loop": 3, "max_inner_loop": 20, "es_step": 0.1, "es_limit": 2.0, "stem_padding": 0}
PROTOCOL |= {"network": "auto", "fidelity": "paper", "limit_train": None, "noise_file": None, "seed": 1}


@pytest.mark.parametrize(("flags", "name"), PRESETS, ids=str)
def test_a_preset_does_what_its_name_says(flags, name):
    """Published cells by the published protocol; the name says data, noise, rate, and the method or what is left of it."""
    own, what = own_script(flags, PRESETS[flags, name]), name.rpartition("/")[2]
    args, cell = parse(own, f"--preset {name}"), re.match(r"(\w+)/\1-([a-z]+)(0\.\d)/", name)
    if own == "sanm" and cell:
        assert (args.dataset, args.noise_mode, args.r) == (cell[1], cell[2], float(cell[3]))
        assert (args.num_epochs, args.batch_size, args.lr, args.fidelity) == (360, 64, 0.02, "paper")
        assert METHOD[own](args) == SANM_METHODS[what]
    if own == "me_momentum" and cell:
        assert {flag: getattr(args, flag) for flag in PROTOCOL} == PROTOCOL
        noise = {"sym": "symmetric", "inst": "instance"}[cell[2]]
        assert (args.dataset, args.noise_type, args.noise_rate) == (cell[1], noise, float(cell[3]))
    if own.startswith("me_momentum"):
        assert METHOD[own](args) == ("CE" if what == "ce" else "Me-Momentum")
    if own == "me_momentum" and name.startswith("embedded/") and what == "ce":
        its = vars(parse(own, f"--preset {name[:-2]}me-momentum"))
        assert {flag for flag in its if its[flag] != vars(args)[flag]} == {"selection", "preset"}
    if own == "me_momentum_clothing":
        assert CELL[own](args, None)["profile"] == "paper" and args.pretrained == "imagenet"
    if own == "sfa" and not name.startswith("claims/"):
        assert name.split("/")[2] == args.selection + (f"-{args.loss}" if args.loss != "ce" else "")


def test_the_published_cells_of_me_momentum_are_all_there_each_with_its_baseline():
    every = ("mnist", "cifar10", "cifar100"), ("sym", "inst"), ("0.2", "0.4"), ("me-momentum", "ce")
    for data, noise, rate, what in itertools.product(*every):
        assert (me_momentum_flags, f"{data}/{data}-{noise}{rate}/{what}") in PRESETS


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags.__name__)
def test_the_readme_shows_presets_that_there_are(flags):
    text = (flags.PRESETS.parent / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"--preset ([a-z0-9/.+-]+)", text))
    assert shown <= set(cli.read_presets(flags.PRESETS)) and (shown or flags is not afm_flags)


# refusals ---------------------------------------------------------------------------------------------------------------

# what would end soon if it were not refused
QUICK = {
    "afm": "--dataset digits --limit_train 8 --train-batch 8 --epochs 1 --device cpu",
    "sfa": "--dataset digits --num_epochs 1 --limit_train 32 --device cpu",
    "sfa_webvision": "--num_class 3 --network resnet18 --image_size 64 --batch_size 2 --num_epochs 1 --device cpu "
    "--workers 0 --data_path data",
    "me_momentum": "--dataset digits --n_epoch 1 --max_outer_loop 1 --max_inner_loop 1 --device cpu",
    "me_momentum_clothing": "--network resnet18 --image_size 64 --n_epoch 1 --device cpu --workers 0",
    "manifold": "--dataset digits --ood-ratio 0 --pretrained none --epochs 1 --warmup-epoch 1 --limit_train 32 --device cpu",
    "manifold_mini": "--data-dir nosuch --pretrained none --epochs 1 --warmup-epoch 1 --device cpu",
    "manifold_pretrain": "--dataset digits --ood-ratio 0 --epochs 1 --batch_size 16 --limit_train 32 --device cpu",
    "sanm": "--dataset digits --base dividemix --num_epochs 1 --warm_up 1 --limit_train 32 --device cpu",
    "sanm_clothing": "--network resnet18 --pretrained none --image_size 64 --device cpu --workers 0",
    "sanm_pretrain": "--dataset digits --epochs 1 --limit_train 32 --device cpu",
}
# words => the flag and the value, as a pattern
REFUSED = rf"""
afm:
    --group-size 1 => --group-size: .*at least 2.*got 1
    --group-size 3 --fidelity released => --group-size: .*got 3.*--attention relu-sigmoid
    --train-on noisy+clean => --train-on: .*clothing1m.*digits
    --dataset clothing1m --train-on noisy+clean --finetune-epochs 1 => --finetune-epochs: .*below --epochs 1
    --lam 0.5 --weight-mixed 1 => --lam: .*--weight-mixed
    --lam 0.5 --weight-afm 1 => --lam: .*--weight-plain
    --lam 1.1 => --lam: .*got 1.1
    --lam-scale 0 => --lam-scale: .*got 0
    --weight-naive 1 --weight-mixed 1 => --weight-naive: .*--weight-mixed
    --weight-afm 1 --weight-plain 1 => --weight-afm: .*--weight-plain
    --weight-mixed 0 --weight-plain 0 => --weight-plain: .*both
    --weight-mixed -1 => --weight-mixed: .*got -1
    --mix-at input => --mix-at: .*--weights random
    --mix-at input --weights random => --mix-at: .*--lam 1
    {MIXUP} --group-size 3 => --mix-at: .*--group-size 2
    {MIXUP} --group-rounds 2 => --mix-at: .*--group-rounds 2
    {MIXUP} --group-order random => --mix-at: .*--group-order random
    --interaction max => --interaction: .*max.*choose from .*sum.*concat.*mul
    --pair-chunks 0 => --pair-chunks: .*got 0
    --pair-chunks 2 => --pair-chunks: 2 pieces .*--group-order halves
    --network preact_resnet18 --pretrained imagenet => --pretrained imagenet: .*--network preact_resnet18; use
    --pretrained imagenet => --pretrained imagenet
    --pretrained nosuch.pt => --pretrained nosuch.pt: no such file
    --noise-type given => --noise-type given: .*--noise_file
    --dataset nosuch => nosuch
    --dataset food --data-root nosuch => food101n not found in .*imagelist.tsv.*common.datasets check food101n --data_path nosuch
    --train-batch 9 => --train-batch 9: there are only 8
    --weight-deca 1 => unrecognized arguments: --weight-deca
sfa:
    --dataset cifar10 --data_path nosuch => cifar-10-batches-py.*common.datasets download cifar10 --data_path nosuch
    --noise_mode asym => --noise_mode: .*asym.*choose from .*imb.*sym
    --noise_mode given => --noise_mode given: .*--noise_file
    --noise_file nosuch.npy => --noise_file nosuch.npy
    --imb_factor 2 => --imb_factor: must be at most 1, got 2
    --dataset nosuch => nosuch: choose from .*cifar10
    --preset nosuch => preset nosuch: choose from .*embedded/
    --gce_q 2 => --gce_q: must be at most 1, got 2
sfa_webvision:
    --num_class 1 => --num_class: WebVision has 1000 classes, 2 at least are needed, got 1\s
    --num_class 1001 => --num_class: WebVision has 1000 classes.*got 1001
    --imb_factor 2 => --imb_factor: must be at most 1, got 2
    --image_size 32 => --image_size: must be at least 33 for resnet18, got 32
    --image_size 32 --network resnet50 => --image_size: must be at least 33 for resnet50, got 32
    --image_size 106 --network inception_resnet_v2 => at least 107 for inception_resnet_v2, got 106
    --parallel data => --parallel: data needs several processes: start the script with torchrun
    --warm_up 2 => unrecognized arguments: --warm_up 2
    --data_path nosuch => webvision not found in .*; looked in .*nosuch for info/train_filelist
    --imagenet nosuch => nosuch/val for a folder of each of 3 classes of ILSVRC12.*--imagenet none
    --num_class 4 => data/imagenet/val for a folder of each of 4 classes.*3 is missing
    --noise_file nosuch.npy => --noise_file nosuch.npy: no such file
    --noise_file long.npy => --noise_file long.npy: holds 13 labels, the training set needs 12
    --noise_file wide.npy => --noise_file wide.npy: label 3 at position 9 is outside 0..2
    --image_cache nosuch => no image cache in nosuch
    --gpuid1 99 --device cuda => --device cuda: there is no CUDA device 99
    --parallel networks --data_path nosuch => webvision not found
    --parallel networks --image_cache nosuch => no image cache in
me_momentum:
    --noise_rate 1.5 => --noise_rate: .*got 1.5
    --noise_type asym => --noise_type: .*asym.*choose from .*symmetric.*pairflip.*instance
    --noise_type given => --noise_type given: .*--noise_file
    --data_percent 0 => --data_percent: both parts need images, got 0
    --data_percent 1 => --data_percent: both parts need images, got 1
    --data_percent 0.0001 => --data_percent 0.0001: .*1437 images
    --model_dir here => --model_dir: is a name for --out.*here.*run
    --dataset nosuch => nosuch: choose from .*mnist
    --dataset mnist --data_path nosuch => mnist not found.*nosuch
    --network lenet => --network lenet: images of 8 pixels.*use small
    --limit_train 1 => --data_percent 0.9: .*1 images
    --limit_train 40 => class [0-9] is not among the 4 observed labels.*--limit_train
    --dataset few --data_path . --noise_type asymmetric => asymmetric.*10 classes
    --dataset few --data_path . --noise_type oneflip => oneflip.*3 classes
    --dataset oblong --data_path . => --network lenet: images of 16 x 20 pixels are not square
    --preset nosuch => preset nosuch: choose from .*embedded/
me_momentum_clothing:
    --num_classes 10 => --num_classes: Clothing1M has 14 classes, got 10
    --image_size 63 => --image_size: must be at least 64, got 63
    --pretrain --pretrained imagenet => --pretrained: .* both mean none, got imagenet
    --data_root nosuch => clothing1m not found in .*noisy_train_key_list.txt
    --model_dir a => --model_dir: is a name for --out, .* got a and .*run
manifold manifold_mini:
    --batch-size 1 => --batch-size: must be at least 2, got 1
    --knn-encoder pretrained => --knn-encoder: pretrained needs .*got --pretrained none
    --clustering perhaps => --clustering: .*perhaps
    --cuda_graphs => --cuda_graphs: .*five forward passes
    --warmup-mask batch => --warmup-mask.*: .*batch.*choose from .*sample.*released
    --preset nosuch => preset nosuch: choose from .*embedded/
manifold:
    --dataset nosuch => nosuch: choose from .*cifar100
    --dataset cifar100 --data-dir nosuch => cifar100 not found.*nosuch
    --noise-type superclass => --noise-type superclass.*10 classes
    --ood-ratio 0.6 --noise-ratio 0.5 => --noise-ratio 0.5 and --ood-ratio 0.6 .* together at most 1
    --ood-ratio 0.6 --noise-ratio 0.5 --noise_file nosuch.npy => nosuch.npy: no such file
    --noise-type given => --noise_file
    --ood-ratio 0.2 --corruption nosuch => nosuch: choose from .*imagenet32
    --ood-ratio 0.2 --corruption digits => --corruption digits: .*training images themselves
    --ood-ratio 0.2 --corruption imagenet32 => not found.*imagenet32.*train_data_batch_1.*--ood-dir
    --ood-ratio 0.2 --corruption place365 => no images found in .*places365: .* --ood-dir
    --pretrained save/last.pth => --pretrained save/last.pth: no such file; make an encoder .*pretrain.py.*none
    --remove-ood 0.1 => --remove-ood 0.1: 32 of 32 images would be removed.*smaller
    --limit_train 1 => one training image has no neighbours: use a larger --limit_train
    --img-size 32 => unrecognized arguments: --img-size
    --ood-ratio 0.2 --lr-backbone 1e30 --lr-head 1e30 --epochs 2 => losses of training samples are not finite
    --ood-ratio 0.2 --pretrained nan.safetensors => loss is nan at epoch 1
    --pretrained damaged.safetensors => damaged
manifold_mini:
    => not found.*nosuch
    --ood-ratio 0.2 => unrecognized arguments: --ood-ratio
manifold_pretrain:
    --noise_file labels.npy => --noise_file: no label is used .*got labels.npy
    --noise-type red => --noise-type: red is not for --dataset digits
    --dataset mini_imagenet --noise-type asym => asym is not for --dataset mini_imagenet
    --drop_last --batch_size 64 => --drop_last: a batch of 64 is more than all 32 images
    --limit_train 1 => one training image has no neighbours
    --ood-ratio 0.2 --lr 1e30 --no-warm => loss is nan at epoch 1
sanm:
    --dataset nosuch => nosuch: choose from .*cifar10
    --noise_mode given => --noise_mode given: .*--noise_file
    --dataset few --data_path . --noise_mode asym => --noise_mode asym.*10 classes.*few has 2; use sym
    --base divide => --base: .*divide.*choose from .*dividemix.*c2d
    --base c2d => ckpt_digits_resnet18.pth: make one with .*--dataset digits.*--pretrained
    --base c2d --fidelity released => no pretrained/ckpt_cifar10_resnet18.pth
    --base c2d --pretrained nosuch.pth => --pretrained nosuch.pth: no such file
    --base c2d --pretrained colour.safetensors => conv1.weight has shape \[16, 3, 3, 3\], expected \[16, 1, 3, 3\]
    --base c2d --pretrained lacking.safetensors => has no layer3.0.conv2.weight
    --pretrained some.pth => --pretrained: is for --base c2d, got some.pth
    --arch narrow --base c2d --pretrained none => --arch: narrow is for --base dividemix
    --released-softmax => --released-softmax: --base dividemix returns logits
    --mask-lo 0.08 => --mask-lo: must be at most --mask-hi 0.07, got 0.08
    --limit_train 1 => --limit_train 1: one image cannot be split
    --lr 1e30 => losses of training samples are not finite: lower --lr
    --epochs 3 => unrecognized arguments: --epochs
sanm_clothing:
    --num_class 10 => --num_class: Clothing1M has 14 classes, got 10
    --image_size 63 => --image_size: must be at least 64, got 63
    --mask-hi 0.05 => --mask-lo: must be at most --mask-hi 0.05, got 0.06
    --gpuid 99 --device cuda => --device cuda: there is no CUDA device 99
    --data_path nosuch => clothing1m not found in .*looked in .*nosuch for noisy_label_kv
sanm_pretrain:
    --noise_file labels.npy => --noise_file: no label is used .*got labels.npy
    --lr_decay_epochs 700,800 => --lr_decay_epochs.*: .*got 700,800
    --drop_last => --drop_last: a batch of 1024 is more than all 32 images
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with mini-WebVision of three classes, small data sets, labels and encoders that do not fit."""
    folder = tmp_path_factory.mktemp("refused")
    make_webvision(folder / "data", classes=3, per_class=4)
    np.save(folder / "long.npy", np.arange(13) % 3)
    np.save(folder / "wide.npy", np.arange(12) // 3)
    for name, shape in (("few", (60, 8, 8)), ("oblong", (60, 16, 20))):
        images, labels = np.zeros(shape, np.uint8), np.arange(60) % 2
        arrays = {"train_images": images, "train_labels": labels}
        np.savez(folder / f"{name}.npz", **arrays, test_images=images, test_labels=labels)
    (folder / "damaged.safetensors").write_bytes(b"no weights")
    networks = {"nan": make_encoder("resnet18", 1, 8)}
    networks |= {"lacking": simclr_resnet(1, 8), "colour": simclr_resnet(3, 8)}
    for name, network in networks.items():
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        if name == "nan":
            weights["conv1.weight"] *= torch.nan
        if name == "lacking":
            del weights["layer3.0.conv2.weight"]
        safetensors.torch.save_file(weights, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(("script", "words", "line"), cases(REFUSED))
def test_what_cannot_be_ends_in_status_2_and_one_line_and_leaves_nothing(
    script, words, line, place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(place)
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("started"))
    before, out = sorted(place.rglob("*")), tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(SCRIPTS[script].main, [*QUICK[script].split(), "--out", str(out), *words.split()])
    assert stop.value.code == 2
    assert re.fullmatch(rf"[^\n]*error: [^\n]*{line}[^\n]*\n", capsys.readouterr().err)
    assert sorted(place.rglob("*")) == before
    assert not out.exists() or "finite" in line or "nan" in line
    assert not (out / "result.json").exists()
