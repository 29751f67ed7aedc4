"""``CodeChanges`` on weights whose codes are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octav_hf import OctavConfig, apply_octav
from octav_hf.analysis.code_changes import CodeChanges


class TwoCalls(nn.Module):
    """A layer that is called twice, and one that is not called at all."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(self.used(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_share_of_weights_whose_code_changed(granularity: str, dtype: torch.dtype) -> None:
    options = {"weight_clip": "max", "weight_granularity": granularity, "activation_bits": None, "group_size": 32}
    model = apply_octav(TwoCalls().to(dtype), OctavConfig(**options))
    weight = model.used.weight.data.zero_()
    weight[1] = torch.arange(64) % 8
    weight[:, ::32] = -8  # the largest magnitude of each group, so that the step of 4 bits is 1
    changes, x = CodeChanges(model), torch.ones(1, 64, dtype=dtype)

    def share_after(change: float, count: int) -> dict[str, float]:
        weight[0, 1 : 1 + count] += change
        with changes, torch.no_grad():
            model(x)
        return changes.result()

    assert share_after(0, 0) == {}  # nothing to compare with
    assert share_after(1.0, 6) == {"used": 6 / 64**2}
    assert share_after(0.4, 20) == {"used": 0}
    assert share_after(0.2, 20) == {"used": 20 / 64**2}  # 0.6 and 1.6 are rounded up
    for scale in (0.7, 1.3, 0.9):
        weight *= scale  # and with it the step, so that no code changes
        assert share_after(0, 0) == {"used": 0}
    assert changes.result() == {}  # each change is returned once
