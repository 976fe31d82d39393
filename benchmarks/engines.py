"""Start runs and wait for them: side by side on this machine, or as tasks of a Ray cluster.

The engine `ray` joins a cluster (--ray_address, else the variable RAY_ADDRESS) or starts one on this machine. On a cluster
of several machines the clone and the --out folder are at the same path on a shared file system. The run directories with
their checkpoints are there, so another machine resumes the run of a lost one.
"""

import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.cells import ROOT
from benchmarks.results import read_results
from common.runs import cli
from common.runs.cli import UserError
from common.runs.files import append
from common.runs.locks import InUse, Lock

RETRIES = 3
ENDED = "ended with the others"  # of runs that have not finished when the command is stopped; nobody reads it
# bytes, of a cluster that is started here: about the least that Ray accepts, as nothing is stored in it
OBJECT_STORE = 80 * 2**20
# the time that a lost run may keep its directory: a dying process, a lease of a network file system
SECONDS_IN_USE = 120.0
# exit statuses of runs that are stopped from outside: the machine went down, or ran out of memory
STOPPED = (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM)
# A Ray worker starts this in place of a script, with its process id before the command. It has the kernel kill this process
# when the worker dies, then becomes the script. The parent's id shows whether the worker died before the call.
BOUND_TO_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
    sys.exit("prctl failed: this process cannot be bound to its worker")
if os.getppid() != int(sys.argv[1]):
    sys.exit(128 + signal.SIGKILL)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Task(NamedTuple):
    """One cell with one seed: the method's run, and those that it needs before it or that need its labels after it."""

    name: str
    folder: Path
    commands: tuple[tuple[Path, list[str]], ...]  # run directory and command line of each, in order


class Outcome(NamedTuple):
    """The result of a task: the finished run directories, and the failure, if any."""

    finished: list[Path]
    failure: str | None


def add_engine_flags(parser: cli.Parser) -> None:
    """The flags that `run_all` reads: where runs are started, and how many at a time."""
    add = parser.add_argument_group("where the runs are started").add_argument
    number: dict[str, Any] = {"type": cli.count, "metavar": "N"}
    engine = "this machine, or a Ray cluster, whose machines need the clone and --out at the same path on a shared file system"
    jobs = "local: runs at a time; by default one per core on digits, else one"
    address = (
        "ray: the cluster to join; by default the variable RAY_ADDRESS, else one is started on this machine"
    )
    cpus = (
        "ray: CPUs of a run; by default 1 on digits, else a machine's share for a run per GPU, or for one run"
    )
    gpus = "ray: GPUs of a run, or a part of one such as 0.5; by default 1 if the cluster has GPUs, else 0"
    retries = f"ray: how often a run is resumed elsewhere after its worker is lost, {RETRIES} by default; a failed script is not"
    add("--engine", choices=["local", "ray"], default="local", help=engine)
    add("--jobs", **number, help=jobs)
    add("--ray_address", metavar="HOST:PORT", help=address)
    add("--cpus_per_cell", **number, help=cpus)
    add("--gpus_per_cell", type=cli.non_negative, metavar="N", help=gpus)
    add("--retries", type=cli.count_or_zero, metavar="N", help=retries)


def run_all(tasks: list[Task], args: Namespace, one_thread: bool) -> list[Path]:
    """Run the tasks; returns the finished run directories, in the order of the tasks. Exits with status 1 if any run failed.

    args: the flags of `add_engine_flags`. one_thread: the runs use one thread each, so that their figures do not depend on
    the number of cores. A run that its own result.json calls finished is not run again, an interrupted one resumes. SIGTERM
    (exit status 143) and Ctrl-C end the runs under way; their checkpoints stay. UserError: flags of the other engine, no Ray,
    no cluster, or no machine of it has what a run needs.
    """
    ray, of_ray = args.engine == "ray", ("ray_address", "cpus_per_cell", "gpus_per_cell", "retries")
    for name in ("jobs",) if ray else of_ray:
        if getattr(args, name) is not None:
            other = "local" if ray else "ray"
            raise UserError(f"--{name} is for --engine {other}: leave it out, or choose that engine")
    before = signal.signal(signal.SIGTERM, _end)
    try:
        runner = (RayRunner if ray else Runner)(tasks, args, one_thread)
        signal.signal(signal.SIGTERM, _end)  # Ray sets its own
        outcomes = runner.run_all()
    finally:
        signal.signal(signal.SIGTERM, before)
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if failures:
        sys.exit(1)
    return [folder for outcome in outcomes for folder in outcome.finished]


def _end(number: int, _frame) -> None:
    sys.exit(128 + number)


def is_finished(folder: Path, command: list[str]) -> bool:
    """Whether the run directory's result.json says that this command finished; the script judges everything else."""
    try:
        ended = json.loads((folder / "result.json").read_text())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return ended == shlex.join(["python", *command[1:]]) and (folder / "result.csv").is_file()


