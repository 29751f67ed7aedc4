"""A model sharded by FSDP2 trains as one that is whole, and its gathered weights give both forms of checkpoints."""

from __future__ import annotations

import torch

from .conftest import Run


def test_it_trains_as_a_whole_model(succeed: Run) -> None:
    config = {"activation_bits": 8, "sync_activation_clips": True}
    (alone,) = succeed("train_sharded", 1, config=config)
    ranks = succeed("train_sharded", 2, config=config)
    losses = torch.stack([rank["losses"] for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(losses, alone["losses"])
    print(losses, alone["losses"])
    for rank in ranks:
        assert rank["clips"].keys() == alone["clips"].keys()
        for name in alone["clips"]:
            torch.testing.assert_close(rank["clips"][name], alone["clips"][name])
    full, empty = (rank["weights"] for rank in ranks)
    assert empty == {}
    assert full.keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(full[name], weight)
