"""Bits 2 to 8, float32 and bfloat16, dynamic and frozen clips, packed: pushed, and equal in another process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from .conftest import ADA, run_script
from .loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow

# The bits change what is in a packed weight and nothing else: all of them with one form, the ends with each.
CASES = [
    {"bits": bits, "dtype": dtype, "frozen": frozen}
    for bits, dtype, frozen in itertools.product(range(2, 9), ("float32", "bfloat16"), (False, True))
    if bits in (2, 8) or (dtype, frozen) == ("float32", False)
]

PUSH = """
import json, sys, torch
from octav_hf import pack_octav
from tests.hub.models import logits, make, make_tokenizer, scores
tokenizer, results = make_tokenizer(), []
for number, case in enumerate(json.loads(sys.argv[1])):
    dtype = getattr(torch, case.pop("dtype"))
    model = make("training", dtype=dtype, vocabulary=len(tokenizer), **case)
    results.append({"logits": logits(model), "scores": scores(model, tokenizer)})
    pack_octav(model).push_to_hub(f"ada/case-{number}")
    tokenizer.push_to_hub(f"ada/case-{number}")
torch.save(results, sys.argv[2])
"""

LOAD = """
import sys, torch, octav_hf
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from tests.hub.models import logits, scores
results = []
for number in range(int(sys.argv[1])):
    model = AutoModelForQuestionAnswering.from_pretrained(f"ada/case-{number}")
    tokenizer = AutoTokenizer.from_pretrained(f"ada/case-{number}")
    config = model.config.quantization_config
    is_frozen = model.qa_outputs.input_quantizer.is_frozen
    case = {"bits": config.weight_bits, "dtype": str(model.dtype)[6:], "frozen": is_frozen}
    packed = type(model.qa_outputs).__name__
    results.append({"logits": logits(model), "scores": scores(model, tokenizer), "case": case, "packed": packed})
torch.save(results, sys.argv[2])
"""


def test_pushed_and_loaded_in_a_new_process_with_an_empty_cache(hub: LoopbackHub, tmp_path: Path) -> None:
    pushed, loaded = tmp_path / "pushed.pt", tmp_path / "loaded.pt"
    run_script(hub, tmp_path / "first", PUSH, json.dumps(CASES), pushed, token=ADA)
    run_script(hub, tmp_path / "second", LOAD, len(CASES), loaded)
    before, after = torch.load(pushed), torch.load(loaded)
    assert len(before) == len(after) == 13
    for case, saved, got in zip(CASES, before, after, strict=True):
        assert got["case"] == case
        assert got["packed"] == "PackedLinear"
        assert torch.equal(got["logits"], saved["logits"]), case
        assert got["scores"] == saved["scores"], case
    assert len({result["logits"].double().sum().item() for result in before}) == len(CASES)
    assert any(result["scores"]["f1"] > 0 for result in before)
