"""A run's directory: what is written, what is refused, and resuming after a stop; with a loop that only counts."""

import csv
import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import sys
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.gpu import processes
from common.gpu.device import Device
from common.runs import cli, results
from common.runs.cli import UserError
from common.runs.names import run_name
from common.runs.run import ROOT, Run, command, content_of
from tests.lines import message

CPU = Device(torch.device("cpu"), "fp32", "for the test")
ARGUMENTS = {"resume": "auto", "num_epochs": 3, "seed": 1, "lr": 0.1, "fidelity": "paper", "preset": None}
CELL = {"dataset": "digits", "noise_type": "imb", "noise_rate": 0.5, "imb_factor": 0.1, "ood_ratio": None}
CELL |= {"profile": "short"}
COMMAND = "python sfa/Train_cifar.py --dataset digits"
CLEAN = np.array([0, 0, 0, 0, 1, 1, 2, 2])
NOISY = np.array([0, 1, 0, 2, 1, 1, 2, 0])
INDEX = np.array([3, 5, 8, 9, 11, 20, 21, 30])


@pytest.fixture
def start(monkeypatch):
    """start(folder, flag=value, ...) opens a run; a run left unfinished has to be released before another may start."""
    monkeypatch.setattr("sys.argv", COMMAND.split()[1:])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as of a script run by its path
    runs = []

    def open_run(folder: Path, **changed) -> Run:
        args = Namespace(**(ARGUMENTS | {"out": str(folder)} | changed))
        runs.append(Run(args, CPU, paper="sfa", method="SFA", name="name", cell=CELL))
        return runs[-1]

    yield open_run
    for run in runs:
        run.release()


def begin(run: Run) -> Run:
    """The part of a script before its epochs. The run keeps the state run.state."""
    run.state = {"memory": {"total": 0}}
    run.save_labels(INDEX, CLEAN, NOISY, num_classes=3)
    run.resume(run.state)
    return run


def do_epoch(run: Run, epoch: int) -> None:
    """An epoch that counts, and logs numbers made from the count."""
    run.state["memory"]["total"] += epoch
    total = run.state["memory"]["total"]
    auc = math.nan if epoch == 1 else 0.5
    run.log(epoch, loss=1 / total, test_accuracy=10.0 * total, auc=auc, count=total)


def train(run: Run, stop_after: int | None = None) -> dict:
    """A script's loop; stop_after=k ends it in the middle of epoch k: logged, but without its checkpoint."""
    begin(run)
    for epoch in run.epochs(run.args.num_epochs):
        do_epoch(run, epoch)
        if epoch == stop_after:
            run.release()
            return run.state
    run.finish(last_auc=run.rows[-1]["auc"], nothing=None)
    return run.state


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(path: Path) -> list[str]:
    """The lines of a log.csv without the last column."""
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refused(words: str, folder: Path, function, *arguments, **options) -> None:
    """A call ends in a line that says these words and names the folder, whose files stay as they are."""
    before = content(folder)
    text = message(function, *arguments, **options)
    assert re.search(words, text) and str(folder) in text
    assert content(folder) == before


def test_the_log_has_rows_of_the_same_columns_and_empty_cells_for_nan_and_none(start, tmp_path):
    run = begin(start(tmp_path))
    row = {"loss": None, "test_accuracy": np.float32(50), "auc": math.nan}
    row |= {"selected": np.int64(7), "split": "a"}
    with pytest.raises(RuntimeError, match="epoch 3 was not logged"):
        for epoch in run.epochs(4):
            if epoch < 3:
                run.log(epoch, **row)
            else:
                with pytest.raises(ValueError, match=r"epoch 3 .*more"):
                    run.log(epoch, **row, more=0.5)
    rows = table(tmp_path / "log.csv")
    assert list(rows[0]) == ["epoch", "loss", "test_accuracy", "auc", "selected", "split", "seconds"]
    assert [row.pop("seconds") != "" for row in rows] == [True, True]
    assert [list(row.values()) for row in rows] == [[n, "", "50.0", "", "7.0", "a"] for n in "12"]


