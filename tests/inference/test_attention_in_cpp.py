"""Integer attention in C++ against int64 sums and a float64 softmax."""

import pytest
import torch

from octav_hf.functional.kernels import attention

pytestmark = pytest.mark.skipif(
    not attention.is_supported(torch.zeros(1)), reason="needs AVX512-VNNI and a C++ compiler"
)
SHAPES = [
    (2, 3, 7, 5, 6, 10),
    (1, 2, 33, 70, 64, 64),
    (2, 2, 16, 128, 32, 32),
    (1, 1, 3, 300, 5, 80),
    (1, 2, 4, 1, 8, 1),
]


@pytest.mark.parametrize("num_bits", [8, 4, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask_shape", ["none", "keys", "all"])
def test_equal_to_exact_sums(shape: tuple[int, ...], num_bits: int, mask_shape: str) -> None:
    batch, heads, length, keys, channels, width = shape
    generator = torch.Generator().manual_seed(0)
    half = 2 ** (num_bits - 1)
    sizes = (length, channels), (keys, channels), (keys, width)
    query, key, value = (
        torch.randint(0, 2 * half, (batch, heads, *size), generator=generator, dtype=torch.uint8) for size in sizes
    )
    query[0], key[0], value[0] = 0, 0, 0  # the lowest integers, whose products are the largest
    mask = None
    if mask_shape != "none":
        mask = torch.randn(batch, 1, 1 if mask_shape == "keys" else length, keys, generator=generator)
        mask[..., keys // 2 :] = -torch.inf
        mask[0] = -torch.inf  # attends to nothing
    scale, step = 2 / (channels**0.5 * half**2), 0.6 / (2 * half)
    got = attention.attention(query, key, value, (-half,) * 3, mask, (scale, 0.01), step, num_bits)
    scores = (query.long() - half) @ (key.long() - half).mT * scale
    probabilities = (scores.double() + (0 if mask is None else mask)).softmax(-1).nan_to_num(0)
    codes = (probabilities / step).round().clamp(0, 2 * half - 1).long()
    expected = codes @ (value.long() - half) * 0.01
    assert got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=1e-6)


def test_number_of_threads_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 256, (2, 3, 20, 16), generator=generator, dtype=torch.uint8) for _ in range(3)]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attention.attention(*codes, (-128,) * 3, None, (1e-4, 1.0), 0.004, 8))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
