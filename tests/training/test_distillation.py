"""The loss of a distilled model against a float64 reference, when it is set, and what must not change."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DetrConfig,
    DynamicCache,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from octav_hf import OctavConfig, apply_octav, calibrate_octav, distill
from octav_hf.training.logits import class_logits
from tests.question_answering import Spans
from tests.replicas import replica_of

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor
SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUESTION = {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 5])}


def make(model_class: type[PreTrainedModel], seed: int = 0, **changes: Any) -> Any:
    """A small random model without dropout, with logits far from uniform."""
    torch.manual_seed(seed)
    kind = {LlamaForCausalLM: LlamaConfig, T5ForConditionalGeneration: T5Config}.get(model_class, BertConfig)
    sizes: dict[str, Any] = SIZES | {"intermediate_size": 64, "num_labels": 4} | NO_DROPOUT
    if kind is T5Config:
        sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        sizes |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    if model_class is BertForQuestionAnswering:
        sizes.pop("num_labels")
    model = model_class(kind(**(sizes | changes)))
    head = model.get_output_embeddings() or getattr(model, "qa_outputs", None) or model.classifier
    nn.init.normal_(head.weight, std=0.5)
    return model.train()


def mean_divergence(teacher: Tensor, student: Tensor, temperature: float, keep: np.ndarray) -> float:
    """Mean over rows of the last dimension with a true value in `keep`, each over the classes where it is true."""
    values = []
    flat = [x.detach().double().reshape(-1, x.shape[-1]).numpy() for x in (teacher, student)]
    for p_row, q_row, kept in zip(*flat, keep.reshape(len(flat[0]), -1), strict=True):
        kept = np.broadcast_to(kept, p_row.shape)
        if kept.any():
            p, q = (np.exp(row[kept] / temperature) for row in (p_row, q_row))
            p, q = p / p.sum(), q / q.sum()
            values.append((p * np.log(p / q)).sum())
    return float(np.mean(values))


def logits_of(model: nn.Module, batch: dict[str, Tensor], field: str = "logits") -> Tensor:
    return copy.deepcopy(model).eval()(**batch)[field]


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 2.0), (0.3, 1.0), (0.5, 4.0)])
def test_question_answering(padded_batch: dict, weight: float, temperature: float) -> None:
    student, teacher = (make(BertForQuestionAnswering, seed) for seed in range(2))
    label_loss = student(**padded_batch, **QUESTION).loss.item()
    keep = padded_batch["attention_mask"].bool().numpy()
    parts = [
        mean_divergence(logits_of(teacher, padded_batch, f), logits_of(student, padded_batch, f), temperature, keep)
        for f in ("start_logits", "end_logits")
    ]
    distill(student, teacher, weight=weight, temperature=temperature)
    output = student(**padded_batch, **QUESTION)
    expected = (1 - weight) * label_loss + weight * temperature**2 * sum(parts) / 2
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert list(output) == ["loss", "start_logits", "end_logits"]
    by_position = student(padded_batch["input_ids"], padded_batch["attention_mask"], **QUESTION)
    assert torch.equal(by_position.loss, output.loss)


@pytest.mark.parametrize("masked", [True, False])
def test_classes_of_tokens(padded_batch: dict, masked: bool) -> None:
    student, teacher = (make(BertForTokenClassification, seed) for seed in range(2))
    batch = padded_batch if masked else {"input_ids": padded_batch["input_ids"]}
    keep = padded_batch["attention_mask"].bool().numpy() if masked else np.ones((2, 16), dtype=bool)
    expected = 4 * mean_divergence(logits_of(teacher, batch), logits_of(student, batch), 2.0, keep)
    distill(student, teacher)
    output = student(**batch)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert list(output) == ["loss", "logits"], "the loss comes first, also where there are no labels"


def test_classes_of_sequences_as_many_as_tokens(padded_batch: dict) -> None:
    """The mask happens to have the shape of the logits, but does not belong to them."""
    student, teacher = (make(BertForSequenceClassification, seed, num_labels=16) for seed in range(2))
    expected = 4 * mean_divergence(
        logits_of(teacher, padded_batch), logits_of(student, padded_batch), 2.0, np.ones((2, 1), dtype=bool)
    )
    distill(student, teacher)
    assert student(**padded_batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_decoder_has_its_own_padding(padded_batch: dict) -> None:
    """The decoder's inputs are computed from the labels, also for the teacher, and as long as the encoder's."""
    student, teacher = (make(T5ForConditionalGeneration, seed) for seed in range(2))
    labels = padded_batch["input_ids"].clone()
    labels[0, 4:] = -100
    batch = padded_batch | {"labels": labels}
    expected = 4 * mean_divergence(logits_of(teacher, batch), logits_of(student, batch), 2.0, (labels != -100).numpy())
    distill(student, teacher)
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


def segformer(seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
    sizes |= {"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    sizes |= {"decoder_hidden_size": 8, "num_labels": 3}
    rates = dict.fromkeys(("hidden_dropout_prob", "classifier_dropout_prob", "drop_path_rate"), 0.0)
    model = SegformerForSemanticSegmentation(SegformerConfig(**(sizes | rates | changes))).train()
    nn.init.normal_(model.decode_head.classifier.weight, std=100)
    model.decode_head.batch_norm.eval()
    return model


def maskformer() -> Any:
    """With as many masks as labels."""
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2)
    decoder = DetrConfig(d_model=32, decoder_layers=1, encoder_layers=1, num_queries=5)
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": 5}
    config = MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, **sizes)
    return MaskFormerForInstanceSegmentation(config).train()


def test_classes_of_pixels() -> None:
    student, teacher = segformer(0), segformer(1)
    batch = {"pixel_values": torch.randn(2, 3, 16, 32)}
    ours, theirs = (logits_of(model, batch).movedim(1, -1) for model in (student, teacher))
    assert ours.shape == (2, 8, 16, 3)
    expected = 4 * mean_divergence(theirs, ours, 2.0, np.ones((2, 8, 16), dtype=bool))
    distill(student, teacher)
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_bfloat16_teacher_of_float_inputs() -> None:
    """In Accelerate's autocast, which is only around the student's forward."""
    student, teacher = segformer(0), segformer(1).bfloat16()
    batch = {"pixel_values": torch.randn(2, 3, 16, 32)}
    with torch.no_grad():
        theirs = teacher.eval()(pixel_values=batch["pixel_values"].bfloat16()).logits
        student.forward = torch.autocast("cpu", torch.bfloat16)(student.forward)
        ours = student(**batch).logits
    expected = 4 * mean_divergence(*(x.movedim(1, -1).float() for x in (theirs, ours)), 2.0, np.ones((2, 8, 16), bool))
    distill(student, teacher)
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_cache_of_the_student_is_not_the_teachers() -> None:
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 1, "n_head": 4}
    student, teacher = (GPT2LMHeadModel(GPT2Config(**sizes)).train() for _ in range(2))
    distill(student, teacher)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is distilled, and the teacher cannot use past_key_values"):
        student(input_ids=torch.ones(1, 3, dtype=torch.long), past_key_values=DynamicCache())


def test_tokens_of_several_choices() -> None:
    """Logits of four dimensions, as in segmentation, but over the vocabulary."""
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 1, "n_head": 4, "initializer_range": 0.2}
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
    student, teacher = (GPT2DoubleHeadsModel(GPT2Config(**sizes, **rates)).train() for _ in range(2))
    batch = {"input_ids": torch.randint(0, 100, (2, 3, 6)), "mc_token_ids": torch.full((2, 3), 5)}
    parts = [
        mean_divergence(logits_of(teacher, batch, field), logits_of(student, batch, field), 2.0, np.ones(shape, bool))
        for field, shape in (("logits", (2, 3, 6)), ("mc_logits", (2,)))
    ]
    distill(student, teacher)
    assert student(**batch).loss.item() == pytest.approx(2 * sum(parts), rel=1e-5)


def test_gradients_are_those_of_the_loss_written_out(padded_batch: dict) -> None:
    student, teacher = (make(BertForQuestionAnswering, seed).double() for seed in range(2))
    by_hand = copy.deepcopy(student)
    mask = padded_batch["attention_mask"].bool()
    output, targets = by_hand(**padded_batch, **QUESTION), teacher.eval()(**padded_batch)
    loss = 0.4 * output.loss
    for field in ("start_logits", "end_logits"):
        for row, target, keep in zip(output[field], targets[field].detach(), mask, strict=True):
            q, p = (torch.exp(x[keep] / 3) / torch.exp(x[keep] / 3).sum() for x in (row, target))
            loss = loss + 0.6 * 9 * (p * (p / q).log()).sum() / 4
    loss.backward()
    distill(student, teacher, weight=0.6, temperature=3.0)
    student(**padded_batch, **QUESTION).loss.backward()
    for (name, got), expected in zip(student.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_the_teacher_is_left_alone_and_no_part_of_the_model(small_bert: MakeBert, padded_batch: dict) -> None:
    student, teacher = small_bert().train(), small_bert(seed=1).train()
    teacher.bert.embeddings.eval()
    modes = [module.training for module in teacher.modules()]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    names = [list(student.state_dict()), [name for name, _ in student.named_modules()]]
    distill(student, teacher)
    met = []
    teacher.register_forward_hook(lambda module, *_: met.append((module.bert.training, torch.is_grad_enabled())))
    student(**padded_batch).loss.backward()
    assert met == [(False, False)]
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert [list(student.state_dict()), [name for name, _ in student.named_modules()]] == names


def test_evaluation_is_untouched(small_bert: MakeBert, padded_batch: dict) -> None:
    student, teacher = small_bert(), small_bert(seed=1)
    expected = student(**padded_batch, **QUESTION).loss
    handle = distill(student, teacher)
    met: list[int] = []
    teacher.register_forward_hook(lambda *_: met.append(1))
    assert torch.equal(student(**padded_batch, **QUESTION).loss, expected)
    assert student(**padded_batch).loss is None
    with torch.no_grad():
        assert student.train()(**padded_batch).loss is None
    assert met == []
    assert student(**padded_batch).loss is not None
    handle.remove()
    assert student(**padded_batch).loss is None
    assert met == [1]


def test_a_student_that_is_its_teacher_has_no_loss(padded_batch: dict) -> None:
    student = make(BertForQuestionAnswering)
    distill(student, copy.deepcopy(student))
    padded_batch["attention_mask"][0] = 0  # nothing but padding is no NaN either
    loss = student(**padded_batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in student.parameters())


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_is_not_distilled(small_bert: MakeBert, padded_batch: dict, copied: str) -> None:
    student = apply_octav(small_bert(), OctavConfig())
    distill(student, small_bert(seed=1))
    if copied == "deepcopy":
        again = copy.deepcopy(student)
    else:
        torch.save(student, file := io.BytesIO())
        file.seek(0)
        again = torch.load(file, weights_only=False)
        torch.save(small_bert(), alone := io.BytesIO())
        assert len(file.getvalue()) < 1.5 * len(alone.getvalue())
    assert again.train()(**padded_batch).loss is None
    assert student.train()(**padded_batch).loss is not None
    distill(again, small_bert(seed=1))
    assert again(**padded_batch).loss is not None


def test_saved_and_loaded(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    student = apply_octav(small_bert(), OctavConfig())
    student.save_pretrained(tmp_path / "plain")
    distill(student, small_bert(seed=1))
    student.save_pretrained(tmp_path / "distilled")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "distilled" / name).read_bytes()
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path / "distilled").train()
    assert loaded(**padded_batch).loss is None


def test_checkpointing_gives_the_same_gradients(small_bert: MakeBert, padded_batch: dict) -> None:
    found = []
    for checkpointing in (False, True):
        student = apply_octav(small_bert(), OctavConfig()).train()
        if checkpointing:
            student.activation_checkpointing_enable({"use_reentrant": False})
        distill(student, small_bert(seed=1))
        torch.manual_seed(7)
        student(**padded_batch).loss.backward()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert len(found[0]) > 10
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_under_autocast_the_loss_is_in_float32(padded_batch: dict) -> None:
    student, teacher = (make(BertForQuestionAnswering, seed) for seed in range(2))
    distill(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = student(**padded_batch)
        targets = teacher.eval()(**padded_batch)
    assert output.start_logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    keep = padded_batch["attention_mask"].bool().numpy()
    parts = [mean_divergence(targets[f], output[f], 2.0, keep) for f in ("start_logits", "end_logits")]
    assert output.loss.item() == pytest.approx(2 * sum(parts), rel=1e-4)


@pytest.mark.slow
def test_a_compiled_student(padded_batch: dict) -> None:
    student, teacher = (make(BertForQuestionAnswering, seed) for seed in range(2))
    distill(student, teacher)
    teacher.train()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    losses = [run(**padded_batch).loss for run in (student, compiled)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(student.parameters()), allow_unused=True) for loss in losses]
    torch.testing.assert_close(*gradients)
    assert all(module.training for module in teacher.modules())


@pytest.mark.parametrize("distilled", ["the base", "the PEFT model"])
def test_adapters(small_bert: MakeBert, padded_batch: dict, distilled: str) -> None:
    peft = pytest.importorskip("peft", reason="pip install --no-deps peft")
    base = apply_octav(small_bert(**NO_DROPOUT), OctavConfig())
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query"], task_type="QUESTION_ANS")).train()
    handle = distill(base, teacher := small_bert(seed=1))
    expected = base(**padded_batch).loss
    if distilled == "the PEFT model":
        handle.remove()
        distill(model, teacher)
    loss = model(**padded_batch, **QUESTION).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
    with pytest.raises(ValueError, match="is already distilled"):
        distill(model, small_bert(seed=1))


def train(model: nn.Module, folder: Path, data: Any, **arguments: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    trainer = Trainer(model=model, args=TrainingArguments(str(folder), **(settings | arguments)), train_dataset=data)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_trainer_is_the_loop_written_out(tmp_path: Path, micro_batches: int) -> None:
    student, teacher = (make(BertForQuestionAnswering, seed) for seed in range(2))
    apply_octav(student, OctavConfig(activation_bits=None))
    by_hand, data = copy.deepcopy(student), Spans(8)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for _ in range(6):
        for first in range(0, 8, 4):
            rows = [data[index] for index in range(first, first + 4)]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            output, targets = by_hand(**batch), logits_free(teacher, batch)
            mask, loss = batch["attention_mask"].bool(), 0.5 * output.loss
            for field in ("start_logits", "end_logits"):
                for row, target, keep in zip(output[field], targets[field], mask, strict=True):
                    q, p = (torch.softmax(x[keep] / 2, 0) for x in (row, target))
                    loss = loss + 0.5 * 4 * (p * (p / q).log()).sum() / 8
            (loss / micro_batches).backward()
            if micro_batches == 1 or first == 4:
                optimizer.step()
                optimizer.zero_grad()
    distill(student, teacher, weight=0.5)
    trainer = train(student, tmp_path, data, num_train_epochs=6, gradient_accumulation_steps=micro_batches)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 // micro_batches
    assert losses[-1] < 0.9 * losses[0]
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def logits_free(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """Outputs without labels and gradients."""
    with torch.no_grad():
        return model.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask")})


class Sentences(torch.utils.data.Dataset):
    """Batches of one length with different numbers of labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 100, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < index, -100)}


