"""Distilled hidden states and attention maps: losses against float64, the steps in which they are learned, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from octav_hf import OctavConfig, apply_octav, distill
from octav_hf.training.distillation import distillations
from octav_hf.training.features import attention_loss, hidden_state_loss
from tests.question_answering import Spans

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FEATURES = {"output_hidden_states": True, "output_attentions": True}


def gpt2(seed: int) -> Any:
    torch.manual_seed(seed)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, **no_dropout)
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager").train()


def t5(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return T5ForConditionalGeneration._from_config(config, attn_implementation="eager").train()


@pytest.fixture
def bert(small_bert: MakeBert) -> Callable[[int], Any]:
    return lambda seed, **changes: small_bert(
        seed, **({"attn_implementation": "eager", "initializer_range": 0.2} | NO_DROPOUT | changes)
    ).train()


def outputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Any:
    """In float64, without gradients."""
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(**batch, **FEATURES)


def hidden_by_hand(theirs: Tensor, ours: Tensor, mask: Tensor) -> Tensor:
    return (ours - theirs)[mask].square().sum() / theirs[mask].square().sum()


def maps_by_hand(theirs: Tensor, ours: Tensor, mask: Tensor) -> Tensor:
    """Query by query, each over the keys that it attends to."""
    values = []
    for sequence, queries in enumerate(mask):
        for p, q in zip(*(maps[sequence][:, queries].flatten(0, 1) for maps in (theirs, ours)), strict=True):
            seen = p > 0
            values.append((p[seen] * (p[seen] / q[seen]).log()).sum())
    return torch.stack(values).mean()


def by_hand(
    ours: Any, theirs: Any, masks: dict[str, Tensor], layers: list[int], weights: tuple[float, float]
) -> Tensor:
    """The weighted sum of the two means over the layers of all the fields that ``masks`` has."""
    losses: dict[str, list[Tensor]] = {"hidden_states": [], "attentions": []}
    for field, mask in masks.items():
        kind = "attentions" if field.endswith("attentions") else "hidden_states"
        for layer in layers:
            place = layer if kind == "attentions" else layer + 1
            one = maps_by_hand if kind == "attentions" else hidden_by_hand
            losses[kind].append(one(theirs[field][place], ours[field][place], mask))
    return sum(w * torch.stack(each).mean() for w, each in zip(weights, losses.values(), strict=True) if each)  # type: ignore[return-value]


def added(student: Any, teacher: Any, batch: dict[str, Tensor], **settings: Any) -> float:
    """The part of the loss that is due to features."""
    losses = []
    for arguments in ({}, settings):
        handle = distill(student, teacher, **arguments)
        losses.append(student(**batch).loss.item())
        handle.remove()
    return losses[1] - losses[0]


@pytest.mark.parametrize(("layers", "chosen"), [(None, [0, 1, 2]), ([-1, 0], [0, 2])])
def test_an_encoder(bert: Any, padded_batch: dict, layers: list[int] | None, chosen: list[int]) -> None:
    student, teacher = (bert(seed, num_hidden_layers=3) for seed in range(2))
    mask = padded_batch["attention_mask"].bool()
    masks = {"hidden_states": mask, "attentions": mask}
    ours, theirs = (outputs_of(model, padded_batch) for model in (student, teacher))
    expected = by_hand(ours, theirs, masks, chosen, (3.0, 0.5))
    found = added(student, teacher, padded_batch, hidden_states=3.0, attentions=0.5, layers=layers)
    assert found == pytest.approx(expected.item(), rel=1e-4)
    unmasked = {"input_ids": padded_batch["input_ids"]}
    ours, theirs = (outputs_of(model, unmasked) for model in (student, teacher))
    expected = by_hand(ours, theirs, {name: torch.ones_like(mask) for name in masks}, chosen, (3.0, 0.5))
    found = added(student, teacher, unmasked, hidden_states=3.0, attentions=0.5, layers=layers)
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_decoder(padded_batch: dict) -> None:
    student, teacher = gpt2(0), gpt2(1)
    mask = padded_batch["attention_mask"].bool()
    ours, theirs = (outputs_of(model, padded_batch) for model in (student, teacher))
    expected = by_hand(ours, theirs, {"hidden_states": mask, "attentions": mask}, [0, 1, 2], (1.0, 2.0))
    assert added(student, teacher, padded_batch, hidden_states=1.0, attentions=2.0) == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_an_encoder_and_its_decoder(padded_batch: dict) -> None:
    student, teacher = t5(0), t5(1)
    labels = padded_batch["input_ids"].clone()
    labels[0, 4:] = -100
    batch = padded_batch | {"labels": labels}
    fields = ("hidden_states", "attentions")
    masks = {f"encoder_{field}": padded_batch["attention_mask"].bool() for field in fields}
    masks |= {f"decoder_{field}": labels != -100 for field in fields} | {"cross_attentions": labels != -100}
    ours, theirs = (outputs_of(model, batch) for model in (student, teacher))
    expected = by_hand(ours, theirs, masks, [0, 1], (1.0, 2.0))
    found = added(student, teacher, batch, hidden_states=1.0, attentions=2.0)
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_choices_count_without_their_padding(padded_batch: dict) -> None:
    """BERT runs ``[batch * choices, tokens]``, and gets a mask ``[batch, choices, tokens]``."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = BertConfig(vocab_size=100, initializer_range=0.2, **sizes, **NO_DROPOUT)
        models.append(BertForMultipleChoice._from_config(config, attn_implementation="eager").train())
    student, teacher = models
    batch = {name: values.view(1, 2, -1) for name, values in padded_batch.items()}
    mask = padded_batch["attention_mask"].bool()
    ours, theirs = (outputs_of(model, batch) for model in (student, teacher))
    expected = by_hand(ours, theirs, {"hidden_states": mask, "attentions": mask}, [0, 1], (3.0, 0.5))
    found = added(student, teacher, batch, hidden_states=3.0, attentions=0.5)
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_tensor_is_no_hidden_states_of_layers() -> None:
    """LLaVA returns its projected images as ``image_hidden_states``."""
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    text = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=49, image_seq_length=4)
        models.append(LlavaForConditionalGeneration(config).train())
    student, teacher = models
    ids = torch.randint(0, 40, (2, 8))
    ids[:, 1:5] = 49
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    expected = by_hand(ours, theirs, {"hidden_states": torch.ones_like(ids).bool()}, [0, 1], (2.0, 0.0))
    assert added(student, teacher, batch, hidden_states=2.0) == pytest.approx(expected.item(), rel=1e-4)
    distill(student, teacher, hidden_states=1.0)
    assert student(**batch).image_hidden_states is not None


