"""A training step reads no values on the host and dispatches few operations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from .conftest import ROOT
from .host_reads import RECIPES, HostReads, count_step

QUANTIZED = [recipe for recipe, config in RECIPES.items() if config is not None]
MAX_OPERATIONS = 4000  # of a step of MiniLM's shape; the float model dispatches about 1,300


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def counts(request: pytest.FixtureRequest) -> dict[str, HostReads]:
    """The host cost of steps of MiniLM's shape without compiled code, by recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAV_HF_COMPILE", "0")
        return {recipe: count_step(recipe, request.param, (2, 64)) for recipe in RECIPES}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_reads_no_value_more_than_float(counts: dict[str, HostReads], recipe: str) -> None:
    more = counts[recipe].reads - counts["float"].reads
    places = "\n".join(f"{number} x {place}" for place, number in more.most_common())
    assert not more, f"{more.total()} host reads more than float, of {counts[recipe].operations} operations:\n{places}"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_dispatches_few_operations(counts: dict[str, HostReads], recipe: str) -> None:
    """Nearly as many operations for small tensors as for large ones; each is a kernel launch on a GPU."""
    operations = {name: count.operations for name, count in counts.items()}
    assert operations[recipe] <= MAX_OPERATIONS, operations


@pytest.mark.slow
@pytest.mark.parametrize("counts", ["sdpa"], indirect=True)
def test_the_documentation_has_the_number_of_operations(counts: dict[str, HostReads]) -> None:
    paper, accurate, plain = (f"{counts[recipe].operations:,}" for recipe in ("paper", "accurate", "float"))
    sentence = f"dispatches {paper} operations by the paper's recipe, {accurate} by `accurate()` and {plain} in float."
    assert sentence in (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")


def test_what_counts_as_a_read() -> None:
    x = torch.arange(4.0)
    with HostReads("cpu") as counts:
        if bool(x[0]) or x[1].item() == 0 or torch.equal(x, x + 1) or float(x.sum()) == 0:
            raise AssertionError
        x[x > 1] = 0
        x[x > 1].sum()
        x.nonzero()
        torch.where(x > 1, x, 0).sum() + x[:2].sum()  # these do not count
    assert Counter(read.partition(" at ")[0] for read in counts.reads.elements()) == {
        "aten._local_scalar_dense.default": 3,
        "aten.equal.default": 1,
        "aten.index_put_.default": 1,
        "aten.index.Tensor": 1,
        "aten.nonzero.default": 1,
    }
    assert all("test_host_reads.py:" in read for read in counts.reads)


@pytest.fixture(scope="module")
def fake_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The error of every case of `fake_cuda.py`."""
    arguments = [] if torch.cuda.is_available() else [str(compile_fake_cuda(tmp_path_factory.mktemp("fake_cuda")))]
    command = [sys.executable, "-m", "tests.fake_cuda", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compile_fake_cuda(folder: Path) -> Path:
    """The library of `fake_cuda.cpp`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ for the backward pass of fake CUDA tensors")
    library = folder / "fake_cuda.so"
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    link = [option for path in cpp_extension.library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    source = Path(__file__).with_name("fake_cuda.cpp")
    command = [compiler, "-std=c++20", "-shared", "-fPIC", *include, source, "-o", library, *link]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
    return library


@pytest.mark.slow
def test_a_step_on_tensors_without_values(fake_steps: dict[str, str]) -> None:
    """The float model shows that the rest of a step reads no values."""
    assert [error for case, error in fake_steps.items() if case.startswith("float")] == [""] * 8
    errors = "\n".join(f"{case}: {error}" for case, error in fake_steps.items() if error)
    assert len(fake_steps) == 32
    assert not errors, errors
