"""The figures we publish: well-formed, reproducible from their commands, and the same in the texts as in the files."""

import csv
import statistics
from pathlib import Path

import pytest

from benchmarks.compare import against, read_results

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "benchmarks" / "reference"
FILES = sorted(REFERENCE.glob("*.csv"))
SCRIPTS = (
    *("python afm/train.py ", "python me_momentum/main.py ", "python sfa/Train_cifar.py "),
    *("python manifold_dividemix/pretrain.py ", "python manifold_dividemix/train_semisup.py "),
    *("python sanm/pretrain.py ", "python sanm/Train_cifar.py "),
    "python -m benchmarks.baseline ",
)


def summary(
    file: str, method: str, metric: str, scale: int = 1, fidelity: str = "paper", cell: str | None = None
) -> str:
    """mean ± standard deviation over seeds, as the texts print it; the figure itself where there is one seed."""
    wanted = (method, metric, fidelity)
    rows = [row for row in read_results(REFERENCE / file) if cell in (None, row["cell"])]
    values = [scale * r["value"] for r in rows if (r["method"], r["metric"], r["fidelity"]) == wanted]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_reference_row_was_measured_at_a_commit_by_a_command_that_names_no_folder_of_a_machine(file):
    for row in read_results(file):
        assert row["command"].startswith(SCRIPTS)
        assert not any(word.startswith(("/", "~")) for word in row["command"].split())
        assert row["git"] and not row["git"].endswith("+")
        assert row["torch"] and row["device"] and float(row["seconds"]) > 0
    assert f"`{file.name}`" in (REFERENCE / "README.md").read_text()


SFA = {
    "SFA": "SFA",
    "SFA + balanced softmax": "SFA + balanced softmax",
    "GMM": "DivideMix's selection in its place",
    "no selection": "no selection",
    "CE": "cross-entropy, one network",
}
BY_SHOT = (("last_few_accuracy", 1), ("last_net1_few_recall", 100), ("last_net1_auc", 100))


def test_sfa_beats_every_other_selection_and_cross_entropy_on_digits_by_the_margins_we_claim():
    rows = [row for file in ("sfa.csv", "sfa_losses.csv") for row in read_results(REFERENCE / file)]
    lines = against(rows, "SFA", ["last"]).lines
    behind = {line.key_b.method: -line.difference for line in lines}
    assert all(line.a.n == line.b.n == 3 for line in lines)
    assert min(behind[method] for method in ("CE", "GMM", "no selection")) >= 10
    # whatever the loss, SFA's selection is better than none
    for method in ("LDAM", "balanced softmax", "GCE", "SCE"):
        assert behind[f"no selection + {method}"] > behind[f"SFA + {method}"]


def test_the_row_of_every_method_in_sfas_text_is_that_of_the_file():
    text = (ROOT / "sfa" / "README.md").read_text()
    files = (("sfa.csv", "paper"), ("sfa_losses.csv", "paper"), ("sfa_released.csv", "released"))
    for file, fidelity in files:
        rows = read_results(REFERENCE / file)
        assert {row["seed"] for row in rows} == {"1", "2", "3"}
        for method in {row["method"] for row in rows if row["fidelity"] == fidelity}:
            shown = [
                summary(file, method, metric, fidelity=fidelity) for metric in ("best", "last", "last10")
            ]
            for metric, scale in BY_SHOT:
                known = any((row["method"], row["metric"]) == (method, metric) for row in rows)
                shown.append(summary(file, method, metric, scale, fidelity) if known else "")
            assert f" | {' | '.join(shown)} |\n" in text, f"{method} {fidelity}"


def test_the_quality_of_the_selection_on_cifar100_in_sfas_text_is_that_of_the_file():
    text = (ROOT / "sfa" / "README.md").read_text()
    for metric in ("last_net1_auc", "last_net1_precision"):
        assert summary("sfa_cifar100_cpu.csv", "SFA", metric, scale=100) in text


@pytest.mark.parametrize(("method", "name"), SFA.items())
def test_the_front_page_shows_sfas_figures(method, name):
    fidelity = "" if method == "CE" else "paper"  # the baseline has no such choice
    figures = [summary("sfa.csv", method, metric, fidelity=fidelity) for metric in ("best", "last", "last10")]
    assert f"| {name} | {' | '.join(figures)} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "sfa/README.md"])
@pytest.mark.parametrize("metric", ["best", "last", "last10"])
def test_the_accuracies_of_sfa_as_released_in_the_texts_are_those_of_the_file(page, metric):
    assert summary("sfa_released.csv", "SFA", metric, fidelity="released") in (ROOT / page).read_text()


