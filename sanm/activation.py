"""Whether activation maps of mislabelled samples are less concentrated: the observation behind the masks."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.gpu.device import Device
from sanm.masking import activation_energy


def concentration(maps: Tensor) -> Tensor:
    """How concentrated the energy of each map [B, D, h, w] is: 0 if spread evenly, 1 if all in one place; float32 [B].

    One minus the entropy of the energy as a distribution over the h w places, in units of its maximum, log(h w). A map
    of zeros, and one of a single place, has 0. This project's statistic: the paper shows maps and names none.
    """
    energy = activation_energy(maps).flatten(1)
    places = energy.shape[1]
    if places == 1:
        return torch.zeros_like(energy[:, 0])
    total = energy.sum(dim=1, keepdim=True)
    distribution = torch.where(total > 0, energy / total.clamp_min(1e-30), 1 / places)
    return (1 - torch.special.entr(distribution).sum(dim=1) / math.log(places)).clamp(0, 1)


@torch.no_grad()
def map_concentrations(network: nn.Module, batches: Iterable, size: int, device: Device) -> Tensor:
    """The concentration of the map of each position 0 .. size - 1 in eval mode, float32 [size]."""
    network.eval()
    values = torch.zeros(size, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            maps = network(images).maps
        values[index] = concentration(maps)
    return values


def concentration_statistics(values: Tensor, right: Tensor | None) -> dict[str, float | None]:
    """map_right and map_wrong: mean concentrations of right and of wrong labels; map_auc: AUC of the concentration against them.

    values [N]; right: bool [N]. map_auc is 0.5 if the two kinds of maps are alike, above if maps of right labels are more
    concentrated. None if one kind is missing, or `right` is unknown.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  (a second of import)

    if right is None:
        return dict.fromkeys(("map_auc", "map_right", "map_wrong"))
    kinds = [values[right], values[~right]]
    means = [float(kind.mean()) if len(kind) else None for kind in kinds]
    both = all(len(kind) for kind in kinds)
    auc = float(roc_auc_score(right.cpu().numpy(), values.cpu().numpy())) if both else None
    return {"map_auc": auc, "map_right": means[0], "map_wrong": means[1]}
