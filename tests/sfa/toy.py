"""The small network of the golden training cases: linear, batch norm, ReLU, two linear heads."""

import torch
import torch.nn.functional as F
from torch import nn

from sfa.networks import TwoHeads


class Toy(nn.Module):
    """Maps [B, I] to (features [B, H], standard logits, balanced logits); its state comes from a golden case."""

    def __init__(self, case, prefix: str):
        super().__init__()
        state = {name: torch.from_numpy(case[f"{prefix}_{name}"].copy()) for name in self.names()}
        hidden, inputs = state["fc_weight"].shape
        self.fc, self.norm = nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden)
        self.heads = TwoHeads(hidden, len(state["standard_head_bias"]))
        with torch.no_grad():
            for name, tensor in self.named().items():
                tensor.copy_(state[name])

    @staticmethod
    def names() -> list[str]:
        norm = ["bn_scale", "bn_shift", "bn_running_mean", "bn_running_var"]
        heads = [f"{head}_head_{kind}" for head in ("standard", "balanced") for kind in ("weight", "bias")]
        return ["fc_weight", "fc_bias", *norm, *heads]

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of the golden cases."""
        norm = [self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var]
        heads = [t for head in (self.heads.standard, self.heads.balanced) for t in (head.weight, head.bias)]
        return dict(zip(self.names(), [self.fc.weight, self.fc.bias, *norm, *heads], strict=True))

    def forward(self, x):
        return self.heads(F.relu(self.norm(self.fc(x))))

    def assert_equals(self, case, prefix: str, tolerance: float):
        for name, tensor in self.named().items():
            both, msg = (tensor.detach(), torch.from_numpy(case[f"{prefix}_{name}"])), f"{case.name} {name}"
            torch.testing.assert_close(*both, atol=tolerance, rtol=tolerance, msg=msg)
