"""Matmuls with integer weights equal int64 sums, or the kernel reports that it cannot be exact."""

import warnings

import pytest
import torch
from torch import nn

from octav_hf.inference import integer_matmul
from octav_hf.inference.integer_matmul import Float, Kernel, OneDNN, kernel_for, multiply, saturates
from octav_hf.nn.codes import Codes

ONE = torch.ones(1)
CAPABILITIES = torch.cpu.get_capabilities()
needs_avx2 = pytest.mark.skipif(not CAPABILITIES.get("avx2", False), reason="oneDNN's kernels need AVX2")
needs_vnni = pytest.mark.skipif(not CAPABILITIES.get("avx512_vnni", False), reason="needs AVX512-VNNI")
KERNELS = [pytest.param(OneDNN, marks=needs_avx2), Float]
BITS = [(8, 8), (8, 7), (7, 8), (8, 4), (4, 4), (2, 2)]  # of codes and weight


def integers(num_bits: tuple[int, int], terms: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[rows, terms]`` counted from 0 and a weight ``[out, terms]``: the extremes, and random ones; int64."""
    generator = torch.Generator().manual_seed(0)
    highest, half = 2 ** num_bits[0] - 1, 2 ** (num_bits[1] - 1)
    weight = torch.randint(-half, half, (24, terms), generator=generator)
    codes = torch.randint(0, highest + 1, (8, terms), generator=generator)
    weight[0], weight[1], codes[0], codes[1] = -half, half - 1, highest, 0
    return codes, weight


def run(kernel: Kernel, codes: torch.Tensor, num_bits: int, lowest: int) -> torch.Tensor:
    """The sums of codes that are counted from 0."""
    of_kernel = codes.to(kernel.dtype) if kernel.dtype == torch.uint8 else (codes + lowest).to(kernel.dtype)
    return kernel(Codes(of_kernel, lowest, num_bits, ONE), ONE[0], ONE, None)


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_are_exact(kernel: type[Kernel], num_bits: tuple[int, int], is_signed: bool) -> None:
    codes, weight = integers(num_bits)
    lowest = -(2 ** (num_bits[0] - 1)) if is_signed else 0
    sums = run(kernel(nn.Linear(1, 1), weight.to(torch.int8), num_bits), codes, num_bits[0], lowest)
    assert torch.equal(sums.long(), (codes + lowest) @ weight.t())


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_rows(kernel: type[Kernel]) -> None:
    made = kernel(nn.Linear(1, 1), integers((8, 4))[1].to(torch.int8), (8, 4))
    assert run(made, torch.zeros(0, 3, 192), 8, 0).shape == (0, 3, 24)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_and_bias(kernel: type[Kernel]) -> None:
    codes, weight = integers((8, 4))
    step, scale, bias = torch.tensor(0.1), torch.rand(24) + 0.5, torch.randn(24)
    made = kernel(nn.Linear(1, 1), weight.to(torch.int8), (8, 4))
    result = made(Codes(codes.to(made.dtype), 0, 8, step), step, scale, bias)
    expected = codes.double() @ weight.double().t() * step.double() * scale.double() + bias.double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def vpmaddubsw(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums as computed by this instruction: pairs of products in 16 bits, which saturate; int64."""
    products = codes[:, None] * weight
    return products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1)


@needs_avx2
@pytest.mark.parametrize("num_bits", BITS)
def test_no_pair_of_products_saturates_without_vnni(num_bits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_matmul, "_has_vnni", lambda: False)
    codes, weight = integers(num_bits)
    parts = integer_matmul._parts(weight.to(torch.int8), num_bits)
    assert torch.equal(sum(vpmaddubsw(codes, part.long()) for part in parts), codes @ weight.t())
    exact = torch.equal(vpmaddubsw(codes, weight), codes @ weight.t())
    assert exact is (not saturates(num_bits))  # whole, the 8-bit weight of 8-bit codes would be wrong
    assert torch.equal(
        run(OneDNN(nn.Linear(1, 1), weight.to(torch.int8), num_bits), codes, 8, 0).long(), codes @ weight.t()
    )


