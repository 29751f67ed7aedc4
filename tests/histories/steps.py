"""The steps of histories: what each does to a ``Subject``, and the arguments that may be drawn for it."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    calibrating,
    pack_octav,
    remove_octav,
    uncalibrate_octav,
    unpack_octav,
)
from octav_hf.nn import FakeQuantize, QuantizedAttention, QuantizedLayer

from .check import MEMORY, Broken, Picture, outputs, same_outputs, saved_and_loaded, settings
from .models import ROWS, Kind

Arguments = dict[str, Any]


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into the model."""
    kinds = peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper
    return any(isinstance(module, kinds) for module in model.modules())


@dataclass
class Subject:
    """What a history is about.

    Attributes:
        model: the Transformers model.
        outer: what is around it, or the model itself.
        config: of the last ``apply``.
        earlier: the model after the steps until now, for resuming.
        others: models that no further step changes, with what they were.
    """

    kind: Kind
    model: PreTrainedModel
    outer: nn.Module
    config: OctavConfig | None = None
    earlier: list[Picture] = field(default_factory=list)
    others: list[tuple[str, PreTrainedModel, Picture]] = field(default_factory=list)

    def check_saving(self, model: PreTrainedModel) -> Picture:
        """Save and load ``model``; one with adapters but no quantized module is up to Transformers and PEFT."""
        quantized = any(isinstance(module, QuantizedLayer | QuantizedAttention) for module in model.modules())
        if has_adapters(model) and not quantized:
            return Picture.of(model, self.batch)
        return saved_and_loaded(model, self.batch)

    @property
    def batch(self) -> Arguments:
        """Whatever dtype the model has: `outputs` casts images."""
        return self.kind.batch(0)

    def picture(self) -> Picture:
        return Picture.of(self.model, self.batch)

    def named(self, on: str) -> nn.Module:
        """The part of the subject that a step is about."""
        if on == "outer":
            return self.outer
        if on == "head":
            return self.model.get_submodule(self.kind.head)
        if on == "part":
            return self.model.get_submodule(self.path("part"))
        return self.model if on == "model" else self.model.base_model

    def path(self, on: str) -> str:
        """The name of a part: the head, or the largest child of the base model."""
        if on == "head":
            return self.kind.head
        part = max(self.model.base_model.children(), key=lambda child: len(list(child.modules())))
        return next(name for name, module in self.model.named_modules() if module is part)

    def set_model(self, model: PreTrainedModel) -> None:
        self.model = self.outer = model


@dataclass(frozen=True)
class Action:
    """A kind of step: what it does, and how its arguments are drawn."""

    run: Callable[..., None]
    draw: Callable[[Random, Kind], Arguments]
    weight: int


ACTIONS: dict[str, Action] = {}

PACKAGE_CALLS = ("apply", "calibrate", "uncalibrate", "pack", "unpack", "remove")
"""The steps whose errors must be the package's own."""


