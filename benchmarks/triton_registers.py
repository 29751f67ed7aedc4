"""Registers and spills of the Triton kernels, compiled for several GPUs; no GPU is needed.

    python benchmarks/triton_registers.py --output benchmarks/results/triton_registers.json

Each kernel is compiled as ``cuda.py`` launches it for rows of several lengths, and assembled by Triton's own ptxas. A
spill is a value that is kept in memory because no register is free.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from octav_hf.functional.kernels import cuda, cuda_loops, triton_kernels, triton_loops

ARCHITECTURES = (80, 90, 100)
LENGTHS = {
    torch.float32: (20, 64, 384, 1536, 8192, 16384, 32752, 32767, 1 << 16),
    torch.bfloat16: (384, 8192, 32752, 32767, 1 << 16),
    torch.float16: (384, 8192, 32752, 32767, 1 << 16),
}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}

Launch = tuple[Any, tuple[Any, ...], int, bool]
"""Kernel, arguments, warps, and whether multiply-adds may be fused."""


class Kernels:
    """Replaces a module with kernels, and records launches in ``launches``."""

    BINS, TAILS = triton_kernels.BINS, triton_kernels.TAILS

    def __init__(self, module: Any, launches: list[Launch]) -> None:
        self.module, self.launches = module, launches

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.module, name)

        def launch(*arguments: Any, num_warps: int = 4, enable_fp_fusion: bool = True) -> None:
            self.launches.append((kernel, arguments, num_warps, enable_fp_fusion))

        return _Grid(launch)


class _Grid:
    def __init__(self, launch: Callable[..., None]):
        self._launch = launch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch


def launches() -> list[Launch]:
    """All launches of ``cuda.py`` for both rules, each dtype and length, with and without ``skip``."""
    found: list[Launch] = []
    signed = torch.empty((), dtype=torch.bool, device="meta")
    with mock.patch.object(cuda, "_triton_kernels", return_value=Kernels(triton_kernels, found)):
        for dtype, lengths in LENGTHS.items():
            for length in lengths:
                rows = torch.empty(2, length, dtype=dtype, device="meta")
                cuda.octav_of_rows(rows, 4, signed, None, False)
                cuda.mse_of_rows(rows, 4, signed, signed, False)
    with mock.patch.object(cuda_loops, "_triton_loops", return_value=Kernels(triton_loops, found)):
        for dtype in LENGTHS:
            x, clip = (torch.empty(2, 3, 32, 4, dtype=dtype, device="meta") for _ in range(2))
            for clips in (clip[0, 0, 0, 0], clip[..., :1], clip[:, :, :1], clip[:, :1, :, :1], clip):
                grid = (x, clips.float(), -8, 7, signed, clips.float().amax())
                cuda.round_to_levels(*grid)
                _, inside = cuda.round_and_compare(*grid)
                cuda.attenuate_outside(x, *grid[:3], *grid[4:])
            cuda.keep_inside(x, inside)
    return found


def describe(launch: Launch) -> str:
    """A name for a compiled kernel: kernel, dtype, and the arguments for which it is specialized."""
    kernel, arguments, *_ = launch
    named = dict(zip(kernel.arg_names, arguments, strict=True))
    words = [kernel.__name__, TYPES[arguments[0].dtype]]
    if "lowest" in named:
        words.append("octav" if named["lowest"] is None else "mse")
    if named.get("skip") is not None:
        words.append("skip")
    if named.get("length", 0) % 16:
        words.append("odd length")
    if "dims" in named:
        words.append(f"{named['dims']} loops" + ", one clip each" * named["varies"])
    if named.get("is_inside") is not None:
        words.append("is_inside")
    if named.get("block"):
        words.append(f"block {named['block']}")
    return ", ".join(words)


def source(launch: Launch) -> ASTSource:
    """The source that Triton's own launch would compile."""
    kernel, arguments, *_ = launch
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        aligned = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            aligned = aligned and isinstance(value, int) and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def assemble(launch: Launch, architecture: int) -> dict[str, int]:
    """Registers per thread, and spilled bytes."""
    target, options = GPUTarget("cuda", architecture, 32), {"num_warps": launch[2], "enable_fp_fusion": launch[3]}
    ptx = triton.compile(source(launch), target=target, options=options).asm["ptx"]
    tools = triton.knobs.nvidia
    ptxas = tools.ptxas_blackwell if architecture >= 100 else tools.ptxas
    name = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert name is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [ptxas.path, "-v", f"--gpu-name={name[1]}", str(file), "--output-file", str(file.with_suffix(".o"))]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes spill", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert len(spills) == 2
    assert registers is not None
    return {"registers": int(registers[1]), "spilled_bytes": sum(map(int, spills))}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Compile, print a table, and return its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES), help="90 for sm_90")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args(argv)
    variants = {describe(launch): launch for launch in launches()}
    rows: list[dict[str, Any]] = []
    print("| kernel | warps | " + " | ".join(f"sm_{architecture}" for architecture in arguments.architectures) + " |")
    print("|---|---|" + "---|" * len(arguments.architectures))
    for name, launch in variants.items():
        used = {f"sm_{architecture}": assemble(launch, architecture) for architecture in arguments.architectures}
        rows.append({"kernel": name, "warps": launch[2], **used})
        cells = (
            f"{u['registers']}" + f", spills {u['spilled_bytes']}" * (u["spilled_bytes"] > 0) for u in used.values()
        )
        print(f"| {name} | {launch[2]} | " + " | ".join(cells) + " |", flush=True)
    result = {"triton": triton.__version__, "kernels": rows}
    if arguments.output:
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.output.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
    return result


if __name__ == "__main__":
    main()
