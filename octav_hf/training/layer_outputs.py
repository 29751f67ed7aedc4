"""Run a model repeatedly up to some of its layers, without repeating the modules before them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from .._utils.forward_pass import Batch, run_batch
from .._utils.torch_private import tree_map


class _Enough(Exception):
    """Ends a forward pass."""


class LayerOutputs:
    """Inputs and outputs of layers in repeated passes over the same batches, while more and more layers are finished.

    A module that runs once per pass and whose layers are all finished returns its stored output instead of running. All
    passes together therefore take about as long as two complete ones. They need memory for one output per such module
    and batch.

    Args:
        model: in evaluation mode, without gradients.
        layers: full name -> layer, for all layers that ``take`` may get.
        batches: as for ``run_batch``.

    Attributes:
        calls: ``(name, input)`` for each call of these layers in a pass over the first batch.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch]):
        self._model, self._layers, self._batches = model, layers, batches
        self.calls: list[tuple[str, Tensor]] = []
        counts = Counter[str]()

        def count(name: str, *_: Any) -> None:
            counts[name] += 1

        def note(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.calls.append((name, _input(args, kwargs)))

        modules = dict(model.named_modules())
        with _hooks(modules, count), _hooks(layers, note):
            run_batch(model, batches[0])
        # Module that runs once per pass -> the layers in it.
        self._inside = {
            name: {layer for layer in layers if _is_within(layer, name)} for name in modules if counts[name] == 1
        }
        self._modules, self._finished = modules, set[str]()
        self._outputs: list[dict[str, Any]] = [{} for _ in batches]

    def finish(self, names: Collection[str]) -> None:
        """Declare that these layers, and all that run before them, do not change any more."""
        self._finished |= set(names)

    def take(self, batch: int, names: Collection[str], take: Callable[[Any, Tensor, Tensor], Any]) -> dict[str, Any]:
        """Run one batch and return ``take(layer, input, output)`` by name; layers that do not run are left out.

        The pass ends with the last of these layers.
        """
        found: dict[str, Any] = {}

        def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            found[name] = take(layer, _input(args, kwargs), output)
            if len(found) == len(names):
                raise _Enough

        outputs = self._outputs[batch]

        def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for inner in [other for other in outputs if _is_within(other, name)]:
                del outputs[inner]
            outputs[name] = _copy(output)

        finished = [name for name, inside in self._inside.items() if inside and inside <= self._finished]
        outermost = [
            name for name in finished if not any(name != other and _is_within(name, other) for other in finished)
        ]
        kept = {name: self._modules[name] for name in outermost if name not in outputs}
        taken = {name: self._layers[name] for name in names}
        with suppress(_Enough), _replaced(self._modules, outputs), _hooks(kept, keep), _hooks(taken, hook):
            run_batch(self._model, self._batches[batch])
        return found


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Context in which ``hook(name, module, args, kwargs, output)`` is called after each call of a module."""
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(hook, name), with_kwargs=True).remove)
        yield


@contextmanager
def _replaced(modules: Mapping[str, nn.Module], outputs: Mapping[str, Any]) -> Iterator[None]:
    """Context in which these modules return copies of these outputs, to which a caller may write."""
    with ExitStack() as stack:
        for name, output in outputs.items():
            stack.enter_context(_forward_replaced(modules[name], output))
        yield


@contextmanager
def _forward_replaced(module: nn.Module, output: Any) -> Iterator[None]:
    before = module.__dict__.get("forward")  # other libraries may have replaced it too
    module.forward = lambda *args, **kwargs: _copy(output)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _copy(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _is_within(name: str, other: str) -> bool:
    """Whether a module is inside another one or the same."""
    return name == other or name.startswith(f"{other}.")
