"""A training set with wrong labels and out-of-distribution (OOD) images: the benchmark of DSOS, SNCF, PLS, Manifold DivideMix."""

import hashlib
import io
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import RandomState

from common import noise
from common.datasets.arrays import read_npz
from common.datasets.given_labels import labels_of
from common.datasets.in_memory import Data
from common.datasets.pools import FOLDERS, imagenet32_note, listing, open_pool, resized
from common.gpu import processes
from common.runs.cli import UserError
from common.runs.files import write_atomic
from common.runs.locks import InUse, Lock


class Corruption(NamedTuple):
    """What is done to a training set; rates are ratios to all its images."""

    pool: str  # imagenet32, place365, photographs, or a data set
    ood_ratio: float
    noise_type: str  # sym, asym, superclass, POSTERIOR_TYPES; no; given, the noisy labels of an .npz
    noise_rate: float
    noise_seed: int = 0  # of Python's generator and of the transition matrix
    label_rng: str = "python"  # what draws symmetric labels: python (the release), or numpy (SNCF)


class OpenSetData(NamedTuple):
    """A corrupted training set."""

    images: np.ndarray  # uint8 [N, H, W, C]
    observed: np.ndarray  # int64 [N]
    ood: np.ndarray  # bool [N]: out of distribution; these images keep the labels of those that they replaced
    sha256: str  # of the OOD images and their positions


def corrupt(
    data: Data,
    corruption: Corruption,
    root: Path,
    pool_folder: Path | None = None,
    cache: Path | None = None,
    noise_file: str | None = None,
    posterior: np.ndarray | None = None,
) -> OpenSetData:
    """The training images of `data` corrupted (manifold_dividemix/README.md, section 2.1): the same for the same arguments.

    root: where data sets are; pool_folder: where the pool's files are, if not there. cache: a folder for images taken from
    pools of files (ImageNet 32x32, Places365), so that they are read once. noise_file: observed labels in place of drawn ones.
    posterior: float [N, K] of the training images of `data`, for a noise type that needs one.
    UserError: a pool that is missing or too small; rates or a noise type that do not fit.
    """
    labels = data.train.labels
    undrawn = {"no": labels, "given": data.noisy_labels}.get(corruption.noise_type)
    if corruption.noise_type == "given" and undrawn is None and not noise_file:
        raise UserError(f"--noise-type given: {data.name} brings no noisy_labels; use --noise_file")
    rng = RandomState(noise.OPEN_SET_SEED)
    ood, replaced = replacements(data, corruption, root, pool_folder, cache, rng)
    try:
        if noise_file:
            everywhere = np.arange(len(labels))
            observed = labels_of(
                noise_file,
                everywhere,
                len(labels),
                data.num_classes,
                otherwise=labels,
                paths=data.files(everywhere),
            )
        elif undrawn is not None:
            observed = undrawn.copy()
        elif corruption.noise_type in noise.POSTERIOR_TYPES:
            observed = noise.in_distribution_from_posterior(
                corruption.noise_type,
                labels,
                ood,
                corruption.noise_rate,
                corruption.ood_ratio,
                data.num_classes,
                corruption.noise_seed,
                posterior,
            )
        else:
            python = corruption.label_rng == "python"
            observed = noise.in_distribution_noise(
                corruption.noise_type,
                labels,
                ood,
                corruption.noise_rate,
                corruption.ood_ratio,
                data.num_classes,
                rng,
                random.Random(corruption.noise_seed) if python else None,
                RandomState(corruption.noise_seed),
            )
    except ValueError as error:
        raise UserError(
            f"--noise-type {corruption.noise_type} --noise-ratio {corruption.noise_rate}: {error}"
        ) from None
    images = data.train.images.copy()
    images[ood] = replaced
    is_ood = np.zeros(len(labels), dtype=bool)
    is_ood[ood] = True
    return OpenSetData(images, observed, is_ood, _sha256(ood, replaced))


