"""The posterior for label noise: out-of-fold probabilities, their cache, files that do not fit."""

import numpy as np
import pytest

from common.datasets import Data, Split, posterior
from common.datasets.posterior import out_of_fold, posterior_for, read_posterior
from common.runs.cli import UserError

SIZE, CLASSES = 60, 3


def data(seed: int = 0) -> Data:
    """60 images of 3 classes, which a brightness tells apart on the whole."""
    rng = np.random.default_rng(seed)
    labels = np.arange(SIZE) % CLASSES
    images = (60 * labels[:, None, None, None] + rng.integers(0, 100, (SIZE, 2, 2, 1))).astype(np.uint8)
    split = Split(images, labels)
    return Data("tiny", split, split, CLASSES, (0.5,), (0.5,))


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_each_image_gets_the_probabilities_of_a_regression_that_has_not_seen_it():
    train = data().train
    eta, stopped = out_of_fold(train, CLASSES)
    assert eta.shape == (SIZE, CLASSES) and eta.dtype == np.float64 and stopped == 0
    assert np.allclose(eta.sum(axis=1), 1) and (eta.argmax(axis=1) == train.labels).mean() > 0.7
    assert np.array_equal(eta, out_of_fold(train, CLASSES)[0])
    # an image's own label does not matter to it: here it is the only one of its class
    alone = train.labels.copy()
    alone[7] = 3
    eta, _ = out_of_fold(train._replace(labels=alone), 5)
    assert eta[7, 3] == 0 and (eta[:, 4] == 0).all() and np.allclose(eta.sum(axis=1), 1)


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("labels", [np.zeros(SIZE, dtype=int), np.arange(SIZE)], ids=["one", "each"])
def test_labels_that_no_regression_can_be_fitted_to(labels, tmp_path):
    unfit = data()._replace(train=Split(data().train.images, labels), num_classes=SIZE)
    with pytest.raises(UserError, match=r"^no posterior of tiny: .* give one with --posterior FILE$"):
        posterior_for("hard", unfit, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_regressions_that_do_not_converge_are_counted_and_said(monkeypatch, capsys, tmp_path, recwarn):
    monkeypatch.setattr(posterior, "MAX_ITERATIONS", 2)
    posterior_for("hard", data(), tmp_path)
    assert "note: 5 of 5 regressions have not converged in 2 iterations" in capsys.readouterr().out
    assert not recwarn.list


def test_it_is_made_where_it_is_needed_and_kept_beside_the_data(tmp_path, capsys, monkeypatch):
    file = tmp_path / "tiny_posterior.npz"
    assert posterior_for("symmetric", data(), tmp_path) is None
    assert not file.exists()
    made = posterior_for("margin1", data(), tmp_path)
    assert "posterior of tiny: 5-fold logistic regression on pixels, accuracy 0." in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(posterior, "out_of_fold", None)  # must not be called
        assert np.array_equal(posterior_for("hard", data(), tmp_path), made)
    assert capsys.readouterr().out == f"posterior of tiny: {file}\n"

    relabelled = data(seed=1)
    relabelled.train.labels[:2] = 1
    for other in (data(seed=1), relabelled):
        assert not np.array_equal(posterior_for("hard", other, tmp_path), made)
        line = f"note: {file} was made from other images or labels: it is made again"
        assert line in capsys.readouterr().out

    for damaged in (b"no zip", file.read_bytes()[:-40]):
        file.write_bytes(damaged)
        assert np.array_equal(posterior_for("hard", data(), tmp_path), made)
        assert f"note: {file} is damaged (ValueError): it is made again" in capsys.readouterr().out
    np.savez(file, posterior=made)
    posterior_for("hard", data(), tmp_path)
    assert f"note: {file} is damaged (KeyError)" in capsys.readouterr().out


def test_a_folder_that_is_missing_or_cannot_be_written_is_no_error(tmp_path, capsys, monkeypatch):
    made = posterior_for("hard", data(), tmp_path / "none")
    assert not (tmp_path / "none").exists() and "note" not in capsys.readouterr().out

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(posterior, "write_atomic", refuse)
    assert np.array_equal(posterior_for("hard", data(), tmp_path), made)
    words = "cannot be written (Permission denied): the next run makes the posterior again"
    assert f"tiny_posterior.npz {words}" in capsys.readouterr().out
    assert not (tmp_path / "tiny_posterior.npz").exists()
    with posterior.FileLock(tmp_path / "tiny_posterior.lock"):
        posterior_for("hard", data(), tmp_path)
    assert "is being written by another process" in capsys.readouterr().out


def test_a_file_is_read_instead_and_no_cache_is_made(tmp_path):
    given = np.random.default_rng(0).dirichlet(np.ones(CLASSES), size=SIZE).astype(np.float32)
    np.save(tmp_path / "eta.npy", given)
    found = posterior_for("margin2", data(), tmp_path, str(tmp_path / "eta.npy"))
    assert found.dtype == np.float64 and np.array_equal(found, given.astype(np.float64))
    assert [path.name for path in tmp_path.iterdir()] == ["eta.npy"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.full((SIZE - 1, CLASSES), 1 / CLASSES), r"of shape \[60, 3\], got float64 of shape \[59, 3\]"),
        (np.full((SIZE, CLASSES), "a"), r"got <U1 of shape \[60, 3\]"),
        (np.full((SIZE, CLASSES), np.nan), "NaN or infinity, first in row 0"),
        (np.full((SIZE, CLASSES), 0.5), r"row 0 has the sum 1\.5"),
        (np.array([{}]), "Object arrays"),
        (b"no array", "magic string"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_files_that_do_not_fit_are_named_with_the_reason(tmp_path, content, reason):
    file = tmp_path / "eta.npy"
    if isinstance(content, np.ndarray):
        np.save(file, content)
    elif content:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^--posterior {file}: .*{reason}.*: give a .npy file"):
        read_posterior(file, SIZE, CLASSES)