def test_a_small_fraction_of_few_steps_is_one_step(bert: Any) -> None:
    student = bert(0)
    distill(student, bert(1), hidden_states=1.0, feature_steps=0.1)
    (distillation,) = distillations(student)
    learned = []
    for step in range(4):
        distillation.at_step(step, 4)
        learned.append(distillation.learns_features)
    assert learned == [True, False, False, False]


def test_gradients_are_those_of_the_loss_written_out(bert: Any, padded_batch: dict) -> None:
    student, teacher = (bert(seed).double() for seed in range(2))
    hand = copy.deepcopy(student)
    mask = padded_batch["attention_mask"].bool()
    output, theirs = hand(**padded_batch, **FEATURES), outputs_of(teacher, padded_batch)
    loss = by_hand(output, theirs, {"hidden_states": mask, "attentions": mask}, [0, 1], (2.0, 3.0))
    for field in ("start_logits", "end_logits"):
        for row, target, keep in zip(output[field], theirs[field], mask, strict=True):
            q, p = (x[keep].div(2).softmax(-1) for x in (row, target))
            loss = loss + 4 * (p * (p / q).log()).sum() / 4
    loss.backward()
    distill(student, teacher, hidden_states=2.0, attentions=3.0)
    student(**padded_batch).loss.backward()
    for (name, got), expected in zip(student.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_maps_after_dropout_are_compared_over_the_keys_that_it_left() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2)]
    teacher, student = (x.softmax(-1) for x in scores)
    kept = torch.rand(student.shape, generator=generator) > 0.3
    kept[..., 0] = True
    found = attention_loss(teacher, student * kept / 0.7, None)
    # The softmax over the kept keys alone.
    log_p, log_q = (x.masked_fill(~kept, -torch.inf).log_softmax(-1).masked_fill(~kept, 0) for x in scores)
    expected = (log_p.exp() * (log_p - log_q) * kept).sum(-1).mean()
    torch.testing.assert_close(found, expected)
    assert attention_loss(teacher, student * 0, None) == 0, "nothing was left"


