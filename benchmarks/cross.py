"""All five methods and cross-entropy on the same images, observed labels, backbone and number of epochs.

    make cross                                            # digits: no data, no GPU
    python -m benchmarks.cross --dataset cifar10 --data_path ./data
    python -m benchmarks.cross --dataset mnist --settings sym0.5 --limit_train 3000 --seeds 1

benchmarks/cross.toml says what is compared. This script draws the label noise once for each setting and seed, before any
method starts, and gives it to all methods: as a file for --noise_file, or as an .npz that replaces the data set if the
training set is a part of it (long tails, --limit_train). Human labels (CIFAR-10N) are read from
DATA_PATH/cifar10n_worse_label.npy and DATA_PATH/cifar10n_aggre_label.npy; this repository does not include them. Every run is
a process started by its command line.
"""

import io
import itertools
import json
import random
import shlex
import sys
import tomllib
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import ROOT
from benchmarks.engines import Task, add_engine_flags, print_commands, run_all
from benchmarks.results import CROSS, read_results
from benchmarks.run import collect, from_root
from benchmarks.tables import cross_table
from common import noise
from common.runs import cli
from common.runs.cli import UserError
from common.runs.files import write_atomic
from common.runs.results import write_results

if TYPE_CHECKING:
    from common.datasets import Data

DESCRIPTION = ROOT / "benchmarks" / "cross.toml"


class Script(NamedTuple):
    """The flags of a method's script for the images, and for labels that come with them."""

    path: str
    data_flag: str
    given: tuple[str, ...]  # for labels that an .npz includes
    always: tuple[str, ...] = ()


AFM = Script("afm/train.py", "--data-root", ("--noise-type", "given"))
METHODS = {
    "ce": AFM,
    "afm": AFM,
    "sfa": Script("sfa/Train_cifar.py", "--data_path", ("--noise_mode", "given"), ("--imb_type", "none")),
    "me_momentum": Script("me_momentum/main.py", "--data_path", ("--noise_type", "given")),
    "sanm": Script("sanm/Train_cifar.py", "--data_path", ("--noise_mode", "given")),
    "manifold_dividemix": Script(
        "manifold_dividemix/train_semisup.py", "--data_path", ("--noise-type", "given"), ("--ood-ratio", "0")
    ),
}
# reads no labels
PRETRAIN = Script("manifold_dividemix/pretrain.py", "--data_path", (), ("--ood-ratio", "0"))


class Setting(NamedTuple):
    """One row of the table: a data set and its label noise."""

    data: str
    name: str
    noise_type: str
    noise_rate: float | None = None
    imb_factor: float | None = None
    labels: str | None = None  # the file of human labels
    images: int | None = None  # the file has labels of the first so many training images only

    @property
    def cell(self) -> str:
        """Its name in the results."""
        return f"{self.data}-{self.name}"


class Inputs(NamedTuple):
    """The input of all methods for one setting and seed: a file of labels, or a folder with a data set."""

    labels: Path | None
    folder: Path | None


def settings_of(data: str, names: list[str] | None, description: dict) -> list[Setting]:
    """The settings of a data set, or those of them that are named. UserError: a name that is none of them."""
    known = description[data]["settings"]
    if unknown := [name for name in names or [] if name not in known]:
        choices = ", ".join(known)
        raise UserError(f"--settings {unknown[0]}: {data} has no such setting, choose from {choices}")
    return [Setting(data, name, **description["settings"][name]) for name in dict.fromkeys(names or known)]


# the same images and labels for all -----------------------------------------------------------------------------------


def inputs_of(setting: Setting, seed: int, out: Path, data_path: Path, limit: int | None) -> Inputs:
    """The paths of the images and labels of a setting, which may not exist yet."""
    if setting.imb_factor is not None or setting.images is not None or limit is not None:
        part = f"-limit{limit}" if limit is not None else ""
        return Inputs(None, out / "cross_data" / f"{setting.cell}{part}-seed{seed}")
    if setting.labels is not None:
        return Inputs(data_path / setting.labels, None)
    return Inputs(out / "cross_data" / f"{setting.cell}-seed{seed}.npy", None)