@pytest.mark.slow
def test_micro_batches_count_by_their_labels(tmp_path: Path) -> None:
    """A causal language model divides its loss by `num_items_in_batch`, so Trainer does not divide."""
    student, teacher = (make(LlamaForCausalLM, seed) for seed in range(2))
    data, by_hand = Sentences(), copy.deepcopy(student)
    batches = [torch.stack([data[i]["input_ids"] for i in range(first, first + 2)]) for first in range(0, 8, 2)]
    counts = [
        sum(int((data[i]["labels"][1:] != -100).sum()) for i in range(first, first + 2)) for first in (0, 2, 4, 6)
    ]
    loss: Tensor | float = 0.0
    for ids, count in zip(batches, counts, strict=True):
        with torch.no_grad():
            p = torch.softmax(teacher(ids).logits / 2, -1)
        q = torch.softmax(by_hand(ids).logits / 2, -1)
        loss = loss + 4 * (p * (p / q).log()).sum() / (2 * 12) * count / sum(counts)
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.05).step()
    distill(student, teacher)
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = train(student, tmp_path, data, **arguments)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is distilled, but its loss is not used: with label_smooth"):
        train(student, tmp_path, data, label_smoothing_factor=0.1, max_steps=1)


@pytest.mark.slow
def test_trainer_in_bfloat16_with_calibrated_clips(small_bert: MakeBert, tmp_path: Path) -> None:
    student, teacher = apply_octav(small_bert(), OctavConfig()), small_bert(seed=1)
    distill(student, teacher)
    calibrate_octav(student, [Spans()[0]["input_ids"][None]], progress_bar=False)
    trainer = train(student, tmp_path, Spans(), max_steps=2, bf16=True)
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be a number above 0 and at most 1, got 0"),
        ({"weight": 1.5}, "weight must be .* got 1.5"),
        ({"weight": True}, "weight must be .* got True"),
        ({"weight": float("nan")}, "weight must be .* got nan"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be .* got inf"),
        ({"temperature": "2"}, "temperature must be .* got '2'"),
    ],
)
def test_settings_that_are_refused(small_bert: MakeBert, settings: dict[str, Any], message: str) -> None:
    student = small_bert()
    with pytest.raises(ValueError, match=message):
        distill(student, small_bert(seed=1), **settings)
    assert not student._forward_hooks


