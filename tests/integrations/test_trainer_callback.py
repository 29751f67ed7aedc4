"""``OctavCallback``: its figures, where they arrive, what it costs, and what it warns of."""

from __future__ import annotations

import gc
import logging
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import BertForQuestionAnswering, Trainer, TrainerCallback, TrainingArguments

from octav_hf import OctavCallback, OctavConfig, apply_octav, calibrate_octav, pack_octav
from octav_hf.nn import FakeQuantize
from tests import twins
from tests.host_reads import HostReads

MakeBert = Callable[..., BertForQuestionAnswering]
LOGGER = "octav_hf.integrations.trainer_callback"
LENGTH = 16
SUMMARY = {
    *(f"octav/{kind}_sqnr_db_{each}" for kind in ("weight", "activation") for each in ("mean", "min")),
    *(f"octav/{kind}_clipped_share_{each}" for kind in ("weight", "activation") for each in ("mean", "max")),
    *(f"octav/{kind}_clip_ratio_{each}" for kind in ("weight", "activation") for each in ("mean", "min", "max")),
    *(f"octav/weight_changed_codes_{each}" for each in ("mean", "min")),
}
WEIGHT = "bert.encoder.layer.0.intermediate.dense"


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 100, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    answers = torch.arange(count) % LENGTH
    return [
        {"input_ids": ids[row], "start_positions": answers[row], "end_positions": answers[row]} for row in range(count)
    ]


def trainer_of(
    model: nn.Module,
    folder: Path,
    *callbacks: TrainerCallback,
    trainer_class: type[Trainer] = Trainer,
    data: Any = None,
    **arguments: Any,
) -> Trainer:
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3}
    training = TrainingArguments(output_dir=str(folder), **(settings | quiet | arguments))
    return trainer_class(
        model=model,
        args=training,
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(4),
        callbacks=list(callbacks),
    )


def octav_logs(trainer: Trainer) -> dict[int, dict[str, Any]]:
    """Step -> what the callback added to the log."""
    found = {}
    for log in trainer.state.log_history:
        added = {name: value for name, value in log.items() if name.startswith("octav/")}
        if added:
            assert log["step"] not in found
            assert "loss" in log
            found[log["step"]] = added
    return found


@pytest.fixture
def model(small_bert: MakeBert) -> BertForQuestionAnswering:
    return apply_octav(small_bert(), OctavConfig())


