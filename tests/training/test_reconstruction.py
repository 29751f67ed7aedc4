"""Reconstructed layers against float64 least squares, and what must not change."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    AlbertConfig,
    AlbertForQuestionAnswering,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    LongformerConfig,
    LongformerModel,
    T5Config,
    T5ForConditionalGeneration,
)

from octav_hf import OctavConfig, apply_octav, calibrate_octav, pack_octav, reconstruct
from octav_hf.training.least_squares import LeastSquares
from octav_hf.training.reconstruction import LayerError
from tests.question_answering import Spans

Tensor = torch.Tensor
MakeBert = Callable[..., BertForQuestionAnswering]
CONFIG = OctavConfig(weight_bits=4, activation_bits=4)


def batches(count: int = 4, size: int = 6) -> list[dict[str, Tensor]]:
    data = Spans(count * size)
    rows = [[data[index] for index in range(first, first + size)] for first in range(0, count * size, size)]
    return [
        {name: torch.stack([row[name] for row in part]) for name in ("input_ids", "attention_mask")} for part in rows
    ]


def calls(model: nn.Module, layer: Any, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a layer for tokens that are not padding, in float64."""
    found: list[tuple[Tensor, Tensor]] = []
    quantize = getattr(layer, "input_quantizer", nn.Identity())
    handle = layer.register_forward_hook(lambda _, args, output: found.append((quantize(args[0]), output)))
    with torch.no_grad():
        for batch in inputs:
            model(**batch)
    handle.remove()
    kept = torch.cat([batch["attention_mask"].bool().flatten() for batch in inputs])
    x, y = (torch.cat([pair[index].flatten(0, -2) for pair in found])[kept].double() for index in range(2))
    return x, y


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_sums_solve_the_damped_least_squares(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, w = (
        torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5 for shape in ((50, 7), (50, 3), (3, 7))
    )
    sums = LeastSquares(7, 3, torch.device("cpu"))
    sums.add(x[:20], y[:20])
    sums.add(x[20:], y[20:])
    centred = [part - part.mean(dim=0) if has_bias else part for part in (x, y)]
    damping = 0.3 * centred[0].square().sum() / 7
    # ‖Y - X Wᵀ‖² + λ‖W - w‖² as plain least squares, with rows for the damping.
    rows = torch.cat([centred[0], damping.sqrt() * torch.eye(7, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([centred[1], damping.sqrt() * w.t()])).solution.t()
    solved = sums.solve(w, 0.3, has_bias)
    torch.testing.assert_close(solved, expected)
    bias = (y - x @ solved.t()).mean(dim=0)
    torch.testing.assert_close(sums.best_bias(solved), bias)
    for each in (bias, bias + 1, None):
        error = (y - x @ solved.t() - (0 if each is None else each)).square().sum() / y.square().sum()
        assert sums.error(solved, each) == pytest.approx(error.item(), rel=1e-10)


def test_a_weight_whose_inputs_do_not_vary_is_kept() -> None:
    sums = LeastSquares(4, 2, torch.device("cpu"))
    sums.add(torch.ones(5, 4, dtype=torch.float64), torch.arange(10, dtype=torch.float64).view(5, 2))
    weight = torch.ones(2, 4, dtype=torch.float64)
    assert sums.solve(weight, 0.1, True) is weight
    assert sums.best_bias(weight).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.attention.self.key", "bert.encoder.layer.1.output.dense"])
def test_each_layer_is_the_least_squares_of_the_layers_before_it(small_bert: MakeBert, name: str) -> None:
    """Equal to a reconstruction of only this layer, and to the formula."""
    teacher, data = small_bert(), batches()
    model = apply_octav(copy.deepcopy(teacher), CONFIG)
    before = copy.deepcopy(model)
    errors = reconstruct(model, teacher, data, ridge=0.05, progress_bar=False)
    assert list(errors)[:4] == [
        f"bert.encoder.layer.0.attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")
    ]
    assert list(errors)[-1] == "qa_outputs"
    layer, ours = model.get_submodule(name), before.get_submodule(name)
    x, _ = calls(model, layer, data)
    _, y = calls(teacher, teacher.get_submodule(name), data)
    w = ours.weight.detach().double()
    xc, yc = x - x.mean(dim=0), y - y.mean(dim=0)
    damping = 0.05 * xc.square().sum() / x.shape[1]
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    expected = (yc.t() @ xc + damping * w) @ torch.linalg.inv(xc.t() @ xc + damping * eye)
    assert not torch.equal(layer.weight, ours.weight)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-4, atol=1e-6)
    quantized = layer.weight_quantizer(layer.weight).detach().double()
    torch.testing.assert_close(layer.bias.double(), (y - x @ quantized.t()).mean(dim=0), rtol=1e-4, atol=1e-6)
    error = (y - x @ quantized.t() - layer.bias.double()).square().sum() / y.square().sum()
    assert errors[name].after == pytest.approx(error.item(), rel=1e-6)
    quantized = ours.weight_quantizer(ours.weight).detach().double()
    error = (y - x @ quantized.t() - ours.bias.double()).square().sum() / y.square().sum()
    assert errors[name].before == pytest.approx(error.item(), rel=1e-6)


def test_errors_never_rise_and_the_outputs_come_closer(small_bert: MakeBert) -> None:
    teacher, data = small_bert(), batches(8)
    nn.init.normal_(teacher.qa_outputs.weight, std=0.5)
    model = apply_octav(copy.deepcopy(teacher), CONFIG)

    def distance() -> float:
        with torch.no_grad():
            pairs = [(model(**batch).start_logits, teacher(**batch).start_logits) for batch in data]
        return sum(float((ours - theirs).square().mean()) for ours, theirs in pairs)

    before = distance()
    errors = reconstruct(model, teacher, data, ridge=0.01, progress_bar=False)
    assert all(error.after <= error.before for error in errors.values())
    assert distance() < 0.95 * before


def test_what_is_float_already_fits(small_bert: MakeBert) -> None:
    """With 8 bits there is hardly anything to gain; a solved weight that is worse is not used."""
    teacher = small_bert()
    model = apply_octav(copy.deepcopy(teacher), OctavConfig(weight_bits=None, activation_bits=8))
    errors = reconstruct(model, teacher, batches(), ridge=1e9, progress_bar=False)
    assert all(error.after < 1e-2 for error in errors.values())
    for (name, weight), other in zip(model.named_parameters(), teacher.parameters(), strict=True):
        if name.endswith("weight"):
            torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-7)


