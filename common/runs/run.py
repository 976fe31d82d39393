"""A run is a directory. The same command resumes a killed run, with the same result as without the interruption.

args.json               arguments, command and environment
noisy_labels.npz        the observed labels and their training images; also as noisy_labels.npy and train_index.npy
noise.json              sha256 of noisy_labels.npy, realised noise rate and transition matrix
log.csv                 a row per epoch; also as TensorBoard events in tensorboard/
checkpoint.pt           everything needed to resume after the last finished epoch; its predecessor beside it
.lock                   the process that uses the directory, while it runs
label_quality.csv       what training scripts estimate about each given label (common.runs.label_quality), at the end of the run
result.json, result.csv written at the end of the run

Of several processes (common.gpu.processes) only the first writes; the others read the checkpoint to resume from.
"""

import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.datasets.given_labels import label_notes, own_file, read_decisions
from common.gpu import processes
from common.gpu.device import Device
from common.noise import realised
from common.runs import checkpoint, results
from common.runs.cli import MachineError, UserError, at_end
from common.runs.events import EventFile
from common.runs.files import append, cannot_write, write_atomic
from common.runs.locks import Lock
from common.runs.names import NOT_COMPARED, UNSAID
from common.runs.signals import StopSignals

ROOT = Path(__file__).resolve().parents[2]


class Labels(NamedTuple):
    """The training images of a run and their labels, int [N] each."""

    positions: np.ndarray  # in the official training set
    clean: np.ndarray | None  # true labels
    given: np.ndarray
    num_classes: int