def test_sharp_maps_have_finite_gradients() -> None:
    teacher = torch.tensor([[[[0.5, 0.5, 0.0]]]])
    scores = torch.tensor([[[[0.0, -86.0, -104.0]]]], requires_grad=True)  # subnormal, and zero in float32
    attention_loss(teacher, scores.softmax(-1), None).mul(2.0**16).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_padding_may_hold_anything() -> None:
    teacher, student = torch.ones(1, 2, 3), torch.full((1, 2, 3), 3.0)
    student[0, 1] = torch.inf
    mask = torch.tensor([[True, False]])
    assert hidden_state_loss(teacher, student, mask) == 4
    assert hidden_state_loss(teacher, student.bfloat16(), mask).dtype == torch.float32
    assert hidden_state_loss(teacher, student, ~mask | mask).isinf()
    assert hidden_state_loss(teacher, student, mask & ~mask) == 0
    assert hidden_state_loss(teacher * 0, teacher * 0, None) == 0


@pytest.mark.parametrize("asked", [None, "argument", "config"])
def test_the_output_has_the_features_only_if_asked(bert: Any, padded_batch: dict, asked: str | None) -> None:
    student, teacher = bert(0), bert(1)
    distill(student, teacher, hidden_states=1.0, attentions=1.0)
    arguments = {"output_attentions": True} if asked == "argument" else {}
    student.config.output_attentions = asked == "config"
    expected = ["loss", "start_logits", "end_logits"] + ["attentions"] * (asked is not None)
    assert list(student(**padded_batch, **arguments)) == expected
    assert list(student(padded_batch["input_ids"], padded_batch["attention_mask"], **arguments)) == expected
    student.eval()
    assert list(student(**padded_batch, **arguments)) == expected[1:]


def test_without_weights_nothing_is_asked_for(bert: Any, padded_batch: dict) -> None:
    student, teacher = bert(0), bert(1)
    asked = []
    teacher.register_forward_pre_hook(lambda *args: asked.append(args[2]), with_kwargs=True)
    handle = distill(student, teacher)
    assert not student._forward_pre_hooks
    expected = student(**padded_batch).loss
    handle.remove()
    handle = distill(student, teacher, hidden_states=1.0)
    assert not torch.equal(student(**padded_batch).loss, expected)
    assert [inputs.get("output_hidden_states") for inputs in asked] == [None, True]
    handle.remove()
    assert not student._forward_pre_hooks
    assert student(**padded_batch).loss is None


def test_a_quantized_student_has_features_of_quantized_layers(bert: Any, padded_batch: dict) -> None:
    student, teacher = bert(0), bert(1)
    apply_octav(student, OctavConfig(weight_bits=4, activation_bits=4))
    with torch.no_grad():
        ours, theirs = copy.deepcopy(student).eval()(**padded_batch, **FEATURES), teacher(**padded_batch, **FEATURES)
    mask = padded_batch["attention_mask"].bool()
    expected = by_hand(ours, theirs, {"hidden_states": mask, "attentions": mask}, [0, 1], (1.0, 1.0))
    found = added(student, teacher, padded_batch, hidden_states=1.0, attentions=1.0)
    assert found == pytest.approx(expected.item(), rel=1e-4)
    distill(student, teacher, attentions=1.0)
    student.zero_grad()
    student(**padded_batch).loss.backward()
    assert student.bert.encoder.layer[0].attention.self.query.weight.grad.any()


@pytest.mark.slow
def test_a_compiled_student(bert: Any, padded_batch: dict) -> None:
    """In a step with features, and in one without."""
    student, teacher = bert(0), bert(1)
    distill(student, teacher, hidden_states=1.0, attentions=1.0, feature_steps=0.5)
    (distillation,) = distillations(student)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    found = []
    for step in range(2):
        distillation.at_step(step, 2)
        losses = [run(**padded_batch).loss for run in (student, compiled)]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, list(student.parameters()), allow_unused=True) for loss in losses]
        torch.testing.assert_close(*gradients)
        found.append(losses[1].item())
        assert list(compiled(**padded_batch)) == ["loss", "start_logits", "end_logits"]
    assert found[0] > found[1] + 0.1


