"""Granular clips: their scale factors out of the matmul, with every matmul function."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_hf.coverage.operand_watch import on_grid
from octav_hf.functional.grid import round_to_grid
from octav_hf.nn import (
    ATTENTION_OPERANDS,
    AttentionMatmuls,
    FakeQuantize,
    FrozenClips,
    MeanObserver,
    QuantizedLinear,
    SynchronizedFakeQuantize,
    quantized_scaled_dot_product_attention,
)
from octav_hf.nn.attention.match_matmul import match_matmul
from octav_hf.nn.granularity import (
    ACTIVATION_GRANULARITIES,
    frozen_dims,
    granularity_of,
    shared_dims,
    unsupported_reason,
)

from ..bert_twin import clips_of_parts
from ..twins import as_float64, gradient_twin, grid_twin, quantize_twin
from .attention.test_module import SPELLINGS, operands

Tensor = torch.Tensor

FINEST = {"query": "token", "key": "token", "probabilities": "token", "value": "channel"}
HEADS = dict.fromkeys(ATTENTION_OPERANDS, "attn_head")
# Groups are in test_groups.py.
ALLOWED = {operand: [name for name in names if name != "group"] for operand, names in ACTIVATION_GRANULARITIES.items()}
# Axes of [batch, heads, tokens, channels] that share a clip; a value's channel has all tokens.
AXES = {"tensor": None, "token": (-1,), "attn_head": (-2, -1), "channel": (-2,)}


def quantizer(operand: str, granularity: str, bits: int = 4, **settings: object) -> FakeQuantize:
    return FakeQuantize(
        bits,
        signed=operand != "probabilities",
        gradient_estimator="pwl",
        dim=shared_dims(granularity),
        frozen_dim=frozen_dims(operand, granularity),
        name=f"layer {operand}",
        **settings,
    )


def quantizers(granularities: dict[str, str]) -> nn.ModuleDict:
    names = {operand: granularities.get(operand, "tensor") for operand in ATTENTION_OPERANDS}
    return nn.ModuleDict({operand: quantizer(operand, name) for operand, name in names.items()})


def twin(x: Tensor, operand: str, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Integer levels of ``[batch, heads, tokens, channels]`` and the steps that they are multiples of."""
    signed = operand != "probabilities"
    clips = clips_of_parts(x, 4, signed, AXES[granularity]).astype(np.float32)
    step, low, high = grid_twin(clips, 4, signed)
    levels = np.clip(np.round(as_float64(x) / np.where(step > 0, step, 1.0)), low, high)
    return np.where(step > 0, levels, 0).astype(np.int64), step


def attention_twin(query: Tensor, key: Tensor, value: Tensor, granularities: dict[str, str]) -> np.ndarray:
    """Attention on integer levels; each matmul is scaled by the outer product of its operands' scales."""
    (q, q_step), (k, k_step) = (twin(x, name, granularities[name]) for x, name in ((query, "query"), (key, "key")))
    scores = (q @ k.swapaxes(-1, -2)) * (q_step * np.swapaxes(k_step, -1, -2) if k_step.ndim else q_step * k_step)
    scores = scores / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = torch.from_numpy(weights / weights.sum(-1, keepdims=True)).float()
    p, p_step = twin(probabilities, "probabilities", granularities["probabilities"])
    v, v_step = twin(value, "value", granularities["value"])
    return (p @ v) * (p_step * v_step)


@pytest.mark.parametrize(
    "granularities", [FINEST, HEADS, FINEST | {"query": "attn_head", "value": "attn_head"}], ids=str
)
@pytest.mark.parametrize("attention", SPELLINGS)
def test_integers_times_scales_are_the_product_however_it_is_called(
    attention: Callable, granularities: dict[str, str]
) -> None:
    with AttentionMatmuls(quantizers(granularities), "layer") as matmuls:
        output = attention(*operands())
    matmuls.check_complete()
    expected = attention_twin(*operands(), granularities)
    np.testing.assert_allclose(output.numpy(), expected, rtol=0, atol=2e-6)
    with AttentionMatmuls(quantizers({}), "layer"):
        assert (attention(*operands()) - output).abs().max() > 1e-2


