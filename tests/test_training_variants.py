"""Ways to run the same training step give the same gradients: checkpointing, accumulation, memory formats, threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, MobileNetV2ForImageClassification, ResNetForImageClassification

from octav_hf import OctavConfig, apply_octav, calibrate_octav
from tests.replicas import replica_of

MakeBert = Callable[..., BertForQuestionAnswering]
MakeImageModel = Callable[..., ResNetForImageClassification | MobileNetV2ForImageClassification]
Tensor = torch.Tensor
DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


def span_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return output.start_logits.square().mean() + output.end_logits.logsumexp(dim=1).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert len(got) > 10
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_gives_the_same_gradients_with_dropout(
    small_bert: MakeBert, padded_batch: dict, use_reentrant: bool, implementation: str
) -> None:
    """The second forward pass has the same dropout and clips, and the cached clips of the weight."""
    found = []
    for checkpointing in (False, True):
        model = apply_octav(small_bert(attn_implementation=implementation, **DROPOUT), OctavConfig()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            layer_calls = []
            model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(lambda *_, c=layer_calls: c.append(1))
        torch.manual_seed(7)
        for _ in range(2):
            span_loss(model, padded_batch).backward()
        found.append(gradients(model))
    assert len(layer_calls) == 4, "the layer must run once more in each backward pass"
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_with_frozen_clips(small_bert: MakeBert, padded_batch: dict, use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = apply_octav(small_bert(**DROPOUT), OctavConfig())
        calibrate_octav(model, [padded_batch], progress_bar=False).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(7)
        span_loss(model, padded_batch).backward()
        found.append(gradients(model))
    assert_equal(found[1], found[0])


def test_checkpointing_under_autocast(small_bert: MakeBert, padded_batch: dict) -> None:
    found = []
    for checkpointing in (False, True):
        model = apply_octav(small_bert(**DROPOUT), OctavConfig()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = span_loss(model, padded_batch)
        loss.backward()
        found.append(gradients(model))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("frozen", [False, True], ids=["dynamic", "frozen"])
def test_accumulated_gradients_are_the_sum_of_those_of_the_micro_batches(
    small_bert: MakeBert, padded_batch: dict, frozen: bool
) -> None:
    """Each in a new model, without leftovers of earlier passes."""
    ids = torch.randint(0, 100, (4, 2, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part} for part in ids] + [padded_batch]

    def make() -> nn.Module:
        model = apply_octav(small_bert(), OctavConfig())  # without dropout
        return calibrate_octav(model, [padded_batch], progress_bar=False) if frozen else model

    model, expected = make(), {}
    for batch in batches:
        span_loss(model, batch).backward()
        alone = make()
        span_loss(alone, batch).backward()
        for name, gradient in gradients(alone).items():
            expected[name] = expected[name] + gradient if name in expected else gradient
    assert_equal(gradients(model), expected)


def test_micro_batches_add_up_to_the_batch_where_clips_are_frozen(small_bert: MakeBert) -> None:
    """Dynamic clips depend on the micro-batch; with frozen clips, nothing depends on how a batch is split."""
    ids = torch.randint(0, 100, (6, 12), generator=torch.Generator().manual_seed(1))
    found = []
    for parts in (1, 3):
        model = apply_octav(small_bert().double(), OctavConfig()).eval()
        calibrate_octav(model, [ids], progress_bar=False)
        for part in ids.chunk(parts):
            (span_loss(model, {"input_ids": part}) / parts).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", ["small_resnet", "small_mobilenet"])
@pytest.mark.parametrize("weight_granularity", ["channel", "tensor"])
def test_channels_last_models(make: str, weight_granularity: str, request: pytest.FixtureRequest) -> None:
    """In double precision, where the order of additions, which differs, moves no value to another level.

    It does decide whether a sum that cancels out is 0 or 1e-17, and a clip counts nonzero values: norms with a random
    bias leave no such sums.
    """
    make_model: MakeImageModel = request.getfixturevalue(make)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
    model = apply_octav(make_model().double(), OctavConfig(weight_granularity=weight_granularity)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data = torch.randn(module.bias.shape, generator=generator, dtype=torch.float64) / 2
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(model(pixel_values=images.to(memory_format=memory_format)).logits)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in convolutions)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"groups": 8}, {"stride": 2, "dilation": 2}], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["dynamic", "frozen"])
def test_channels_last_gradients(settings: dict, frozen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 8, 12, 12, generator=generator, dtype=torch.float64)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = apply_octav(nn.Sequential(nn.Conv2d(8, 16, 3, **settings)).double(), OctavConfig())
        if frozen:
            calibrate_octav(model, [images], progress_bar=False)
        model.to(memory_format=memory_format)
        x = images.to(memory_format=memory_format).detach().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append({"output": y.detach(), "images": x.grad, **gradients(model)})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_channels_last_with_the_fast_kernels() -> None:
    """A layer that is large enough for the kernels: equal levels, clips and gradients in float32."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    weight = torch.randn(64, 64, 3, 3, generator=generator) / 24
    images = torch.randn(2, 64, 24, 24, generator=generator)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = apply_octav(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), OctavConfig())
        layer[0].weight.data, layer[0].bias.data = weight.clone(), torch.zeros(64)
        layer.to(memory_format=memory_format)
        x = images.to(memory_format=memory_format).detach().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append([layer[0].weight_quantizer(layer[0].weight), y, x.grad, layer[0].weight.grad])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_data_parallel_without_devices(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig()).train()
    torch.manual_seed(0)
    expected = model(**padded_batch).start_logits
    parallel = nn.DataParallel(model)
    torch.manual_seed(0)
    got = parallel(**padded_batch).start_logits
    assert torch.equal(got, expected)
    got.sum().backward()
    assert model.qa_outputs.weight.grad.isfinite().all()


def test_threads_do_not_disturb_each_other(small_bert: MakeBert) -> None:
    """One forward pass per thread, as in ``nn.DataParallel``, here of the same model."""
    model = apply_octav(small_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), OctavConfig()).train()
    ids = torch.randint(0, 100, (8, 2, 16), generator=torch.Generator().manual_seed(0))

    def logits(batch: Tensor) -> Tensor:
        return model(input_ids=batch).start_logits.detach()

    expected = [logits(batch) for batch in ids]
    model.qa_outputs.weight_quantizer._kept = None  # the threads find kept clips missing, as replicas do
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(logits, [*ids, *ids]))
    for got, alone in zip(found, expected + expected, strict=True):
        assert torch.equal(got, alone)


def test_replicas_compute_as_the_model_does(small_bert: MakeBert, padded_batch: dict) -> None:
    """The replication of ``nn.DataParallel``, with shared parameters, which is possible on one device."""
    model = apply_octav(small_bert(), OctavConfig())
    with torch.no_grad():
        expected = model(**padded_batch).start_logits
        assert torch.equal(replica_of(model)(**padded_batch).start_logits, expected)
