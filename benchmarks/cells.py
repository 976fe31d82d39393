"""Which cells there are: the sections of the papers' presets.toml, by profile, with the command that runs each."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from common.runs.cli import UserError, read_presets

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("embedded", "short", "paper")
CLAIMS = (
    "claims"  # the presets of benchmarks/claims.toml that are of no profile: sized to test a claim on a CPU
)


class Script(NamedTuple):
    """What runs a cell."""

    path: str  # relative to the repository
    short: tuple[str, ...]  # flags that shorten the published schedule, for the profile short
    data_flag: str = "--data_path"


class Paper(NamedTuple):
    """How a paper's cells are run."""

    script: Script
    baseline: str = ""  # the method beside whose runs cross-entropy is run on the same labels, where it is none of the presets
    # by preset, the setting of its published figures, as benchmarks/reported/<paper>.csv names it: data set, noise type and,
    # where one is not enough, noise rate
    published: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    others: Mapping[str, Script] = MappingProxyType(
        {}
    )  # by name, of presets that are not for the paper's first script


def _me_momentum_settings() -> dict[str, tuple[str, ...]]:
    settings = {
        f"{dataset}/{dataset}-{short}{rate}/{method}": (dataset, noise, rate)
        for dataset in ("cifar10", "cifar100")
        for noise, short in (("symmetric", "sym"), ("instance", "inst"))
        for rate in ("0.2", "0.4")
        for method in ("me-momentum", "ce")
    }
    return settings | {
        f"clothing1m/clothing1m/{method}": ("clothing1m", "real") for method in ("me-momentum", "ce")
    }


def _sanm_settings() -> dict[str, tuple[str, ...]]:
    settings = {
        f"{dataset.lower().replace('-', '')}/{dataset.lower().replace('-', '')}-{noise}{rate}/{method}": (
            dataset,
            noise,
            rate,
        )
        for dataset in ("CIFAR-10", "CIFAR-100")
        for noise, rate in (*(("sym", rate) for rate in ("0.2", "0.5", "0.8", "0.9")), ("asym", "0.4"))
        for method in ("sanm-c2d", "sanm-dividemix", "c2d", "dividemix", "ce")
    }
    clothing = ("sanm-dividemix", "dividemix")
    return settings | {f"clothing1m/clothing1m/{method}": ("Clothing1M", "real") for method in clothing}


def _manifold_dividemix_settings() -> dict[str, tuple[str, ...]]:
    methods = ("manifold-dividemix", "without-ood-removal", "without-manifold-mixup", "ce-pretrained", "ce")
    settings = {
        f"cifar100/cifar100-imagenet32-sym{r}-ood{o}/{method}": (
            "CIFAR-100",
            "symmetric + OOD ImageNet32",
            f"r_in={r} r_out={o}",
        )
        for r, o in (("0.2", "0.2"), ("0.2", "0.4"), ("0.2", "0.6"), ("0.4", "0.4"))
        for method in methods
    }
    return settings | {
        f"mini_imagenet/mini_imagenet-red{r}/{method}": ("mini-ImageNet CNWL 32x32", "web (red)", r)
        for r in ("0.2", "0.4", "0.6", "0.8")
        for method in methods
    }


