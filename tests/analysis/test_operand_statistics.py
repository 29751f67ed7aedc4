"""Statistics of operands against float64 arithmetic on what the quantizers were called with."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, calibrate_octav, convert_octav, coverage_report, pack_octav
from octav_hf.analysis.operand_statistics import OperandStatistics, OperandStatisticsHooks, operand_statistics
from octav_hf.analysis.operand_sums import OperandSums, read
from octav_hf.nn import FakeQuantize, FrozenClips, QuantizedAttention, QuantizedLayer
from tests.architectures.models import ARCHITECTURES, Architecture

Tensor = torch.Tensor
MakeBert = Callable[..., BertForQuestionAnswering]

FINE = {**dict.fromkeys(("input", "query", "key", "probabilities"), "token"), "value": "channel"}
CONFIGS = {
    "paper": OctavConfig(),
    "embeddings at 8 bits": OctavConfig(embedding_bits=8),
    "asymmetric": OctavConfig(asymmetric_activations=True, activation_clip="max"),
    "asymmetric per token": OctavConfig.accurate(),
    "groups": OctavConfig.groups(group_size=32),
    "static groups": OctavConfig(activation_granularity={"input": "group"}, group_size=32),
    "per head": OctavConfig(activation_granularity={"query": "attn_head", "value": "attn_head"}),
    "activations in float": OctavConfig(activation_bits=None),
}


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Token ids and masks, each batch with another number of sequences and of padding."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 100, (1 + number, 16), generator=generator) for number in range(count)]
    return [{"input_ids": each, "attention_mask": (torch.arange(16) < 16 - len(each)).expand_as(each)} for each in ids]


def quantizers(model: nn.Module) -> dict[tuple[str, str], FakeQuantize]:
    """Module and operand -> quantizer, by what modules have."""
    return {
        (path, name.removesuffix("_quantizer")): child
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLayer | QuantizedAttention)
        for name, child in module.named_children()
        if isinstance(child, FakeQuantize)
    }


def calls(model: nn.Module, inputs: Sequence[dict[str, Tensor]]) -> dict[tuple[str, str], list[tuple[Tensor, Tensor]]]:
    """Operand and its quantized form, of every call of each quantizer."""
    met: Any = defaultdict(list)
    handles = [
        quantizer.register_forward_hook(
            lambda _, args, output, key=key: met[key].append((args[0].detach(), output.detach()))
        )
        for key, quantizer in quantizers(model).items()
    ]
    with torch.no_grad():
        for batch in inputs:
            model(**batch)
    for handle in handles:
        handle.remove()
    return met


def joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All operands and all quantized ones, flat and in float64."""
    return tuple(torch.cat([part.double().flatten() for part in parts]) for parts in zip(*pairs, strict=True))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_errors_are_those_of_all_calls_together(small_bert: MakeBert, config: OctavConfig) -> None:
    model = apply_octav(small_bert(), config)
    if config.activation_clip == "octav" and config.activation_bits:
        calibrate_octav(model, batches(), learned=True, progress_bar=False)
    found = operand_statistics(model, batches())
    listed = [(row.module, row.operand, row.bits) for row in coverage_report(model) if row.bits is not None]
    assert [(each.module, each.operand, each.bits) for each in found] == listed
    met = calls(model, batches())
    for each in found:
        pairs = met[each.module, each.operand]
        is_weight = each.operand == "weight" and "embeddings" not in each.module
        x, quantized = joined(pairs[:1] if is_weight else pairs)
        assert each.elements == len(x)
        signal, noise = x.square().sum(), (x - quantized).square().sum()
        assert each.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)
        assert (each.lowest, each.highest) == (x.min(), x.max())