def action(
    weight: int = 1, draw: Callable[[Random, Kind], Arguments] | None = None, **choices: list[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: register a function of a subject and arguments, each drawn from its choices.

    Arguments that are the first choice are left out, so that what is printed is short.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def drawn(random: Random, kind: Kind) -> Arguments:
            values = {name: random.choice(of) for name, of in choices.items()}
            short = {name: value for name, value in values.items() if value != choices[name][0]}
            return short | (draw(random, kind) if draw else {})

        ACTIONS[function.__name__] = Action(function, drawn, weight)
        return function

    return register


def _draw_config(random: Random, kind: Kind) -> Arguments:
    """Some fields of an ``OctavConfig`` that are not as by default."""
    bits = [2, 3, 4, 5, 6, 8, None]
    rules = ["octav", "mse", "max"]
    layer = random.choice([*kind.layers, f"*{kind.head}"])
    granularity = random.choice(
        [{"input": "token"}, {"value": "channel"}, {"query": "attn_head", "key": "token", "probabilities": "attn_head"}]
    )
    override = random.choice(
        [
            {"weight_bits": random.choice(bits)},
            {"activation_bits": random.choice(bits)},
            {"weight_clip": "max", "activation_clip": "mse"},
            {"quantize_attention": False},
            {"weight_granularity": "tensor"},
        ]
    )
    possible = {
        "weight_bits": random.choice(bits),
        "activation_bits": random.choice(bits),
        "embedding_bits": random.choice([8, 4]),
        "weight_clip": random.choice(rules),
        "activation_clip": random.choice(rules),
        "weight_granularity": "tensor",
        "activation_granularity": granularity,
        "weight_gradient_estimator": "ste",
        "unsigned_activations": False,
        "asymmetric_activations": True,
        "quantize_attention": False,
        "exclude_modules": [layer],
        "target_modules": [layer],
        "module_overrides": {layer: override},
    }
    count = random.choice([0, 1, 1, 2, 3])
    return {name: possible[name] for name in sorted(random.sample(sorted(possible), count))}


@action(14, _draw_config, on=["model"] * 5 + ["outer", "outer", "base", "part", "head"])
def apply(subject: Subject, on: str = "model", **fields: Any) -> None:
    """``apply_octav``, on the model, on what is around it or on a part of it."""
    config = OctavConfig(**fields)
    apply_octav(subject.named(on), config)
    subject.config = config


@action(6, on=["model", "model", "outer", "base"], activations=[True, True, False], weights=[False, True])
def calibrate(subject: Subject, on: str = "model", activations: bool = True, weights: bool = False) -> None:
    """``calibrate_octav``, of activations, weights or both."""
    batches = [subject.kind.batch(seed) for seed in (1, 2)]
    calibrate_octav(subject.named(on), batches if activations else None, weights=weights, progress_bar=False)


@action(1)
def calibrate_base(subject: Subject) -> None:
    """Calibrate with a loop that does not reach the head."""
    with calibrating(subject.model):
        outputs(subject.kind.base(subject.model), _base_batch(subject))


@action(2, on=["model", "model", "outer"], activations=[True, True, False], weights=[True, False])
def uncalibrate(subject: Subject, on: str = "model", activations: bool = True, weights: bool = True) -> None:
    """``uncalibrate_octav``."""
    uncalibrate_octav(subject.named(on), activations=activations, weights=weights)


@action(6, on=["model", "model", "outer", "base"], embedding_bits=[None, None, 8, 4])
def pack(subject: Subject, on: str = "model", embedding_bits: int | None = None) -> None:
    """``pack_octav``."""
    pack_octav(subject.named(on), embedding_bits=embedding_bits)
    before = subject.earlier[-1].outputs
    if embedding_bits is None and not same_outputs(before, outputs(subject.model, subject.batch)):
        raise Broken("pack_octav changed the outputs")


@action(3, on=["model", "model", "outer"])
def unpack(subject: Subject, on: str = "model") -> None:
    """``unpack_octav``."""
    unpack_octav(subject.named(on))


@action(1, on=["model", "outer", "base"])
def remove(subject: Subject, on: str = "model") -> None:
    """``remove_octav``."""
    remove_octav(subject.named(on))


@action(4, rows=[ROWS + 3, ROWS + 3, ROWS - 4, ROWS])
def resize(subject: Subject, rows: int = ROWS + 3) -> None:
    """``resize_token_embeddings``."""
    if "input_ids" not in subject.batch:
        raise ValueError("the history's model has no tokens")
    subject.model.resize_token_embeddings(rows, mean_resizing=False)
    if subject.model.get_input_embeddings().weight.shape[0] != rows:
        raise Broken("resize_token_embeddings did nothing")


_FIXED_HEADS = ("lm_head", "qa_outputs")
"""The heads whose number of outputs is no choice."""


@action(4, like=[True, False])
def replace_head(subject: Subject, like: bool = True) -> None:
    """Another ``nn.Linear`` in the place of the head; ``like``: with as many outputs."""
    model, name = subject.model, subject.kind.head
    old = model.get_submodule(name)
    count = old.out_features if like or name in _FIXED_HEADS else old.out_features + 3
    model.set_submodule(name, nn.Linear(old.in_features, count, bias=old.bias is not None).to(model.dtype))
    if name not in _FIXED_HEADS:
        model.num_labels = model.config.num_labels = count


def _layers(model: nn.Module, kind: type[nn.Module] = QuantizedLayer) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def _choose(model: nn.Module, index: int, kind: type[nn.Module] = QuantizedLayer) -> tuple[str, Any]:
    found = _layers(model, kind)
    if not found:
        raise ValueError(f"the history's model has no {kind.__name__}")
    return found[index % len(found)]


@action(2, layer=[0, 2, 5, -1, -2])
def float_layer(subject: Subject, layer: int = 0) -> None:
    """A float layer with the same weights by hand, in the place of a quantized one."""
    name, old = _choose(subject.model, layer)
    if type(old.weight) is not nn.Parameter or "Linear" not in type(old).__name__:
        raise ValueError("the history's layer is packed, or not linear")
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None).to(subject.model.dtype)
    new.weight = old.weight
    new.bias = old.bias
    subject.model.set_submodule(name, new)


@action(1)
def float_part(subject: Subject) -> None:
    """A float part of the model, attention included, in the place of the quantized one."""
    name = subject.path("part")
    bare = remove_octav(copy.deepcopy(subject.model))
    subject.model.set_submodule(name, bare.get_submodule(name))


@action(1, layer=[0, 2, 5, -1])
def graft(subject: Subject, layer: int = 0) -> None:
    """A layer that is quantized to 8 bits as a part of another model, in the place of a quantized one."""
    name, _ = _choose(subject.model, layer)
    other = subject.kind.make().to(subject.model.dtype)
    apply_octav(other, OctavConfig(weight_bits=8, activation_bits=8, embedding_bits=8))
    new = other.get_submodule(name)
    if new.weight.shape != subject.model.get_submodule(name).weight.shape:
        raise ValueError("the history's layer has another shape now")
    subject.model.set_submodule(name, new)


@action(1)
def replace_embeddings(subject: Subject) -> None:
    """``set_input_embeddings``, of a float table."""
    old = subject.model.get_input_embeddings()
    if not isinstance(old, nn.Embedding):
        raise ValueError("the history's model has no tokens")
    new = nn.Embedding(old.num_embeddings, old.embedding_dim, old.padding_idx).to(subject.model.dtype)
    subject.model.set_input_embeddings(new)
    subject.model.tie_weights()


@action(1, first=[True, False])
def drop_layer(subject: Subject, first: bool = True) -> None:
    """Leave out one of two layers: if it is the first, the other's name changes."""
    layers = getattr(getattr(subject.kind.base(subject.model), "encoder", None), "layer", ())
    if len(layers) != 2:
        raise ValueError("the history's model has not two layers")
    subject.model.base_model.encoder.layer = layers[1:] if first else layers[:1]
    subject.model.config.num_hidden_layers = 1


_SETTINGS = [("num_bits", 8), ("num_bits", 3), ("clip", "max"), ("gradient_estimator", "ste"), ("signed", True)]


@action(2, operand=["weight", "input", "query"], layer=[0, 2, 5, -1], setting=_SETTINGS)
def change_quantizer(
    subject: Subject, operand: str = "weight", layer: int = 0, setting: tuple[str, Any] = _SETTINGS[0]
) -> None:
    """Another value of an attribute of a quantizer by hand."""
    quantizer = _quantizer(subject, operand, layer)
    setattr(quantizer, *setting)


@action(2, operand=["weight", "input", "query"], layer=[0, 2, 5, -1], new=["identity", "identity", "max"])
def replace_quantizer(subject: Subject, operand: str = "weight", layer: int = 0, new: str = "identity") -> None:
    """Another quantizer, or none, by hand."""
    _quantizer(subject, operand, layer)
    _, owner = _owner(subject, operand, layer)
    made = nn.Identity() if new == "identity" else FakeQuantize(6, clip="max", gradient_estimator="pwl")
    setattr(owner, f"{operand}_quantizer", made)


def _owner(subject: Subject, operand: str, layer: int) -> tuple[str, Any]:
    return _choose(subject.model, layer, QuantizedAttention if operand == "query" else QuantizedLayer)


def _quantizer(subject: Subject, operand: str, layer: int) -> FakeQuantize:
    """One that computes its clips from the data; what is frozen or packed goes with its settings."""
    _, owner = _owner(subject, operand, layer)
    quantizer = getattr(owner, f"{operand}_quantizer", None)
    if not isinstance(quantizer, FakeQuantize) or quantizer.is_frozen or list(quantizer.buffers()):
        raise ValueError("the history's operand is in float, frozen or packed")
    return quantizer


@action(2, how=["deepcopy", "pickle", "average"])
def copied(subject: Subject, how: str = "deepcopy") -> None:
    """Go on with a copy. Later steps must not reach the original."""
    before = subject.picture()
    pair = subject.outer, subject.model
    if how == "deepcopy":
        outer, model = copy.deepcopy(pair)
    elif how == "average":
        average = torch.optim.swa_utils.AveragedModel(subject.model, use_buffers=True)
        average.update_parameters(subject.model)
        outer = model = average.module
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        outer, model = torch.load(file, weights_only=False)
    difference = before.difference(Picture.of(model, subject.batch))
    if difference:
        raise Broken(f"a copy ({how}) is another model", difference)
    subject.others.append(("the original of a copy", subject.model, before))
    subject.outer, subject.model = outer, model


class Own(nn.Module):
    """A user's module around a model, with a layer of its own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner, self.extra = model, nn.Linear(4, 4)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self.inner(*args, **kwargs)


class Pair(nn.Module):
    """Two models in one, such as the encoders of questions and passages, made from one config object."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.left, self.right = model, type(model)(model.config).eval().to(model.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first one's outputs, after those of the other."""
        self.right(*args, **kwargs)
        return self.left(*args, **kwargs)


class First(nn.Sequential):
    """``nn.Sequential`` that can be called with keyword arguments, as SentenceTransformer is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first module's outputs."""
        return self[0](*args, **kwargs)


_WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "own": Own,
    "sequential": First,
    "data_parallel": nn.DataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "pair": Pair,
}


