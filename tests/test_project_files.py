"""What stands in several of the project's files is the same in all of them, and the guide for contributors works."""

import importlib.util
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from torch import nn

from octav_hf import OctavConfig, __version__, apply_octav, check_coverage, coverage_report
from octav_hf.config import FORMAT_VERSION
from octav_hf.export import folder
from octav_hf.functional import registry
from octav_hf.nn import QUANTIZED_LAYERS, quantized_layer
from tests.architectures import models

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
MAKEFILE, CHANGELOG, CONTRIBUTING = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "CHANGELOG.md", "CONTRIBUTING.md")
)
RULE, LAYER, ARCHITECTURE = (
    textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    assert citation["abstract"].rstrip(".") == PROJECT["description"]


def test_the_changelog_has_this_version_and_the_format_versions() -> None:
    newest, *_ = re.findall(r"^## \[(.*?)\]", CHANGELOG, flags=re.MULTILINE)
    assert newest == "Unreleased"
    assert f"[{__version__}] - " in CHANGELOG or f"This will be version {__version__}," in CHANGELOG
    rows = re.findall(r"^\| (\d+) \| (checkpoints|exported folders)", CHANGELOG, flags=re.MULTILINE)
    assert rows[0] == (str(FORMAT_VERSION), "checkpoints")
    assert (str(folder._FORMAT_VERSION), "exported folders") in rows


def test_every_dependency_has_a_tested_version() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    tested = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    requirements = [*PROJECT["dependencies"], *(r for rs in PROJECT["optional-dependencies"].values() for r in rs)]
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= PROJECT["optional-dependencies"].keys()
        else:
            assert tested[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_hooks_run_what_make_test_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # others would have versions of their own
    commands = {" ".join(hook["entry"].split()[:2]) for hook in hooks[0]["hooks"]}
    of_make = re.search(r"^test: setup\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert of_make
    assert {command.split(" --")[0] for command in commands} == {
        re.sub(r" --check| \.$", "", line.strip().replace("$(BIN)", ".venv/bin"))
        for line in of_make[1].splitlines()
        if "PYTEST" not in line
    }


def test_the_guide_names_files_that_exist() -> None:
    for path in set(re.findall(r"`((?:octav_hf|tests|examples)/[\w/.]+)", CONTRIBUTING)):
        assert (ROOT / path).exists() or path == "octav_hf/functional/rms.py", path
    for script in re.findall(r"python (examples/[\w/.]+)", CONTRIBUTING):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python -m (tests[\w.]+)", CONTRIBUTING):
        assert importlib.util.find_spec(module), module


def test_the_guide_names_targets_markers_and_tests_that_exist() -> None:
    targets = re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", CONTRIBUTING, flags=re.MULTILINE)) <= set(targets)
    (markers,) = re.findall(r"Markers: (.*?)\. A test", CONTRIBUTING, flags=re.DOTALL)
    registered = {line.partition(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"`(\w+)`", markers)) == registered
    for name in re.findall(r"`(test_\w+)` prints", CONTRIBUTING):
        assert f"def {name}(" in (ROOT / "tests/architectures/test_architectures.py").read_text(encoding="utf-8")


def test_the_clip_rule_of_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLIP_RULES", "OPTION_CHECKS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_TENSOR_SIGN", set(registry._TENSOR_SIGN))
    names: dict[str, Any] = {"__name__": "octav_hf.functional.rms", "__package__": "octav_hf.functional"}
    exec(RULE, names)
    x = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    clips = names["rms_clip"](x, 4, dim=1, factor=2.0)
    torch.testing.assert_close(clips.double(), 2 * x.double().square().mean(dim=1, keepdim=True).sqrt())
    positive = names["rms_clip"](x, 4, signed=torch.tensor(False))
    torch.testing.assert_close(positive.double(), 3 * x.double().clamp(min=0).square().mean().sqrt())
    with pytest.raises(ValueError, match="factor must be above 0"):
        registry.OPTION_CHECKS["rms"](factor=0)
    assert registry.CLIP_RULES["rms"] is names["rms_clip"]


@pytest.fixture
def without_conv3d() -> Iterator[None]:
    """What a test registers for ``nn.Conv3d`` is forgotten after it."""
    yield
    del QUANTIZED_LAYERS[nn.Conv3d]
    quantized_layer._quantized_class.cache_clear()


@pytest.mark.usefixtures("without_conv3d")
def test_the_layer_of_the_guide() -> None:
    file = (ROOT / "octav_hf" / "nn" / "convolution.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "octav_hf.nn.convolution", "__package__": "octav_hf.nn"}
    exec(file.partition("@register_quantized_layer")[0] + LAYER, names)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 3, 2))
    x = torch.randn(2, 2, 3, 3, 3)
    expected = model(x)
    apply_octav(model, OctavConfig(weight_bits=8, activation_bits=8))
    assert type(model[0]) is names["QuantizedConv3d"]
    assert model[0].weight_quantizer.compute_clip(model[0].weight).shape == (3, 1, 1, 1, 1)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.05)
    assert not torch.equal(model(x), expected)


def test_the_architecture_of_the_guide() -> None:
    entry: dict[str, models.Architecture] = eval(f"{{{ARCHITECTURE}}}", dict(vars(models)))
    ((name, architecture),) = entry.items()
    assert name not in models.ARCHITECTURES
    assert f"-k {name}`" in CONTRIBUTING
    model = apply_octav(architecture.make(), OctavConfig())
    assert not check_coverage(model, architecture.batch()).unexplained(coverage_report(model))
