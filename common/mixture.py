"""Two-component Gaussian mixtures of one-dimensional values, one per group, fitted all at once on the device."""

import math

import numpy as np
import torch
from torch import Tensor

TOLERANCE, MAX_ITERATIONS, VARIANCE_FLOOR = 1e-3, 100, 1e-6  # scikit-learn's settings in the releases


def upper_posterior(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Probability that each value belongs to the component with the larger mean, of its own group's mixture.

    values [N], groups int [N] in 0..G-1. Returns float64 [N]. Each group is fitted by itself, as scikit-learn's
    GaussianMixture(2, tol=1e-3, max_iter=100, reg_covar=1e-6) would, but in float64 and from the exact 2-means split in
    place of a random k-means. A group whose values are all equal, one value included, gets 1. ValueError: NaN.
    """
    if values.numel() and not torch.isfinite(values).all():
        raise ValueError("the values of a mixture must be finite")
    padded, mask, order, place = _by_group(values.double(), groups, num_groups)
    spread = padded.masked_fill(~mask, -math.inf).amax(1) - padded.masked_fill(~mask, math.inf).amin(1)
    posterior = _fit(padded, mask)
    posterior = torch.where((spread > 0)[:, None], posterior, 1.0)
    result = torch.empty_like(values, dtype=torch.float64)
    result[order] = posterior[groups[order], place]
    return result


def sklearn_upper_posterior(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The reference path: the same with one scikit-learn fit per group (k-means start, random_state 0, float32)."""
    from sklearn.mixture import GaussianMixture  # noqa: PLC0415  (a second of import for a path rarely taken)

    result = torch.ones(len(values), dtype=torch.float64)
    for group in range(num_groups):
        members = (groups == group).cpu()
        column = values.detach().float().cpu()[members].numpy().reshape(-1, 1)
        if len(column) == 0 or np.ptp(column) == 0:
            continue
        mixture = GaussianMixture(
            2, tol=TOLERANCE, max_iter=MAX_ITERATIONS, reg_covar=VARIANCE_FLOOR, random_state=0
        ).fit(column)
        result[members] = torch.from_numpy(mixture.predict_proba(column)[:, mixture.means_.argmax()]).double()
    return result.to(values.device)


def _by_group(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values as rows of groups, ascending: [G, M] padded with 0, its mask, and where each value went."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    counts = torch.bincount(groups, minlength=num_groups)
    place = torch.arange(len(values), device=values.device) - (counts.cumsum(0) - counts)[groups[order]]
    padded = values.new_zeros(num_groups, max(int(counts.max()), 1) if len(values) else 1)
    padded[groups[order], place] = values[order]
    mask = torch.arange(padded.shape[1], device=values.device) < counts[:, None]
    return padded, mask, order, place


def _fit(x: Tensor, mask: Tensor) -> Tensor:
    """EM on every row of x [G, M] (sorted where mask is True): the posterior of the larger-mean component, [G, M]."""
    upper = _two_means(x, mask)
    responsibility = torch.stack([~upper & mask, upper & mask], dim=2).double()  # [G, M, 2]
    parameters = _maximise(x, mask, responsibility)
    bound = x.new_full((len(x),), -math.inf)
    running = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(MAX_ITERATIONS):
        responsibility, new_bound = _expect(x, mask, *parameters)
        updated = _maximise(x, mask, responsibility)
        parameters = tuple(
            torch.where(running[:, None], new, old) for new, old in zip(updated, parameters, strict=True)
        )
        running = running & ((new_bound - bound).abs() >= TOLERANCE)
        bound = new_bound
        if not running.any():
            break
    responsibility, _ = _expect(x, mask, *parameters)
    larger = parameters[1].argmax(dim=1)
    return responsibility.gather(2, larger[:, None, None].expand(-1, x.shape[1], 1))[:, :, 0]


def _two_means(x: Tensor, mask: Tensor) -> Tensor:
    """The split of each sorted row that minimises the squared distance to the two halves' means: True in the upper half."""
    size = mask.sum(dim=1, keepdim=True)
    below = torch.arange(1, x.shape[1] + 1, device=x.device).expand_as(
        x
    )  # size of the lower half, if cut behind here
    above = size - below
    total = x.sum(dim=1, keepdim=True)
    lower_sum = x.cumsum(dim=1)
    # within-half squares = all squares - (sum of each half)^2 / its size: maximise the latter
    explained = lower_sum**2 / below + (total - lower_sum) ** 2 / above.clamp_min(1)
    cut = explained.masked_fill(above < 1, -math.inf).argmax(dim=1, keepdim=True)
    return torch.arange(x.shape[1], device=x.device) > cut


def _maximise(x: Tensor, mask: Tensor, responsibility: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and variances [G, 2] each, from responsibilities [G, M, 2]."""
    mass = responsibility.sum(dim=1) + 10 * torch.finfo(x.dtype).eps
    mean = (responsibility * x[:, :, None]).sum(dim=1) / mass
    variance = (responsibility * (x[:, :, None] - mean[:, None]) ** 2).sum(dim=1) / mass + VARIANCE_FLOOR
    weight = mass / mask.sum(dim=1, keepdim=True).clamp_min(1)
    return weight / weight.sum(dim=1, keepdim=True), mean, variance


def _expect(x: Tensor, mask: Tensor, weight: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Responsibilities [G, M, 2] (0 where masked) and the mean log-likelihood of each row [G]."""
    log_density = -0.5 * (
        (x[:, :, None] - mean[:, None]) ** 2 / variance[:, None] + (2 * math.pi * variance[:, None]).log()
    )
    joint = log_density + weight.log()[:, None]
    evidence = joint.logsumexp(dim=2, keepdim=True)
    bound = (evidence[:, :, 0] * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
    return (joint - evidence).exp() * mask[:, :, None], bound