def test_afm_beats_cross_entropy_on_digits_by_three_points_with_groups_of_two_and_of_three():
    lines = against(read_results(REFERENCE / "afm.csv"), "CE", ["last"]).lines
    differences = {x.key_b.method: x.difference for x in lines if x.key_b.cell == "digits-sym0.5"}
    assert differences["AFM (K=2)"] >= 3 and differences["AFM (K=3)"] >= 3


def test_the_row_of_every_method_in_afms_text_is_that_of_the_file():
    text, file = (ROOT / "afm" / "README.md").read_text(), "afm.csv"
    rows = read_results(REFERENCE / file)
    assert {row["seed"] for row in rows} == {"1", "2", "3"}
    for cell, method, fidelity in {(row["cell"], row["method"], row["fidelity"]) for row in rows}:
        own = [r for r in rows if (r["cell"], r["method"], r["fidelity"]) == (cell, method, fidelity)]
        metrics = dict.fromkeys(("best", "last", "last10"), 1) | dict.fromkeys(
            ("attention_auc", "attention_peak"), 100
        )
        shown = [
            summary(file, method, metric, scale, fidelity, cell)
            if any(r["metric"] == metric for r in own)
            else ""
            for metric, scale in metrics.items()
        ]
        assert f" | {' | '.join(shown)} |\n" in text, f"{file} {cell} {method} {fidelity}"


@pytest.mark.parametrize(
    ("method", "name"),
    [("CE", "cross-entropy"), ("mixup", "mixup"), ("AFM (K=2)", "AFM, K = 2"), ("AFM (K=3)", "AFM, K = 3")],
)
def test_the_front_page_shows_afms_figures(method, name):
    text = (ROOT / "README.md").read_text()
    metrics = ("best", "last", "last10")
    figures = [summary("afm.csv", method, metric, cell="digits-sym0.5") for metric in metrics]
    assert f"| {name} | {' | '.join(figures)} |" in text


SANM = {
    "SANM(C2D)": "SANM on C2D",
    "SANM(DivideMix)": "SANM on DivideMix",
    "DivideMix": "DivideMix",
    "CE": "cross-entropy",
}
SPLIT = ("last_net1_auc", "last_net1_precision", "last_net1_recall")


def test_sanm_beats_its_base_and_cross_entropy_on_digits_by_the_margins_we_claim():
    rows = read_results(REFERENCE / "sanm.csv")
    last = {
        method: [r["value"] for r in rows if (r["method"], r["metric"]) == (method, "last")]
        for method in SANM
    }
    assert all(len(values) == 3 for values in last.values())
    means = {method: statistics.mean(values) for method, values in last.items()}
    assert min(means["SANM(C2D)"], means["SANM(DivideMix)"]) >= means["CE"] + 5
    assert means["SANM(DivideMix)"] > means["DivideMix"] > means["CE"]


@pytest.mark.parametrize("method", SANM)
def test_the_row_of_every_method_in_sanms_text_is_that_of_the_file(method):
    shown = [summary("sanm.csv", method, metric) for metric in ("best", "last", "last10")]
    front = f"| {SANM[method]} | {' | '.join(shown)} |"
    assert front in (ROOT / "README.md").read_text()
    shown += [summary("sanm.csv", method, metric, 100) if method != "CE" else "" for metric in SPLIT]
    assert f"| {SANM[method]} | {' | '.join(shown)} |" in (ROOT / "sanm" / "README.md").read_text()


def test_the_accuracy_of_pre_training_in_sanms_text_is_that_of_the_file():
    assert (
        f"kNN accuracy {summary('sanm.csv', 'SimCLR', 'last')}" in (ROOT / "sanm" / "README.md").read_text()
    )


MANIFOLD_DIVIDEMIX = {
    "Manifold DivideMix": "Manifold DivideMix",
    "Manifold DivideMix without OOD removal": "without OOD removal",
    "Manifold DivideMix without manifold mixup": "without manifold mixup",
    "CE (pre-trained)": "cross-entropy from the encoder",
    "CE": "cross-entropy",
}
OUTLIERS = ("last_removal_precision", "last_removal_recall")


def test_manifold_dividemix_beats_cross_entropy_on_digits_by_the_margins_we_claim():
    rows = read_results(REFERENCE / "manifold_dividemix.csv")
    last = {
        method: [r["value"] for r in rows if (r["method"], r["metric"]) == (method, "last")]
        for method in MANIFOLD_DIVIDEMIX
    }
    assert all(len(values) == 3 for values in last.values())
    means = {method: statistics.mean(values) for method, values in last.items()}
    assert means["Manifold DivideMix"] >= means["CE"] + 2
    assert means["Manifold DivideMix"] >= means["CE (pre-trained)"] + 2


