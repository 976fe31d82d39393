"""Where runs are started: on this machine or by Ray, whose workers may be lost; both come to the same results."""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import engines, run
from benchmarks.cells import ROOT, cells
from benchmarks.engines import Machine, cell_resources, run_on_worker
from common.runs.locks import Lock
from tests.benchmarks.files import read
from tests.lines import message

PRESET = "embedded/digits-if0.1-imb0.5/sfa"
SHORT = ["--num_epochs", "3", "--warm_up", "1"]
CELL = ("--cells", PRESET, "--seeds", "4", *SHORT)
RUN = Path("runs/sfa") / PRESET / "seed4-num_epochs-3-warm_up-1"
MEASURED = ("seconds", "images_per_second", "peak_memory_mb")  # what no two runs share


def start(*words: str) -> subprocess.Popen:
    """Start the command as a terminal does: where the tests run in the background of a shell, Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what the command would have inherited
    command = [sys.executable, "-m", "benchmarks.run", "sfa", "--engine", "ray", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(what, seconds: float = 120.0):
    """The first true value of what(), which is asked until then."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def is_alive(process: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def workers(folder: Path) -> list[int]:
    """The process ids of the Ray workers that have had the run, in order."""
    lines = (folder / "console.txt").read_text().splitlines()
    return [int(line.rpartition(" ")[2]) for line in lines if ", Ray worker " in line]


def stop_after_first_epoch(folder: Path) -> tuple[int, int]:
    """Hold the run after its first checkpoint, so that the test has time: worker and script as process ids."""
    wait_for((folder / "checkpoint.previous.pt").exists)  # there is one before the first epoch too
    (worker,) = workers(folder)
    (script,) = map(int, Path(f"/proc/{worker}/task/{worker}/children").read_text().split())
    os.kill(script, signal.SIGSTOP)
    return worker, script


def comparable(rows: list[dict], out: Path) -> list[dict]:
    """Rows of results or of a log but for what is measured, and for where the results went."""
    kept = [{name: text for name, text in row.items() if name not in MEASURED} for row in rows]
    return [{name: text.replace(str(out), "OUT") for name, text in row.items()} for row in kept]


