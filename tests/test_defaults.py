"""Torch's default device and dtype have no effect: every allocation names device and dtype."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors
from transformers import BertConfig, BertForTokenClassification

import octav_hf
from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    check_coverage,
    coverage_report,
    distill,
    pack_octav,
    remove_octav,
    uncalibrate_octav,
    unpack_octav,
)
from octav_hf.functional import CLIP_RULES, fake_quantize, octav_clip, quantization_error, round_to_grid
from octav_hf.functional.bit_packing import pack_bits, unpack_bits
from octav_hf.functional.kernels import cpu
from octav_hf.functional.kernels.compilation import SWITCH

Tensor = torch.Tensor
PACKAGE = Path(octav_hf.__file__).parent
# Small; by the C++ library and compiled loops; a long row.
SHAPES = [(4, 6), (48, 1024), (1, 1 << 19)]


def values(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def of_clips(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Every rule on signed and unsigned grids, per tensor and per row, and the error of each clip."""
    x = values(shape).to(dtype)
    for name in sorted(set(CLIP_RULES) - {"tests"}):
        for dim in (None, 1):
            for signed in (True, False):
                options = {"num_points": 5} if name == "mse_sweep" else {}
                clip = CLIP_RULES[name](x, 4, signed=signed, dim=dim, **options)
                yield clip
                yield quantization_error(x, clip, 4, signed=signed, dim=dim)
                yield round_to_grid(x, clip, 4, signed=signed)


def of_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Every gradient estimator, forward and backward."""
    for gradient in ("ste", "pwl", "mad"):
        for signed in (True, False):
            x = values(shape).to(dtype).requires_grad_()
            y = fake_quantize(x, octav_clip(x, 4, signed=signed), 4, signed=signed, gradient=gradient)
            y.sum().backward()
            yield from (y.detach(), x.grad)


def of_packed_bits() -> Iterator[Tensor]:
    for bits in range(2, 9):
        levels = (values((3, 13)) * 100).to(torch.int8) >> (8 - bits)
        packed = pack_bits(levels, bits)
        yield from (packed, unpack_bits(packed, bits, 13))


def of_a_model(float_model: nn.Module, batch: dict) -> Iterator[Tensor | str | None]:
    """The life of a model: training with a teacher, calibration, both reports, packing and unpacking."""
    labelled = batch | {"labels": batch["input_ids"] % 3, "num_items_in_batch": batch["attention_mask"].sum()}
    model = apply_octav(
        copy.deepcopy(float_model),
        OctavConfig(
            weight_bits=4, embedding_bits=8, activation_granularity={"key": "token"}, asymmetric_activations=True
        ),
    )
    handle = distill(model, copy.deepcopy(float_model), weight=0.5)
    output = model.train()(**labelled)
    output.loss.backward()
    yield output.loss.detach()
    yield from (parameter.grad for parameter in model.parameters())
    handle.remove()
    yield from model.eval()(**batch).to_tuple()
    calibrate_octav(model, [batch], progress_bar=False)
    yield from model(**batch).to_tuple()
    yield str(coverage_report(model))
    yield str(check_coverage(model, batch))
    pack_octav(model)
    yield from model(**batch).to_tuple()
    yield from model.state_dict().values()
    uncalibrate_octav(unpack_octav(model))
    yield from model(**batch).to_tuple()
    yield from remove_octav(model)(**batch).to_tuple()


def same(found: Tensor | str | None, expected: Tensor | str | None) -> bool:
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        alike = (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
        return alike and torch.equal(found, expected)
    return found == expected


@pytest.fixture(
    params=[("meta", torch.float32), ("cpu", torch.float64), ("meta", torch.bfloat16)],
    ids=["meta", "float64", "meta and bfloat16"],
)
def set_defaults(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """A function that sets torch's default device and dtype until the test ends."""

    def change() -> None:
        device, dtype = request.param
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("compiled", ["1", "0"], ids=["compiled", "plain"])
def test_functions(set_defaults: Callable[[], None], compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, compiled)

    def results() -> list[Tensor]:
        found = [y for shape in SHAPES for y in of_clips(shape, torch.float32)] + list(of_packed_bits())
        found += [y for shape in SHAPES[:2] for y in of_gradients(shape, torch.float32)]
        found += [*of_clips((4, 6), torch.bfloat16), *of_gradients((4, 6), torch.bfloat16)]
        return found

    expected = results()
    set_defaults()
    found = results()
    assert [index for index, pair in enumerate(zip(found, expected, strict=True)) if not same(*pair)] == []


def test_a_model(set_defaults: Callable[[], None], padded_batch: dict) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForTokenClassification(BertConfig(vocab_size=100, num_labels=3, **sizes, **no_dropout))
    expected = list(of_a_model(model, padded_batch))
    set_defaults()
    found = list(of_a_model(model, padded_batch))
    assert [index for index, pair in enumerate(zip(found, expected, strict=True)) if not same(*pair)] == []


# Functions whose device is the default one unless it is given: what torch itself changes for a default device.
CONSTRUCTORS = {function.__name__ for function in _device_constructors()} | {"Generator"}
ALLOCATIONS = {f"torch.{name}" for name in CONSTRUCTORS}


def test_every_allocation_names_its_device_and_dtype() -> None:
    unspecified = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
                assert CONSTRUCTORS.isdisjoint(alias.name for alias in node.names), where  # would not be seen below
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ALLOCATIONS:
                needed = {"device"} if ast.unparse(node.func) == "torch.Generator" else {"device", "dtype"}
                if not needed <= {keyword.arg for keyword in node.keywords}:
                    unspecified.append(f"{where}: {ast.unparse(node)}")
    assert unspecified == []


@pytest.mark.parametrize("shape", [(), (64, 1)], ids=["one clip", "a clip per row"])
def test_a_clip_on_another_device_is_refused(shape: tuple[int, ...]) -> None:
    x, clip = torch.randn(64, 1024), torch.ones(shape, device="meta")
    with pytest.raises(ValueError, match=r"clip of shape .* is on meta, but x of shape \(64, 1024\) is on cpu"):
        fake_quantize(x, clip, 4)


def test_compiled_code_refuses_memory_of_other_devices() -> None:
    signed = torch.tensor(True, device="cpu")
    with pytest.raises(ValueError, match=r"a tensor of shape \(1, 8\) is on meta"):
        cpu.octav_of_rows(torch.empty(1, 8, device="meta"), 4, signed, None, True)
    with pytest.raises(ValueError, match=r"a tensor of shape \(\) is on meta"):
        cpu.octav_of_rows(torch.zeros(1, 8, device="cpu"), 4, signed.to("meta"), None, True)