@pytest.mark.parametrize(
    ("file", "fidelity"),
    [("manifold_dividemix.csv", "paper"), ("manifold_dividemix_released.csv", "released")],
)
def test_the_row_of_every_method_in_manifold_dividemixs_text_is_that_of_the_file(file, fidelity):
    text, front = ((ROOT / page).read_text() for page in ("manifold_dividemix/README.md", "README.md"))
    rows = read_results(REFERENCE / file)
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] != "SimCLR")
    assert methods
    for method in methods:
        name = MANIFOLD_DIVIDEMIX[method] + (", `--fidelity released`" if fidelity == "released" else "")
        shown = [summary(file, method, metric, fidelity=fidelity) for metric in ("best", "last", "last10")]
        if fidelity == "paper":
            assert f"| {name} | {' | '.join(shown)} |" in front, method
        for metric in OUTLIERS:
            known = any((r["method"], r["metric"]) == (method, metric) for r in rows)
            shown.append(summary(file, method, metric, 100, fidelity) if known else "")
        assert f"| {name} | {' | '.join(shown)} |\n" in text, method


def test_what_manifold_dividemixs_text_says_of_the_encoder_is_in_the_file():
    text = (ROOT / "manifold_dividemix" / "README.md").read_text()
    for metric, scale in (("last", 1), ("last_ood_auroc", 100)):
        assert summary("manifold_dividemix.csv", "SimCLR", metric, scale) in text, metric
    first, last = (
        summary("manifold_dividemix.csv", "Manifold DivideMix", f"{which}_ood_auroc", 100)
        for which in ("first", "last")
    )
    assert first in text and last in text


def test_what_manifold_dividemixs_text_says_of_40_epochs_and_of_the_contrastive_loss_is_in_the_files():
    text, method = (ROOT / "manifold_dividemix" / "README.md").read_text(), "Manifold DivideMix"
    for part in ("", " without OOD removal"):
        assert summary("manifold_dividemix_40epochs.csv", method + part, "last") in text, part
    part = " without contrastive loss"
    last = summary("manifold_dividemix_contrastive.csv", method + part, "last_ood_auroc", 100)
    assert f"`--lambda_c 0` it ends at {last}" in text


def test_the_outlier_score_decays_less_without_contrastive_loss_in_every_pair_of_runs():
    for files in (
        ("manifold_dividemix_k10.csv",) * 2,
        ("manifold_dividemix.csv", "manifold_dividemix_contrastive.csv"),
    ):
        last = [
            {
                r["seed"]: r["value"]
                for r in read_results(REFERENCE / file)
                if (r["method"], r["metric"]) == (method, "last_ood_auroc")
            }
            for file, method in zip(
                files, ("Manifold DivideMix", "Manifold DivideMix without contrastive loss"), strict=True
            )
        ]
        assert all(last[1][seed] > last[0][seed] for seed in ("1", "2", "3"))


CROSS = {
    "digits-sym0.2": "symmetric 20 %",
    "digits-sym0.5": "symmetric 50 %",
    "digits-inst0.4": "instance 40 %",
    "digits-margin1-0.4": "margin 40 %",
    "digits-if0.1-imb0.5": "long-tailed (10:1), 50 %",
}
CROSS_METHODS = ("CE", "AFM (K=2)", "SFA", "Me-Momentum", "SANM(DivideMix)", "Manifold DivideMix")


@pytest.mark.parametrize("cell", CROSS)
def test_the_front_page_shows_all_methods_on_the_same_data(cell):
    figures = [summary("cross_digits.csv", method, "last", cell=cell) for method in CROSS_METHODS]
    assert f"| {CROSS[cell]} | {' | '.join(figures)} |" in (ROOT / "README.md").read_text()


