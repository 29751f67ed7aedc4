"""Packed integers against Python's integers: a row of levels is one long number, written to bytes."""

import pytest
import torch

from octav_hf.functional.bit_packing import pack_bits, packed_row_bytes, unpack_bits

from .conftest import any_path

pytestmark = any_path

BITS = range(2, 9)
LENGTHS = (1, 2, 3, 5, 7, 8, 9, 16, 100)

each_width = pytest.mark.parametrize("num_bits", BITS)
each_length = pytest.mark.parametrize("length", LENGTHS)


def random_levels(num_bits: int, length: int) -> torch.Tensor:
    """Rows of every kind: random ones, the lowest level alone, the highest alone, zeros."""
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    generator = torch.Generator().manual_seed(num_bits * 1000 + length)
    rows = torch.randint(low, high + 1, (4, length), generator=generator)
    return torch.cat([rows, torch.tensor([[low], [high], [0]]).expand(3, length)]).to(torch.int8)


def bytes_of(row: list[int], num_bits: int) -> list[int]:
    number = sum((level % 2**num_bits) << (place * num_bits) for place, level in enumerate(row))
    return list(number.to_bytes((len(row) * num_bits + 7) // 8, "little"))


@each_length
@each_width
def test_packed_bytes_are_those_of_one_long_number(num_bits: int, length: int) -> None:
    levels = random_levels(num_bits, length)
    packed = pack_bits(levels, num_bits)
    assert packed.dtype == (torch.int8 if num_bits == 8 else torch.uint8)
    assert packed.view(torch.uint8).tolist() == [bytes_of(row, num_bits) for row in levels.tolist()]
    assert packed.shape[1] == packed_row_bytes(length, num_bits)


@each_length
@each_width
def test_levels_come_back(num_bits: int, length: int) -> None:
    levels = random_levels(num_bits, length)
    packed = pack_bits(levels, num_bits)
    assert torch.equal(unpack_bits(packed, num_bits, length), levels)
    some = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(unpack_bits(packed[some], num_bits, length), levels[some])
    assert torch.equal(unpack_bits(packed.t().contiguous().t(), num_bits, length), levels)


@each_width
def test_nothing_packs_to_nothing(num_bits: int) -> None:
    for shape in ((0, 5), (3, 0)):
        packed = pack_bits(torch.zeros(shape, dtype=torch.int8), num_bits)
        assert packed.shape == (shape[0], packed_row_bytes(shape[1], num_bits))
        assert unpack_bits(packed, num_bits, shape[1]).shape == shape
