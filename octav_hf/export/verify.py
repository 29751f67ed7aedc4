"""``verify_onnx``: check that an exported model uses integer matmuls and gives the results of the original."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from .._utils.forward_pass import in_evaluation_mode
from .._utils.torch_private import uncompiled
from ..coverage.check import check_coverage
from ..coverage.report import coverage_report
from .extra import require_extra
from .folder import MODEL_FILE, read_model
from .integer_products import Array, float_products, integer_products, wrong_products

_MAX_NAMES = 3
_MAX_DIFFERENCE = 0.5  # two unrelated models differ by 1.4


@dataclass(frozen=True)
class OnnxCheck:
    """The result of ``verify_onnx``; can be printed.

    Attributes:
        integer_products: number of matmuls and convolutions that ONNX Runtime computes with integers.
        float_products: names of those in float, all of which the coverage report lists as float.
        difference: root mean square difference between the outputs and the model's, divided by their standard
            deviation. It is not zero, because floating-point rounding differs, which moves some values to another
            integer.
        same_choices, choices: number of vectors along the outputs' last dimension whose largest element is at the same
            position, and number of all such vectors.
    """

    integer_products: int
    float_products: list[str]
    difference: float
    same_choices: int
    choices: int

    def __str__(self) -> str:
        return (
            f"{self.integer_products} integer matmuls, all sums exact; {len(self.float_products)} in float, as in the "
            f"coverage report; outputs differ by {self.difference:.1e} of their standard deviation, and the largest "
            f"element is the same in {self.same_choices} of {self.choices}"
        )


def verify_onnx(model: nn.Module, folder: str | Path, example_inputs: Mapping[str, Tensor]) -> OnnxCheck:
    """Run an export of ``to_onnx`` in ONNX Runtime on a batch, check every matmul, and compare outputs with ``model``.

    8-bit weights need the session option ``session.x64quantprecision=1``, which is set here: on x86 processors without
    VNNI, sums of two products would otherwise saturate. Set it wherever you run the file; the field
    ``session_options`` of ``octav_export.json`` contains the options that are needed.

    Args:
        model: the exported model, in training form or packed.
        folder: the folder that ``to_onnx`` wrote.
        example_inputs: a batch as keyword arguments; its sizes may differ from those in the export.

    Raises:
        ImportError: a package is missing or too old.
        ValueError: a file is missing, damaged or from another export or opset; a quantized matmul runs in float; a sum
            is not exact; or the outputs differ from those of the model.
    """
    require_extra()
    import onnx

    folder = Path(folder)
    _, record = read_model(folder)
    model = uncompiled(model)
    check, report = check_coverage(model, dict(example_inputs)), coverage_report(model)
    inputs = {name: x.cpu().numpy() for name, x in example_inputs.items()}
    with tempfile.TemporaryDirectory() as temporary:
        optimized_file = Path(temporary, MODEL_FILE)
        outputs = _run(folder / MODEL_FILE, inputs, record["session_options"], optimized_file)
        optimized = onnx.load(optimized_file)

        def run(names: list[str]) -> Mapping[str, Array]:
            """Run the optimized graph without further optimization; returns inner values by name."""
            observed = onnx.ModelProto()
            observed.CopyFrom(optimized)
            shown = {output.name for output in observed.graph.output}
            observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in shown)
            onnx.save(observed, optimized_file)
            return _run(optimized_file, inputs, record["session_options"], None)

        wrong = list(wrong_products(optimized, run))
    in_float = [node.name for node in float_products(optimized)]
    listed = {row.module for row in report.left_in_float()}
    # The name of a node begins with the name of its module and a slash.
    unlisted = [name for name in in_float if not any(_is_in(name.partition("/")[0], module) for module in listed)]
    count = len(integer_products(optimized))
    if unlisted or count != check.quantized_matmuls:
        raise ValueError(
            f"{folder}: ONNX Runtime computes {count} integer matmuls and convolutions, but {type(model).__name__} has "
            f"{check.quantized_matmuls} quantized ones; unexpectedly in float: {_names(unlisted) or 'none'}"
        )
    if wrong:
        raise ValueError(f"{folder}: {_names(wrong)}; ONNX Runtime saturates on this processor")
    return _compare(model, folder, example_inputs, outputs, count, in_float)


def _compare(
    model: nn.Module,
    folder: Path,
    example_inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Array],
    count: int,
    in_float: list[str],
) -> OnnxCheck:
    with torch.no_grad(), in_evaluation_mode(model):
        expected = [x.float().cpu().numpy() for x in _tensors(model(**example_inputs))]
    difference, same, choices = 0.0, 0, 0
    for x, (name, y) in zip(expected, outputs.items(), strict=True):
        if x.shape != y.shape:
            raise ValueError(f"{folder}: its output {name} has the shape {y.shape}, but the model's has {x.shape}")
        difference = max(difference, float(np.sqrt(np.mean((x - y) ** 2)) / (x.std() or 1)))
        same += int((x.argmax(-1) == y.argmax(-1)).sum())
        choices += x[..., 0].size
    if not difference < _MAX_DIFFERENCE:
        raise ValueError(
            f"{folder}: its outputs differ from the model's by {difference:.2g} of their standard deviation; it is the "
            "export of another model"
        )
    return OnnxCheck(count, in_float, difference, same, choices)


def _run(
    path: Path, inputs: Mapping[str, Array], session_options: Mapping[str, str], optimized: Path | None
) -> dict[str, Array]:
    """The outputs by name. With ``optimized``, write the optimized graph there; without, do not optimize."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # only errors; it would warn that the optimized graph is for this machine only
    for name, value in session_options.items():
        options.add_session_config_entry(name, value)
    if optimized is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Cache):  # exports have none
        return []
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [x for value in values for x in _tensors(value)]


def _is_in(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _names(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")
