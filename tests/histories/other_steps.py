"""Steps that wrap, adapt, copy, resume, save or load a model."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from octav_hf import OctavConfig, apply_octav
from octav_hf.nn import PackedLayer

from .check import MEMORY, Broken, Picture, outputs, same_outputs, saved_and_loaded, settings
from .hand_steps import FIXED_HEADS, cast_saved
from .package_steps import base_batch
from .subject import Arguments, Subject, action, has_adapters


@action(2, how=["deepcopy", "pickle", "average"])
def copied(subject: Subject, how: str = "deepcopy") -> None:
    """Continue with a copy; later steps must not change the original."""
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
    """A user's wrapper of a model, with its own layer."""

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
    """PEFT's LoRA; with ``save_head``, a copy of the head is trained too."""
    if isinstance(subject.outer, peft.PeftModel) or subject.outer is not subject.model:
        raise ValueError("the history's model is wrapped already")
    head = subject.kind.head.split(".")[0]
    config = peft.LoraConfig(
        r=2,
        target_modules="all-linear" if targets == "all" else list(subject.kind.adapted),
        init_lora_weights=False,
        modules_to_save=[head] if save_head else None,
    )
    if save_head and any(isinstance(layer, PackedLayer) for layer in subject.model.get_submodule(head).modules()):
        try:  # which leaves the adapters that PEFT has put in before
            peft.get_peft_model(copy.deepcopy(subject.model), config)
        except RuntimeError as error:
            raise ValueError("the history's head is packed") from error
        raise Broken("modules_to_save takes a packed head")
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
    """``merge_and_unload``, which must add the adapter to the weights, or ``unload``."""
    if not isinstance(subject.outer, peft.PeftModel):
        raise ValueError("the history's model has no adapter")
    if len({parameter.dtype for parameter in subject.outer.parameters()}) > 1:
        raise ValueError("the history's adapters have another dtype, and PEFT stops in the middle of merging them")
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


@action(3, earlier=[-1, -2, 0], into=["current", "fresh"], strict=[True, False])
def resume(subject: Subject, earlier: int = -1, into: str = "current", strict: bool = True) -> None:
    """Load an earlier state dict: the outputs are the earlier ones, or the call reports what it did not load."""
    pictures = subject.earlier[:-1] or subject.earlier
    picture = pictures[earlier % len(pictures)]
    if into == "current":
        outer, model = copy.deepcopy((subject.outer, subject.model))
    else:
        outer = model = type(subject.model)(copy.deepcopy(subject.model.config)).eval()
        cast_saved(model, subject.model.dtype)
        if subject.config is not None:
            apply_octav(model, subject.config)
    result = model.load_state_dict(picture.state, strict=strict)
    told = result.missing_keys or result.unexpected_keys
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    # Without a quantizer it is up to torch and Transformers, as where a head is tied in one of the two models only.
    comparable = settings(model) == picture.settings != {} and all(
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
    """Save the model, and continue with the result of ``from_pretrained``."""
    if has_adapters(subject.model):
        raise ValueError("the history's model has adapters")
    saved_and_loaded(subject.model, subject.batch, lambda folder: _save(subject, folder, how), is_empty=how != "over")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        _save(subject, folder, how)
        subject.set_model(type(subject.model).from_pretrained(folder, **(options or {})))


@action(4, other=["base", "head", "num_labels"], go_on=[False, True])
def load_as(subject: Subject, other: str = "base", go_on: bool = False) -> None:
    """Load as another class or with another number of labels: the common part is equal, the rest is valid."""
    kind, batch = subject.kind, base_batch(subject)
    if other == "num_labels" and kind.head in FIXED_HEADS:
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
    """Create another model from the same config object, float or with other bits; both can be saved correctly."""
    model = type(subject.model)(subject.model.config).eval()
    if bits is not None:
        apply_octav(model, OctavConfig(weight_bits=bits, activation_bits=bits))
    subject.check_saving(model)
    subject.others.append(("a model of the same config", model, Picture.of(model, subject.batch)))
