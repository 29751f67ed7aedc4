"""Each architecture with a small random model: full coverage, training, saving, restoring, generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    check_coverage,
    convert_octav,
    coverage_report,
    pack_octav,
    remove_octav,
)
from octav_hf.conversion.record import recorded_config
from octav_hf.nn import ATTENTION_OPERANDS, FakeQuantize, PackedLayer, QuantizedAttention, QuantizedLayer
from octav_hf.packing.pack import packed_layers

from .models import ARCHITECTURES, Architecture, Batch

KINDS = ("linear", "convolution", "attention")

Record = Callable[[str, object], None]

# One of each kind, an encoder, a decoder and convolutions, is left where the slow ones are.
QUICK = ("Bert", "GPT-2", "ResNet")


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in QUICK else [pytest.mark.slow]


each = pytest.mark.parametrize(
    "architecture", [pytest.param(a, id=name, marks=marks(name)) for name, a in ARCHITECTURES.items()]
)
each_implementation = pytest.mark.parametrize(
    ("architecture", "implementation"),
    [
        pytest.param(architecture, implementation, id=f"{name}-{implementation}", marks=marks(name))
        for name, architecture in ARCHITECTURES.items()
        for implementation in architecture.implementations
    ],
)
each_with_both_implementations = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=name, marks=marks(name)) for name, a in ARCHITECTURES.items() if a.implementations_agree],
)
each_that_generates = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=name, marks=marks(name)) for name, a in ARCHITECTURES.items() if a.generates],
)


def logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@each_implementation
def test_covered(architecture: Architecture, implementation: str, record_property: Record) -> None:
    model = apply_octav(architecture.make(implementation), OctavConfig())
    report = coverage_report(model)
    left = [row for row in report.left_in_float() if row.kind in KINDS]
    assert left == []
    batch = architecture.batch()
    for training in (False, True):
        check = check_coverage(model.train(training), batch)
        assert check.unexplained(report) == [], str(check)
        assert check == []
        assert check.matmuls >= (len(report.quantized("linear")) + len(report.quantized("convolution"))) / 2
    for kind in KINDS:
        record_property(kind, len(report.quantized(kind)))
    record_property("left in float", sorted({row.kind for row in report.left_in_float()}))


@each_implementation
def test_probabilities_are_told_from_other_operands(architecture: Architecture, implementation: str) -> None:
    """Exactly the outputs of softmaxes are quantized as probabilities; other operands have negative values."""
    model = apply_octav(architecture.make(implementation), OctavConfig())
    signs: dict[str, list[bool]] = {operand: [] for operand in ATTENTION_OPERANDS}
    attention = [module for module in model.modules() if isinstance(module, QuantizedAttention)]
    for module in attention:
        for operand, quantizer in module.operand_quantizers.items():
            quantizer.register_forward_pre_hook(
                lambda _, inputs, operand=operand: signs[operand].append(bool((inputs[0] < 0).any()))
            )
    logits(model, architecture.batch())
    assert set(signs.pop("probabilities")) <= {False}
    assert all(all(negative) for negative in signs.values())
    assert all(len(negative) >= len(attention) for negative in signs.values())


class Repeated(torch.utils.data.Dataset):
    """The rows of a batch, repeated."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Batch:
        return {name: values[index % len(values)] for name, values in self.batch.items()}


@each
def test_trains(architecture: Architecture, tmp_path: Path) -> None:
    model = apply_octav(architecture.make(), OctavConfig())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Repeated(architecture.batch()))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert torch.isfinite(torch.tensor(losses)).all()
    quantized = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    unchanged = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert unchanged & quantized <= weights_without_gradient(architecture)


def weights_without_gradient(architecture: Architecture) -> set[str]:
    """Parameters on which the float model's loss does not depend, such as a pooler that the head does not use."""
    model = architecture.make()
    model(**architecture.batch()).loss.backward()
    return {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}


@each
def test_saved_and_loaded(architecture: Architecture, tmp_path: Path) -> None:
    model = apply_octav(architecture.make(), OctavConfig())
    model.save_pretrained(tmp_path)
    loaded = architecture.model_class.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, architecture.batch()), logits(model, architecture.batch()))
    assert str(coverage_report(loaded)) == str(coverage_report(model))