@action(3, how=list(_WRAPPERS))
def wrap(subject: Subject, how: str = "own") -> None:
    """A module around the model."""
    if how == "pair" and subject.outer is not subject.model:
        raise ValueError("the history's model is wrapped already")
    subject.outer = _WRAPPERS[how](subject.outer)


@action(3, targets=["some", "all"], save_head=[False, False, True])
def lora(subject: Subject, targets: str = "some", save_head: bool = False) -> None:
    """PEFT's LoRA; ``save_head``: a copy of the head is trained beside it."""
    if isinstance(subject.outer, peft.PeftModel) or subject.outer is not subject.model:
        raise ValueError("the history's model is wrapped already")
    head = subject.kind.head.split(".")[0]
    config = peft.LoraConfig(
        r=2,
        target_modules="all-linear" if targets == "all" else list(subject.kind.adapted),
        init_lora_weights=False,
        modules_to_save=[head] if save_head else None,
    )
    subject.outer = peft.get_peft_model(subject.model, config)
    subject.model = subject.outer.get_base_model()
    for name, module in subject.model.named_modules():
        if save_head and isinstance(module, peft.utils.ModulesToSaveWrapper):
            for inner, layer in module.modules_to_save["default"].named_modules():
                weight = getattr(layer, "weight", None)
                if weight is not None and not (isinstance(weight, nn.Parameter) and weight.requires_grad):
                    raise Broken("modules_to_save does not train a weight", f"{name} {inner}")


