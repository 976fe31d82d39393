"""--limit_train: a seeded subset of the training images, to try things out."""

import numpy as np


def limited(positions: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """The positions [N], or `limit` of them drawn from RandomState(seed), in their order; all for None."""
    if not limit or limit >= len(positions):
        return positions
    return positions[np.sort(np.random.RandomState(seed).permutation(len(positions))[:limit])]
