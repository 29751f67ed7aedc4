"""Find the matmuls of an attention module while its forward runs, and quantize their operands."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..fake_quantize import FakeQuantize
from ..granularity import ATTENTION_OPERANDS
from .arithmetic import SIMULATED, AttentionArithmetic
from .match_matmul import LAYER_FUNCTIONS, Matmul, UnsupportedMatmul, match_matmul
from .own_parameters import is_view_of, overlaps
from .probabilities import LOOKUPS, SOFTMAX, keeps_values
from .scaled_dot_product_attention import OperandQuantizers


class AttentionMatmuls(TorchFunctionMode):
    """Function mode that quantizes the operands of every attention matmul and ``scaled_dot_product_attention``.

    In a matmul before the softmax, the left operand is the query and the right operand the key. The output of the
    softmax is the probabilities, also after dropout and changes of dtype or shape; the other operand of their matmul is
    the value. Nothing else changes: outer products, with which some models build masks, stay in float, and so do
    matmuls with a parameter (or a view of one) of a layer inside the attention module, which that layer quantizes.

    ``torch.compile`` can trace the mode. While tracing, function modes do not see ``torch.nn.functional.pad`` and
    ``.data``; probabilities that pass through them are not recognized, and ``check_complete`` raises an error.

    Quantizers get the index of each call among those for their operand since the mode was created; each index has its
    own frozen clip.

    Args:
        quantizers: modules named as in ``ATTENTION_OPERANDS``. A granular quantizer gets its operand as
            ``[batch dimensions, free, contracted]``, whichever function computes the matmul.
        name: name of the attention module for error messages, or a function that returns it, which is called only for
            an error (a compiler would recompile for each name).
        own_parameters: parameters of the attention module itself. Neither they nor views or copies of them may be
            operands, or weights of ``torch.nn.functional.linear`` and convolutions. Rows that an index tensor selects
            from one may be operands, like the rows of an embedding.
        layer_parameters: parameters of the layers inside it.
        arithmetic: computes the matmuls.
    """

    def __init__(
        self,
        quantizers: OperandQuantizers,
        name: str | Callable[[], str],
        own_parameters: Iterable[Tensor] = (),
        layer_parameters: Collection[Tensor] = (),
        arithmetic: AttentionArithmetic = SIMULATED,
    ):
        super().__init__()
        self.quantizers = quantizers
        self._get_name = name
        self._own = list(own_parameters)  # views and copies are added
        self._layer_parameters = layer_parameters
        self._arithmetic = arithmetic
        self._probabilities: list[Tensor] = []
        self._call_counts = dict.fromkeys(ATTENTION_OPERANDS, 0)
        self._next_calls = {operand: _NextCall(self, operand) for operand in ATTENTION_OPERANDS}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._refuse_own([*args[:3], *(kwargs.get(name) for name in ("query", "key", "value"))])
            return self._arithmetic.scaled_dot_product_attention(self._next_calls, *args, **kwargs)
        try:
            matmul = match_matmul(func, args, kwargs)
        except UnsupportedMatmul as error:
            raise self._unsupported(
                f"multiplies with {error}, but only matmuls of two tensors can be quantized"
            ) from error
        if matmul is not None and self._is_attention(matmul):
            return self._quantized_matmul(matmul)
        if self._own and func in LAYER_FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if not overlaps(weight, self._layer_parameters):
                self._refuse_own([weight])
        result = func(*args, **kwargs)
        if func in SOFTMAX or keeps_values(func, args, kwargs, self._is_probabilities):
            self._probabilities.extend(_tensors(result))
        elif self._own and func not in LOOKUPS and keeps_values(func, args, kwargs, self._is_own):
            self._own.extend(x for x in _tensors(result) if not self._is_own(x))
        return result

    def check_complete(self) -> None:
        """Raise ``RuntimeError`` unless each operand was quantized, as many times as it has frozen clips."""
        missing = [operand for operand, calls in self._call_counts.items() if calls == 0]
        if missing:
            raise RuntimeError(
                f"{self._its} forward ran without a matmul on the attention operand(s) {', '.join(missing)}, so "
                "they were not quantized. If it uses a fused attention kernel, load the model with "
                "attn_implementation='sdpa' or 'eager'. If its probabilities do not come from a softmax, or are "
                f"changed before their matmul, they are not recognized: {self._remedy}"
            )
        for operand, calls in self._call_counts.items():
            expected = self._frozen_calls(operand)
            if expected is not None and calls < expected:
                raise self._wrong_call_count(operand, f"{calls}", expected)

    def _is_attention(self, matmul: Matmul) -> bool:
        """Whether this is a matmul of activations: not with a layer's weight, and not an outer product for a mask."""
        self._refuse_own(matmul.operands)
        for operand in matmul.operands:
            if isinstance(operand, nn.Parameter) or not operand.is_floating_point():
                return False
            if overlaps(operand, self._layer_parameters):
                return False
        return matmul.inner_size != 1 or any(self._is_probabilities(operand) for operand in matmul.operands)

    def _quantized_matmul(self, matmul: Matmul) -> Any:
        probabilities = [self._is_probabilities(operand) for operand in matmul.operands]
        if all(probabilities):
            raise self._unsupported(
                f"multiplies probabilities of shape {tuple(matmul.operands[0].shape)} with probabilities of shape "
                f"{tuple(matmul.operands[1].shape)}, so its operands cannot be told apart"
            )
        names = ("query", "key")
        if any(probabilities):
            names = ("probabilities", "value") if probabilities[0] else ("value", "probabilities")
        return self._arithmetic.matmul([self._next_calls[name] for name in names], matmul)

    def next_index(self, operand: str) -> int:
        """Count a call of the operand and return its index."""
        index, expected = self._call_counts[operand], self._frozen_calls(operand)
        if expected is not None and index >= expected:
            raise self._wrong_call_count(operand, f"more than {expected}", expected)
        self._call_counts[operand] += 1
        return index

    def _frozen_calls(self, operand: str) -> int | None:
        """The number of frozen clips of ``operand``; ``None`` if clips are dynamic."""
        quantizer = self.quantizers[operand]
        frozen = quantizer.active_frozen_clips if isinstance(quantizer, FakeQuantize) else None
        return None if frozen is None else len(frozen.clips)

    def _wrong_call_count(self, operand: str, calls: str, expected: int) -> RuntimeError:
        return RuntimeError(
            f"{self._its} forward used the attention operand {operand} in {calls} matmul(s), but it has "
            f"{expected} frozen clips, one per matmul; run it on batches like those of the calibration, calibrate it "
            f"with batches like these, or leave its matmuls in float: {self._remedy}"
        )

    def _is_own(self, x: Any) -> bool:
        return isinstance(x, Tensor) and overlaps(x, self._own)

    def _refuse_own(self, operands: Iterable[Any]) -> None:
        for operand in operands:
            if self._is_own(operand):
                raise self._unsupported(
                    f"multiplies with its own parameter of shape {tuple(operand.shape)}; only a weight in a layer "
                    "such as nn.Linear can be quantized"
                )

    def _is_probabilities(self, tensor: Any) -> bool:
        if torch.compiler.is_dynamo_compiling():  # function modes do not see attributes such as mT
            return isinstance(tensor, Tensor) and is_view_of(tensor, self._probabilities)
        return any(tensor is known for known in self._probabilities)

    @property
    def _name(self) -> str:
        return self._get_name if isinstance(self._get_name, str) else self._get_name()

    def _unsupported(self, problem: str) -> NotImplementedError:
        return NotImplementedError(f"{self._its} attention {problem}; {self._remedy}")

    @property
    def _its(self) -> str:
        """The beginning of a message; a module that is the whole model has no name."""
        return f"{self._name}: its" if self._name else "this"

    @property
    def _remedy(self) -> str:
        if not self._name:
            return "set quantize_attention=False to leave its matmuls in float"
        return (
            f"set module_overrides={{{self._name!r}: {{'quantize_attention': False}}}} to leave its matmuls in float, "
            "or quantize_attention=False for those of all attention modules"
        )


def _tensors(result: Any) -> Sequence[Tensor]:
    return result if isinstance(result, tuple | list) else [result]


class _NextCall:
    """Calls the quantizer of an operand with the next index."""

    def __init__(self, matmuls: AttentionMatmuls, operand: str):
        self._matmuls = matmuls
        self._operand = operand

    @property
    def quantizer(self) -> nn.Module:
        return self._matmuls.quantizers[self._operand]

    @property
    def is_granular(self) -> bool:
        return getattr(self.quantizer, "is_granular", False)

    def next_index(self) -> int:
        return self._matmuls.next_index(self._operand)

    def __call__(self, x: Tensor, **codes: Any) -> Any:
        index, quantizer = self.next_index(), self.quantizer
        return quantizer(x, index, **codes) if isinstance(quantizer, FakeQuantize) else quantizer(x)