@action(4, how=["merge", "merge", "unload"])
def end_lora(subject: Subject, how: str = "merge") -> None:
    """``merge_and_unload``, which must add the adapter's part to the weights, or ``unload``."""
    if not isinstance(subject.outer, peft.PeftModel):
        raise ValueError("the history's model has no adapter")
    expected: dict[str, Tensor] = {}
    for name, module in subject.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            weight = module.get_base_layer().weight.detach()
            expected[name] = weight + (module.get_delta_weight("default") if how == "merge" else 0)
    model = subject.outer.merge_and_unload() if how == "merge" else subject.outer.unload()
    for name, weight in expected.items():
        if not torch.allclose(model.get_submodule(name).weight, weight, atol=1e-2, rtol=1e-2):
            raise Broken(f"an adapter is lost ({how})", name)
    subject.set_model(model)


@action(3, dtype=["bfloat16", "float64", "half()"])
def cast(subject: Subject, dtype: str = "bfloat16") -> None:
    """Another dtype, but for buffers that are not saved, such as Llama's frequencies, which come back as they were."""
    model, saved = subject.model, subject.model.state_dict().keys()
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved}
    if dtype == "half()":
        model.half()
    else:
        model.to(getattr(torch, dtype))
    for name, buffer in kept.items():
        model.get_buffer(name).data = buffer


