"""``to_onnx``: write a folder with a model's ONNX file, config and tokenizer."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.progress import progress
from .._utils.torch_private import uncompiled
from .._utils.transformers_compat import attn_implementation
from .._version import __version__
from ..conversion.modules import activation_quantizers, check_no_groups, transformers_models
from ..conversion.record import check_quantized, recorded_config
from ..hub.output_dir import atomic_output_dir
from .extra import require_extra
from .finish import finish
from .folder import MODEL_FILE, write_record
from .recorded_modules import INT8, record_modules
from .recorded_operands import OPSET

_MAX_NAMES = 3  # operands listed in a message
# On processors without VNNI and with 8-bit weights, the sum of two uint8 * int8 products would saturate without it.
_EXACT_AT_8_BITS = {"session.x64quantprecision": "1"}


def to_onnx(
    model: nn.Module,
    folder: str | Path,
    example_inputs: Mapping[str, Tensor],
    *,
    tokenizer: Any = None,
    dynamic_shapes: dict[str, Any] | None = None,
) -> Path:
    """Export a quantized model, in training form or packed, to ONNX (opset 21) with integer matmuls.

    An activation becomes Clip (below 8 bits) → QuantizeLinear → DequantizeLinear with its static clip. A weight is
    stored as integers (INT4 up to 4 bits, otherwise INT8), followed by DequantizeLinear with its scales. Runtimes fuse
    these with the matmul into an integer matmul: ``sum(a * b) * scale_a * scale_b``. A convolution becomes ConvInteger
    followed by scaling, because runtimes fuse the other form only if the result is quantized too. The offset of an
    asymmetric grid is added to the bias. Operands in float stay in float, and a matmul with one quantized operand is
    computed in float with the dequantized values. All other arithmetic is float32, without dropout. Decoders are
    exported without a key-value cache.

    The folder contains ``model.onnx`` (above 2 GB with weights in a separate file), the ``config.json`` of the float
    model, the tokenizer, and ``octav_export.json`` with facts about the export and the SHA-256 of the files.

    Args:
        model: with static clips of activations (``calibrate_octav``). It is not changed. The export uses the eager
            attention implementation, because others scale the query between quantization and matmul.
        folder: new or empty. All files appear in it at once.
        example_inputs: a batch as keyword arguments of the model's forward, without labels. The ONNX inputs get its
            names, the ONNX outputs the names of the model's outputs, such as ``start_logits``.
        tokenizer: a tokenizer or processor: anything with ``save_pretrained``.
        dynamic_shapes: input -> dimension -> name, for the sizes that may differ from the example. ``None``: the first
            dimension of all inputs (``"batch"``), and the second dimension of matrices (``"length"``).

    Returns:
        The path of ``model.onnx``.

    Raises:
        ImportError: the extra ``onnx`` is not installed.
        TypeError: ``model`` is not an ``nn.Module``, or ``example_inputs`` is not a mapping of tensors.
        ValueError: ``model`` is not quantized, or has dynamic clips of activations; or the batch has labels.
        NotImplementedError: a layer or a clip cannot be exported; the message tells which and what to do.
        FileExistsError: ``folder`` exists and is not empty.
    """
    require_extra()
    check_quantized(model, "to_onnx")
    model = uncompiled(model)
    check_no_groups(model, "to_onnx")
    _check_static(model)
    if not isinstance(example_inputs, Mapping) or not all(isinstance(x, Tensor) for x in example_inputs.values()):
        raise TypeError("to_onnx takes example_inputs as a mapping of the forward's argument names to tensors")
    config, bits = getattr(model, "config", None), recorded_config(model)
    # torch.export would take a size of 1 for a constant.
    inputs = {name: torch.cat([x, x])[: max(2, len(x))].cpu() for name, x in example_inputs.items()}
    if dynamic_shapes is None:
        dynamic_shapes = {name: {0: "batch"} | ({1: "length"} if x.dim() == 2 else {}) for name, x in inputs.items()}
    recorded = nn.Module.float(copy.deepcopy(model).cpu()).eval()  # Transformers' own float() refuses
    for module in recorded.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False  # type: ignore[union-attr]
    for part in transformers_models(recorded):
        if attn_implementation(part.config) != "eager":
            part.set_attn_implementation("eager")
    facts = {
        "octav_hf_version": __version__,
        "weight_bits": str(bits.weight_bits),
        "activation_bits": str(bits.activation_bits),
        "embedding_bits": str(bits.embedding_bits),
    }
    with atomic_output_dir(Path(folder)) as unfinished:  # around the slow part, so that a bad folder is noticed first
        program = _exported(recorded, inputs, dynamic_shapes)
        finish(program.model)
        program.model.metadata_props.update({f"octav_hf.{name}": value for name, value in facts.items()})
        program.save(unfinished / MODEL_FILE)
        if config is not None:
            float_config = copy.deepcopy(config)
            float_config.__dict__.pop("quantization_config", None)
            float_config.architectures = [type(model).__name__]
            float_config.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        write_record(unfinished, {**facts, "session_options": _EXACT_AT_8_BITS if _has_8_bits(recorded) else {}})
    return Path(folder) / MODEL_FILE


def _exported(recorded: nn.Module, inputs: dict[str, Tensor], dynamic_shapes: dict[str, Any]) -> Any:
    """The ONNX program of ``recorded``, whose modules are changed."""
    with torch.no_grad(), progress(None, "exporting", total=1) as bar:
        names = _output_names(recorded(**inputs))
        record_modules(recorded)
        bar.set_description("exporting: translating the model into ONNX")  # one call of ten seconds and more
        program = torch.onnx.export(
            recorded,
            kwargs=inputs,
            output_names=names,
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        bar.update()
    return program


def _has_8_bits(recorded: nn.Module) -> bool:
    """Whether the integers of any weight need more than 7 bits."""
    weights = (x for name, x in recorded.named_buffers() if name.rpartition(".")[2] == INT8)
    return any(x.numel() and int(x.short().abs().max()) > 2**6 for x in weights)


def _check_static(model: nn.Module) -> None:
    dynamic = [f"{path} {operand}" for path, operand, each in activation_quantizers(model) if not each.is_frozen]
    if dynamic:
        names = ", ".join(dynamic[:_MAX_NAMES]) + (
            f" and {len(dynamic) - _MAX_NAMES} more" * (len(dynamic) > _MAX_NAMES)
        )
        raise ValueError(
            f"to_onnx: the clips of {names} are dynamic, which no runtime supports; call "
            "octav_hf.calibrate_octav(model, batches) first, preferably before the last part of the training"
        )


def _output_names(outputs: Any) -> list[str]:
    """The names of a model's outputs; tensors in a tuple are numbered."""
    if isinstance(outputs, Tensor):
        return ["output"]
    named = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    names: list[str] = []
    for name, value in named:
        if name == "loss":
            raise ValueError("to_onnx: the model computed a loss; leave labels out of example_inputs")
        names += [f"{name}"] if isinstance(value, Tensor) else [f"{name}.{i}" for i in range(len(value))]
    return names
