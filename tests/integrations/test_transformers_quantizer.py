"""Transformers' own functions: from_pretrained, save_pretrained and Trainer, with only the import added."""

import copy
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertForQuestionAnswering,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from octav_hf import OctavConfig, apply_octav, calibrate_octav, coverage_report, pack_octav
from octav_hf.conversion.record import recorded_config
from tests.frozen_activations import frozen_activations
from tests.question_answering import Spans, logits

MakeBert = Callable[..., BertForQuestionAnswering]

CONFIG = {"weight_bits": 3, "exclude_modules": ["qa_outputs"], "module_overrides": {"*.query": {"weight_bits": 8}}}


@pytest.fixture
def float_checkpoint(small_bert: MakeBert, tmp_path: Path) -> Path:
    small_bert().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.mark.versions
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_from_pretrained_equals_apply_octav(float_checkpoint: Path, padded_batch: dict, implementation: str) -> None:
    load = {"attn_implementation": implementation}
    applied = apply_octav(
        AutoModelForQuestionAnswering.from_pretrained(float_checkpoint, **load), OctavConfig(**CONFIG)
    )
    loaded = AutoModelForQuestionAnswering.from_pretrained(
        float_checkpoint, quantization_config=OctavConfig(**CONFIG), **load
    )
    assert torch.equal(logits(loaded, padded_batch), logits(applied, padded_batch))
    assert str(coverage_report(loaded)) == str(coverage_report(applied))
    assert recorded_config(loaded) == recorded_config(applied)


@pytest.mark.versions
def test_saved_and_loaded_gives_bit_identical_logits(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    model = apply_octav(small_bert(), OctavConfig(**CONFIG))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))
    assert loaded.config.quantization_config.to_dict() == OctavConfig(**CONFIG).to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "octav"
    assert set(load_file(tmp_path / "model.safetensors")) == set(small_bert().state_dict())


@pytest.mark.versions
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_a_state_dict_that_is_given_is_what_is_saved(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, packed: bool, by_name: bool
) -> None:
    """A state dict as Trainer passes it for a sharded model; Transformers drops it for other quantized models."""
    model, other = (apply_octav(small_bert(), OctavConfig()) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.01)
    if packed:
        pack_octav(model)
        pack_octav(other)
    own, given = logits(model, padded_batch), logits(other, padded_batch)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        state = other.state_dict()
        if by_name:
            each.save_pretrained(tmp_path, state_dict=state)
        else:
            each.save_pretrained(tmp_path, True, state)
        loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, padded_batch), given)
        each.save_pretrained(tmp_path)  # the next call was given none
        loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, padded_batch), own)


def test_device_map_keeps_it_quantized(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))


def test_a_wrong_config_is_refused_before_loading(float_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="matches no module"):
        AutoModelForQuestionAnswering.from_pretrained(
            float_checkpoint, quantization_config=OctavConfig(exclude_modules=["head"])
        )


@pytest.mark.versions
def test_dequantize_gives_the_float_model(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig()).dequantize()
    assert torch.equal(logits(model, padded_batch), logits(small_bert(), padded_batch))
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.slow
def test_loads_in_a_new_process_with_one_import(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    model.save_pretrained(tmp_path)
    torch.save(padded_batch, tmp_path / "batch.pt")
    script = (
        "import sys, torch, octav_hf\n"
        "from transformers import AutoModelForQuestionAnswering\n"
        "model = AutoModelForQuestionAnswering.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    output = model(**torch.load(sys.argv[1] + '/batch.pt'))\n"
        "torch.save(torch.cat([output.start_logits, output.end_logits]), sys.argv[1] + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model, padded_batch))


def trainer(model: nn.Module, output_dir: Path, **arguments: object) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output_dir),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            weight_decay=0.01,
            save_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            **arguments,
        ),
        train_dataset=Spans(),
    )


@pytest.mark.slow
@pytest.mark.versions
def test_trainer_trains_saves_and_resumes_exactly(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    straight = trainer(apply_octav(small_bert(), OctavConfig()), tmp_path / "straight")
    straight.train()
    expected = {name: value.clone() for name, value in straight.model.state_dict().items()}
    assert not torch.equal(expected["qa_outputs.weight"], small_bert().state_dict()["qa_outputs.weight"])

    resumed = trainer(apply_octav(small_bert(seed=1), OctavConfig()), tmp_path / "straight")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name

    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "straight" / "checkpoint-6")
    assert torch.equal(logits(loaded, padded_batch), logits(straight.model.eval(), padded_batch))


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("applied_after_loading", [True, False])
def test_training_that_started_from_berts_old_names_resumes_exactly(
    float_checkpoint: Path, tmp_path: Path, applied_after_loading: bool
) -> None:
    """Legacy names as in BERT's own files, which Trainer would not find in its checkpoints."""
    file = float_checkpoint / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {re.sub("|".join(old), lambda name: old[name[0]], name): x for name, x in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})

    def load() -> nn.Module:
        if applied_after_loading:
            return apply_octav(AutoModelForQuestionAnswering.from_pretrained(float_checkpoint), OctavConfig())
        return AutoModelForQuestionAnswering.from_pretrained(float_checkpoint, quantization_config=OctavConfig())

    straight, resumed = load(), load()
    trainer(straight, tmp_path).train()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, straight.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.versions
