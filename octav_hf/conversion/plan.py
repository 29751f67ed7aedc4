"""Plan a conversion: one list of the modules to convert, with all checks, before anything is changed."""

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .._utils.name_patterns import NamePatterns
from ..config import OctavConfig
from ..nn import QUANTIZED_LAYERS, quantized_class_of
from .attention import plan_attention
from .first_last import check_nothing_else_is_asked
from .layers import left_in_float, plan_layers, running_module
from .overrides import check_overrides_apply
from .request import ModulePlan, Request, prefix, to_exclude

logger = logging.getLogger(__name__)

_PATTERN_FIELDS: dict[str, dict[str, bool]] = {
    "exclude_modules": {},
    "target_modules": {"anywhere": True},
    "attention_modules": {"alone": True},
    "module_overrides": {},
}
"""Field with name patterns -> arguments of ``NamePatterns``."""


def plan_conversion(model: nn.Module, config: OctavConfig, *, from_file: bool = False) -> list[ModulePlan]:
    """The plans for the modules of ``model`` that are not quantized yet; changes nothing.

    Args:
        from_file: whether the config was read from a checkpoint; its patterns may then match nothing, because the model
            may be of another class.

    Raises:
        ValueError: the model cannot be quantized with this config; the message names the module and tells what to write
            instead.
    """
    config.validate()
    request = Request.of(model, config)
    if not from_file:
        _check_patterns(request)
        check_overrides_apply(request)
        for edge in request.edges:
            check_nothing_else_is_asked(edge, config)
    if not any(quantized_class_of(module) for module in request.modules.values()):
        kinds = ", ".join(float_class.__name__ for float_class in QUANTIZED_LAYERS)
        raise ValueError(f"{type(model).__name__} has no layer that can be quantized ({kinds})")
    plan = [*plan_attention(request), *plan_layers(request)]
    others = {} if from_file else left_in_float(request)
    if not plan and not from_file:
        raise ValueError(
            "the config leaves every layer and attention matmul in float; exclude fewer modules, or target more"
        )
    for module_plan in plan:
        if "forward" in module_plan.module.__dict__:
            raise ValueError(
                f"{prefix(module_plan.name)}the forward of this {type(module_plan.module).__name__} has been replaced "
                "on the instance (by a device_map, or another library), so a quantized forward would never run; pass "
                "quantization_config=OctavConfig(…) to from_pretrained, or call apply_octav first"
            )
    planned = {module_plan.name for module_plan in plan}
    for name, module in request.modules.items():
        if isinstance(module, nn.TransformerEncoderLayer) and any(each.startswith(f"{name}.") for each in planned):
            raise ValueError(
                f"{prefix(name)}in evaluation, nn.TransformerEncoderLayer computes its linear layers in one fused "
                "kernel, so they would be quantized in training only; "
                + (to_exclude(name) if name else "write the layer with modules of your own")
            )
    _warn_of_float(
        request,
        {name: found for name, found in others.items() if running_module(name, request.modules) not in planned},
    )
    return plan


def check_for_float_model(config: OctavConfig) -> None:
    """Raise ``ValueError`` if a field is set that only the config of a checkpoint may have."""
    if config.packed:
        raise ValueError("packed=True is not for a float model; train it, then call pack_octav(model)")
    if any(each.get("frozen_weight_clips") for each in (vars(config), *config.module_overrides.values())):
        raise ValueError(
            "frozen_weight_clips=True is not for a float model; leave it out, then call calibrate_octav(model, "
            "weights=True)"
        )
    if config.clips_of_version_1:
        raise ValueError(
            "this config belongs to a checkpoint of format version 1 with frozen clips, which are not for a float "
            "model; load that checkpoint with from_pretrained, or call calibrate_octav on this model"
        )


def named_as_in(model: PreTrainedModel, config: OctavConfig) -> OctavConfig:
    """``config`` with its patterns adapted to ``model``, which may be of another class than the saved model.

    A pattern that matches nothing gets or loses the prefix of the base model, such as ``bert``, if it then matches, as
    Transformers does with the names of weights. A pattern that matches neither way is kept: it is for a head that this
    model lacks. In the base model, a pattern that needs the prefix, such as ``bert`` or ``b*.layer.0``, is replaced
    with the names of the modules that it matched.
    """
    if type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
        return config
    names, prefix = [name for name, _ in model.named_modules() if name], f"{model.base_model_prefix}."
    prefixed = () if hasattr(model, model.base_model_prefix) else [f"{prefix}{name}" for name in names]
    changed: dict[str, Any] = {}
    for field, options in _PATTERN_FIELDS.items():
        patterns = getattr(config, field)
        if not patterns:
            continue
        variants = {pattern: (pattern, f"{prefix}{pattern}", pattern.removeprefix(prefix)) for pattern in patterns}
        matched = NamePatterns(chain.from_iterable(variants.values()), **options).by_pattern(names)
        meant = NamePatterns(patterns, **options).by_pattern(prefixed)
        new: dict[str, list[str]] = {}
        for pattern in patterns:
            wanted = [name.removeprefix(prefix) for name in meant.get(pattern, ())]
            same = (each for each in variants[pattern] if each in matched and (not wanted or matched[each] == wanted))
            variant = next(same, None)
            if variant is None and not options.get("alone"):  # the name of a module includes everything below it
                wanted = [name for name in wanted if name.rpartition(".")[0] not in wanted]
            new[pattern] = [variant] if variant is not None else [glob.escape(name) for name in wanted] or [pattern]
        if isinstance(patterns, dict):
            changed[field] = {}
            for pattern in sorted(new, key=lambda each: len(new[each]) == 1):  # exact names last: they take precedence
                for name in new[pattern]:
                    changed[field][name] = changed[field].get(name, {}) | patterns[pattern]
        else:
            changed[field] = [name for pattern in patterns for name in new[pattern]]
    return replace(config, **changed)


def _warn_of_float(request: Request, others: Mapping[str, Sequence[str]]) -> None:
    """Warn of parameters of other modules that look like matrices, which position embeddings ``[1, n, d]`` do not."""
    matrices = {}
    for name, parameters in others.items():
        module = request.modules[name]
        found = [parameter for parameter in parameters if min(module.get_parameter(parameter).shape) > 1]
        if found:
            matrices[name] = f"{name or type(module).__name__} ({', '.join(found)})"
    if matrices:
        logger.warning(
            "These modules of %s are not layers that can be quantized, so matmuls with their parameters stay in float: "
            "%s. coverage_report lists them; exclude_modules=%s leaves them in float without this warning.",
            *(type(request.model).__name__, ", ".join(matrices.values()), list(matrices)),
        )


def _check_patterns(request: Request) -> None:
    for field, options in _PATTERN_FIELDS.items():
        # Only exclude_modules may name the model itself: elsewhere "" would look like the whole model.
        names = [name for name in request.modules if name or field == "exclude_modules"]
        patterns = getattr(request.config, field) or ()
        matched = NamePatterns(patterns, **options).by_pattern(names)
        for pattern in patterns:
            if pattern not in matched:
                raise ValueError(
                    f"{field}: {pattern!r} matches no module of {type(request.model).__name__}; write a full dotted "
                    "name, or a pattern for it: print([name for name, _ in model.named_modules()]) shows the names"
                )
