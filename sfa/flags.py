"""Flags that both training scripts of SFA have: how samples are selected."""

from common.runs import cli


def add_averaging_flags(group, beta: float, min_draw_count: int | None, classes_drawn: str = "") -> None:
    """The flags of stochastic feature averaging [Sec. 6], to an argument group, with the defaults that the scripts differ in.

    classes_drawn: behind the help of --min_draw_count, where its default depends on other flags.
    """
    group.add_argument(
        "--p_threshold",
        type=cli.fraction,
        default=0.5,
        help="clean probability above which a sample is selected",
    )
    group.add_argument(
        "--beta", type=cli.fraction, default=beta, help="smoothing factor of the running moments"
    )
    group.add_argument(
        "--phi", type=cli.positive, default=1.005, help="growth of the confidence threshold per epoch"
    )
    group.add_argument("--sample_rate", type=cli.count, default=1, help="Gaussian draws per class and epoch")
    group.add_argument(
        "--min_draw_count",
        type=cli.count_or_zero,
        default=min_draw_count,
        help=f"classes with more confident samples are drawn; 0: all{classes_drawn}",
    )
    group.add_argument(
        "--ema_mode",
        choices=["persist", "released"],
        help="whether the running moments outlive the epoch; by default released under --fidelity released",
    )
