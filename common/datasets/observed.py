"""Which images are trained on, and their observed labels: drawn noise, labels of an .npz, or labels of a file."""

from argparse import Namespace

import numpy as np

from common.datasets.given_labels import labels_of, without_removed
from common.datasets.in_memory import Data
from common.datasets.limit import limited
from common.noise import add_noise
from common.runs.cli import UserError


def observed_labels(
    data: Data,
    index: np.ndarray,
    noise_type: str,
    rate: float,
    seed: int,
    noise_file: str | None = None,
    flag: str = "--noise_type",
    posterior: np.ndarray | None = None,
) -> np.ndarray:
    """Observed labels of the training images at `index` [n]: int64 [n]. Noise is drawn for all images, then the subset is taken.

    noise_type: one of common.noise.NOISE_TYPES, "none", or "given" for the noisy_labels of an .npz; noise_file wins over it.
    flag: the name of noise_type on the command line. posterior: float [N, K] of all training images, from `posterior_for`.
    UserError: missing labels, or labels that do not fit; a noise type for more classes; a rate that cannot be reached.
    """
    labels = data.train.labels
    if noise_file:
        return labels_of(noise_file, index, len(labels), data.num_classes, paths=data.files(index))
    if noise_type == "given":
        if data.noisy_labels is None:
            raise UserError(f"{flag} given: {data.name} brings no noisy_labels; use --noise_file")
        return data.noisy_labels[index]
    if noise_type == "none":
        return labels[index]
    try:
        noisy = add_noise(noise_type, labels, rate, data.num_classes, seed, data.train.images, posterior)
        return noisy[index]
    except ValueError as error:
        raise UserError(f"{flag} {noise_type}: {error}; use another") from None


def kept_images(args: Namespace, candidates: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """The candidates, int [n] ascending, that are trained on: --limit_train, then without those that --noise_file removes.

    positions: as `without_removed`. UserError: as `without_removed`.
    """
    kept = limited(candidates, args.limit_train, args.seed)
    return without_removed(kept, args.noise_file, positions)
