"""The packages of the extra ``onnx``, which only exports need."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

NEEDED = {"onnx": "1.23", "onnxscript": "0.7", "onnxruntime": "1.32"}
"""Package -> lowest tested version."""


def require_extra() -> None:
    """Raise ``ImportError`` if a package is missing or too old."""
    for package, lowest in NEEDED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "0"
        if Version(found) < Version(lowest):
            problem = f"{package} {found} is too old" if found != "0" else f"{package} is not installed"
            raise ImportError(f"octav_hf.export needs {package}>={lowest}, but {problem}: pip install 'octav-hf[onnx]'")