@pytest.mark.parametrize("frozen", [False, True], ids=["dynamic", "frozen"])
@each
def test_packed(architecture: Architecture, tmp_path: Path, frozen: bool) -> None:
    model, batch = apply_octav(architecture.make(), OctavConfig()), architecture.batch()
    if frozen:
        calibrate_octav(model, [batch], progress_bar=False)
    expected, report = logits(model, batch), str(coverage_report(model))
    pack_octav(model)
    assert torch.equal(logits(model, batch), expected)
    assert str(coverage_report(model)) == report
    floating = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    model.save_pretrained(tmp_path)
    loaded = architecture.model_class.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), expected)
    assert len(packed_layers(loaded)) == len(packed_layers(model)) > 0
    assert [parameter.shape for parameter in loaded.parameters() if parameter.dim() > 1] == [w.shape for w in floating]
    check = check_coverage(loaded, batch)
    assert check == [], str(check)


def quantized_values(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    """The outputs of all quantizers in the order of the forward pass, and the logits."""
    values: list[torch.Tensor] = []
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    handles = [q.register_forward_hook(lambda module, args, output: values.append(output)) for q in quantizers]
    values.append(logits(model, batch))
    for handle in handles:
        handle.remove()
    return values


# Their layers are called on several tensors in one forward pass, whose clips differ, and a layer's input has one.
CALLED_AGAIN = ("Albert (shared layers)", "DebertaV2")


@each
def test_frozen(architecture: Architecture, tmp_path: Path) -> None:
    """Clips calibrated on one batch equal the dynamic clips; they survive saving, and the model generates with them."""
    model, dynamic = (apply_octav(architecture.make(), OctavConfig()) for _ in range(2))
    batch = architecture.batch()
    report = coverage_report(calibrate_octav(model, [batch], progress_bar=False))
    assert {row.frozen for row in report if row.bits and row.operand != "weight"} == {True}
    got, expected = quantized_values(model, batch), quantized_values(dynamic, batch)
    equal = len(got) == len(expected) and all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert equal is (architecture not in [ARCHITECTURES[name] for name in CALLED_AGAIN])
    assert check_coverage(model, batch) == []

    model.save_pretrained(tmp_path)
    loaded = architecture.model_class.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert str(coverage_report(loaded)) == str(report)
    assert loaded.config.quantization_config.to_dict() == recorded_config(model).to_dict()
    if architecture.generates:
        prompt = {name: value for name, value in batch.items() if name != "labels"}
        assert torch.equal(Generation(loaded)(**prompt), Generation(model)(**prompt))


@each_implementation
def test_integer(architecture: Architecture, implementation: str) -> None:
    """After conversion all layers and attention modules use integers and match the float64 reference."""
    model, batch = apply_octav(architecture.make(implementation), OctavConfig()), architecture.batch()
    expected = logits(pack_octav(calibrate_octav(model, [batch], progress_bar=False)), batch)
    reference = logits(convert_octav(model, reference=True), batch)
    got = logits(convert_octav(model), batch)
    report = coverage_report(model)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLayer | QuantizedAttention)}
    assert {row.module for row in report if row.arithmetic.startswith("integers")} == packed
    assert check_coverage(model, batch) == []
    for result in (reference, got):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


@each_implementation
def test_removed(architecture: Architecture, implementation: str) -> None:
    model, batch = architecture.make(implementation), architecture.batch()
    before = logits(model, batch)
    assert not torch.equal(logits(apply_octav(model, OctavConfig()), batch), before)
    assert torch.equal(logits(remove_octav(model), batch), before)
    assert [type(module) for module in model.modules()] == [type(module) for module in architecture.make().modules()]


@each_with_both_implementations
def test_eager_and_sdpa_agree(architecture: Architecture) -> None:
    eager, sdpa = (apply_octav(architecture.make(name), OctavConfig()) for name in ("eager", "sdpa"))
    batch = architecture.batch()
    torch.testing.assert_close(logits(eager, batch), logits(sdpa, batch), rtol=0, atol=1e-5)


class Generation(nn.Module):
    """Text generation as a forward pass, for the coverage check."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)


@each_that_generates
def test_generates_with_a_cache(architecture: Architecture) -> None:
    generation = Generation(apply_octav(architecture.make(), OctavConfig()))
    prompt = {name: value for name, value in architecture.batch().items() if name != "labels"}
    tokens = generation(**prompt)
    new = tokens.shape[1] - (1 if generation.model.config.is_encoder_decoder else prompt["input_ids"].shape[1])
    assert new == 4
    check = check_coverage(generation, prompt)
    assert check == []
    assert check.matmuls > 3 * len(coverage_report(generation).quantized("attention")) / 2