def test_a_copy_is_not_distilled(bert: Any, padded_batch: dict) -> None:
    student = bert(0)
    distill(student, bert(1), hidden_states=1.0)
    student(**padded_batch)
    again = copy.deepcopy(student)
    assert again(**padded_batch).loss is None
    assert student(**padded_batch).loss is not None
    distill(again, bert(1), hidden_states=1.0)
    assert again(**padded_batch).loss is not None


def test_gradient_checkpointing(bert: Any, padded_batch: dict) -> None:
    found = []
    for reentrant in (None, False, True):
        student = apply_octav(bert(0), OctavConfig())
        if reentrant is not None:
            student.activation_checkpointing_enable({"use_reentrant": reentrant})
        distill(student, bert(1), hidden_states=1.0, attentions=1.0)
        if reentrant:
            with pytest.raises(ValueError, match=r"attentions have no gradient; .* write .*use_reentrant.: False"):
                student(**padded_batch)
            continue
        student(**padded_batch).loss.backward()
        found.append([parameter.grad for parameter in student.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True) if pair[0] is not None)


def test_adapters(bert: Any, padded_batch: dict) -> None:
    peft = pytest.importorskip("peft", reason="pip install --no-deps peft")
    base = apply_octav(bert(0), OctavConfig())
    expected = added(base, teacher := bert(1), padded_batch, hidden_states=1.0, attentions=1.0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query"], task_type="QUESTION_ANS")).train()
    assert added(model, teacher, padded_batch, hidden_states=1.0, attentions=1.0) == pytest.approx(expected, rel=1e-4)
    model(**padded_batch)
    distill(model, teacher, hidden_states=1.0)
    model(**padded_batch).loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


class Stage(TrainerCallback):
    """Whether the teacher was asked for features, by step, and after how many steps to stop."""

    def __init__(self, teacher: nn.Module, stop: int | None = None):
        self.asked: list[tuple[int, bool]] = []
        self.step, self.stop = 0, stop
        self.handle = teacher.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.asked.append((self.step, "output_hidden_states" in kwargs))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.stop


def train(student: Any, teacher: Any, folder: Path, stop: int | None = None, resume: bool = False) -> Any:
    """Five steps of two micro-batches, evaluated after each; which of them learned features."""
    arguments = TrainingArguments(
        str(folder), max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=0.01, seed=3,
    )  # fmt: skip
    stage = Stage(teacher, stop)
    trainer = Trainer(student, arguments, train_dataset=Spans(12), eval_dataset=Spans(4), callbacks=[stage])
    trainer.train(resume_from_checkpoint=resume)
    stage.handle.remove()
    return stage.asked


@pytest.mark.slow
def test_features_are_learned_in_the_first_steps(bert: Any, padded_batch: dict, tmp_path: Path) -> None:
    """Counted in optimizer steps, with evaluation in between, and equal in a resumed run."""
    expected = [(step, step < 3) for step in range(5) for _ in range(2)]
    students, teacher = [bert(0), bert(0)], bert(1)
    for student in students:
        distill(student, teacher, hidden_states=1.0, feature_steps=0.6)
    assert train(students[0], teacher, tmp_path / "whole") == expected
    assert train(students[1], teacher, tmp_path / "cut", stop=2) == expected[:4]
    resumed = bert(2)
    distill(resumed, teacher, hidden_states=1.0, feature_steps=0.6)
    assert train(resumed, teacher, tmp_path / "cut", resume=True) == expected[4:]
    for name, weight in students[0].state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
    with pytest.raises(RuntimeError, match=r"feature_steps=0.6, but only Trainer reports the step; in your own loop"):
        students[0].train()(**padded_batch)
    students[0].eval()(**padded_batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_states": -1}, "hidden_states is the weight of a loss and must be a finite number >= 0, got -1"),
        ({"hidden_states": True}, "hidden_states is .* must be .* got True"),
        ({"attentions": float("inf")}, "attentions is .* must be .* got inf"),
        ({"hidden_states": 1, "feature_steps": 0}, "feature_steps must be a fraction above 0 and at most 1, got 0"),
        ({"hidden_states": 1, "feature_steps": 60}, "feature_steps must be a fraction .* got 60"),
        ({"hidden_states": 1, "layers": []}, r"layers must be a list of indices, such as \[0, -1\], or None, got \[\]"),
        ({"hidden_states": 1, "layers": "all"}, "layers must be a list of indices"),
        ({"hidden_states": 1, "layers": [0.5]}, r"layers must be integers, got \[0.5\]"),
        ({"layers": [0]}, "layers has no effect without features; set hidden_states or attentions"),
        ({"feature_steps": 0.5}, "feature_steps has no effect without features"),
    ],
)
def test_settings_that_are_refused(bert: Any, settings: dict[str, Any], message: str) -> None:
    student = bert(0)
    with pytest.raises(ValueError, match=message):
        distill(student, bert(1), **settings)
    assert not student._forward_hooks


