"""ResNets and MobileNets: all operands on the grid, Trainer, saving, loading and restoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from octav_hf import OctavConfig, apply_octav, coverage_report, remove_octav
from octav_hf.nn import QuantizedConv2d
from tests.resnet_outside_transformers import ResNet

MakeModel = Callable[..., nn.Module]
EIGHT_BIT_EDGES = {"first_last_bits": 8}


@pytest.fixture(params=["basic", "bottleneck", "mobilenet", "plain"])
def make(request: pytest.FixtureRequest, small_resnet: MakeModel, small_mobilenet: MakeModel) -> MakeModel:
    """A function that makes a small image classifier in eval mode, always the same one."""
    if request.param == "mobilenet":
        return small_mobilenet
    if request.param == "plain":

        def plain(seed: int = 0) -> nn.Module:
            torch.manual_seed(seed)
            return ResNet().eval()

        return plain
    return lambda **changes: small_resnet(layer_type=request.param, **changes)


def images(seed: int = 0, size: int = 4) -> torch.Tensor:
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(x)
    return getattr(output, "logits", output)


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


class Products(TorchDispatchMode):
    """Records the operands of every convolution and matrix product as ``(input, weight)``, weights by output row."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket is torch.ops.aten.convolution:
            self.seen.append((args[0].detach(), args[1].detach().flatten(1)))
        elif func.overloadpacket is torch.ops.aten.addmm:
            self.seen.append((args[1].detach(), args[2].detach().T))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_product_has_operands_on_the_grid(make: MakeModel, mode: str) -> None:
    model = apply_octav(make(), OctavConfig(weight_bits=3, activation_bits=4)).train(mode == "train")
    with Products() as products:
        model(images())
    assert len(products.seen) == len(layers(model))
    for x, weight in products.seen:
        assert 1 < x.unique().numel() <= 16
        assert all(row.unique().numel() <= 8 for row in weight)
    assert any(x.min() >= 0 and x.unique().numel() > 8 for x, _ in products.seen)  # unsigned
    assert products.seen[0][0].min() < 0


def test_the_report_lists_every_layer(make: MakeModel) -> None:
    model = apply_octav(make(), OctavConfig())
    report = coverage_report(model)
    assert not report.left_in_float()
    convolutions = sum(isinstance(module, nn.Conv2d) for _, module in layers(model))
    assert len(report.quantized("convolution")) == 2 * convolutions
    assert len(report.quantized("linear")) == 2
    assert report.summary().splitlines() == [
        "2 of 2 linear operands quantized",
        f"{2 * convolutions} of {2 * convolutions} convolution operands quantized",
    ]


def test_remove_gives_bit_identical_outputs(make: MakeModel) -> None:
    model, x = make(), images()
    before = logits(model, x)
    assert not torch.equal(logits(apply_octav(model, OctavConfig()), x), before)
    assert torch.equal(logits(remove_octav(model), x), before)
    assert {type(module) for module in model.modules()} == {type(module) for module in make().modules()}


class Images(torch.utils.data.Dataset):
    """Random images with random labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": images(index, 1)[0], "labels": torch.tensor(index % 5)}


def train(model: nn.Module, output_dir: Path, steps: int = 2) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Images())
    trainer.train()
    return trainer


@pytest.fixture(params=["basic", "bottleneck", "mobilenet"])
def make_transformers(request: pytest.FixtureRequest, small_resnet: MakeModel, small_mobilenet: MakeModel) -> MakeModel:
    """As ``make``, Transformers' models only."""
    return small_mobilenet if request.param == "mobilenet" else lambda: small_resnet(layer_type=request.param)


@pytest.mark.slow
def test_trains_from_scratch_and_comes_back_bit_identical(make_transformers: MakeModel, tmp_path: Path) -> None:
    model = apply_octav(make_transformers(), OctavConfig(**EIGHT_BIT_EDGES))
    train(model, tmp_path)
    for name, parameter in make_transformers().named_parameters():
        assert not torch.equal(parameter, model.get_parameter(name)), f"{name} was not trained"
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded, images(9)), logits(model, images(9)))
    assert str(coverage_report(loaded)) == str(coverage_report(model))


@pytest.mark.slow
def test_retrains_from_a_float_checkpoint(make_transformers: MakeModel, tmp_path: Path) -> None:
    make_transformers().save_pretrained(tmp_path / "float")
    config = OctavConfig(**EIGHT_BIT_EDGES)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "float", quantization_config=config)
    applied = apply_octav(make_transformers(), config)
    assert torch.equal(logits(loaded, images()), logits(applied, images()))
    train(loaded, tmp_path / "run")
    assert not torch.equal(logits(loaded.eval(), images()), logits(applied, images()))


def test_a_plain_resnet_trains() -> None:
    torch.manual_seed(0)
    model = apply_octav(ResNet(), OctavConfig(**EIGHT_BIT_EDGES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images()), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def quantizer_bits(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Bits of weight and input of each layer, in order."""
    return ((m.weight_quantizer.num_bits, m.input_quantizer.num_bits) for _, m in layers(model))


def test_first_and_last_layer_at_eight_bits(make: MakeModel) -> None:
    model = apply_octav(make(), OctavConfig(weight_bits=3, activation_bits=4, first_last_bits=8))
    first, *between, last = quantizer_bits(model)
    assert (first, last) == ((8, 8), (8, 8))
    assert set(between) == {(3, 4)}
    with Products() as products:
        model(images())
    assert products.seen[0][0].unique().numel() > 100
    assert products.seen[-1][0].unique().numel() > 16


def test_first_and_last_keep_a_float_side_in_float(small_resnet: MakeModel) -> None:
    model = apply_octav(small_resnet(), OctavConfig(activation_bits=None, first_last_bits=8))
    assert model.classifier[1].weight_quantizer.num_bits == 8
    assert type(model.classifier[1].input_quantizer) is nn.Identity


def test_one_clip_for_the_whole_weight(small_resnet: MakeModel) -> None:
    config = OctavConfig(module_overrides={"classifier": {"weight_granularity": "tensor"}})
    model = apply_octav(small_resnet(), config)
    head, stem = model.classifier[1], model.resnet.embedder.embedder.convolution
    assert head.weight_quantizer.compute_clip(head.weight).shape == ()
    assert head.weight_quantizer(head.weight).unique().numel() <= 16
    assert stem.weight_quantizer.compute_clip(stem.weight).shape == (8, 1, 1, 1)
    rows = {row.module: row.clip_cell for row in coverage_report(model) if row.operand == "weight"}
    assert rows["classifier.1"] == "octav per tensor"
    assert rows["resnet.embedder.embedder.convolution"] == "octav per channel"


def test_a_convolution_that_computes_something_else_is_refused() -> None:
    class Standardized(nn.Conv2d):
        pass

    net = nn.Sequential(nn.Conv2d(1, 2, 1), Standardized(2, 2, 3))
    with pytest.raises(
        ValueError, match=r"1: Standardized with weight of shape \(2, 2, 3, 3\) is a subclass of nn.Conv2"
    ):
        apply_octav(net, OctavConfig())
    assert type(net[0]) is nn.Conv2d
    apply_octav(net, OctavConfig(exclude_modules=["1"]))
    assert isinstance(net[0], QuantizedConv2d)