def follow(
    child: subprocess.Popen, folder: Path, on_line: Callable[[str], None] = lambda _: None
) -> str | None:
    """Write a process's output to <folder>/console.txt until it ends: None, or its exit status and its last line."""
    last, path = "", folder / "console.txt"
    try:
        append(path, b"")
        for line in child.stdout:
            append(path, line.encode())
            last = line.strip() or last
            on_line(line)
    except BaseException:
        child.terminate()
        raise
    code = child.wait()
    return f"exit status {code}: {last} (see {path})" if code else None


def print_commands(tasks: Iterable[Task]) -> None:
    """What --dry_run prints: the command lines of the runs."""
    for task in tasks:
        for _, command in task.commands:
            print(shlex.join(["python", *command[1:]]))


def headline(folder: Path) -> str:
    """The result of a finished run, in a line."""
    rows = read_results(folder / "result.csv").set_index("metric").to_dict("index")
    best, last = (rows[metric]["value"] for metric in ("best", "last"))
    return f"{rows['last']['method']} best {best:.2f}, last {last:.2f} in {rows['last']['seconds']} s"


# on this machine ------------------------------------------------------------------------------------------------------


class Runner:
    """Starts the runs of tasks side by side, shows their progress, and ends them all when it is ended itself."""

    def __init__(self, tasks: list[Task], args: Namespace, one_thread: bool):
        self.tasks = tasks
        self.environment = {"OMP_NUM_THREADS": "1"} if one_thread else {}
        self.jobs = args.jobs or (os.cpu_count() or 1 if one_thread else 1)
        self.lock = threading.Lock()
        self.under_way: set[Any] = set()
        self.stopping = False

    def run_all(self) -> list[Outcome]:
        """Run all tasks."""
        total = sum(len(task.commands) for task in self.tasks)
        self.bar = tqdm(total=total, unit="run", disable=not sys.stderr.isatty())
        with self.bar, ThreadPoolExecutor(self.jobs) as pool:
            try:
                return list(pool.map(self.run, self.tasks))
            except BaseException:
                self.stop()
                raise

    def run(self, task: Task) -> Outcome:
        """Run the method and then its baseline, which needs the labels of the method's run."""
        finished = []
        for folder, command in task.commands:
            name = task.name if folder == task.folder else f"{task.name} {folder.name}"
            if is_finished(folder, command):
                done, text = True, f"finished before: {headline(folder)}"
            else:
                folder.mkdir(parents=True, exist_ok=True)
                done, text = self.process(command, folder, name)
            self.bar.update()
            if text != ENDED:
                tqdm.write(f"{name}: {text}")
            if not done:
                return Outcome(finished, f"{task.name}: {text}")
            finished.append(folder)
        return Outcome(finished, None)

    def process(self, command: list[str], folder: Path, name: str) -> tuple[bool, str]:
        """Run one process: whether it finished, and its headline or how it failed."""
        with self.lock:
            if self.stopping:
                return False, ENDED
            child = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **self.environment}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self.under_way.add(child)
        failure = follow(child, folder, lambda line: self.show(name, line))
        with self.lock:
            self.under_way.discard(child)
        return failure is None, failure or headline(folder)

    def show(self, name: str, line: str) -> None:
        """Show the line of an epoch's end beside the progress bar."""
        if line.startswith("epoch "):
            self.bar.set_postfix_str(f"{name} {' '.join(line.split()[:6])}")

    def stop(self) -> None:
        """End the runs under way; they leave their checkpoints."""
        with self.lock:
            self.stopping = True
            for child in self.under_way:
                child.terminate()


# with Ray -------------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """What a machine of the cluster has."""

    cpus: float
    gpus: float