PAPERS = {
    "afm": Paper(
        Script("afm/train.py", ("--epochs", "10", "--schedule", "5", "8"), data_flag="--data-root"),
        published={
            "food101n/food101n/afm": ("Food-101N", "real web noise"),
            "food101n/food101n/ce": ("Food-101N", "real web noise"),
            "clothing1m/noisy/afm": ("Clothing1M", "real: 1M noisy only"),
            "clothing1m/noisy/ce": ("Clothing1M", "real: 1M noisy only"),
            "clothing1m/noisy+verified/afm": ("Clothing1M", "real: 1M noisy + 25k verified"),
            "clothing1m/noisy+clean/afm": ("Clothing1M", "real: 1M noisy + 50k clean"),
            "clothing1m/noisy+clean/ce": ("Clothing1M", "real: 1M noisy + 50k clean"),
        },
    ),
    "manifold_dividemix": Paper(
        Script(
            "manifold_dividemix/train_semisup.py",
            ("--epochs", "30", "--warmup-epoch", "10", "--interval", "5"),
        ),
        published=_manifold_dividemix_settings(),
        others={
            "pretrain.py": Script("manifold_dividemix/pretrain.py", ("--epochs", "100")),
            "train_semisup_miniimagenet.py": Script(
                "manifold_dividemix/train_semisup_miniimagenet.py",
                ("--epochs", "15", "--warmup-epoch", "5", "--interval", "5"),
            ),
        },
    ),
    "me_momentum": Paper(
        Script("me_momentum/main.py", ("--n_epoch", "10", "--max_outer_loop", "1")),
        published=_me_momentum_settings(),
        others={
            "Clothing.py": Script(
                "me_momentum/Clothing.py",
                ("--n_epoch", "1", "--max_inner_loop", "3", "--max_outer_loop", "1"),
                data_flag="--data_root",
            )
        },
    ),
    "sanm": Paper(
        Script("sanm/Train_cifar.py", ("--num_epochs", "30", "--lr_drop", "25")),
        published=_sanm_settings(),
        others={
            "pretrain.py": Script("sanm/pretrain.py", ("--epochs", "100")),
            "Train_clothing1M.py": Script(
                "sanm/Train_clothing1M.py", ("--num_epochs", "5", "--lr_drop", "4", "--num_batches", "1000")
            ),
        },
    ),
    "sfa": Paper(
        Script("sfa/Train_cifar.py", ("--num_epochs", "40", "--warm_up", "10", "--lr_drop", "30")),
        baseline="sfa",
        published={
            f"webvision/{name}/sfa": ("webvision", "real-world")
            for name in ("webvision", "webvision-resnet50")
        },
        others={
            "Train_webvision.py": Script("sfa/Train_webvision.py", ("--num_epochs", "10", "--lr_drop", "6"))
        },
    ),
}


class Cell(NamedTuple):
    """One cell of a paper's tables, to be run once per seed."""

    paper: str
    preset: str
    flags: tuple[str, ...]  # beyond the preset's own
    script: Script
    encoder: str | None = (
        None  # the preset, among the cells too, whose run with the same seed makes the encoder to begin from
    )

    def command(self, seed: int, out: Path, extra: list[str]) -> list[str]:
        """The command line that runs the cell with one seed into the run directory `out`."""
        words = [sys.executable, self.script.path, "--preset", self.preset]
        return [*words, *self.flags, "--seed", str(seed), "--out", str(out), *extra]


def cells(paper: str, profile: str, names: list[str] | None = None, table: str | None = None) -> list[Cell]:
    """The cells of a paper in a profile; names picks some by preset, table those whose preset begins with it.

    The presets under embedded/ are the embedded profile, those under short/ (data the paper has no protocol for) are in
    short alone, those under claims/ in CLAIMS, which stands in place of a profile; all others are the published protocol, or
    with the paper's shortening flags the profile short. UserError: a name that is no preset of the profile. A cell whose
    encoder another one makes brings that one along, before it.
    """
    presets = read_presets(ROOT / paper / "presets.toml")
    folders = {name: name.split("/")[0] for name in presets}
    found = [
        name
        for name, folder in folders.items()
        if profile == folder or (folder not in (*PROFILES, CLAIMS) and profile in ("short", "paper"))
    ]
    tables = list(dict.fromkeys(folders[name] for name in found))
    if table is not None and table not in tables:
        raise UserError(f"no table {table} in profile {profile} of {paper}: choose from {', '.join(tables)}")
    found = [name for name in found if table in (None, folders[name])]
    unknown = [name for name in names or [] if name not in found]
    if unknown:
        raise UserError(
            f"no cell {unknown[0]} in profile {profile} of {paper}: choose from {', '.join(found)}"
        )
    wanted = [own for name in names or found for own in (presets[name].get("encoder"), name) if own]
    chosen = []
    for name in dict.fromkeys(wanted):
        named = presets[name].get("script")
        script = PAPERS[paper].others[named] if named else PAPERS[paper].script
        shortened = profile == "short" and folders[name] != "short"
        flags = script.short if shortened else ()
        chosen.append(Cell(paper, name, flags, script, presets[name].get("encoder")))
    return chosen
