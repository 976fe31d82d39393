"""cleanlab's ranking of given labels (Northcutt et al. 2021), from class probabilities of plain cross-entropy out of fold.

The network, its schedule, images and labels are those of `python -m benchmarks.baseline --like RUN`; of a run of cross-entropy by
afm/train.py, its own. The precision is that of RUN. It is trained FOLDS times, each time without a fifth of the images, whose
probabilities it then gives. cleanlab is an optional extra under the AGPL, and is imported here alone.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks import baseline
from benchmarks.results import read_results
from common import datasets
from common.gpu import device as gpu
from common.gpu.augment import training_augmentation
from common.gpu.loader import Batches, Images
from common.runs.cli import UserError
from common.runs.files import write_atomic
from common.runs.label_quality import NAME, Estimate, to_csv
from common.runs.results import write_results
from common.runs.run import Labels, command, git_commit

FOLDS = 5
FOLDER = "cleanlab"  # in the directory of the run
BATCH_SIZE, LR = 128, 0.02  # as benchmarks.baseline


class Recipe(NamedTuple):
    """A network and its schedule."""

    network: Callable[[], nn.Module]  # with fresh weights: images [B, C, H, W] -> logits [B, K]
    learning_rate: Callable[[int], float]  # of an epoch, from 1
    momentum: float
    weight_decay: float
    batch_size: int
    drop_last: bool


def recipe_of(run: dict, num_classes: int, channels: int, size: int) -> Recipe:
    """The recipe of a run of cross-entropy by afm/train.py, else that of benchmarks.baseline. run: the content of args.json."""
    arguments = run["arguments"]
    if run["paper"] == "afm" and arguments["weight_mixed"] == 0:
        from afm.networks import make_network  # noqa: PLC0415  (other runs do not need it)
        from afm.train import learning_rate  # noqa: PLC0415

        args = Namespace(**arguments)
        # with SGD, weight_plain times the loss is so many times the rate, and a weight decay as many times smaller
        factor = args.weight_plain
        return Recipe(
            lambda: make_network(args, num_classes, size, channels),
            lambda epoch: factor * learning_rate(args, epoch),
            args.momentum,
            args.weight_decay / factor,
            args.train_batch,
            drop_last=True,
        )
    narrow = "narrow" in f"{arguments.get('arch')} {arguments.get('network')}"
    return Recipe(
        lambda: baseline.Network(num_classes, channels, 8 if narrow else size),
        lambda epoch: baseline.learning_rate(LR, epoch, arguments["num_epochs"]),
        0.9,
        5e-4,
        BATCH_SIZE,
        drop_last=False,
    )


def first_of_labels(runs: Iterable[Path]) -> list[Path]:
    """The runs without those that have the data set, seed, images and observed labels of an earlier one. UserError: no run."""
    first: dict[tuple, Path] = {}
    for run in runs:
        description, index, given = baseline.read_run(run)
        arguments = description["arguments"]
        order = index.argsort()
        same = index[order].tobytes(), given[order].tobytes(), arguments.get("dataset"), arguments["seed"]
        first.setdefault(same, run)
    return list(first.values())


def cleanlab_folder(run: Path, quality: pd.DataFrame, data_path: str | None, device: str) -> Path:
    """RUN/cleanlab with label_quality.csv and result.csv, made unless it is there.

    quality: of the run, with the true labels. The score is cleanlab's default, self-confidence: the probability of the given
    label out of fold. selected: cleanlab's filter finds no issue with the label. UserError: cleanlab is not installed, the
    images are not in memory, or some are OOD.
    """
    folder = run / FOLDER
    if (folder / "result.csv").is_file():
        return folder
    try:
        from cleanlab.filter import find_label_issues  # noqa: PLC0415
        from cleanlab.rank import get_label_quality_scores  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"--cleanlab: cleanlab is not installed ({error}): pip install '.[cleanlab]' (its licence is the AGPL)"
        ) from None
    begun = time.perf_counter()
    description, index, given = baseline.read_run(run)
    kinds = "image files, OOD images or images without true labels"
    refusal = UserError(f"--cleanlab: {run} is on {kinds}: give runs on data in memory")
    arguments = description["arguments"]
    paths = [path if isinstance(path, str) else "" for path in quality.path]
    from_files = any(paths) and arguments.get("dataset") != "folder"
    if from_files or (quality.true_label < 0).any() or len(quality) != len(given):
        raise refusal
    root = data_path or arguments.get("data_path") or arguments.get("data_root") or "./data"
    data = datasets.from_arguments(arguments, root)
    if any(paths) and paths != [data.paths[i] for i in index]:
        raise refusal
    picked = gpu.pick(device, arguments.get("precision", "auto"), fidelity=arguments.get("fidelity", "paper"))
    probabilities = out_of_fold(data, index, given, description, picked)
    scores = get_label_quality_scores(given, probabilities.numpy())
    issues = find_label_issues(given, probabilities.numpy(), n_jobs=1)
    estimate = Estimate(probabilities, torch.from_numpy(scores), torch.from_numpy(~issues))
    clean = quality.true_label.to_numpy().astype(np.int64)
    folder.mkdir(exist_ok=True)
    content = to_csv(Labels(index, clean, given, data.num_classes), estimate, classes=data.classes)
    write_atomic(folder / NAME, content)
    row = read_results(run / "result.csv").iloc[0].to_dict()
    row |= {"method": "CE, 5 folds, cleanlab", "seconds": round(time.perf_counter() - begun, 3)}
    row |= {
        "metric": "out_of_fold_accuracy",
        "value": 100 * float((probabilities.numpy().argmax(1) == given).mean()),
    }
    row |= {"reported": "", "delta": "", "images_per_second": "", "peak_memory_mb": ""}
    row |= {"torch": torch.__version__, "git": git_commit(), "command": command()}
    write_results(
        folder / "result.csv", [row | {"device": picked.device.type, "precision": picked.precision}]
    )
    return folder


def out_of_fold(
    data: datasets.Data, index: np.ndarray, given: np.ndarray, run: dict, device: gpu.Device
) -> Tensor:
    """Class probabilities of the training images at `index`, float32 [N, K] on the CPU, by networks trained without them.

    run: the content of args.json.
    """
    size, channels = data.train.images.shape[2:]
    arguments, recipe = run["arguments"], recipe_of(run, data.num_classes, channels, size)
    images = Images(data.train.images[index], data.mean, data.std, device.device)
    labels = torch.from_numpy(given).to(device.device)
    probabilities = torch.zeros(len(given), data.num_classes)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=arguments["seed"])
    for fold, parts in enumerate(folds.split(given, given), start=1):
        trained_on, held_out = (torch.from_numpy(part) for part in parts)
        torch.manual_seed(arguments["seed"])
        network = device.prepare(recipe.network())
        optimizer = SGD(
            network.parameters(), recipe.learning_rate(1), recipe.momentum, weight_decay=recipe.weight_decay
        )
        training: dict[str, Any] = {"shuffle": True, "generator": device.generator(arguments["seed"])}
        training |= {"augmentation": training_augmentation(data.name, size), "drop_last": recipe.drop_last}
        batches = Batches(images, recipe.batch_size, subset=trained_on.to(device.device), **training)
        for epoch in range(1, arguments["num_epochs"] + 1):
            optimizer.param_groups[0]["lr"] = recipe.learning_rate(epoch)
            loss = baseline.train_epoch(network, optimizer, batches, labels, device)
        plain = Batches(images, 256, subset=held_out.to(device.device))
        probabilities[held_out] = baseline.estimate_label_quality(network, plain, device).probabilities.cpu()
        print(f"fold {fold}/{FOLDS}  loss {loss:.4g}", flush=True)
    return probabilities
