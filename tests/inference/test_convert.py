"""``convert_octav`` on a model: its outputs, and what can be done with the model afterwards."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    check_coverage,
    convert_octav,
    coverage_report,
    pack_octav,
    remove_octav,
    unpack_octav,
)
from octav_hf.nn import FakeQuantize, PackedLayer, QuantizedAttention
from octav_hf.nn.codes import Codes

from ..question_answering import Spans, logits

MakeBert = Callable[..., BertForQuestionAnswering]
CONFIG = OctavConfig(weight_bits=4, activation_bits=8)


def batch(start: int = 0) -> dict[str, torch.Tensor]:
    rows = [Spans()[index] for index in range(start, start + 4)]
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}


@pytest.fixture
def model(small_bert: MakeBert) -> BertForQuestionAnswering:
    """Packed, with frozen clips."""
    model = apply_octav(small_bert(), CONFIG)
    return pack_octav(calibrate_octav(model, [batch()], weights=True, progress_bar=False)).eval()


def codes_of(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The integers of each quantizer in a forward pass, whether it returns values or codes."""
    found: dict[str, list[torch.Tensor]] = {}

    def take(name: str, quantizer: FakeQuantize, output: object) -> None:
        if not isinstance(output, Codes):
            step = quantizer.frozen.clips.double() / 2 ** (quantizer.num_bits - quantizer.frozen.signed)
            found.setdefault(name, []).append((output.double() / step).round().long())
        elif output.integers.dtype == torch.uint8:
            found.setdefault(name, []).append(output.integers.long() + output.lowest)
        else:
            found.setdefault(name, []).append(output.integers.long())

    handles = [
        quantizer.register_forward_hook(lambda module, args, output, name=name: take(name, module, output))
        for name, quantizer in model.named_modules()
        if isinstance(quantizer, FakeQuantize) and not name.endswith("weight_quantizer")
    ]
    logits(model, batch())
    for handle in handles:
        handle.remove()
    return found


def test_same_answers_from_the_same_codes(model: BertForQuestionAnswering) -> None:
    expected, simulated = logits(model, batch()), codes_of(model)
    for reference in (True, False):
        assert convert_octav(model, reference=reference) is model
        integer = codes_of(model)
        not_called = simulated.keys() - integer.keys()  # fused attention has the codes of probabilities inside
        assert all("probabilities" in name and not reference for name in not_called)
        # No code flips in so small a model. Codes that layers share are computed once.
        assert all(torch.equal(simulated[name][0], integer[name][0]) for name in integer)
        torch.testing.assert_close(logits(model, batch()), expected, rtol=0, atol=2e-6)


def test_a_model_that_is_not_packed_is_packed(small_bert: MakeBert) -> None:
    model = convert_octav(apply_octav(small_bert(), CONFIG))
    assert all(row.arithmetic for row in coverage_report(model) if row.bits)
    assert any(isinstance(module, PackedLayer) for module in model.modules())


def test_refused(small_bert: MakeBert) -> None:
    with pytest.raises(ValueError, match="convert_octav.*apply_octav"):
        convert_octav(small_bert())
    with pytest.raises(TypeError, match="convert_octav"):
        convert_octav("bert")  # type: ignore[type-var]


@pytest.mark.parametrize("how", ["copy", "pickle", "torch.save"])
def test_copies(model: BertForQuestionAnswering, how: str) -> None:
    expected = logits(convert_octav(model), batch())
    buffer = io.BytesIO()
    if how == "copy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer)
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(logits(other, batch()), expected)
    assert str(coverage_report(other)) == str(coverage_report(model))


def test_what_is_saved_is_the_packed_form(model: BertForQuestionAnswering, tmp_path: Path) -> None:
    expected, names = logits(model, batch()), list(model.state_dict())
    convert_octav(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch()), expected)
    assert torch.equal(logits(convert_octav(loaded), batch()), logits(model, batch()))


def test_loading_other_weights(model: BertForQuestionAnswering, small_bert: MakeBert) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, buffer in other.named_buffers():
            if name.endswith("packed_data"):
                buffer.copy_(buffer.flip(0))
            elif name.endswith("scale"):
                buffer.mul_(1.5)
    convert_octav(model).load_state_dict(other.state_dict())
    assert torch.equal(logits(model, batch()), logits(convert_octav(other), batch()))
    model.load_state_dict({name: x.clone() for name, x in other.state_dict().items()}, assign=True)
    assert torch.equal(logits(model, batch()), logits(other, batch()))


def test_moved_to_another_dtype(model: BertForQuestionAnswering) -> None:
    expected = logits(copy.deepcopy(model).to(torch.bfloat16), batch())
    result = logits(convert_octav(model).to(torch.bfloat16), batch())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0, atol=0.05 * float(expected.float().std()))


@pytest.mark.parametrize("undo", [unpack_octav, remove_octav])
def test_undone(model: BertForQuestionAnswering, undo: Callable[[nn.Module], nn.Module]) -> None:
    other = undo(copy.deepcopy(model))
    undo(convert_octav(model))
    assert [type(module) for module in model.modules()] == [type(module) for module in other.modules()]
    assert torch.equal(logits(model, batch()), logits(other, batch()))
    assert not any("arithmetic" in module.__dict__ and str(module.arithmetic) for module in model.modules())
    loss = model(**batch()).start_logits.square().sum()
    loss.backward()


