"""The posterior for label noise that depends on the image: out-of-fold probabilities of a logistic regression, or a file."""

import hashlib
import io
import time
import warnings
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from common.datasets.arrays import read_npy, read_npz
from common.datasets.in_memory import Data, Split
from common.gpu import processes
from common.noise import POSTERIOR_TYPES, checked_posterior
from common.runs.cli import UserError
from common.runs.files import write_atomic

FOLDS = 5
MAX_ITERATIONS = 1000
# part of the key of a cache: change it with the recipe
RECIPE = f"{FOLDS}-fold logistic regression on pixels, C 1, lbfgs, float32, version 1"


def posterior_for(
    noise_type: str, data: Data, root: str | Path, file: str | None = None
) -> np.ndarray | None:
    """The posterior of all training images that a noise type needs: float64 [N, K]; None if it needs none.

    file: of --posterior. Without one it is `out_of_fold`, kept as <root>/<name>_posterior.npz if the folder root exists.
    Every process must call this. UserError: a file that does not fit; images on which the regression cannot be fitted.
    """
    if noise_type not in POSTERIOR_TYPES:
        return None
    if file:
        return read_posterior(file, len(data.train.labels), data.num_classes)
    return processes.from_first(lambda: _kept_or_made(data, Path(root)))


def read_posterior(path: str | Path, size: int, num_classes: int) -> np.ndarray:
    """The posterior in a .npy file: float64 [size, num_classes]. UserError: no such file, damaged, or it does not fit."""
    try:
        return checked_posterior(read_npy(Path(path)), size, num_classes)
    except OSError as error:
        raise UserError(f"--posterior {path}: cannot be read ({error.strerror}): give a .npy file") from None
    except ValueError as error:
        raise UserError(f"--posterior {path}: {error}: give a .npy file of the whole training set") from None


def out_of_fold(train: Split, num_classes: int) -> tuple[np.ndarray, int]:
    """Class probabilities of each training image, by a logistic regression fitted without it: float64 [N, K].

    Pixels / 255 are the features, the true labels the targets. StratifiedKFold with 5 folds and seed 0; L2 penalty with C = 1,
    solver lbfgs. A class without images in the other folds has probability 0. Also returns the number of regressions
    that stopped at MAX_ITERATIONS. ValueError: fewer than 2 classes, or fewer than 5 images in each class.
    """
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415  (a second of import that few runs need)
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.model_selection import StratifiedKFold  # noqa: PLC0415

    pixels = train.images.reshape(len(train.images), -1).astype(np.float32) / 255
    # centring does not change the solution, as the intercept has no penalty; lbfgs needs a third of the iterations
    pixels -= pixels.mean(axis=0)
    posterior = np.zeros((len(pixels), num_classes))
    stopped = 0
    for others, fold in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(pixels, train.labels):
        model = LogisticRegression(max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
            model.fit(pixels[others], train.labels[others])
        stopped += int(model.n_iter_.max() >= MAX_ITERATIONS)
        posterior[np.ix_(fold, model.classes_)] = model.predict_proba(pixels[fold])
    return posterior / posterior.sum(axis=1, keepdims=True), stopped


def _kept_or_made(data: Data, root: Path) -> np.ndarray:
    path = root / f"{data.name}_posterior.npz"
    key = _sha256(data.train)
    posterior = _read_cache(path, key, data) if path.is_file() else None
    if posterior is not None:
        return posterior
    begin = time.perf_counter()
    try:
        posterior, stopped = out_of_fold(data.train, data.num_classes)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"no posterior of {data.name}: its logistic regression cannot be fitted ({reason}); give one with --posterior FILE"
        ) from None
    accuracy = (posterior.argmax(axis=1) == data.train.labels).mean()
    processes.say(
        f"posterior of {data.name}: {RECIPE.partition(',')[0]}, accuracy {accuracy:.4f}, {time.perf_counter() - begin:.1f} s"
    )
    if stopped:
        processes.say(
            f"note: {stopped} of {FOLDS} regressions have not converged in {MAX_ITERATIONS} iterations"
        )
    if root.is_dir():
        _write_cache(path, key, posterior)
    return posterior


def _sha256(train: Split) -> str:
    """sha256 of everything that the posterior depends on."""
    digest = hashlib.sha256(f"{RECIPE} {train.images.shape}".encode())
    digest.update(np.ascontiguousarray(train.images).tobytes())
    digest.update(train.labels.astype(np.int64).tobytes())
    return digest.hexdigest()


def _read_cache(path: Path, key: str, data: Data) -> np.ndarray | None:
    """The posterior in the cache; None, and a note, if it is damaged or belongs to other images or labels."""
    try:
        arrays = read_npz(path)
        posterior = checked_posterior(arrays["posterior"], len(data.train.labels), data.num_classes)
        current = str(arrays["sha256"]) == key
    except (OSError, ValueError, KeyError) as error:
        processes.say(f"note: {path} is damaged ({type(error).__name__}): it is made again")
        return None
    if not current:
        processes.say(f"note: {path} was made from other images or labels: it is made again")
        return None
    processes.say(f"posterior of {data.name}: {path}")
    return posterior


def _write_cache(path: Path, key: str, posterior: np.ndarray) -> None:
    """Write a posterior; prints a note if that fails."""
    content = io.BytesIO()
    np.savez(content, posterior=posterior, sha256=key)
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            write_atomic(path, content.getvalue())
    except Timeout:
        processes.say(f"note: {path} is being written by another process")
    except OSError as error:
        processes.say(
            f"note: {path} cannot be written ({error.strerror}): the next run makes the posterior again"
        )
