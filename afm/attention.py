"""Attention of a group's members to each other, and what it mixes them with (Fig. 2; Sec. 4.1 and 4.2)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTERACTIONS = ("sum", "concat", "mul")
ATTENTIONS = ("relu-sigmoid", "sigmoid", "softmax", "complement")
WEIGHTS = ("attentive", "uniform", "random")


class GroupAttention(nn.Module):
    """From the features of a group's K members to their K mixing weights: project, fuse, score, normalise.

    The members are not interchangeable: each position has a projection of its own.
    """

    def __init__(
        self,
        width: int,
        group_size: int = 2,
        *,
        hidden: int | None = None,
        interaction: str = "sum",
        attention: str = "relu-sigmoid",
        attn_hidden: int = 0,
    ):
        """width: D of the features. hidden: H of the projections, by default 3 D / 16 as in the release.

        interaction: how the projected members meet. attention: see `mixing_weights`. attn_hidden: width of a further layer
        before the scores, 0 for none. ValueError: an unknown choice, or complement with more than two members.
        """
        super().__init__()
        if interaction not in INTERACTIONS:
            raise ValueError(f"interaction must be one of {', '.join(INTERACTIONS)}, got {interaction}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention}")
        if attention == "complement" and group_size != 2:
            raise ValueError(f"attention complement is for groups of 2, got {group_size}")
        self.interaction, self.attention = interaction, attention
        hidden = 3 * width // 16 if hidden is None else hidden
        fused = group_size * hidden if interaction == "concat" else hidden
        self.projections = nn.ModuleList(nn.Linear(width, hidden) for _ in range(group_size))
        further = [nn.Linear(fused, attn_hidden), nn.ReLU()] if attn_hidden else []
        outputs = 1 if attention == "complement" else group_size
        self.score = nn.Sequential(*further, nn.Linear(attn_hidden or fused, outputs))

    def scores(self, members: Tensor) -> Tensor:
        """[M, K, D] -> the scores z before ReLU, sigmoid or softmax, [M, K] (complement: [M, 1])."""
        projected = [F.relu(project(members[:, k])) for k, project in enumerate(self.projections)]
        return self.score(fuse(projected, self.interaction))

    def forward(self, members: Tensor) -> Tensor:
        """[M, K, D] -> mixing weights [M, K], rows on the simplex."""
        return mixing_weights(self.scores(members), self.attention)


def fuse(projected: list[Tensor], interaction: str) -> Tensor:
    """K tensors [M, H] to [M, H] (sum, mul) or [M, K H] (concat, position by position)."""
    if interaction == "concat":
        return torch.cat(projected, dim=1)
    stacked = torch.stack(projected)
    return stacked.sum(dim=0) if interaction == "sum" else stacked.prod(dim=0)


def mixing_weights(scores: Tensor, attention: str) -> Tensor:
    """The mixing weights beta = alpha / sum alpha of scores z (Sec. 4.2, steps 3 and 4): [M, K], rows on the simplex.

    attention: alpha is sigmoid(relu(z)) for `relu-sigmoid`, the "FC-FC-R-S" of Figure 2; sigmoid(z) for `sigmoid`; exp(z)
    for `softmax`; and `complement` is the release's, beta = (sigmoid(z), 1 - sigmoid(z)) from the single score of a pair.
    Under relu-sigmoid alpha is in [1/2, 1], so beta is in [1 / (2 K - 1), 2 / (K + 1)]: the least weight is that of an alpha
    of 1/2 beside K - 1 alphas of 1, the greatest that of an alpha of 1 beside K - 1 alphas of 1/2.
    """
    if attention == "complement":
        first = torch.sigmoid(scores)
        return torch.cat([first, 1 - first], dim=1)
    if attention == "softmax":
        return scores.softmax(dim=1)
    # softmax(log alpha) = alpha / sum alpha. It does not divide by a tiny sum where all z are very negative, and it has a
    # gradient where sigmoid(z) rounds to 1.
    return F.logsigmoid(scores.relu() if attention == "relu-sigmoid" else scores).softmax(dim=1)


def drawn_weights(groups: int, group_size: int, kind: str, alpha: float, rng: np.random.Generator) -> Tensor:
    """Mixing weights without attention (ablation, Sec. 4.2, step 8): float32 [M, K], rows on the simplex.

    uniform: 1 / K. random: symmetric Dirichlet(alpha), which is mixup's Beta(alpha, alpha) for K = 2, drawn per group.
    """
    if kind == "uniform":
        return torch.full((groups, group_size), 1 / group_size)
    return torch.from_numpy(rng.dirichlet(np.full(group_size, alpha), size=groups)).float()


def mix(members: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of each group's members: [M, K, ...] and [M, K] -> [M, ...] (step 5)."""
    return torch.einsum("mk...,mk->m...", members, weights)
