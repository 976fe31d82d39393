"""The figures we publish: well-formed, reproducible from their commands, and the same in the texts as in the files."""

import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.cells import PAPERS
from benchmarks.compare import COMPARED, against
from benchmarks.results import figure, read_results
from tests.benchmarks.files import read

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "benchmarks" / "reference"
FILES = sorted(REFERENCE.glob("*.csv"))
SCRIPTS = (
    *("python afm/train.py ", "python me_momentum/main.py ", "python sfa/Train_cifar.py "),
    *("python manifold_dividemix/pretrain.py ", "python manifold_dividemix/train_semisup.py "),
    *("python sanm/pretrain.py ", "python sanm/Train_cifar.py "),
    *("python -m benchmarks.baseline ", "python -m benchmarks.label_errors "),
)
FIGURE = re.compile(r"\d+\.\d\d ± \d+\.\d\d")
PLACE = ["file", "noise", "cell", "method", "fidelity", "metric"]
# what the texts call a method, in place of its name in the files
SAME = ["SFA", "no selection", "DivideMix", "Manifold DivideMix", "Me-Momentum", "CE", "mixup"]
SAME += [f"{a} + {b}" for a in SAME[:2] for b in ("LDAM", "GCE", "SCE", "balanced softmax")]
METHODS = {
    **{name: name for name in SAME},
    **{"cross-entropy": "CE", "cross-entropy from the encoder": "CE (pre-trained)", "MM": "Me-Momentum"},
    **{"AFM": "AFM (K=2)", "AFM, K = 2": "AFM (K=2)", "AFM, K = 3": "AFM (K=3)"},
    **{"SANM on C2D": "SANM(C2D)", "SANM on DivideMix": "SANM(DivideMix)"},
    **{f"without {part}": f"Manifold DivideMix without {part}" for part in ("OOD removal", "manifold mixup")},
    **{"DivideMix's selection": "GMM", "small losses": "GMM"},
}
NOISE = {f"{name} {rate}0 %": f"{name} 0.{rate}" for name in ("symmetric", "instance") for rate in (2, 4, 5)}
NOISE |= {f"{name} 40 %": "margin1 0.4" for name in ("margin", "margin1")} | {"hard 40 %": "hard 0.4"}
NOISE |= {"long-tailed": "imb 0.5", "sym, ": "symmetric 0.4", "inst, ": "instance 0.4"}
METRICS = {"best": "best", "last": "last", "last 10": "last10", "mean of last 10": "last10"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_reference_row_was_measured_at_a_commit_by_a_command_that_names_no_folder_of_a_machine(file):
    for row in read_results(file).to_dict("records"):
        assert row["command"].startswith(SCRIPTS)
        assert not any(word.startswith(("/", "~")) for word in row["command"].split())
        assert row["git"] and not row["git"].endswith("+")
        assert row["torch"] and row["device"] and float(row["seconds"]) > 0
    assert f"`{file.name}`" in (REFERENCE / "README.md").read_text()


# the texts ------------------------------------------------------------------------------------------------------------


@cache
def figures() -> pd.DataFrame:
    """Mean ± standard deviation over seeds as the texts print it, as it is and in percent, of every place."""
    rows = pd.concat([read_results(file).assign(file=file.name) for file in FILES], ignore_index=True)
    rows["noise"] = rows["noise_type"] + " " + rows["noise_rate"]
    groups = [(key, values) for key, values in rows.groupby(PLACE)["value"] if len(values) > 1]
    return pd.DataFrame(
        [(*key, figure(scale * values)) for key, values in groups for scale in (1, 100)],
        columns=[*PLACE, "text"],
    )


def table_rows(page: str) -> list[tuple[list[str], list[str]]]:
    """Heading and cells of each row of a Markdown table that has a figure of ours; an oracle's is in no file."""
    found, heading, before = [], [], ""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|---"):
            heading = before
        elif line.startswith("|") and FIGURE.search(line) and not re.search("published|oracle", line):
            found.append((heading, cells))
        before = cells
    return found


def longest(names: dict[str, str], text: str) -> str | None:
    """The value of the longest name in a text."""
    return names.get(max((name for name in names if name in text), key=len, default=None))


PAGES = ["README.md", *(f"{paper}/README.md" for paper in PAPERS)]


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_in_a_sentence_is_in_a_file(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("|"))
    published = [row for paper in PAPERS for row in read(ROOT / f"benchmarks/reported/{paper}.csv")]
    known = {*figures()["text"], *(f"{row['value']} ± {row['std']}" for row in published)}
    known |= {"93.24 ± 0.70", "94.72 ± 0.56"}  # oracles of Manifold DivideMix
    assert set(FIGURE.findall(text)) <= known


@pytest.mark.parametrize("page", PAGES)
def test_the_figures_in_a_row_of_a_table_are_of_its_method_and_its_noise(page):
    rows = table_rows(page)
    assert rows
    for heading, cells in rows:
        label = " | ".join(cell for cell in cells if not FIGURE.search(cell))
        across = [METHODS.get(name) for name in heading]  # the table of all methods has them in its heading
        method, place, common = longest(METHODS, label), longest(NOISE, label), None
        for column, cell, of_column in zip(heading, cells, across, strict=True):
            # the logs have the columns of single epochs
            for shown in FIGURE.findall(cell) if not column.startswith("epoch ") else ():
                own, wanted = figures()[figures()["text"] == shown], of_column or method
                for name, value in (("metric", METRICS.get(column)), ("method", wanted), ("noise", place)):
                    own = own[own[name] == value] if value else own
                released = "released" in label or "authors' code" in label
                own = own[(own["fidelity"] == "released") == released] if wanted != "CE" else own
                common = {*own["file"]} if common is None else common & {*own["file"]}
                assert common, f"{page}: {shown} in | {' | '.join(cells)}"


# what the texts claim about the figures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cell", "baseline", "margins"),
    [
        ("afm", "digits-sym0.5", "CE", {"AFM (K=2)": 3, "AFM (K=3)": 3}),
        ("sanm", None, "CE", {"SANM(C2D)": 5, "SANM(DivideMix)": 5, "DivideMix": 0}),
        ("sanm", None, "DivideMix", {"SANM(DivideMix)": 0}),
        ("manifold_dividemix", None, "CE", {"Manifold DivideMix": 2}),
        ("manifold_dividemix", None, "CE (pre-trained)", {"Manifold DivideMix": 2}),
        ("me_momentum", "digits-sym0.4", "CE", {"Me-Momentum": 5}),
        ("me_momentum", "digits-inst0.4", "CE", {"Me-Momentum": 5}),
        *(("sfa", None, method, {"SFA": 10}) for method in ("CE", "GMM", "no selection")),
        *(
            ("sfa sfa_losses", None, f"no selection + {loss}", {f"SFA + {loss}": 0})
            for loss in ("LDAM", "balanced softmax", "GCE", "SCE")
        ),
    ],
)
def test_a_method_is_ahead_on_digits_by_the_margin_we_claim(files, cell, baseline, margins):
    """Of three seeds each; Me-Momentum is not behind at the epoch best on validation either."""
    rows = pd.concat([read_results(REFERENCE / f"{file}.csv") for file in files.split()], ignore_index=True)
    rows = rows[(rows["cell"] == cell) | (cell is None)]
    for metric in ("last", *(["at_best_validation"] if files == "me_momentum" else [])):
        found = against(rows, baseline, [metric])
        found = found[found["status"] == COMPARED].set_index("method")
        assert (found["n_a"] == 3).all() and (found["n_b"] == 3).all()
        for method, margin in margins.items():
            ahead = found["difference"][method]
            assert ahead > margin if metric == "last" else ahead >= 0, (method, metric, ahead)


