"""Pack integers of 2 to 8 bits into bytes, row by row."""

import math

import torch
from torch import Tensor, nn

from .grid import check_num_bits

# Eight integers fill num_bits bytes. They are packed and unpacked inside one 64-bit integer. PyTorch runs on
# little-endian machines, so the lowest byte of that integer comes first in memory.
_GROUP = 8
_INTEGERS = {2: torch.int16, 4: torch.int32}  # number of bytes -> integer dtype


def packed_row_bytes(row_length: int, num_bits: int) -> int:
    """Number of bytes of a packed row of ``row_length`` integers."""
    check_num_bits(num_bits)
    return math.ceil(row_length * num_bits / 8)


def pack_bits(levels: Tensor, num_bits: int) -> Tensor:
    """Pack signed integers, int8 ``[rows, n]``, into uint8 ``[rows, bytes per row]`` (at 8 bits, int8).

    Integer ``i`` of a row, in two's complement, occupies bits ``i * num_bits`` to ``(i + 1) * num_bits - 1`` of the
    row. Bits are counted from the lowest bit of each byte: at 4 bits, the first integer is the low half of the first
    byte. Unused bits of the last byte are zero.
    """
    row_bytes = packed_row_bytes(levels.shape[1], num_bits)
    if num_bits == 8:
        return levels
    codes = nn.functional.pad(levels & (2**num_bits - 1), (0, -levels.shape[1] % _GROUP))
    fields = codes.unflatten(1, (-1, _GROUP)).contiguous().view(torch.int64).squeeze(-1)
    for width, lane in reversed(_lanes(num_bits)):
        low = _repeated(2**width - 1, lane)
        fields = (fields & low) | ((fields >> (lane // 2) & low) << width)
    packed = fields.unsqueeze(-1).view(torch.uint8)[..., :num_bits]
    return packed.flatten(1)[:, :row_bytes].contiguous()


def unpack_bits(packed: Tensor, num_bits: int, row_length: int) -> Tensor:
    """Inverse of ``pack_bits``: ``[..., bytes per row]`` to int8 ``[..., row_length]``."""
    if num_bits == 8:
        return packed
    missing = -packed.shape[-1] % num_bits
    packed = (nn.functional.pad(packed, (0, missing)) if missing else packed.contiguous()).unflatten(-1, (-1, num_bits))
    if num_bits in _INTEGERS:
        fields = packed.view(_INTEGERS[num_bits]).to(torch.int64)  # sign extension sets higher bits, masked below
    else:
        fields = nn.functional.pad(packed, (0, _GROUP - num_bits)).view(torch.int64)
    for width, lane in _lanes(num_bits):
        low = _repeated(2**width - 1, lane)
        fields = (fields & low) | ((fields >> width & low) << (lane // 2))
    sign = 2 ** (num_bits - 1)
    levels = (fields.view(torch.int8) ^ sign).sub_(sign)
    return levels.flatten(-2)[..., :row_length]


def _lanes(num_bits: int) -> list[tuple[int, int]]:
    """Unpacking steps, each of which splits lanes in half: (bits of half of a lane's integers, bits of the lane)."""
    return [(num_bits * fields // 2, 8 * fields) for fields in (8, 4, 2)]


def _repeated(value: int, lane: int) -> int:
    """A 64-bit integer with ``value`` in every lane of ``lane`` bits."""
    return sum(value << place for place in range(0, 64, lane))