def test_the_rest_of_the_model_and_the_teacher_stay(small_bert: MakeBert) -> None:
    teacher = small_bert().train()
    model = apply_octav(copy.deepcopy(teacher), CONFIG)
    calibrate_octav(model, batches(), progress_bar=False)
    model.train()
    before, theirs = (copy.deepcopy(each.state_dict()) for each in (model, teacher))
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    errors = reconstruct(model, teacher, batches(), ridge=0.01, progress_bar=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for each in (model, teacher) for module in each.modules())
    assert all(torch.equal(theirs[name], value) for name, value in teacher.state_dict().items())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {f"{name}.{part}" for name in errors for part in ("weight", "bias")}
    assert all(not module._forward_hooks for each in (model, teacher) for module in each.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model(**batches()[0]).start_logits.requires_grad


def test_transposed_layers_without_masks() -> None:
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4)).eval()
    for parameter in teacher.transformer.h.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    model = apply_octav(copy.deepcopy(teacher), CONFIG)
    data = [batch["input_ids"] for batch in batches(8)]
    errors = reconstruct(model, teacher, data, progress_bar=False)
    assert len(errors) == 8
    assert sum(error.after for error in errors.values()) < 0.95 * sum(error.before for error in errors.values())
    assert "lm_head" not in errors, "its weight is the embedding table"


