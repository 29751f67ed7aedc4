"""The pages build without a warning, are complete, and lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from sphinx.cmd.build import build_main
from sphinx.util.inventory import InventoryFile

import octav_hf
from octav_hf import functional

from .html_links import broken_links, from_other_hosts
from .table_in_page import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built pages. A warning, or a reference to nothing, fails the build."""
    folder = tmp_path_factory.mktemp("built")
    strict = ["--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
    assert build_main([*strict, "--doctree-dir", f"{folder}/trees", str(ROOT / "docs"), f"{folder}/html"]) == 0
    return folder / "html"


def test_every_public_name_is_in_the_reference(built: Path) -> None:
    inventory = InventoryFile.loads((built / "objects.inv").read_bytes(), uri="")
    documented = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    public = {f"octav_hf.{name}" for name in octav_hf.__all__ if name != "export"}
    public |= {f"octav_hf.export.{name}" for name in octav_hf.export.__all__}
    public |= {f"octav_hf.functional.{name}" for name in functional.__all__}
    assert public <= documented, public - documented


def test_links_and_anchors_lead_somewhere(built: Path) -> None:
    assert sorted(broken_links(built)) == []


def test_a_browser_needs_no_other_host(built: Path) -> None:
    assert from_other_hosts(built) == set()


def test_broken_links_are_found(tmp_path: Path) -> None:
    """The tests above can fail."""
    (tmp_path / "a.html").write_text('<p id="here"><a href="#here"></a><a href="#gone"></a><a href="b.html"></a>')
    (tmp_path / "c.html").write_text('<script src="//example.org/x.js"></script><a href="a.html#here"></a>')
    assert sorted(broken_links(tmp_path)) == ["a.html: #gone leads to no anchor", "a.html: b.html leads to no file"]
    assert from_other_hosts(tmp_path) == {"//example.org/x.js"}
