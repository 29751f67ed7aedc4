"""Codes in C++ equal those of the torch operations, which equal the integers of fake quantization."""

import pytest
import torch

from octav_hf.functional import fake_quantize
from octav_hf.functional.fake_quantize import integer_codes, round_to_codes
from octav_hf.functional.grid import range_and_sign, step_size
from octav_hf.functional.kernels import codes as in_cpp

TENSORS = {
    "contiguous": torch.randn(33, 64, generator=torch.Generator().manual_seed(0)),
    "heads": torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(1)).transpose(1, 2),
    "one row": torch.linspace(-3, 3, 70_001),
    "ties and ends": torch.tensor(
        [[-9.0, -2.0, -1.875, 0.0, 0.0625, 0.1875, 0.3125, 1.9375, 9.0, torch.inf, -torch.inf]]
    ),
    "empty": torch.zeros(0, 4),
}
GRIDS = {
    "signed": (True, None),
    "unsigned": (False, None),
    "signed by a tensor": (torch.tensor(True), None),
    "unsigned by a tensor": (torch.tensor(False), None),
    "asymmetric": (False, torch.tensor(-0.17)),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granular", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_integers_of_the_simulation(name: str, granular: bool, grid: str, num_bits: int, dtype: torch.dtype) -> None:
    x, (signed, offset) = TENSORS[name], GRIDS[grid]
    clip = torch.linspace(0, 2, x[..., :1].numel()).view(x[..., :1].shape) if granular else torch.tensor(2.0)
    low, high, sign = range_and_sign(num_bits, signed)
    arguments = x, clip, low, high, sign, offset, dtype
    got = in_cpp.round_to_codes(*arguments)
    assert got is not None
    assert got.is_contiguous()
    assert torch.equal(got, round_to_codes.plain(*arguments))
    lowest = (low if bool(signed) else 0) if dtype == torch.uint8 else 0
    values = (got.float() + lowest) * step_size(clip, num_bits, bool(signed))
    simulated = fake_quantize(x, clip, num_bits, signed=signed, offset=offset)
    assert torch.equal(values if offset is None else values + offset, simulated)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_layouts(dtype: torch.dtype) -> None:
    for x in (TENSORS["one row"].to(dtype), TENSORS["contiguous"].to(dtype).t(), TENSORS["contiguous"].t()):
        clip = torch.tensor(2.0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        codes = integer_codes(x, clip, -8, 7, None, None, torch.float32)
        assert torch.equal(codes.to(clip.dtype) * clip / 8, fake_quantize(x.to(clip.dtype), clip, 4))