def test_frozen_clips_are_saved_loaded_and_trained_on(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    other = {"input_ids": padded_batch["input_ids"][:, :7]}
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig(**CONFIG)), [padded_batch, other], progress_bar=False)
    clips = frozen_activations(model)
    model.save_pretrained(tmp_path / "first")
    written = load_file(tmp_path / "first" / "model.safetensors")
    assert set(written) == set(model.state_dict())
    assert len(written) == len(small_bert().state_dict()) + 12 + 2 * 4
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "first")
    assert torch.equal(logits(loaded, padded_batch), logits(model, padded_batch))

    training = trainer(loaded, tmp_path / "training")
    training.train()
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "training" / "checkpoint-6")
    assert torch.equal(logits(again, padded_batch), logits(loaded.eval(), padded_batch))
    assert not torch.equal(logits(again, padded_batch), logits(model, padded_batch))
    assert frozen_activations(again) == clips

    resumed = trainer(
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "first"),
        tmp_path / "training",
        gradient_checkpointing=True,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "training" / "checkpoint-3"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


class Freeze(TrainerCallback):
    """Freezes all clips after a step."""

    def __init__(self, batch: dict, step: int):
        self.batch, self.step = batch, step

    def on_step_end(self, args: object, state: TrainerState, control: object, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            calibrate_octav(model, [self.batch], weights=True, progress_bar=False)


@pytest.mark.slow
def test_clips_frozen_during_training_are_resumed(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    models = [apply_octav(small_bert(), OctavConfig()) for _ in range(2)]
    trainers = [trainer(model, tmp_path) for model in models]
    for each in trainers:
        each.add_callback(Freeze(padded_batch, 2))
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    straight, resumed = (model.state_dict() for model in models)
    assert len(frozen_activations(models[1])) == 13 + 2
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_the_best_model_has_the_clips_that_it_was_evaluated_with(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path
) -> None:
    """Checkpoints of steps before and after freezing."""
    model = apply_octav(small_bert(), OctavConfig())
    training = trainer(model, tmp_path)
    training.add_callback(Freeze(padded_batch, 4))
    training.train()
    evaluated = training.model.state_dict()
    for step, is_frozen in ((3, False), (6, True)):
        training.state.best_model_checkpoint = str(tmp_path / f"checkpoint-{step}")
        training._load_best_model()
        assert bool(frozen_activations(model)) is is_frozen
    assert all(torch.equal(model.state_dict()[name], value) for name, value in evaluated.items())


@pytest.mark.versions
@pytest.mark.parametrize("weights", [False, True], ids=["activations", "weights too"])
def test_frozen_clips_load_into_other_classes(
    small_bert: MakeBert, padded_batch: dict, float_checkpoint: Path, weights: bool
) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    calibrate_octav(model, [padded_batch], weights=weights, progress_bar=False).save_pretrained(float_checkpoint)
    for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
        other = auto_class.from_pretrained(float_checkpoint)
        assert frozen_activations(other.base_model) == frozen_activations(model.bert)
        frozen = {row.module for row in coverage_report(other) if row.operand == "weight" and row.frozen}
        assert (len(frozen) >= 12) if weights else not frozen
    assert not other.classifier.input_quantizer.is_frozen
    assert other.classifier.weight_quantizer.is_frozen is weights  # at the clips of the new weight


@pytest.mark.versions
def test_trainer_puts_biases_and_norms_outside_weight_decay(small_bert: MakeBert, tmp_path: Path) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    # Names of parameters that there are none of, such as of clips that do not learn, are among them.
    decayed = set(trainer(model, tmp_path).get_decay_parameter_names(model)) & dict(model.named_parameters()).keys()
    assert decayed == set(trainer(small_bert(), tmp_path).get_decay_parameter_names(small_bert()))
    assert "qa_outputs.weight" in decayed
    assert "qa_outputs.bias" not in decayed


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_weights(
    small_bert: MakeBert, tmp_path: Path, use_reentrant: bool
) -> None:
    plain = trainer(apply_octav(small_bert(), OctavConfig()), tmp_path / "plain")
    plain.train()
    checkpointed = trainer(
        apply_octav(small_bert(), OctavConfig()),
        tmp_path / "checkpointed",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    checkpointed.train()
    for name, value in checkpointed.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name