def prepare(setting: Setting, seed: int, inputs: Inputs, data_path: Path, limit: int | None) -> None:
    """Draw the labels of a setting and write them, with the images if these are a part of the data set.

    UserError: the data set is missing, or the file exists with other content.
    """
    from common import datasets  # noqa: PLC0415  (imports torch)
    from common.datasets.limit import limited  # noqa: PLC0415  (imports torch)

    if setting.labels is not None and inputs.folder is None:
        return  # the scripts read the file itself
    target = inputs.labels if inputs.labels is not None else inputs.folder / f"{setting.data}.npz"
    data = datasets.load(setting.data, data_path)
    index, observed = draw(setting, seed, data, data_path)
    kept = limited(np.arange(len(index)), limit, seed)
    buffer = io.BytesIO()
    if inputs.folder is None:
        np.save(buffer, observed, allow_pickle=False)
    else:
        train = index[kept]
        arrays = {"train_images": data.train.images[train], "train_labels": data.train.labels[train]}
        arrays |= {"test_images": data.test.images, "test_labels": data.test.labels}
        np.savez_compressed(buffer, **arrays, noisy_labels=observed[kept])
    if target.is_file() and target.read_bytes() != buffer.getvalue():
        raise UserError(
            f"{target} was made from other data, or by another description of the setting: remove it and the runs that read it, "
            "or choose another --out"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, buffer.getvalue())


def check_given_labels(settings: list[Setting], data_path: Path) -> None:
    """UserError: human labels are missing."""
    for setting in settings:
        if setting.labels is not None and not (data_path / setting.labels).is_file():
            raise UserError(
                f"{data_path / setting.labels} is not there: put CIFAR-10N's labels into it, 50000 whole numbers in the order "
                f"of CIFAR-10's training set, or leave {setting.name} out with --settings"
            )


