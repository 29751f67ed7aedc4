"""Every test of octav_hf.functional runs on every path that its tensors could take if they were larger."""

from __future__ import annotations

import platform

import pytest

from octav_hf.functional import fixed_point
from octav_hf.functional.kernels import compilation, cpu, cuda, fused

PATHS = {
    "recursion": "Eq. 6 as it is written",
    "search": "the search for its fixed point, in torch operations",
    "triton": "the same, its reads in Triton, which is interpreted where there is no GPU",
    "compiled": "the C++ for the clip, and Inductor's for the rounding",
    "portable": "the C++ for processors without AVX-512",
}


def take_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tensors of any size take a path, if only they are large enough for it."""
    if path not in ("compiled", "portable"):
        monkeypatch.setenv(compilation.SWITCH, "0")
    if path == "portable":
        if platform.machine() != "x86_64":
            pytest.skip("on this processor the other path is the portable one")
        monkeypatch.setattr(cpu, "FLAGS", ("-mno-avx512f",))
    if path == "triton":
        pytest.importorskip("triton", reason="pip install triton")
        monkeypatch.delenv(compilation.SWITCH)
        monkeypatch.setattr(cuda, "DEVICE_TYPES", ("cpu",))
        # The interpreter's time goes by programs and operations, hardly by elements.
        monkeypatch.setattr(cuda, "_PROGRAMS", 3)
        monkeypatch.setattr(cuda, "_BLOCK", 1 << 18)
        monkeypatch.setattr(fixed_point, "MIN_NUMEL", 1)
        monkeypatch.setattr(cpu, "MIN_NUMEL", 1 << 62)
        monkeypatch.setattr(fused, "MIN_NUMEL", 1 << 62)


def params(*names: str) -> list[object]:
    """Parameters for the fixture ``path``; what is the same mathematics in a slower form is left to the full run."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in ("triton", "portable") else []) for name in names]


def only(*names: str) -> pytest.MarkDecorator:
    """Mark for tests of what is the same code on several paths: those that it can tell apart, or any one."""
    return pytest.mark.parametrize("path", params(*names), indirect=True)


any_path = only("compiled")
both_roundings = only("search", "compiled")


# The interpreter takes minutes for all of them; test_fixed_point.py has the tests for it.
@pytest.fixture(params=params(*(name for name in PATHS if name != "triton")), autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """See ``PATHS``."""
    monkeypatch.setattr(fixed_point, "MIN_NUMEL", 1 << 62 if request.param == "recursion" else 1)
    monkeypatch.setattr(fixed_point, "_LONG_ROW", 64)
    monkeypatch.setattr(fixed_point, "_PIECE", 64)
    monkeypatch.setattr(cpu, "MIN_NUMEL", 1)
    monkeypatch.setattr(fused, "MIN_NUMEL", 500)
    take_path(request.param, monkeypatch)
    return request.param