@action(4, steps=[1, 3])
def train(subject: Subject, steps: int = 1) -> None:
    """Gradient descent, in training mode."""
    modes = [(module, module.training) for module in subject.outer.modules()]
    batch = subject.batch
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(subject.model.dtype)
    subject.model.train()
    try:
        parameters = [p for p in subject.model.parameters() if p.requires_grad]
        for _ in range(steps):
            result = subject.model(**batch)
            if not parameters:
                raise ValueError("the history's model has nothing to train")
            gradients = torch.autograd.grad(result[0].float().square().mean(), parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter -= 0.1 * gradient
    finally:
        for module, mode in modes:
            module.training = mode


@action(1, mode=[True, False])
def training_mode(subject: Subject, mode: bool = True) -> None:
    """``train`` or ``eval``, of what is around the model."""
    subject.outer.train(mode)


@action(1, which=["base", "all", "biases"], on=[False, True])
def requires_grad(subject: Subject, which: str = "base", on: bool = False) -> None:
    """Freeze some parameters, or the contrary."""
    module = subject.model.base_model if which == "base" else subject.model
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and (which != "biases" or name.endswith("bias")):
            parameter.requires_grad_(on)


_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda weight: weight.mul_(0.5),
    "data.copy_": lambda weight: weight.data.copy_(torch.ones(weight.shape)),
    "data =": lambda weight: setattr(weight, "data", torch.ones_like(weight)),
    "init": lambda weight: nn.init.ones_(weight),
    "[0] =": lambda weight: weight.__setitem__(0, 0.25),
    "out=": lambda weight: torch.mul(weight, 0.5, out=weight),
}


@action(3, layer=[0, 2, 5, -1], how=[*_WRITES, "assign"])
def write(subject: Subject, layer: int = 0, how: str = "mul_") -> None:
    """Write into a weight: that must take effect, or raise."""
    name, module = _choose(subject.model, layer)
    if how == "assign":
        module.weight = nn.Parameter(torch.ones_like(module.weight))
        if not bool((module.weight == 1).all()):
            raise Broken("the assignment of a weight is lost", name)
        return
    with torch.no_grad():
        expected = module.weight.detach().clone() + 0
        _WRITES[how](expected)
        before = module.weight.detach() + 0
        _WRITES[how](module.weight)
        if torch.equal(module.weight.detach() + 0, before) and not torch.equal(expected, before):
            raise Broken(f"a write into a weight is lost ({how})", name)


@action(3, earlier=[-1, -2, 0], into=["current", "fresh"], strict=[True, False])
def resume(subject: Subject, earlier: int = -1, into: str = "current", strict: bool = True) -> None:
    """Load an earlier state dict: the outputs are then the earlier ones, or the call says what it did not load."""
    pictures = subject.earlier[:-1] or subject.earlier
    picture = pictures[earlier % len(pictures)]
    if into == "current":
        outer, model = copy.deepcopy((subject.outer, subject.model))
    else:
        outer = model = type(subject.model)(copy.deepcopy(subject.model.config)).eval().to(subject.model.dtype)
        if subject.config is not None:
            apply_octav(model, subject.config)
    result = model.load_state_dict(picture.state, strict=strict)
    told = result.missing_keys or result.unexpected_keys
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    comparable = settings(model) == picture.settings and all(
        dtypes.get(name) == tensor.dtype for name, tensor in picture.state.items()
    )
    if comparable and not told and not same_outputs(outputs(model, subject.batch), picture.outputs):
        raise Broken(f"a resumed model ({into}) is another one, silently")
    if not told:
        subject.outer, subject.model = outer, model


