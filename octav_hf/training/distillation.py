"""Knowledge distillation from a teacher, such as the float model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._utils.forward_pass import in_evaluation_mode
from .._utils.torch_private import forward_hooks, is_replica
from .._utils.transformers_compat import LOSS_MAPPING, ForCausalLMLoss
from .features import Features, check_accepts
from .logits import logit_loss, logits_of
from .padding import IGNORED, has_decoder, inputs_by_name


class DistillationHandle(tuple[RemovableHandle, ...]):
    """The hooks of a distilled model."""

    def remove(self) -> None:
        """Remove the hooks, which ends distillation."""
        for handle in self:
            handle.remove()


def distill(
    model: nn.Module,
    teacher: nn.Module,
    *,
    weight: float = 1.0,
    temperature: float = 2.0,
    hidden_states: float = 0.0,
    attentions: float = 0.0,
    layers: Sequence[int] | None = None,
    feature_steps: float = 1.0,
) -> DistillationHandle:
    """Add the divergence from the teacher's logits to the training loss of ``model``.

    The output's ``loss`` becomes ``(1 - weight) * label loss + weight * T² * KL(teacher || model)``, with a temperature
    ``T`` in both softmaxes (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"). KL is computed in
    float32 or wider over the last dimension of each output named ``logits`` or ending in ``_logits``, and of a
    segmentation's ``logits`` ``[batch, config.num_labels, height, width]`` over dimension 1; then averaged over all
    other positions, then over these outputs. Padding is left out of the softmaxes of ``start_logits`` and
    ``end_logits`` and of the average over ``[batch, tokens, classes]``, if an ``attention_mask`` of shape
    ``[batch, tokens]`` is given, or for a decoder a ``decoder_attention_mask`` or labels of -100.

    ``hidden_states`` and ``attentions`` make the student learn features too, which give each layer a target. These
    losses are added, each averaged over layers and computed in float32 or wider:

    - ``hidden_states * sum((h - h_teacher)²) / sum(h_teacher²)`` for each layer's output ``[batch, tokens, features]``;
    - ``attentions * KL(teacher || model)`` for attention maps ``[batch, heads, queries, keys]``, averaged over the
      first three dimensions. The student's maps are its probabilities before they are quantized. Keys whose probability
      dropout has set to 0 are left out. Both models need ``attn_implementation="eager"``, because other implementations
      do not return maps.

    Padding is left out as above, including queries that are padding. An encoder-decoder model learns the features of
    encoder, decoder and cross-attention. Teacher and student must have the same number of layers, width and number of
    heads. ``feature_steps=0.6`` learns features only in the first 60 % of Trainer's steps, also in a resumed run.

    The teacher runs only in forward passes in training mode with gradients, on the same inputs without the labels.
    Trainer works without other changes, with these limits:

    - ``label_smoothing_factor`` and ``compute_loss_func`` replace the model's loss; where the forward can detect this,
      it raises an error.
    - If Trainer passes ``num_items_in_batch``, the KL of a micro-batch is weighted by its share of the labels, as is
      the label loss if the model uses that argument.
    - With ``bf16=True`` or ``fp16=True``, the teacher runs in its own dtype, to which floating-point inputs but masks
      are cast; load it in bfloat16 to make it faster.

    Args:
        model: the student, whose forward returns a ``ModelOutput``; before or after ``apply_octav``.
        teacher: a model with the same kind of outputs, such as the float model that training started from. It is not
            saved with ``model``, and its parameters do not change. It runs in evaluation mode and is moved to the
            model's device at the first step.
        weight: weight of the teacher's loss, in (0, 1]; at 1 no labels are needed.
        temperature: above 0; a higher temperature gives unlikely classes more weight.
        hidden_states: weight of the loss of hidden states, >= 0; they are not learned at 0.
        attentions: weight of the loss of attention maps, >= 0; they are not learned at 0.
        layers: indices of the layers whose features are learned; negative ones count from the end. ``None``: all.
        feature_steps: fraction of Trainer's steps in which features are learned, in (0, 1]. Values below 1 require
            Trainer, whose callback reports the step; in your own loop, call ``remove()`` and ``distill`` again.

    Returns:
        A handle whose ``remove()`` ends distillation. A deep copy or a pickle of ``model`` is not distilled. After a
        step with features, ``model`` cannot be pickled, because Transformers' hooks that collect them cannot.

    Raises:
        TypeError: ``model`` or ``teacher`` is not an ``nn.Module``.
        ValueError: an argument is out of range or has no effect, ``model`` is already distilled, or training it would
            change ``teacher``. In a training step: logits are not of two or more classes (such as MaskFormer's masks),
            logits or features differ in names or shapes, there is no loss, features have no gradient, or there are
            ``past_key_values``.
        RuntimeError: in a training step outside Trainer with ``feature_steps`` below 1.
    """
    for role, module in (("model", model), ("teacher", teacher)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"distill takes a {role} that is an nn.Module, got {type(module).__name__}")
    if not _is_number(weight) or not 0 < weight <= 1:
        raise ValueError(f"distill: weight must be a number above 0 and at most 1, got {weight!r}")
    if not _is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"distill: temperature must be a finite number above 0, got {temperature!r}")
    features = _features({"hidden_states": hidden_states, "attentions": attentions}, layers, feature_steps)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if teacher is model or any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError(
            f"distill: the teacher shares parameters with {type(model).__name__}, whose training would change it; load "
            "it a second time, or make a copy.deepcopy(model) before apply_octav, which works in place"
        )
    if any(distillations(model)):
        raise ValueError(
            f"distill: {type(model).__name__} is already distilled; call remove() of the handle that distill returned"
        )
    if features is not None:
        check_accepts(model, "model", features)
        check_accepts(teacher, "teacher", features)
    distillation = Distillation(teacher, weight, temperature, features, feature_steps)
    handles = [model.register_forward_hook(distillation, with_kwargs=True)]
    if features is not None:
        handles.append(model.register_forward_pre_hook(_Request(distillation, features), with_kwargs=True))
    return DistillationHandle(handles)


def distillations(model: nn.Module) -> Iterator["Distillation"]:
    """The distillations of the model and its modules."""
    hooks = (hook for module in model.modules() for hook in forward_hooks(module))
    return (hook for hook in hooks if isinstance(hook, Distillation))


def _features(weights: dict[str, float], layers: Sequence[int] | None, feature_steps: float) -> Features | None:
    for name, value in weights.items():
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"distill: {name} is the weight of a loss and must be a finite number >= 0, got {value!r}")
    if not _is_number(feature_steps) or not 0 < feature_steps <= 1:
        raise ValueError(f"distill: feature_steps must be a fraction above 0 and at most 1, got {feature_steps!r}")
    weights = {name: value for name, value in weights.items() if value}
    if layers is not None:
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
            raise ValueError(f"distill: layers must be a list of indices, such as [0, -1], or None, got {layers!r}")
        if any(not isinstance(number, int) or isinstance(number, bool) for number in layers):
            raise ValueError(f"distill: layers must be integers, got {layers!r}")
    if not weights and (layers is not None or feature_steps != 1):
        name = "layers" if layers is not None else "feature_steps"
        raise ValueError(
            f"distill: {name} has no effect without features; set hidden_states or attentions, or leave it out"
        )
    return Features(weights, layers) if weights else None


class Distillation:
    """The forward hook. It is not a module, so that parameters and checkpoints do not include the teacher."""

    def __init__(
        self, teacher: nn.Module, weight: float, temperature: float, features: Features | None, feature_steps: float
    ):
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.features, self.feature_steps = features, feature_steps
        # Whether features are learned in this step; None if the step is unknown.
        self.learns_features = None if feature_steps < 1 else features is not None
        self.asked: tuple[str, ...] = ()  # feature arguments that the caller itself has set in this call

    def at_step(self, step: int, steps: int) -> None:
        """Decide whether features are learned: ``step`` (from 0) of ``steps`` is about to begin."""
        self.learns_features = self.features is not None and step < max(1, round(self.feature_steps * steps))

    def outside_training(self) -> None:
        """Reset after training: the step is unknown."""
        self.learns_features = None if self.feature_steps < 1 else self.features is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_not_distilled,)  # a copy of the student must not copy the teacher

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return None
        name = type(model).__name__
        if is_replica(model):
            raise RuntimeError(
                f"{name} is distilled, but nn.DataParallel would share one teacher between several devices; start one "
                "process per device with torchrun or accelerate launch"
            )
        inputs = inputs_by_name(model, args, kwargs)
        logits = logits_of(model, output, name, inputs)
        if all(field.name != "loss" for field in fields(output)):
            raise ValueError(
                f"{name} is distilled, but its output, {type(output).__name__}, has no field loss; use a model with a "
                "head, such as AutoModelForQuestionAnswering"
            )
        if inputs.get("num_items_in_batch") is not None and inputs.get("labels") is None:
            raise ValueError(
                f"{name} is distilled, but its loss is not used: with label_smoothing_factor or compute_loss_func, "
                "Trainer removes the labels and computes another loss; do not set these"
            )
        if self.weight < 1 and output.loss is None:
            raise ValueError(
                f"{name} is distilled with weight={self.weight}, but its output has no loss; pass the labels, or write "
                "weight=1.0 to learn from the teacher alone"
            )
        taught, targets = self._teach(name, inputs, logits)
        kl, share = logit_loss(model, logits, targets, self.temperature, inputs), _share(model, inputs)
        loss, hidden = self.weight * self.temperature**2 * share * kl, {}
        if self.features is not None and self.learns_features:
            loss = loss + share * self.features.loss(model, output, self.teacher, taught, inputs)
            hidden = dict.fromkeys(self.features.fields(output, self.asked))
        if self.weight < 1:
            loss = loss + (1 - self.weight) * output.loss
        return replace(output, loss=loss, **hidden)

    def _teach(self, student: str, inputs: dict[str, Any], logits: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The teacher's output, and the logits in it."""
        device = next(iter(logits.values())).device
        parameter = next(self.teacher.parameters(), None)
        if parameter is not None and parameter.device != device:
            self.teacher.to(device)
        # The inputs of a decoder may be computed from the labels.
        given = {name: value for name, value in inputs.items() if has_decoder(self.teacher) or not _is_label(name)}
        given.pop("num_items_in_batch", None)
        if given.get("past_key_values") is not None:
            raise ValueError(
                f"{student} is distilled, and the teacher cannot use past_key_values, the cache of {student}; train on "
                "whole sequences without a cache"
            )
        dtype = next((value.dtype for value in self.teacher.parameters() if value.is_floating_point()), None)
        given = {name: _in_dtype(name, value, dtype) for name, value in given.items()}
        with torch.no_grad(), in_evaluation_mode(self.teacher):
            output = self.teacher(**given)
        name = f"the teacher {type(self.teacher).__name__}"
        targets = logits_of(self.teacher, output, name, given)
        for field, values in logits.items():
            found = tuple(targets[field].shape) if field in targets else "missing"
            if found != tuple(values.shape):
                raise ValueError(
                    f"{student} is distilled: its {field} have shape {tuple(values.shape)}, but those of {name} are "
                    f"{found}; use a teacher with the same outputs, labels and vocabulary"
                )
        return output, targets


class _Request:
    """The forward pre-hook, which requests the features as outputs."""

    def __init__(self, distillation: Distillation, features: Features):
        self.distillation, self.features = distillation, features

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_not_requested,)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return None
        if self.distillation.learns_features is None:
            raise RuntimeError(
                f"{type(model).__name__} is distilled with feature_steps={self.distillation.feature_steps}, but only "
                "Trainer reports the step; in your own loop, leave feature_steps out, and after these steps call "
                "remove() of the handle and distill(model, teacher) without features"
            )
        if not self.distillation.learns_features:
            return None
        inputs = inputs_by_name(model, args, kwargs)
        asked = [name for name in self.features.arguments if _asked(model, inputs, name)]
        self.distillation.asked = tuple(asked)
        return (), inputs | self.features.arguments


def _asked(model: nn.Module, inputs: dict[str, Any], argument: str) -> bool:
    value = inputs.get(argument)
    return bool(getattr(getattr(model, "config", None), argument, False) if value is None else value)


def _not_requested(model: nn.Module, args: Any, kwargs: Any) -> None:
    """The forward pre-hook of a copy."""


def _not_distilled(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """The forward hook of a copy."""


def _share(model: nn.Module, inputs: dict[str, Any]) -> Tensor | float:
    """This micro-batch's share of the labels of the accumulated batch, counted as in Trainer."""
    items = inputs.get("num_items_in_batch")
    if items is None:
        return 1.0  # Trainer divides by the number of micro-batches
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs["labels"]
        if LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss and not has_decoder(model):
            labels = labels[..., 1:]
    return (labels != IGNORED).sum().to(torch.float32) / items


def _in_dtype(name: str, value: Any, dtype: torch.dtype | None) -> Any:
    """An input in the dtype of a model; masks keep theirs, in which their lowest value is finite."""
    is_input = isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name
    return value.to(dtype) if is_input and dtype is not None else value


def _is_label(name: str) -> bool:
    return "label" in name or name in ("start_positions", "end_positions")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