def test_epochs_without_a_known_end_end_where_the_script_breaks(start, tmp_path, capsys):
    run = begin(start(tmp_path))
    for epoch in run.epochs(None):
        if epoch == 4:
            break
        run.log(epoch, test_accuracy=float(epoch))
    assert "epoch 3  test_accuracy 3  " in capsys.readouterr().out
    run.release()
    again = begin(start(tmp_path))
    assert len(again.rows) == 3
    assert next(again.epochs(None)) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
@pytest.mark.parametrize("name", ["loss", "train_loss"])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_logged(name, value, start, tmp_path):
    run = begin(start(tmp_path))
    with pytest.raises(UserError, match=rf"^{name} is {value} at epoch 1: "):
        run.log(next(run.epochs(1)), **{name: value}, test_accuracy=1.0)
    assert not (tmp_path / "log.csv").exists()


def test_result_json_has_best_last_and_the_mean_of_the_last_ten(start, tmp_path):
    run = begin(start(tmp_path / "run", num_epochs=12))
    curve = [5.0, 90.0, 20.0, *range(30, 75, 5)]
    for epoch in run.epochs(12):
        batches = [(torch.zeros(4, 1), torch.arange(4)), (torch.zeros(3, 1), torch.arange(3))]
        assert len(list(run.progress(batches, "training"))) == 2
        list(run.progress(batches, "evaluation", training=False))
        run.log(epoch, test_accuracy=curve[epoch - 1], auc=0.25)
    run.finish(last_auc=run.rows[-1]["auc"], undefined=math.nan)
    result, kept, noise = (read(run.folder, name) for name in ("result", "args", "noise"))
    expected = {"best": 90, "last": 70, "last10": np.mean(curve[2:]), "last_auc": 0.25, "undefined": None}
    assert result["metrics"] == pytest.approx(expected)
    expected = {"metric": "test_accuracy", "best_epoch": 2, "images": 12 * 7, "command": COMMAND}
    expected |= {**CELL, "paper": "sfa", "method": "SFA", "table": "", "cell": "run", "fidelity": "paper"}
    expected |= {"seed": 1, "epochs": 12, "environment": kept["environment"]}
    expected |= {"noise": {key: noise[key] for key in ("sha256", "samples", "realised_rate")}}
    assert result.items() >= expected.items()
    assert result["environment"].items() >= {"device": "cpu", "precision": "fp32"}.items()
    assert result["timing"].keys() == {"seconds", "images_per_second", "peak_memory_mb"}
    assert min(result["timing"].values()) > 0
    assert kept["arguments"].items() >= {"lr": 0.1, "seed": 1}.items()
    assert kept["command"] == COMMAND and kept["cell"].items() <= result.items()


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("longtail/if10", ("longtail", "if10")),
        ("clothing1m/noisy+clean/afm", ("clothing1m", "noisy+clean")),
        ("alone", ("alone", "run")),
        (None, ("", "run")),
    ],
)
def test_result_csv_has_a_row_per_metric_with_table_and_cell_of_the_preset(preset, names, start, tmp_path):
    folder = tmp_path / "run"
    train(start(folder, preset=preset))
    for own in (read(folder, "args")["cell"], read(folder, "result")):
        assert (own["table"], own["cell"]) == names
    rows = table(folder / "result.csv")
    assert list(rows[0]) == list(results.COLUMNS)
    # totals 1, 3, 6; a metric without a value has no row
    values = {"best": 60, "last": 60, "last10": 100 / 3, "last_auc": 0.5}
    assert {row["metric"]: float(row["value"]) for row in rows} == pytest.approx(values)
    expected = {"paper": "sfa", "method": "SFA", "table": names[0], "cell": names[1], "command": COMMAND}
    expected |= {"dataset": "digits", "noise_type": "imb", "noise_rate": "0.5", "ood_ratio": ""}
    expected |= {"seed": "1", "epochs": "3", "profile": "short", "fidelity": "paper"}
    expected |= {"device": "cpu", "precision": "fp32", "reported": "", "delta": ""}
    assert all(row.items() >= expected.items() for row in rows)