def test_models_that_are_refused(small_bert: MakeBert) -> None:
    student, teacher = small_bert(), small_bert(seed=1)
    with pytest.raises(TypeError, match="takes a teacher that is an nn.Module, got str"):
        distill(student, "bert-base-uncased")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a model that is an nn.Module, got dict"):
        distill({}, teacher)  # type: ignore[arg-type]
    for shared in (student, student.bert):
        with pytest.raises(ValueError, match=r"shares parameters with BertForQuestionAnswering.*copy\.deepcopy"):
            distill(student, shared)
    assert not student._forward_hooks
    handle = distill(student, teacher)
    with pytest.raises(ValueError, match=r"BertForQuestionAnswering is already distilled; call remove\(\)"):
        distill(student, teacher)
    handle.remove()
    distill(student, teacher)


CLASSIFIER, TOKENS = BertForSequenceClassification, BertForTokenClassification


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "error"),
    [
        (make(TOKENS), make(TOKENS), {"weight": 0.5}, "ForTokenClassification is distilled with weight=0.5.*no loss"),
        (make(TOKENS, return_dict=False), make(TOKENS), {}, "Classification must return a ModelOutput, not tuple"),
        (make(TOKENS), make(TOKENS, return_dict=False), {}, "the teacher BertForToken.* ModelOutput, not tuple"),
        (
            make(TOKENS),
            make(TOKENS, num_labels=3),
            {},
            r"its logits have shape \(2, 16, 4\), but those of the teacher BertForTokenClass.* are \(2, 16, 3\)",
        ),
        (make(BertForQuestionAnswering), make(TOKENS), {}, r"start_logits have shape \(2, 16\), .* are missing"),
        (make(CLASSIFIER, num_labels=1), make(CLASSIFIER), {}, r"logits of Bert.* shape \(2, 1\), have fewer than two"),
        (
            make(CLASSIFIER, problem_type="multi_label_classification"),
            make(CLASSIFIER),
            {},
            "compares probabilities of classes, but BertForSequenceClassification is for multi_label_classification",
        ),
        (
            ElectraForPreTraining(ElectraConfig(**SIZES)).train(),
            ElectraForPreTraining(ElectraConfig(**SIZES)),
            {},
            r"logits of Electra.*, of shape \(2, 16\), have one value for each token or pixel",
        ),
        (
            BertModel(BertConfig(**SIZES)).train(),
            make(TOKENS),
            {},
            "output of BertModel has only: last_hidden_state, pooler_output",
        ),
    ],
    ids=[
        "no labels",
        "tuple",
        "teacher's tuple",
        "labels",
        "fields",
        "one class",
        "sigmoids",
        "discriminator",
        "no logits",
    ],
)
def test_outputs_that_are_refused(
    padded_batch: dict, student: nn.Module, teacher: nn.Module, settings: dict[str, Any], error: str
) -> None:
    distill(student, teacher, **settings)
    with pytest.raises((TypeError, ValueError), match=error):
        student(**padded_batch)