class Capture(TrainerCallback):
    """Keeps what the quantizers got and gave in each forward pass, ``steps[step]``, without the callback's help."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        for name, module in model.named_modules():
            if isinstance(module, FakeQuantize):
                module.register_forward_hook(self._hook(name))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = self.steps.setdefault(state.global_step + 1, {})

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.now.setdefault(name, (twins.as_float64(args[0]), twins.as_float64(output)))

        return keep


def sqnr_db(x: np.ndarray, quantized: np.ndarray) -> float:
    return 10 * math.log10((x**2).sum() / ((x - quantized) ** 2).sum())


def row_clips(weight: np.ndarray) -> np.ndarray:
    return np.array([[twins.octav_root_twin(row, 4)] for row in weight])


def test_figures_are_those_of_the_step_that_is_logged(model: BertForQuestionAnswering, tmp_path: Path) -> None:
    capture = Capture(model)
    trainer = trainer_of(model, tmp_path, OctavCallback(per_layer=True), capture)
    trainer.train()
    logs = octav_logs(trainer)
    assert list(logs) == [2, 4]
    codes = {}
    for step in (1, 2, 4):
        weight, quantized = capture.steps[step][f"{WEIGHT}.weight_quantizer"]
        codes[step] = np.rint(quantized / (row_clips(weight) / 8)).astype(int)
    for before, step in ((1, 2), (2, 4)):
        log = logs[step]
        operands = {"activation": [], "weight": []}
        for name, (x, quantized) in capture.steps[step].items():
            module, _, operand = name.removesuffix("_quantizer").rpartition(".")
            expected = sqnr_db(x, quantized)
            assert log[f"octav/{module}/{operand}/sqnr_db"] == pytest.approx(expected, abs=1e-4)
            operands["weight" if operand == "weight" else "activation"].append(expected)
        for kind, values in operands.items():
            assert log[f"octav/{kind}_sqnr_db_mean"] == pytest.approx(np.mean(values), abs=1e-4)
            assert log[f"octav/{kind}_sqnr_db_min"] == pytest.approx(min(values), abs=1e-4)
            module, operand = log[f"octav/{kind}_sqnr_db_min_operand"].split()
            assert log[f"octav/{module}/{operand}/sqnr_db"] == log[f"octav/{kind}_sqnr_db_min"]
        weight, _ = capture.steps[step][f"{WEIGHT}.weight_quantizer"]
        clips = row_clips(weight)
        assert log[f"octav/{WEIGHT}/weight/clip"] == pytest.approx(clips.mean(), rel=1e-5)
        assert log[f"octav/{WEIGHT}/weight/clipped_share"] == pytest.approx((np.abs(weight) > clips).mean(), abs=1e-3)
        changed = (codes[step] != codes[before]).mean()
        assert 0 < changed < 0.5
        assert log[f"octav/{WEIGHT}/weight/changed_codes"] == pytest.approx(changed, abs=1e-12)
        ratio = log[f"octav/{WEIGHT}/weight/clip"] / row_clips(capture.steps[1][f"{WEIGHT}.weight_quantizer"][0]).mean()
        assert log["octav/weight_clip_ratio_min"] <= ratio * (1 + 1e-6)
        assert log["octav/weight_clip_ratio_max"] >= ratio * (1 - 1e-6)
        each = [value for name, value in log.items() if name.endswith("/changed_codes")]
        assert log["octav/weight_changed_codes_mean"] == pytest.approx(np.mean(each))
        assert log["octav/weight_changed_codes_min"] == min(each)
        shares = [value for name, value in log.items() if name.endswith("/weight/clipped_share")]
        assert log["octav/weight_clipped_share_max"] == max(shares)


def test_summary_alone_by_default(model: BertForQuestionAnswering, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, OctavCallback())
    trainer.train()
    for log in octav_logs(trainer).values():
        numbers = {name for name, value in log.items() if isinstance(value, float)}
        assert numbers == SUMMARY
        extremes = {name for name in SUMMARY if not name.endswith("_mean")}
        assert log.keys() - numbers == {f"{name}_operand" for name in extremes}


def test_training_stays_the_same_bit_for_bit(small_bert: MakeBert, tmp_path: Path) -> None:
    weights, losses = [], []
    for callbacks in ([], [OctavCallback()]):
        trainer = trainer_of(apply_octav(small_bert(), OctavConfig()), tmp_path, *callbacks)
        trainer.train()
        weights.append(trainer.model.state_dict())
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# Where they arrive.


class Reporter(TrainerCallback):
    """Stands for any reporting callback that Trainer may have."""

    def __init__(self) -> None:
        self.logs: dict[int, set[str]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.logs.setdefault(state.global_step, set()).update(logs)


@pytest.mark.parametrize("added_later", [False, True])
def test_reporters_get_the_figures_wherever_they_stand(
    model: BertForQuestionAnswering, tmp_path: Path, added_later: bool
) -> None:
    reporter = Reporter()
    trainer = trainer_of(model, tmp_path, reporter, *([] if added_later else [OctavCallback()]))
    if added_later:
        trainer.add_callback(OctavCallback)
    trainer.train()
    assert reporter.logs[2] > SUMMARY
    assert not any(name.endswith("_operand") for name in reporter.logs[2])


def test_tensorboard_shows_them(model: BertForQuestionAnswering, tmp_path: Path, monkeypatch: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(model, tmp_path, OctavCallback(per_layer=True), report_to=["tensorboard"])
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    logs = octav_logs(trainer)
    for name, value in logs[4].items():
        if isinstance(value, float):
            points = {event.step: event.value for event in events.Scalars(f"train/{name}")}
            assert points == {step: pytest.approx(log[name], rel=1e-6) for step, log in logs.items()}
    assert f"train/octav/{WEIGHT}/weight/clip" in events.Tags()["scalars"]


# Which steps.


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"logging_steps": 0.5}, [2, 4]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_steps": 1}, [1, 2, 3, 4]),
        (
            {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 16},
            [2, 4],
        ),
        ({"logging_strategy": "epoch", "per_device_train_batch_size": 12, "max_steps": 5}, [3, 5]),
        (
            {"logging_strategy": "epoch", "gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2},
            [3, 6],  # 8 batches an epoch
        ),
        ({"eval_strategy": "steps", "eval_steps": 1}, [2, 4]),
        ({"eval_strategy": "epoch", "logging_strategy": "epoch", "max_steps": 8}, [8]),
    ],
    ids=["ratio", "first", "each", "epoch", "part-of-an-epoch", "accumulation", "evaluation", "evaluation-by-epoch"],
)
def test_every_training_log_has_them(
    model: BertForQuestionAnswering,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    arguments: dict[str, Any],
    steps: list[int],
) -> None:
    trainer = trainer_of(model, tmp_path, OctavCallback(), **arguments)
    trainer.train()
    history = trainer.state.log_history
    assert [log["step"] for log in history if "loss" in log] == steps
    assert list(octav_logs(trainer)) == steps
    evaluations = [log for log in history if "eval_loss" in log]
    assert len(evaluations) == (0 if "eval_strategy" not in arguments else 4 if "eval_steps" in arguments else 1)
    assert not caplog.records


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from rows(24)


def test_an_epoch_of_unknown_length_is_warned_of(
    model: BertForQuestionAnswering, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(model, tmp_path, OctavCallback(), data=Endless(), logging_strategy="epoch", max_steps=14)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [6, 12, 14]
    assert list(octav_logs(trainer)) == [14]
    (record,) = caplog.records  # once
    assert "The log at step 6 has no values of OctavCallback" in record.getMessage()


class LogsStep2(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= state.global_step == 2


def test_a_log_of_another_callback_does_not_move_the_first_step(small_bert: MakeBert, tmp_path: Path) -> None:
    found = []
    for others in ([], [LogsStep2()]):
        model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig())
        trainer = trainer_of(model, tmp_path, OctavCallback(), *others, logging_steps=4)
        trainer.train()
        found.append(octav_logs(trainer))
    assert list(found[0]) == [4]
    assert found[1] == found[0]


def test_of_several_batches_of_a_step_the_first_is_measured(model: BertForQuestionAnswering, tmp_path: Path) -> None:
    capture = Capture(model)  # it keeps what comes first
    trainer = trainer_of(
        model, tmp_path, OctavCallback(per_layer=True), capture, gradient_accumulation_steps=2, max_steps=2
    )
    trainer.train()
    x, quantized = capture.steps[2][f"{WEIGHT}.input_quantizer"]
    assert octav_logs(trainer)[2][f"octav/{WEIGHT}/input/sqnr_db"] == pytest.approx(sqnr_db(x, quantized), abs=1e-4)


def test_a_resumed_run_compares_with_its_own_first_step(small_bert: MakeBert, tmp_path: Path) -> None:
    def train(**arguments: Any) -> dict[int, dict[str, Any]]:
        model = apply_octav(small_bert(), OctavConfig())
        trainer = trainer_of(model, tmp_path, OctavCallback(per_layer=True), save_strategy="steps", save_steps=2)
        trainer.train(**arguments)
        return octav_logs(trainer)

    whole = train()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert list(resumed) == [2, 4]  # the log of the first part comes with the checkpoint
    same = [name for name in whole[4] if name.endswith(("sqnr_db", "/clip"))]
    assert same
    assert {name: resumed[4][name] for name in same} == {name: whole[4][name] for name in same}
    name = f"octav/{WEIGHT}/weight/changed_codes"  # here since step 3, there since step 2
    assert 0 < resumed[4][name] < whole[4][name]


# What it costs.


class CountingTrainer(Trainer):
    """Counts what a step dispatches, and the values that the host reads in it."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with HostReads("cpu") as counts:
            loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("counts", []).append((counts.operations, counts.reads.total()))
        return loss