@pytest.mark.parametrize(
    ("ours", "theirs", "settings", "message"),
    [
        ({}, {"num_hidden_layers": 3}, {}, "its hidden_states are of 2 layers, those of the teacher .* of 3; use a"),
        ({}, {"hidden_size": 64}, {}, r"its hidden_states have shape \(2, 16, 32\), those of the .* \(2, 16, 64\)"),
        ({}, {"num_attention_heads": 2}, {"attentions": 1}, r"its attentions have shape \(2, 4, 16, 16\), those of"),
        (
            {},
            {},
            {"layers": [2]},
            "its hidden_states are of 2 layers, but layers contains 2; indices go from 0 to 1",
        ),
        ({}, {}, {"layers": [-3]}, "but layers contains -3"),
        ({"attn_implementation": "sdpa"}, {}, {"attentions": 1}, 'no attentions; load it with attn_implementation="ea'),
        ({}, {"attn_implementation": "sdpa"}, {"attentions": 1}, 'no attentions; load it with attn_implementation="ea'),
    ],
    ids=["depth", "width", "heads", "layer", "negative", "student's sdpa", "teacher's sdpa"],
)
def test_teachers_that_do_not_fit(
    bert: Any, padded_batch: dict, ours: dict, theirs: dict, settings: dict, message: str
) -> None:
    student, teacher = bert(0, **ours), bert(1, **theirs)
    distill(student, teacher, **({"hidden_states": 1} | settings))
    with pytest.raises(ValueError, match=message):
        student(**padded_batch)


def test_a_frozen_student_is_refused_and_frozen_lower_layers_are_not(bert: Any, padded_batch: dict) -> None:
    student = bert(0)
    distill(student, bert(1), hidden_states=1.0)
    student.bert.embeddings.requires_grad_(False)
    student.bert.encoder.layer[0].requires_grad_(False)
    student(**padded_batch).loss.backward()
    student.bert.requires_grad_(False)
    with pytest.raises(
        ValueError,
        match="hidden_states have no gradient; .* if no parameter before them is trained, leave out hidden_states",
    ):
        student(**padded_batch)


def test_a_forward_that_takes_no_such_argument(bert: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = bert(0)

        def forward(self, input_ids: Tensor) -> Any:
            return self.inside(input_ids)

    with pytest.raises(ValueError, match="of the model Wrapped has no argument output_hidden_states; use a Tr"):
        distill(Wrapped(), bert(1), hidden_states=1.0)
    with pytest.raises(ValueError, match="of the teacher Wrapped has no argument output_attentions"):
        distill(bert(1), Wrapped(), attentions=1.0)


@pytest.mark.slow
def test_students_come_closer_to_the_features_that_they_learn(bert: Any, padded_batch: dict) -> None:
    """The loss of each kind of feature."""
    teacher = bert(1)
    theirs = outputs_of(teacher, padded_batch)
    mask = padded_batch["attention_mask"].bool()
    for kind, one in (("hidden_states", hidden_by_hand), ("attentions", maps_by_hand)):
        student = bert(0)
        distill(student, teacher, **{kind: 10.0})
        optimizer = torch.optim.Adam(student.parameters(), lr=0.003)
        errors = []
        for _ in range(30):
            errors.append(one(theirs[kind][-1], outputs_of(student, padded_batch)[kind][-1], mask).item())
            student(**padded_batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert errors[-1] < 0.5 * errors[0], kind
