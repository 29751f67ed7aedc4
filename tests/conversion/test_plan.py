"""A config is resolved once per model, with few function calls."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from transformers import BertConfig, BertForQuestionAnswering

import octav_hf
from octav_hf import OctavConfig, apply_octav
from octav_hf.conversion.plan import named_as_in

PACKAGE = str(Path(octav_hf.__file__).parent)
OVERRIDES = {"*.query": {"weight_bits": 8}, "qa_outputs": {"activation_bits": 8}}


@pytest.fixture
def bert() -> BertForQuestionAnswering:
    """A narrow BERT with BERT-Base's 12 layers."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForQuestionAnswering(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))


def calls_of(function: Callable[[], object]) -> Counter[str]:
    """The number of calls of each function of the package during ``function``."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[frame.f_code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("overrides", [{}, OVERRIDES], ids=["no overrides", "overrides"])
def test_settings_are_resolved_once(bert: BertForQuestionAnswering, overrides: dict, tmp_path: Path) -> None:
    config = OctavConfig(module_overrides=overrides)
    bert.save_pretrained(tmp_path)
    ways = (
        lambda: apply_octav(bert, config),
        lambda: BertForQuestionAnswering.from_pretrained(tmp_path, quantization_config=config),
    )
    for way in ways:
        calls = calls_of(way)
        assert calls["OctavConfig.settings_for"] == calls["plan_conversion"] == calls["convert_modules"] == 1


def test_a_module_costs_few_calls(bert: BertForQuestionAnswering) -> None:
    config = OctavConfig()
    calls = calls_of(lambda: apply_octav(bert, config))
    assert calls.total() < 3800, calls.most_common(10)  # 17,380 when the config was resolved for each operand


def test_patterns_are_matched_in_one_pass_over_the_modules(bert: BertForQuestionAnswering) -> None:
    config = OctavConfig(module_overrides={f"head.{index}": {"weight_bits": 8} for index in range(1000)})
    calls = calls_of(lambda: named_as_in(bert, config))
    assert calls["NamePatterns.matching"] <= len(list(bert.modules()))
