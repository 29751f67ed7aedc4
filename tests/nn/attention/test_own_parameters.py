"""Own parameters of an attention module are refused as operands in every form; those of its layers are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_hf.nn import ATTENTION_OPERANDS, FakeQuantize, QuantizedAttention, QuantizedLinear

Tensor = torch.Tensor


class LowRank(nn.Module):
    """A matmul of two parameters in a module with its own forward, as in some adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ParameterDict({"left": torch.randn(8, 2), "right": torch.randn(2, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.factors["left"] @ self.factors["right"])


class Attention(nn.Module):
    """Single-head attention on the result of ``multiply`` for this module and its input."""

    def __init__(self, multiply: Callable[[Attention, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.multiply = multiply
        self.qkv, self.bias = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(8))
        self.kernel = nn.Parameter(torch.randn(8, 6, 3))
        self.listed = nn.ParameterList([torch.randn(8, 8)])
        self.nested = nn.ModuleList([nn.ParameterDict({"w": torch.randn(8, 8)})])
        self.table = nn.Parameter(torch.randn(5, 8))
        self.linear, self.transposed = nn.Linear(8, 8), nn.ConvTranspose1d(6, 6, 3)
        self.quantized, self.low_rank = nn.Linear(8, 8), LowRank()
        QuantizedLinear.convert(self.quantized, {"weight": FakeQuantize(4, dim=(1,)), "input": FakeQuantize(4)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(self, x).to(x.dtype)[..., :8]
        return (x @ x.mT).softmax(-1) @ x + y.mean()


def quantizers() -> nn.ModuleDict:
    return nn.ModuleDict({name: FakeQuantize(4, signed=name != "probabilities") for name in ATTENTION_OPERANDS})


def inputs() -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))


def autocast(module: Attention, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ module.qkv.T


REFUSED: dict[str, Callable[[Attention, Tensor], Tensor]] = {
    "itself": lambda m, x: x @ m.listed[0],
    "transposed": lambda m, x: x @ m.qkv.T,
    "slice": lambda m, x: x @ m.qkv[:8].mT,
    "chunk": lambda m, x: x @ m.qkv.chunk(3)[1],
    "data": lambda m, x: x @ m.qkv.data.t(),
    "detached": lambda m, x: x @ m.qkv.detach().t(),
    "expanded": lambda m, x: x @ m.qkv.T.expand(2, 8, 24),
    "cast": lambda m, x: x.bfloat16() @ m.qkv.to(torch.bfloat16).T,
    "cast by name": lambda m, x: x.double() @ m.qkv.double().T,
    "contiguous": lambda m, x: x @ m.qkv.T.contiguous(),
    "clone of a clone": lambda m, x: x @ m.qkv[:8].clone().T.clone(),
    "joined": lambda m, x: x @ torch.cat([m.qkv, m.listed[0]]).T,
    "scaled": lambda m, x: x @ (m.qkv * 0.5).T,
    "padded": lambda m, x: x @ F.pad(m.qkv, (0, 0, 0, 1)).T,
    "linear": lambda m, x: F.linear(x, m.qkv),
    "linear by keyword": lambda m, x: F.linear(input=x, weight=m.qkv[:8].contiguous(), bias=m.bias),
    "addmm": lambda m, x: torch.addmm(m.bias, x[0], m.qkv[:8].T),
    "einsum": lambda m, x: torch.einsum("bsd,ed->bse", x, m.qkv),
    "reflected": lambda m, x: m.qkv.T.__rmatmul__(x),
    "convolution": lambda m, x: F.conv1d(x, m.kernel),
    "transposed convolution": lambda m, x: F.conv_transpose1d(x, m.kernel[:6]),
    "query": lambda m, x: F.scaled_dot_product_attention(m.listed[0].expand(2, 8, 8), x, x),
    "value by keyword": lambda m, x: F.scaled_dot_product_attention(x, key=x, value=m.qkv[:6].expand(2, 6, 8)),
    "container": lambda m, x: x @ m.nested[0]["w"].T,
    "autocast": autocast,
}


@pytest.mark.parametrize("multiply", REFUSED.values(), ids=REFUSED)
def test_own_parameters_are_refused(multiply: Callable[[Attention, Tensor], Tensor]) -> None:
    module = Attention(multiply)
    module(inputs())
    QuantizedAttention.convert(module, quantizers(), "encoder.self")
    remedy = r"module_overrides=\{'encoder.self': \{'quantize_attention': False\}\}"
    with pytest.raises(NotImplementedError, match=rf"^encoder.self: .*its own parameter of shape \(.*{remedy}"):
        module(inputs())


GOES_ON: dict[str, Callable[[Attention, Tensor], Tensor]] = {
    "a float layer": lambda m, x: m.linear(x),
    "a quantized layer": lambda m, x: m.quantized(x),
    "a layer of another kind": lambda m, x: m.transposed(x),
    "a module inside": lambda m, x: m.low_rank(x),
    "a layer's weight": lambda m, x: x @ m.linear.weight,
    "a view of a layer's weight": lambda m, x: x @ m.linear.weight.T[:, :4],
    "a layer's data": lambda m, x: x @ m.linear.weight.data.T,
    "a layer of an own parameter": lambda m, x: m.quantized(m.table) + m.linear(m.table),
    "elementwise": lambda m, x: x * m.bias + m.listed[0][:6],
}


@pytest.mark.parametrize("multiply", GOES_ON.values(), ids=GOES_ON)
def test_parameters_of_layers_are_left_to_them(multiply: Callable[[Attention, Tensor], Tensor]) -> None:
    module, x = Attention(multiply), inputs()
    x_4bit = FakeQuantize(4)(x)
    probabilities = FakeQuantize(4, signed=False)((x_4bit @ x_4bit.mT).softmax(-1))
    expected = probabilities @ x_4bit + multiply(module, x)[..., :8].mean()
    QuantizedAttention.convert(module, quantizers(), "encoder.self")
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    "look_up",
    [lambda m: m.table[[0, 3, 3]], lambda m: m.table.index_select(0, torch.tensor([0, 3, 3]))],
    ids=["index", "index_select"],
)
def test_what_is_looked_up_in_an_own_parameter_is_an_operand(look_up: Callable[[Attention], Tensor]) -> None:
    """Rows of a table of relative positions, and rows that an embedding returns."""
    module, x = Attention(lambda m, x: x @ look_up(m).T), inputs()
    x_4bit = FakeQuantize(4)(x)
    probabilities = FakeQuantize(4, signed=False)((x_4bit @ x_4bit.mT).softmax(-1))
    expected = probabilities @ x_4bit + (x_4bit @ FakeQuantize(4)(look_up(module)).T).mean()
    QuantizedAttention.convert(module, quantizers(), "encoder.self")
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", ["qkv", "linear.weight"])
def test_parameters_that_lie_in_one_memory_are_told_apart(name: str) -> None:
    """Parameters in one storage, as gathered by FSDP and ZeRO."""
    module = Attention(lambda m, x: x @ m.get_parameter(name)[:8].T)
    flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    sizes = [parameter.numel() for parameter in module.parameters()]
    for parameter, part in zip(module.parameters(), flat.split(sizes), strict=True):
        parameter.data = part.view(parameter.shape)
    expected_error = pytest.raises(NotImplementedError, match="own parameter")
    QuantizedAttention.convert(module, quantizers(), "encoder.self")
    if name == "qkv":
        with expected_error:
            module(inputs())
    else:
        module(inputs())
