"""Bad and unusual input gives the right result, or an error that names the module and tells what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, Trainer, TrainingArguments

from octav_hf import OctavConfig, apply_octav, calibrate_octav
from octav_hf.nn import FakeQuantize
from tests.question_answering import Spans
from tests.twins import octav_clip_twin, quantize_twin

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor
LARGE = 1 << 16  # elements, enough for the fast kernels


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return apply_octav(model, OctavConfig()).to(dtype)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_quantized_as_by_the_twin(quantizer: FakeQuantize, x: Tensor) -> None:
    """The quantizer's output equals the float64 reference, except for values next to a rounding boundary."""
    signed = bool(quantizer.is_signed(x))
    clip = octav_clip_twin(x, quantizer.num_bits, signed)
    expected = torch.as_tensor(quantize_twin(x, clip, quantizer.num_bits, signed))
    got = quantizer(x)
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    step = clip / 2 ** (quantizer.num_bits - signed)
    difference = (got.double() - expected).abs()
    assert (difference <= 1.01 * step).all()
    assert (difference > 1e-3 * step).double().mean() < 1e-3 if x.numel() > 1000 else (difference < 1e-3 * step).all()


# ---------------------------------------------------------------------------------------------------------------------
# NaN and Inf
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("rows", [3, 1 << 12], ids=["small", "with the fast kernels"])
def test_an_activation_that_is_not_finite_names_the_layer(value: float, rows: int) -> None:
    x = gaussian(rows, 8)
    x[-1, 3] = value
    count = "1 NaN and 0 Inf" if math.isnan(value) else "0 NaN and 1 Inf"
    with pytest.raises(ValueError, match=rf"^0 input: .* shape \({rows}, 8\) .*{count}, .*find where they arise"):
        layers()(x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_weight_that_is_not_finite_names_the_layer(value: float) -> None:
    model = layers()
    x = gaussian(3, 8)
    expected = model(x)
    good = model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight[1, 2] = value
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^2 weight: .* shape \(4, 8\) .*too high a learning rate, a damaged checkp"
        ):
            model(x)
    with torch.no_grad():
        model[2].weight.copy_(good)
    assert torch.equal(model(x), expected), "the error leaves nothing behind"


@pytest.mark.parametrize("operand", ["query", "value"])
def test_an_attention_operand_that_is_not_finite_is_named(
    small_bert: MakeBert, padded_batch: dict, operand: str
) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    getattr(model.bert.encoder.layer[1].attention.self, operand).bias.data[5] = math.nan
    with pytest.raises(ValueError, match=rf"^bert\.encoder\.layer\.1\.attention\.self {operand}: .* 32 NaN"):
        model(**padded_batch)


def trainer(model: nn.Module, folder: Path, **arguments: object) -> Trainer:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no"}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0, "logging_steps": 1}
    return Trainer(
        model=model, args=TrainingArguments(output_dir=str(folder), **(settings | arguments)), train_dataset=Spans()
    )


@pytest.mark.slow
def test_trainer_stops_at_a_diverged_model_with_the_reason(small_bert: MakeBert, tmp_path: Path) -> None:
    """A float model would continue training with a loss of NaN."""
    run = trainer(apply_octav(small_bert(), OctavConfig()), tmp_path, learning_rate=1e38, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"^(bert|qa_outputs)\S* (input|weight|query|key|value|probabilities): .*NaN"):
        run.train()
    assert 0 < run.state.global_step < 6


@pytest.mark.slow
def test_trainer_stops_at_a_bad_checkpoint_before_a_step(small_bert: MakeBert, tmp_path: Path) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    model.bert.encoder.layer[0].output.dense.weight.data[3, 3] = math.nan
    run = trainer(model, tmp_path)
    with pytest.raises(ValueError, match=r"^bert\.encoder\.layer\.0\.output\.dense weight: .*a damaged checkpoint"):
        run.train()
    assert run.state.global_step == 0


def test_gradients_that_are_not_finite_do_not_stop_a_step(small_bert: MakeBert, padded_batch: dict) -> None:
    """The backward pass passes them on; the optimizer or the scaler has to handle them."""
    model = apply_octav(small_bert(), OctavConfig()).train()
    (model(**padded_batch).start_logits.sum() * math.inf).backward()
    assert not model.bert.encoder.layer[0].attention.self.query.weight.grad.isfinite().all()
    model.zero_grad()
    model(**padded_batch).start_logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# degenerate values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [12, LARGE], ids=["small", "with the fast kernels"])