def test_logits_of_pixels_that_are_no_classes_are_refused() -> None:
    """One class, which has no alternative, and masks, even if they are as many as the labels."""
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    distill(student := segformer(0, num_labels=1), segformer(1, num_labels=1))
    with pytest.raises(ValueError, match=r"logits of Segf.*, of shape \(2, 1, 8, 8\), have fewer than two classes"):
        student(**batch)
    student, teacher = maskformer(), maskformer()
    distill(student, teacher)
    with pytest.raises(ValueError, match=r"masks_queries_logits of M.* \(2, 5, 16, 16\), have no known dimension of"):
        student(pixel_values=torch.randn(2, 3, 64, 64))
    output = teacher(pixel_values=torch.randn(2, 3, 64, 64))
    assert list(class_logits(teacher, output, {})) == ["class_queries_logits"], "what analysis compares"


def test_replicas_and_unnamed_inputs_are_refused(padded_batch: dict) -> None:
    student = make(TOKENS)
    distill(student, make(TOKENS, seed=1))
    with pytest.raises(
        RuntimeError, match="nn.DataParallel would share one teacher between several devices; start one process"
    ):
        replica_of(student)(**padded_batch)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = make(TOKENS)

        def forward(self, *inputs: Tensor) -> Any:
            return self.inside(*inputs)

    distill(wrapped := Wrapped(), make(TOKENS, seed=1))
    with pytest.raises(TypeError, match="Wrapped.forward names no such inputs: pass them by keyword"):
        wrapped(padded_batch["input_ids"])
