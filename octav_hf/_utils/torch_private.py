"""What is private to PyTorch and used here, each with the reason.

Not here is what ``nn.Module`` passes on to its subclasses: ``_apply``, ``_buffers``, and a convolution's
``_conv_forward``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch, _pytree

# nn.functional.linear as PyTorch has it. DeepSpeed's ZeRO-3 puts a function in its place whose matmuls would be taken
# for those of the attention module around the layer.
LINEAR = torch._C._nn.linear

# Function modes can be entered in public, but neither listed nor left for a while, one of them or all.
function_mode_stack = torch.overrides._get_current_function_mode_stack
without_innermost_function_mode = torch.overrides._pop_mode_temporarily
without_function_modes = torch._C.DisableTorchFunction

# Dispatch modes are documented, but these classes have no public path, and whether one is active has no public query.
TorchDispatchMode = _python_dispatch.TorchDispatchMode
OpOverload = torch._ops.OpOverload
current_dispatch_mode = _python_dispatch._get_current_dispatch_mode

# Nested containers of tensors, of any class, as torch itself goes through them; there is no public path.
tree_leaves, tree_map = _pytree.tree_leaves, _pytree.tree_map


def load_cpp(source: str, flags: tuple[str, ...]) -> Any:
    """Compile C++ into a library, kept on disk; the public ``torch.utils.cpp_extension`` takes many times as long."""
    # Not at the top: it costs a second that a program without large tensors need not spend.
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source, extra_flags=flags)


def compilation_errors() -> tuple[type[Exception], ...]:
    """What a function by ``torch.compile`` raises where it cannot be compiled; none of it is public."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # lazy, as above

    return TorchDynamoException, FailOnRecompileLimitHit


def schema(operator: Any) -> Any:
    """An operator's name, its arguments and which of them it writes to; nothing public tells."""
    return operator._schema


def storage_id(x: Tensor) -> int:
    """A number that only views of the same storage share; the public address is 0 for empty ones and on meta."""
    return x.untyped_storage()._cdata


def version_counter(x: Tensor) -> int:
    """How often a tensor was written to in place; nothing public tells."""
    return x._version


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters as they are registered; reading one by its name may run a property."""
    return module._parameters


def forward_hooks(module: nn.Module) -> list[Any]:
    """A module's forward hooks; in public they can be registered and removed, but not listed."""
    return list(module._forward_hooks.values())


def is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` made a module for one forward pass; nothing but this mark tells."""
    return getattr(module, "_is_replica", False)


def uncompiled(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped in a module, or the module itself; the wrapper shows it in no other way."""
    return getattr(module, "_orig_mod", module)
