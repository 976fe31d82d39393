"""Two-component Gaussian mixtures of one-dimensional values: one per group, fitted together on the device; or one for all."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from common.gpu import device as gpu

TOLERANCE, MAX_ITERATIONS, VARIANCE_FLOOR = 1e-3, 100, 1e-6  # scikit-learn's settings in the releases


def upper_posterior(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Probability that each value belongs to the component with the larger mean of its group's mixture.

    values [N], groups int [N] in 0..G-1. Returns float64 [N]. Each group is fitted separately, as by scikit-learn's
    GaussianMixture(2, tol=1e-3, max_iter=100, reg_covar=1e-6, random_state=0) with its k-means start, but in float64. A group
    of equal values, or of one value, gets 1. ValueError: NaN.
    """
    if values.numel() and not torch.isfinite(values).all():
        raise ValueError("the values of a mixture must be finite")
    padded, mask, place = _by_group(values.double(), groups, num_groups)
    spread = padded.masked_fill(~mask, -math.inf).amax(1) - padded.masked_fill(~mask, math.inf).amin(1)
    posterior = torch.where((spread > 0)[:, None], _fit(padded, mask), 1.0)
    return posterior[groups, place]


def sklearn_upper_posterior(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The reference: the same with one scikit-learn fit per group (k-means start, random_state 0, float32)."""
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


def lower_posterior(values: Tensor, seed: int, max_iterations: int = 10) -> Tensor:
    """Probability that each value belongs to the component with the smaller mean of one mixture: float64 [N]; float32 on MPS.

    DivideMix's mixture of losses: scikit-learn's, with tol=1e-2 and reg_covar=5e-4, in float32, stopped after max_iterations
    whether it has converged or not. seed: of its k-means start. values [N], finite. ValueError: NaN or infinity.
    """
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415
    from sklearn.mixture import GaussianMixture  # noqa: PLC0415

    column = values.detach().float().cpu().numpy().reshape(-1, 1)
    if not np.isfinite(column).all():
        raise ValueError("the values of a mixture must be finite")
    mixture = GaussianMixture(2, max_iter=max_iterations, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with warnings.catch_warnings():
        # the methods use this number of iterations
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = mixture.fit(column).predict_proba(column)
    lower = posterior[:, np.argmin(mixture.means_)].astype(np.float64)
    return gpu.put(torch.from_numpy(lower), values.device)


def _by_group(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values as rows of groups, in their order: [G, M] padded with 0, its mask, and each value's place in its row [N]."""
    counts = torch.bincount(groups, minlength=num_groups)
    order = torch.argsort(groups, stable=True)
    place = torch.empty_like(groups)
    place[order] = (
        torch.arange(len(values), device=values.device) - (counts.cumsum(0) - counts)[groups[order]]
    )
    padded = values.new_zeros(num_groups, max(int(counts.max()), 1) if len(values) else 1)
    padded[groups, place] = values
    mask = torch.arange(padded.shape[1], device=values.device) < counts[:, None]
    return padded, mask, place


def _fit(x: Tensor, mask: Tensor) -> Tensor:
    """EM on every row of x [G, M]: the posterior of the larger-mean component, [G, M]."""
    second = _two_means(x, mask)
    responsibility = torch.stack([~second & mask, second & mask], dim=2).double()  # [G, M, 2]
    parameters = _maximise(x, mask, responsibility)
    bound = x.new_full((len(x),), -math.inf)
    running = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(MAX_ITERATIONS):
        responsibility, new_bound = _expect(x, mask, *parameters)
        updated = _maximise(x, mask, responsibility)
        weight, mean, variance = (
            torch.where(running[:, None], new, old) for new, old in zip(updated, parameters, strict=True)
        )
        parameters = weight, mean, variance
        running = running & ((new_bound - bound).abs() >= TOLERANCE)
        bound = new_bound
        if not running.any():
            break
    responsibility, _ = _expect(x, mask, *parameters)
    larger = parameters[1].argmax(dim=1)
    return responsibility.gather(2, larger[:, None, None].expand(-1, x.shape[1], 1))[:, :, 0]


def _two_means(x: Tensor, mask: Tensor) -> Tensor:
    """Two-means of each row of x [G, M] as scikit-learn starts and stops it: True for the members of the second cluster."""
    centres = _seed_centres(x, mask)
    size = mask.sum(dim=1).clamp_min(1)
    deviation = (x - (x.sum(dim=1) / size)[:, None]) * mask
    tolerance = 1e-4 * (deviation**2).sum(dim=1) / size
    running = torch.ones(len(x), dtype=torch.bool, device=x.device)
    second = _nearer_second(x, centres) & mask
    for _ in range(300):
        members = torch.stack([~second & mask, second], dim=2).to(x.dtype)
        moved = (members * x[:, :, None]).sum(dim=1) / members.sum(dim=1).clamp_min(1)
        shift = ((moved - centres) ** 2).sum(dim=1)
        centres = torch.where(running[:, None], moved, centres)
        updated = torch.where(running[:, None], _nearer_second(x, centres) & mask, second)
        running = running & (shift > tolerance) & (updated != second).any(dim=1)
        second = updated
        if not running.any():
            break
    return second


def _seed_centres(x: Tensor, mask: Tensor) -> Tensor:
    """k-means++ centres [G, 2] with the three uniforms that random_state 0 gives.

    The first centre is a random value; the second the better of two, drawn by their squared distance from the first.
    """
    first_draw, *candidate_draws = np.random.RandomState(0).random_sample(3)
    first = (first_draw * mask.sum(dim=1)).long()
    first = x.gather(1, first[:, None])
    squares = (x - first) ** 2 * mask
    draws = torch.tensor(candidate_draws, dtype=x.dtype, device=x.device) * squares.sum(dim=1, keepdim=True)
    places = torch.searchsorted(squares.cumsum(dim=1), draws).clamp_max(x.shape[1] - 1)
    candidates = x.gather(1, places)  # [G, 2]
    remaining = (
        torch.minimum((x[:, :, None] - candidates[:, None]) ** 2, squares[:, :, None]) * mask[:, :, None]
    )
    better = remaining.sum(dim=1).argmin(dim=1, keepdim=True)
    return torch.cat([first, candidates.gather(1, better)], dim=1)


def _nearer_second(x: Tensor, centres: Tensor) -> Tensor:
    return (x - centres[:, 1:]).abs() < (x - centres[:, :1]).abs()


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
