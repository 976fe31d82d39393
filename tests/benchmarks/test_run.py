"""The table runner: which cells there are, what it starts, and what it says when a run fails."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from afm import train
from benchmarks import run
from benchmarks.cells import CLAIMS, PAPERS, PROFILES, ROOT, cells
from benchmarks.engines import is_finished
from common.runs.cli import UserError, read_presets
from common.runs.results import COLUMNS
from sfa import Train_cifar
from tests.benchmarks.files import frame, read

CELL = "embedded/digits-if0.1-imb0.5/sfa"


@pytest.mark.parametrize("paper", PAPERS)
def test_every_preset_is_a_cell_of_one_profile_or_of_the_protocol_and_its_shortened_form(paper):
    names = {profile: [cell.preset for cell in cells(paper, profile)] for profile in PROFILES}
    own = [name for name in names["short"] if name.startswith("short/")]
    of_claims = [cell.preset for cell in cells(paper, CLAIMS)]
    every = [*names["embedded"], *own, *names["paper"], *of_claims]
    assert sorted(every) == sorted(read_presets(ROOT / paper / "presets.toml"))
    assert sorted(names["short"]) == sorted([*own, *names["paper"]])
    assert all(name.startswith("embedded/") for name in names["embedded"])
    assert not any(name.startswith(("embedded/", "short/", "claims/")) for name in names["paper"])
    assert of_claims and all(name.startswith("claims/") for name in of_claims)
    assert names["embedded"] and names["paper"]
    for profile in PROFILES:
        for cell in cells(paper, profile):
            shortened = profile == "short" and not cell.preset.startswith("short/")
            assert cell.flags == (cell.script.short if shortened else ()), (profile, cell.preset)


def test_cells_are_picked_by_name_and_by_table():
    assert "short/cifar10-sym0.5/afm-k2" in [cell.preset for cell in cells("afm", "short")]
    (cell,) = cells("afm", "short", ["food101n/food101n/afm"])
    assert cell.flags == ("--epochs", "10", "--schedule", "5", "8")
    found = {cell.preset for cell in cells("sfa", "paper", table="webvision")}
    assert found == {"webvision/webvision/sfa", "webvision/webvision-resnet50/sfa"}
    every = {cell.preset for cell in cells("sfa", "paper")}
    assert found | {cell.preset for cell in cells("sfa", "paper", table="grid")} == every
    grid = ["grid/cifar10-if0.1-imb0.2/sfa"]
    for words, said in (
        (("afm", "embedded", ["short/x/afm"]), "no cell short/x/afm in profile embedded of afm: .*digits"),
        (("sfa", "paper", None, "no"), "no table no in profile paper of sfa: choose from grid, webvision"),
        (("sfa", "paper", grid, "webvision"), r"no cell grid/cifar10-if0\.1-imb0\.2/sfa"),
    ):
        with pytest.raises(UserError, match=said):
            cells(*words)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("paper", PAPERS)
def test_every_task_has_folders_of_its_own(paper, profile, tmp_path):
    extras = ([], ["--lr", "0.1"], ["--device", "cpu"])
    folders = [
        folder
        for cell, seed, extra in product(cells(paper, profile), (1, 12), extras)
        for folder, _ in run.make_task(cell, seed, tmp_path, tmp_path, extra).commands
    ]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("profile", PROFILES)
def test_afm_has_its_cross_entropy_among_the_presets_and_no_run_beside_them(profile, tmp_path):
    methods = {}
    for cell in cells("afm", profile):
        ((folder, command),) = run.make_task(cell, 1, tmp_path / "runs", ROOT / "data", []).commands
        assert command[command.index("--data-root") + 1] == "data" and "--data_path" not in command
        assert command[1] == "afm/train.py" and folder.parts[-2] == cell.preset.split("/")[2]
        args = train.parse_args(["--preset", cell.preset, *cell.flags])
        methods.setdefault(cell.preset.rpartition("/")[0], []).append(train.method(args))
    for name, found in methods.items():
        assert len(set(found)) == len(found), "a cell runs a method once"
        assert "AFM (K=2)" in found
        if name.startswith(("embedded/", "short/")):
            every = ["CE", "mixup", "AFM (K=2)", "AFM (K=3)"]
            fewer = {"embedded/digits-margin1-0.4": every[:3], "embedded/digits-hard0.4": ["CE", "AFM (K=2)"]}
            assert found == fewer.get(name, every)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("paper", ["afm", "sfa"])
def test_the_methods_of_a_cell_share_everything_but_the_method(paper, profile):
    """A comparison is of methods alone: data, network, batch, schedule and rates are the same for all of a cell."""
    if (paper, profile) == ("afm", "paper"):
        return  # the papers' cells differ in more
    own = {"preset", "weight_mixed", "weight_plain", "mix_at", "weights", "selection", "loss"}
    own |= {"group_size", "group_order", "group_rounds"}  # mixup has partners, not groups
    script, settings, methods = {"afm": train, "sfa": Train_cifar}[paper], {}, {}
    for cell in cells(paper, profile):
        if cell.script.path != "sfa/Train_webvision.py":
            args = script.parse_args(["--preset", cell.preset, *cell.flags])
            shared = {name: value for name, value in vars(args).items() if name not in own}
            name, _, short = cell.preset.rpartition("/")
            assert shared == settings.setdefault(name, shared)
            methods.setdefault(name, []).append(script.method(args))
            if paper == "sfa":
                assert short == "-".join([args.selection, *([args.loss] if args.loss != "ce" else [])])
    for found in methods.values():
        assert len(set(found)) == len(found)
        assert paper == "afm" or {"SFA", "GMM", "no selection"} <= set(found)


def test_sfa_has_its_cross_entropy_as_a_run_beside_that_of_sfa_alone(tmp_path):
    settings = set()
    for cell in cells("sfa", "paper"):
        method, *baseline = run.make_task(cell, 1, tmp_path, ROOT / "data", []).commands
        assert method[1][method[1].index("--data_path") + 1] == "data"
        beside = cell.preset.endswith("/sfa") and not cell.preset.startswith("webvision/")
        assert len(baseline) == beside, cell.preset
        for folder, words in baseline:
            settings.add(cell.preset.rpartition("/")[0])
            assert "benchmarks.baseline" in words and folder == method[0] / "baseline"
    assert len(settings) == 12  # two data sets, three long tails, two rates of noise


def test_commands_name_paths_relative_to_the_repository_where_they_lie_in_it(tmp_path):
    cell = cells("sfa", "embedded")[0]
    assert cell.preset == CELL
    extra = ["--device", "cpu", "--lr", "0.1"]
    (_, words), (_, baseline) = run.make_task(cell, 1, ROOT / "results/runs", ROOT / "data", extra).commands
    folder = "results/runs/digits-if0.1-imb0.5/sfa/seed1-device-cpu-lr-0.1"
    assert words[words.index("--out") + 1] == folder and words[-4:] == extra
    assert baseline[-2:] == ["--device", "cpu"], "the baseline runs where the method runs"
    joined = run.make_task(cell, 1, ROOT / "results", ROOT, ["--device=cpu", "--lr=0.1"])
    assert joined.commands[1][1][-1] == "--device=cpu"
    outside = run.make_task(cell, 1, tmp_path, tmp_path, [])
    assert outside.commands[0][1][-1] == str(tmp_path)


def start(*words: str, paper: str = "sfa") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.run", paper, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess]:
    """A whole table at the size of a test: one cell, one seed, three epochs. With the directory of the method's run."""
    out = tmp_path_factory.mktemp("results")
    process = start("--out", str(out), *SHORT)
    (folder,) = (out / "runs/sfa" / CELL).iterdir()
    return out, folder, process