class CountingCallback(OctavCallback):
    """Counts what each event dispatches: step and event -> number of operations, where there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[tuple[int, str], int] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("on_"):
            return found

        def counted(args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            with HostReads("cpu") as counts:
                found(args, state, *rest, **kwargs)
            if counts.operations:
                self.operations[state.global_step, name] = counts.operations

        return counted


def test_only_steps_that_are_logged_cost_something(
    small_bert: MakeBert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAV_HF_COMPILE", "0")
    counts = []
    callback = CountingCallback()
    for callbacks in ([], [callback]):
        model = apply_octav(small_bert(), OctavConfig())
        trainer = trainer_of(model, tmp_path, *callbacks, trainer_class=CountingTrainer, max_steps=6, logging_steps=3)
        trainer.train()
        counts.append(trainer.counts)
    without, with_callback = counts
    for step, (plain, measured) in enumerate(zip(without, with_callback, strict=True), 1):
        assert plain[1] == measured[1]  # values read by the host: none more in any step
        assert (plain[0] == measured[0]) is (step not in (1, 3, 6)), step
    assert callback.operations.keys() == {(3, "on_log"), (6, "on_log")}


def test_without_logs_nothing_is_measured(
    small_bert: MakeBert, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAV_HF_COMPILE", "0")
    counts = []
    for callbacks in ([], [OctavCallback()]):
        model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig())
        arguments = {"trainer_class": CountingTrainer, "logging_strategy": "no", "max_steps": 1}
        trainer = trainer_of(model, tmp_path, *callbacks, **arguments)
        trainer.train()
        counts.append(trainer.counts)
    assert counts[0] == counts[1]
    assert 'logging_strategy is "no"' in caplog.text


class FailingTrainer(Trainer):
    """Fails in its first step, in the model or before it is called."""

    in_model = True

    def compute_loss(self, model: nn.Module, inputs: Any, **kwargs: Any) -> Any:
        if not self.in_model:
            raise IndexError("no loss")
        return model(input_ids=inputs["input_ids"] + 1000)  # IndexError: there are no such tokens


@pytest.mark.parametrize("in_model", [True, False])
def test_a_step_that_fails_leaves_nothing_behind(
    model: BertForQuestionAnswering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_model: bool
) -> None:
    monkeypatch.setattr(FailingTrainer, "in_model", in_model)
    with pytest.raises(IndexError):
        trainer_of(model, tmp_path, OctavCallback(), trainer_class=FailingTrainer).train()
    if not in_model:
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))  # the first forward pass ends it
    assert not [module for module in model.modules() if module is not model and module._forward_hooks]
    copied = pickle.loads(pickle.dumps(model))
    copied(input_ids=torch.zeros(1, 4, dtype=torch.long))
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compile(nn.Linear(2, 2), backend=backend)(torch.zeros(1, 2))
    assert compiled  # nothing is compiled in the stance of a measurement

    trainer = trainer_of(model, tmp_path, OctavCallback())  # the same model, another callback
    trainer.train()
    assert len(octav_logs(trainer)) == 2


def test_no_codes_are_kept_after_training(model: BertForQuestionAnswering, tmp_path: Path) -> None:
    def codes() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor and each.dtype == torch.int8 for each in gc.get_objects())

    callback, before = OctavCallback(), codes()
    trainer_of(model, tmp_path, callback, max_steps=1).train()
    assert codes() == before


# What it warns of.


class Sabotage(TrainerCallback):
    """Calls a function with the model before a step."""

    def __init__(self, step: int, function: Callable[[nn.Module], None]) -> None:
        self.step, self.function = step, function

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.function(kwargs["model"])


def warnings_of(
    caplog: pytest.LogCaptureFixture,
    model: nn.Module,
    folder: Path,
    callback: OctavCallback,
    *callbacks: TrainerCallback,
    **arguments: Any,
) -> list[str]:
    caplog.set_level(logging.WARNING)
    trainer_of(model, folder, callback, *callbacks, **({"max_steps": 8, "logging_steps": 1} | arguments)).train()
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_healthy_run_is_not_warned_of(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: int
) -> None:
    model = apply_octav(small_bert(), OctavConfig(weight_bits=bits, activation_bits=bits))
    calibrate_octav(model, [padded_batch], learned=True)
    assert warnings_of(caplog, model, tmp_path, OctavCallback(), logging_steps=2) == []


@pytest.mark.parametrize(
    ("correction", "problem"),
    [(-0.03, "Clips that collapsed"), (0.03, "Clips that exploded"), (0.01, None), (-0.01, None)],
)
def test_a_clip_that_leaves_its_first_value(
    small_bert: MakeBert,
    padded_batch: dict,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    correction: float,
    problem: str | None,
) -> None:
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig()), [padded_batch], learned=True)
    quantizer = model.get_submodule(f"{WEIGHT}.input_quantizer")
    sabotage = Sabotage(4, lambda model: quantizer.clip_correction.add_(correction))  # exp(3.84) = 47, exp(1.28) = 3.6
    messages = warnings_of(caplog, model, tmp_path, OctavCallback(), sabotage)
    if problem is None:
        assert messages == []
    else:
        (message,) = (each for each in messages if f"{WEIGHT} input (" in each)  # once, though it stays so
        assert message.startswith(f"Step 4: {problem} since the first measurement: {WEIGHT} input (")
        assert "lower the learning rate" in message.lower()


def test_the_factor_of_a_clip_is_an_argument(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig()), [padded_batch], learned=True)
    quantizer = model.get_submodule(f"{WEIGHT}.input_quantizer")
    sabotage = Sabotage(4, lambda model: quantizer.clip_correction.add_(-0.01))
    (message,) = warnings_of(caplog, model, tmp_path, OctavCallback(clip_factor=3), sabotage)
    assert "collapsed" in message


def test_the_least_sqnr_is_an_argument(
    model: BertForQuestionAnswering, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (message,) = warnings_of(caplog, model, tmp_path, OctavCallback(dead_sqnr_db=60), max_steps=1)
    assert message.startswith("Step 1: Operands that quantization loses")


def test_dead_operands(model: BertForQuestionAnswering, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attention = model.bert.encoder.layer[1].attention.self

    def kill(model: nn.Module) -> None:
        attention.query.weight.zero_()
        attention.query.bias.zero_()

    (message,) = warnings_of(caplog, model, tmp_path, OctavCallback(), Sabotage(3, kill), max_steps=3)
    name = "bert.encoder.layer.1.attention.self"
    assert message.startswith("Step 3: Dead operands, whose values are all the same: ")
    assert f"{name} query (all 2,048 values are 0)" in message
    assert f"{name}.query weight (all 1,024 values are 0)" in message


def test_the_zeros_that_an_adapter_begins_with_are_not_dead(
    small_bert: MakeBert, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(small_bert(), peft.LoraConfig(target_modules=["query"], r=4))
    (query,) = (layer for name, layer in adapted.named_modules() if name.endswith("layer.1.attention.self.query"))
    second = query.lora_B["default"].weight
    assert not second.any()
    apply_octav(adapted, OctavConfig())
    messages = warnings_of(
        caplog, adapted, tmp_path, OctavCallback(), Sabotage(3, lambda _: second.zero_()), max_steps=3
    )
    dead = [message for message in messages if "Dead operands" in message]
    assert len(dead) == 1
    assert dead[0].startswith("Step 3: ")
    assert "lora_B.default weight" in dead[0]


def test_an_operand_that_quantization_loses(
    small_bert: MakeBert, padded_batch: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig()), [padded_batch])
    model.get_submodule(f"{WEIGHT}.input_quantizer").clips.mul_(1000)
    messages = warnings_of(caplog, model, tmp_path, OctavCallback(), max_steps=2)
    (message,) = (each for each in messages if f"{WEIGHT} input (" in each)
    assert message.startswith("Step 1: Operands that quantization loses: the error is about as large as the signal: ")
    assert "SQNR 0.0 dB, 100% rounded to 0" in message
    assert "module_overrides" in message


@pytest.mark.parametrize(("rate", "logging_steps", "step"), [(1e-10, 1, 4), (1e-10, 2, 6), (0.0, 1, None)])
def test_codes_that_no_longer_move(
    model: BertForQuestionAnswering,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rate: float,
    logging_steps: int,
    step: int | None,
) -> None:
    arguments = {"learning_rate": rate, "lr_scheduler_type": "constant", "logging_steps": logging_steps}
    messages = warnings_of(caplog, model, tmp_path, OctavCallback(still_logs=3), **arguments)
    if rate == 0:  # nobody expects them to move
        assert messages == []
        return
    (message,) = messages
    assert message.startswith(
        f"Step {step}: Layers whose weights no longer change their codes, while they are trained: "
    )
    assert message.count("weight (3 logs)") == 8
    assert "and 5 more. " in message  # 13 layers
    assert "raise the learning rate" in message


def test_one_layer_whose_codes_do_not_move(
    small_bert: MakeBert, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    layer = model.get_submodule(WEIGHT)
    layer.weight.register_hook(torch.zeros_like)  # no gradient reaches it
    settings = {"logging_steps": 2, "learning_rate": 3e-3, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    (message,) = warnings_of(caplog, model, tmp_path, OctavCallback(), **settings)
    assert f"while they are trained: {WEIGHT} weight (" in message
    assert message.count("logs)") == 1


def test_a_layer_that_is_not_trained_may_be_still(
    small_bert: MakeBert, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    model.get_submodule(WEIGHT).weight.requires_grad_(False)
    settings = {"logging_steps": 2, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    assert warnings_of(caplog, model, tmp_path, OctavCallback(), **settings) == []


# Which models.


def test_frozen_clips_of_weights(small_bert: MakeBert, padded_batch: dict, tmp_path: Path) -> None:
    model = calibrate_octav(apply_octav(small_bert(), OctavConfig()), [padded_batch], weights=True)
    trainer = trainer_of(model, tmp_path, OctavCallback())
    trainer.train()
    for log in octav_logs(trainer).values():
        for kind in ("weight", "activation"):
            assert log[f"octav/{kind}_clip_ratio_min"] == log[f"octav/{kind}_clip_ratio_max"] == 1
        assert log["octav/weight_changed_codes_mean"] > 0


def test_a_packed_model_whose_other_parameters_are_trained(small_bert: MakeBert, tmp_path: Path) -> None:
    model = pack_octav(apply_octav(small_bert(), OctavConfig()))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    trainer = trainer_of(model, tmp_path, OctavCallback())
    trainer.train()
    for log in octav_logs(trainer).values():
        numbers = {name for name, value in log.items() if isinstance(value, float)}
        assert numbers == {name for name in SUMMARY if "activation" in name}


@pytest.mark.slow
def test_a_compiled_model_is_measured_without_compilation(small_bert: MakeBert, tmp_path: Path) -> None:
    logs = []
    for compiled in (False, True):
        capture = Reporter()
        arguments = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        model = apply_octav(small_bert(num_hidden_layers=1), OctavConfig())
        trainer = trainer_of(model, tmp_path, OctavCallback(per_layer=True), capture, max_steps=2, **arguments)
        trainer.train()
        logs.append(octav_logs(trainer)[2])
    plain, of_compiled = logs
    assert of_compiled.keys() == plain.keys()
    for name, value in plain.items():
        if name.endswith(("sqnr_db", "/clip")):
            assert of_compiled[name] == pytest.approx(value, rel=1e-3)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_factor": 1}, "clip_factor must be above 1, got 1"),
        ({"clip_factor": float("nan")}, "clip_factor must be above 1, got nan"),
        ({"still_logs": 0}, "still_logs must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OctavCallback(**arguments)


def test_a_float_model(small_bert: MakeBert, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OctavCallback: BertForQuestionAnswering has no module quantized by"):
        trainer_of(small_bert(), tmp_path, OctavCallback()).train()


def test_several_devices_in_one_process(model: BertForQuestionAnswering, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, OctavCallback())
    trainer.args._n_gpu = 2
    with pytest.raises(NotImplementedError, match=r"this process uses 2 devices \(nn.DataParallel\)"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
