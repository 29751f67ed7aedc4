"""``sensitivity``: how much each quantized module changes the model's outputs."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .._utils.forward_pass import Batch
from .._utils.progress import progress
from ..conversion.modules import operand_quantizers
from .divergence import FloatOutputs
from .switching import in_float


@dataclass(frozen=True)
class ModuleSensitivity:
    """What one module's quantization does to the model's outputs, by the divergence of ``FloatOutputs``.

    Attributes:
        module: full name.
        alone: by how much the divergence rises if only this module is quantized, and nothing was before.
        all_but: by how much it falls if this module alone is in float, and everything was quantized before. It may be
            negative: errors of two modules can cancel each other.
    """

    module: str
    alone: float
    all_but: float


def sensitivity(
    model: nn.Module, batches: Iterable[Batch], teacher: nn.Module | None = None
) -> list[ModuleSensitivity]:
    """Quantize each module alone, and all modules but it, and compare the model's outputs with the float model's.

    A layer counts with all its operands, and an attention module with the four of its matmuls. The model runs on each
    batch two times for every quantized module, and three times more: a batch or two of 32 sequences are enough to tell
    the worst modules.

    Args:
        model: quantized by ``apply_octav``, before ``pack_octav``. Its mode, buffers and random state are restored.
        batches: as for ``calibrate_octav``; they are kept.
        teacher: the float model to compare with; ``None``: ``model`` with all its quantizers turned off.

    Returns:
        In the order of the model's modules. Divergences are in nats, or relative squared errors where the model has no
        logits; ``FloatOutputs`` says which.

    Raises:
        TypeError, ValueError: ``model``, ``batches`` or ``teacher`` is none of these.
    """
    outputs = FloatOutputs(model, batches, teacher, "sensitivity")
    modules = list(dict.fromkeys(module for module, _, _ in operand_quantizers(model)))
    with in_float(model):
        nothing = 0.0 if teacher is None else outputs.divergence_of(model)
    everything = outputs.divergence_of(model)
    found = []
    for module in progress(modules, "measuring sensitivity"):
        with in_float(model, [other for other in modules if other != module]):
            alone = outputs.divergence_of(model) - nothing
        with in_float(model, [module]):
            found.append(ModuleSensitivity(module, alone, everything - outputs.divergence_of(model)))
    return found
