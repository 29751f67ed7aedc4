"""Plan the conversion of attention modules, with all checks."""

from collections.abc import Collection, Iterator

from torch import nn

from .._utils.transformers_compat import attn_implementation
from ..nn import ATTENTION_OPERANDS, QuantizedAttention, quantized_class_of
from .attention_modules import attention_modules
from .operands import activation_quantizer
from .request import ModulePlan, Request, prefix, to_exclude

# Attention implementations whose matmuls a function mode sees; None: the module does not use one.
_REACHABLE_IMPLEMENTATIONS = ("eager", "sdpa", None)


def plan_attention(request: Request) -> Iterator[ModulePlan]:
    """The plans of the attention modules.

    Raises:
        ValueError: the matmuls of a module cannot be reached; the message names it and tells what to write instead.
    """
    model, config = request.model, request.config
    attention = attention_modules(request.modules, config.attention_modules)
    for name, module in attention.items():
        if config.attention_modules is not None:
            _check_named(name, module, attention)
        if name in request.left_out:
            continue
        settings = request.settings[name]
        if not settings.quantize_attention or settings.activation_bits is None:
            continue
        _check_reachable(model, name, module)
        quantizers = {
            operand: activation_quantizer(
                request,
                name,
                operand,
                settings.activation_bits,
                signed=operand != "probabilities",
                granularity=settings.granularity(operand),
            )
            for operand in ATTENTION_OPERANDS
        }
        yield ModulePlan(name, module, QuantizedAttention, quantizers)
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if heads and not attention and config.quantize_attention and config.activation_bits is not None:
        raise ValueError(
            f"{type(model).__name__} has {heads} attention heads, but no module whose class name contains Attention or "
            "that calls Transformers' attention interface, so its attention matmuls cannot be reached; list its "
            "attention modules in attention_modules, or set quantize_attention=False to leave the matmuls in float"
        )


def _check_named(name: str, module: nn.Module, attention: Collection[str]) -> None:
    """Check a module that ``OctavConfig.attention_modules`` matches."""
    problem = ""
    if quantized_class_of(module) is not None:
        problem = f"is a {type(module).__name__}, which has no attention matmuls"
    inner = next((other for other in attention if other.startswith(f"{name}.")), None)
    if inner is not None:
        problem = f"contains {inner!r}, which is listed too, so the matmuls of the latter would be quantized twice"
    if problem:
        raise ValueError(
            f"attention_modules: {name!r} {problem}; list only the innermost module that computes attention"
        )


def _check_reachable(model: nn.Module, name: str, module: nn.Module) -> None:
    remedy = "or set quantize_attention=False to leave the attention matmuls in float"
    if isinstance(module, nn.MultiheadAttention):
        raise ValueError(f"{prefix(name)}nn.MultiheadAttention fuses its matmuls; {to_exclude(name)}")
    module_config = getattr(module, "config", getattr(model, "config", None))
    implementation = attn_implementation(module_config)
    if implementation not in _REACHABLE_IMPLEMENTATIONS:
        raise ValueError(
            f"{prefix(name)}attn_implementation {implementation!r} computes the matmuls of this "
            f"{type(module).__name__} in a fused kernel; load the model with attn_implementation='sdpa' or 'eager', "
            f"{remedy}"
        )
