"""Integer attention with every matmul function: sums equal int64 sums, results equal float64 results."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_hf.functional.kernels import attention
from octav_hf.inference import integer_attention
from octav_hf.inference.integer_attention import IntegerAttentionArithmetic
from octav_hf.inference.integer_matmul import multiply
from octav_hf.nn import ATTENTION_OPERANDS, AttentionMatmuls, FakeQuantize, FrozenClips

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

B, H, T, D = 2, 4, 6, 8
MASK = torch.arange(T) < torch.tensor([[T], [3]])


def matmul(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.matmul((q @ k.transpose(2, 3) * D**-0.5).softmax(-1), v)


def bmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(F.softmax(torch.bmm(q, k.mT) * D**-0.5, dim=-1), v)


def baddbmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = torch.linspace(-1, 1, T, dtype=q.dtype).expand(len(q), T, T)
    scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=D**-0.5)
    scores = torch.baddbmm(torch.full_like(scores, torch.nan), q, k.mT, beta=0, alpha=D**-0.5) + scores
    return scores.softmax(-1).bmm(v)


def baddbmm_in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.ones(len(q), T, T, dtype=q.dtype)
    assert scores.baddbmm_(q, k.mT, alpha=D**-0.5) is scores
    return scores.softmax(-1).bmm(v)


def einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhid,bhjd->bihj", q, k) * D**-0.5
    return torch.einsum("bihj,bhjd->bihd", scores.softmax(-1), v)


def key_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v.mT @ (q @ k.mT * D**-0.5).softmax(-1).mT


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, attn_mask=MASK[:, None, None], scale=0.3)


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.linspace(-2, 2, T * T, dtype=q.dtype).view(T, T)
    return sdpa(q, k, v, attn_mask=bias.masked_fill(~MASK[:, None, None], -torch.inf))


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, is_causal=True)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k[:, :2], v[:, :2], enable_gqa=True)


FUNCTIONS = [matmul, bmm, baddbmm, baddbmm_in_place, einsum, key_first, sdpa, masked, biased, causal, grouped]
GRANULARITIES: dict[str, dict[str, tuple[int, ...]]] = {
    "tensor": {},
    "attn_head": dict.fromkeys(ATTENTION_OPERANDS, (-2, -1)),
    "finest": dict.fromkeys(ATTENTION_OPERANDS, (-1,)),
    "mixed": {"query": (-1,), "value": (-2, -1)},
}


def quantizers(num_bits: int, granularity: str) -> nn.ModuleDict:
    dims = GRANULARITIES[granularity]
    return nn.ModuleDict(
        {
            name: FakeQuantize(num_bits, signed=name != "probabilities", dim=dims.get(name))
            for name in ATTENTION_OPERANDS
        }
    )


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, H, D, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def run(attend: Attend, matmuls: AttentionMatmuls, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad(), matmuls:
        return attend(*operands(dtype))


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("attend", FUNCTIONS)
def test_equal_to_multiplying_the_values(
    attend: Attend, granularity: str, num_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = []

    def checked(product: Any, left: Any, right: Any, terms: int, reference: bool) -> torch.Tensor:
        result = multiply(product, left, right, terms, reference)
        exact = product(left.integers.double(), right.integers.double())
        assert torch.equal(left.integers, left.integers.round())
        assert terms in (D, T)
        assert torch.equal(result.double(), exact)
        sums.append(result)
        return result

    monkeypatch.setattr(integer_attention, "multiply", checked)
    modules = quantizers(num_bits, granularity)
    expected = run(attend, AttentionMatmuls(modules, ""), torch.float64)
    for reference in (False, True):
        matmuls = AttentionMatmuls(modules, "", arithmetic=IntegerAttentionArithmetic(reference))
        result = run(attend, matmuls, torch.float64)  # in which rounding moves no value to another code
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert {x.dtype for x in sums} == {torch.float32, torch.float64}


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("attend", [sdpa, masked, biased, causal, grouped])
def test_fused(attend: Attend, num_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one frozen clip per operand, C++ computes the whole attention."""
    modules = quantizers(num_bits, "tensor")
    for name, quantizer in modules.items():
        quantizer.freeze(FrozenClips(name != "probabilities", torch.tensor([0.7 if name == "probabilities" else 2.1])))
    expected = run(attend, AttentionMatmuls(modules, ""), torch.float64)
    is_fused = attention.is_supported(operands(torch.float32)[0])
    if is_fused:
        monkeypatch.setattr(integer_attention, "multiply", None)
    matmuls = AttentionMatmuls(modules, "", arithmetic=IntegerAttentionArithmetic(False))
    result = run(attend, matmuls, torch.float32)
    matmuls.check_complete()
    assert result.transpose(1, 2).is_contiguous() is is_fused  # the layout that the output layer wants
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attend", [sdpa, masked, matmul])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(attend: Attend, dtype: torch.dtype) -> None:
    modules = quantizers(8, "tensor")
    for name, quantizer in modules.items():  # such that no probability lies between two codes
        quantizer.freeze(FrozenClips(name != "probabilities", torch.tensor([1.0 if name == "probabilities" else 3.0])))
    expected = run(attend, AttentionMatmuls(modules, ""), dtype)
    result = run(attend, AttentionMatmuls(modules, "", arithmetic=IntegerAttentionArithmetic(False)), dtype)
    assert result.dtype == dtype
    tolerance = 0.01 if dtype == torch.float32 else 0.05  # a code is 1/256 of the clip
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_matmuls_are_counted_and_each_gets_its_clip() -> None:
    modules = quantizers(8, "tensor")
    for quantizer in modules.values():
        quantizer.freeze(FrozenClips(bool(quantizer.signed), torch.tensor([2.0])))
    matmuls = AttentionMatmuls(modules, "layer", arithmetic=IntegerAttentionArithmetic(False))
    with pytest.raises(RuntimeError, match="more than 1"):
        run(baddbmm, matmuls, torch.float32)


def test_a_gradient_is_an_error() -> None:
    matmuls = AttentionMatmuls(quantizers(8, "tensor"), "", arithmetic=IntegerAttentionArithmetic(False))
    q, k, v = operands(torch.float32)
    with matmuls, pytest.raises(RuntimeError, match=r"no gradient.*no_grad"):
        sdpa(q.requires_grad_(), k, v)
