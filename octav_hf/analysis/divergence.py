"""How far a model's outputs are from the float model's."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from .._utils.forward_pass import Batch, run_batches
from .._utils.torch_private import tree_leaves
from ..training.logits import class_logits, logit_loss
from ..training.padding import inputs_of, mask_of
from .simulated import check_has_float_weights, check_teacher
from .switching import in_float

_OTHER = "output"  # name of an output that is compared in place of logits


class FloatOutputs:
    """The float model's outputs on some batches, as the reference for a quantized model.

    The divergence of logits (fields ``logits``, ``start_logits``, …) is ``KL(float || quantized)`` over their classes
    or tokens, in nats, averaged over the fields, the other dimensions and the examples of all batches. Classes and
    padding are those of ``distill``; logits of anything else, such as MaskFormer's masks, are left out. KL divergence
    needs no labels and weights the error of each logit by the probability of its class. For models without logits of
    classes (base models, regression, multi-label classification) the divergence is the relative squared error
    ``sum((y - f)²) / sum(f²)`` of the first output ``y``, with ``f`` that of the float model, without padding tokens.

    Args:
        model: quantized, and neither packed nor converted to integer arithmetic.
        batches: as for ``calibrate_octav``; kept in memory.
        teacher: the float model; ``None``: ``model`` with all its quantizers turned off.
        function: name of the public function that calls this; errors begin with it.

    Attributes:
        batches: as a list.

    Raises:
        TypeError, ValueError: the model, the batches or the teacher is none of these; or the float model's outputs hold
            NaN or Inf.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        teacher: nn.Module | None = None,
        function: str = "FloatOutputs",
    ):
        check_has_float_weights(model, function)
        check_teacher(teacher, function)
        is_list = isinstance(batches, Iterable) and not isinstance(batches, Mapping | Tensor)
        self.batches: Any = list(batches) if is_list else batches  # run_batches refuses anything else
        self._function = function
        self._outputs: list[dict[str, Tensor]] = []
        source = model if teacher is None else teacher

        def keep(batch: Batch, output: Any) -> None:
            outputs = _compared(source, batch, output)
            for name, values in outputs.items():
                if not values.isfinite().all():
                    raise ValueError(
                        f"{function}: {name} of the float {type(source).__name__}, of shape {tuple(values.shape)}, "
                        f"holds NaN or Inf in batch {len(self._outputs) + 1}, so nothing can be compared with it; to "
                        "mask, write torch.finfo(dtype).min instead of -inf"
                    )
            self._outputs.append(outputs)

        with in_float(model) if teacher is None else nullcontext():
            run_batches(source, self.batches, function, None, keep)

    @property
    def measure(self) -> str:
        """Name of the divergence, with its unit."""
        is_other = _OTHER in self._outputs[0]
        return "Relative squared error of the output" if is_other else "KL divergence of the logits (nats)"

    def divergence_of(self, model: nn.Module) -> float:
        """The divergence of ``model`` from the float model on the batches.

        Args:
            model: the quantized model, a part of it in float or not, or another one with the same outputs.

        Raises:
            ValueError: its outputs differ from the float model's in names or shapes; or the float model has no logits
                of classes, and its outputs are all 0.
        """
        found: list[float] = []
        weights: list[float] = []

        def compare(batch: Batch, output: Any) -> None:
            outputs, targets = _compared(model, batch, output), self._outputs[len(found)]
            ours, theirs = ({name: tuple(x.shape) for name, x in each.items()} for each in (outputs, targets))
            if ours != theirs:
                raise ValueError(
                    f"{self._function}: the model's outputs have the shapes {ours}, and the float model's {theirs}; "
                    "pass a teacher with the same head"
                )
            if _OTHER in outputs:
                error, size = _squares(model, batch, outputs[_OTHER], targets[_OTHER])
                found.append(error)
                weights.append(size)
            else:
                rows = next(iter(ours.values()))[0]
                found.append(_divergence(model, batch, outputs, targets) * rows)
                weights.append(rows)

        run_batches(model, self.batches, self._function, None, compare)
        if not sum(weights):
            raise ValueError(
                f"{self._function}: the outputs of the float model are all 0, so no error is relative to them"
            )
        return sum(found) / sum(weights)


def _compared(model: nn.Module, batch: Batch, output: Any) -> dict[str, Tensor]:
    """The outputs to compare, by name: logits of classes, otherwise the first floating-point tensor but scalars."""
    logits = class_logits(model, output, inputs_of(model, batch))
    if logits:
        return {name: values.detach() for name, values in logits.items()}
    tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    found = next((x for x in tensors if x.is_floating_point() and x.dim()), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} returns no floating-point tensor, so there are no outputs to compare")
    return {_OTHER: found.detach()}


def _divergence(model: nn.Module, batch: Batch, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> float:
    # The divergence of one module at 8 bits is as small as the rounding errors of a float32 sum.
    outputs, targets = ({name: x.double() for name, x in each.items()} for each in (outputs, targets))
    return float(logit_loss(model, outputs, targets, 1.0, inputs_of(model, batch)))


def _squares(model: nn.Module, batch: Batch, output: Tensor, target: Tensor) -> tuple[float, float]:
    """``sum((y - f)²)`` and ``sum(f²)`` without padding tokens."""
    output, target = output.double(), target.to(output.device).double()
    mask = mask_of(inputs_of(model, batch).get("attention_mask"), tuple(output.shape[:2]), output)
    if mask is not None:
        output, target = output[mask], target[mask]
    return float((output - target).square().sum()), float(target.square().sum())