SHORT = ("--cells", CELL, "--seeds", "4", "--num_epochs", "3", "--warm_up", "1")


@pytest.mark.slow
def test_a_table_is_a_csv_a_comparison_and_a_figure(finished):
    out, folder, process = finished
    assert process.returncode == 0, process.stderr
    rows = read(out / "sfa.csv")
    assert tuple(rows[0]) == COLUMNS
    metrics = {(m, n) for m in ("SFA", "CE") for n in ("best", "last", "last10")}
    assert {(r["method"], r["metric"]) for r in rows} >= metrics
    # the baseline takes the method's epochs, and its labels
    assert {(r["seed"], r["profile"], r["epochs"]) for r in rows} == {("4", "embedded", "3")}
    for name in ("noisy_labels.npy", "train_index.npy"):
        assert (folder / name).read_bytes() == (folder / "baseline" / name).read_bytes()
    assert (out / "sfa.png").read_bytes().startswith(b"\x89PNG")
    assert "every method against cross-entropy" in process.stdout


@pytest.mark.slow
def test_what_is_finished_is_not_started_again_and_a_changed_record_is(finished, tmp_path):
    out, folder, first = finished
    before = (out / "sfa.csv").read_bytes()
    consoles = [(f / "console.txt").read_bytes() for f in (folder, folder / "baseline")]
    again = start("--out", str(out), *SHORT)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before: ") == 2 and "finished before" not in first.stdout
    assert [(f / "console.txt").read_bytes() for f in (folder, folder / "baseline")] == consoles
    assert (out / "sfa.csv").read_bytes() == before
    command = json.loads((folder / "result.json").read_text())["command"].split()
    assert is_finished(folder, command) and not is_finished(folder, [*command, "--lr", "1"])
    for damage in (b"{}", b"half", None):
        copy = tmp_path / str(damage)
        copy.mkdir()
        (copy / "result.csv").write_bytes((folder / "result.csv").read_bytes())
        if damage is not None:
            (copy / "result.json").write_bytes(damage)
        assert not is_finished(copy, command)


