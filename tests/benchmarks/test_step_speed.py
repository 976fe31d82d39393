"""The speed of training steps: what the timed scripts report, on images of 8 pixels, and the figures made of it."""

import json
import runpy
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import speed, step_speed, timed_script
from benchmarks.speed_inputs import make_small_images, views_by_pil
from benchmarks.step_speed import METHODS, PATHS, Workload
from benchmarks.timed_script import PARTS
from common.datasets.in_memory import NORMALISATION
from common.gpu import augment, policies
from common.gpu.device import Device
from common.gpu.loader import Batches, Images
from common.runs.cli import UserError
from tests.benchmarks.files import read

ROOT = Path(__file__).resolve().parents[2]
SELECTING = ("sfa", "me_momentum", "manifold_dividemix", "sanm")
CPU = Device(torch.device("cpu"), "fp32", "for a test")


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    """64 images of 8 pixels, two epochs of the main phase, batches of 4 and 8."""
    made = Workload(tmp_path_factory.mktemp("workload"), 64, 8, 2, 16)
    step_speed.make_workload(made)
    return made


@pytest.fixture
def report_of(workload, tmp_path):
    """Time the script of a method; its report."""

    def timed(name: str, *more: str) -> dict:
        flags = [*step_speed.flags_of(name, workload), "--device", "cpu", "--out", str(tmp_path / "run")]
        script, report = str(ROOT / METHODS[name].script), tmp_path / "times.json"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *flags])
            timed_script.main([*more, str(report), script, *flags])
        return json.loads(report.read_text())

    return timed


QUICK = [("ce", "ours"), ("me_momentum", "plain")]  # of the fast tests
OTHERS = [(name, path) for name in METHODS for path in PATHS if (name, path) not in QUICK]


