"""--limit_train and --limit_test: seeded subsets."""

import numpy as np


def limited(positions: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """`limit` of the positions [N], drawn from RandomState(seed), in their order; all for None."""
    if not limit or limit >= len(positions):
        return positions
    return positions[np.sort(np.random.RandomState(seed).permutation(len(positions))[:limit])]


def limited_test(labels: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Positions, ascending, of `limit` test images drawn from RandomState(seed), stratified by class; all for None.

    labels: int [N]. Each class keeps its proportion to within one image.
    """
    if not limit or limit >= len(labels):
        return np.arange(len(labels))
    order = np.random.RandomState(seed).permutation(len(labels))
    quantiles = np.empty(len(labels))
    for members in (order[labels[order] == name] for name in np.unique(labels)):
        quantiles[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(quantiles[order], kind="stable")[:limit]])
