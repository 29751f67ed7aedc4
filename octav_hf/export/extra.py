"""The packages of the extra ``onnx``, which nothing else needs."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

NEEDED = {"onnx": "1.23", "onnxscript": "0.7", "onnxruntime": "1.32"}
"""Package -> the lowest version that the files were tried with."""


def require_extra() -> None:
    """``ImportError`` if a package is missing or too old."""
    for package, lowest in NEEDED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "0"
        if Version(found) < Version(lowest):
            problem = f"{package} {found} is too old" if found != "0" else f"{package} is not installed"
            raise ImportError(f"octav_hf.export needs {package}>={lowest}, and {problem}: pip install 'octav-hf[onnx]'")