def test_every_operand_counts_though_layers_share_their_quantized_input(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    found = {(each.module, each.operand): each for each in operand_statistics(model, batches())}
    attention = "bert.encoder.layer.0.attention.self"
    shared = [found[f"{attention}.{name}", "input"] for name in ("query", "key", "value")]
    tokens = sum(batch["input_ids"].numel() for batch in batches())
    assert [each.elements for each in shared] == [tokens * 32] * 3
    assert len({each.sqnr_db for each in shared}) == 1


@pytest.mark.parametrize(
    ("config", "dims"),
    [
        (OctavConfig(), None),
        (OctavConfig(activation_granularity=FINE), (-1,)),
        (OctavConfig(activation_clip="mse", asymmetric_activations=True), None),
    ],
    ids=["tensor", "token", "asymmetric"],
)
def test_shares_and_clips(small_bert: MakeBert, config: OctavConfig, dims: tuple[int, ...] | None) -> None:
    model = apply_octav(small_bert(), config)
    met, asymmetric = calls(model, batches()), 0
    for each in operand_statistics(model, batches()):
        quantizer = quantizers(model)[each.module, each.operand]
        pairs = met[each.module, each.operand]
        if each.operand == "weight":
            pairs = pairs[:1]
        outside = zeroed = 0
        clips, offsets = [], []
        for x, quantized in pairs:
            grid = quantizer.dynamic_grid(x)
            offset = 0.0 if grid.offset is None else grid.offset.item()
            signed = bool(grid.signed)
            value = x.double() - offset
            outside += int(((value > grid.clip) | (value < (-grid.clip if signed else 0))).sum())
            levels = offset + grid.clip / 2 ** (each.bits - signed) * torch.arange(-8 * signed, 16 - 8 * signed).view(
                -1, *[1] * x.dim()
            )
            nearest_to_zero = levels.gather(0, levels.abs().argmin(dim=0, keepdim=True))[0]
            zeroed += int(((x != 0) & torch.isclose(quantized, nearest_to_zero.expand_as(x), atol=1e-6)).sum())
            clips.append(grid.clip.double().flatten())
            offsets.append(offset)
        x, _ = joined(pairs)
        assert each.clipped_share == outside / len(x)
        assert each.zero_share == zeroed / int((x != 0).sum())
        clips = torch.cat(clips)
        assert each.clip == pytest.approx(clips.mean().item(), rel=1e-6)
        assert (each.lowest_clip, each.highest_clip) == (clips.min(), clips.max())
        assert each.asymmetric is (True if all(offsets) else False if not any(offsets) else None)
        asymmetric += bool(each.asymmetric)
    assert bool(asymmetric) is config.asymmetric_activations
    assert dims is None or len(clips) > 1


def test_negative_values_are_clipped_by_an_unsigned_grid() -> None:
    quantizer, sums, x = FakeQuantize(4, signed=False), OperandSums(), torch.tensor([-1.0, -0.5, 0.5, 1.0, 2.0])
    quantizer.freeze(FrozenClips(False, torch.tensor([1.0])))
    sums.add(quantizer, x, quantizer(x), quantizer.grid_of(x))
    [found] = read([sums])
    assert (found.clipped, found.nonzero, found.zeroed) == (3, 5, 2)


def test_histograms_count_every_value_and_show_the_grid(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    with torch.no_grad():  # an outlier in one batch, far beyond the clip
        model.bert.embeddings.word_embeddings.weight[7] *= 30
    met = calls(model, batches())
    for each in operand_statistics(model, batches(), histograms=True):
        pairs = met[each.module, each.operand]
        x, _ = joined(pairs[:1] if each.operand == "weight" else pairs)
        edges, counts = np.array(each.histogram.edges), np.array(each.histogram.counts)
        assert counts.sum() == each.elements
        assert (np.diff(edges) > 0).all()
        assert edges[0] <= x.min()
        assert x.max() <= edges[-1]
        inner = np.histogram(x.numpy(), bins=[-np.inf, *edges[1:-1], np.inf])[0]
        assert (inner == counts).all()
        assert len(counts) <= 130
        assert len(each.levels) == 16
        if each.operand == "input" and len(pairs) == 3:
            clip = np.median(
                [np.median(quantizers(model)[each.module, "input"].dynamic_grid(x).clip) for x, _ in pairs]
            )
            np.testing.assert_allclose(each.levels, np.arange(-8, 8) * clip / 8, rtol=1e-6)
    assert not any(each.histogram or each.levels for each in operand_statistics(model, batches()))


@pytest.mark.parametrize("name", ["Albert (shared layers)", "DebertaV2", "ResNet", "T5"])
def test_no_operand_of_an_architecture_is_left_out(name: str) -> None:
    architecture: Architecture = ARCHITECTURES[name]
    model = apply_octav(architecture.make().eval(), OctavConfig(embedding_bits=8))
    found = {(each.module, each.operand): each for each in operand_statistics(model, [architecture.batch()])}
    assert list(found) == [(row.module, row.operand) for row in coverage_report(model) if row.bits is not None]
    met = calls(model, [architecture.batch()])
    assert {key for key, each in found.items() if each.elements} == set(met)
    for key, pairs in met.items():
        once = key[1] == "weight" and not isinstance(model.get_submodule(key[0]), nn.Embedding)
        x, quantized = joined(pairs[:1] if once else pairs)
        assert found[key].elements == len(x)
        noise = (x - quantized).square().sum()
        expected = 10 * math.log10(x.square().sum() / noise) if noise else math.inf if x.any() else None
        assert found[key].sqnr_db == (None if expected is None else pytest.approx(expected, abs=1e-4))


def test_an_operand_that_no_batch_reached_says_so(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    found = OperandStatisticsHooks(model).result()
    assert len(found) == 34
    assert {each.elements for each in found} == {0}
    assert {each.sqnr_db for each in found} == {each.clip for each in found} == {None}


def test_packed_weights_are_compared_with_a_teacher_if_there_is_one(small_bert: MakeBert) -> None:
    teacher = small_bert(num_hidden_layers=1)
    config = OctavConfig(weight_granularity="group", group_size=32)
    model = apply_octav(copy.deepcopy(teacher), config)
    expected = operand_statistics(model, batches(), histograms=True)
    pack_octav(model)
    for each, before in zip(operand_statistics(model, batches(), True, teacher), expected, strict=True):
        assert (each.elements, each.clipped_share, each.histogram) == (
            before.elements,
            before.clipped_share,
            before.histogram,
        )
        assert each.sqnr_db == pytest.approx(before.sqnr_db, abs=1e-6)
    alone = operand_statistics(model, batches())
    assert {each.sqnr_db for each in alone if each.operand == "weight"} == {None}
    assert all(each.sqnr_db for each in alone if each.operand != "weight")
    with pytest.raises(ValueError, match=r"layer.0.attention.self.query: its packed weight of shape \(32, 32\)"):
        OperandStatisticsHooks(model, teacher=nn.Linear(2, 2))


def test_hooks_measure_training_steps_and_leave_them_alone(small_bert: MakeBert) -> None:
    def losses(hooked: bool) -> tuple[list[float], list[OperandStatistics]]:
        model = apply_octav(
            small_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), OctavConfig()
        ).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hooks, found = OperandStatisticsHooks(model), []
        for batch in batches():
            positions = {"start_positions": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}
            with hooks if hooked else torch.enable_grad():
                loss = model(**batch, **positions, end_positions=positions["start_positions"]).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found, hooks.result()

    measured, statistics = losses(True)
    plain, unmeasured = losses(False)
    assert measured == plain
    assert {each.elements for each in unmeasured} == {0}
    weights = [each for each in statistics if each.operand == "weight"]
    assert weights[0].elements == 3 * 32 * 32  # once each time that the hooks were entered
    assert not any(quantizer._forward_hooks for quantizer in quantizers(small_bert()).values())


def test_what_cannot_be_measured_is_refused(small_bert: MakeBert) -> None:
    with pytest.raises(ValueError, match="no module quantized by apply_octav"):
        operand_statistics(small_bert(), batches())
    model = apply_octav(small_bert(), OctavConfig())
    with pytest.raises(ValueError, match="got no batch"):
        operand_statistics(model, [])
    with pytest.raises(TypeError, match=r"write \[batch\]"):
        operand_statistics(model, batches()[0])
    calibrate_octav(model, batches(), progress_bar=False)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias[0] = math.nan
    with pytest.raises(ValueError, match="layer.0.attention.self query: the operand held NaN"):
        operand_statistics(model, batches())
    with pytest.raises(ValueError, match=r"layer.0.attention.self.* multiplies .* before convert_octav"):
        operand_statistics(convert_octav(apply_octav(small_bert(), OctavConfig())), batches())