@pytest.mark.parametrize(
    ("name", "path"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
def test_every_method_is_timed_by_both_paths(name, path, report_of):
    report = report_of(name, *(["--plain", "--workers", "0"] if path == "plain" else []))
    assert report["batch_size"] == (8 if name in ("ce", "afm", "me_momentum") else 4)
    assert report["precision"] == "fp32"
    epochs = report["epochs"]
    expected = {"ce": [False] * 2, "afm": [False] * 2, "me_momentum": [False] * 3}
    assert [epoch["warm_up"] for epoch in epochs][:3] == expected.get(name, [True, False, False])
    assert len(step_speed.main_steps(report))
    for epoch in epochs:
        assert len(epoch["training"]) == (2 if name in ("sfa", "sanm") else 1)
        training = sum(one["seconds"] for one in epoch["training"])
        assert training + epoch["selection"] + epoch["evaluation"] <= epoch["seconds"]
        assert epoch["evaluation"] > 0
        for one in epoch["training"]:
            assert len(one["steps"]) == one["length"]
            assert sum(step["seconds"] for step in one["steps"]) <= one["seconds"]
            for step in one["steps"]:
                parts = [step[part] for part in PARTS]
                assert min(parts) > 0 and sum(parts) <= step["seconds"]
    selected = any(epoch["selection"] > 0 for epoch in epochs if not epoch["warm_up"])
    assert selected == (name in SELECTING)


def log_of(run: Path) -> list[dict]:
    return [{name: text for name, text in row.items() if name != "seconds"} for row in read(run / "log.csv")]


@pytest.mark.parametrize("name", [pytest.param("sanm", marks=pytest.mark.slow), "me_momentum"])
def test_a_timed_script_gives_the_very_same_results(name, workload, report_of, tmp_path, monkeypatch):
    flags = [*step_speed.flags_of(name, workload), "--device", "cpu", "--out", str(tmp_path / "plainly")]
    monkeypatch.setattr(sys, "argv", [METHODS[name].script, *flags])
    runpy.run_path(str(ROOT / METHODS[name].script), run_name="__main__")
    report_of(name, "--count_flops")
    assert len(log_of(tmp_path / "run")) >= 3
    assert log_of(tmp_path / "run") == log_of(tmp_path / "plainly")
    # nothing of the timing is left behind
    assert Batches.__iter__.__module__ == "common.gpu.loader"
    assert torch.Tensor.backward.__module__ == "torch._tensor"


def convolution(wide_in: int, wide: int, kernel: int, side: int, first: bool = False) -> int:
    """Forward, gradient of the weights and, but for the first layer, gradient of the images."""
    return (2 if first else 3) * 2 * wide_in * wide * kernel**2 * side**2


def test_flops_are_those_counted_by_hand(report_of):
    flops = report_of("ce", "--count_flops")["flops"]
    # benchmarks.baseline.Network of 8 pixels: a stem of 16, blocks of 16, 32, 64 channels with strides 1, 2, 2
    by_hand = convolution(3, 16, 3, 8, first=True)
    for wide_in, wide, side in ((16, 16, 8), (16, 32, 4), (32, 64, 2)):
        by_hand += convolution(wide_in, wide, 3, side) + convolution(wide, wide, 3, side)
        by_hand += convolution(wide_in, wide, 1, side) if wide_in != wide else 0
    by_hand += 3 * 2 * 64 * 10
    assert flops == {"flops": 8 * by_hand, "images": 8}


def test_a_pass_is_cut_short(report_of):
    for epoch in report_of("ce", "--pass_seconds", "1e-6")["epochs"]:
        (training,) = epoch["training"]
        assert (len(training["steps"]), training["length"]) == (2, 8)
        second = training["steps"][1]["seconds"]
        assert step_speed.whole_seconds(training) == pytest.approx(training["seconds"] + 6 * second)
        parts = step_speed.epoch_parts(epoch)
        assert parts["whole"] == pytest.approx(epoch["seconds"] + 6 * second)
        assert sum(parts.values()) == pytest.approx(2 * parts["whole"])


crop = partial(augment.crop_and_flip, padding=1)


@pytest.mark.parametrize(
    ("augmentation", "views", "workers"),
    [
        (None, 1, 0),
        (None, 1, 1),
        (crop, 2, 0),
        (partial(augment.warm_up_view, crop=crop), 1, 0),
        (partial(policies.six_views, crop=crop), 1, 0),
        (partial(policies.six_views, crop=crop), 1, 1),
        (partial(policies.six_views, crop=crop, weak_reference=True), 1, 0),
        (partial(policies.four_views, crop=crop), 1, 0),
        (augment.simclr_view, 2, 0),
    ],
)
def test_the_plain_path_has_views_of_the_same_shapes(augmentation, views, workers):
    images = Images(make_small_images(10, 8), *NORMALISATION["cifar10"], torch.device("cpu"))
    subset = torch.tensor([9, 1, 2, 3, 5, 7, 8])
    options = {"views": views, "augmentation": augmentation, "shuffle": augmentation is not None}
    batches = Batches(images, 4, subset=subset, generator=torch.Generator().manual_seed(0), **options)
    ours, plain = list(batches), list(timed_script.plain_batches(batches, workers))
    shapes = [[[view.shape for view in found] for found, _ in every] for every in (plain, ours)]
    assert shapes[0] == shapes[1]
    assert {view.dtype for found, _ in plain for view in found} == {torch.float32}
    assert torch.cat([index for _, index in plain]).sort().values.equal(subset.sort().values)
    if augmentation is None:
        for (own, own_index), (other, other_index) in zip(ours, plain, strict=True):
            assert torch.equal(own_index, other_index)
            assert torch.allclose(own[0], other[0], atol=1e-5)


def test_the_plain_path_of_no_images_has_no_batch():
    images = Images(make_small_images(2, 8), *NORMALISATION["cifar10"], torch.device("cpu"))
    batches = Batches(images, 4, subset=torch.empty(0, dtype=torch.int64))
    assert list(timed_script.plain_batches(batches, 0)) == list(batches) == []


def test_an_unknown_augmentation_has_no_plain_counterpart():
    with pytest.raises(ValueError, match="no counterpart"):
        views_by_pil(lambda images, generator: images, 1, 8)


# figures, of reports made up here -------------------------------------------------------------------------------------


def a_step(seconds: float, whole: bool = True) -> dict:
    parts = {"augment": 0.1, "forward": 0.3, "backward": 0.4, "optimiser": 0.1}
    step = {"images": 4, "whole": whole, "seconds": seconds}
    return step | {name: share * seconds for name, share in parts.items()}


def a_report(*seconds: float) -> dict:
    """An epoch for each number: steps of as many seconds, behind a first one and before a partial one."""
    epochs = []
    for number, each in enumerate(seconds):
        steps = [a_step(98 - each), a_step(each), a_step(each), a_step(each, whole=False)]
        training = [{"seconds": 98 + 3 * each, "length": 4, "steps": steps}]
        epoch = {"seconds": 100 + 4 * each + 1, "selection": 2.0, "evaluation": 1.0, "warm_up": number == 0}
        epochs.append(epoch | {"training": training})
    report = {"precision": "fp32", "batch_size": 4, "peak_memory_mb": 500.0, "epochs": epochs}
    return report | {"flops": {"flops": 8e6, "images": 4}, "operators_seconds": 0.5}


ARGS = Namespace(images=64, size=8, workers=2)


def rows_of(ours: dict, plain: dict) -> list[dict]:
    return list(step_speed.rows("sfa", {"ours": ours, "plain": plain}, ARGS, CPU, {"fp32": 1e9}))


def test_ratios_are_of_the_epochs_that_were_run_in_turn():
    ours, plain = rows_of(a_report(9, 1, 2, 1), a_report(1, 3, 2, 8))
    columns = ["ours_over_plain_median", "ours_over_plain_min", "ours_over_plain_max", "pairs"]
    assert [ours[column] for column in columns] == [3, 1, 8, 3]  # the warm-up is no pair
    assert [plain[column] for column in columns] == [None] * 4
    assert rows_of(a_report(1, 4), a_report(1, 2))[0]["ours_over_plain_median"] == 0.5


def test_columns_of_a_row():
    ours, plain = rows_of(a_report(9, 1, 2, 1), a_report(2, 2, 2))
    assert list(ours) == list(plain)
    assert (ours["method"], ours["path"], ours["workers"], plain["workers"]) == ("sfa", "ours", 0, 2)
    assert (ours["median_images_per_second"], ours["q1"], ours["q3"], ours["timed_steps"]) == (4, 2.5, 4, 6)
    assert ours["warm_up_images_per_second"] == pytest.approx(4 / 9, abs=1e-3)
    parts = [ours[f"{part}_ms"] for part in (*PARTS, "rest")]
    assert sum(parts) == pytest.approx(ours["step_ms"], abs=0.01)
    assert ours["step_ms"] == pytest.approx(4000 / 3, abs=1e-3)
    # epochs 2 and 3: the first of the main phase is left out
    assert ours["timed_epochs"] == 2
    assert ours["seconds_per_epoch"] == pytest.approx(101 + 4 * 1.5)
    named = [ours[f"epoch_{part}_seconds"] for part in ("training", "selection", "evaluation", "rest")]
    assert sum(named) == pytest.approx(ours["seconds_per_epoch"])
    assert named[:3] == [pytest.approx(98 + 3 * 1.5), 2, 1]
    assert (ours["one_selection_seconds"], ours["images_trained_per_epoch"]) == (2, 16)
    assert ours["step_gflop"] == 8e6 / 1e9
    assert ours["gflop_per_second"] == pytest.approx(2e6 * 3 / 1e9)
    assert (ours["matmul_gflop_per_second"], ours["share_of_matmul"]) == (1, 0.006)
    assert {"device", "torch", "git", "command", "peak_memory_mb", "not_plain"} <= ours.keys()
    assert "4.00" in step_speed.step_line(ours)
    assert "(" in step_speed.step_line(ours).rsplit("%", 1)[1]


def test_too_few_images_for_a_step_that_counts():
    report = a_report(1, 1)
    for epoch in report["epochs"]:
        del epoch["training"][0]["steps"][1:3]
    with pytest.raises(UserError, match="64 images are too few"):
        rows_of(report, report)


# two processes --------------------------------------------------------------------------------------------------------

TURNS = f"""
import json, sys
for _ in range(3):
    print({timed_script.WAITING!r}, flush=True)
    sys.stdin.readline()
    open(sys.argv[2], "a").write(sys.argv[1])
json.dump({{}}, open(sys.argv[3], "w"))
"""


def test_the_two_take_turns_and_neither_is_always_first(workload, monkeypatch, tmp_path):
    def command_line(method, path, workload, args, device):
        return [sys.executable, "-c", TURNS, path[0], str(tmp_path / "order"), str(workload.folder / f"{path}.json")]  # fmt: skip

    monkeypatch.setattr(step_speed, "command_line", command_line)
    found = step_speed.run_in_turns("ce", workload, ARGS, CPU)
    assert found == {"ours": {}, "plain": {}}
    assert (tmp_path / "order").read_text() == "oppoop"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('first'); sys.exit('no such thing')", r"no such thing .exit status 1"),
        (f"import os; print('begun'); print({timed_script.WAITING!r}, flush=True); os.kill(os.getpid(), 9)",
         r"begun .exit status -9"),
    ],
)  # fmt: skip
def test_a_script_that_fails_or_is_killed_is_named_by_its_last_line(code, said, workload, monkeypatch):
    codes = {"ours": code, "plain": f"print({timed_script.WAITING!r}, flush=True); input()"}
    monkeypatch.setattr(
        step_speed, "command_line", lambda method, path, *_: [sys.executable, "-c", codes[path]]
    )
    with pytest.raises(UserError, match=f"ce, ours path: {said} of python -c"):
        step_speed.run_in_turns("ce", workload, ARGS, CPU)