@pytest.mark.parametrize("asked", [False, True])
def test_a_full_test_is_a_metric_of_its_own_that_says_how_many_images_it_saw(asked, start, tmp_path):
    run, calls = begin(start(tmp_path, limit_train=8, limit_test=2, full_test_at_end=asked)), []
    for epoch in run.epochs(3):
        do_epoch(run, epoch)
    measured = {"full_test": 62.5, "full_test_images": 1000}
    full = run.full_test(lambda: calls.append(1) or measured)
    assert full == (measured if asked else {})
    run.finish(**full)
    assert run.full_test(calls.clear) == {}, "not measured again"
    rows = table(tmp_path / "result.csv")
    assert {row["profile"] for row in rows} == {"short+limit_train=8+limit_test=2"}
    assert measured.keys() <= {row["metric"] for row in rows} or not asked
    assert len(calls) == asked


def test_a_finished_run_is_left_as_it_is(start, tmp_path):
    train(start(tmp_path))
    before = {name: (tmp_path / name).read_bytes() for name in ("log.csv", "result.json", "result.csv")}
    run = begin(start(tmp_path))
    assert list(run.epochs(3)) == []
    run.finish(last_auc=0.25)  # other metrics than those that were written
    assert run.state == {"memory": {"total": 6}}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_without_out_the_directory_is_named_by_paper_and_name(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(tmp_path, out=None)
    assert (tmp_path / "results" / "runs" / "sfa" / "name" / "args.json").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lr": 0.2}, "lr was 0.1, now 0.2"),
        ({"num_epochs": 4}, "num_epochs was 3, now 4"),
        ({"preset": "a/b"}, "preset was None, now a/b"),
        ({"new_flag": 7}, r"new_flag was None, now 7 \(the run, of commit .*, has no such flag"),
        ({"resume": "never"}, "holds a run already.*--resume auto"),
    ],
)
@pytest.mark.parametrize("stop_after", [1, None], ids=["unfinished", "finished"])
def test_a_directory_in_use_and_other_arguments_are_refused(stop_after, changed, words, start, tmp_path):
    run = start(tmp_path, resume="never")  # an empty directory is fine
    assert_refused("in use", tmp_path, start, tmp_path)
    train(run, stop_after)
    assert_refused(words, tmp_path, start, tmp_path, **changed)


@pytest.mark.parametrize("flag", ["data_path", "data_root", "workers", "posterior", "on_bad_image"])
def test_what_the_result_does_not_depend_on_may_change_and_is_not_in_the_name(flag, start, tmp_path):
    places = ("data_path", "data_root", "posterior")
    train(start(tmp_path, _places=places, **{flag: "one"}), stop_after=2)
    train(start(tmp_path, _places=places, **{flag: "other"}))
    assert (tmp_path / "result.json").exists()
    assert named(**{flag: "other"}) == named()


def test_a_file_may_move_with_its_content_and_a_name_has_its_last_part(start, tmp_path):
    encoder = tmp_path / "a" / "encoder.pt"
    encoder.parent.mkdir()
    encoder.write_bytes(b"weights")
    run = tmp_path / "run"
    train(start(run, _places=("pretrained",), pretrained=str(encoder)), stop_after=2)
    moved = encoder.rename(tmp_path / "encoder.pt")
    train(start(run, _places=("pretrained",), pretrained=str(moved)), stop_after=1)
    for other in (None, "none"):
        with pytest.raises(UserError, match=r"pretrained .* has another content"):
            start(run, _places=("pretrained",), pretrained=other)
    moved.write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"encoder\.pt has another content than .*a/encoder\.pt had"):
        start(run, _places=("pretrained",), pretrained=str(moved))
    names = [named(_places=("pretrained",), pretrained=f"{folder}/encoder.pt") for folder in ("a", "b/c")]
    assert names[0] == names[1] and names[0].endswith("pretrained_encoder.pt")


def test_a_cache_of_images_is_what_its_indices_say(tmp_path):
    assert content_of(None) is None and content_of("imagenet") == "imagenet"
    for name, index in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "train" / "index.npz").write_bytes(index)
    found = [content_of(str(tmp_path / name)) for name in "abc"]
    assert found[0] == found[1] != found[2]