@pytest.mark.slow
def test_a_failed_run_makes_the_command_fail_and_is_named(tmp_path):
    process = start("--out", str(tmp_path), "--seeds", "7", "--cells", CELL, "--p_threshold", "2")
    assert process.returncode == 1 and not (tmp_path / "sfa.csv").exists()
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"failed: {CELL} seed 7: exit status 2")
    assert "--p_threshold" in line and "between 0 and 1" in line


@pytest.mark.parametrize(
    ("paper", "line"),
    [
        ("afm", "# Food-101N, real web noise: accuracy in percent"),
        ("me_momentum", "#   90.86 ± 0.21  Me-Momentum, published [unconfirmed: recollection]"),
    ],
)
def test_a_dry_run_prints_each_command_and_the_published_figures(paper, line, capsys):
    run.main([paper, "--profile", "paper", "--seeds", "1", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    commands = [text for text in lines if text.startswith(f"python {paper}/")]
    assert len(commands) == len(cells(paper, "paper"))
    assert all(text.startswith("#") for text in lines if text not in commands)
    assert line in lines
    assert all("[unconfirmed: " in text or "[secondary: " in text for text in lines if "published" in text)


def test_a_preset_is_run_by_its_own_script_with_its_own_name_for_the_data(tmp_path):
    names = ["mnist/mnist-inst0.2/me-momentum", "clothing1m/clothing1m/me-momentum"]
    chosen = cells("me_momentum", "paper", names)
    ((_, mnist),), ((_, clothing),) = (run.make_task(c, 1, tmp_path, tmp_path, []).commands for c in chosen)
    assert mnist[1] == "me_momentum/main.py" and "--data_path" in mnist and "--data_root" not in mnist
    assert clothing[1] == "me_momentum/Clothing.py" and "--data_root" in clothing
    short = [cell.flags for cell in cells("me_momentum", "short", names)]
    assert short[0] != short[1] and all("--n_epoch" in flags for flags in short)


def test_cells_without_cross_entropy_are_reported_without_a_comparison(tmp_path, capsys):
    row = {"paper": "sanm", "table": "embedded", "cell": "digits", "method": "DivideMix", "seed": "1"}
    rows = frame(row | {"value": 90, "metric": metric} for metric in ("best", "last", "last10"))
    run.report("sanm", cells("sanm", "embedded")[:1], rows, tmp_path)
    assert "cross-entropy is not among these cells" in capsys.readouterr().out
    assert len(read(tmp_path / "sanm.csv")) == 3


def test_the_runs_that_make_encoders_come_first(capsys):
    run.main(["manifold_dividemix", "--seeds", "1", "--dry_run"])
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    made = ["pretrain.py" in command for command in commands]
    assert any(made) and made == sorted(made, reverse=True)