def test_on_a_card_a_moment_is_an_event(monkeypatch):
    class Event:
        """What torch.cuda.Event does, with a clock that goes on by 500 ms from event to event."""

        clock = 0

        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream):
            Event.clock += 500
            self.stream, self.time = stream, Event.clock
            self.elapsed_time = lambda other: other.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    start, end = (timed_script.now(torch.device("cuda", 1)) for _ in range(2))
    assert (start.stream, timed_script.between(start, end)) == ("of cuda:1", 0.5)


def test_one_epoch_is_not_enough(tmp_path):
    with pytest.raises(UserError, match="--epochs 1"):
        speed.main(["steps", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "steps.csv")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    out = tmp_path / "steps.csv"
    words = ["steps", "--methods", "me_momentum", "--size", "8", "--images", "64", "--epochs", "2"]
    speed.main([*words, "--workers", "1", "--device", "cpu", "--out", str(out)])
    ours, plain = read(out)
    assert (ours["path"], plain["path"]) == ("ours", "plain")
    for row in (ours, plain):
        assert row["method"] == "me_momentum" and None not in row.values()
        assert 0 < float(row["q1"]) <= float(row["median_images_per_second"]) <= float(row["q3"])
        assert 0 < float(row["share_of_matmul"]) < 1
        assert float(row["step_gflop"]) == float(ours["step_gflop"]) > 0
        assert float(row["peak_memory_mb"]) > 100
        assert row["batch_size"] == "8"
    low, middle, high = (float(ours[f"ours_over_plain_{which}"]) for which in ("min", "median", "max"))
    assert 0 < low <= middle <= high and int(ours["pairs"]) >= 2 and plain["not_plain"]
    printed = capsys.readouterr().out
    assert printed.count("me_momentum") == 2 and f"written to {out}" in printed
