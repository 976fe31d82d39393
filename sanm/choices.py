"""What the flags of the three scripts choose between. No torch here: `--help` needs none."""

from typing import NamedTuple

BASES = ("dividemix", "c2d")
ARCHS = ("auto", "narrow")
HISTORY = 5  # loss vectors that the 90 % rule averages


class MaskRule(NamedTuple):
    """Size of the rectangles, as ratios of the image's area, and their place."""

    low: float = 0.02  # a base ratio is drawn between low and high
    high: float = 0.07
    quality: float = 0.03  # times (1 - clean probability) is added to it
    anchor: str = "centre"  # the rectangle's point at the extremum: its centre, or its top-left "corner" (released code)
    clamp: bool = False  # whether modulated targets are kept above zero
    as_released: bool = False  # Clothing1M: with the defects of the release (README, table of differences)


CLOTHING_RULE = MaskRule(low=0.06, high=0.13, quality=0.1)


def averages_history(noise_rate: float, released: bool) -> bool:
    """The 90 % rule: whether the mixture is fitted to the mean of the last HISTORY loss vectors.

    It holds from a noise rate of 0.9 on; in the release for 0.9 exactly.
    """
    return noise_rate == 0.9 if released else noise_rate >= 0.9
