"""sfa/Train_cifar.py killed, stopped or damaged, and started again with the same command: nothing is lost and nothing differs."""

import shutil
from pathlib import Path
from shlex import split

import pytest

from tests.end_to_end import runs

pytestmark = pytest.mark.slow

# two of five epochs are of warm-up, so the first selection is in epoch 3
FLAGS = split("--dataset digits --imb_factor 0.1 --num_epochs 5 --warm_up 2 --batch_size 64 --device cpu")
SELECTIONS = {"sfa": "", "gmm": "--selection gmm --loss ldam"}
KILLS = {"sfa": ("1:warm-up", "3:log", "4:selection", "5:training"), "gmm": ("4:selection",)}
STOPS = ("1:log:SIGTERM", "3:training:SIGINT")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def ends(base) -> dict[str, list[list[int]]]:
    """How the processes ended, by name: signalled ones first, and then all that start again."""
    jobs, script = {}, "sfa.Train_cifar"
    for name, words in SELECTIONS.items():
        flags = [*FLAGS, *words.split()]
        jobs |= {name: runs.jobs_of(script, base / name, flags)}
        jobs |= {f"{name}_killed": runs.jobs_of(script, base / f"{name}_killed", flags, *KILLS[name])}
    jobs |= {"stopped": runs.jobs_of(script, base / "stopped", FLAGS, *STOPS)}
    first = iter(runs.run_jobs([job for own in jobs.values() for job in own]))
    found = {name: [next(first) for _ in own] for name, own in jobs.items()}
    for name in ("damaged", "again", "other"):
        shutil.copytree(base / "sfa" / "run", base / name / "run")
    content = (base / "damaged" / "run" / "checkpoint.pt").read_bytes()
    (base / "damaged" / "run" / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    more = {"damaged": [], "again": [], "other": ["--lr", "0.01"]}
    jobs = [
        job for name, words in more.items() for job in runs.jobs_of(script, base / name, [*FLAGS, *words])
    ]
    return found | dict(zip(more, ([status] for status in runs.run_jobs(jobs)), strict=True))


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_run_killed_at_several_moments_ends_as_if_nothing_had_happened(name, base, ends):
    assert ends[name] == [[0]], runs.printed(base / name)
    killed = f"{name}_killed"
    finished = (0, 2, 3, 4) if name == "sfa" else (3,)
    runs.assert_survived(base / killed, base / name / "run", ends[killed], KILLS[name], finished)


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_ends_the_same(base, ends):
    out, err = runs.printed(base / "damaged")
    assert ends["damaged"] == [[0]] and runs.resumed(out) == [4], err
    assert err.count("warning: ") == 1 and f"warning: {base / 'damaged/run/checkpoint.pt'} " in err
    runs.assert_same_run(base / "damaged" / "run", base / "sfa" / "run")


def test_signals_end_a_run_with_one_line_and_it_resumes_to_the_same_end(base, ends):
    out, err = runs.printed(base / "stopped")
    assert ends["stopped"] == [[143], [130], [0]] and runs.resumed(out) == [1, 2]
    for line, signal, epoch in zip(err.splitlines(), ("SIGTERM", "SIGINT"), (1, 2), strict=True):
        assert line == f"{signal}: stopped; the same command resumes after epoch {epoch}"
    runs.assert_same_run(base / "stopped" / "run", base / "sfa" / "run")


def test_a_finished_run_started_again_changes_nothing_and_with_another_learning_rate_is_refused(base, ends):
    before = runs.content_of(base / "sfa" / "run")
    out, _ = runs.printed(base / "again")
    assert ends["again"] == [[0]] and runs.resumed(out) == [5] and "\nepoch " not in out
    assert runs.content_of(base / "again" / "run") == before
    _, err = runs.printed(base / "other")
    assert ends["other"] == [[2]] and "lr was 0.02, now 0.01" in err.splitlines()[-1]
    assert runs.content_of(base / "other" / "run") == before