@pytest.fixture(autouse=True)
def same_handler() -> Iterator[None]:
    """What ends the tests is what ended them before: run_all has a handler of its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray cluster of one machine with two CPUs: its address."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: the extra `ray` of pyproject.toml")
    options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False}
    environment = dict(os.environ)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # or Ray writes one into the home folder
    yield ray.init("local", object_store_memory=engines.OBJECT_STORE, **options).address_info["address"]
    ray.shutdown()
    os.environ.clear()  # Ray adds to it
    os.environ.update(environment)


@pytest.mark.slow
def test_a_lost_worker_takes_its_run_along_and_another_ends_it_as_if_nothing_had_happened(cluster, tmp_path):
    import ray  # noqa: PLC0415  the fixture has found it

    out = tmp_path / "ray"
    process = start("--out", str(out), "--ray_address", cluster, "--cpus_per_cell", "2", *CELL)
    worker, script = stop_after_first_epoch(out / RUN)
    assert ray.available_resources().get("CPU", 0) == 0, "the run has both CPUs"
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not is_alive(script), seconds=30)

    (cell,) = cells("sfa", "embedded", [PRESET])
    task = run.make_task(cell, 4, tmp_path / "local/runs/sfa/embedded", ROOT / "data", SHORT)
    folders = engines.run_all([task], run.make_parser().parse_args(["sfa"]), one_thread=True)

    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == ""
    assert re.search("^resuming after epoch [12]$", (out / RUN / "console.txt").read_text(), re.MULTILINE)
    assert len(workers(out / RUN)) == 2 and len(workers(out / RUN / "baseline")) == 1
    reported = [line.split(" best ")[0] for line in output.splitlines() if line.startswith("embedded/")]
    assert reported == [f"{PRESET} seed 4: SFA", f"{PRESET} seed 4 baseline: CE"]
    assert "raylet" not in output, "Ray's own messages are kept off"
    rows = comparable(run.collect(folders).to_dict("records"), tmp_path / "local")
    assert comparable(read(out / "sfa.csv"), out) == rows
    for name in (RUN / "log.csv", RUN / "baseline" / "log.csv"):
        assert comparable(read(out / name), out) == comparable(read(tmp_path / "local" / name), out)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_it_ends_its_runs_and_leaves_their_checkpoints(cluster, tmp_path, number, status):
    process, folder = start("--ray_address", cluster, "--out", str(tmp_path), *CELL), tmp_path / RUN
    _, script = stop_after_first_epoch(folder)
    process.send_signal(number)
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == status
    wait_for(lambda: not is_alive(script), seconds=30)
    assert (folder / "checkpoint.pt").exists() and not (folder / "result.json").exists()
    lock = Lock(folder / ".lock", "wait")
    lock.acquire(5)
    lock.release()
    assert not (tmp_path / "sfa.csv").exists()


@pytest.mark.slow
def test_a_script_that_fails_is_named_and_not_run_again(cluster, tmp_path):
    words = ("--cells", PRESET, "--seeds", "7", "--p_threshold", "2")
    process = start("--ray_address", cluster, "--out", str(tmp_path), *words)
    _, errors = process.communicate(timeout=120)
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"failed: {PRESET} seed 7: exit status 2: ") and "--p_threshold" in line
    (console,) = tmp_path.rglob("console.txt")
    assert len(workers(console.parent)) == 1
    assert process.returncode == 1 and not (tmp_path / "sfa.csv").exists()


@pytest.mark.slow
def test_without_ray_the_engine_names_the_remedy(tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None; from benchmarks import run; from common.runs import cli; "
        "cli.exit_cleanly(run.main, sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "sfa", "--engine", "ray", "--out", str(tmp_path), *CELL]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "--engine ray needs Ray" in line and 'pip install "ray>=2.50"' in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_where_there_is_no_cluster_one_line_says_so(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: the extra `ray` of pyproject.toml")
    process = start("--ray_address", "127.0.0.1:1", "--out", str(tmp_path), *CELL)
    (line,) = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2
    assert "no Ray cluster at 127.0.0.1:1" in line and "--ray_address" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_local_engine_imports_no_ray(tmp_path):
    code = f"""
import sys
from pathlib import Path
from benchmarks import engines, run
args = run.make_parser().parse_args(["sfa"])
folder = Path({str(tmp_path)!r}) / "run"
try:
    engines.run_all([engines.Task("a task", folder, ((folder, [sys.executable, "-c", "exit(3)"]),))], args, True)
except SystemExit as end:
    print(end.code, [name for name in sys.modules if name.split(".")[0] == "ray"])