_SAVES = ["plain", "sharded", "state_dict", "over"]


def _save(subject: Subject, folder: str, how: str) -> None:
    if how == "sharded":
        subject.model.save_pretrained(folder, max_shard_size="4KB")
    elif how == "state_dict":  # as Trainer does
        subject.model.save_pretrained(folder, state_dict=subject.model.state_dict())
    elif how == "over":  # the checkpoint of another form
        other = apply_octav(type(subject.model)(copy.deepcopy(subject.model.config)), OctavConfig(2, 2))
        other.save_pretrained(folder, max_shard_size="4KB")
        subject.model.save_pretrained(folder)
    else:
        subject.model.save_pretrained(folder)


@action(4, how=_SAVES, options=[{}, {}, {"device_map": "cpu"}, {"dtype": torch.float64}])
def load(subject: Subject, how: str = "plain", options: Arguments | None = None) -> None:
    """Save, and go on with what ``from_pretrained`` gives."""
    if has_adapters(subject.model):
        raise ValueError("the history's model has adapters")
    saved_and_loaded(subject.model, subject.batch, lambda folder: _save(subject, folder, how))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        _save(subject, folder, how)
        subject.set_model(type(subject.model).from_pretrained(folder, **(options or {})))


def _base_batch(subject: Subject) -> Arguments:
    return {name: value for name, value in subject.batch.items() if not name.startswith("decoder_")}


@action(4, other=["base", "head", "num_labels"], go_on=[False, True])
def load_as(subject: Subject, other: str = "base", go_on: bool = False) -> None:
    """Load as another class, or with another number of labels: the common part is the same, the rest is sound."""
    kind, batch = subject.kind, _base_batch(subject)
    if other == "num_labels" and kind.head in _FIXED_HEADS:
        other = "head"
    if has_adapters(subject.model):
        raise ValueError("the history's model has adapters")
    expected = outputs(kind.base(subject.model), batch)[0]
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        subject.model.save_pretrained(folder)
        if other == "base":
            own = subject.model.state_dict().keys()
            prefix = f"{subject.model.base_model_prefix}."
            bare = kind.base_class(copy.deepcopy(subject.model.config))
            is_part = all(name in own or prefix + name in own for name in bare.state_dict())
            try:
                model = kind.base_class.from_pretrained(folder)
            except Exception as error:
                if is_part and not isinstance(error, Broken):
                    raise Broken("the base class cannot load it", f"{type(error).__name__}: {error}") from error
                raise
        elif other == "head":
            model = kind.other_class.from_pretrained(folder)
        else:
            model = type(subject.model).from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    base = kind.base(model) if hasattr(model, "encoder") or other != "base" else model
    if not torch.equal(outputs(copy.deepcopy(base), batch)[0], expected):
        raise Broken(f"the common part of another class ({other}) has other outputs")
    whole = batch if isinstance(model, kind.base_class) and "decoder_input_ids" not in subject.batch else subject.batch
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if tensor.is_floating_point() and not bool((tensor.detach() + 0).abs().max() < 1e3):
            raise Broken(f"loaded as another class ({other}), a tensor is uninitialized", name)
    if other == "num_labels":
        outputs(model, whole)
        if go_on:
            subject.set_model(model)


@action(2, bits=[None, 8, 3])
def sibling(subject: Subject, bits: int | None = None) -> None:
    """Another model made from the same config object; float, or with other bits. Saving either gives that one."""
    model = type(subject.model)(subject.model.config).eval()
    if bits is not None:
        apply_octav(model, OctavConfig(weight_bits=bits, activation_bits=bits))
    subject.check_saving(model)
    subject.others.append(("a model of the same config", model, Picture.of(model, subject.batch)))
