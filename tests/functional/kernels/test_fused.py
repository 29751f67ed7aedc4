"""Compiled functions: the same results as the plain ones, few compilations, and no crash without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from octav_hf.functional import fake_quantize, octav_clip
from octav_hf.functional.kernels import compilation, fused

Tensor = torch.Tensor
fake_quantize_module = sys.modules[fake_quantize.__module__]
LARGE = fused.MIN_NUMEL + 12_345

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda x: x,
    "contiguous": lambda x: x.view(-1, 5, 4),
    "transposed": lambda x: x.view(-1, 5, 4).transpose(0, 2),
    "every_second": lambda x: x.repeat(2)[::2],
    "expanded": lambda x: x[:50_000, None].expand(-1, 3),
    "a_size_of_1": lambda x: x[None, :, None],
}


@pytest.fixture(autouse=True)
def path() -> None:
    """Replaces the fixture that lowers the sizes above which kernels are used."""


def gaussian(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)


def value_and_gradient(x: Tensor, clip: Tensor, signed: bool, gradient: str) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = fake_quantize(x, clip, 4, signed=signed, gradient=gradient)
    incoming = torch.empty_like(y).copy_(torch.linspace(-1, 1, y.numel()).view(y.shape))  # in the layout of y
    return y.detach(), torch.autograd.grad(y, x, incoming)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_compiled_equals_plain_bit_for_bit(
    signed: bool, gradient: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = LAYOUTS[layout](gaussian(LARGE // 20 * 20 * 3))
    compiled = value_and_gradient(x, torch.tensor(1.3), signed, gradient)
    monkeypatch.setenv(compilation.SWITCH, "0")
    plain = value_and_gradient(x, torch.tensor(1.3), signed, gradient)
    assert torch.equal(compiled[0], plain[0])
    assert torch.equal(compiled[1], plain[1])
    assert compiled[0].shape == x.shape


@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
@pytest.mark.parametrize("size", [100, LARGE], ids=["plain", "large"])
def test_a_gradient_can_be_differentiated(size: int, gradient: str) -> None:
    """Double backward, as in a gradient penalty: the gradient of ``a * Q(x)`` is ``a`` times the factor."""
    x = gaussian(size)
    clip = torch.tensor(1.3)
    outside = {"ste": torch.ones_like(x), "pwl": torch.zeros_like(x), "mad": 1.3 / x.abs()}[gradient]
    factor = torch.where(x.abs() <= 1.3, torch.ones_like(x), outside)
    a = torch.full_like(x, 0.5).requires_grad_()
    y = a * fake_quantize(x.requires_grad_(), clip, 4, gradient=gradient)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(first, 0.5 * factor)
    (second,) = torch.autograd.grad(first.sum(), a)
    torch.testing.assert_close(second, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_compiled_rows_equal_plain_rows(gradient: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(300 * 200, dtype).view(300, 200)
    clip = octav_clip(x, 4, dim=1)
    compiled = value_and_gradient(x, clip, True, gradient)
    monkeypatch.setenv(compilation.SWITCH, "0")
    plain = value_and_gradient(x, clip, True, gradient)
    assert torch.equal(compiled[0], plain[0])
    assert torch.equal(compiled[1], plain[1])
    torch.testing.assert_close(octav_clip(x, 4, dim=1), clip, rtol=1e-6, atol=0)


# Sizes in memory, order in which the tensor's dimensions are those, and the dimensions that share a clip.
PARTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "per_row": ((3, 4, 60, 50), (0, 1, 2, 3), (-1,)),
    "per_token_of_a_transposed_tensor": ((3, 60, 4, 50), (0, 2, 1, 3), (-1,)),
    "per_head_of_a_transposed_tensor": ((3, 60, 4, 50), (0, 2, 1, 3), (-2, -1)),
    "per_channel": ((3, 60, 4, 50), (0, 2, 3, 1), (-1,)),
    "per_head_for_all_samples": ((3, 60, 4, 50), (0, 2, 1, 3), (0, -2, -1)),
    "per_channel_for_all_samples": ((3, 60, 4, 50), (0, 2, 3, 1), (0, -1)),
    "per_sample": ((3, 60, 4, 50), (0, 2, 1, 3), (1, 2, 3)),
    "one_by_one": ((3, 4, 60, 50), (0, 1, 2, 3), ()),
    "a_size_of_1": ((1, 4, 180, 50), (0, 2, 1, 3), (-1,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("gradient", ["pwl", "mad"])
def test_clips_of_parts_are_compiled_and_equal_plain_bit_for_bit(
    gradient: str, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, order, shared = PARTS[parts]
    x = gaussian(36_000).view(sizes).permute(order)
    clip = x.abs().amax(dim=shared, keepdim=True) * 0.6 if shared else x.abs() * 0.6 + 0.1
    functions = [value for value in vars(fake_quantize_module).values() if isinstance(value, fused.Elementwise)]
    compiled = value_and_gradient(x, clip, True, gradient)
    with monkeypatch.context() as patch:
        for function in functions:  # by now they are compiled, unless none of them was to be
            patch.setattr(function, "plain", lambda *args: pytest.fail("ran as it is written"))
        again, _ = value_and_gradient(x, clip, True, gradient)  # both ways
    monkeypatch.setenv(compilation.SWITCH, "0")
    plain = value_and_gradient(x, clip, True, gradient)
    assert torch.equal(again, plain[0])
    assert again.stride() == plain[0].stride()
    assert torch.equal(compiled[0], plain[0])
    assert torch.equal(compiled[1], plain[1])


def test_fewer_dimensions_than_the_tensor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(36_000).view(3, 60, 4, 50).transpose(1, 2)
    clip = torch.tensor([0.3, 0.6, 0.9, 1.2]).view(4, 1, 1)
    compiled = value_and_gradient(x, clip, True, "pwl")
    monkeypatch.setenv(compilation.SWITCH, "0")
    assert all(map(torch.equal, compiled, value_and_gradient(x, clip, True, "pwl")))


def test_tensors_of_one_form_share_a_compilation() -> None:
    """Rows of activations, of two dimensions or more, are those of weights."""
    value_and_gradient(gaussian(300 * 200).view(300, 200), torch.ones(300, 1), True, "pwl")
    before = compilations()
    assert before > 0
    for shape in ((6, 50, 200), (2, 3, 60, 170)):
        clip = torch.ones(*shape[:-1], 1)
        value_and_gradient(gaussian(torch.Size(shape).numel()).view(shape), clip, True, "pwl")
    assert compilations() == before


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


class Seen(TorchFunctionMode):
    """A function mode, such as the one that attention runs under."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        return func(*args, **(kwargs or {}))


