"""Tracing and export: a quantized model is exported exactly, or refused with advice."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, calibrate_octav, pack_octav

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor

REMEDY = (
    "calibrate_octav(model, batches, weights=True), then torch.export.export(model, …), or for ONNX torch.onnx.export"
)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return apply_octav(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), OctavConfig()).eval()


def frozen(model: nn.Module, *batches: object) -> nn.Module:
    return calibrate_octav(model, batches, weights=True, progress_bar=False)


def frozen_and_packed(model: nn.Module, *batches: object) -> nn.Module:
    return pack_octav(calibrate_octav(model, batches, progress_bar=False))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def bert_inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and a mask that hides the end of the last sequence."""
    ids = torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return ids, mask


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_frozen_and_packed_model_is_exported_exactly(small_bert: MakeBert, implementation: str) -> None:
    model = apply_octav(small_bert(attn_implementation=implementation), OctavConfig())
    model.config.return_dict = False
    example = bert_inputs(2, 16)
    frozen_and_packed(model, dict(zip(("input_ids", "attention_mask"), example, strict=True)))
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    with torch.no_grad():
        exported = torch.export.export(model, example, dynamic_shapes=(sizes, sizes)).module()
        for batch, length in ((2, 16), (3, 20), (1, 5)):
            inputs = bert_inputs(batch, length)
            for got, expected in zip(exported(*inputs), model(*inputs), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_frozen_layers_are_exported_exactly(x: Tensor, strict: bool, packed: bool) -> None:
    model = frozen_and_packed(layers(), x) if packed else frozen(layers(), x)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        exported = program.module()
        assert torch.equal(exported(x), model(x))
        assert torch.equal(exported(10 * x), model(10 * x))
    # ONNX has no operator for it
    assert packed == any(node.target is torch.ops.aten.view.dtype for node in program.graph.nodes)


def test_strict_export_of_attention_is_refused(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    ids, _ = bert_inputs(2, 16)
    frozen_and_packed(model, ids)
    with torch.no_grad(), pytest.raises(Exception, match=r"layer\.0\.attention\.self: .* only with strict=False"):
        torch.export.export(model, (ids,), strict=True)


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_dynamic_clips_is_refused(x: Tensor, strict: bool) -> None:
    with torch.no_grad(), pytest.raises(Exception) as caught:  # noqa: PT011  # strict mode wraps it in its own
        torch.export.export(layers(), (x,), strict=strict)
    assert "0 input: torch.export cannot record" in str(caught.value)
    assert REMEDY in str(caught.value)


def test_export_of_weights_that_are_not_packed_is_refused(x: Tensor) -> None:
    model = calibrate_octav(layers(), [x], progress_bar=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="0 weight: torch.export cannot record"):
        torch.export.export(model, (x,))


def test_export_of_bert_with_dynamic_clips_is_refused(small_bert: MakeBert) -> None:
    ids, _ = bert_inputs(2, 16)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"bert\.encoder\.\S+ input: torch.export cannot record"):
        torch.export.export(apply_octav(small_bert(), OctavConfig()), (ids,))


@pytest.mark.parametrize(
    ("config", "packed"),
    [
        *(({}, packed) for packed in (False, True)),
        *(({"activation_bits": None}, packed) for packed in (False, True)),
        ({"weight_bits": None}, False),
    ],
    ids=str,
)
def test_jit_and_fx_are_refused(x: Tensor, config: dict, packed: bool) -> None:
    torch.manual_seed(0)
    model = apply_octav(nn.Sequential(nn.Linear(8, 8)), OctavConfig(**config)).eval()
    if packed:
        if config != {"activation_bits": None}:
            calibrate_octav(model, [x], progress_bar=False)
        pack_octav(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^0 \w+: torch.jit.trace cannot record"):
        torch.jit.trace(model, (x,))
    if config != {"activation_bits": None}:  # whose only quantizer sees a weight, which torch.fx does not trace
        with pytest.raises(RuntimeError, match=r"^0 \w+: torch.fx.symbolic_trace cannot record"):
            torch.fx.symbolic_trace(model)
    assert model(x).isfinite().all()


def test_export_of_a_shared_weight_says_to_exclude_it() -> None:
    def tied(config: OctavConfig) -> BertForMaskedLM:
        return frozen(apply_octav(BertForMaskedLM(sizes).eval(), config), ids)

    sizes = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=0, num_attention_heads=2, intermediate_size=8)
    ids, _ = bert_inputs(2, 16)
    ids = ids % 50
    head = "cls.predictions.decoder"
    with torch.no_grad():
        remedy = re.escape(f"(a shared weight or an embedding: exclude_modules=['{head}'] in the config)")
        with pytest.raises(RuntimeError, match=rf"^{head} weight: torch.export cannot record .*{remedy}"):
            torch.export.export(tied(OctavConfig(quantize_attention=False)), (ids,))
        model = tied(OctavConfig(quantize_attention=False, exclude_modules=[head]))
        assert torch.equal(torch.export.export(model, (ids,)).module()(ids).logits, model(ids).logits)


def test_jit_of_bert_is_refused_and_it_still_runs(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    with torch.no_grad():
        expected = model(**padded_batch).start_logits
        with pytest.raises(RuntimeError, match=r"^bert\.encoder\.\S+ input: torch.jit.trace cannot record"):
            torch.jit.trace(model, (padded_batch["input_ids"],), strict=False)
        assert torch.equal(model(**padded_batch).start_logits, expected)