def test_the_outlier_score_decays_less_without_contrastive_loss_in_every_pair_of_runs():
    names = ["Manifold DivideMix", "Manifold DivideMix without contrastive loss"]
    for files in (["_k10"], ["", "_contrastive"]):
        rows = pd.concat([read_results(REFERENCE / f"manifold_dividemix{file}.csv") for file in files])
        rows = rows[(rows["metric"] == "last_ood_auroc") & rows["method"].isin(names)]
        scores = rows.pivot(index="seed", columns="method", values="value")
        assert len(scores) == 3 and (scores[names[1]] > scores[names[0]]).all()


def test_what_the_front_page_says_of_all_methods_on_the_same_data_is_in_the_file():
    found = against(read_results(REFERENCE / "cross_digits.csv"), "CE", ["last"])
    assert len(found) == 5 * 5 and set(found["epochs"]) == {"32"}
    splitting = {"SFA", "SANM(DivideMix)", "Manifold DivideMix"}
    cells = {cell: own.set_index("method") for cell, own in found.groupby("cell")}
    for cell, gains in (("digits-inst0.4", (13, 17)), ("digits-margin1-0.4", (8, 13))):
        own = cells[cell]["difference"][list(splitting)]
        assert (round(own.min()), round(own.max())) == gains
    ahead = {cell: set(own.index[own["low"] > 0]) for cell, own in cells.items()}
    assert ahead["digits-inst0.4"] == ahead["digits-margin1-0.4"] == splitting
    assert ahead["digits-sym0.2"] == {"Me-Momentum", "SANM(DivideMix)"}
    assert ahead["digits-sym0.5"] == ahead["digits-if0.1-imb0.5"] == set()
    tail = cells["digits-if0.1-imb0.5"]
    assert list(tail.index[tail["high"] < 0]) == ["Me-Momentum"]
    assert round(tail["difference"]["Me-Momentum"]) == -19


def mnist(cell: str, metric: str, fidelity: str = "paper") -> str:
    """Of seed 1."""
    rows = read_results(REFERENCE / "me_momentum_mnist.csv")
    wanted = {"method": "Me-Momentum", "cell": cell, "metric": metric, "fidelity": fidelity, "seed": "1"}
    return figure(rows["value"][(rows[list(wanted)] == pd.Series(wanted)).all(axis=1)])


@pytest.mark.parametrize("cell", ["mnist-sym0.2", "mnist-sym0.4", "mnist-inst0.2", "mnist-inst0.4"])
def test_the_log_of_a_run_on_mnist_is_that_of_its_row(cell):
    log = read(REFERENCE / "logs" / f"me_momentum_{cell.replace('-', '_')}.csv")
    best = [row for row in log if row["new_best"] == "1"][-1]
    for metric, row in (("last", log[-1]), ("at_best_validation", best)):
        assert f"{float(row['test_accuracy']):.2f}" == mnist(cell, metric)
    assert len(log) == float(mnist(cell, "epochs_trained"))


def test_as_released_mnists_first_outer_loop_is_the_papers_but_for_the_batch_mean():
    first = [r for r in read(REFERENCE / "logs" / "me_momentum_mnist_inst0.2.csv") if r["outer"] == "1"]
    best = [row for row in first if row["new_best"] == "1"][-1]
    released = mnist("mnist-inst0.2", "at_best_validation", "released")
    assert f"{float(best['test_accuracy_batchmean']):.2f}" == released
    assert len(first) == float(mnist("mnist-inst0.2", "epochs_trained", "released"))
