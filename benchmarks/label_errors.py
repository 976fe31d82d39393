"""How well the scores in label_quality.csv find the wrong labels, for runs whose true labels are known.

    python -m benchmarks.label_errors results/runs/sfa/embedded/*/*/seed*
    python -m benchmarks.label_errors RUN [RUN ...] [--csv OUT.csv] [--markdown OUT.md]
    python -m benchmarks.label_errors RUN --cleanlab            # beside it cleanlab's ranking (benchmarks/cross_validation.py)
    python -m benchmarks.label_errors RUN ... --results results/cross_digits.csv        # named as benchmarks.cross names them

Images are ranked by their score, the lowest first; wrong labels are to stand in front. k is the number of wrong labels. An
image of no class (true label -1) has a wrong label. Among equal scores every order counts alike. The rows of --csv have the
columns of all results, with the time and the command of the training run; the values are shares, from 0 to 1. With --results
these columns come from the row with the same command: benchmarks.cross knows the noise and the time of pre-training.

label_error_auroc                area under the ROC curve
label_error_average_precision    area under the curve of precision over recall
label_error_precision_at_k       share of wrong labels among the k lowest scores; equals the recall there
label_error_recall_class_C       share of the wrong labels with given label C that are among these k
label_error_calibration          expected calibration error of the score as the probability that the label is right: 15 bins
label_error_rate                 share of wrong labels
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.label_errors", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of finished runs")
    parser.add_argument("--csv", metavar="OUT.csv", help="write the result rows to this file")
    named = (
        "result rows of these runs, such as cross_digits.csv of benchmarks.cross: the columns come from there"
    )
    parser.add_argument("--results", metavar="FILE.csv", help=named)
    parser.add_argument("--markdown", metavar="OUT.md", help="write the printed table to this file")
    peer = "also rank by cleanlab (an optional extra), from cross-entropy out of fold, in RUN/cleanlab; trains five times; "
    peer += "of runs with the same labels and seed for the first alone"
    parser.add_argument("--cleanlab", action="store_true", help=peer)
    parser.add_argument(
        "--data_path", metavar="DIR", help="of --cleanlab: the data sets; by default as in RUN"
    )
    parser.add_argument("--device", choices=cli.DEVICES, default="auto", help="of --cleanlab: where to train")
    return parser


cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.cross_validation import cleanlab_folder, first_of_labels
from benchmarks.results import CONDITION, KEY, figure, keyed, markdown_table, read_results, write_text
from common.runs.cli import UserError
from common.runs.label_quality import COLUMNS, NAME
from common.runs.results import COLUMNS as RESULT_COLUMNS
from common.runs.results import to_csv

BINS = 15  # of the calibration error
# columns of cleanlab's rows that are not those of the run
OF_PEER = (
    *("method", "seconds", "images_per_second", "peak_memory_mb"),
    *("device", "precision", "torch", "git", "command"),
)
SHOWN = {
    "label_error_rate": "wrong labels",
    "label_error_auroc": "AUROC",
    "label_error_average_precision": "average precision",
    "label_error_precision_at_k": "precision at k",
    "label_error_calibration": "calibration error",
}


def read_quality(folder: Path) -> pd.DataFrame:
    """The images of a run with true label and score, as in its label_quality.csv. UserError: there is no ranking to measure."""
    path = folder / NAME
    try:
        found = pd.read_csv(path)
    except FileNotFoundError:
        remedy = "give run directories, and start the command of an older run again, which then writes it"
        raise UserError(f"{folder}: no {NAME} in it: {remedy}") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}): remove it and start the run again") from None
    if tuple(found) != COLUMNS:
        raise UserError(f"{path}: its columns are not {', '.join(COLUMNS)}: give a file of a training script")
    if found.true_label.isna().all():
        raise UserError(f"{folder}: the true labels are unknown: give runs on data with known label noise")
    found = found[found.true_label.notna() & found.score.notna()]
    wrong = found.given_label != found.true_label
    if wrong.all() or not wrong.any():
        raise UserError(
            f"{folder}: {wrong.sum()} of {len(wrong)} labels are wrong: give a run with right and wrong ones"
        )
    return found


def measure(given: np.ndarray, wrong: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Metrics of a ranking, by name; all inputs [N]: given labels, whether they are wrong, scores in [0, 1]."""
    front = among_lowest(score, int(wrong.sum()))
    found = {
        "label_error_rate": wrong.mean(),
        "label_error_auroc": roc_auc_score(wrong, -score),
        "label_error_average_precision": average_precision_score(wrong, -score),
        "label_error_precision_at_k": front[wrong].mean(),
        "label_error_calibration": calibration_error(score, ~wrong),
    }
    found |= {
        f"label_error_recall_class_{c}": front[wrong & (given == c)].mean() for c in np.unique(given[wrong])
    }
    return {name: float(value) for name, value in found.items()}