@pytest.mark.parametrize("constant", [0.0, 0.7, -0.7, 1e-30, 1e30], ids=str)
def test_a_constant_tensor(constant: float, size: int) -> None:
    """The clip is the only magnitude: the highest level is one step below it, the lowest at -clip."""
    quantizer = FakeQuantize(4, signed=None)
    x = torch.full((size,), constant, requires_grad=True)
    y = quantizer(x)
    top = 15 / 16 if constant > 0 else 1.0
    torch.testing.assert_close(y, torch.full((size,), constant * top), rtol=1e-5, atol=0)
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_all_zero_rows_of_a_weight_and_zero_activations() -> None:
    model = layers()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[2].weight.zero_()
    y = model(gaussian(5, 8))
    assert torch.equal(y, model[2].bias.expand(5, 4))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    zero = torch.zeros(5, 8, requires_grad=True)
    model(zero).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("size", [64, LARGE], ids=["small", "with the fast kernels"])
@pytest.mark.parametrize("outlier", [1e30, -1e30], ids=str)
def test_a_huge_outlier(outlier: float, size: int) -> None:
    """The clip is the reference's, and the outlier's attenuated gradient stays finite."""
    x = gaussian(size)
    x[size // 2] = outlier
    assert_quantized_as_by_the_twin(FakeQuantize(8, signed=None), x)
    for gradient in ("ste", "pwl", "mad"):
        x = x.detach().requires_grad_()
        y = FakeQuantize(4, gradient_estimator=gradient)(x)
        assert y.isfinite().all()
        (g,) = torch.autograd.grad(y.sum(), x)
        assert g.isfinite().all()
        assert ((g >= 0) & (g <= 1)).all()


def test_sums_that_overflow_float32() -> None:
    """The values are finite, their sum is not."""
    x = torch.full((LARGE,), 3e38)
    torch.testing.assert_close(FakeQuantize(4)(x), 0.875 * x)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_one_token(small_bert: MakeBert, implementation: str) -> None:
    """It attends only to itself, with probability 1, which the grid represents as 15/16."""
    model = apply_octav(small_bert(attn_implementation=implementation), OctavConfig())
    attention, seen = model.bert.encoder.layer[0].attention.self, {}
    attention.value.register_forward_hook(lambda *call: seen.update(value=call[2].detach()))
    attention.register_forward_hook(lambda *call: seen.update(output=call[2][0].detach()))
    logits = model(input_ids=torch.tensor([[7]])).start_logits
    assert logits.shape == (1, 1)
    value = quantize_twin(seen["value"], octav_clip_twin(seen["value"], 4, True), 4, True)
    torch.testing.assert_close(seen["output"].double(), torch.as_tensor(value) * 15 / 16, rtol=1e-5, atol=1e-6)
    logits.sum().backward()
    assert attention.value.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", [False, True], ids=["dynamic", "frozen"])
def test_an_empty_batch(small_resnet: Callable[..., nn.Module], frozen: bool) -> None:
    for model, empty, full in (
        (layers(), torch.zeros(0, 8), gaussian(2, 8)),
        (apply_octav(small_resnet(), OctavConfig()), torch.zeros(0, 3, 32, 32), gaussian(2, 3, 32, 32)),
    ):
        if frozen:
            calibrate_octav(model, [full], progress_bar=False)
        output = model(empty)
        output = output if isinstance(output, Tensor) else output.logits
        assert output.shape[0] == 0
        output.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def error_of(call: Callable[[], object]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever Transformers raises
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("embedding_bits", [None, 8])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [(1, 80), (0, 16), (2, 0)], ids=["too long", "no sequence", "no token"])
@pytest.mark.parametrize("given_positions", [False, True])
def test_what_transformers_refuses_it_refuses_in_its_own_words(
    small_bert: MakeBert,
    shape: tuple[int, int],
    implementation: str,
    embedding_bits: int | None,
    given_positions: bool,
) -> None:
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    if given_positions:  # then no sooner refused than the table is asked for a row that it does not have
        positions = torch.arange(shape[1]).expand(shape)
        batch |= {"position_ids": positions, "token_type_ids": torch.zeros(shape, dtype=torch.long)}
    own = error_of(lambda: small_bert(attn_implementation=implementation)(**batch))
    quantized = apply_octav(small_bert(attn_implementation=implementation), OctavConfig(embedding_bits=embedding_bits))
    assert error_of(lambda: quantized(**batch)) == own
    assert quantized(input_ids=torch.zeros(1, 8, dtype=torch.long)).start_logits.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# dtypes, shapes and strides
# ---------------------------------------------------------------------------------------------------------------------


def test_a_float64_model(small_bert: MakeBert, padded_batch: dict) -> None:
    """All arithmetic is float64, and the result is close to that of float32."""
    model = apply_octav(small_bert().double(), OctavConfig(weight_bits=8, activation_bits=8))
    clips = []
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.register_forward_hook(lambda module, args, _: clips.append(module.compute_clip(args[0]).dtype))
    logits = model(**padded_batch).start_logits
    assert logits.dtype == torch.float64
    assert set(clips) == {torch.float64}
    logits.sum().backward()
    assert model.qa_outputs.weight.grad.dtype == torch.float64
    float32 = apply_octav(small_bert(), OctavConfig(weight_bits=8, activation_bits=8))(**padded_batch).start_logits
    torch.testing.assert_close(logits.float(), float32, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("signed", [True, None])
def test_integers_and_complex_numbers_are_refused_by_name(dtype: torch.dtype, signed: bool | None) -> None:
    quantizer = FakeQuantize(4, signed=signed, name="encoder.dense input")
    message = rf"^encoder\.dense input: .* shape \(2, 3\) has dtype {re.escape(str(dtype))}; pass a floating-point"
    with pytest.raises(TypeError, match=message):
        quantizer(torch.ones(2, 3).to(dtype))


def test_a_tensor_without_dimensions() -> None:
    for value in (0.3, -0.3, 0.0):
        x = torch.tensor(value, requires_grad=True)
        y = FakeQuantize(4, signed=None)(x)
        assert y.shape == ()
        assert float(y) == pytest.approx(value * (15 / 16 if value > 0 else 1))
        y.backward()
        assert x.grad == 1


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "every_second": lambda x: x[::2, 1::2],
    "expanded": lambda x: x[:, :1].expand(-1, 300),
    "flipped": lambda x: x.flip(0),
    "permuted": lambda x: x.view(8, -1, 16).permute(2, 0, 1),
    "offset": lambda x: x.flatten()[3:],
}


@pytest.mark.slow
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("gradient", ["pwl", "mad"])
@pytest.mark.parametrize("dim", [None, -1])
def test_tensors_that_are_not_contiguous(strides: str, gradient: str, dim: int | None) -> None:
    whole = gaussian(512, 256)
    x = STRIDES[strides](whole)
    quantizer = FakeQuantize(4, signed=None, gradient_estimator=gradient, dim=dim)
    leaf = whole.clone().requires_grad_()
    y = quantizer(STRIDES[strides](leaf))
    copy = STRIDES[strides](whole).contiguous().requires_grad_()
    z = quantizer(copy)
    # The order of additions moves the clip by some units in the last place.
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    clips = quantizer.compute_clip(x)
    rows = x.reshape(-1, x.shape[-1])[[0, -1]] if dim is not None else x.reshape(1, -1)
    for clip, row in zip(clips.flatten()[[0, -1]], rows, strict=False):
        assert float(clip) == pytest.approx(octav_clip_twin(row, 4, True), rel=1e-4)
    weights = gaussian(z.numel(), seed=1).view(z.shape)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    expected = whole.clone().requires_grad_()
    STRIDES[strides](expected).backward(copy.grad)
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# gradients on and off
# ---------------------------------------------------------------------------------------------------------------------


def test_frozen_layers_get_no_gradient_and_the_others_the_same(small_bert: MakeBert, padded_batch: dict) -> None:
    found = []
    for freeze in (False, True):
        model = apply_octav(small_bert(), OctavConfig())
        if freeze:
            model.bert.embeddings.requires_grad_(False)
            model.bert.encoder.layer[0].requires_grad_(False)
        output = model(**padded_batch)
        (output.start_logits.square().sum() + output.end_logits.sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    below = ("bert.embeddings", "bert.encoder.layer.0")
    assert found[1].keys() == {name for name in found[0] if not name.startswith(below)}
    for name, gradient in found[1].items():
        assert torch.equal(gradient, found[0][name]), name


def test_nothing_that_requires_a_gradient(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    expected = model(**padded_batch).start_logits
    model.requires_grad_(False)
    frozen = model(**padded_batch).start_logits
    assert not frozen.requires_grad
    assert torch.equal(frozen, expected)


def test_only_the_input_requires_a_gradient() -> None:
    model = layers().requires_grad_(False)
    x = gaussian(3, 8).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("clip", ["octav", "max", "mse", "percentile", "mse_sweep"])
def test_inference_mode_and_then_training(small_bert: MakeBert, padded_batch: dict, clip: str) -> None:
    """Clips cached in inference mode are saved by the backward pass."""
    options = {"percentile": 99.9} if clip == "percentile" else {}
    config = OctavConfig(
        weight_clip=clip, activation_clip=clip, weight_clip_options=options, activation_clip_options=options
    )
    model, fresh = (apply_octav(small_bert(), config) for _ in range(2))
    with torch.inference_mode():
        inferred = model(**padded_batch).start_logits
    gradients = []
    for each in (model, fresh):
        logits = each(**padded_batch).start_logits
        assert torch.equal(logits, inferred)
        logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.inference_mode():
        assert not torch.equal(model(**padded_batch).start_logits, inferred)


def test_a_tensor_from_inference_mode_as_the_input() -> None:
    with torch.inference_mode():
        x = gaussian(2, 8)
    assert not layers()[0](x.clone()).is_inference()
    model = layers()
    with torch.no_grad():
        assert torch.equal(model(x), model(x.clone()))