def replacements(
    data: Data,
    corruption: Corruption,
    root: Path,
    pool_folder: Path | None,
    cache: Path | None,
    rng: RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """The positions of OOD images, int64 [M], and these images, uint8 [M, H, W, C]."""
    size = len(data.train.labels)
    shape = data.train.images.shape[1:]
    if corruption.ood_ratio == 0:
        return np.empty(0, dtype=np.int64), data.train.images[:0]
    if corruption.pool == data.name:
        raise UserError(
            f"--corruption {corruption.pool}: these are the training images themselves; choose another pool"
        )
    if pool_folder is not None and not pool_folder.is_dir():
        raise UserError(
            f"--ood-dir {pool_folder}: no such folder; name the folder of {corruption.pool}'s files"
        )
    wanted = {
        "data_set": data.name,
        "images": [size, *shape],
        "pool": corruption.pool,
        "ood_ratio": corruption.ood_ratio,
        "seed": noise.OPEN_SET_SEED,
    }
    path = None
    if corruption.pool in FOLDERS:
        # a given folder without such files must not give way to a cache made from another
        wanted["files"] = listing(corruption.pool, root, pool_folder) or (pool_folder and "no files")
        path = cache and cache / f"{data.name}-{corruption.pool}-{corruption.ood_ratio}.npz"
    kept = read_cache(path, wanted) if path and path.is_file() else None
    if kept is not None:
        _say_note(corruption.pool, kept.pool_size)
        drawn = _draw(size, corruption, kept.pool_size, rng)
        if not np.array_equal(drawn.source, kept.source):
            raise UserError(f"{path} holds other images than the draws ask for: remove it")
        processes.say(f"{len(kept.source)} images of {corruption.pool} from {path}")
        return drawn.positions, kept.images

    pool = open_pool(corruption.pool, root, pool_folder)
    _say_note(corruption.pool, pool.size)
    drawn = _draw(size, corruption, pool.size, rng)
    images = resized(pool.take(drawn.source), shape)
    processes.say(f"{len(images)} of {size} training images replaced by images of {corruption.pool}")
    if path and processes.rank() == 0:
        write_cache(path, Kept(pool.size, drawn.source, images), wanted)
    return drawn.positions, images


def _draw(size: int, corruption: Corruption, pool_size: int, rng: RandomState) -> noise.OpenSet:
    try:
        return noise.open_set(size, corruption.ood_ratio, pool_size, rng)
    except ValueError as error:
        raise UserError(f"--corruption {corruption.pool}: {error}; use a smaller --ood-ratio") from None


def _say_note(pool: str, size: int) -> None:
    note = imagenet32_note(size) if pool == "imagenet32" else ""
    if note:
        processes.say(f"note: {note}")


def _sha256(positions: np.ndarray, images: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(positions, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()


# the cache ------------------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """The content of a cache file besides its parameters."""

    pool_size: int
    source: np.ndarray  # int64 [M]: rows of the pool
    images: np.ndarray  # uint8 [M, H, W, C], in the order of the positions


def write_cache(path: Path, kept: Kept, parameters: dict) -> None:
    """Write OOD images with their parameters; prints a note if the folder cannot be written."""
    content = io.BytesIO()
    parameters = {**parameters, "pool_size": kept.pool_size, "sha256": _sha256(kept.source, kept.images)}
    np.savez(content, parameters=json.dumps(parameters), source=kept.source, images=kept.images)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_suffix(".lock"), "go on"):
            write_atomic(path, content.getvalue())
    except InUse:
        processes.say(f"note: {path} is being written by another process")
    except OSError as error:
        processes.say(
            f"note: {path} cannot be written ({error.strerror}): the next run will read the pool again"
        )


def read_cache(path: Path, wanted: dict) -> Kept:
    """The content of a cache file. UserError: damaged, or made with other parameters than `wanted`.

    Without a given folder the cache serves even if the pool's files are gone.
    """
    try:
        arrays = read_npz(path)
        parameters = json.loads(str(arrays["parameters"]))
        kept = Kept(int(parameters["pool_size"]), arrays["source"], arrays["images"])
        intact = parameters["sha256"] == _sha256(kept.source, kept.images)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): remove it to make it again") from None
    differing = [
        name for name, value in wanted.items() if value is not None and parameters.get(name) != value
    ]
    if differing or not intact:
        what = f"other {', '.join(differing)}" if differing else "its content does not match its sha256"
        raise UserError(
            f"{path} was not made for this run ({what}): remove it to make it again, or name another --open-set-cache"
        )
    return kept
