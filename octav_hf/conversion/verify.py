"""Whether a quantized model would come back as it is from a checkpoint."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._utils.sharded_weights import sharded_shape
from ..config import OctavConfig
from ..nn import FakeQuantize, QuantizedAttention, QuantizedLayer, quantized_class_of
from .plan import plan_conversion
from .record import named_by_state_dict
from .request import ModulePlan, QuantizerPlan


def float_structure(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The float model that loading begins with, on the meta device."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return model_class(copy.deepcopy(config))


def check_comes_back(
    model: PreTrainedModel, record: OctavConfig, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Check that loading converts the modules of the model's class to what they are in ``model``.

    Args:
        record: what is to be saved.
        state_dict: the weights to be saved, if they are not those in ``model``.

    Raises:
        ValueError: it does not; the message names the module and says what to do.
    """
    name = type(model).__name__
    structure = float_structure(type(model), model.config)
    try:
        plan = {each.name: each for each in plan_conversion(structure, record, from_file=True)}
    except ValueError as error:
        raise ValueError(f"{name} cannot be saved, since loading it would fail: {error}") from error
    expected, modules = dict(structure.named_modules()), named_by_state_dict(model)
    for name, module in modules.items():
        problem = _problem(name, module, expected, plan.get(name), state_dict or {})
        if problem:
            raise ValueError(f"{name}: {problem}")


def _problem(
    name: str,
    module: Any,
    expected: Mapping[str, Any],
    plan: ModulePlan | None,
    state_dict: Mapping[str, Tensor],
) -> str:
    """What is different from ``expected``, the modules of the class, and ``plan`` and what to do; empty if nothing."""
    is_layer, original = quantized_class_of(module) is not None, expected.get(name)
    would_be_layer = original is not None and quantized_class_of(original) is not None
    if not is_layer and not would_be_layer and not isinstance(module, QuantizedAttention):
        return ""
    described = type(module).__name__
    if original is None or is_layer is not would_be_layer:
        there = "no such module" if original is None else f"a {type(original).__name__} there"
        return (
            f"the model's class has {there}, so this {described} would not be loaded again; save adapters by their own "
            "save_pretrained, or merge or unload them first, and put a layer of the same kind in the place of another"
        )
    if is_layer:
        shape = _shape(state_dict.get(f"{name}.weight", module.weight))
        wanted = tuple(original.weight.shape)
        if shape != wanted:
            return (
                f"its weight has shape {shape}, and {wanted} by the model's config; set what it follows from, such as "
                "model.config.num_labels or vocab_size, to what the model has"
            )
    quantizers = {operand: each for operand, each in _quantizers(module).items() if isinstance(each, FakeQuantize)}
    planned = {} if plan is None else {operand: each for operand, each in plan.quantizers.items() if each is not None}
    for operand in sorted(quantizers.keys() | planned.keys()):
        quantizer, again = quantizers.get(operand), planned.get(operand)
        if quantizer is None or again is None or not _is_same(operand, quantizer, again):
            return (
                f"the quantizer of its {operand} ({quantizer}) would not come back as such; set quantizers by "
                "apply_octav(model, OctavConfig(module_overrides=…))"
            )
    return ""


def _quantizers(module: nn.Module) -> Mapping[str, nn.Module]:
    if isinstance(module, QuantizedAttention):
        return module.operand_quantizers
    operands = module.operands if isinstance(module, QuantizedLayer) else ()
    return {operand: getattr(module, f"{operand}_quantizer") for operand in operands}


def _is_same(operand: str, quantizer: FakeQuantize, plan: QuantizerPlan) -> bool:
    """Whether ``plan`` makes a quantizer like this one; that of a weight may be frozen or packed beside."""
    again = plan.quantizer_class(**plan.init_kwargs)
    is_class = operand == "weight" or type(quantizer) is type(again)
    return is_class and again.init_kwargs | {"name": quantizer.name} == quantizer.init_kwargs


def _shape(weight: Tensor) -> tuple[int, ...]:
    return sharded_shape(weight) or tuple(weight.shape)
