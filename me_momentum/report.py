"""What a finished run reports: the test accuracy of the best epoch on validation, and its confident sets."""

from argparse import Namespace

from me_momentum.confident import SET_COLUMNS, set_growth


def summary(rows: list[dict], metric: str, args: Namespace) -> dict[str, float | None]:
    """The test accuracy to report (README, section 7), and what the last confident set was like.

    at_best_validation: the test accuracy of the fine-tuning epoch that is best on the noisy validation part, the first of
    equals. If no such epoch beat early stopping, the release reports 0, and --fidelity paper the best early-stopped epoch.
    """
    best_of_run = [row for row in rows if row["new_best"]][-1:]
    if best_of_run or args.fidelity == "paper" or args.selection == "none":
        best_kept = max(rows, key=lambda row: (row["kept"], row["validation_accuracy"]))
        [epoch] = best_of_run or [best_kept]
        test, validation = epoch[metric], epoch["validation_accuracy"]
    else:
        test, validation = 0.0, 0.0
    rounds = {(row["outer"], row["round"]): row for row in rows if row["round"]}
    sets = [
        (row["confident_share"], row["confident_precision"])
        for row in rounds.values()
        if row["confident_share"] is not None
    ]
    return {
        "at_best_validation": test,
        "best_validation": validation,
        "epochs_trained": len(rows),
        "rounds": len(rounds),
        **{name: rows[-1][name] for name in SET_COLUMNS},
        **set_growth(sets),
    }


def clothing_summary(rows: list[dict], metric: str) -> dict[str, float | None]:
    """The test accuracy `metric` of the epoch that is best on the clean validation images, the first of equals."""
    best_epoch = max(rows, key=lambda row: row["validation_accuracy"])
    last = {name: rows[-1][name] for name in ("confident_size", "confident_share")}
    return {
        "at_best_validation": best_epoch[metric],
        "best_validation": best_epoch["validation_accuracy"],
        **last,
    }
