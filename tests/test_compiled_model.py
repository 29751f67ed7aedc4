"""torch.compile of a quantized model: the step is one graph with the same result as the eager model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import (
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    ResNetForImageClassification,
)

from octav_hf import OctavConfig, apply_octav, calibrate_octav
from octav_hf.functional import octav_clip
from octav_hf.nn import FrozenClips, QuantizedAttention, quantized_scaled_dot_product_attention

from .nn.attention.test_module import (
    SPELLINGS,
    in_pieces,
    no_quantizers,
    operands,
    quantizers,
    with_einsum_of_lists,
    with_sdpa,
)
from .nn.attention.test_own_parameters import GOES_ON, REFUSED, Attention, inputs

pytestmark = pytest.mark.slow

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor

FINE = {"input": "token", "query": "token", "key": "token", "probabilities": "token", "value": "channel"}
GROUPS = dict.fromkeys(FINE, "group")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()
    counters.clear()


def step(run: Callable[..., object], model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output of a forward pass and the gradients of a backward pass from it."""
    model.zero_grad()
    output = run(**batch)[0]  # type: ignore[index]
    output.square().sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: nn.Module, compiled: nn.Module, batch: dict[str, Tensor]) -> None:
    """Sums may be rounded differently, which occasionally moves a value to the next level."""
    expected, gradients = step(model, model, batch)
    got, compiled_gradients = step(compiled, model, batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == compiled_gradients.keys()
    for name, gradient in gradients.items():
        difference = (compiled_gradients[name] - gradient).norm()
        assert difference <= 1e-3 * gradient.norm() + 1e-5, name


def assert_one_graph() -> None:
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("implementation", "config"),
    [
        ("eager", OctavConfig(embedding_bits=4)),
        ("sdpa", OctavConfig(activation_granularity=FINE)),
        ("sdpa", OctavConfig(weight_clip="mse", activation_clip="mse", activation_gradient_estimator="pwl")),
        ("eager", OctavConfig(weight_clip="max", activation_clip="max", activation_granularity=FINE)),
        ("sdpa", OctavConfig.accurate()),
        ("sdpa", OctavConfig.accurate(weight_granularity="group", activation_granularity=GROUPS, group_size=64)),
    ],
    ids=["octav", "octav per token", "mse", "max per token", "accurate", "groups"],
)
def test_a_step_of_bert_is_one_graph(
    small_bert: MakeBert, padded_batch: dict, implementation: str, config: OctavConfig
) -> None:
    model = apply_octav(small_bert(attn_implementation=implementation, num_hidden_layers=1), config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_step(model, compiled, padded_batch)
    assert_one_graph()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**padded_batch), model(**padded_batch))


def test_inductor(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig())
    assert_same_step(model, torch.compile(model, fullgraph=True), padded_batch)


