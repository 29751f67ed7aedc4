"""A quantized embedding against a look-up in the float64 quantized table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from octav_hf import OctavConfig, apply_octav
from octav_hf.nn import FakeQuantize, QuantizedEmbedding
from tests import twins

BITS = 4


def quantized(embedding: nn.Embedding) -> nn.Embedding:
    QuantizedEmbedding.convert(embedding, {"weight": FakeQuantize(BITS, dim=QuantizedEmbedding.clip_dim)})
    return embedding


def test_rows_and_gradients_are_those_of_the_quantized_table() -> None:
    """Token 5 occurs twice, token 2 is padding, the row of token 0 is zero, and token 7 is not looked up."""
    torch.manual_seed(0)
    layer = nn.Embedding(8, 12, padding_idx=2)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[2] = torch.randn(12)
    ids = torch.tensor([[5, 2, 0, 1], [3, 5, 4, 6]])
    y = quantized(layer)(ids)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * grad).sum().backward()

    table = twins.as_float64(layer.weight)
    clips = np.array([[twins.octav_clip_twin(row, BITS)] for row in table])
    assert twins.midpoint_distance_twin(table, clips, BITS).min() > 1e-4
    np.testing.assert_allclose(twins.as_float64(y), twins.quantize_twin(table, clips, BITS)[ids.numpy()], rtol=1e-5)
    expected = np.zeros_like(table)
    for token, row in zip(ids.flatten().tolist(), twins.as_float64(grad).reshape(-1, 12), strict=True):
        expected[token] += row
    expected[2] = 0
    expected *= twins.gradient_twin(table, clips, True, "mad")
    np.testing.assert_allclose(twins.as_float64(layer.weight.grad), expected, rtol=1e-4, atol=1e-6)
    assert (twins.gradient_twin(table, clips, True, "mad") < 1).any()


def test_sparse_gradients_stay_sparse() -> None:
    torch.manual_seed(0)
    dense = nn.Embedding(9, 8)
    sparse = nn.Embedding(9, 8, sparse=True, _weight=dense.weight.detach().clone())
    ids = torch.tensor([1, 4, 4])
    for layer in (dense, sparse):
        quantized(layer)(ids).square().sum().backward()
    assert sparse.weight.grad.is_sparse
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_max_norm_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(4, 3, max_norm=1.0), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"0: Embedding with weight of shape \(4, 3\).*max_norm=1.0.*exclude_modules"):
        apply_octav(net, OctavConfig(embedding_bits=8))
    assert type(net[1]) is nn.Linear
    apply_octav(net, OctavConfig())


def test_one_clip_for_a_table_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    config = {"embedding_bits": 8, "weight_granularity": "tensor"}
    with pytest.raises(
        ValueError,
        match=r"0: the weight of Embedding has one clip per channel \(row\).*'weight_granularity': 'channel'",
    ):
        apply_octav(net, OctavConfig(**config))
    apply_octav(net, OctavConfig(**config, module_overrides={"0": {"weight_granularity": "channel"}}))
    assert isinstance(net[0], QuantizedEmbedding)
    assert net[1].weight_quantizer.dim is None


def test_a_subclass_is_refused() -> None:
    class Scaled(nn.Embedding):
        pass

    with pytest.raises(ValueError, match="0: Scaled with weight of shape .* subclass of nn.Embedding"):
        apply_octav(nn.Sequential(Scaled(4, 3), nn.Linear(3, 2)), OctavConfig(embedding_bits=8))
