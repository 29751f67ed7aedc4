"""Distillation of features: hidden states and attention maps."""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .padding import attention_mask, decoder_mask, has_decoder, mask_of

_Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Features:
    """The features to learn, and the weights of their losses.

    Args:
        weights: ``"hidden_states"`` and ``"attentions"``, or one of them -> weight of its loss.
        layers: indices of layers; negative ones count from the end. ``None``: all.
    """

    weights: dict[str, float]
    layers: Sequence[int] | None

    @property
    def arguments(self) -> dict[str, bool]:
        """The arguments of a forward that request the features."""
        return {f"output_{kind}": True for kind in self.weights}

    def fields(self, output: Any, asked: Collection[str]) -> list[str]:
        """The fields of an output with features, except those whose argument is in ``asked``."""
        return [name for kind in self.weights if f"output_{kind}" not in asked for name in _fields(output, kind)]

    def loss(self, student: nn.Module, outputs: Any, teacher: nn.Module, targets: Any, inputs: dict[str, Any]) -> Any:
        """The weighted sum of the losses, each averaged over layers.

        Raises:
            ValueError: an output lacks the features, they differ in number or shape, or they have no gradient.
        """
        total: Tensor | float = 0.0
        for kind, weight in self.weights.items():
            losses = []
            for field in _fields(outputs, kind):
                found = self._of_layers(student, field, outputs)
                wanted = self._of_layers(teacher, field, targets)
                _check(student, field, found, teacher, wanted)
                mask = _mask(student, field, inputs)
                for target, values in zip(wanted, found, strict=True):
                    of_tokens = mask_of(mask, _tokens(kind, values), values)
                    losses.append(_LOSSES[kind](target.to(values.device), values, of_tokens))
            if not losses:
                raise ValueError(_missing(kind, student))
            total = total + weight * torch.stack(losses).mean()
        return total

    def _of_layers(self, model: nn.Module, field: str, output: Any) -> list[Tensor]:
        """The features of the chosen layers, without the first hidden state, which is the input of the first layer."""
        if field not in _fields(output, _kind(field)):
            raise ValueError(_missing(_kind(field), model, field))
        values = output[field][1:] if _kind(field) == "hidden_states" else output[field]
        if self.layers is None:
            return list(values)
        outside = [number for number in self.layers if not -len(values) <= number < len(values)]
        if outside:
            raise ValueError(
                f"{type(model).__name__} is distilled: its {field} are of {len(values)} layers, but layers contains "
                f"{outside[0]}; indices go from 0 to {len(values) - 1}, or from -1 backwards"
            )
        return [values[number] for number in sorted(number % len(values) for number in self.layers)]


def check_accepts(model: nn.Module, role: str, features: Features) -> None:
    """Raise ``ValueError`` if the forward of ``model`` lacks the arguments that request the features."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    missing = [name for name in features.arguments if name not in parameters]
    if missing:
        raise ValueError(
            f"distill: the forward of the {role} {type(model).__name__} has no argument {missing[0]}; use a "
            f"Transformers model, or leave out {missing[0].removeprefix('output_')}"
        )


def hidden_state_loss(teacher: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """``sum((student - teacher)²) / sum(teacher²)``, in float32 or wider.

    Args:
        teacher, student: ``[batch, tokens, features]``, or without a mask any shape.
        mask: bool ``[batch, tokens]``, true for tokens that count; ``None``: all count.
    """
    teacher, student = _wide(teacher), _wide(student)
    error, size = (student - teacher).square(), teacher.square()
    if mask is not None:
        # Filled, not multiplied, because padding may hold Inf.
        error, size = (x.masked_fill(~mask[..., None], 0) for x in (error, size))
    return error.sum() / size.sum().clamp(min=torch.finfo(size.dtype).tiny)


def attention_loss(teacher: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over batch, heads and queries of ``KL(teacher || student)``, in float32 or wider.

    Keys whose probability dropout has set to 0 are left out: both maps are normalized over the other keys.

    Args:
        teacher, student: probabilities ``[batch, heads, queries, keys]``.
        mask: bool ``[batch, queries]``, true for queries that count; ``None``: all count.
    """
    teacher, student = _wide(teacher), _wide(student)
    smallest = torch.finfo(student.dtype).tiny ** 0.5  # the gradient, teacher / student, must not overflow
    kept = student > smallest
    p = teacher.masked_fill(~kept, 0)
    p = p / p.sum(dim=-1, keepdim=True).clamp(min=smallest)
    log_q = student.masked_fill(~kept, 1).log() - student.sum(dim=-1, keepdim=True).clamp(min=smallest).log()
    divergence = (torch.special.xlogy(p, p) - p * log_q).sum(dim=-1)
    if mask is None:
        return divergence.mean()
    queries = mask[:, None, :].expand_as(divergence)
    return divergence.masked_fill(~queries, 0).sum() / queries.sum().clamp(min=1)


_LOSSES: dict[str, _Loss] = {"hidden_states": hidden_state_loss, "attentions": attention_loss}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kind(field: str) -> str:
    """The kind of feature of an output's field, such as ``"attentions"``; empty for other fields."""
    return next((kind for kind in _LOSSES if field == kind or field.endswith(f"_{kind}")), "")


def _fields(output: Any, kind: str) -> list[str]:
    """The fields of an output with features of this kind by layer, unlike LLaVA's tensor ``image_hidden_states``."""
    return [name for name in output if _kind(name) == kind and isinstance(output[name], tuple | list) and output[name]]


def _mask(model: nn.Module, field: str, inputs: dict[str, Any]) -> Any:
    """The attention mask of the tokens, or of the queries, of this field."""
    is_decoders = has_decoder(model) and not field.startswith("encoder_")
    return decoder_mask(inputs) if is_decoders else attention_mask(inputs)


def _tokens(kind: str, values: Tensor) -> tuple[int, ...]:
    """``(batch, tokens)``."""
    return tuple(values.shape[:2]) if kind == "hidden_states" else (*values.shape[:1], *values.shape[2:3])


def _check(student: nn.Module, field: str, found: list[Tensor], teacher: nn.Module, wanted: list[Tensor]) -> None:
    names = f"{type(student).__name__} is distilled: its {field}", f"those of the teacher {type(teacher).__name__}"
    if len(found) != len(wanted):
        raise ValueError(
            f"{names[0]} are of {len(found)} layers, {names[1]} of {len(wanted)}; use a teacher with as many layers, "
            f"or leave out {_kind(field)}"
        )
    for values, target in zip(found, wanted, strict=True):
        if values.shape != target.shape:
            raise ValueError(
                f"{names[0]} have shape {tuple(values.shape)}, {names[1]} {tuple(target.shape)}; use a teacher of the "
                f"same width and number of heads, or leave out {_kind(field)}"
            )
    # Features of frozen layers have no gradient, unless an earlier layer is trained.
    reached = [values.requires_grad for values in found]
    if reached != sorted(reached) or not any(reached):
        raise ValueError(
            f"{names[0]} have no gradient; with gradient checkpointing, write "
            'gradient_checkpointing_kwargs={"use_reentrant": False}; if no parameter before them is trained, leave '
            f"out {_kind(field)}"
        )


def _missing(kind: str, model: nn.Module, field: str = "") -> str:
    remedy = f"leave out {kind}"
    if kind == "attentions":
        remedy = 'load it with attn_implementation="eager" (other implementations return no maps), or ' + remedy
    return f"distill: the output of {type(model).__name__} has no {field or kind}; {remedy}"