def test_gradients_are_refused(model: BertForQuestionAnswering) -> None:
    convert_octav(model)
    model(**batch())  # packing froze all parameters
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"no gradient.*unpack_octav"):
        model(**batch())


def test_coverage(model: BertForQuestionAnswering) -> None:
    report = coverage_report(convert_octav(model))
    modules = {name for name, m in model.named_modules() if isinstance(m, PackedLayer | QuantizedAttention)}
    assert {row.module for row in report if row.arithmetic.startswith("integers")} == modules
    assert f"{len(modules)} of {len(modules)} modules compute integer matmuls" in report.summary()
    assert "integers" in str(report)
    check = check_coverage(model, batch())
    assert check == []
    assert check.matmuls == len(modules) + sum(isinstance(m, QuantizedAttention) for m in model.modules())


def test_what_stays_in_float_is_listed(small_bert: MakeBert) -> None:
    overrides = {"qa_outputs": {"activation_bits": None}}
    model = apply_octav(small_bert(), OctavConfig(quantize_attention=False, module_overrides=overrides))
    report = coverage_report(convert_octav(model))
    (weight,) = (row for row in report if row.module == "qa_outputs" and row.operand == "weight")
    assert (weight.bits, weight.arithmetic) == (4, "")
    assert "12 of 13 modules compute integer matmuls" in report.summary()
    assert "values" in str(report)
    logits(model, batch())


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_whole(small_bert: MakeBert, frozen: bool) -> None:
    model = apply_octav(small_bert(), CONFIG)
    if frozen:
        calibrate_octav(model, [batch()], weights=True, progress_bar=False)
    expected = logits(convert_octav(model).eval(), batch())
    torch.compiler.reset()
    result = logits(torch.compile(model, fullgraph=True), batch())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-2)


def two_layers(kind: str, seed: int = 0, bits: int = 8) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    layers = {
        "Linear": lambda: (nn.Linear(16, 8), nn.Linear(8, 4)),
        "Conv1d": lambda: (nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 4, 3)),
        "Conv2d": lambda: (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)),
    }
    x = torch.randn({"Linear": (5, 16), "Conv1d": (2, 3, 8), "Conv2d": (2, 3, 8, 8)}[kind])
    first, second = layers[kind]()
    model = apply_octav(nn.Sequential(first, nn.ReLU(), second).eval(), OctavConfig(bits, 8, quantize_attention=False))
    return calibrate_octav(model, [x], weights=True, progress_bar=False), x


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d"])
@torch.no_grad()
def test_compiled_and_exported_alone(kind: str) -> None:
    model, x = two_layers(kind)
    convert_octav(model)
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for each in (x, torch.cat([x, x, x]), x[1:]):
        torch.testing.assert_close(compiled(each), model(each), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_memory_format_of_convolutions() -> None:
    model, x = two_layers("Conv2d")
    x = x.to(memory_format=torch.channels_last)
    expected = model(x)
    result = convert_octav(model)(x)
    assert result.stride() == expected.stride()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d"])
@torch.no_grad()
def test_empty_and_unbatched_inputs(kind: str) -> None:
    model, x = two_layers(kind)
    expected = [model(each) for each in (x[:0], x[0])]
    convert_octav(model)
    for each, of_float in zip((x[:0], x[0]), expected, strict=True):
        torch.testing.assert_close(model(each), of_float, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *(("Linear", shape) for shape in [(2, 7), (0, 7), ()]),
        *(("Conv1d", shape) for shape in [(2, 4, 8), (2, 3, 0), (8,)]),
        *(("Conv2d", shape) for shape in [(2, 4, 8, 8), (2, 3, 0, 8), (1, 2, 3, 8, 8)]),
    ],
)
def test_a_shape_that_does_not_fit_is_an_error_with_the_name(kind: str, shape: tuple[int, ...]) -> None:
    model, _ = two_layers(kind)
    with torch.no_grad(), pytest.raises(RuntimeError):  # as of the float layer
        model(torch.zeros(shape))
    convert_octav(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"^0: an input of shape .* {kind} with a weight of shape"):
        model(torch.zeros(shape))


@pytest.mark.slow
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_loaded_weight_is_compiled_and_exported(bits: int, assign: bool) -> None:
    """The integers that a kernel has prepared follow the weight."""
    (model, x), (other, _) = two_layers("Linear", 0, bits), two_layers("Linear", 1, bits)
    convert_octav(model)
    expected = convert_octav(other)(x)
    model.load_state_dict(other.state_dict(), assign=assign)
    torch.compiler.reset()
    for run in (torch.export.export(model, (x,)).module(), torch.compile(model, fullgraph=True), model):
        assert torch.equal(run(x), expected)


def test_a_copy_without_values_prepares_nothing() -> None:
    model, x = two_layers("Linear")
    file = io.BytesIO()
    torch.save(convert_octav(model), file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = torch.load(file, map_location="meta", weights_only=False)
    copied.to_empty(device="cpu").load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(copied(x), model(x))


@pytest.mark.slow
@torch.no_grad()
def test_copies_are_compiled_and_exported() -> None:
    model, x = two_layers("Linear")
    expected = convert_octav(model)(x)
    torch.compiler.reset()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for run in (torch.export.export(copied, (x,)).module(), torch.compile(copied, fullgraph=True)):
            assert torch.equal(run(x), expected)