def cell_resources(args: Namespace, one_thread: bool, machines: list[Machine]) -> Machine:
    """The resources of every run. UserError: no machine has as much, or the flags ask for 1.5 GPUs."""
    gpus = args.gpus_per_cell
    if gpus is None:
        gpus = 1 if any(machine.gpus for machine in machines) else 0
    if gpus > 1 and gpus % 1:
        raise UserError(f"--gpus_per_cell {gpus:g} cannot be: give a whole number, or a part of one GPU")
    cpus = args.cpus_per_cell or 1
    if args.cpus_per_cell is None and not one_thread:
        fitting = [machine for machine in machines if machine.cpus and machine.gpus >= gpus]
        shares = [machine.cpus // max(1, machine.gpus // gpus if gpus else 1) for machine in fitting]
        cpus = max(1, min(shares, default=1))
    if not any(machine.cpus >= cpus and machine.gpus >= gpus for machine in machines):
        has = "; ".join(f"{m.cpus:g} and {m.gpus:g}" for m in sorted(set(machines), reverse=True)[:5])
        raise UserError(
            f"no machine of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs for a run (they have {has}): "
            "lower --cpus_per_cell or --gpus_per_cell"
        )
    return Machine(cpus, gpus)


class RayRunner(Runner):
    """Gives every run to Ray, which starts it where there is room."""

    def __init__(self, tasks: list[Task], args: Namespace, one_thread: bool):
        super().__init__(tasks, args, one_thread)
        self.jobs = max(1, len(tasks))  # all wait; Ray decides how many run
        if all(is_finished(*run) for task in tasks for run in task.commands):
            return
        self.ray = _connect(args.ray_address)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        machines = [Machine(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
        cpus, gpus = cell_resources(args, one_thread, machines)
        if not gpus:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        retries = RETRIES if args.retries is None else args.retries
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries}
        self.remote = self.ray.remote(**options, retry_exceptions=[InterruptedError])(_shipped())

    def process(self, command: list[str], folder: Path, name: str) -> tuple[bool, str]:
        """As of the base class, on a worker; the failure may be that of all workers."""
        with self.lock:
            if self.stopping:
                return False, ENDED
            ref = self.remote.remote(str(ROOT), str(folder), command, self.environment)
            self.under_way.add(ref)
        console = folder / "console.txt"
        while not self.ray.wait([ref], timeout=1.0)[0] and not self.stopping:
            if not self.bar.disable and console.exists():
                for line in console.read_text().splitlines()[-1:]:
                    self.show(name, line)
        if self.stopping:
            self.ray.wait([ref], timeout=5.0)
            return False, ENDED
        with self.lock:
            self.under_way.discard(ref)
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            return False, f"given up: {str(error).strip().splitlines()[-1]}"

    def stop(self) -> None:
        """End the workers and their runs; checkpoints of the last finished epochs stay."""
        with self.lock:
            self.stopping = True
            for ref in self.under_way:
                self.ray.cancel(ref, force=True)


def _connect(address: str | None) -> ModuleType:
    """Ray, connected to the cluster at the address, else to that of RAY_ADDRESS, else to a new one on this machine."""
    # this script prints the results; Ray reports lost workers in its own log files
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "^"}
    os.environ.setdefault("RAY_worker_niceness", "0")  # the runs are no background work
    try:
        import ray  # noqa: PLC0415  only this engine needs it
    except ModuleNotFoundError:
        raise UserError(
            '--engine ray needs Ray: pip install "ray>=2.50", or the extra `ray` of pyproject.toml'
        ) from None
    if ray.is_initialized():
        return ray
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    new: dict[str, Any] = (
        {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address == "local" else {}
    )
    try:
        _reach(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **new)
    except (OSError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"no Ray cluster at {address} ({reason}): start one with `ray start --head`, or fix --ray_address or "
            "RAY_ADDRESS; one that asks for a token when it starts needs RAY_AUTH_MODE=token here too"
        ) from None
    return ray


def _reach(address: str) -> None:
    """OSError if nothing listens at host:port: Ray itself would try for minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _shipped() -> Callable:
    """The function of a Ray task, defined here so that Ray ships its code: it can report even that the clone is missing."""

    def start(root: str, folder: str, command: list[str], environment: dict[str, str]) -> tuple[bool, str]:
        import os  # noqa: PLC0415
        import socket  # noqa: PLC0415
        import sys  # noqa: PLC0415

        missing = [path for path in (root, folder, command[0]) if not os.path.exists(path)]
        if missing:
            return False, (
                f"{missing[0]} does not exist on {socket.gethostname()}: the clone, its Python and --out must be at the "
                "same path on a file system that all machines share"
            )
        sys.path.insert(0, root)
        from benchmarks.engines import run_on_worker  # noqa: PLC0415

        return run_on_worker(folder, command, environment)

    return start


def run_on_worker(folder: str | Path, command: list[str], environment: dict[str, str]) -> tuple[bool, str]:
    """On a Ray worker, do a run: whether it finished, and its headline or how it failed.

    The process dies with this one, so that the run can be resumed elsewhere. InterruptedError: it was stopped from outside.
    """
    folder = Path(folder)
    try:  # the process of a lost worker may still be dying
        lock = Lock(folder / ".lock", "choose another --out")
        lock.acquire(SECONDS_IN_USE)
        lock.release()
    except InUse as error:
        return False, str(error)
    if is_finished(folder, command):
        return True, headline(folder)
    begins = f"{time.strftime('%F %T')} on {socket.gethostname()}, Ray worker {os.getpid()}\n"
    append(folder / "console.txt", begins.encode())
    # the thread that starts it waits for it: for the kernel the parent ends with that thread
    child = subprocess.Popen(
        [command[0], "-c", BOUND_TO_PARENT, str(os.getpid()), *command],
        cwd=ROOT, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    failure = follow(child, folder)
    if child.returncode in STOPPED:
        raise InterruptedError(failure)
    return failure is None, failure or headline(folder)