def among_lowest(score: np.ndarray, count: int) -> np.ndarray:
    """The probability of each sample to be among the `count` lowest scores, [N], in a random order of equal scores."""
    border = np.sort(score)[count - 1]
    below, equal = score < border, score == border
    return np.where(equal, (count - below.sum()) / equal.sum(), below)


def calibration_error(score: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: the mean over samples of |mean score - share of right labels| of their bin of the score."""
    bins = np.minimum((score * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, score - right)).sum() / len(score))


def own_row(folder: Path, described: dict[str, dict] | None) -> dict:
    """The columns of a run's result rows, from its result.csv or from --results. UserError: there is none.

    described: the rows of --results by command; None without it.
    """
    if not (folder / "result.csv").is_file():
        raise UserError(f"{folder}: no result.csv in it: let the run come to its end")
    own = read_results(folder / "result.csv").iloc[0].to_dict()
    if described is not None:
        if own["command"] not in described:
            raise UserError(f"--results: no row has the command of {folder}: give the results of this run")
        own = described[own["command"]]
    return own | {"reported": "", "delta": ""}


def rows_of(quality: pd.DataFrame, own: dict) -> list[dict]:
    """Result rows with the metrics of a ranking, as `read_quality` gives it. own: their other columns."""
    wrong = (quality.given_label != quality.true_label).to_numpy()
    found = measure(quality.given_label.to_numpy(), wrong, quality.score.to_numpy())
    return [{**own, "metric": name, "value": value} for name, value in found.items()]


def format_table(rows: Sequence[dict]) -> list[str]:
    """Lines of a Markdown table: in percent, mean and standard deviation over seeds, cell by cell. UserError: a run is given
    twice.
    """
    frame = keyed(pd.DataFrame(rows), "the runs").assign(value=[100 * row["value"] for row in rows])
    cells = {cell: place for place, cell in enumerate(frame["cell"].unique())}
    frame = frame.sort_values("cell", key=lambda column: column.map(cells), kind="stable")
    groups = [name for name in (*KEY, *CONDITION) if name != "metric"]
    lines = []
    for _, own in frame.groupby(groups, sort=False):
        first = own.iloc[0]
        words = [first["paper"], first["method"], first["cell"], str(own["seed"].nunique())]
        figures = [figure(own.loc[own["metric"] == name, "value"]) for name in SHOWN]
        seconds = figure(own.drop_duplicates("seed")["seconds"].astype(float))
        lines.append([text.replace("|", "&#124;") for text in words] + [*figures, seconds])
    return markdown_table(["paper", "method", "cell", "seeds", *SHOWN.values(), "seconds of training"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rankings of runs, print a table, write result rows."""
    args = make_parser().parse_args(argv)
    described = None
    if args.results is not None:
        described = {row["command"]: row for row in read_results(args.results).to_dict("records")}
    runs = list(map(Path, args.runs))
    rows = [row for run in runs for row in rows_of(read_quality(run), own_row(run, described))]
    for run in first_of_labels(runs) if args.cleanlab else ():
        folder = cleanlab_folder(run, read_quality(run), args.data_path, args.device)
        of_run, own = own_row(run, described), own_row(folder, None)
        rows += rows_of(read_quality(folder), of_run | {name: own[name] for name in OF_PEER})
    table = "\n".join(format_table(rows))
    if args.csv is not None:
        write_text(to_csv(rows, RESULT_COLUMNS), args.csv, "--csv")
    if args.markdown is not None:
        write_text(table + "\n", args.markdown, "--markdown")
    print(f"in percent; k: the number of wrong labels\n\n{table}")


if __name__ == "__main__":
    cli.exit_cleanly(main)
