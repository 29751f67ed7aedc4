"""Packages depend on each other in one direction, no module on itself, and the numerics on nothing but torch.

What is private to torch and Transformers is used in one file for each.
"""

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
    ("inference",),
    ("analysis",),
    ("training", "hub"),
    ("export",),
    ("integrations", "cli"),
    ("__init__",),
)
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
PRIVATE = ("octav_hf._utils.torch_private", "octav_hf._utils.transformers_compat")
# Of Transformers' modules, those that its documentation or its own quantizers and models show to be imported from.
DOCUMENTED = ("transformers", "transformers.pytorch_utils", "transformers.quantizers", "transformers.utils")
# What nn.Module and namedtuple pass on under a private name to be used.
INHERITED = {"_apply", "_buffers", "_conv_forward", "_load_from_state_dict", "_replace"} | {
    "_reversed_padding_repeated_twice"
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
    names += sorted({module for name in names for module in imports(name) if room(module) == "_utils"} & MODULES.keys())
    outside = {module.split(".")[0] for name in names for module in imports(name)} - {"octav_hf"}
    allowed = {"torch", "triton"} if package == "functional" else {"torch"}  # Triton comes with torch where it is used
    assert outside - sys.stdlib_module_names == allowed


def private_names(tree: ast.AST) -> set[str]:
    """Names with one leading underscore that code imports from other libraries, or reads off anything."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            found |= {part.value for part in node.args[1:2] if isinstance(part, ast.Constant)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def own_names(tree: ast.AST) -> set[str]:
    """Names that code gives to its functions, its classes, and attributes of its classes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return found


@pytest.mark.parametrize("name", sorted(MODULES.keys() - set(PRIVATE)))
def test_private_names_of_other_libraries_stand_in_one_place(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    ours = imports(name) & MODULES.keys()
    own = own_names(tree).union(*(own_names(ast.parse(MODULES[module].read_text(encoding="utf-8"))) for module in ours))
    assert private_names(tree) - own - INHERITED == set()


@pytest.mark.parametrize("name", sorted(MODULES.keys() - set(PRIVATE)))
def test_undocumented_modules_of_transformers_stand_in_one_place(name: str) -> None:
    used = {module for module in imports(name) if module.startswith("transformers")}
    assert not {module for module in used if ".".join(module.split(".")[:2]) not in DOCUMENTED}
