"""A packed layer computes the same as the quantized layer; other programs can read its integers and scales."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from octav_hf import OctavConfig, apply_octav
from octav_hf.nn import PackedLayer, PackedWeight, QuantizedLayer

BITS = range(2, 9)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(30, 7), (4, 30)),
    "linear without a bias": (lambda: nn.Linear(9, 5, bias=False), (4, 9)),
    "Conv1D": (lambda: Conv1D(7, 30), (4, 30)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
}
CASES = [
    pytest.param(make, shape, granularity, id=f"{name}, {granularity}")
    for name, (make, shape) in LAYERS.items()
    for granularity in ("channel", "tensor")
]

each_layer = pytest.mark.parametrize(("make", "shape", "granularity"), CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def quantized(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, **fields: object) -> nn.Sequential:
    """A quantized layer in a model, with one row of zeros in its weight."""
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        (layer.weight.t() if isinstance(layer, Conv1D) else layer.weight)[1] = 0
    return apply_octav(nn.Sequential(layer), OctavConfig(**fields)).to(dtype)


def pack(model: nn.Sequential) -> nn.Sequential:
    layer = model[0]
    assert isinstance(layer, QuantizedLayer)
    PackedLayer.pack(layer, PackedWeight.pack(layer.weight_quantizer, layer.weight))
    return model


def random_input(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@each_dtype
@each_layer
def test_the_output_is_the_same_bit_for_bit(
    make: Callable[[], nn.Module], shape: tuple[int, ...], granularity: str, dtype: torch.dtype
) -> None:
    x = random_input(shape, dtype)
    for bits in BITS:
        model = quantized(make, dtype, weight_bits=bits, weight_granularity=granularity)
        expected, weight = model(x), model[0].weight_quantizer(model[0].weight)
        clip = model[0].weight_quantizer.compute_clip(model[0].weight)
        pack(model)
        assert torch.equal(model(x), expected)
        assert torch.equal(model[0].weight, weight)
        assert model[0].weight.stride() == weight.stride()
        assert torch.equal(model[0].weight_quantizer.compute_clip(weight), clip)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)


@pytest.mark.parametrize("bits", BITS)
def test_an_independent_reader_gets_the_weight(bits: int) -> None:
    """Rows of bits, lowest first, two's complement, times the row's scale: in numpy, from the state dict alone."""
    model = quantized(lambda: nn.Linear(30, 7), weight_bits=bits)
    expected = model[0].weight_quantizer(model[0].weight).detach().numpy()
    state = {name: value.numpy() for name, value in pack(model).state_dict().items()}
    rows = np.unpackbits(
        state["0.weight_quantizer.packed_data"].view(np.uint8).reshape(7, -1), axis=1, bitorder="little"
    )
    fields = rows[:, : 30 * bits].reshape(7, 30, bits).astype(np.int64)
    places = 2 ** np.arange(bits)
    places[-1] *= -1
    levels = (fields * places).sum(-1).astype(np.float32)
    np.testing.assert_array_equal(levels * state["0.weight_quantizer.scale"][:, None], expected)
    assert state["0.weight_quantizer.packed_data"].nbytes == 7 * -(-30 * bits // 8)


def test_packed_rows_are_looked_up() -> None:
    for bits in BITS:
        model = quantized(lambda: nn.Embedding(10, 5, padding_idx=1), embedding_bits=bits)
        index = torch.tensor([[0, 3], [9, 1]])
        expected = model(index)
        assert torch.equal(pack(model)(index), expected)


def test_of_a_packed_table_only_the_rows_that_are_looked_up_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pack(quantized(lambda: nn.Embedding(10, 5), embedding_bits=4))
    monkeypatch.setattr(PackedWeight, "dequantize", lambda self: pytest.fail("the whole table was made"))
    assert model(torch.tensor([3, 4])).shape == (2, 5)


def test_the_scale_keeps_its_precision_whatever_the_model_is_moved_to() -> None:
    model = pack(quantized(lambda: nn.Linear(30, 7)))
    scale, weight = model[0].weight_quantizer.scale.clone(), model[0].weight
    moved = model.to(torch.bfloat16)
    assert moved[0].weight.dtype == torch.bfloat16
    assert torch.equal(moved[0].weight, weight.to(torch.bfloat16))
    assert torch.equal(moved[0].weight_quantizer.scale, scale)
    assert torch.equal(model.to(torch.float32)[0].weight, weight)
    assert model.to("meta")[0].weight.is_meta


def test_unpacking_gives_back_a_parameter_in_its_place() -> None:
    model = quantized(lambda: nn.Linear(30, 7), weight_bits=3, weight_gradient_estimator="ste")
    names, before = [name for name, _ in model.named_parameters()], str(model)
    weight = pack(model)[0].weight
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "0.weight_quantizer.guarded_weight"]
    model[0].unpack()
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model[0].weight, weight)
    assert str(model) == before
    model(torch.randn(2, 30)).sum().backward()
    assert model[0].weight.grad is not None


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    model = quantized(lambda: nn.Linear(30, 7))
    with torch.no_grad():
        model[0].weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"0 weight: .*1 NaN"):
        pack(model)
    assert isinstance(model[0].weight, nn.Parameter)
