"""cleanlab's ranking of given labels (Northcutt et al. 2021), from class probabilities of plain cross-entropy out of fold.

The network, its schedule, images and labels are those of `python -m benchmarks.baseline --like RUN`. It is trained FOLDS times,
each time without a fifth of the images, whose probabilities it then gives. cleanlab is an optional extra under the AGPL, and is
imported here alone.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
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
from common.runs.run import Labels, command

FOLDS = 5
FOLDER = "cleanlab"  # in the directory of the run
BATCH_SIZE, LR = 128, 0.02  # as benchmarks.baseline


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
    except ImportError:
        raise UserError(
            "--cleanlab: cleanlab is not installed: pip install '.[cleanlab]' (its licence is the AGPL)"
        ) from None
    begun = time.perf_counter()
    description, index, given = baseline.read_run(run)
    if quality.path.notna().any() or (quality.true_label < 0).any() or len(quality) != len(given):
        kinds = "image files, OOD images or images without true labels"
        raise UserError(f"--cleanlab: {run} is on {kinds}: give runs on data in memory")
    arguments = description["arguments"]
    root = data_path or arguments.get("data_path") or arguments.get("data_root") or "./data"
    data = datasets.from_arguments(arguments, root)
    picked = gpu.pick(device, "auto", fidelity=arguments.get("fidelity", "paper"))
    probabilities = out_of_fold(data, index, given, arguments, picked)
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
    row |= {"reported": "", "delta": "", "images_per_second": "", "peak_memory_mb": "", "command": command()}
    write_results(
        folder / "result.csv", [row | {"device": picked.device.type, "precision": picked.precision}]
    )
    return folder


def out_of_fold(
    data: datasets.Data, index: np.ndarray, given: np.ndarray, arguments: dict, device: gpu.Device
) -> Tensor:
    """Class probabilities of the training images at `index`, float32 [N, K] on the CPU, by networks trained without them."""
    size, channels = data.train.images.shape[2:]
    narrow = "narrow" in f"{arguments.get('arch')} {arguments.get('network')}"
    images = Images(data.train.images[index], data.mean, data.std, device.device)
    labels = torch.from_numpy(given).to(device.device)
    probabilities = torch.zeros(len(given), data.num_classes)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=arguments["seed"])
    for fold, parts in enumerate(folds.split(given, given), start=1):
        trained_on, held_out = (torch.from_numpy(part) for part in parts)
        torch.manual_seed(arguments["seed"])
        network = device.prepare(baseline.Network(data.num_classes, channels, 8 if narrow else size))
        optimizer = SGD(network.parameters(), LR, momentum=0.9, weight_decay=5e-4)
        training: dict[str, Any] = {"shuffle": True, "generator": device.generator(arguments["seed"])}
        training |= {"augmentation": training_augmentation(data.name, size)}
        batches = Batches(images, BATCH_SIZE, subset=trained_on.to(device.device), **training)
        for epoch in range(1, arguments["num_epochs"] + 1):
            optimizer.param_groups[0]["lr"] = baseline.learning_rate(LR, epoch, arguments["num_epochs"])
            loss = baseline.train_epoch(network, optimizer, batches, labels, device)
        plain = Batches(images, 256, subset=held_out.to(device.device))
        probabilities[held_out] = baseline.estimate_label_quality(network, plain, device).probabilities.cpu()
        print(f"fold {fold}/{FOLDS}  loss {loss:.4g}", flush=True)
    return probabilities