def test_what_the_front_page_says_of_all_methods_on_the_same_data_is_in_the_file():
    rows = read_results(REFERENCE / "cross_digits.csv")
    assert {row["seed"] for row in rows} == {"1", "2", "3"} and {row["epochs"] for row in rows} == {"32"}
    lines = {(x.key_b.cell, x.key_b.method): x for x in against(rows, "CE", ["last"]).lines}
    assert len(lines) == len(CROSS) * (len(CROSS_METHODS) - 1)
    splitting = {"SFA", "SANM(DivideMix)", "Manifold DivideMix"}
    for cell, gains in (("digits-inst0.4", (13, 17)), ("digits-margin1-0.4", (8, 13))):
        found = [lines[cell, method].difference for method in splitting]
        assert (round(min(found)), round(max(found))) == gains
    ahead = {
        cell: {method for (of, method), x in lines.items() if of == cell and x.low > 0} for cell in CROSS
    }
    assert ahead["digits-inst0.4"] == ahead["digits-margin1-0.4"] == splitting
    assert ahead["digits-sym0.2"] == {"Me-Momentum", "SANM(DivideMix)"}
    assert ahead["digits-sym0.5"] == ahead["digits-if0.1-imb0.5"] == set()
    tail = {method: x for (cell, method), x in lines.items() if cell == "digits-if0.1-imb0.5"}
    assert {method for method, x in tail.items() if x.high < 0} == {"Me-Momentum"}
    assert round(tail["Me-Momentum"].difference) == -19


ME_MOMENTUM = ("best", "last", "last10", "at_best_validation")
SET = ("confident_precision", "confident_recall", "hard_share")


@pytest.mark.parametrize("cell", ["digits-sym0.4", "digits-inst0.4"])
def test_me_momentum_beats_cross_entropy_on_digits_by_the_margins_we_claim(cell):
    rows = [row for row in read_results(REFERENCE / "me_momentum.csv") if row["cell"] == cell]
    for line in against(rows, "CE", ["last", "at_best_validation"]).lines:
        assert line.a.n == line.b.n == 3
        assert line.difference >= (5 if line.key_b.metric == "last" else 0)


@pytest.mark.parametrize("file", ["me_momentum.csv", "me_momentum_mnist.csv"])
def test_the_row_of_every_run_in_me_momentums_text_is_that_of_the_file(file):
    text = (ROOT / "me_momentum" / "README.md").read_text()
    rows = read_results(REFERENCE / file)
    for cell, method, fidelity in {(row["cell"], row["method"], row["fidelity"]) for row in rows}:
        shown = [summary(file, method, metric, fidelity=fidelity, cell=cell) for metric in ME_MOMENTUM]
        if method == "Me-Momentum":
            shown += [summary(file, method, metric, 100, fidelity, cell) for metric in SET]
        assert f" | {' | '.join(shown)} |" in text, f"{file} {cell} {method} {fidelity}"


@pytest.mark.parametrize(("method", "name"), [("CE", "cross-entropy"), ("Me-Momentum", "Me-Momentum")])
def test_the_front_page_shows_me_momentums_figures(method, name):
    text = (ROOT / "README.md").read_text()
    cells = [
        summary("me_momentum.csv", method, metric, cell=cell)
        for cell in ("digits-sym0.4", "digits-inst0.4")
        for metric in ("last", "at_best_validation")
    ]
    assert f"| {name} | {' | '.join(cells)} |" in text


def test_the_front_page_says_where_mnist_ends():
    text = " ".join((ROOT / "README.md").read_text().split())
    ends = [
        summary("me_momentum_mnist.csv", method, "last", cell=cell)
        for method in ("Me-Momentum", "CE")
        for cell in ("mnist-sym0.2", "mnist-inst0.2")
    ]
    expected = "ends at {} and {}, cross-entropy after 100 epochs at {} and {};".format(*ends)
    assert expected in text


@pytest.mark.parametrize("noise", ["sym", "inst"])
def test_the_log_of_a_run_on_mnist_is_that_of_its_row(noise):
    with (REFERENCE / "logs" / f"me_momentum_mnist_{noise}0.2.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    cell = f"mnist-{noise}0.2"
    for metric, row in {
        "last": log[-1],
        "at_best_validation": [row for row in log if row["new_best"] == "1"][-1],
    }.items():
        shown = summary("me_momentum_mnist.csv", "Me-Momentum", metric, cell=cell)
        assert f"{float(row['test_accuracy']):.2f}" == shown
    trained = summary("me_momentum_mnist.csv", "Me-Momentum", "epochs_trained", cell=cell)
    assert len(log) == float(trained)


def test_as_released_mnists_first_outer_loop_is_the_papers_but_for_the_batch_mean():
    with (REFERENCE / "logs" / "me_momentum_mnist_inst0.2.csv").open(newline="") as file:
        first = [row for row in csv.DictReader(file) if row["outer"] == "1"]
    best = [row for row in first if row["new_best"] == "1"][-1]
    released = summary("me_momentum_mnist.csv", "Me-Momentum", "at_best_validation", fidelity="released")
    assert f"{float(best['test_accuracy_batchmean']):.2f}" == released
    trained = summary("me_momentum_mnist.csv", "Me-Momentum", "epochs_trained", fidelity="released")
    assert len(first) == float(trained)
