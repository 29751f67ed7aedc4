"""PEFT's LoRA, added to a quantized model and to a model that is then quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, RobertaConfig, RobertaForSequenceClassification

from octav_hf import (
    OctavConfig,
    apply_octav,
    calibrate_octav,
    check_coverage,
    coverage_report,
    pack_octav,
    remove_octav,
)
from octav_hf.nn import QuantizedLinear
from tests.frozen_activations import frozen_activations

peft = pytest.importorskip("peft", reason="pip install --no-deps peft")

MakeBert = Callable[..., BertForQuestionAnswering]

targets = pytest.mark.parametrize("target_modules", [["query", "value"], "all-linear"], ids=["query, value", "all"])


def lora(target_modules: list[str] | str = "all-linear") -> peft.LoraConfig:
    """Adapters that change the output from the start."""
    torch.manual_seed(1)
    return peft.LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False)


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(**batch)
    return torch.cat([output.start_logits, output.end_logits])


def train(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Two steps of gradient descent on all trainable parameters."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = model.train()(**batch)
        (output.start_logits.square().sum() + output.end_logits.sum()).backward()
        optimizer.step()


@targets
def test_adapters_on_a_quantized_model_stay_in_float_and_are_listed(
    small_bert: MakeBert, padded_batch: dict, target_modules: list[str] | str
) -> None:
    base = apply_octav(small_bert(), OctavConfig())
    model = peft.get_peft_model(base, lora(target_modules))
    check, report = check_coverage(model.eval(), padded_batch), coverage_report(model)
    assert {row.module.split(".")[-2] for row in check} == {"lora_A", "lora_B"}
    assert check.unexplained(report) == []
    (reason,) = {row.reason for row in report.left_in_float() if row.kind == "linear"}
    assert reason == "it was added after apply_octav"


@pytest.mark.versions
def test_adapters_on_a_quantized_model_train_and_come_back(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path
) -> None:
    model = peft.get_peft_model(apply_octav(small_bert(), OctavConfig()), lora())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, padded_batch)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(apply_octav(small_bert(), OctavConfig()), tmp_path)
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))

    floating = peft.PeftModel.from_pretrained(small_bert(), tmp_path)
    assert torch.equal(logits(remove_octav(model), padded_batch), logits(floating, padded_batch))
    assert not model.base_model.model.is_quantized


def test_merged_adapters_leave_the_model_quantized(small_bert: MakeBert, padded_batch: dict) -> None:
    model = peft.get_peft_model(apply_octav(small_bert(), OctavConfig()), lora())
    weight = model.get_submodule("base_model.model.qa_outputs.base_layer").weight.clone()
    merged = model.merge_and_unload()
    assert isinstance(merged.qa_outputs, QuantizedLinear)
    assert not torch.equal(merged.qa_outputs.weight, weight)
    assert check_coverage(merged.eval(), padded_batch) == []


@pytest.mark.parametrize("wrapped", [True, False], ids=["get_peft_model", "add_adapter"])
def test_a_model_that_has_adapters_is_quantized_with_them(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, wrapped: bool
) -> None:
    if wrapped:
        model = peft.get_peft_model(small_bert(), lora())
    else:
        model = small_bert()
        model.add_adapter(lora())
    before = logits(model, padded_batch)
    apply_octav(model, OctavConfig())
    assert {row.kind for row in coverage_report(model).left_in_float()} == {"embedding"}
    check = check_coverage(model, padded_batch)
    assert check == []
    assert check.matmuls == 2 * (6 + 2) + 1 + 2 * 13  # two for each of the 13 adapters
    assert not torch.equal(logits(model, padded_batch), before)
    assert torch.equal(logits(remove_octav(model), padded_batch), before)


@pytest.mark.versions
def test_a_quantized_model_that_has_adapters_comes_back(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path
) -> None:
    model = apply_octav(peft.get_peft_model(small_bert(), lora()), OctavConfig())
    train(model, padded_batch)
    model.save_pretrained(tmp_path)
    loaded = apply_octav(peft.PeftModel.from_pretrained(small_bert(), tmp_path), OctavConfig())
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))


def test_adapters_can_be_excluded(small_bert: MakeBert, padded_batch: dict) -> None:
    model = peft.get_peft_model(small_bert(), lora())
    apply_octav(model, OctavConfig(exclude_modules=["*.lora_A", "*.lora_B"]))
    check = check_coverage(model, padded_batch)
    assert {row.module.split(".")[-2] for row in check} == {"lora_A", "lora_B"}
    assert check.unexplained(coverage_report(model)) == []


def test_frozen_clips_of_a_quantized_model_with_adapters_come_back(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path
) -> None:
    base, again = (apply_octav(small_bert(), OctavConfig()) for _ in range(2))
    for each in (base, again):
        calibrate_octav(each, [padded_batch], progress_bar=False)
    model = peft.get_peft_model(base, lora())
    assert all(row.frozen for row in coverage_report(model) if row.bits and row.operand != "weight")
    model.save_pretrained(tmp_path / "adapters")
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapters")  # whose state dict has no clips
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded, padded_batch), logits(merged, padded_batch))


@pytest.mark.parametrize("added_by", ["peft", "transformers"])
@pytest.mark.parametrize("weights", [False, True])
def test_freezing_under_adapters_warns(
    small_bert: MakeBert, padded_batch: dict, caplog: pytest.LogCaptureFixture, added_by: str, weights: bool
) -> None:
    """Their checkpoints contain only the adapters."""
    base = apply_octav(small_bert(), OctavConfig())
    calibrate_octav(base, [padded_batch], weights=True, progress_bar=False)
    assert not caplog.records
    model = base if added_by == "transformers" else peft.get_peft_model(base, lora(["query"]))
    if model is base:
        base.add_adapter(lora(["query"]))
    calibrate_octav(model, None if weights else [padded_batch], weights=weights, progress_bar=False)
    (record,) = caplog.records
    assert "checkpoints do not contain the frozen clips of the base model" in record.getMessage()


@pytest.mark.parametrize("modules_to_save", [None, ["qa_outputs"]])
def test_a_base_model_with_adapters_around_its_layers_is_not_saved(
    small_bert: MakeBert, tmp_path: Path, modules_to_save: list[str] | None
) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=modules_to_save, r=2)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"self\.query.*save adapters with their own save_pretrained, or merge"):
        model.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    adapted.unload().save_pretrained(tmp_path / "base")
    assert isinstance(BertForQuestionAnswering.from_pretrained(tmp_path / "base").qa_outputs, QuantizedLinear)


def test_frozen_clips_of_quantized_adapters_come_back(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    model = apply_octav(peft.get_peft_model(small_bert(), lora()), OctavConfig())
    calibrate_octav(model, [padded_batch], progress_bar=False)
    clips = frozen_activations(model)
    assert "base_model.model.qa_outputs.base_layer" in clips
    assert "base_model.model.qa_outputs.lora_A.default" in clips
    model.save_pretrained(tmp_path)
    loaded = apply_octav(peft.PeftModel.from_pretrained(small_bert(), tmp_path), OctavConfig())
    adapters = peft.get_peft_model_state_dict(model)
    assert {name for name in adapters if name.endswith("clips")}
    peft.set_peft_model_state_dict(loaded, adapters)
    assert all("lora" in name for name in frozen_activations(loaded))
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))
    peft.set_peft_model_state_dict(loaded, {name: x for name, x in adapters.items() if not name.endswith("clips")})
    assert frozen_activations(loaded) == {name: clips for name, clips in clips.items() if "lora" not in name}


PACKED = r"weight: this weight of shape .* is packed and .*call octav_hf\.unpack_octav\(model\) first"

MERGES: dict[str, Callable[[peft.PeftModel], object]] = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe_merge": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
    "safe merge_adapter": lambda model: model.merge_adapter(safe_merge=True),
}


@pytest.mark.versions
@pytest.mark.parametrize("adapter", ["LoRA", "DoRA", "IA3"])
@pytest.mark.parametrize("merge", MERGES)
def test_merging_into_packed_weights_is_an_error(
    small_bert: MakeBert, padded_batch: dict, merge: str, adapter: str
) -> None:
    torch.manual_seed(1)
    config = (
        peft.IA3Config(target_modules=["query", "qa_outputs"], feedforward_modules=[], init_ia3_weights=False)
        if adapter == "IA3"
        else peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=adapter == "DoRA")
    )
    model = peft.get_peft_model(pack_octav(apply_octav(small_bert(), OctavConfig())), config)
    expected, text = logits(model, padded_batch), str(model)
    with pytest.raises(RuntimeError, match=PACKED):
        MERGES[merge](model)
    assert str(model) == text
    assert torch.equal(logits(model, padded_batch), expected)


@pytest.mark.versions
@pytest.mark.parametrize("bias", ["none", "all"])
def test_adapters_on_a_packed_model_train(small_bert: MakeBert, padded_batch: dict, bias: str) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, bias=bias)
    model = peft.get_peft_model(pack_octav(apply_octav(small_bert(), OctavConfig())), config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, padded_batch)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"lora" if "lora_" in name else name.rpartition(".")[2] for name in changed} == (
        {"lora", "bias"} if bias == "all" else {"lora"}
    )


@pytest.mark.versions
def test_a_packed_layer_is_not_saved_as_trained(small_bert: MakeBert) -> None:
    """``modules_to_save`` copies a layer, or a head with several, for training; only its biases would change."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=100, **sizes))
    for model, head in ((small_bert(), "qa_outputs"), (roberta, "classifier")):
        config = peft.LoraConfig(target_modules=["query"], modules_to_save=[head], r=2)
        with pytest.raises(RuntimeError, match=PACKED):
            peft.get_peft_model(pack_octav(apply_octav(model, OctavConfig())), config)
