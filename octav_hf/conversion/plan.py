"""One list of what happens to which module, with every check that could fail, before anything is changed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .._utils.name_patterns import matches, targets
from ..config import OctavConfig
from ..nn import QUANTIZED_LAYERS, quantized_class_of
from .attention import plan_attention
from .first_last import check_nothing_else_is_asked
from .layers import left_in_float, plan_layers, running_module
from .request import ModulePlan, Request

logger = logging.getLogger(__name__)

_PATTERN_FIELDS: dict[str, Callable[[str, str], bool]] = {
    "exclude_modules": matches,
    "target_modules": targets,
    "attention_modules": lambda pattern, name: fnmatchcase(name, pattern),
    "module_overrides": matches,
}


def plan_conversion(model: nn.Module, config: OctavConfig, *, from_file: bool = False) -> list[ModulePlan]:
    """What ``config`` asks of the modules of ``model`` that are not quantized yet; changes nothing.

    ``from_file``: the config is a checkpoint's, whose patterns may match nothing in another model class.

    Raises:
        ValueError: the model cannot be quantized as asked; the message names the module and what to write instead.
    """
    config.validate()
    request = Request.of(model, config, from_file=from_file)
    if not from_file:
        _check_patterns(request)
        for edge in request.edges:
            check_nothing_else_is_asked(edge, config)
    if not any(quantized_class_of(module) for module in request.modules.values()):
        kinds = ", ".join(float_class.__name__ for float_class in QUANTIZED_LAYERS)
        raise ValueError(f"{type(model).__name__} has no layer that can be quantized ({kinds})")
    plan = [*plan_attention(request), *plan_layers(request)]
    others = {} if from_file else left_in_float(request)
    if not plan and not from_file:
        raise ValueError("the config leaves every layer and attention matmul in float; exclude less, or target more")
    for module_plan in plan:
        if "forward" in module_plan.module.__dict__:
            raise ValueError(
                f"{module_plan.name}: the forward of this {type(module_plan.module).__name__} has been replaced on the "
                "object (by a device_map, or another library), so a quantized one would never run; pass "
                "quantization_config=OctavConfig(…) to from_pretrained, or call apply_octav first"
            )
    if not from_file:
        planned = {module_plan.name for module_plan in plan}
        in_float = {
            name: found for name, found in others.items() if running_module(name, request.modules) not in planned
        }
        _warn_of_float(request, in_float)
    return plan


def named_as_in(model: PreTrainedModel, config: OctavConfig) -> OctavConfig:
    """``config`` with its patterns by the names of ``model``, which may be of another class than the one saved.

    As weights' names do, a pattern that matches nothing gets or loses the prefix of the base model, such as ``bert``,
    if it then matches. One that matches neither way stays: it is about a head that is not there.
    """
    names, prefix = [name for name, _ in model.named_modules() if name], f"{model.base_model_prefix}."

    def renamed(pattern: str, is_match: Callable[[str, str], bool]) -> str:
        variants = (pattern, f"{prefix}{pattern}", pattern.removeprefix(prefix))
        return next((each for each in variants if any(is_match(each, name) for name in names)), pattern)

    changed: dict[str, Any] = {}
    for field, is_match in _PATTERN_FIELDS.items():
        patterns = getattr(config, field)
        if isinstance(patterns, dict):
            changed[field] = {renamed(pattern, is_match): value for pattern, value in patterns.items()}
        elif patterns is not None:
            changed[field] = [renamed(pattern, is_match) for pattern in patterns]
    return replace(config, **changed)


def _warn_of_float(request: Request, others: Mapping[str, Sequence[str]]) -> None:
    """Name the parameters of other modules that look like matrices, unlike position embeddings ``[1, n, d]``."""
    matrices = {}
    for name, parameters in others.items():
        module = request.modules[name]
        found = [parameter for parameter in parameters if min(module.get_parameter(parameter).shape) > 1]
        if found:
            matrices[name] = f"{name or type(module).__name__} ({', '.join(found)})"
    if matrices:
        logger.warning(
            "These modules of %s are no layers that can be quantized, so what they multiply with their parameters is "
            "in float: %s. coverage_report lists them; exclude_modules=%s leaves them so without this warning.",
            *(type(request.model).__name__, ", ".join(matrices.values()), list(matrices)),
        )


def _check_patterns(request: Request) -> None:
    for field, is_match in _PATTERN_FIELDS.items():
        for pattern in getattr(request.config, field) or ():
            if not any(name and is_match(pattern, name) for name in request.modules):
                raise ValueError(
                    f"{field}: {pattern!r} matches no module of {type(request.model).__name__}; write a full dotted "
                    "name, or a pattern for it: print([name for name, _ in model.named_modules()]) lists them"
                )