def test_other_training_images_labels_or_images_left_out_are_refused_and_change_nothing(start, tmp_path):
    run = start(tmp_path)
    run.save_skipped([("a.jpg", 4, "damaged")])
    train(run, stop_after=1)
    run = start(tmp_path)
    run.save_skipped([("a.jpg", 4, "damaged")])
    words = "began with other training images"
    assert_refused(words, tmp_path, run.save_labels, INDEX + 1, CLEAN, NOISY, 3)
    assert_refused("other labels", tmp_path, run.save_labels, INDEX, CLEAN, np.roll(NOISY, 1), 3)
    for skipped in ([], [("b.jpg", 5, "damaged")]):
        assert_refused("other images left out", tmp_path, run.save_skipped, skipped)


@pytest.mark.parametrize("name", ["log.csv", "result.json", "checkpoint.pt"])
def test_a_directory_with_files_of_something_else_is_refused(name, start, tmp_path):
    (tmp_path / name).write_text("of another program")
    with pytest.raises(UserError, match=name):
        start(tmp_path)
    assert (tmp_path / name).read_text() == "of another program"
    assert not (tmp_path / "args.json").exists()
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(UserError, match=r"args\.json is damaged"):
        start(tmp_path)


MATRIX = [[0.5, 0.25, 0.25, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("clean", "rate", "matrix", "words"),
    [(CLEAN, 3 / 8, MATRIX, "realised noise rate 0.3750"), (None, None, None, "true labels unknown")],
)
def test_labels_are_kept_with_checksum_and_noise(clean, rate, matrix, words, start, tmp_path, capsys):
    run = start(tmp_path)
    run.save_labels(INDEX, clean, NOISY, num_classes=4)
    assert np.array_equal(np.load(tmp_path / "noisy_labels.npy", allow_pickle=False), NOISY)
    assert np.array_equal(np.load(tmp_path / "train_index.npy", allow_pickle=False), INDEX)
    sha256 = hashlib.sha256((tmp_path / "noisy_labels.npy").read_bytes()).hexdigest()
    expected = {"sha256": sha256, "samples": 8, "realised_rate": rate, "transition_matrix": matrix}
    assert read(tmp_path, "noise") == expected | {"observed_counts": [3, 3, 2, 0]}
    line = f"8 training samples, {words}, labels sha256 {sha256[:12]}"
    assert [x for x in capsys.readouterr().out.splitlines() if "training samples" in x] == [line]
    run.resume({"memory": {"total": 0}})
    run.log(next(run.epochs(1)), test_accuracy=1.0)
    run.finish()
    assert read(tmp_path, "result")["noise"]["realised_rate"] == rate


def test_a_file_is_written_whole_over_the_one_before_by_the_first_process_alone(start, tmp_path, monkeypatch):
    run = start(tmp_path)
    before = set(content(tmp_path))
    run.save_file("weights.pt", b"long content of an epoch")
    run.save_file("weights.pt", b"short")
    assert (tmp_path / "weights.pt").read_bytes() == b"short"
    run.save_arrays("arrays", a=NOISY, b=CLEAN.astype(np.float32))
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["a"], NOISY) and arrays["b"].dtype == np.float32
    assert set(content(tmp_path)) - before == {"weights.pt", "arrays.npz"}, "nothing temporary is left"
    monkeypatch.setattr(processes, "rank", lambda: 1)
    run.save_file("weights.pt", b"of another process")
    run.save_arrays("more", a=NOISY)
    assert (tmp_path / "weights.pt").read_bytes() == b"short" and not (tmp_path / "more.npz").exists()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_stopped_in_an_epoch_goes_on_as_if_nothing_had_happened(stop_after, start, tmp_path):
    folders = tmp_path / "reference" / "run", tmp_path / "run"
    uninterrupted = train(start(folders[0]))
    train(start(folders[1]), stop_after)
    assert train(start(folders[1])) == uninterrupted
    logs = [without_seconds(folder / "log.csv") for folder in folders]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    found = [read(folder, "result") for folder in folders]
    for result in found:
        del result["timing"], result["environment"]["git"]  # a commit may come between the two runs
    assert found[0] == found[1]