def test_other_models_are_one_graph(
    small_resnet: Callable[..., ResNetForImageClassification], padded_batch: dict
) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sizes = DistilBertConfig(vocab_size=100, dim=32, n_layers=1, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    for model, batch in (
        (small_resnet(depths=[1, 1]), {"pixel_values": images}),
        (DistilBertForQuestionAnswering(sizes).eval(), padded_batch),
    ):
        torch.compiler.reset()
        counters.clear()
        apply_octav(model, OctavConfig())
        assert_same_step(model, torch.compile(model, backend="aot_eager", fullgraph=True), batch)
        assert_one_graph()


@pytest.mark.parametrize("whole", [True, False])
def test_checkpointing(small_bert: MakeBert, padded_batch: dict, whole: bool) -> None:
    """Entering a function mode is a side effect, which torch.compile by default refuses in checkpointing."""
    settings = {"num_hidden_layers": 1, "use_cache": False, **NO_DROPOUT}
    model = apply_octav(small_bert(**settings), OctavConfig()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=whole):
        assert_same_step(model, torch.compile(model, backend="aot_eager", fullgraph=whole), padded_batch)


@pytest.mark.parametrize("frozen", [False, True])
def test_new_sizes_and_layers_are_compiled_as_often_as_in_float(
    small_bert: MakeBert, padded_batch: dict, frozen: bool
) -> None:
    """Torch specializes size 1, and makes a size dynamic when it changes for the first time."""

    def graphs(model: nn.Module, by_layer: bool, sizes: tuple[tuple[int, int], ...]) -> list[int]:
        torch.compiler.reset()
        counters.clear()
        if by_layer:
            for layer in model.bert.encoder.layer:
                layer.compile(backend="aot_eager", fullgraph=True)
            compiled = model
        else:
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        after = []
        for batch, length in sizes:
            ids = torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(length))
            mask = torch.ones_like(ids)
            mask[-1, length // 2 :] = 0
            step(compiled, model, {"input_ids": ids, "attention_mask": mask})
            after.append(counters["stats"]["unique_graphs"])
        return after

    model = apply_octav(small_bert(), OctavConfig())
    if frozen:
        calibrate_octav(model, [padded_batch], progress_bar=False)
    for by_layer, sizes in ((False, ((2, 16), (3, 24), (1, 7), (4, 33), (2, 60))), (True, ((2, 16),))):
        assert graphs(model, by_layer, sizes) == graphs(small_bert(), by_layer, sizes)


@pytest.mark.parametrize(("implementation", "masked"), [("eager", True), ("sdpa", False)])
def test_frozen_clips(small_bert: MakeBert, padded_batch: dict, implementation: str, masked: bool) -> None:
    """Each attention operand is counted once, because it has one clip per matmul."""
    batch = padded_batch if masked else {"input_ids": padded_batch["input_ids"]}
    model = apply_octav(small_bert(attn_implementation=implementation), OctavConfig())
    calibrate_octav(model, [batch], progress_bar=False)
    assert_same_step(model, torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    assert_one_graph()


@pytest.mark.parametrize("boolean", [True, False])
def test_queries_that_attend_to_nothing(boolean: bool) -> None:
    """The probabilities are zeros and no gradient is NaN, as in torch's own attention."""
    may_attend = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    may_attend[1, :, 2:4] = False
    mask = may_attend if boolean else torch.zeros(may_attend.shape).masked_fill(~may_attend, -torch.inf)
    expected = [x.requires_grad_() for x in operands()]
    F.scaled_dot_product_attention(*expected, attn_mask=mask).square().sum().backward()
    got = [x.requires_grad_() for x in operands()]
    attend = torch.compile(quantized_scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    attend(no_quantizers(), *got, attn_mask=mask).square().sum().backward()
    for operand, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(operand.grad, reference.grad)


def test_a_clip_needs_no_copy() -> None:
    """The operation takes a transposed tensor without a copy, which would be another pass over memory."""
    seen: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(4, 200, 64).transpose(1, 2)
    clip = torch.compile(lambda x: octav_clip(x, 4), backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    assert clip(x) == octav_clip(x, 4)
    copies = {torch.ops.aten.clone.default, torch.ops.aten.copy.default, torch.ops.aten.contiguous.default}
    assert torch.ops.octav_hf.octav_of_rows.default in seen
    assert not copies & set(seen)


class Calls(nn.Module):
    """An attention module that calls a given function."""

    def __init__(self, attention: Callable[..., Tensor]):
        super().__init__()
        self.attention = attention

    def forward(self, *operands: Tensor) -> Tensor:
        return self.attention(*operands)


def quantized(attention: Callable[..., Tensor]) -> nn.Module:
    module = Calls(attention)
    QuantizedAttention.convert(module, quantizers(), "encoder.self")
    return module


# torch.compile does not show torch.nn.functional.pad to function modes.
@pytest.mark.parametrize("attention", [s for s in SPELLINGS if s not in (in_pieces, with_einsum_of_lists)])
def test_spellings_of_attention(attention: Callable[..., Tensor]) -> None:
    module = quantized(attention)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*operands()), module(*operands()))


NOT_FOLLOWED = {"data", "padded", "a layer's data"}


@pytest.mark.parametrize("multiply", [f for name, f in REFUSED.items() if name not in NOT_FOLLOWED])
def test_own_parameters_are_refused(multiply: Callable[[Attention, Tensor], Tensor]) -> None:
    module = Attention(multiply)
    QuantizedAttention.convert(module, quantizers(), "encoder.self")
    with pytest.raises(Unsupported, match=r"encoder.self: .*its own parameter of shape \(.*module_overrides"):
        torch.compile(module, backend="eager", fullgraph=True)(inputs())


@pytest.mark.parametrize("multiply", [f for name, f in GOES_ON.items() if name not in NOT_FOLLOWED])
def test_parameters_of_layers_are_left_to_them(multiply: Callable[[Attention, Tensor], Tensor]) -> None:
    module = Attention(multiply)
    QuantizedAttention.convert(module, quantizers(), "encoder.self")
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs()), module(inputs()))


def test_errors_of_attention_are_raised() -> None:
    missed, miscounted = quantized(lambda query, key, value: query + value), quantized(with_sdpa)
    miscounted.value_quantizer.freeze(FrozenClips(True, torch.tensor([0.5, 2.0])))
    for module, problem in (
        (missed, "query, key, probabilities, value"),
        (miscounted, "value in 1 matmul.* has 2 frozen"),
    ):
        with pytest.raises(RuntimeError, match=f"^encoder.self: .*{problem}"):
            torch.compile(module, backend="eager")(*operands())
        torch.compiler.reset()
        with pytest.raises(Unsupported, match=f"encoder.self: .*{problem}"):
            torch.compile(module, backend="eager", fullgraph=True)(*operands())


def test_attention_that_cannot_be_one_graph_runs_as_it_is() -> None:
    def reads_a_value(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT
        return (scores if float(scores.amax()) > 0 else -scores).softmax(-1) @ value

    for attention in (reads_a_value, in_pieces):
        module = quantized(attention)
        compiled = torch.compile(nn.Sequential(module), backend="eager")
        # A function of one argument, as nn.Sequential has it.
        module.attention = lambda x, attention=attention: attention(*x)
        for seed in range(3):
            torch.testing.assert_close(compiled(operands(seed)), module(operands(seed)))