def step(x: Tensor, bits: int) -> None:
    """The calls of a training step: a clip and a quantized tensor with its gradient, per tensor and per row."""
    x = x.detach().requires_grad_()
    for dim in (None, 1):
        clip = octav_clip(x, bits, dim=dim)
        fake_quantize(x, clip, bits, gradient="pwl" if dim is None else "mad").sum().backward()


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("state", [nullcontext, Seen, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_shapes_bits_and_contexts_share_a_compilation(state: Callable, bits: int) -> None:
    """Different batch lengths, bits and function modes cause no recompilation."""
    step(gaussian(400 * 300).view(400, 300), 4)
    before = compilations()
    assert before > 0
    with state():
        for shape in ((500, 300), (400, 307), (2, 70_000), (600, 600), (70_000, 2)):
            step(gaussian(shape[0] * shape[1]).view(shape), bits)
    assert compilations() == before


def test_inference_mode_computes_the_same() -> None:
    x = gaussian(LARGE)
    expected = fake_quantize(x, octav_clip(x, 4), 4)
    with torch.inference_mode():
        assert torch.equal(fake_quantize(x, octav_clip(x, 4), 4), expected)
        assert torch.equal(fake_quantize(x * 1, octav_clip(x * 1, 4), 4), expected)


def test_a_dispatch_mode_sees_the_operations() -> None:
    """Flop counters and selective checkpointing are dispatch modes, under which torch.compile refuses to work."""
    x = gaussian(LARGE)
    expected = fake_quantize(x, torch.tensor(2.0), 4)
    with FlopCounterMode(display=False):
        assert torch.equal(fake_quantize(x, torch.tensor(2.0), 4), expected)
        torch.testing.assert_close(octav_clip(x, 4), octav_clip(x, 4), rtol=1e-6, atol=0)


def test_small_tensors_and_the_switch_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.fuses(torch.zeros(fused.MIN_NUMEL))
    assert not fused.fuses(torch.zeros(fused.MIN_NUMEL - 1))
    assert not fused.fuses(torch.zeros(fused.MIN_NUMEL, dtype=torch.float64))
    assert not fused.fuses(torch.zeros(fused.MIN_NUMEL, device="meta"))
    monkeypatch.setenv(compilation.SWITCH, "0")
    assert not fused.fuses(torch.zeros(fused.MIN_NUMEL))


@pytest.mark.slow
def test_without_a_compiler_one_warning_and_the_plain_functions(tmp_path: Path) -> None:
    script = (
        "import torch, warnings\n"
        "from octav_hf.functional import fake_quantize, octav_clip\n"
        "x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    results = [octav_clip(x, 4), octav_clip(x, 4, dim=1), fake_quantize(x, torch.tensor(2.5), 4)]\n"
        "ours = [str(w.message) for w in caught if 'octav_hf' in str(w.message)]\n"
        "print(len(ours), ours[0])\n"
        f"torch.save(results, {str(tmp_path / 'results.pt')!r})\n"
    )
    without = {
        **os.environ,
        "CXX": "/no/such/compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(fused.__file__).parents[3]),
    }
    output = subprocess.run(
        [sys.executable, "-c", script], env=without, check=True, capture_output=True, text=True
    ).stdout
    assert output.startswith("1 ")
    assert "C++ compiler" in output
    assert compilation.SWITCH in output
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    clip, row_clips, quantized = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(clip, octav_clip(x, 4), rtol=1e-6, atol=0)
    torch.testing.assert_close(row_clips, octav_clip(x, 4, dim=1), rtol=1e-6, atol=0)
    assert torch.equal(quantized, fake_quantize(x, torch.tensor(2.5), 4))


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs vectors of two widths")
def test_processors_with_other_vectors_share_a_cache(tmp_path: Path) -> None:
    script = (
        "import torch\n"
        "from octav_hf.functional import fake_quantize\n"
        "x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))\n"
        f"torch.save(fake_quantize(x, torch.tensor(2.5), 4), {str(tmp_path / 'result.pt')!r})\n"
    )
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(fused.__file__).parents[3])}
    expected = fake_quantize(torch.randn(300, 200, generator=torch.Generator().manual_seed(0)), torch.tensor(2.5), 4)
    for width in ("avx512", "avx2"):
        environment = {**os.environ, **folders, "ATEN_CPU_CAPABILITY": width}
        subprocess.run([sys.executable, "-c", script], env=environment, check=True)
        assert torch.equal(torch.load(tmp_path / "result.pt"), expected), width
