"""Every test of octav_hf.functional runs on every path that its tensors could take if they were larger."""

from __future__ import annotations

import pytest

from octav_hf.functional.kernels import compilation, fused

PATHS = {
    "reference": "torch operations, as the mathematics is written",
}


def take_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tensors of any size take a path."""
    monkeypatch.setenv(compilation.SWITCH, "0")


def params(*names: str) -> list[object]:
    """Parameters for the fixture ``path``."""
    return [pytest.param(name) for name in names]


def only(*names: str) -> pytest.MarkDecorator:
    """Mark for tests of what is the same code on several paths: those that it can tell apart, or any one."""
    return pytest.mark.parametrize("path", params(*names), indirect=True)


any_path = only("reference")
both_roundings = only("reference")


@pytest.fixture(params=params(*PATHS), autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """See ``PATHS``."""
    monkeypatch.setattr(fused, "MIN_NUMEL", 500)
    take_path(request.param, monkeypatch)
    return request.param