def test_the_global_generator_images_and_time_go_on_where_the_checkpoint_was_made(start, tmp_path):
    batches = [(torch.zeros(5, 1), torch.arange(5))]
    torch.manual_seed(5)
    run = begin(start(tmp_path))
    epochs = run.epochs(3)
    list(run.progress(batches, f"epoch {next(epochs)}"))
    do_epoch(run, 1)
    torch.rand(3)
    next(epochs)  # makes the checkpoint of epoch 1
    expected = torch.rand(3)
    list(run.progress(batches, "epoch 2"))  # of an epoch that will be done again
    run.release()
    torch.manual_seed(6)
    again = begin(start(tmp_path))
    assert torch.equal(torch.rand(3), expected)
    assert again.images == 5 and again.seconds == run.seconds > 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("moment", "done"), [("batch", 1), ("epoch", 2)])
def test_a_signal_stops_at_the_next_step(moment, done, number, status, start, tmp_path, capsys):
    run = begin(start(tmp_path))
    with pytest.raises(SystemExit) as stop:
        for epoch in run.epochs(3):
            if epoch == 2:
                os.kill(os.getpid(), number)
            if moment == "batch":
                list(run.progress([(torch.zeros(1, 1), torch.arange(1))], "training"))
            do_epoch(run, epoch)
    assert stop.value.code == status
    line = f"{number.name}: stopped; the same command resumes after epoch {done}"
    assert capsys.readouterr().err.splitlines() == [line]
    run.release()
    run = begin(start(tmp_path))
    assert run.state["memory"]["total"] == sum(range(done + 1))
    assert next(run.epochs(3)) == done + 1


@pytest.mark.parametrize(
    "way",
    [None, UserError("a mistake"), ZeroDivisionError(), KeyboardInterrupt(), SystemExit(3)],
    ids=lambda way: type(way).__name__,
)
@pytest.mark.parametrize("in_thread", [False, True], ids=["", "thread"])
def test_however_a_script_ends_its_lock_and_the_signals_are_free(way, in_thread, start, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    kept = []  # the error with its traceback, as a notebook keeps it

    @cli.script
    def main(_):
        begin(start(tmp_path))
        if way is not None:
            raise way

    def call():
        try:
            main([])
        except BaseException as error:
            kept.append(error)

    if in_thread:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    assert kept == ([] if way is None else [way])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert {"heartbeat", "signals"}.isdisjoint(thread.name for thread in threading.enumerate())
    assert not (tmp_path / ".lock").exists()
    train(start(tmp_path))
    assert (tmp_path / "result.json").exists()


def fill(run: Run, name: str) -> None:
    """Have the next write of a file meet a full disk."""
    if name == "events":
        run._events.path = Path("/dev/full")
    elif name == "log.csv":
        (run.folder / name).symlink_to("/dev/full")
    else:
        (run.folder / f"{name}.tmp").symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("name", "fills", "resumes"),
    [
        ("checkpoint.pt", 1, "resumes after epoch 0"),
        ("checkpoint.pt", 3, "resumes after epoch 2"),
        ("log.csv", 1, "resumes after epoch 0"),
        ("events", 2, "resumes after epoch 1"),
        ("result.csv", 3, "resumes after epoch 3"),
        ("result.json", 3, "resumes after epoch 3"),
        ("noisy_labels.npy", 0, "starts again"),
    ],
)
def test_on_a_full_disk_the_last_checkpoint_stays(name, fills, resumes, start, tmp_path):
    reference, folder = tmp_path / "reference" / "run", tmp_path / "run"
    train(start(reference))

    @cli.script
    def main(_):
        run = start(folder)
        if fills == 0:
            fill(run, name)
        begin(run)
        for epoch in run.epochs(3):
            if epoch == fills:
                fill(run, name)
            do_epoch(run, epoch)
        run.finish(last_auc=run.rows[-1]["auc"])

    with pytest.raises(cli.MachineError) as error:
        main([])
    assert error.value.status == 2
    line = rf".*{name if name != 'events' else '/dev/full'} cannot be written \(No space left on device\): make room, "
    assert re.fullmatch(f"{line}the same command {resumes}", str(error.value))
    assert not list(folder.glob("*.tmp"))
    if name == "log.csv":
        (folder / name).unlink()
    run = begin(start(folder))
    assert resumes.endswith(f"epoch {len(run.rows)}") or fills == 0
    run.release()
    train(start(folder))
    assert without_seconds(folder / "log.csv") == without_seconds(reference / "log.csv")


