"""torch.compile of a quantized model: the graph breaks at every clip, the result is that of the model as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_and_gradients(
    small_bert: Callable[..., BertForQuestionAnswering], padded_batch: dict, implementation: str
) -> None:
    torch.compiler.reset()
    settings = {"attn_implementation": implementation, "num_hidden_layers": 1}
    model, other = (apply_octav(small_bert(**settings), OctavConfig()) for _ in range(2))
    compiled = torch.compile(other, backend="aot_eager")
    expected, got = model(**padded_batch), compiled(**padded_batch)
    torch.testing.assert_close(got.start_logits, expected.start_logits, rtol=1e-4, atol=1e-5)
    expected.start_logits.square().sum().backward()
    got.start_logits.square().sum().backward()
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(
                twin.grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    with torch.no_grad():
        torch.testing.assert_close(compiled(**padded_batch).end_logits, model(**padded_batch).end_logits)
