"""Flags that both training scripts of SANM have: how images are masked."""

from argparse import Namespace

from common.runs import cli
from sanm.masking import MaskRule


def add_mask_flags(parser: cli.Parser, rule: MaskRule, recon_weight: float):
    """The flags of masking and reconstruction, with the defaults of a rule: the group that they are in."""
    group = parser.add_argument_group("adversarial noisy masking")
    group.add_argument(
        "--masking",
        choices=["adversarial", "none"],
        default="adversarial",
        help="none: the base alone, without masks, modulated labels and reconstruction",
    )
    group.add_argument("--mask-lo", type=cli.fraction, default=rule.low, help="smallest base ratio of a mask")
    group.add_argument("--mask-hi", type=cli.fraction, default=rule.high, help="largest base ratio of a mask")
    group.add_argument(
        "--mask-quality",
        type=cli.fraction,
        default=rule.quality,
        help="times (1 - clean probability) is added to the ratio",
    )
    group.add_argument(
        "--mask-anchor",
        choices=["corner", "centre"],
        help="what of the rectangle stands at the extremum of the activation; by default centre (the paper's Eq. 4), under "
        "--fidelity released corner",
    )
    group.add_argument("--clamp-targets", action="store_true", help="keep modulated targets above zero")
    group.add_argument(
        "--recon-weight",
        type=cli.non_negative,
        default=recon_weight,
        help="weight of the reconstruction error",
    )
    return group


def settle_mask_flags(parser: cli.Parser, args: Namespace) -> None:
    """Settle the anchor by the fidelity; end with a message if the smallest ratio is above the largest."""
    if args.mask_lo > args.mask_hi:
        parser.error(f"argument --mask-lo: must be at most --mask-hi {args.mask_hi}, got {args.mask_lo}")
    if args.mask_anchor is None:
        args.mask_anchor = "corner" if args.fidelity == "released" else "centre"


def mask_rule(args: Namespace) -> MaskRule:
    """The rule that the flags describe."""
    return MaskRule(args.mask_lo, args.mask_hi, args.mask_quality, args.mask_anchor, args.clamp_targets)
