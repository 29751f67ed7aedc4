"""The wheel holds all of the package, and works where only the wheel and its dependencies are installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from packaging.metadata import Metadata

from octav_hf import __version__
from tests.twins import octav_clip_twin

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "octav_hf")
SIZE = 1 << 14  # elements, more than the least that compiled code is used for
SCRIPT = f"""
import torch, octav_hf
from octav_hf.functional import octav_clip
x = torch.randn({SIZE}, generator=torch.Generator().manual_seed(0))
print(octav_hf.__file__, octav_hf.__version__, octav_clip(x, 4).item())
"""
NO_KERNELS = "octav_hf runs without compiled kernels"

Run = Callable[..., subprocess.CompletedProcess[str]]


def files_of(folder: Path) -> set[str]:
    """The files of ``octav_hf`` in a checkout, by their paths from its root."""
    paths = (folder / "octav_hf").rglob("*")
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution of this checkout, and the wheel that was built from it."""
    checkout, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:  # elsewhere, since a build leaves files beside its sources
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(checkout)]
    subprocess.run(build, check=True, capture_output=True)
    return dist


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment with the wheel installed, in which its dependencies can be imported.

    These are those of the environment that the tests run in. Its editable installation of this checkout is not seen:
    ``.pth`` files count in the new environment's own folder only.
    """
    prefix = tmp_path_factory.mktemp("environment")
    venv.create(prefix, symlinks=True)
    paths = sysconfig.get_paths(scheme="venv", vars={"base": str(prefix), "platbase": str(prefix)})
    pip = [sys.executable, "-m", "pip", "--python", str(Path(paths["scripts"]) / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    dependencies = "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (Path(paths["purelib"]) / "dependencies.pth").write_text(dependencies, encoding="utf-8")
    return Path(paths["scripts"])


@pytest.fixture
def run(scripts: Path, tmp_path: Path) -> Run:
    """Run a program of the new environment outside of the checkout, with changed environment variables."""

    def run(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
        command = [str(scripts / program), *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)

    return run


def test_wheel_and_source_distribution_hold_every_file_of_the_package(dist: Path, wheel: Path) -> None:
    expected = files_of(ROOT)
    assert {"octav_hf/py.typed", "octav_hf/functional/kernels/clips.cpp"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert expected <= {name.partition("/")[2] for name in archive.getnames()}


def test_the_metadata_are_valid_and_their_description_is_the_readme(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.partition("/")[0] for name in archive.namelist()} - {"octav_hf"}
        metadata = Metadata.from_email(
            archive.read(f"{info}/METADATA"), validate=True
        )  # raises for what an index would
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert str(metadata.version) == __version__
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
    html = MarkdownIt("commonmark").enable("table").render(metadata.description)
    assert html.startswith("<h1>octav-hf</h1>")
    assert "<table>" in html
    assert '<pre><code class="language-python">' in html


def test_a_clip_is_computed_by_compiled_code_from_the_wheel(run: Run, scripts: Path) -> None:
    done = run("python", "-c", SCRIPT)  # may find in torch's cache what other tests compiled from the same source
    check_output(done.stdout, scripts)
    assert NO_KERNELS not in done.stderr


def test_a_clip_is_computed_without_a_compiler(run: Run, scripts: Path, tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    done = run("python", "-c", SCRIPT, PATH=str(empty), CXX="g++", TORCHINDUCTOR_CACHE_DIR=str(empty))
    check_output(done.stdout, scripts)
    assert NO_KERNELS in done.stderr


def check_output(printed: str, scripts: Path) -> None:
    """What ``SCRIPT`` has to print: a file of the new environment, the version, and Eq. 6's fixed point."""
    file, version, clip = printed.split()
    assert Path(file).is_relative_to(scripts.parent)
    assert version == __version__
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    assert float(clip) == pytest.approx(octav_clip_twin(x, 4), rel=1e-5)


def test_the_command_shows_its_help(run: Run) -> None:
    assert run("octav-hf", "--help").stdout.startswith("usage: octav-hf ")