@needs_avx2
@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("vnni", [pytest.param(True, marks=needs_vnni), False])
def test_convolutions_are_exact(
    vnni: bool, groups: int, num_bits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_matmul, "_has_vnni", lambda: vnni)
    codes, weight = (x.unflatten(-1, (-1, 4, 4)) for x in integers(num_bits))
    weight = weight.unflatten(1, (groups, -1))[:, 0].contiguous()
    layer = nn.Conv2d(12, 24, 4, stride=2, padding=1, groups=groups)
    made = OneDNN(layer, weight.to(torch.int8), num_bits)
    images = codes.repeat(1, 1, 3, 2)
    bias = torch.arange(24.0)
    sums = made(Codes(images.to(made.dtype), 0, num_bits[0], ONE), ONE[0], torch.ones(24), bias)
    expected = nn.functional.conv2d(images.double(), weight.double(), bias.double(), 2, 1, 1, groups)
    assert torch.equal(sums.double(), expected)


class Wrong(OneDNN):
    """As on a processor that saturates."""

    dtype = torch.float32

    def __init__(self, layer: object, weight: torch.Tensor, num_bits: tuple[int, int]):
        self._weight = weight

    def __call__(self, codes: Codes, *_: object) -> torch.Tensor:
        return vpmaddubsw(codes.integers.long(), self._weight.long()).float()


@pytest.fixture
def fresh_checks() -> object:
    for cached in (integer_matmul._is_exact, integer_matmul._warn_of_fallback):
        cached.cache_clear()
    yield
    for cached in (integer_matmul._is_exact, integer_matmul._warn_of_fallback):
        cached.cache_clear()


@pytest.mark.usefixtures("fresh_checks")
def test_a_processor_whose_sums_are_wrong_gets_floats_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_matmul, "OneDNN", Wrong)
    codes, weight = integers((8, 8))
    with pytest.warns(UserWarning, match="no exact integer kernel") as caught:
        kernels = [kernel_for(nn.Linear(1, 1), weight.to(torch.int8), (8, 8), torch.float32) for _ in range(2)]
    assert len(caught) == 1
    assert [type(kernel) for kernel in kernels] == [Float, Float]
    assert torch.equal(run(kernels[0], codes, 8, 0).long(), codes @ weight.t())
    # Where the products are small enough for it, the same kernel is taken.
    assert type(kernel_for(nn.Linear(1, 1), weight.to(torch.int8), (4, 4), torch.float32)) is Wrong


@pytest.mark.usefixtures("fresh_checks")
@pytest.mark.parametrize("kernel", [pytest.param(OneDNN, marks=needs_avx2), Float])
def test_kernel_of_this_processor(kernel: type[Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel is Float:
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = kernel_for(nn.Linear(1, 1), integers((8, 8))[1].to(torch.int8), (8, 8), torch.float32)
    assert type(made) is kernel
    assert len(caught) == (kernel is Float)


@pytest.mark.usefixtures("fresh_checks")
def test_values_in_float64_and_sums_beyond_32_bits_are_computed_in_float64() -> None:
    weight = integers((8, 8), terms=70_000)[1].to(torch.int8)
    with pytest.warns(UserWarning, match="float64"):
        assert kernel_for(nn.Linear(1, 1), weight[:, :64], (8, 8), torch.float64).dtype == torch.float32
    with pytest.warns(UserWarning, match="32 bits"):
        assert kernel_for(nn.Linear(1, 1), weight, (8, 8), torch.float32).dtype == torch.float64


@pytest.mark.parametrize("terms", [500, 600])
def test_products_of_floats_are_exact_on_both_sides_of_24_bits(terms: int) -> None:
    codes, weight = integers((8, 8), terms)
    codes, weight = codes.clone(), weight.clone()
    codes[0, -1] = weight[0, -1] = 1  # an odd sum
    left, right = Codes(codes.float(), 0, 8, ONE), Codes(weight.float(), -128, 8, ONE)
    sums = multiply(lambda x, y: x @ y.t(), left, right, terms)
    assert torch.equal(sums.long(), codes @ weight.t())
    assert sums.dtype == (torch.float32 if terms == 500 else torch.float64)