@pytest.mark.parametrize("length", [10, 16], ids=["shorter targets", "targets as long as sources"])
def test_an_encoder_and_its_decoder(length: int) -> None:
    """Layers without a bias; the queries of cross-attention are the decoder's tokens, its keys the encoder's."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    teacher = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model = apply_octav(copy.deepcopy(teacher), CONFIG)
    data = []
    for batch in batches():
        labels = batch["input_ids"][:, :length].clone()
        labels[0, 6:] = -100
        data.append(batch | {"labels": labels})
    errors = reconstruct(model, teacher, data, ridge=0.05, progress_bar=False)
    for name, of_encoder in (
        ("decoder.block.0.layer.1.EncDecAttention.q", False),
        ("decoder.block.0.layer.1.EncDecAttention.k", True),
        ("encoder.block.0.layer.1.DenseReluDense.wo", True),
    ):
        found: dict[str, list[Tensor]] = {"x": [], "y": []}
        layer, other = model.get_submodule(name), teacher.get_submodule(name)
        layer.input_quantizer.register_forward_hook(lambda _, args, output, f=found: f["x"].append(output))
        other.register_forward_hook(lambda _, args, output, f=found: f["y"].append(output))
        with torch.no_grad():
            for batch in data:
                model(**batch), teacher(**batch)
        masks = [batch["attention_mask"].bool() if of_encoder else batch["labels"] != -100 for batch in data]
        x, y = (
            torch.cat([part[mask] for part, mask in zip(parts, masks, strict=True)]).double()
            for parts in found.values()
        )
        quantized = layer.weight_quantizer(layer.weight).detach().double()
        error = (y - x @ quantized.t()).square().sum() / y.square().sum()
        assert errors[name].after == pytest.approx(error.item(), rel=1e-6), name


def rows_of_first_layer(model: nn.Module, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The sum over the rows from which the first layer is reconstructed."""
    found = []
    monkeypatch.setattr(LeastSquares, "add", lambda self, x, y: found.append(x.sum(dim=0)))
    monkeypatch.setattr("octav_hf.training.reconstruction._improve", lambda *_: LayerError(1.0, 1.0))
    teacher = copy.deepcopy(model)
    apply_octav(model, OctavConfig(activation_bits=None, quantize_attention=False))
    reconstruct(model, teacher, [batch], progress_bar=False)
    return found[0]


def test_layers_on_tokens_before_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = LongformerModel(LongformerConfig(vocab_size=50, attention_window=[4], **sizes)).eval()
    (batch,) = batches(1, 4)
    batch = {name: values[:, :8].contiguous() % 50 for name, values in batch.items()}
    batch["attention_mask"][0, 2:] = 0
    seen = []
    model.encoder.layer[0].attention.self.query.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    assert seen[0].shape == (8, 4, 32)
    expected = seen[0][batch["attention_mask"].bool().t()].double().sum(dim=0)
    torch.testing.assert_close(rows_of_first_layer(model, batch, monkeypatch), expected)


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is ``[batch, choices, tokens]``, and layers see ``[batch * choices, tokens]``."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = BertForMultipleChoice(BertConfig(vocab_size=100, **sizes)).eval()
    (batch,) = batches(1, 4)
    batch = {name: values.view(2, 2, -1) for name, values in batch.items()}
    batch["attention_mask"][0, 1, 2:] = 0
    seen = []
    query = model.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    expected = seen[0][batch["attention_mask"].flatten(0, 1).bool()].double().sum(dim=0)
    torch.testing.assert_close(rows_of_first_layer(model, batch, monkeypatch), expected)


def test_layers_that_are_left(small_bert: MakeBert, caplog: pytest.LogCaptureFixture) -> None:
    teacher = small_bert()
    model = apply_octav(copy.deepcopy(teacher), OctavConfig(exclude_modules=["*.intermediate.dense"]))
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    first.query.weight.requires_grad_(False)
    first.key.bias.requires_grad_(False)
    second.value.weight = second.key.weight
    parametrize.register_parametrization(first.value, "weight", nn.Identity())
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        errors = reconstruct(model, teacher, batches(), progress_bar=False)
    left = "bert.encoder.layer.0.attention.self"
    for text in (
        f"{left}.query (it is frozen: requires_grad is False)",
        f"{left}.key (it is frozen: requires_grad is False)",
        f"{left}.value (its weight is parametrized)",
        "bert.encoder.layer.1.attention.self.key (its weight is shared with another module)",
        "5 linear layers were not reconstructed",
    ):
        assert text in caplog.text
    assert len(errors) == 11 - 5
    assert all("attention.self." not in name or name.endswith("1.attention.self.query") for name in errors)
    now = model.state_dict()
    assert all(torch.equal(before[name], now[name]) for name in before if f"{left}." in name or "intermediate" in name)


