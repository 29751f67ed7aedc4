"""Check that loading a checkpoint would restore a quantized model as it is."""

import copy
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._utils.sharded_weights import sharded_shape
from ..config import OctavConfig
from ..nn import (
    FakeQuantize,
    PackedLayer,
    QuantizedAttention,
    QuantizedLayer,
    WeightFakeQuantize,
    quantized_class_of,
)
from .plan import plan_conversion
from .record import named_by_state_dict
from .request import ModulePlan, QuantizerPlan

logger = logging.getLogger(__name__)


def float_structure(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The float model from which loading starts, on the meta device."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return model_class(copy.deepcopy(config))


def check_comes_back(
    model: PreTrainedModel, record: OctavConfig, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Check that loading ``record`` would give the modules of ``model``.

    Args:
        model: the model to save.
        record: the config to save.
        state_dict: the weights to save, if they are not those of ``model``.

    Raises:
        ValueError: loading would give other modules; the message names the module and tells what to do.
    """
    name = type(model).__name__
    if not _needs_a_config_only(type(model)):
        logger.warning(
            "%s takes more arguments than its config, so it cannot be checked that loading restores the model; load it "
            "with the same arguments, and compare the outputs.",
            name,
        )
        return
    try:
        structure = float_structure(type(model), model.config)
        plan = {each.name: each for each in plan_conversion(structure, record, from_file=True)}
    except Exception as error:  # the model's class may raise anything
        raise ValueError(f"{name} cannot be saved, because loading it would fail: {error}") from error
    expected, modules = dict(structure.named_modules()), named_by_state_dict(model)
    _check_lists(expected, modules)
    for name, module in modules.items():
        problem = _problem(name, module, expected, plan.get(name), state_dict or {})
        problem = problem or _problem_with_ties(model, name, modules)
        if problem:
            raise ValueError(f"{name}: {problem}")


def _needs_a_config_only(model_class: type[PreTrainedModel]) -> bool:
    try:
        inspect.signature(model_class).bind(None)
    except TypeError:
        return False
    return True


def _check_lists(expected: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> None:
    """Check that no list of blocks has become shorter; loading would initialize the missing blocks."""
    for name, there in expected.items():
        own = modules.get(name)
        if isinstance(there, nn.ModuleList) and isinstance(own, nn.ModuleList) and len(own) < len(there):
            raise ValueError(
                f"{name}: it has {len(own)} modules, but {len(there)} according to the model's config; adapt the "
                "config, such as model.config.num_hidden_layers"
            )


def _problem_with_ties(model: PreTrainedModel, name: str, modules: Mapping[str, nn.Module]) -> str:
    """Why a packed layer cannot be saved, if an unpacked layer is tied to its weight; empty otherwise."""
    if not isinstance(modules[name], PackedLayer):
        return ""
    targets = (other for other, source in model.all_tied_weights_keys.items() if source == f"{name}.weight")
    for other in (each.removesuffix(".weight") for each in targets):
        if other in modules and not isinstance(modules[other], PackedLayer):
            return (
                f"it is packed, but {other}, which the model's class ties to its weight, is not; call unpack_octav, "
                f"then pack_octav on the whole {type(model).__name__}"
            )
    return ""


def _problem(
    name: str,
    module: Any,
    expected: Mapping[str, Any],
    plan: ModulePlan | None,
    state_dict: Mapping[str, Tensor],
) -> str:
    """How the module differs from what ``expected`` and ``plan`` give, and what to do; empty if it does not."""
    is_layer, original = quantized_class_of(module) is not None, expected.get(name)
    would_be_layer = original is not None and quantized_class_of(original) is not None
    if not is_layer and not would_be_layer and not isinstance(module, QuantizedAttention):
        return ""
    described = type(module).__name__
    if original is None or is_layer is not would_be_layer:
        there = "no such module" if original is None else f"a {type(original).__name__} there"
        return (
            f"the model's class has {there}, so this {described} would not be loaded again; save adapters with their "
            "own save_pretrained, or merge or unload them first; replace a layer only with one of the same kind"
        )
    if isinstance(module, QuantizedLayer) and state_dict:
        try:
            module.check_form(state_dict, f"{name}.")
        except RuntimeError as error:
            return str(error)
        frozen = isinstance(module.weight_quantizer, WeightFakeQuantize) and module.weight_quantizer.is_frozen
        if frozen and f"{name}.weight" in state_dict and f"{name}.weight_quantizer.clips" not in state_dict:
            return (
                "the clips of its weight are frozen, but the given state_dict has none; pass model.state_dict(), or "
                "call uncalibrate_octav(model)"
            )
    if is_layer:
        shape = _shape(state_dict.get(f"{name}.weight", module.weight))
        wanted = tuple(original.weight.shape)
        if shape != wanted:
            return (
                f"its weight has shape {shape}, but {wanted} according to the model's config; adapt the config, such "
                "as model.config.num_labels or vocab_size"
            )
    quantizers = {operand: each for operand, each in _quantizers(module).items() if isinstance(each, FakeQuantize)}
    planned = {} if plan is None else {operand: each for operand, each in plan.quantizers.items() if each is not None}
    for operand in sorted(quantizers.keys() | planned.keys()):
        quantizer, again = quantizers.get(operand), planned.get(operand)
        if quantizer is None or again is None or not _is_same(operand, quantizer, again):
            return (
                f"the quantizer of its {operand} ({quantizer}) would not be restored by loading; set quantizers with "
                "apply_octav(model, OctavConfig(module_overrides=…))"
            )
    return ""


def _quantizers(module: nn.Module) -> Mapping[str, nn.Module]:
    if isinstance(module, QuantizedAttention):
        return module.operand_quantizers
    operands = module.operands if isinstance(module, QuantizedLayer) else ()
    return {operand: getattr(module, f"{operand}_quantizer") for operand in operands}


def _is_same(operand: str, quantizer: FakeQuantize, plan: QuantizerPlan) -> bool:
    """Whether ``plan`` gives a quantizer like this one; that of a weight may also be frozen or packed."""
    again = plan.quantizer_class(**plan.init_kwargs)
    is_class = operand == "weight" or type(quantizer) is type(again)
    return is_class and again.init_kwargs | {"name": quantizer.name} == quantizer.init_kwargs


def _shape(weight: Tensor) -> tuple[int, ...]:
    return sharded_shape(weight) or tuple(weight.shape)
