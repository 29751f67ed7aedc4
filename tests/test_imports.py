"""Packages depend on each other in one direction, no module on itself, and the numerics on nothing but torch."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "octav_hf"

# Lowest first: a package may import from itself and from those in the lines before its own.
LAYERS = (
    ("_version", "_utils"),
    ("functional",),
    ("nn",),
    ("config",),
    ("conversion",),
    ("static_clips", "packing"),
    ("coverage",),
    ("training", "hub"),
    ("integrations", "cli"),
    ("__init__",),
)
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """The modules that the module ``name`` imports, by their full names: those of this package, and of others."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            of_names = {f"{base}.{alias.name}" for alias in node.names}
            found |= (of_names & MODULES.keys()) or {base}
    return found


def room(name: str) -> str:
    """The package, or the module, at the top of ``octav_hf`` that a module is in."""
    return [*name.split("."), "__init__"][1]


def test_only_the_front_door_stands_outside_the_packages() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == {"__init__", "_version", "config", "cli"}
    rooms = [name for layer in LAYERS for name in layer]
    assert sorted(rooms) == sorted({room(name) for name in MODULES})


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name: str) -> None:
    floor = next(number for number, layer in enumerate(LAYERS) if room(name) in layer)
    allowed = {room(name)}.union(*LAYERS[:floor])
    assert {room(module) for module in imports(name) & MODULES.keys()} <= allowed


def test_no_module_imports_itself_by_way_of_others() -> None:
    # A package is what its __init__ gathers: it comes after its modules, and they must not come back to it.
    TopologicalSorter({name: imports(name) & MODULES.keys() for name in MODULES}).prepare()  # raises for a cycle


@pytest.mark.parametrize("package", ["functional", "nn"])
def test_numerics_need_only_torch(package: str) -> None:
    names = [name for name in MODULES if room(name) == package]
    outside = {module.split(".")[0] for name in names for module in imports(name)} - {"octav_hf"}
    allowed = {"torch", "triton"} if package == "functional" else {"torch"}  # Triton comes with torch where it is used
    assert outside - sys.stdlib_module_names == allowed