def draw(setting: Setting, seed: int, data: "Data", data_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The training images of a setting, int [n], ascending, and their observed labels, int [n]."""
    from common import datasets  # noqa: PLC0415  (imports torch)
    from common.datasets.posterior import posterior_for  # noqa: PLC0415  (imports torch)

    labels = data.train.labels
    every = np.arange(setting.images or len(labels))
    if setting.labels is not None:
        path, of_first = data_path / setting.labels, setting.images is not None
        return every, datasets.labels_of(path, every, len(labels), data.num_classes, lambda _: of_first)
    posterior = posterior_for(setting.noise_type, data, data_path)
    if setting.imb_factor is None:
        given = (data.num_classes, seed, data.train.images, posterior)
        return every, noise.add_noise(setting.noise_type, labels, setting.noise_rate, *given)
    python_rng, rng = random.Random(seed), np.random.RandomState(seed)
    counts = noise.class_counts(len(labels), data.num_classes, "exp", setting.imb_factor)
    index = noise.long_tailed(labels, counts, rng)
    kind, rate = setting.noise_type, setting.noise_rate
    if posterior is not None:
        observed = noise.from_posterior(kind, labels[index], rate, data.num_classes, seed, posterior[index])
    else:
        observed = noise.long_tailed_noise(kind, labels[index], data.num_classes, rate, python_rng, rng)
    order = index.argsort()  # sorted by class would harm a method that does not shuffle
    return index[order], observed[order]


# the runs -------------------------------------------------------------------------------------------------------------


def flags_in(setting: Setting, own: dict) -> dict[str, str]:
    """The flags of each method in a setting: those of the data set, then those that the setting adds."""
    more = own.get("more", {}).get(setting.name, {})
    return {method: f"{flags} {more.get(method, '')}".strip() for method, flags in own["flags"].items()}


def make_task(method: str, setting: Setting, seed: int, inputs: Inputs, args: Namespace, flags: dict) -> Task:
    """The run of a method, and before it its pre-training, if any."""
    where = setting.name + (f"-limit{args.limit_train}" if args.limit_train else "")
    folder = Path(args.out).resolve() / "runs" / CROSS / setting.data / where / method / f"seed{seed}"
    shared = ["--dataset", setting.data, "--seed", str(seed)]
    for name in ("device", "precision"):
        shared += [f"--{name}", getattr(args, name)] if getattr(args, name) else []

    def command(script: Script, own: str, out: Path, *more: str) -> list[str]:
        data = from_root(inputs.folder or Path(args.data_path))
        words = [sys.executable, script.path, *shared, script.data_flag, data, *script.always, *more]
        return [*words, *shlex.split(own), "--out", from_root(out)]

    labels = ["--noise_file", from_root(inputs.labels)] if inputs.labels else METHODS[method].given
    commands, more = [], []
    if method == "manifold_dividemix":
        first = folder / "pretrain"
        commands.append((first, command(PRETRAIN, flags["pretrain"], first)))
        more = ["--pretrained", from_root(first / "encoder.safetensors")]
    commands.append((folder, command(METHODS[method], flags[method], folder, *labels, *more)))
    return Task(f"{setting.cell} {method} seed {seed}", folder, tuple(commands))


def columns_of(setting: Setting) -> dict:
    """The columns of result rows that describe the labels of a setting; a script that reads a file cannot know them."""
    values = {name: getattr(setting, name) for name in ("noise_type", "noise_rate", "imb_factor")}
    return {name: "" if value is None else value for name, value in values.items()}


def rows_of(task: Task, setting: Setting, description: dict, limit: int | None) -> pd.DataFrame:
    """The result rows of a finished task as rows of this table; seconds and images per second are of all its runs."""
    results = [json.loads((folder / "result.json").read_text()) for folder, _ in task.commands]
    seconds = sum(result["timing"]["seconds"] for result in results)
    images = sum(result["images"] for result in results)
    subset = f"+limit_train={limit}" if limit else ""
    columns = {"table": CROSS, "cell": setting.cell, "dataset": setting.data, "ood_ratio": ""}
    columns |= columns_of(setting)
    columns |= {"profile": description["profile"] + subset, "epochs": description["epochs"]}
    columns |= {"seconds": round(seconds, 3), "images_per_second": round(images / seconds, 1)}
    return collect([task.folder]).assign(**columns)


# the command line -----------------------------------------------------------------------------------------------------


def make_parser(description: dict) -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.cross", description=__doc__)
    add, methods = parser.add_argument, list(METHODS)
    names = [name for name in description if name != "settings"]
    only = "these only, such as sym0.5; by default all of the data set's"
    seeds: dict[str, Any] = {"nargs": "+", "type": cli.seed, "default": [1, 2, 3]}
    given = "handed to the scripts"
    out = "for cross_DATASET.csv, cross_data/ and runs/"
    add("--dataset", choices=names, default="digits", help="the data set")
    add("--settings", nargs="+", metavar="NAME", help=only)
    add("--methods", nargs="+", choices=methods, default=methods, help="these only")
    add("--seeds", **seeds, metavar="N", help="one run each; the noise differs too")
    add("--limit_train", type=cli.count, metavar="N", help="a seeded subset, the same for all methods")
    add("--data_path", default="./data", metavar="DIR", help="where the data sets are")
    add("--device", choices=cli.DEVICES, help=f"where to train; {given}")
    add("--precision", choices=["auto", "fp32", "bf16"], help=given)
    add("--out", default="results", metavar="DIR", help=out)
    add("--dry_run", action="store_true", help="print the commands and stop")
    add_engine_flags(parser)
    return parser


def main(argv=None) -> None:
    """Draw, run, collect, print the table."""
    description = tomllib.loads(DESCRIPTION.read_text(encoding="utf-8"))
    args = make_parser(description).parse_args(argv)
    own, out, data_path = description[args.dataset], Path(args.out).resolve(), Path(args.data_path).resolve()
    seeds = dict.fromkeys(args.seeds)  # one run each, however often a seed is named
    settings = settings_of(args.dataset, args.settings, description)
    if not args.dry_run:
        check_given_labels(settings, data_path)
    tasks = []
    for setting, seed in itertools.product(settings, seeds):
        inputs = inputs_of(setting, seed, out, data_path, args.limit_train)
        if not args.dry_run:
            prepare(setting, seed, inputs, data_path, args.limit_train)
        for method in dict.fromkeys(args.methods):
            tasks.append((make_task(method, setting, seed, inputs, args, flags_in(setting, own)), setting))
    if args.dry_run:
        print_commands(task for task, _ in tasks)
        return
    run_all([task for task, _ in tasks], args, one_thread=own["profile"] == "embedded")
    rows = [rows_of(task, setting, own, args.limit_train) for task, setting in tasks]
    target = out / f"{CROSS}_{args.dataset}.csv"
    write_results(target, pd.concat(rows).to_dict("records"))
    about = "test accuracy after the last epoch, mean ± standard deviation over seeds, in percent"
    print(f"\n{target}: {about}\n")
    print("\n".join(cross_table(read_results(target))))


if __name__ == "__main__":
    cli.exit_cleanly(main)
