"""How much the quantization of each module, and of each kind of operand, changes the model's outputs."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from .._utils.progress import progress
from ..conversion.modules import operand_quantizers
from .divergence import FloatOutputs
from .operand_kinds import operand_kinds
from .switching import in_float


@dataclass(frozen=True)
class ModuleSensitivity:
    """What the quantization of one module does to the model's outputs, measured as the divergence of ``FloatOutputs``.

    Attributes:
        module: full name.
        alone: increase of the divergence when only this module is quantized, compared with the float model.
        all_but: decrease of the divergence when only this module is in float, compared with the quantized model. It is
            negative where the error of this module cancels errors of others, to which training may have adapted.
    """

    module: str
    alone: float
    all_but: float


@dataclass(frozen=True)
class KindSensitivity:
    """The same for one kind of operand in all layers.

    Attributes:
        modules: full names with ``*`` in place of the numbers of layers; several if these modules read the same tensor.
        operand: ``"weight"``, ``"input"``, ``"query"``, ``"key"``, ``"probabilities"`` or ``"value"``.
        alone, all_but: as for ``ModuleSensitivity``.
    """

    modules: tuple[str, ...]
    operand: str
    alone: float
    all_but: float


def sensitivity(model: nn.Module, outputs: FloatOutputs) -> list[ModuleSensitivity]:
    """Quantize each module alone, and all modules but it, and measure the divergence from the float model.

    A layer counts with all its operands, an attention module with the four of its matmuls. The model runs on each batch
    twice for every quantized module, and two more times: one or two batches of 32 sequences suffice to find the worst
    modules.

    Args:
        model: quantized by ``apply_octav``, before ``pack_octav``. Its mode, buffers and random state are restored.
        outputs: those of the float model to compare with.

    Returns:
        In the order of the model's modules. The unit is ``outputs.measure``.
    """
    quantizers: dict[str, list[nn.Module]] = {}
    for module, _, quantizer in operand_quantizers(model):
        quantizers.setdefault(module, []).append(quantizer)
    found = _alone_and_all_but(model, outputs, quantizers.values(), "measuring sensitivity of modules")
    return [ModuleSensitivity(module, *each) for module, each in zip(quantizers, found, strict=True)]


def kind_sensitivity(model: nn.Module, outputs: FloatOutputs) -> list[KindSensitivity]:
    """The same for each kind of operand (``operand_kinds``): it alone in all layers, and all operands but it.

    Returns:
        The largest ``alone`` first.
    """
    kinds = operand_kinds(model, outputs.batches[0])
    found = _alone_and_all_but(model, outputs, kinds.values(), "measuring sensitivity of operands")
    rows = [KindSensitivity(*kind, *each) for kind, each in zip(kinds, found, strict=True)]
    return sorted(rows, key=lambda row: -row.alone)


def _alone_and_all_but(
    model: nn.Module, outputs: FloatOutputs, groups: Collection[Collection[nn.Module]], description: str
) -> Iterator[tuple[float, float]]:
    """For each group of quantizers, the change of the divergence by turning on only these, and off only these."""
    with in_float(model):
        nothing = outputs.divergence_of(model)
    everything = outputs.divergence_of(model)
    for quantizers in progress(groups, description):
        with in_float(model, but=quantizers):
            alone = outputs.divergence_of(model) - nothing
        with in_float(model, quantizers):
            yield alone, everything - outputs.divergence_of(model)
