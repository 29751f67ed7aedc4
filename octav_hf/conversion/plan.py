"""One list of what happens to which module, with every check that could fail, before anything is changed."""

import glob
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .._utils.name_patterns import NamePatterns
from ..config import OctavConfig
from ..nn import QUANTIZED_LAYERS, quantized_class_of
from .attention import plan_attention
from .first_last import check_nothing_else_is_asked
from .layers import left_in_float, plan_layers, running_module
from .request import ModulePlan, Request

logger = logging.getLogger(__name__)

# What NamePatterns is told of them.
_PATTERN_FIELDS: dict[str, dict[str, bool]] = {
    "exclude_modules": {},
    "target_modules": {"anywhere": True},
    "attention_modules": {"alone": True},
    "module_overrides": {},
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
    if it then matches. One that matches neither way stays: it is about a head that is not there. In the base model, one
    that needs the prefix, such as ``bert`` or ``b*.layer.0``, becomes the names of the modules that it is for.
    """
    if type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
        return config
    names, prefix = [name for name, _ in model.named_modules() if name], f"{model.base_model_prefix}."
    is_base = not hasattr(model, model.base_model_prefix)

    changed: dict[str, Any] = {}
    for field, options in _PATTERN_FIELDS.items():
        patterns = getattr(config, field)
        if patterns is None:
            continue
        variants = {each: (each, f"{prefix}{each}", each.removeprefix(prefix)) for each in patterns}
        found = _matching({variant for each in variants.values() for variant in each}, names, options)
        meant = _matching(patterns, names, options, prefix) if is_base else {}
        new = {}
        for pattern, wanted in ((each, meant.get(each)) for each in patterns):
            same = (each for each in variants[pattern] if found[each] and (not wanted or found[each] == wanted))
            new[pattern] = [next(same, "")]
            if not new[pattern][0]:
                new[pattern] = [glob.escape(name) for name in _topmost(wanted or (), options)] or [pattern]
        if isinstance(patterns, dict):
            changed[field] = {}
            for pattern in sorted(new, key=lambda each: len(new[each]) == 1):  # an exact name last, since it wins
                for name in new[pattern]:
                    changed[field][name] = changed[field].get(name, {}) | patterns[pattern]
        else:
            changed[field] = [name for pattern in patterns for name in new[pattern]]
    return replace(config, **changed)


def _topmost(names: Collection[str], options: Mapping[str, bool]) -> list[str]:
    """Without those that go with another, unless each pattern is for one module alone."""
    return [name for name in names if options.get("alone") or name.rpartition(".")[0] not in names]


def _matching(
    patterns: Iterable[str], names: Iterable[str], options: Mapping[str, bool], prefix: str = ""
) -> dict[str, list[str]]:
    """Pattern -> those of the ``names`` that match it with the ``prefix``."""
    found: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    matcher = NamePatterns(found, **options)
    for name in names if found else ():
        for pattern in matcher.matching(f"{prefix}{name}"):
            found[pattern].append(name)
    return found


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
    names = [name for name in request.modules if name]
    for field, options in _PATTERN_FIELDS.items():
        for pattern, matching in _matching(getattr(request.config, field) or (), names, options).items():
            if not matching:
                raise ValueError(
                    f"{field}: {pattern!r} matches no module of {type(request.model).__name__}; write a full dotted "
                    "name, or a pattern for it: print([name for name, _ in model.named_modules()]) lists them"
                )
