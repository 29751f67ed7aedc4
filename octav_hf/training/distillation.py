"""Knowledge distillation from a teacher, such as the float model."""

import inspect
import math
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from .._utils.forward_pass import in_evaluation_mode
from .._utils.torch_private import forward_hooks, is_replica
from .._utils.transformers_compat import LOSS_MAPPING, ForCausalLMLoss

# Logits of question answering, whose last dimension is tokens; that of all others is classes.
_TOKEN_LOGITS = ("start_logits", "end_logits")
_IGNORED = -100  # label that losses ignore


def distill(model: nn.Module, teacher: nn.Module, *, weight: float = 1.0, temperature: float = 2.0) -> RemovableHandle:
    """Add the divergence from the teacher's logits to the loss of ``model`` in training.

    The output's ``loss`` becomes ``(1 - weight) * label loss + weight * T² * KL(teacher || model)`` with both softmaxes
    at temperature ``T`` (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"). KL is computed in float32
    or wider, over the last dimension of each output that is named ``logits`` or ends in ``_logits``, and averaged over
    all positions before it and then over those outputs. Padding does not count where it is known: tokens are left out
    of the softmaxes of ``start_logits`` and ``end_logits``, and of the average over ``[batch, tokens, classes]``, by an
    ``attention_mask`` of shape ``[batch, tokens]``; in a decoder by ``decoder_attention_mask``, or labels of -100.

    The teacher runs only in forward passes in training mode with gradients, on the same inputs without the labels.
    Trainer needs no other change, with these limits:

    - ``label_smoothing_factor`` and ``compute_loss_func`` replace the model's loss; if the forward can tell, that is an
      error.
    - If Trainer passes ``num_items_in_batch``, a micro-batch's KL is weighted by its share of the labels; so is the
      label loss if the model uses that argument.
    - With ``bf16=True`` or ``fp16=True`` the teacher runs in its own dtype; one loaded in bfloat16 is faster.

    Args:
        model: the student, whose forward returns a ``ModelOutput``; before or after ``apply_octav``.
        teacher: a model with the same kind of outputs, such as the float model that training started from. It is not
            saved with ``model``, and its parameters do not change. It runs in evaluation mode, and moves to the model's
            device at the first step.
        weight: the teacher's, in (0, 1]; at 1 no labels are needed.
        temperature: above 0; a higher one gives unlikely classes more weight.

    Returns:
        A handle whose ``remove()`` ends distillation. A deep copy or a pickle of ``model`` is not distilled.

    Raises:
        TypeError: ``model`` or ``teacher`` is not an ``nn.Module``.
        ValueError: ``weight`` or ``temperature`` is out of range, ``model`` is distilled already, or training it would
            change ``teacher``. At a training step: the outputs' logits differ in names or shapes, or there is no loss.
    """
    for role, module in (("model", model), ("teacher", teacher)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"distill takes a {role} that is an nn.Module, got {type(module).__name__}")
    if not _is_number(weight) or not 0 < weight <= 1:
        raise ValueError(f"distill: weight must be a number above 0 and at most 1, got {weight!r}")
    if not _is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"distill: temperature must be a finite number above 0, got {temperature!r}")
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if teacher is model or any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError(
            f"distill: the teacher shares parameters with {type(model).__name__}, whose training would change it; load "
            "it a second time, or take copy.deepcopy(model) before apply_octav, which works in place"
        )
    if any(isinstance(hook, _Distillation) for module in model.modules() for hook in forward_hooks(module)):
        raise ValueError(
            f"distill: {type(model).__name__} is distilled already; call remove() of the handle that distill returned"
        )
    return model.register_forward_hook(_Distillation(teacher, weight, temperature), with_kwargs=True)


