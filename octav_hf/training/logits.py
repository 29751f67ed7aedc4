"""Distillation of logits."""

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .padding import decoder_mask, has_decoder, mask_of

# Logits of question answering, whose last dimension is tokens; in those of all other heads a dimension is classes.
TOKEN_LOGITS = ("start_logits", "end_logits")


_OTHER_PROBLEMS = ("regression", "multi_label_classification")


def class_logits(model: nn.Module, output: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Logits of single-label classification in the output for these inputs, by field; empty if there are none."""
    if not isinstance(output, ModelOutput) or _problem_type(model) in _OTHER_PROBLEMS:
        return {}
    return {field: values for field, values in _by_field(output).items() if not _problem(model, field, values, inputs)}


def logits_of(model: nn.Module, output: Any, name: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The logits of an output by field; errors call the model ``name``.

    Raises:
        TypeError: the output is not a ``ModelOutput``.
        ValueError: it has no logits, or some are not those of a classification with two or more classes.
    """
    if not isinstance(output, ModelOutput) or not is_dataclass(output):
        raise TypeError(
            f"distill needs the logits by name: {name} must return a ModelOutput, not {type(output).__name__}; remove "
            "return_dict=False from the call and the config"
        )
    found = _by_field(output)
    if not found:
        raise ValueError(f"distill needs logits, but the output of {name} has only: {', '.join(output)}")
    if _problem_type(model) in _OTHER_PROBLEMS:
        raise ValueError(f"distill compares probabilities of classes, but {name} is for {_problem_type(model)}")
    for field, values in found.items():
        problem = _problem(model, field, values, inputs)
        if problem:
            raise ValueError(
                f"distill compares probabilities of classes, but {field} of {name}, of shape {tuple(values.shape)}, "
                f"{problem}"
            )
    return found


def logit_loss(
    student: nn.Module,
    logits: dict[str, Tensor],
    targets: dict[str, Tensor],
    temperature: float,
    inputs: dict[str, Any],
) -> Tensor:
    """``KL(teacher || student)`` at a temperature, without the padding in ``inputs``, averaged over the fields."""
    losses = []
    for field, values in logits.items():
        target = targets[field].to(values.device)
        if _class_dim(student, field, values) == 1:
            target, values = target.movedim(1, -1), values.movedim(1, -1)
        over_tokens = field in TOKEN_LOGITS
        tokens = values.shape[-1:] if over_tokens else values.shape[1:-1]
        is_decoders = has_decoder(student) and not over_tokens
        mask = decoder_mask(inputs) if is_decoders else inputs.get("attention_mask")
        mask = mask_of(mask, (*values.shape[:1], *tokens), values)
        losses.append(_divergence(target, values, temperature, over_tokens, mask))
    return torch.stack(losses).mean()


def _by_field(output: ModelOutput) -> dict[str, Tensor]:
    fields = (field for field in output if field == "logits" or field.endswith("_logits"))
    return {field: output[field] for field in fields if isinstance(output[field], Tensor)}


def _problem(model: nn.Module, field: str, values: Tensor, inputs: dict[str, Any]) -> str:
    """Why logits are not those of two or more classes; empty if they are."""
    dim = _class_dim(model, field, values)
    if dim is None:
        return "have no known dimension of classes, such as [batch, config.num_labels, height, width]"
    if field in TOKEN_LOGITS and values.ndim >= 2:
        return ""
    if values.ndim < 2 or values.shape[dim] < 2:
        return "have fewer than two classes"
    if values.shape[-1] != _num_labels(model) and tuple(values.shape) in _places(inputs):
        return "have one value for each token or pixel"  # such as those of ELECTRA's discriminator and of CLIPSeg
    return ""


def _places(inputs: dict[str, Any]) -> list[tuple[int, ...]]:
    """``(batch, tokens)`` and ``(batch, height, width)`` of the inputs."""
    ids, embeds, pixels = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values"))
    found = [tuple(ids.shape)] if isinstance(ids, Tensor) else []
    found += [tuple(embeds.shape[:-1])] if isinstance(embeds, Tensor) else []
    return [*found, (len(pixels), *pixels.shape[-2:])] if isinstance(pixels, Tensor) else found


def _class_dim(model: nn.Module, field: str, values: Tensor) -> int | None:
    """The dimension of classes, or of tokens; ``None`` if none is known, as in masks ``[batch, queries, h, w]``."""
    if values.ndim <= 3:
        return -1
    if field != "logits":
        return None  # masks, which may be as many as there are labels
    config = getattr(model, "config", None)
    if values.shape[-1] == getattr(config, "vocab_size", None):
        return -1  # of several sequences, such as the choices of GPT2DoubleHeadsModel
    return 1 if values.shape[1] == _num_labels(model) else None


def _num_labels(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "num_labels", None)


def _problem_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "problem_type", None)


def _divergence(teacher: Tensor, student: Tensor, temperature: float, over_tokens: bool, mask: Tensor | None) -> Tensor:
    """Mean KL(teacher || student) over all positions before the last dimension."""
    teacher, student = (x.to(torch.promote_types(x.dtype, torch.float32)) / temperature for x in (teacher, student))
    if over_tokens and mask is not None:
        padded = ~mask.reshape(len(mask), *(1,) * (student.ndim - 2), -1)
        # Not -inf, because the difference of two would be NaN.
        teacher, student = (x.masked_fill(padded, torch.finfo(x.dtype).min) for x in (teacher, student))
    log_targets = teacher.log_softmax(dim=-1)
    divergence = F.kl_div(student.log_softmax(dim=-1), log_targets, reduction="none", log_target=True).sum(dim=-1)
    if over_tokens or mask is None:
        return divergence.mean()
    return divergence.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