@pytest.mark.parametrize(
    ("resume", "epochs", "line"),
    [
        ("auto", 0, "the same command starts again"),
        ("never", 1, "the same command with --resume auto resumes after epoch 1"),
        ("auto", 1, "the same command resumes after epoch 1"),
    ],
)
def test_an_error_of_the_machine_says_what_the_same_command_does(resume, epochs, line, start, tmp_path):
    @cli.script
    def main(_):
        run = start(tmp_path, resume=resume)
        if epochs:
            loop = begin(run).epochs(3)
            do_epoch(run, next(loop))
            next(loop)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(cli.WorkerDied, match=rf"is killed by signal: Killed: .*, {line}$"):
        main([])


def test_a_run_whose_directory_was_taken_over_ends_before_its_checkpoint(start, tmp_path):
    run = begin(start(tmp_path))
    epochs = run.epochs(3)
    run.log(next(epochs), test_accuracy=1.0)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / ".lock").write_text("4242\nnode018\n2026-01-30 12:00:00\n")
    with pytest.raises(UserError, match="was taken over by process 4242 on node018"):
        next(epochs)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


DEFAULTS = {"dataset": "cifar10", "lr": 0.02, "T": 0.5, "noise_file": None, "compile": False}


def named(always=("dataset",), **changed) -> str:
    unsaid = {"out": "somewhere", "resume": "never", "preset": "a/b", "data_path": "/data"}
    return run_name(Namespace(**{**DEFAULTS, **unsaid, **changed}), DEFAULTS, always)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "dataset_cifar10"),
        ({"lr": 0.1}, "dataset_cifar10-lr_0.1"),
        ({"T": 1.0, "lr": 0.1}, "dataset_cifar10-lr_0.1-T_1.0"),
        ({"compile": True, "dataset": "digits"}, "dataset_digits-compile_True"),
        ({"lr": 0.02, "always": ("dataset", "lr")}, "dataset_cifar10-lr_0.02"),
    ],
)
def test_a_run_is_named_by_what_differs_from_the_defaults(changed, name):
    assert named(**changed) == name


def test_a_name_is_one_folder_whatever_the_values_are_and_long_ones_are_shortened_and_still_distinct():
    name = named(noise_file="/some where/ä:labels.npy")
    assert Path(name).name == name and name.isascii() and " " not in name and ":" not in name
    names = [named(noise_file="x" * 300 + end) for end in "ab"]
    assert names[0] != names[1]
    assert all(len(name) <= 200 and name.startswith("dataset_cifar10-noise_file_xxx") for name in names)
    assert named(noise_file="x" * 300 + "a") == names[0]


@pytest.mark.parametrize("stop_after", [2, None], ids=["unfinished", "finished"])
def test_a_run_that_lost_its_checkpoints_is_refused_and_left_as_it_is(stop_after, start, tmp_path):
    train(start(tmp_path), stop_after)
    for file in tmp_path.glob("checkpoint*"):
        file.unlink()
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.*s*")}
    with pytest.raises(UserError, match=r"holds log\.csv but no checkpoint"):
        begin(start(tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.*s*")} == before


@pytest.mark.parametrize(
    ("world", "starter"),
    [(1, "python"), (4, "torchrun --nproc_per_node=4"), (8, "torchrun --nnodes=2 --nproc_per_node=4")],
)
@pytest.mark.parametrize(
    ("script", "module", "words"),
    [
        (ROOT / "afm" / "train.py", None, "afm/train.py"),
        (ROOT / "afm" / "train.py", "common.runs.run", "-m common.runs.run"),
        (Path("/elsewhere/own.py"), None, "/elsewhere/own.py"),
    ],
)
def test_the_command_is_one_that_starts_as_many_processes(world, starter, script, module, words, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("sys.argv", [str(script), "--dataset", "a b"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module and importlib.util.find_spec(module))
    assert command() == f"{starter} {words} --dataset 'a b'"