class _Distillation:
    """The forward hook; not a module, to keep the teacher out of parameters and checkpoints."""

    def __init__(self, teacher: nn.Module, weight: float, temperature: float):
        self.teacher, self.weight, self.temperature = teacher, weight, temperature

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_not_distilled,)  # a copy of the student must not copy the teacher

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return None
        name = type(model).__name__
        if is_replica(model):
            raise RuntimeError(
                f"{name} is distilled, and nn.DataParallel has one teacher for several devices; start a process for "
                "each device with torchrun or accelerate launch"
            )
        inputs = _by_name(model, args, kwargs)
        logits = _logits(model, output, name)
        if all(field.name != "loss" for field in fields(output)):
            raise ValueError(f"{name} is distilled, but its output, {type(output).__name__}, has no field loss to set")
        if inputs.get("num_items_in_batch") is not None and inputs.get("labels") is None:
            raise ValueError(
                f"{name} is distilled, but its loss is not used: with label_smoothing_factor or compute_loss_func "
                "Trainer keeps the labels and computes another one; leave these out"
            )
        if self.weight < 1 and output.loss is None:
            raise ValueError(
                f"{name} is distilled with weight={self.weight}, but its output has no loss; pass the labels, or write "
                "weight=1.0 to learn from the teacher alone"
            )
        targets = self._teach(name, inputs, logits)
        losses = []
        for field, values in logits.items():
            mask = _mask(model, field, values, inputs)
            losses.append(_divergence(targets[field], values, self.temperature, field in _TOKEN_LOGITS, mask))
        loss = self.weight * self.temperature**2 * _share(model, inputs) * torch.stack(losses).mean()
        if self.weight < 1:
            loss = loss + (1 - self.weight) * output.loss
        return replace(output, loss=loss)

    def _teach(self, student: str, inputs: dict[str, Any], logits: dict[str, Tensor]) -> dict[str, Tensor]:
        device = next(iter(logits.values())).device
        parameter = next(self.teacher.parameters(), None)
        if parameter is not None and parameter.device != device:
            self.teacher.to(device)
        # A decoder's inputs may be made from the labels.
        given = {name: value for name, value in inputs.items() if _has_decoder(self.teacher) or not _is_label(name)}
        given.pop("num_items_in_batch", None)
        with torch.no_grad(), in_evaluation_mode(self.teacher):
            output = self.teacher(**given)
        name = f"the teacher {type(self.teacher).__name__}"
        targets = _logits(self.teacher, output, name)
        for field, values in logits.items():
            found = tuple(targets[field].shape) if field in targets else "missing"
            if found != tuple(values.shape):
                raise ValueError(
                    f"{student} is distilled: its {field} have shape {tuple(values.shape)}, those of {name} are "
                    f"{found}; take a teacher with the same outputs, labels and vocabulary"
                )
        return {field: targets[field].to(device) for field in logits}


def _not_distilled(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """The forward hook of a copy."""


def _logits(model: nn.Module, output: Any, name: str) -> dict[str, Tensor]:
    if not isinstance(output, ModelOutput) or not is_dataclass(output):
        raise TypeError(
            f"distill needs the logits by name: {name} must return a ModelOutput, not {type(output).__name__}; leave "
            "out return_dict=False, in the call and in the config"
        )
    fields_of_logits = (field for field in output if field == "logits" or field.endswith("_logits"))
    found = {field: output[field] for field in fields_of_logits if isinstance(output[field], Tensor)}
    if not found:
        raise ValueError(f"distill needs logits, and the output of {name} has only: {', '.join(output)}")
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(f"distill compares probabilities of classes, and {name} is for {problem}")
    for field, values in found.items():
        if values.ndim < 2 or (values.shape[-1] < 2 and field not in _TOKEN_LOGITS):
            raise ValueError(
                f"distill compares probabilities of classes, and {field} of {name}, of shape {tuple(values.shape)}, "
                "are not of two or more classes"
            )
    return found


def _mask(model: nn.Module, field: str, logits: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    """Which tokens are not padding, ``[batch, tokens]``; ``None`` if unknown."""
    mask = inputs.get("attention_mask")
    if field not in _TOKEN_LOGITS and _has_decoder(model):
        mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
        if mask is None and isinstance(labels, Tensor):
            mask = labels != _IGNORED
    tokens = logits.shape[-1:] if field in _TOKEN_LOGITS else logits.shape[1:-1]
    fits = isinstance(mask, Tensor) and mask.shape == (*logits.shape[:1], *tokens)
    return mask.to(logits.device).bool() if fits else None  # type: ignore[union-attr]


def _divergence(teacher: Tensor, student: Tensor, temperature: float, over_tokens: bool, mask: Tensor | None) -> Tensor:
    """Mean KL(teacher || student) over all positions before the last dimension."""
    teacher, student = (x.to(torch.promote_types(x.dtype, torch.float32)) / temperature for x in (teacher, student))
    if over_tokens and mask is not None:
        padded = ~mask.reshape(len(mask), *(1,) * (student.ndim - 2), -1)
        # Not -inf, whose differences are NaN.
        teacher, student = (x.masked_fill(padded, torch.finfo(x.dtype).min) for x in (teacher, student))
    log_targets = teacher.log_softmax(dim=-1)
    divergence = F.kl_div(student.log_softmax(dim=-1), log_targets, reduction="none", log_target=True).sum(dim=-1)
    if over_tokens or mask is None:
        return divergence.mean()
    return divergence.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def _share(model: nn.Module, inputs: dict[str, Any]) -> Tensor | float:
    """The share of an accumulated batch's labels in this micro-batch, counted as by Trainer."""
    items = inputs.get("num_items_in_batch")
    if items is None:
        return 1.0  # Trainer divides by the number of batches
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs["labels"]
        if LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss and not _has_decoder(model):
            labels = labels[..., 1:]
    return (labels != _IGNORED).sum().to(torch.float32) / items


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(f"{type(model).__name__} is distilled: pass its inputs by keyword, such as input_ids=ids")
    return dict(zip(names, args, strict=False)) | kwargs


def _is_label(name: str) -> bool:
    return "label" in name or name in ("start_positions", "end_positions")


def _has_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