class Run:
    """One training run: its directory, log, checkpoints, progress and signals.

    The shape of a script: `run.save_labels(...)`, `run.resume(state)`, `for epoch in run.epochs(n): ...; run.log(...)`,
    `run.finish()`. The script's main is decorated with `cli.script`, which releases lock and signals however it ends.
    """

    def __init__(self, args: Namespace, device: Device, *, paper: str, method: str, name: str, cell: dict):
        """Open the run directory (args.out, else results/runs/<paper>/<name>) and take its lock.

        cell: dataset, noise_type, noise_rate, imb_factor, ood_ratio and profile of the result rows; also table and cell
        unless a preset names them. UserError: the directory is in use, holds a run with other arguments, or, with
        --resume never, any run.
        """
        self.args, self.device, self.paper, self.method, self.cell = args, device, paper, method, cell
        self.folder = Path(args.out) if args.out else Path("results/runs") / paper / name
        self.labels: Labels  # `save_labels` sets them
        self.rows: list[dict] = []
        self.images = 0  # training samples that went through `progress`
        self.seconds = 0.0  # training time of the finished epochs
        self._epoch_started = 0.0
        self._last: int | None = None  # epoch, if it is known
        self._state: dict[str, Any] = {}
        self._saved: int | None = None  # epoch of the last checkpoint
        self._signals: StopSignals | None = None
        self._events: EventFile | None = None
        self._decisions = read_decisions(getattr(args, "noise_file", None))
        self._lock = Lock(self.folder / ".lock", "choose another --out")
        self._taken = ExitStack()  # what `release` releases
        at_end(self._leave)
        processes.from_first(self._open)

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._taken.callback(self._lock.release)
            self._lock.acquire()
        except OSError as error:
            raise UserError(cannot_write(self.folder, error, "choose another --out")) from None
        try:
            self._check_arguments()
        except BaseException:
            self.release()
            raise
        print(f"run directory {self.folder}", flush=True)

    def release(self) -> None:
        """Release lock and signals, so that another process can resume the run. A second call does nothing."""
        self._taken.close()

    def _leave(self, _kind, error: BaseException | None, _traceback) -> None:
        """The end of the script, or the error that ends it."""
        self.release()
        if isinstance(error, MachineError):
            error.args = (f"{error}, {self._resumes()}",)

    def _resumes(self) -> str:
        """What the same command will do."""
        command = "the same command" + (" with --resume auto" if self.args.resume == "never" else "")
        if self._saved is not None:
            return f"{command} resumes after epoch {self._saved}"
        begun = (self.folder / checkpoint.CURRENT).exists()
        return f"{command} {'resumes from the checkpoint' if begun else 'starts again'}"

    # what the directory holds -----------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        path = self.folder / "args.json"
        places = getattr(self.args, "_places", ())
        arguments = {name: value for name, value in vars(self.args).items() if name != "_places"}
        contents = {
            name: content_of(arguments[name])
            for name in places
            if name not in (*UNSAID, "noise_file") and name in arguments
        }
        if not path.exists():
            foreign = [
                name
                for name in ("log.csv", "result.json", checkpoint.CURRENT)
                if (self.folder / name).exists()
            ]
            if foreign:
                raise UserError(f"{self.folder} holds {foreign[0]} but no args.json: choose another --out")
            content: dict[str, Any] = {"paper": self.paper, "method": self.method, "command": command()}
            content |= {"cell": self._cell_columns()}
            content |= {"arguments": arguments, "contents": contents, "environment": environment(self.device)}
            write_atomic(path, _json(content))
            return
        if self.args.resume == "never":
            raise UserError(
                f"{self.folder} holds a run already: remove it, choose another --out, or use --resume auto"
            )
        try:
            kept = json.loads(path.read_text())
            old = kept["arguments"]
        except (ValueError, KeyError):
            raise UserError(
                f"{path} is damaged: remove {self.folder} to start again, or choose another --out"
            ) from None
        version = f" (the run, of commit {kept.get('environment', {}).get('git')}, has no such flag)"
        differing = [
            f"{n} was {old.get(n)}, now {arguments.get(n)}{'' if n in old else version}"
            for n in {**old, **arguments}
            if n not in (*NOT_COMPARED, *places) and old.get(n) != arguments.get(n)
        ]
        differing += [
            f"{n} {arguments[n]} has another content than {old.get(n)} had"
            for n, content in contents.items()
            if content != kept.get("contents", contents).get(n)
        ]
        if differing:
            raise UserError(
                f"{self.folder} holds a run with other arguments ({'; '.join(differing)}): choose another --out"
            )

    def save_labels(
        self, index: np.ndarray, clean: np.ndarray | None, noisy: np.ndarray, num_classes: int
    ) -> None:
        """Save the observed labels [N] with the indices of their training images, and print the realised noise.

        clean: the true labels [N]; None if they are unknown. UserError: the run started with other labels, so the data or
        the label file has changed.
        """
        self.labels = Labels(index, clean, noisy, num_classes)
        content = _npy(noisy)
        report = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "samples": len(noisy),
            "realised_rate": None,
            "transition_matrix": None,
            "observed_counts": np.bincount(noisy, minlength=num_classes).tolist(),
        }
        if self._decisions is not None:
            changed = np.isin(index, self._decisions.images[self._decisions.relabelled])
            report |= {"relabelled": int(changed.sum()), "removed": int(self._decisions.removed.sum())}
        if clean is not None:
            rate, matrix = realised(clean, noisy, num_classes)
            report["realised_rate"] = rate
            report["transition_matrix"] = [[round(share, 6) for share in row] for row in matrix.tolist()]
        notes = label_notes(clean, noisy, num_classes, from_file=bool(getattr(self.args, "noise_file", None)))
        processes.from_first(lambda: self._keep_labels(index, noisy, content, report))
        for note in notes:
            processes.say(f"note: {note}")

    def _keep_labels(self, index: np.ndarray, noisy: np.ndarray, content: bytes, report: dict) -> None:
        path, images = self.folder / "noise.json", self.folder / "train_index.npy"
        if path.exists() and images.exists() and images.read_bytes() != _npy(index):
            raise UserError(
                f"{self.folder} began with other training images: the data or the images that --on_bad_image leaves out changed; "
                "choose another --out"
            )
        if path.exists() and json.loads(path.read_text())["sha256"] != report["sha256"]:
            raise UserError(
                f"{self.folder} began with other labels: the data, --noise_file or the posterior changed; choose another --out"
            )
        write_atomic(self.folder / "noisy_labels.npy", content)
        write_atomic(self.folder / "train_index.npy", _npy(index))
        write_atomic(self.folder / "noisy_labels.npz", own_file(noisy, index))
        write_atomic(path, _json(report))
        if self._decisions is not None:
            name = Path(self.args.noise_file).name
            print(
                f"{name}: {report['relabelled']} labels changed, {report['removed']} images removed",
                flush=True,
            )
        rate = report["realised_rate"]
        noise = "true labels unknown" if rate is None else f"realised noise rate {rate:.4f}"
        print(
            f"{report['samples']} training samples, {noise}, labels sha256 {report['sha256'][:12]}",
            flush=True,
        )

    def save_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Write arrays as <name>.npz into the run directory, atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
        self.save_file(f"{name}.npz", buffer.getvalue())

    def save_file(self, name: str, content: bytes) -> None:
        """Write a file into the run directory, atomically."""
        if processes.rank() == 0:
            write_atomic(self.folder / name, content)

    def save_skipped(self, skipped: Iterable[tuple[str, int, str]]) -> None:
        """List the images that were left out, if any, in skipped_images.csv: path, position in its list, reason."""
        rows = [dict(zip(("path", "position", "reason"), image, strict=True)) for image in skipped]
        content = results.to_csv(rows, rows[0]).encode() if rows else b""
        path = self.folder / "skipped_images.csv"
        begun = (self.folder / checkpoint.CURRENT).exists()
        if begun and content != (path.read_bytes() if path.exists() else b""):
            raise UserError(f"{self.folder} began with other images left out than now; choose another --out")
        if rows:
            self.save_file("skipped_images.csv", content)

    def save_weights(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """Write a state dict of tensors into the run directory, as tensors on the CPU."""
        content = io.BytesIO()
        checkpoint.write({key: value.cpu() for key, value in weights.items()}, content)
        self.save_file(name, content.getvalue())

    # resuming ---------------------------------------------------------------------------------------------------------

    def resume(self, state: dict[str, Any]) -> None:
        """Save `state` (see common.runs.checkpoint) in every checkpoint, and restore it from the last one if it exists.

        From here on SIGTERM and Ctrl-C stop the run at the next step, after the checkpoint of the last finished epoch. A
        second signal stops at once. A blocked process ends 30 s after the first.
        """
        self._state = state
        if processes.rank() == 0:
            saved = checkpoint.load(
                self.folder
            )  # it may replace the checkpoint by its predecessor, so before the other processes read it
        processes.wait()
        if processes.rank() > 0:
            saved = checkpoint.load(self.folder)
        processes.wait()
        if saved is not None:
            self._restore(saved)
            self.rows, self.images, self.seconds = saved["rows"], saved["images"], saved["seconds"]
            self._saved = len(self.rows)
            processes.say(f"resuming after epoch {len(self.rows)}")
        else:
            remains = [name for name in ("log.csv", "result.json") if (self.folder / name).exists()]
            if remains:
                raise UserError(
                    f"{self.folder} holds {remains[0]} but no checkpoint to resume from: "
                    "remove it to start again, or choose another --out"
                )
            self._save()
        self._signals = StopSignals(lambda what: f"{what}; {self._resumes()}")
        self._taken.callback(self._signals.close)
        self._signals.start()
        if processes.rank() > 0:
            return
        if self.rows:  # rows after the checkpoint belong to an epoch that is repeated
            write_atomic(self.folder / "log.csv", results.to_csv(self.rows, self.rows[0]).encode())
        else:
            (self.folder / "log.csv").unlink(missing_ok=True)
        self._events = EventFile(self.folder / "tensorboard", len(self.rows) + 1)

    def _restore(self, saved: dict) -> None:
        """Put a checkpoint's state back. UserError: it is of another kind of device, and --resume anyway is not given."""
        here, before = self.device.device.type, saved.get("device", self.device.device.type)
        if here != before and self.args.resume != "anyway":
            raise UserError(
                f"{self.folder} was trained on {before}, and this is {here}: generators cannot move; use --device {before}, or "
                "--resume anyway to resume with fresh generators"
            )
        checkpoint.restore(self._state, saved["state"], generators=here == before)
        torch.set_rng_state(saved["torch_generator"])
        if here != before:
            processes.say(
                f"resumed on {here} after {len(saved['rows'])} epochs on {before}, with fresh random generators"
            )
        elif here == "cuda":
            states = saved["cuda_generators"]  # one per card of the machine that wrote them
            torch.cuda.set_rng_state_all(states[: torch.cuda.device_count()])

    def _save(self) -> None:
        if processes.rank() > 0:
            self._saved = len(self.rows)
            return
        self._lock.check()
        device = self.device.device
        content = {
            "device": device.type,
            "state": checkpoint.collect(self._state),
            "torch_generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
            "rows": self.rows,
            "images": self.images,
            "seconds": self.seconds,
        }
        checkpoint.save(self.folder, content)
        self._saved = len(self.rows)

    def _stop_if_asked(self) -> None:
        """End this process if a signal asked for it: of several processes all of them, after the same step."""
        number = processes.largest((self._signals.number if self._signals else None) or 0)
        if number:
            if processes.rank() == 0:
                print(f"{signal.Signals(number).name}: stopped; {self._resumes()}", file=sys.stderr)
            sys.exit(128 + number)

    # the epoch loop ---------------------------------------------------------------------------------------------------

    def epochs(self, last: int | None) -> Iterator[int]:
        """The remaining epochs, 1-based; each ends in a checkpoint. The loop body must call `log`.

        last: None if the number is not known in advance; the body then breaks before the first epoch that it does not run.
        """
        self._last = last
        first = len(self.rows) + 1
        for epoch in itertools.count(first) if last is None else range(first, last + 1):
            self._stop_if_asked()
            self._epoch_started = time.perf_counter()
            yield epoch
            if len(self.rows) != epoch:
                raise RuntimeError(f"epoch {epoch} was not logged")
            self._save()
            processes.wait()  # no process starts an epoch before the last one's checkpoint exists

    def progress(
        self, batches: Iterable, description: str, training: bool = True, whole: bool = False
    ) -> Iterator:
        """Yield batches (views, index) with a progress bar on a terminal; stop after a signal.

        training: count the samples for images_per_second. whole: each of several processes has complete batches, not a piece
        of each.
        """
        quiet = not sys.stderr.isatty() or processes.rank() > 0
        for batch in tqdm(batches, description, leave=False, disable=quiet):
            if (
                training or processes.world() == 1
            ):  # processes may have different numbers of batches to evaluate
                self._stop_if_asked()
            if training:
                self.images += len(batch[1]) * (1 if whole else processes.world())
            yield batch

    def log(self, epoch: int, **values: float | int | None) -> None:
        """Add the epoch's row to log.csv and the event file, and print it. None, NaN and inf leave the cell empty.

        Every row must have the same columns. UserError: a value whose name ends in "loss" is not finite.
        """
        seconds = time.perf_counter() - self._epoch_started
        for name, value in values.items():
            if name.endswith("loss") and value is not None and not np.isfinite(value):
                rate = "--lr" if "lr" in vars(self.args) else "the learning rates"
                raise UserError(
                    f"{name} is {value} at epoch {epoch}: lower {rate} or try --precision fp32, with another --out"
                )
        row = {
            "epoch": epoch,
            **{name: _plain(value) for name, value in values.items()},
            "seconds": round(seconds, 3),
        }
        if self.rows and list(row) != list(self.rows[0]):
            raise ValueError(
                f"epoch {epoch} logs other columns than epoch 1: {sorted(set(row) ^ set(self.rows[0]))}"
            )
        self.rows.append(row)
        self.seconds += seconds
        if processes.rank() > 0:
            return
        text = results.to_csv([row], row)
        append(self.folder / "log.csv", (text if epoch == 1 else text.split("\n", 1)[1]).encode())
        shown = {
            name: value for name, value in row.items() if name != "epoch" and isinstance(value, (int, float))
        }
        assert self._events is not None, "resume opens it"
        self._events.add(epoch, shown)
        print(
            f"epoch {epoch}{f'/{self._last}' if self._last else ''}  "
            + "  ".join(_short(n, v) for n, v in list(shown.items())[:8]),
            flush=True,
        )

    def is_finished(self) -> bool:
        """Whether an earlier start of the same command finished; `finish` then changes nothing."""
        return (self.folder / "result.json").exists()

    def full_test(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Metrics for `finish` where --full_test_at_end asks for them and the run is not finished; else none.

        measure: tests on all test images; returns full_test, full_test_images (their number) and perhaps other metrics named
        full_test_<what>. All other metrics are of the --limit_test subset.
        """
        if not getattr(self.args, "full_test_at_end", False) or self.is_finished():
            return {}
        return measure()

    def finish(self, metric: str = "test_accuracy", /, **more: float | None) -> None:
        """Write result.json and result.csv: best, last and mean of the last 10 epochs of `metric`, and `more` metrics."""
        if processes.rank() == 0:
            path = self.folder / "result.json"
            if not self.is_finished():
                self._write_result(path, metric, more)
            metrics = json.loads(path.read_text())["metrics"]
            best, last, last10 = (metrics[name] for name in ("best", "last", "last10"))
            print(f"finished: {metric} best {best:.2f}, last {last:.2f}, mean of the last 10 {last10:.2f}")
            print(f"results in {self.folder}", flush=True)
        processes.stop()
        self.release()

    def _write_result(self, path: Path, metric: str, more: dict[str, float | None]) -> None:
        measured = [row for row in self.rows if row[metric] is not None]
        curve = [row[metric] for row in measured]
        metrics = {"best": max(curve), "last": curve[-1], "last10": float(np.mean(curve[-10:]))}
        metrics |= {name: _plain(value) for name, value in more.items()}
        timing = {
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images / self.seconds, 1) if self.seconds else None,
            "peak_memory_mb": round(self.device.peak_memory_mb() or peak_resident_mb(), 1),
        }
        noise = json.loads((self.folder / "noise.json").read_text())
        content = {"paper": self.paper, "method": self.method, **self._cell_columns(), "metric": metric}
        content |= {
            "metrics": metrics,
            "best_epoch": measured[int(np.argmax(curve))]["epoch"],
            "images": self.images,
        }
        kept = ("sha256", "samples", "realised_rate", "relabelled", "removed")
        content |= {"noise": {key: noise[key] for key in kept if key in noise}}
        content |= {"environment": environment(self.device), "command": command(), "timing": timing}
        common = {
            "paper": self.paper,
            "method": self.method,
            **self._cell_columns(),
            **timing,
            "command": command(),
        }
        common |= {"device": content["environment"]["device"], "precision": self.device.precision}
        common |= {"torch": torch.__version__, "git": content["environment"]["git"]}
        rows = [
            {**common, "metric": name, "value": value} for name, value in metrics.items() if value is not None
        ]
        results.write_results(self.folder / "result.csv", rows)
        write_atomic(path, _json(content))

    def _cell_columns(self) -> dict:
        """The columns of table and cell; a subset of the data and images removed by hand are marked in the profile."""
        table, cell = [*(getattr(self.args, "preset", None) or "").split("/"), ""][:2]
        columns = {"table": table, "cell": cell or self.folder.name, **self.cell}
        for limit in ("limit_train", "limit_test"):
            if getattr(self.args, limit, None):
                columns["profile"] += f"+{limit}={getattr(self.args, limit)}"
        if self._decisions is not None and self._decisions.removed.any():
            columns["profile"] += f"+removed={int(self._decisions.removed.sum())}"
        columns |= {
            "fidelity": getattr(self.args, "fidelity", ""),
            "seed": self.args.seed,
            "epochs": self.args.num_epochs,
        }
        return columns


# command, environment and name ----------------------------------------------------------------------------------


def command() -> str:
    """The command line of this process, from the repository's root: a script's path, or -m and a module."""
    starter = ["python"]
    if processes.world() > 1:
        nodes = processes.world() // int(os.environ["LOCAL_WORLD_SIZE"])
        starter = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else [])]
        starter += [f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        return shlex.join([*starter, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return shlex.join([*starter, str(script), *sys.argv[1:]])


def environment(device: Device) -> dict:
    """Versions, device and commit that a result depends on."""
    on_cuda = device.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("torchvision", "numpy", "scikit-learn")},
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device.device) if on_cuda else device.device.type,
        "cuda": torch.version.cuda if on_cuda else None,
        "precision": device.precision,
        "processes": processes.world(),
        "git": git_commit(),
    }


def git_commit() -> str:
    """The short commit of this clone, with + for uncommitted changes; empty outside a git checkout."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, check=False, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except FileNotFoundError:
        return ""
    return commit.stdout.strip() if commit.returncode == 0 else ""


def content_of(place: str | None) -> str | None:
    """The content of a path: the sha256 of a file, or of the indices of an image cache.

    A word such as none or imagenet is its own content; other folders are not compared.
    """
    if place is None or not Path(place).exists():
        return place
    files = [Path(place)] if Path(place).is_file() else sorted(Path(place).rglob("index.npz"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest() if files else "a folder"


def peak_resident_mb() -> float:
    """Peak resident memory of this process, in MiB. macOS counts in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def _plain(value: Any) -> float | int | str | None:
    """A number as a Python number; None for NaN and infinity."""
    if value is None or isinstance(value, (str, int)):
        return value
    value = float(value)
    return value if np.isfinite(value) else None


def _short(name: str, value: float) -> str:
    return f"{name} {value:.4g}"


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