@pytest.mark.parametrize("granularity", ALLOWED["input"])
def test_integers_times_scales_are_what_a_linear_layer_computes(granularity: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 5, bias=False), operands()[0]
    weight = layer.weight.detach()
    QuantizedLinear.convert(layer, {"weight": FakeQuantize(4, dim=(1,)), "input": quantizer("input", granularity)})
    levels, step = twin(x, "input", granularity)
    w, w_step = twin(weight, "weight", "token")
    expected = (levels @ w.T) * (step * w_step.T)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-6)


PAIRS = [
    *((("query", "key"), (a, b)) for a in ALLOWED["query"] for b in ALLOWED["key"]),
    *((("probabilities", "value"), (a, b)) for a in ALLOWED["probabilities"] for b in ALLOWED["value"]),
]


@pytest.mark.parametrize(("names", "granularities"), PAIRS, ids=str)
def test_the_scale_of_every_allowed_pair_factors_out(names: tuple[str, str], granularities: tuple[str, str]) -> None:
    """In float64, the matmul of quantized operands equals an integer matmul times one factor per element."""
    left, right, value = operands()
    if names[0] == "probabilities":
        left, right = (left @ right.mT).softmax(-1), value
    left, right = left.double(), right.double()
    modules = [quantizer(name, granularity) for name, granularity in zip(names, granularities, strict=True)]
    columns = names[1] == "value"
    parts = [left, right.mT if columns else right]
    quantized = [module(part) for module, part in zip(modules, parts, strict=True)]
    steps = [
        module.compute_clip(part) / (8 if module.signed else 16) for module, part in zip(modules, parts, strict=True)
    ]
    levels = [(x / step).round() for x, step in zip(quantized, steps, strict=True)]
    scale = steps[0] * (steps[1].mT if steps[1].dim() else steps[1])
    integers = levels[0].long() @ levels[1].long().mT
    torch.testing.assert_close(integers * scale, quantized[0] @ quantized[1].mT, rtol=1e-12, atol=1e-12)
    assert all(len(level.unique()) > 4 for level in levels)


@pytest.mark.parametrize("granularity", ["token", "attn_head", "channel"])
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_the_gradient_is_that_of_each_parts_clip(gradient: str, granularity: str) -> None:
    operand = "value" if granularity == "channel" else "query"
    modules = quantizers({operand: granularity})
    modules[operand].gradient_estimator = gradient
    x = operands()[0].requires_grad_()
    others = operands(1)
    seen: dict[str, Tensor] = {}
    modules[operand].register_full_backward_hook(lambda module, grad, output: seen.update(grad=grad[0], out=output[0]))
    inputs = (others[0], others[1], x) if operand == "value" else (x, others[1], others[2])
    with AttentionMatmuls(modules, "layer"):
        output = F.scaled_dot_product_attention(*inputs)
    output.square().sum().backward()
    clips = clips_of_parts(x, 4, True, AXES[granularity]).astype(np.float32)
    factor = torch.from_numpy(gradient_twin(x, clips, True, gradient))
    incoming = seen["out"].mT if operand == "value" else seen["out"]
    torch.testing.assert_close(x.grad, (incoming.double() * factor).float(), rtol=1e-5, atol=1e-7)
    assert gradient == "ste" or bool((factor < 1).any())