def test_a_layer_that_runs_several_times_is_left(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    teacher = AlbertForQuestionAnswering(AlbertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).eval()
    model = apply_octav(copy.deepcopy(teacher), CONFIG)
    with caplog.at_level(logging.WARNING):
        errors = reconstruct(model, teacher, batches(), progress_bar=False)
    assert list(errors) == ["albert.encoder.embedding_hidden_mapping_in", "qa_outputs"]
    assert "ffn_output (it was called several times)" in caplog.text


def test_what_is_refused(small_bert: MakeBert) -> None:
    teacher, data = small_bert(), batches()
    model = apply_octav(copy.deepcopy(teacher), CONFIG)
    with pytest.raises(ValueError, match=r"reconstruct: .* has no module quantized by apply_octav"):
        reconstruct(teacher, teacher, data)
    with pytest.raises(TypeError, match="a teacher that is an nn.Module, got str"):
        reconstruct(model, "bert", data)  # type: ignore[arg-type]
    for ridge in (0, -1.0, float("inf"), float("nan"), True, "1"):
        with pytest.raises(ValueError, match="ridge must be a finite number above 0, got"):
            reconstruct(model, teacher, data, ridge=ridge)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes an iterable of batches.* got dict; write \[batch\]"):
        reconstruct(model, teacher, data[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"each \(here number 1\) is a batch as a mapping"):
        reconstruct(model, teacher, ["text"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="got no batch"):
        reconstruct(model, teacher, [])
    with pytest.raises(
        ValueError, match=r"reconstruct: the teacher, a BertForQuestionAnswering, has no module 'bert.encoder.layer.1"
    ):
        reconstruct(model, small_bert(num_hidden_layers=1), data)
    with pytest.raises(
        ValueError, match=r"query: the teacher's layer returned .*\(96, 64\), but this one .*\(96, 32\)"
    ):
        reconstruct(model, small_bert(hidden_size=64), data)
    packed = pack_octav(apply_octav(copy.deepcopy(teacher), CONFIG))
    with pytest.raises(ValueError, match=r"is packed, but packed weights cannot be changed; call unpack_octav"):
        reconstruct(packed, teacher, data)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match="no layer of .* can be reconstructed"):
        reconstruct(frozen, teacher, data, progress_bar=False)
    with pytest.raises(
        ValueError, match="query: its inputs, or the outputs of the teacher's layer, consist of padding only"
    ):
        reconstruct(model, teacher, [batch | {"attention_mask": batch["attention_mask"] * 0} for batch in data[:1]])


def test_after_an_error_the_model_is_as_it_was(small_bert: MakeBert) -> None:
    teacher = small_bert()
    model = apply_octav(copy.deepcopy(teacher), CONFIG)
    teacher.qa_outputs.bias.data[0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="qa_outputs: its inputs, or the outputs of the teacher's layer, hold NaN or Inf"
    ):
        reconstruct(model, teacher, batches(), progress_bar=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_finished_does_not_run_again(small_bert: MakeBert) -> None:
    """A forward that another library has replaced is restored afterwards."""
    teacher, data = small_bert(num_hidden_layers=4), batches(2)
    model = apply_octav(copy.deepcopy(teacher), CONFIG)
    first, replaced = teacher.bert.encoder.layer[0], teacher.bert.encoder.layer[1]
    runs: list[int] = []
    first.intermediate.dense.register_forward_pre_hook(lambda *_: runs.append(1))
    forward = replaced.forward
    replaced.forward = forward
    errors = reconstruct(model, teacher, data, progress_bar=False)
    assert len(errors) == 25
    # To find the layers' order, to reconstruct this layer and the next, and to keep the module's output.
    assert len(runs) <= 1 + 3 * len(data)
    assert replaced.__dict__.pop("forward") == forward
    assert all("forward" not in module.__dict__ for each in (model, teacher) for module in each.modules())
