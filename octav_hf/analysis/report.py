"""``report``: measure which layers and operands lose most, and write a page and its data."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from .._utils.atomic_file import check_writable, write_atomically
from .._utils.forward_pass import Batch
from .._utils.torch_private import uncompiled
from ..conversion.modules import operand_quantizers
from ..conversion.record import is_packed, recorded_config
from ..coverage.report import coverage_report
from ..training.teacher import teacher_modules
from .activation_functions import activation_functions
from .divergence import FloatOutputs
from .layer_bytes import layer_bytes
from .operand_statistics import OperandStatistics, operand_statistics
from .output_errors import output_errors
from .page.render import render
from .report_data import Report, Unmeasured
from .sensitivity import kind_sensitivity, sensitivity
from .simulated import check_simulated, check_teacher
from .suggestions import suggestions

_PACKED = (
    "the model is packed, so the float values of its weights are gone; call report before pack_octav, or on the "
    "checkpoint in training form"
)


def report(
    model: nn.Module, batches: Iterable[Batch], teacher: nn.Module | None = None, *, path: str | Path = "report.html"
) -> Report:
    """Measure which layers and operands lose most by quantization, and write a page that shows it.

    The page is one HTML file that loads nothing from the network. It begins with the sensitivity of the outputs to each
    kind of operand (their divergence with only this kind quantized, and how much it falls with only this kind in float)
    and with the changes of the config that gain most, as code. It then shows the output error and the sensitivity of
    each module, the SQNR, clipped share and histogram of each operand, the bytes of each layer, and what is in float
    and why. The same data are written to a JSON file of the same name, which ``Report.load`` reads. Existing files are
    replaced.

    The model runs on all batches a few times for each quantized module, in evaluation mode and without compilation; 64
    examples take seconds to minutes. Its mode, buffers and random state are restored.

    Args:
        model: quantized by ``apply_octav``, in training form. Of a packed model only the operands and, with a teacher,
            the outputs can be measured, and the page says so.
        batches: as for ``calibrate_octav``; kept in memory. Labels are not needed.
        teacher: the float model to compare with, with modules of the same names, such as the model before quantization-
            aware training; ``None``: ``model`` with all its quantizers turned off.
        path: of the page, ending in ``.html``. Missing folders are created.

    Returns:
        What was measured.

    Raises:
        TypeError: ``model`` or ``teacher`` is not an ``nn.Module``, or ``batches`` or a batch has another type.
        ValueError: the model is not quantized, or multiplies integers (``convert_octav``); there is no batch; ``path``
            does not end in ``.html`` or is a folder; the teacher is quantized, lacks a module or has another head; the
            float model's outputs hold NaN or Inf. Nothing is written then.
        OSError: ``path`` cannot be written; nothing has been measured then.
    """
    check_simulated(model, "report")
    model, page = uncompiled(model), _checked(Path(path))
    check_teacher(teacher, "report")
    if teacher is not None:
        teacher_modules(uncompiled(teacher), [name for name, _, _ in operand_quantizers(model)], "report")
    batches = _listed(batches)
    packed = is_packed(model)
    outputs = None if packed else FloatOutputs(model, batches, teacher, "report")
    kinds = [] if outputs is None else kind_sensitivity(model, outputs)
    sensitivities = [] if outputs is None else sensitivity(model, outputs)
    measured = operand_statistics(model, batches, histograms=True, teacher=teacher)
    unmeasured = _unmeasured(measured, packed)
    if packed:
        unmeasured += [Unmeasured(what, _PACKED, []) for what in ("kinds", "sensitivity", "suggestions")]
        if teacher is None:
            unmeasured.append(Unmeasured("outputs", _PACKED, []))
    result = Report(
        model=type(model).__name__,
        compared_with="the same model with every quantizer off" if teacher is None else "the float model given",
        batches=len(batches),
        config=recorded_config(model).to_dict(),
        operands=list(coverage_report(model)),
        statistics=measured,
        functions=activation_functions(model, batches[0]),
        outputs=[] if packed and teacher is None else output_errors(model, batches, teacher),
        divergence=None if outputs is None else outputs.divergence_of(model),
        divergence_measure="" if outputs is None else outputs.measure,
        kinds=kinds,
        sensitivity=sensitivities,
        suggestions=[] if outputs is None else suggestions(model, outputs, sensitivities),
        layers=layer_bytes(model),
        unmeasured=unmeasured,
    )
    html = render(result)
    result.save(page.with_suffix(".json"))
    write_atomically(page, html)
    return result


def _checked(page: Path) -> Path:
    """``page``; raises an error if it is no path for a page, or cannot be written."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"report: path must end in .html, since a .json file is written beside it; got {str(page)!r}")
    if page.is_dir():
        raise ValueError(f"report: {page} is a folder; write {str(page / 'report.html')!r}")
    check_writable(page)
    return page


def _listed(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list, to run them several times."""
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"report takes an iterable of batches, such as a DataLoader, got {type(batches).__name__}; write [batch] "
            "for a single batch"
        )
    found = list(batches)
    if not found:
        raise ValueError("report got no batch, so there is nothing to measure; pass at least one")
    return found


def _unmeasured(measured: Iterable[OperandStatistics], packed: bool) -> list[Unmeasured]:
    """The operands without SQNR, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in measured:
        if row.sqnr_db is None:
            if row.operand == "weight" and packed:
                reason = "packed weights have no float values left; pass the float model as the teacher"
            elif not row.elements:
                reason = "no batch reached them"
            else:
                reason = "all their values are 0"
            reasons.setdefault(reason, []).append(f"{row.module} {row.operand}")
    return [Unmeasured("operands", reason, names) for reason, names in reasons.items()]
