"""The forms of a model that `inference.py` compares, and how each is written to files and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

import octav_hf

Batch = dict[str, torch.Tensor]
Forward = Callable[[Batch], Any]
ONNX = "model.onnx"


@dataclass(frozen=True)
class Form:
    """One row of the comparison.

    Attributes:
        files: key of `FILES`.
        load: returns a function of a batch for a folder with these files and a number of threads.
        packages: packages that it needs besides this one.
        answers: run and form in the record of `compare_answers.py` with the F1 of the fine-tuned model.
    """

    files: str
    load: Callable[[Path, int], Forward]
    packages: tuple[str, ...] = ()
    answers: tuple[str, str] | None = None


def has_vnni() -> bool:
    """Whether the processor has VNNI, which adds four products of 8-bit integers to a sum in one instruction."""
    return "vnni" in Path("/proc/cpuinfo").read_text()


def random_batch(size: tuple[int, int]) -> Batch:
    """Random tokens, (batch, length) int64, without padding."""
    ids = torch.randint(1000, 30000, size, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def write_float(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def write_torch_int8(model: PreTrainedModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao.quantization, which is what is compared
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    torch.save(quantized, folder / "model.pt")


def write_float_onnx(model: PreTrainedModel, folder: Path) -> None:
    axes = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")} for name in random_batch((2, 16))}
    program = torch.onnx.export(
        model,
        kwargs=random_batch((2, 16)),
        dynamo=True,
        dynamic_shapes=axes,
        input_names=list(axes),
        output_names=["start_logits", "end_logits"],
        verbose=False,
    )
    program.save(folder / ONNX)


def write_onnxruntime_int8(model: PreTrainedModel, folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    write_float_onnx(model, folder)
    quantize_dynamic(folder / ONNX, folder / ONNX, weight_type=QuantType.QInt8)


def write_packed(
    weight_bits: int, activation_bits: int, static: bool = True
) -> Callable[[PreTrainedModel, Path], None]:
    def write(model: PreTrainedModel, folder: Path) -> None:
        octav_hf.apply_octav(model, octav_hf.OctavConfig(weight_bits=weight_bits, activation_bits=activation_bits))
        if static:
            octav_hf.calibrate_octav(model, [random_batch((8, 128))], weights=True)
        octav_hf.pack_octav(model).save_pretrained(folder)

    return write


def write_onnx(weight_bits: int, activation_bits: int) -> Callable[[PreTrainedModel, Path], None]:
    def write(model: PreTrainedModel, folder: Path) -> None:
        from octav_hf.export import to_onnx

        octav_hf.apply_octav(model, octav_hf.OctavConfig(weight_bits=weight_bits, activation_bits=activation_bits))
        octav_hf.calibrate_octav(model, [random_batch((8, 128))], weights=True)
        to_onnx(model, folder, random_batch((2, 16)))

    return write


def load_model(folder: Path, threads: int) -> PreTrainedModel:
    return AutoModelForQuestionAnswering.from_pretrained(folder).eval()


def load_torch(folder: Path, threads: int) -> Forward:
    model = load_model(folder, threads)
    return lambda batch: model(**batch)


def load_torch_int8(folder: Path, threads: int) -> Forward:
    model = torch.load(folder / "model.pt", weights_only=False)
    return lambda batch: model(**batch)


def load_integer(folder: Path, threads: int) -> Forward:
    model = octav_hf.convert_octav(load_model(folder, threads))
    return lambda batch: model(**batch)


def load_onnxruntime(folder: Path, threads: int) -> Forward:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    if not has_vnni():
        # without it, uint8 times int8 saturates on AVX2; with VNNI it is not needed and slower
        settings.add_session_config_entry("session.x64quantprecision", "1")
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # spinning threads would slow the next form
    session = onnxruntime.InferenceSession(folder / ONNX, settings, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {name: value.numpy() for name, value in batch.items()})


def load_openvino(folder: Path, threads: int) -> Forward:
    import openvino

    # by default, some processors would compute in bfloat16
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = openvino.Core().compile_model(folder / ONNX, "CPU", settings)
    return lambda batch: model({name: value.numpy() for name, value in batch.items()})


FILES: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    "float": write_float,
    "torch int8": write_torch_int8,
    "float onnx": write_float_onnx,
    "onnxruntime int8": write_onnxruntime_int8,
    "W8A8": write_packed(8, 8),
    "W4A8": write_packed(4, 8),
    "W4A4": write_packed(4, 4),
    "W4A8 dynamic": write_packed(4, 8, static=False),
    "W8A8 onnx": write_onnx(8, 8),
    "W4A8 onnx": write_onnx(4, 8),
    "W4A4 onnx": write_onnx(4, 4),
}
EXPORT, ORT, OPENVINO = ("onnx", "onnxscript"), "onnxruntime", "openvino"
ORT_INT8 = "onnxruntime, its own int8"
BASELINE = "PyTorch FP32, sdpa"
FORMS = {
    BASELINE: Form("float", load_torch, answers=("fp32", "simulated")),
    "PyTorch int8, dynamic (torch.ao)": Form("torch int8", load_torch_int8),
    "onnxruntime FP32": Form("float onnx", load_onnxruntime, (*EXPORT, ORT), ("fp32", ORT)),
    "onnxruntime int8, dynamic": Form("onnxruntime int8", load_onnxruntime, (*EXPORT, ORT), ("fp32", ORT_INT8)),
    "OpenVINO FP32": Form("float onnx", load_openvino, (*EXPORT, OPENVINO)),
    "W8A8 simulated": Form("W8A8", load_torch, answers=("w8a8", "simulated")),
    "W8A8 integer": Form("W8A8", load_integer, answers=("w8a8", "integer")),
    "W8A8 ONNX, onnxruntime": Form("W8A8 onnx", load_onnxruntime, (*EXPORT, ORT), ("w8a8", ORT)),
    "W8A8 ONNX, OpenVINO": Form("W8A8 onnx", load_openvino, (*EXPORT, OPENVINO)),
    "W4A8 simulated": Form("W4A8", load_torch, answers=("w4a8", "simulated")),
    "W4A8 integer": Form("W4A8", load_integer, answers=("w4a8", "integer")),
    "W4A8 integer, dynamic clips": Form("W4A8 dynamic", load_integer, answers=("w4a8_dynamic", "integer")),
    "W4A8 ONNX, onnxruntime": Form("W4A8 onnx", load_onnxruntime, (*EXPORT, ORT), ("w4a8", ORT)),
    "W4A8 ONNX, OpenVINO": Form("W4A8 onnx", load_openvino, (*EXPORT, OPENVINO)),
    "W4A4 simulated": Form("W4A4", load_torch, answers=("w4a4", "simulated")),
    "W4A4 integer": Form("W4A4", load_integer, answers=("w4a4", "integer")),
    "W4A4 ONNX, onnxruntime": Form("W4A4 onnx", load_onnxruntime, (*EXPORT, ORT), ("w4a4", ORT)),
}
