"""Attention matmuls are found with every function, and never silently missed."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_hf.functional import fake_quantize
from octav_hf.nn import (
    ATTENTION_OPERANDS,
    AttentionMatmuls,
    FakeQuantize,
    FrozenClips,
    QuantizedAttention,
    QuantizedLinear,
    quantized_scaled_dot_product_attention,
)

SHAPE = (2, 4, 6, 8)


def operands(seed: int = 0, heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(SHAPE, generator=generator)
    key, value = (torch.randn(2, heads, 6, 8, generator=generator) for _ in range(2))
    return query, key, value


def quantizers(bits: int = 4) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            name: FakeQuantize(bits, signed=name != "probabilities", gradient_estimator="pwl")
            for name in ATTENTION_OPERANDS
        }
    )


def no_quantizers() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Identity() for name in ATTENTION_OPERANDS})


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Quantized attention in a few lines, for comparison."""
    quantize = quantizers(bits)
    scores = quantize["query"](query) @ quantize["key"](key).mT / math.sqrt(query.shape[-1])
    probabilities = scores.softmax(-1)
    return quantize["probabilities"](probabilities) @ quantize["value"](value)


def with_matmul(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(8)
    return torch.matmul(F.dropout(F.softmax(scores, dim=-1), p=0.0), value)


def with_operator(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return ((query @ key.transpose(2, 3)) / math.sqrt(8)).softmax(-1).to(torch.float32) @ value


def with_bmm(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (x.reshape(8, 6, 8) for x in (query, key, value))
    probabilities = torch.softmax(torch.bmm(query, key.transpose(1, 2)) / math.sqrt(8), dim=-1)
    return torch.bmm(probabilities.view(8, 6, 6), value).reshape(SHAPE)


def with_baddbmm(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (x.reshape(8, 6, 8) for x in (query, key, value))
    scores = torch.baddbmm(torch.zeros(8, 6, 6), query, key.transpose(1, 2), alpha=1 / math.sqrt(8))
    return scores.softmax(-1).bmm(value).reshape(SHAPE)


def with_einsum(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhqd, bhkd -> bhqk", query, key) / math.sqrt(8)
    return torch.einsum("...ck,...kd", (scores.softmax(-1), value))


def with_einsum_of_lists(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum(query, [..., 0, 1], key, [..., 2, 1], [..., 0, 2]) / math.sqrt(8)
    return torch.einsum(scores.softmax(-1), [..., 0, 1], value, [..., 1, 2], [..., 0, 2])


def with_keywords(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    probabilities = (torch.matmul(input=query, other=key.mT) / math.sqrt(8)).softmax(-1)
    return torch.matmul(probabilities, other=value)


def with_mm(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Only the first head of the first sequence."""
    scores = torch.addmm(torch.zeros(6, 6), query[0, 0], key[0, 0].t()) / math.sqrt(8)
    return torch.mm(scores.softmax(-1), value[0, 0])[None, None]


def in_pieces(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Probabilities that are split, padded, concatenated and scaled before their matmul."""
    left, right = (query @ key.mT / math.sqrt(8)).softmax(-1).split(3, dim=-1)
    probabilities = F.pad(torch.cat([left, right], dim=-1)[..., :6], (0, 2)).narrow(-1, 0, 6).unsqueeze(0)
    return ((probabilities * 2.0).squeeze(0).expand(2, 4, 6, 6) @ value) / 2


def with_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def transposed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    probabilities = (query @ key.mT / math.sqrt(8)).softmax(-1)
    return torch.matmul(value.mT, probabilities.masked_fill(torch.tensor(False), 0).contiguous().transpose(-2, -1)).mT


SPELLINGS = [
    *(with_matmul, with_operator, with_bmm, with_baddbmm, with_sdpa, with_keywords, with_einsum, with_einsum_of_lists),
    *(transposed, in_pieces),
]


@pytest.mark.parametrize("attention", SPELLINGS)
def test_every_spelling_of_attention_is_quantized(attention) -> None:
    with AttentionMatmuls(quantizers(), "layer") as matmuls:
        output = attention(*operands())
    matmuls.check_complete()
    torch.testing.assert_close(output, by_hand(*operands()), rtol=0, atol=1e-6)


def test_matrices_are_quantized() -> None:
    with AttentionMatmuls(quantizers(), "layer") as matmuls:
        output = with_mm(*operands())
    matmuls.check_complete()
    expected = by_hand(*(x[:1, :1] for x in operands()))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_several_products_before_the_softmax_are_quantized() -> None:
    """Disentangled attention: scores of contents with positions are added to scores of contents."""
    query, key, value = operands()
    positions = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    with AttentionMatmuls(quantizers(), "layer"):
        scores = query @ key.mT + query @ positions.mT + (key @ positions.mT).mT
        output = scores.softmax(-1) @ value
    q, k, p = (FakeQuantize(4)(x) for x in (query, key, positions))
    scores = q @ k.mT + q @ p.mT + (k @ p.mT).mT
    expected = FakeQuantize(4, signed=False)(scores.softmax(-1)) @ FakeQuantize(4)(value)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda mask, linear: torch.einsum("bq,bk->bqk", mask, mask),
        lambda mask, linear: torch.einsum("bqk->bkq", mask[..., None]),
        lambda mask, linear: mask[..., None] @ mask[:, None],
        lambda mask, linear: mask @ linear.weight,
        lambda mask, linear: (mask > 0).long() @ (mask > 0).long().T,
    ],
    ids=["no sum", "one operand", "sums of one term", "a layer's weight", "integers"],
)
def test_what_is_no_attention_matmul_is_left_alone(call) -> None:
    mask, linear = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), nn.Linear(6, 6)
    with AttentionMatmuls(quantizers(), "layer"):
        output = call(mask, linear)
    assert torch.equal(output, call(mask, linear))


def test_outside_the_mode_nothing_changes() -> None:
    expected = with_matmul(*operands())
    with AttentionMatmuls(quantizers(), "layer"):
        assert not torch.equal(with_matmul(*operands()), expected)
    assert torch.equal(with_matmul(*operands()), expected)


def test_a_missed_operand_is_an_error() -> None:
    with AttentionMatmuls(quantizers(), "encoder.self") as matmuls:
        query, key, _ = operands()
        torch.matmul(query, key.mT)
    with pytest.raises(RuntimeError, match=r"encoder.self.*probabilities, value"):
        matmuls.check_complete()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_use_of_an_operand_is_numbered(spelling) -> None:
    modules = quantizers()
    uses: dict[str, list[int]] = {name: [] for name in ATTENTION_OPERANDS}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: uses[name].append(args[1]))
    with AttentionMatmuls(modules, "layer"):
        spelling(*operands())
        spelling(*operands(1))
    assert uses == {name: [0, 1] for name in ATTENTION_OPERANDS}


def test_as_many_uses_as_there_are_frozen_clips() -> None:
    def multiply(times: int) -> torch.Tensor:
        with AttentionMatmuls(modules, "layer") as matmuls:
            outputs = [with_sdpa(*operands()) for _ in range(times)]
        matmuls.check_complete()
        return outputs[-1]

    modules = quantizers()
    modules["value"].freeze(FrozenClips(True, torch.tensor([0.5, 2.0])))
    value = fake_quantize(operands()[2], torch.tensor(2.0), 4)
    identity = dict(quantizers().items()) | {"value": nn.Identity()}
    assert torch.equal(multiply(2), quantized_scaled_dot_product_attention(identity, *operands()[:2], value))
    with pytest.raises(RuntimeError, match="layer: .*operand value in 1 matmul.*2 frozen clips.*module_overrides"):
        multiply(1)
    with pytest.raises(RuntimeError, match="layer: .*operand value in more than 2 matmul.*2 frozen clips"):
        multiply(3)


PARAMETER = nn.Parameter(torch.ones(8, 6))


@pytest.mark.parametrize(
    ("multiply", "problem"),
    [
        (
            lambda q, k, v: torch.einsum("bhqd,bhkd,bhke->bhqe", q, k, v),
            r"einsum 'bhqd,bhkd,bhke->bhqe', of 3 operands",
        ),
        (lambda q, k, v: torch.tensordot(q, k, dims=([-1], [-1])), "tensordot"),
        (lambda q, k, v: q @ PARAMETER, r"its own parameter of shape \(8, 6\)"),
        (
            lambda q, k, v: q.softmax(-1) @ k.softmax(-1).mT,
            r"probabilities of shape \(2, 4, 6, 8\) with probabilities",
        ),
    ],
    ids=["three operands", "tensordot", "own parameter", "two probabilities"],
)
def test_a_product_that_cannot_be_quantized_is_an_error(multiply, problem: str) -> None:
    remedy = r"set module_overrides=\{'encoder.self': \{'quantize_attention': False\}\}"
    with (
        AttentionMatmuls(quantizers(), "encoder.self", [PARAMETER]),
        pytest.raises(NotImplementedError, match=f"encoder.self: .*{problem}.*{remedy}"),
    ):
        multiply(*operands())


def test_probabilities_that_may_be_negative_are_not_taken_for_such() -> None:
    query, key, value = operands()
    with AttentionMatmuls(quantizers(), "encoder.self") as matmuls:
        ((query @ key.mT).softmax(-1) - 0.1) @ value
    with pytest.raises(
        RuntimeError, match=r"encoder.self: .*probabilities, value.*are not recognized: set module_over"
    ):
        matmuls.check_complete()


class LocalAttention(nn.Module):
    """An attention module whose matmul is hidden."""

    def __init__(self, hidden: bool):
        super().__init__()
        self.hidden = hidden
        self.out = nn.Linear(8, 8)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.hidden:
            return self.out(query + key + value)
        return self.out(with_sdpa(query, key, value))


def test_a_converted_module_checks_itself() -> None:
    seen, unseen = LocalAttention(hidden=False), LocalAttention(hidden=True)
    for module in (seen, unseen):
        QuantizedAttention.convert(module, quantizers(), "layer.attention")
    seen(*operands())
    with pytest.raises(RuntimeError, match=r"layer.attention: .*query, key, probabilities, value"):
        unseen(*operands())


def memory_efficient_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Like the replacement function of DeepSpeed's ZeRO-3."""
    return x.matmul(weight.t()) + bias


def test_products_of_a_replaced_linear_are_not_taken_for_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LocalAttention(hidden=False)
    QuantizedLinear.convert(module.out, {"weight": FakeQuantize(4, dim=(1,)), "input": FakeQuantize(4)})
    QuantizedAttention.convert(module, quantizers(), "layer.attention")
    expected = module(*operands())
    monkeypatch.setattr(nn.functional, "linear", memory_efficient_linear)
    assert torch.equal(module(*operands()), expected)


def test_a_float_layer_that_calls_a_replaced_linear_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LocalAttention(hidden=False)
    QuantizedAttention.convert(module, quantizers(), "layer.attention")
    monkeypatch.setattr(nn.functional, "linear", memory_efficient_linear)
    message = r"^layer\.attention\.out: .*\(8, 8\) is in float, .* replaced by .*memory_efficient_linear, whose matmuls"
    with pytest.raises(RuntimeError, match=message):
        module(*operands())


MASKS = {
    "none": None,
    "boolean": torch.arange(6) < torch.tensor([6, 3])[:, None, None, None],
    "additive": torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_written_out_sdpa_equals_torchs(mask: torch.Tensor | None, scale: float | None) -> None:
    output = quantized_scaled_dot_product_attention(no_quantizers(), *operands(), attn_mask=mask, scale=scale)
    expected = F.scaled_dot_product_attention(*operands(), attn_mask=mask, scale=scale)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_written_out_sdpa_is_causal_and_groups_heads() -> None:
    query, key, value = operands(heads=2)
    output = quantized_scaled_dot_product_attention(no_quantizers(), query, key, value, is_causal=True, enable_gqa=True)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_a_query_that_sees_no_key_gets_zero_and_gives_no_gradient() -> None:
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, 0, 2] = False
    inputs, others = ([x.requires_grad_() for x in operands()] for _ in range(2))
    output = quantized_scaled_dot_product_attention(no_quantizers(), *inputs, attn_mask=mask)
    assert torch.equal(output[0, :, 2], torch.zeros(4, 8))
    output.square().sum().backward()
    F.scaled_dot_product_attention(*others, attn_mask=mask).square().sum().backward()
    for x, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_a_mask_keeps_nothing_more_for_the_backward_pass() -> None:
    def kept(mask: torch.Tensor | None) -> int:
        storages: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = quantized_scaled_dot_product_attention(no_quantizers(), *inputs, attn_mask=mask)
        assert output.requires_grad
        return sum(storages.values())

    inputs = [x.requires_grad_() for x in operands()]
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, 0, 2] = False
    assert kept(mask) == kept(None)


def test_dropout_comes_before_the_probabilities_quantizer() -> None:
    torch.manual_seed(0)
    seen: list[torch.Tensor] = []
    modules = no_quantizers()
    modules["probabilities"].register_forward_hook(lambda module, args, output: seen.append(output))
    quantized_scaled_dot_product_attention(modules, *operands(), dropout_p=0.5)
    dropped = (seen[0] == 0).float().mean()
    assert 0.4 < dropped < 0.6


def test_bfloat16_stays_bfloat16() -> None:
    inputs = [x.bfloat16() for x in operands()]
    # At 8 bits, because bfloat16 itself decides roundings to a coarser grid.
    output = quantized_scaled_dot_product_attention(quantizers(8), *inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), by_hand(*[x.float() for x in inputs], bits=8), rtol=0, atol=0.03)
