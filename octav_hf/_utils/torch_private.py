"""All private names of PyTorch that this package uses, with reasons.

The exceptions are those that subclasses of ``nn.Module`` inherit: ``_apply``, ``_buffers``, ``_conv_forward``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _python_dispatch, _pytree

# PyTorch's own nn.functional.linear, which DeepSpeed's ZeRO-3 replaces with a function whose matmuls look like those of
# attention.
LINEAR = torch._C._nn.linear

# No public function lists the active function modes or suspends them.
function_mode_stack = torch.overrides._get_current_function_mode_stack
without_innermost_function_mode = torch.overrides._pop_mode_temporarily
without_function_modes = torch._C.DisableTorchFunction

# Dispatch modes are documented but have no public path, and no public function tells whether one is active.
TorchDispatchMode = _python_dispatch.TorchDispatchMode
OpOverload = torch._ops.OpOverload
current_dispatch_mode = _python_dispatch._get_current_dispatch_mode

# Traversal of nested containers of tensors has no public path.
tree_leaves, tree_map = _pytree.tree_leaves, _pytree.tree_map

# Public functions can neither create a tensor subclass without memory nor leave everything to __torch_dispatch__.
make_wrapper = torch.Tensor._make_wrapper_subclass
no_torch_function = torch._C._disabled_torch_function_impl


def load_cpp(source: str, flags: tuple[str, ...]) -> Any:
    """Compile C++ into a library that is cached on disk; the public ``cpp_extension`` is many times slower."""
    # Imported here because it takes a second.
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source, extra_flags=flags)


def compilation_errors() -> tuple[type[Exception], ...]:
    """The errors of failed compilation by ``torch.compile``, which are not public."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # takes a second

    return TorchDynamoException, FailOnRecompileLimitHit


def vector_width() -> dict[str, int]:
    """Option of ``torch.compile`` with the vector width of this processor, which is the default.

    The cache key of compiled graphs does not contain the default. Loops from a cache that another processor has filled
    would then skip elements.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # takes a second

    return {"cpp.simdlen": pick_vec_isa().bit_width()}


def schema(operator: Any) -> Any:
    """The schema of an operator (name, arguments, which of them it writes to), which has no public path."""
    return operator._schema


def storage_id(x: Tensor) -> int:
    """A unique id of the storage; the public address is 0 for empty storages and on the meta device."""
    return x.untyped_storage()._cdata


def storage_reference(x: Tensor) -> Any:
    """A weak reference to the storage; while it exists, no other storage gets the same ``storage_id``."""
    return StorageWeakRef(x.untyped_storage())


def view_base(x: Tensor) -> Tensor | None:
    """The tensor that ``x`` is a view of, which has no public path."""
    return x._base


def version_counter(x: Tensor) -> int:
    """The number of in-place writes to a tensor, which has no public path."""
    return x._version


def has_values(x: Tensor) -> bool:
    """Whether a tensor's values can be read; fake tensors, which tracers use, have no public class."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own registered parameters; public attribute access might run a property."""
    return module._parameters


def set_own_parameters(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    """Replace the dict of a module's own parameters, to which some PyTorch functions write directly."""
    module._parameters = parameters


def forward_hooks(module: nn.Module) -> list[Any]:
    """A module's forward hooks, which no public function lists."""
    return list(module._forward_hooks.values())


def is_replica(module: nn.Module) -> bool:
    """Whether a module is a replica made by ``nn.DataParallel``, which only a private attribute tells."""
    return getattr(module, "_is_replica", False)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile`` wrapper, which has no public path, or the module itself."""
    return getattr(module, "_orig_mod", module)
