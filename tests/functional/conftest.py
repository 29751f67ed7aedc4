"""Every test of octav_hf.functional runs on every path that larger tensors could take."""

from __future__ import annotations

import platform

import pytest

from octav_hf.functional.kernels import compilation, cpu, fused

PATHS = {
    "reference": "torch operations, as the mathematics is written",
    "compiled": "the C++ for the clip, and Inductor's for the rounding",
    "portable": "the C++ for processors without AVX-512",
}


def take_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tensors of any size take a path."""
    monkeypatch.setattr(cpu, "MIN_NUMEL", 1)
    if path == "reference":
        monkeypatch.setenv(compilation.SWITCH, "0")
    if path == "portable":
        if platform.machine() != "x86_64":
            pytest.skip("on this processor the other path is the portable one")
        monkeypatch.setattr(cpu, "FLAGS", ("-mno-avx512f",))


def params(*names: str) -> list[object]:
    """Parameters for the fixture ``path``; slower forms of the same mathematics run only in the full suite."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name == "portable" else []) for name in names]


def only(*names: str) -> pytest.MarkDecorator:
    """Mark for tests whose code is the same on several paths: only the paths that differ, or any one."""
    return pytest.mark.parametrize("path", params(*names), indirect=True)


any_path = only("compiled")
both_roundings = only("reference", "compiled")


@pytest.fixture(params=params(*PATHS), autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """See ``PATHS``."""
    monkeypatch.setattr(fused, "MIN_NUMEL", 500)
    take_path(request.param, monkeypatch)
    return request.param
