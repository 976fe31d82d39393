"""Attention of a group's members to each other: their mixing weights (Figure 2; README, section 4, steps 2 to 4)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm.choices import ATTENTIONS, INTERACTIONS


class GroupAttention(nn.Module):
    """The K mixing weights of a group's K members, from their features: project, fuse, score, normalise.

    Each position in the group has its own projection, so the order of the members matters.
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

        interaction: how the projected members are fused. attention: see `mixing_weights`. attn_hidden: width of one more
        layer before the scores, 0 for none. ValueError: an unknown choice, or complement with more than two members.
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
    """The mixing weights beta = alpha / sum alpha of scores z (README, section 4, steps 3 and 4): [M, K], rows on the simplex.

    attention: alpha is sigmoid(relu(z)) for `relu-sigmoid`, the "FC-FC-R-S" of Figure 2; sigmoid(z) for `sigmoid`; exp(z)
    for `softmax`. `complement` is the release's: beta = (sigmoid(z), 1 - sigmoid(z)) from the single score of a pair.
    Under relu-sigmoid alpha is in [1/2, 1], so beta is in [1 / (2 K - 1), 2 / (K + 1)].
    """
    if attention == "complement":
        first = torch.sigmoid(scores)
        return torch.cat([first, 1 - first], dim=1)
    if attention == "softmax":
        return scores.softmax(dim=1)
    # softmax(log alpha) = alpha / sum alpha, without dividing by a tiny sum where all z are very negative, and with a
    # gradient where sigmoid(z) rounds to 1
    return F.logsigmoid(scores.relu() if attention == "relu-sigmoid" else scores).softmax(dim=1)


def ablation_weights(
    groups: int, group_size: int, kind: str, alpha: float, rng: np.random.Generator
) -> Tensor:
    """Mixing weights without attention (README, section 4, step 8): float32 [M, K], rows on the simplex.

    kind: `uniform`, 1 / K each; `random`, per group from a symmetric Dirichlet(alpha), for K = 2 mixup's Beta(alpha, alpha).
    """
    if kind == "uniform":
        return torch.full((groups, group_size), 1 / group_size)
    return torch.from_numpy(rng.dirichlet(np.full(group_size, alpha), size=groups)).float()
