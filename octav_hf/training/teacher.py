"""The modules of a teacher, by the names that they have in the quantized model."""

from collections.abc import Iterable

from torch import nn


def teacher_modules(teacher: nn.Module, names: Iterable[str], function: str) -> dict[str, nn.Module]:
    """Full name -> the teacher's module of this name.

    Args:
        function: name of the public function that calls this; the error begins with it.

    Raises:
        ValueError: the teacher lacks one of these modules.
    """
    modules, names = dict(teacher.named_modules()), list(names)
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(
            f"{function}: the teacher, a {type(teacher).__name__}, has no module {missing[0]!r}; pass the float model "
            "that the quantized model was made from"
        )
    return {name: modules[name] for name in names}