"""
    words = [sys.executable, "-c", code]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "1 []"
    assert process.stderr.startswith("failed: a task: exit status 3")


def flags(**given) -> Namespace:
    names = ("ray_address", "cpus_per_cell", "gpus_per_cell", "retries", "jobs")
    return Namespace(**{**dict.fromkeys(names), "engine": "ray", **given})


@pytest.mark.parametrize(
    ("given", "one_thread", "machines", "expected"),
    [
        ({}, True, [(8, 0)], (1, 0)),
        ({}, True, [(8, 0), (8, 2)], (1, 1)),
        ({}, False, [(8, 0)], (8, 0)),
        ({}, False, [(0, 0), (4, 0), (8, 0)], (4, 0)),
        ({}, False, [(4, 0), (16, 4), (24, 2)], (4, 1)),
        ({"gpus_per_cell": 0.5}, False, [(16, 4)], (2, 0.5)),
        ({"gpus_per_cell": 2.0}, False, [(16, 4)], (8, 2)),
        ({"gpus_per_cell": 0.0}, False, [(16, 4)], (16, 0)),
        ({"cpus_per_cell": 3}, False, [(16, 4)], (3, 1)),
    ],
)
def test_every_run_is_given_its_share(given, one_thread, machines, expected):
    assert cell_resources(flags(**given), one_thread, [Machine(*m) for m in machines]) == Machine(*expected)


def test_what_no_machine_has_and_flags_of_the_other_engine_are_refused():
    for given, said in (
        ({"cpus_per_cell": 16}, "has 16 CPUs and 1 GPUs for a run (they have 8 and 1; 2 and 0)"),
        ({"cpus_per_cell": 1, "gpus_per_cell": 2.0}, "has 1 CPUs and 2 GPUs"),
        ({"gpus_per_cell": 1.5}, "--gpus_per_cell 1.5 cannot be"),
    ):
        assert said in message(cell_resources, flags(**given), True, [Machine(2, 0), Machine(8, 1)])
    for given, name in (({"jobs": 2}, "jobs"), ({"engine": "local", "retries": 0}, "retries")):
        assert f"--{name} is for --engine" in message(engines.run_all, [], flags(**given), one_thread=True)


@pytest.mark.slow
def test_a_run_waits_for_what_a_lost_worker_left_behind(tmp_path):
    lock = Lock(tmp_path / ".lock", "wait")
    lock.acquire()
    threading.Timer(1.0, lambda: (tmp_path / "released").touch() or lock.release()).start()
    looks = [sys.executable, "-c", "import os, sys; sys.exit(3 if os.path.exists(sys.argv[1]) else 4)"]
    finished, failure = run_on_worker(tmp_path, [*looks, str(tmp_path / "released")], {})
    assert not finished and failure.startswith("exit status 3: ")


def test_a_directory_that_stays_in_use_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "SECONDS_IN_USE", 0.3)
    with Lock(tmp_path / ".lock", "wait"):
        finished, failure = run_on_worker(tmp_path, [sys.executable, "-c", ""], {})
    assert not finished and "is in use by process" in failure


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_from_outside_has_not_failed(tmp_path, number):
    ends = [sys.executable, "-S", "-c", f"import os; os.kill(os.getpid(), {int(number)})"]
    with pytest.raises(InterruptedError):
        run_on_worker(tmp_path, ends, {})


def test_no_run_of_a_task_begins_after_one_that_failed(tmp_path, capsys):
    ends = [sys.executable, "-S", "-c", "import sys; print('why'); sys.exit(3)"]
    folders = [(tmp_path / name, tmp_path / name / "baseline") for name in "ab"]
    tasks = [engines.Task(own.name, own, ((own, ends), (baseline, ends))) for own, baseline in folders]
    with pytest.raises(SystemExit) as stop:
        engines.run_all(tasks, flags(engine="local"), one_thread=True)
    captured = capsys.readouterr()
    lines = [f"failed: {n}: exit status 3: why (see {tmp_path / n / 'console.txt'})" for n in "ab"]
    assert stop.value.code == 1 and captured.err.splitlines() == lines
    assert sorted(f"failed: {line}" for line in captured.out.splitlines()) == lines
    assert not (tmp_path / "a" / "baseline").exists()


def test_no_run_begins_whose_worker_is_gone(tmp_path):
    words = [sys.executable, "-c", f"open({str(tmp_path / 'begun')!r}, 'w')"]
    for parent, begins in ((1, False), (os.getpid(), True)):
        bound = [sys.executable, "-c", engines.BOUND_TO_PARENT, str(parent), *words]
        assert (subprocess.run(bound, check=False).returncode == 0) == begins
        assert (tmp_path / "begun").exists() == begins


def test_a_machine_without_the_clone_or_the_folder_says_so(tmp_path):
    start_on_worker = engines._shipped()
    for root, folder in ((tmp_path / "none", tmp_path), (ROOT, tmp_path / "none")):
        finished, failure = start_on_worker(str(root), str(folder), [sys.executable], {})
        assert not finished and failure.startswith(f"{tmp_path / 'none'} does not exist on ")
        assert "file system that all machines share" in failure
