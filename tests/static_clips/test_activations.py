"""``calibrate_octav``: frozen clips, their storage, running with them, and refusals."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    AlbertForSequenceClassification,
    BatchEncoding,
    BertForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    ResNetForImageClassification,
)

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    calibrating,
    check_coverage,
    coverage_report,
    remove_octav,
    uncalibrate_octav,
)
from octav_hf._utils import progress
from octav_hf.conversion.record import recorded_config
from octav_hf.functional import CLIP_RULES, max_clip
from octav_hf.nn import FROZEN_BUFFERS, FakeQuantize, QuantizedAttention, QuantizedLayer
from tests import twins
from tests.architectures.models import ARCHITECTURES
from tests.frozen_activations import frozen_activations
from tests.question_answering import logits

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor
Inputs = dict[tuple[str, str], list[Tensor]]


def token_batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 100, (2, 6 + 4 * i), generator=generator)} for i in range(count)]


def activations_met(model: nn.Module, batches: list[dict[str, Tensor]]) -> Inputs:
    """(module, operand) -> inputs of the layer or of the attention operand's quantizer."""
    met: Inputs = {}
    handles = []

    def note(name: str, operand: str) -> Callable[..., None]:
        return lambda module, args: met.setdefault((name, operand), []).append(args[0].detach().clone())

    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and "input" in module.operands:
            handles.append(module.register_forward_pre_hook(note(name, "input")))
        elif isinstance(module, QuantizedAttention):
            for operand, quantizer in module.operand_quantizers.items():
                handles.append(quantizer.register_forward_pre_hook(note(name, operand)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return met


def frozen_single_clips(model: nn.Module) -> dict[tuple[str, str], tuple[bool, float]]:
    """(module, operand) -> sign and clip, for a model with one clip per operand."""
    found = {}
    for name, operands in frozen_activations(model).items():
        for operand, frozen in operands.items():
            (clip,) = frozen["clips"]
            found[name, operand] = frozen["signed"], clip
    return found


def state(model: nn.Module) -> list[object]:
    """Everything that a calibration may change."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    modes = [module.training for module in model.modules()]
    config = model.__dict__.get("octav_config")
    clips = [[getattr(q, name) for name in FROZEN_BUFFERS] for q in quantizers]
    return [[list(map(id, c)) for c in clips], [q.observer for q in quantizers], modes, config, copy.deepcopy(config)]


def unchanged(before: list[object], after: list[object]) -> bool:
    *rest, config, contents = zip(before, after, strict=True)
    same = all(old == new for old, new in rest) and config[0] is config[1]
    return same and (contents[0] is None or contents[0].to_dict() == contents[1].to_dict())


# The clips.


@pytest.mark.parametrize("rule", ["octav", "max"])
def test_a_frozen_clip_is_the_mean_over_the_calls(small_bert: MakeBert, rule: str) -> None:
    batches = token_batches()
    config = OctavConfig(activation_clip=rule)
    met = activations_met(apply_octav(small_bert(), config), batches)
    clips = frozen_single_clips(calibrate_octav(apply_octav(small_bert(), config), batches, progress_bar=False))
    assert set(clips) == set(met)
    assert len(clips) == 13 + 2 * 4
    for (name, operand), tensors in met.items():
        signed = operand != "probabilities"
        twin = twins.max_clip_twin if rule == "max" else lambda x, s: twins.octav_clip_twin(x, 4, s)
        expected = [twin(x, signed) for x in tensors]
        assert len(set(expected)) == len(batches)
        tolerance = 1e-6 if rule == "max" else 1e-4
        assert clips[name, operand] == (signed, pytest.approx(sum(expected) / len(batches), rel=tolerance)), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_one_batch_gives_the_logits_and_gradients_of_the_dynamic_model(
    small_bert: MakeBert, padded_batch: dict, implementation: str
) -> None:
    frozen, dynamic = (apply_octav(small_bert(attn_implementation=implementation), OctavConfig()) for _ in range(2))
    calibrate_octav(frozen, [padded_batch], progress_bar=False)
    for model in (frozen, dynamic):
        model(**padded_batch).start_logits.square().sum().backward()
    assert torch.equal(logits(frozen, padded_batch), logits(dynamic, padded_batch))
    for (name, parameter), other in zip(frozen.named_parameters(), dynamic.parameters(), strict=True):
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name
    other = token_batches()[0]
    assert not torch.equal(logits(frozen, other), logits(dynamic, other))


def relu_net(config: OctavConfig | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return apply_octav(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), config or OctavConfig())


def test_the_sign_is_frozen_too() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    net = relu_net()
    hidden = [net[:2](part) for part in x]
    calibrate_octav(net, list(x), progress_bar=False)
    (first_signed, _), (second_signed, second) = frozen_single_clips(net).values()
    assert (first_signed, second_signed) == (True, False)
    unsigned = [twins.octav_clip_twin(h, 4, signed=False) for h in hidden]
    assert second == pytest.approx(sum(unsigned) / 3, rel=1e-4)
    assert net[2].input_quantizer(-hidden[0]).abs().max() == 0  # negative now, and still unsigned

    # A mean over all calls on the signed grid, wherever the one with a negative value comes.
    signed = [twins.octav_clip_twin(x, 4) for x in (x[0].abs(), x[1], x[2].abs())]
    for order in ((0, 1, 2), (1, 0, 2), (0, 2, 1)):
        net = calibrate_octav(relu_net(), [x[i] if i == 1 else x[i].abs() for i in order], progress_bar=False)
        assert frozen_single_clips(net)["0", "input"] == (True, pytest.approx(sum(signed) / 3, rel=1e-4))

    always_signed = calibrate_octav(relu_net(OctavConfig(unsigned_activations=False)), list(x), progress_bar=False)
    signed = [twins.octav_clip_twin(h, 4) for h in hidden]
    assert frozen_single_clips(always_signed)["2", "input"] == (True, pytest.approx(sum(signed) / 3, rel=1e-4))


def deberta() -> DebertaV2ForSequenceClassification:
    config = ARCHITECTURES["DebertaV2"]
    torch.manual_seed(0)
    model_config = config.config_class(vocab_size=100, **config.config | {"num_hidden_layers": 1})
    return config.model_class(model_config).eval()


def test_each_product_of_debertas_attention_has_its_own_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    model = apply_octav(deberta(), OctavConfig(activation_clip="max"))
    products: list[tuple[Tensor, Tensor]] = []
    bmm = torch.bmm

    def noting_bmm(left: Tensor, right: Tensor) -> Tensor:
        products.append((left.clone(), right.clone()))
        return bmm(left, right)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", noting_bmm)
        calibrate_octav(model, [ARCHITECTURES["DebertaV2"].batch()], progress_bar=False)
    content, to_position, from_position, attended = [[float(x.abs().max()) for x in pair] for pair in products]
    clips = frozen_activations(model)["deberta.encoder.layer.0.attention.self"]
    scores = (content, to_position, from_position)
    assert clips == {
        "query": {"signed": True, "clips": [left for left, _ in scores]},
        "key": {"signed": True, "clips": [right for _, right in scores]},
        "probabilities": {"signed": False, "clips": attended[:1]},
        "value": {"signed": True, "clips": attended[1:]},
    }
    assert len(set(clips["key"]["clips"])) == 3
    assert clips["key"]["clips"][1] > 3 * clips["key"]["clips"][0]


def test_all_calls_of_a_shared_layer_count(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES["Albert (shared layers)"]
    config = OctavConfig(activation_clip="max")
    model: AlbertForSequenceClassification = apply_octav(architecture.make(), config)
    met = activations_met(model, [architecture.batch()])
    clips = frozen_single_clips(calibrate_octav(model, [architecture.batch()], progress_bar=False))
    shared = [place for place, tensors in met.items() if len(tensors) == 2]
    assert len(shared) == 4 + 6  # the operands of the attention, the inputs of the layer's linear layers
    for place, tensors in met.items():
        expected = [float(max_clip(x, 4)) for x in tensors]
        assert clips[place][1] == pytest.approx(sum(expected) / len(expected), rel=1e-6), place


# Where they are kept.


def test_the_config_that_was_passed_stays_as_it_was(small_bert: MakeBert, padded_batch: dict) -> None:
    config = OctavConfig()
    before = config.to_dict()
    calibrated, other = (apply_octav(small_bert(), config) for _ in range(2))
    assert calibrate_octav(calibrated, [padded_batch], progress_bar=False) is calibrated
    assert config.to_dict() == before
    assert recorded_config(other) == config
    assert recorded_config(calibrated) == config
    again = apply_octav(small_bert(), config)
    again.load_state_dict(calibrated.state_dict())
    assert torch.equal(logits(again, padded_batch), logits(calibrated, padded_batch))
    assert frozen_single_clips(again) == frozen_single_clips(calibrated)


def test_calibrating_again_replaces_the_clips(small_bert: MakeBert) -> None:
    first, second = token_batches(2)
    fresh = calibrate_octav(apply_octav(small_bert(), OctavConfig()), [second], progress_bar=False)
    twice = apply_octav(small_bert(), OctavConfig())
    calibrate_octav(twice, [first], progress_bar=False)
    assert frozen_single_clips(twice) != frozen_single_clips(fresh)
    calibrate_octav(twice, [second], progress_bar=False)
    assert frozen_single_clips(twice) == frozen_single_clips(fresh)


def test_uncalibrated_is_dynamic(small_bert: MakeBert, padded_batch: dict) -> None:
    model, dynamic = (apply_octav(small_bert(), OctavConfig()) for _ in range(2))
    calibrate_octav(model, token_batches(), progress_bar=False)
    assert not torch.equal(logits(model, padded_batch), logits(dynamic, padded_batch))
    assert uncalibrate_octav(model) is model
    assert torch.equal(logits(model, padded_batch), logits(dynamic, padded_batch))
    assert model.state_dict().keys() == dynamic.state_dict().keys()
    with pytest.raises(ValueError, match="no clip of BertForQuestionAnswering is frozen"):
        uncalibrate_octav(model)


def test_removed(small_bert: MakeBert, padded_batch: dict) -> None:
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig()), token_batches(), progress_bar=False)
    assert torch.equal(logits(remove_octav(model), padded_batch), logits(small_bert(), padded_batch))
    assert model.state_dict().keys() == small_bert().state_dict().keys()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_frozen_too(small_bert: MakeBert, padded_batch: dict, duplicate: Callable) -> None:
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig()), token_batches(), progress_bar=False)
    twin = duplicate(model)
    assert torch.equal(logits(twin, padded_batch), logits(model, padded_batch))
    uncalibrate_octav(twin)
    assert frozen_single_clips(model)
    assert not torch.equal(logits(twin, padded_batch), logits(model, padded_batch))


class Pair(nn.Module):
    """Two quantized models in one."""

    def __init__(self, *models: nn.Module):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, **inputs: Tensor) -> list[Tensor]:
        return [model(**inputs).start_logits for model in self.models]


def test_a_model_that_contains_quantized_ones(small_bert: MakeBert, padded_batch: dict) -> None:
    pair = Pair(*(apply_octav(small_bert(seed), OctavConfig(weight_bits=3)) for seed in range(2)))
    calibrate_octav(pair, [padded_batch], progress_bar=False)
    for seed, model in enumerate(pair.models):
        alone = apply_octav(small_bert(seed), OctavConfig(weight_bits=3))
        calibrate_octav(alone, [padded_batch], progress_bar=False)
        assert frozen_activations(model) == frozen_activations(alone)


def test_a_part_of_a_quantized_model(small_bert: MakeBert, padded_batch: dict) -> None:
    model, whole = (apply_octav(small_bert(), OctavConfig()) for _ in range(2))
    calibrate_octav(whole, [padded_batch], progress_bar=False)
    calibrate_octav(model.bert, [padded_batch], progress_bar=False)
    assert frozen_activations(model.bert) == frozen_activations(whole.bert)
    assert not model.qa_outputs.input_quantizer.is_frozen
    uncalibrate_octav(model)
    assert frozen_activations(model) == {}


# What runs on them.


def test_no_activation_is_clipped_by_the_rule(
    small_bert: MakeBert, padded_batch: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CLIP_RULES, "breakable", lambda *args, **kwargs: max_clip(*args, **kwargs))
    model = apply_octav(small_bert(), OctavConfig(activation_clip="breakable"))
    calibrate_octav(model, [padded_batch], progress_bar=False)

    def broken(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("the clipping rule was called")

    monkeypatch.setitem(CLIP_RULES, "breakable", broken)
    monkeypatch.setattr(FakeQuantize, "is_signed", lambda self, x: self.signed or broken())
    model(**padded_batch).start_logits.sum().backward()
    with pytest.raises(AssertionError, match="rule was called"):
        uncalibrate_octav(model)(**padded_batch)


def test_a_changed_dtype_leaves_the_clips_alone(small_bert: MakeBert, padded_batch: dict) -> None:
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig()), token_batches(), progress_bar=False)
    clips, expected = frozen_single_clips(model), logits(model, padded_batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (logits(model, padded_batch) - expected).abs().max() < 0.1 * expected.abs().max()
    model.to(torch.bfloat16)
    output = logits(model, padded_batch)
    assert output.dtype == torch.bfloat16
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()
    assert frozen_single_clips(model) == clips
    quantizer = model.qa_outputs.input_quantizer
    assert quantizer.clips.dtype == torch.float32
    assert quantizer.clips.tolist() == [clips["qa_outputs", "input"][1]]


def test_a_float64_model(small_bert: MakeBert, padded_batch: dict) -> None:
    config = OctavConfig(activation_bits=8)
    single, double = apply_octav(small_bert(), config), apply_octav(small_bert().double(), config)
    for model in (single, double):
        calibrate_octav(model, [padded_batch], progress_bar=False)
    clips = frozen_single_clips(double)
    for place, (signed, clip) in frozen_single_clips(single).items():
        assert clips[place] == (signed, pytest.approx(clip, rel=1e-2))
    assert any(float(torch.tensor(clip)) != clip for _, clip in clips.values())
    assert logits(double, padded_batch).dtype == torch.float64


def test_an_operand_multiplied_another_number_of_times_is_an_error() -> None:
    architecture = ARCHITECTURES["Longformer"]
    with_global = architecture.batch()
    without = with_global | {"global_attention_mask": torch.zeros_like(with_global["global_attention_mask"])}
    name = "longformer.encoder.layer.0.attention.self"
    remedy = rf"module_overrides=\{{'{name}': \{{'quantize_attention': False\}}\}}"
    for calibrated, other, times in (
        (with_global, without, "in 1 matmul.* has 3 frozen"),
        (without, with_global, "in more than 1 matmul.* has 1 frozen"),
    ):
        model = calibrate_octav(apply_octav(architecture.make(), OctavConfig()), [calibrated] * 2, progress_bar=False)
        with pytest.raises(RuntimeError, match=rf"{name}: .*operand query {times}.*{remedy}"):
            model(**other)
        model(**calibrated)

    model = apply_octav(architecture.make(), OctavConfig())
    before = state(model)
    with pytest.raises(ValueError, match=rf"{name}: .*operand query in 1 matmul.* in one pass and in 3.*{remedy}"):
        calibrate_octav(model, [with_global, without], progress_bar=False)
    assert unchanged(before, state(model))
    overrides = {"*.attention.self": {"quantize_attention": False}}
    model = apply_octav(architecture.make(), OctavConfig(module_overrides=overrides))
    calibrate_octav(model, [with_global, without], progress_bar=False)
    for batch in (with_global, without):
        model(**batch)


@pytest.mark.parametrize("name", ["T5", pytest.param("GPT-2", marks=pytest.mark.versions)])
def test_clips_of_generation_with_a_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES[name]
    prompt = {key: value for key, value in architecture.batch().items() if key != "labels"}
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    model, dynamic = (apply_octav(architecture.make(), OctavConfig(weight_clip="max")) for _ in range(2))
    with calibrating(model):
        tokens = model.generate(**prompt, **arguments)
    assert torch.equal(tokens, dynamic.generate(**prompt, **arguments))
    met: list[int] = []
    head = dynamic.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: met.append(args[0].shape[1]))
    expected: list[float] = []
    head.register_forward_pre_hook(lambda module, args: expected.append(twins.octav_clip_twin(args[0], 4)))
    dynamic.generate(**prompt, **arguments)
    assert met == [1] * 4  # one call each for four tokens
    clip = frozen_activations(model)["lm_head"]["input"]["clips"]
    assert clip == [pytest.approx(sum(expected) / 4, rel=1e-4)]
    monkeypatch.setitem(CLIP_RULES, "octav", lambda *args, **kwargs: pytest.fail("the clipping rule was called"))
    assert model.generate(**prompt, **arguments).shape == tokens.shape


@pytest.mark.slow
@pytest.mark.parametrize("own_loop", [False, True])
def test_a_compiled_model(own_loop: bool) -> None:
    """Calibration compiles nothing, and the model compiled afterwards uses the frozen clips."""
    torch.compiler.reset()
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    net, plain = (relu_net(OctavConfig(weight_bits=None)) for _ in range(2))
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x[0])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    calibrate_octav(plain, list(x), progress_bar=False)
    if own_loop:
        with calibrating(compiled):
            for part in x:
                compiled(part)
    else:
        calibrate_octav(compiled, list(x), progress_bar=False)
    assert counters["stats"]["unique_graphs"] == graphs
    assert frozen_single_clips(net) == frozen_single_clips(plain)
    torch.testing.assert_close(compiled(x[0]), plain(x[0]), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > graphs


# What the report says.


def test_the_report_says_what_is_frozen(small_bert: MakeBert, padded_batch: dict) -> None:
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig()), [padded_batch], progress_bar=False)
    cells = {row.clip_cell for row in coverage_report(model) if row.operand == "weight" and row.bits}
    assert cells == {"octav per channel"}
    frozen = [row for row in coverage_report(model) if row.frozen]
    assert {row.clip_cell for row in frozen} == {"octav per tensor, frozen"}
    assert len(frozen) == 13 + 8
    assert {row.operand for row in frozen if row.signed is False} == {"probabilities"}
    assert all(row.signed is not None for row in frozen)
    assert "octav per tensor, frozen  pwl" in str(coverage_report(model))
    for training in (False, True):
        check = check_coverage(model.train(training), padded_batch)
        assert check == []
        assert check.matmuls == 2 * (6 + 2) + 1


def test_what_no_batch_reached_stays_dynamic(caplog: pytest.LogCaptureFixture) -> None:
    net = relu_net()
    with caplog.at_level(logging.WARNING), calibrating(net):
        net[0](torch.ones(2, 8))
    (record,) = caplog.records
    assert record.getMessage() == (
        "1 of 2 activations were not reached by the calibration, so their clips stay dynamic: 2 input"
    )
    rows = {(row.module, row.operand): row.frozen for row in coverage_report(net)}
    assert rows == {("0", "weight"): False, ("0", "input"): True, ("2", "weight"): False, ("2", "input"): False}
    assert list(frozen_activations(net)) == ["0"]


# Batches, and what is left alone.


@pytest.mark.parametrize(
    "batches",
    [
        lambda x: [x, 2 * x],
        lambda x: [(x,), [2 * x]],
        lambda x: iter([{"input": x}, {"input": 2 * x}]),
        lambda x: [BatchEncoding({"input": part}) for part in (x, 2 * x)],
        lambda x: torch.utils.data.DataLoader(torch.cat([x, 2 * x]), batch_size=len(x)),
    ],
    ids=["tensors", "positional", "iterator of mappings", "a tokenizer's", "DataLoader"],
)
def test_forms_of_batches(batches: Callable[[Tensor], object]) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    net = relu_net()
    calibrate_octav(net, batches(x), progress_bar=False)
    clip = 1.5 * twins.octav_clip_twin(x, 4)
    assert frozen_single_clips(net)["0", "input"] == (True, pytest.approx(clip, rel=1e-4))


def test_mode_buffers_random_state_and_gradients_are_left_alone(
    small_resnet: Callable[..., ResNetForImageClassification],
) -> None:
    model = apply_octav(small_resnet(), OctavConfig()).train()
    model.resnet.embedder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random_state = torch.get_rng_state()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[bool, bool]] = []
    handle = model.classifier.register_forward_hook(
        lambda module, args, output: seen.append((module.training, output.requires_grad, torch.rand(1)))
    )
    calibrate_octav(model, [{"pixel_values": images}], progress_bar=False)
    handle.remove()
    assert [(training, gradient) for training, gradient, _ in seen] == [(False, False)]
    assert {name: module.training for name, module in model.named_modules()} == modes
    after = dict(model.named_buffers())
    assert all(torch.equal(buffer, after[name]) for name, buffer in buffers.items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {row.operand for row in coverage_report(model) if row.signed is False} == {"input"}  # after its ReLUs
    dynamic = apply_octav(small_resnet(), OctavConfig())
    with torch.no_grad():
        assert torch.equal(model.eval()(images).logits, dynamic(images).logits)


def test_shows_its_progress(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0)
    calibrate_octav(relu_net(), [torch.ones(2, 8)] * 3)
    assert "calibrating: 100%" in capsys.readouterr().err
    calibrate_octav(relu_net(), [torch.ones(2, 8)] * 3, progress_bar=False)
    assert capsys.readouterr().err == ""


# What is refused, with nothing changed.

GOOD = torch.ones(2, 8)


class Raising:
    """Batches whose iterator fails at the second one."""

    def __iter__(self) -> Iterator[Tensor]:
        yield GOOD
        raise OSError("the data set is broken")


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "got no batch"),
        (iter(()), ValueError, "got no batch"),
        (GOOD, TypeError, r"iterable of batches.*got Tensor; write \[batch\]"),
        ({"input": GOOD}, TypeError, r"got dict; write \[batch\]"),
        (3, TypeError, "got int"),
        ([GOOD, "text"], TypeError, "number 2.*got str"),
        ([GOOD, {"inputs": GOOD}], TypeError, "inputs"),
        ([GOOD, torch.full((2, 8), torch.nan)], ValueError, "0 input: .*16 NaN"),
        ([torch.empty(0, 8)], ValueError, "no activation of Sequential was quantized.*not empty"),
        (Raising(), OSError, "data set is broken"),
    ],
    ids=["none", "empty", "tensor", "mapping", "number", "text", "keyword", "NaN", "empty tensors", "raising"],
)
def test_a_failed_calibration_changes_nothing(batches: object, error: type[Exception], message: str) -> None:
    for net in (relu_net(), calibrate_octav(relu_net(), [3 * GOOD], progress_bar=False)):
        net.train()
        before = state(net)
        with pytest.raises(error, match=message):
            calibrate_octav(net, batches, progress_bar=False)
        assert unchanged(before, state(net))


def test_a_raising_loop_changes_nothing() -> None:
    net = relu_net()
    before = state(net)
    with contextlib.suppress(KeyboardInterrupt), calibrating(net):
        net(GOOD)
        raise KeyboardInterrupt
    assert unchanged(before, state(net))
    with pytest.raises(ValueError, match="no activation of Sequential was quantized"), calibrating(net):
        pass
    assert unchanged(before, state(net))
    with calibrating(net):
        net(GOOD)
        with pytest.raises(ValueError, match="already being calibrated"):
            calibrate_octav(net, [2 * GOOD], progress_bar=False)
    assert frozen_single_clips(net)["0", "input"] == (False, pytest.approx(1))


def test_models_without_quantized_activations_are_refused() -> None:
    floating = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match="no quantized activations; set activation_bits"):
        calibrate_octav(relu_net(OctavConfig(activation_bits=None)), [GOOD])
    for refused in (calibrate_octav, lambda model, _: uncalibrate_octav(model)):
        with pytest.raises(ValueError, match="Sequential has no module quantized by apply_octav"):
            refused(floating, [GOOD])
        with pytest.raises(TypeError, match="takes a model"):
            refused(None, [GOOD])


def test_an_activation_that_was_zero_in_the_calibration_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = apply_octav(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    calibrate_octav(model, [torch.ones(1, 8)], progress_bar=False)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "all 0 in the calibration" in warning
    assert "to 0: 2 input. " in warning