def test_with_one_clip_a_quantizer_gets_the_operand_as_it_is() -> None:
    query, key, value = operands()
    keyed = key.mT
    modules, seen = quantizers({}), []
    for module in modules.values():
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with AttentionMatmuls(modules, "layer"):
        probabilities = (query @ keyed).softmax(-1)
        probabilities @ value
        F.scaled_dot_product_attention(query, key, value)
    assert len(seen) == 8
    expected = (query, keyed, probabilities, value, query, key, value)  # and sdpa's own probabilities
    assert all(x is y for x, y in zip(seen[:7], expected, strict=True))


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (lambda x: torch.addbmm(torch.zeros(5, 7), x(3, 5, 4), x(3, 4, 7)), ((5, 12), (7, 12))),
        (lambda x: x(4) @ x(3, 4, 7), ((1, 4), (3, 7, 4))),
        (lambda x: x(3, 5, 4) @ x(4), ((3, 5, 4), (1, 4))),
        (lambda x: torch.mm(x(5, 4), x(4, 7)), ((5, 4), (7, 4))),
        (lambda x: x(2, 3, 5, 4) @ x(3, 4, 7), ((2, 3, 5, 4), (3, 7, 4))),
        (lambda x: x(4, 7).__rmatmul__(x(5, 4)), ((5, 4), (7, 4))),
        (lambda x: torch.einsum("bqhd,bkhd->bhqk", x(2, 5, 3, 4), x(2, 7, 3, 4)), ((2, 3, 5, 4), (2, 3, 7, 4))),
        (lambda x: torch.einsum("bhqk,bkhd->bqhd", x(2, 3, 5, 7), x(2, 7, 3, 4)), ((2, 3, 5, 7), (2, 3, 4, 7))),
        (lambda x: torch.einsum("bqhd,bkhd->bqk", x(2, 5, 3, 4), x(2, 7, 3, 4)), ((2, 5, 12), (2, 7, 12))),
        (lambda x: torch.einsum("...qd,...kd", x(2, 3, 5, 4), x(7, 4)), ((2, 3, 5, 4), (7, 4))),
        (lambda x: torch.einsum("hd...,hd->h...", x(3, 4, 2, 5), x(3, 4)), ((3, 2, 5, 1, 4), (3, 1, 4))),
        (lambda x: torch.einsum("bxyd,bzd->bxyz", x(2, 3, 5, 4), x(2, 7, 4)), ((2, 15, 4), (2, 7, 4))),
        (lambda x: torch.einsum("bqd,bkd->bq", x(2, 5, 4), x(2, 7, 4)), ((2, 5, 4), (2, 1, 28))),
    ],
    ids=range(13),
)
def test_operands_come_as_batch_own_and_summed_dimensions(
    call: Callable, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """The contracted dimension is last, and the result has the original layout."""
    made: list[Tensor] = []

    def x(*shape: int) -> Tensor:
        made.append(torch.randn(shape, generator=torch.Generator().manual_seed(len(made))))
        return made[-1]

    expected = call(x)
    seen: list[tuple[int, ...]] = []
    modules = quantizers({"query": "token", "key": "token"})
    for name in ("query", "key"):
        modules[name].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
        modules[name].num_bits = 8
        modules[name].clip = "max"
    made.clear()
    with AttentionMatmuls(modules, "layer"):
        output = call(x)
    assert tuple(seen) == shapes
    assert output.shape == expected.shape
    assert 0 < (output - expected).abs().max() < 0.15


def test_the_reason_for_every_product_is_what_it_sums_over() -> None:
    """Exactly the granularities with a clip per element of a contracted dimension are refused."""
    query, key, value = operands()
    scores = match_matmul(torch.matmul, (query, key.mT), {})
    attended = match_matmul(torch.matmul, (scores.call(query, key.mT), value), {})
    summed = [dims.contracted for product in (scores, attended) for dims in product.dims]
    assert summed == [(-1,), (-2,), (-1,), (-2,)]
    assert {pair for pair in ((o, g) for o in ACTIVATION_GRANULARITIES for g in AXES) if unsupported_reason(*pair)} == {
        *(("input", "channel"), ("input", "attn_head"), ("query", "channel"), ("key", "channel")),
        *(("probabilities", "channel"), ("value", "token")),
    }
    for operand, allowed in ACTIVATION_GRANULARITIES.items():
        sizes = [64 if name == "group" else None for name in allowed]
        names = [granularity_of(operand, shared_dims(name), size) for name, size in zip(allowed, sizes, strict=True)]
        assert names == list(allowed)


# Grouped heads, frozen clips.


@pytest.mark.parametrize("granularities", [FINEST, HEADS], ids=["finest", "heads"])
def test_grouped_heads_are_as_if_they_were_repeated_before(granularities: dict[str, str]) -> None:
    query, key, value = operands(heads=2)
    repeated = (x.repeat_interleave(2, dim=1) for x in (key, value))
    modules, shapes = quantizers(granularities), {}
    for name in ("key", "value"):
        modules[name].register_forward_pre_hook(lambda module, args, name=name: shapes.update({name: args[0].shape}))
    output = quantized_scaled_dot_product_attention(modules, query, key, value, enable_gqa=True)
    assert [shape[:2] for shape in shapes.values()] == [(2, 4), (2, 4)]
    assert torch.equal(output, quantized_scaled_dot_product_attention(quantizers(granularities), query, *repeated))


def same(frozen: FrozenClips, other: FrozenClips) -> bool:
    return frozen.signed is other.signed and torch.equal(frozen.clips, other.clips)


def observed(module: FakeQuantize, *calls: Tensor) -> FrozenClips | None:
    module.observer = MeanObserver(module)
    for x in calls:
        module(x)
    frozen = module.observer.frozen()
    module.observer = None
    return frozen


@pytest.mark.parametrize(
    ("operand", "granularity"),
    [("query", "attn_head"), ("value", "channel"), ("probabilities", "attn_head"), ("key", "token")],
)
def test_a_frozen_clip_is_the_mean_over_calls_and_batch_elements(operand: str, granularity: str) -> None:
    """Parts that exist in every call keep their clips; tokens do not, so they share one."""
    calls = [operands(seed)[0][:size].abs() * (1 + seed) for seed, size in enumerate((2, 1, 2))]
    frozen = observed(quantizer(operand, granularity), *calls)
    signed = operand != "probabilities"
    if granularity == "token":
        assert same(frozen, observed(quantizer(operand, "tensor"), *calls))
        return
    clips = [clips_of_parts(x, 4, signed, (-1,) if granularity == "channel" else (-2, -1)) for x in calls]
    expected = np.concatenate(clips).mean(0).squeeze((-1,) if granularity == "channel" else (-2, -1))
    assert frozen.signed is signed
    np.testing.assert_allclose(frozen.clips[0].numpy(), expected, rtol=1e-5)
    assert expected.shape == ((4, 6) if granularity == "channel" else (4,))

    module = quantizer(operand, granularity)
    module.freeze(frozen)
    for x in calls:
        shape = (*expected.shape, *[1] * (3 - expected.ndim))
        wanted = quantize_twin(x, expected.reshape(shape).astype(np.float32), 4, signed)
        np.testing.assert_allclose(module(x).numpy(), wanted, rtol=1e-4)


def test_without_a_batch_dimension_all_parts_stay() -> None:
    x = operands()[0][0, 0]
    assert len(observed(quantizer("value", "channel"), x, 2 * x).clips[0]) == 6
    assert same(observed(quantizer("query", "attn_head"), x), observed(quantizer("query", "tensor"), x))


@pytest.mark.parametrize("module_class", [FakeQuantize, SynchronizedFakeQuantize])
def test_frozen_clips_of_another_shape_are_an_error(module_class: type[FakeQuantize]) -> None:
    x = operands()[0]
    module = module_class(4, dim=(-1,), frozen_dim=(-1,), name="encoder.self value")
    module.freeze(FrozenClips(True, torch.ones(1, 4, 5)))
    with pytest.raises(ValueError, match=r"^encoder.self value: .*shape \(4, 5\).*\(2, 4, 6, 8\).*needs .*\(4, 6\)"):
        module(x)
    module.freeze(FrozenClips(True, torch.tensor([0.7])))
    assert torch.equal(module(x), round_to_grid(x, torch.tensor(0.7), 4))


def test_parts_that_differ_between_calls_have_no_mean() -> None:
    module = quantizer("query", "attn_head")
    message = r"^layer query: clips of shape \(3,\) after clips of shape \(4,\); they cannot be frozen together"
    with pytest.raises(ValueError, match=message):
        observed(module, operands()[0], operands()[0][:, :3])


def test_says_what_its_clips_are_for() -> None:
    module = quantizer("query", "attn_head")
    module.freeze(FrozenClips(True, torch.tensor([[0.5, 1.25]])))
    assert (
        repr(module)
        == "FakeQuantize(4 bits [-8, 7], clip=octav over dim (-2, -1) frozen, [1, 2], gradient_estimator=pwl)"
    )


def test_a_frozen_clip_of_tokens_is_checked_as_the_one_that_it_is() -> None:
    """Each token has at most as many distinct values as the grid, but all tokens together have many more."""
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5]) * torch.tensor([1.0, 2.0, 5.0])[:, None]
    module = quantizer("query", "token", bits=2)
    assert on_grid(values, module)
    module.freeze(FrozenClips(True, torch.tensor([1.0])))
    assert not on_grid(values, module)
    assert on_grid(torch.empty(0, 4), quantizer("query", "token"))
