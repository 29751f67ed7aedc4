"""Every test of octav_hf.functional runs on every path that its tensors could take if they were larger."""

from __future__ import annotations

import pytest

from octav_hf.functional import fixed_point, fused


@pytest.fixture(params=["recursion", "search", "compiled"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Eq. 6 as it is written; the search for its fixed point, uncompiled; the search and the rounding, compiled."""
    if request.param == "recursion":
        monkeypatch.setattr(fixed_point, "SMALLEST", 1 << 62)
    else:
        monkeypatch.setattr(fixed_point, "SMALLEST", 1)
        monkeypatch.setattr(fixed_point, "_LONG_ROW", 64)
        monkeypatch.setattr(fixed_point, "_PIECE", 64)
    if request.param == "compiled":
        monkeypatch.setattr(fused, "SMALLEST", 500)
    else:
        monkeypatch.setenv(fused.SWITCH, "0")
    return request.param
