"""The packages depend on each other in one direction only, and the numerics on nothing but torch."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "octav_hf"

# Lowest first: a module may import from its own layer and from those before it.
LAYERS = (
    *("_version", "text_table", "functional", "nn", "attention_modules", "activation_clips", "config", "first_last"),
    *("plan_layers", "plan_attention", "plan", "patching", "sharded_weights"),
    *("packing", "packed_file", "weight_clips", "forward_pass", "calibration"),
    *("coverage", "operand_watch", "coverage_check", "training_run", "model_card", "distillation"),
    *("integrations", "checkpoint_folder", "cli"),
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_layers(path: Path) -> set[str]:
    """The layers of this package that a file imports from, whether relatively or by full name."""
    layers = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level == depth:  # relative to the package's top
                layers.add(module[0] or "octav_hf")
            elif module[0] == "octav_hf":
                layers.add(module[1] if len(module) > 1 else "octav_hf")
        elif isinstance(node, ast.Import):
            layers |= {name.name.split(".")[1] for name in node.names if name.name.startswith("octav_hf.")}
    return layers


def outside_imports(path: Path) -> set[str]:
    """The other packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = LAYERS[: LAYERS.index(own) + 1]
    assert imported_layers(path) <= set(allowed), f"{own} may import from {allowed}"


@pytest.mark.parametrize("layer", ["functional", "nn"])
def test_numerics_need_only_torch(layer: str) -> None:
    outside = {name for path in (PACKAGE / layer).glob("*.py") for name in outside_imports(path)}
    allowed = {"torch", "triton"} if layer == "functional" else {"torch"}  # Triton comes with torch, where it has a use
    assert outside - sys.stdlib_module_names == allowed
