"""Read untrusted JSON files."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The value in ``path``; ``ValueError`` with the path if it is not JSON or is nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
