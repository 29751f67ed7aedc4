"""Fine-tune and evaluate an extractive question-answering model on SQuAD, in float or with OCTAV quantization.

    python run_squad.py --model_name_or_path MODEL --train_file train.json --validation_file dev.json \
        --output_dir out --do_train --do_eval [--quantize --weight_bits 4 --activation_bits 4]

All arguments may also stand in one JSON file: `python run_squad.py arguments.json`. In several processes:
`torchrun --nproc_per_node 4 run_squad.py ...` or `accelerate launch --num_processes 4 run_squad.py ...`.

To continue an interrupted run, pass the same arguments and `--resume_from_checkpoint last`, or the folder of a
checkpoint. The run then ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from squad_task.arguments import METRICS, ModelArguments, OctavArguments, OutputArguments
from squad_task.data_arguments import DataArguments
from squad_task.dataset import sample
from squad_task.features import evaluation_features, training_features
from squad_task.metric import score_answers
from squad_task.trainer import QuestionAnsweringTrainer, StepTimer, peak_memory_bytes
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

# a quantized checkpoint can only be loaded after this import, even without --quantize
import octav_hf
from octav_hf.export import to_onnx
from octav_hf.hub.checkpoint_folder import CheckpointFolder
from octav_hf.hub.output_dir import atomic_output_dir
from octav_hf.training.checkpoints import check_checkpoint

logger = logging.getLogger(__name__)
LAST = "last"  # of --resume_from_checkpoint
RESUME_HELP = (
    f"--resume_from_checkpoint FOLDER continues training from that checkpoint, which must be complete. "
    f"--resume_from_checkpoint {LAST} uses the newest complete checkpoint in --output_dir and skips incomplete ones; "
    f"if there is none yet, training starts from the beginning."
)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as the arguments tell, and return the metrics (keys `train_*` and `eval_*`).

    Args:
        argv: command-line arguments; None for those of the process.

    Raises:
        ValueError: arguments contradict each other, the data cannot be used, or a checkpoint is incomplete; raised
            before training.
        FileExistsError: `--output_dir` is not empty and training would overwrite it.
    """
    model_args, data_args, octav_args, output_args, training_args = parse_arguments(argv)
    fp32_metrics = output_args.fp32_metrics()
    # of several processes, only the first one logs
    level = logging.INFO if training_args.process_index == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    checkpoint = checkpoint_to_resume(training_args)
    check_output_dir(training_args, checkpoint)
    set_seed(training_args.seed)

    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    if octav_args.quantize and getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{model_args.model_name_or_path} is already quantized. Leave out --quantize and its options to continue "
            f"with its quantization, or start from the float model."
        )
    if not octav_args.quantize and getattr(config, "quantization_config", None) is None:
        for name in ("pack", "calibration_batches", "export_onnx", "also_evaluate"):
            if getattr(output_args, name):
                raise ValueError(f"--{name} needs a quantized model: add --quantize, or pass a quantized model.")
    calibrates = octav_args.static_clip_batches or output_args.calibration_batches
    if output_args.calibration_observer and not calibrates:
        raise ValueError("--calibration_observer would be ignored: add --calibration_batches or --static_clip_batches.")
    if output_args.export_onnx and octav_args.quantize and not calibrates:
        raise ValueError("--export_onnx needs static clips: add --static_clip_batches or --calibration_batches.")
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    windows = data_args.windows()
    windows.check(tokenizer)
    windows.check_model(config)
    teacher = model_args.distill_from
    if teacher:
        if AutoTokenizer.from_pretrained(teacher).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"--distill_from {teacher} uses other token ids than {model_args.model_name_or_path}: use a teacher "
                f"whose tokenizer has the same vocabulary."
            )
        windows.check_model(AutoConfig.from_pretrained(teacher), "teacher")
    examples: dict[str, Dataset] = {}
    features: dict[str, Dataset] = {}
    if training_args.do_train or output_args.calibration_batches:
        seed = training_args.data_seed if training_args.data_seed is not None else training_args.seed
        examples["train"] = sample(data_args.load("train"), data_args.max_train_samples, seed)
        features["train"] = training_features(examples["train"], tokenizer, windows)
    if training_args.do_eval:
        examples["eval"] = data_args.evaluation_examples()
        features["eval"] = evaluation_features(examples["eval"], tokenizer, windows)

    def score_logits(start_logits: np.ndarray, end_logits: np.ndarray, prefix: str) -> dict[str, float]:
        predictions = data_args.predict(examples["eval"], features["eval"], start_logits, end_logits)
        if trainer.is_world_process_zero():
            predictions.write(str(training_args.output_dir), prefix)
        return score_answers(examples["eval"], predictions.texts, predictions.null_probability)

    timer = StepTimer()
    parts: dict[str, Any] = {
        "args": training_args,
        "train_dataset": features.get("train"),
        "eval_dataset": features.get("eval"),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        "score_logits": score_logits,
    }
    load = AutoModelForQuestionAnswering.from_pretrained
    model = load(model_args.model_name_or_path, config=config, **model_args.loading())
    if octav_args.quantize:
        octav_hf.apply_octav(model, octav_args.to_config())
        logger.info("Quantized:\n%s", octav_hf.coverage_report(model))
    if octav_args.reconstruct_batches:
        batches = random_batches(parts, octav_args.reconstruct_batches)
        start = load(teacher or model_args.model_name_or_path).to(training_args.device)
        octav_hf.reconstruct(model.to(training_args.device), start, list(batches))
    if teacher:
        octav_hf.distill(model, load(teacher, **model_args.loading()), **model_args.distillation())
    callbacks: list[TrainerCallback] = [timer]
    if octav_args.quantize and octav_args.log_quantization is not False:
        callbacks.append(octav_hf.OctavCallback())
    trainer = QuestionAnsweringTrainer(model=model, callbacks=callbacks, **parts)

    def calibrate(batches: int, **more: bool) -> None:
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        observer = output_args.calibration_observer or "mean"
        octav_hf.calibrate_octav(unwrapped, random_batches(parts, batches), observer=observer, **more)

    results: dict[str, float] = {}

    def evaluate_again(form: torch.nn.Module, prefix: str) -> None:
        metrics = QuestionAnsweringTrainer(model=form, **parts).evaluate(metric_key_prefix=prefix)
        report(trainer, prefix, metrics)
        results.update(metrics)

    if octav_args.static_clip_batches:
        calibrate(octav_args.static_clip_batches, weights=True, learned=bool(octav_args.learned_clips))
    if training_args.do_train:
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = {
            **outcome.metrics,
            **timer.metrics(),
            "train_peak_memory_bytes": peak_memory_bytes(),
            "train_samples": len(examples["train"]),
            "checkpoint_bytes": checkpoint_bytes(trainer.accelerator.unwrap_model(trainer.model)),
        }
        report(trainer, "train", metrics)
        trainer.save_state()
        results.update(metrics)
    if output_args.calibration_batches:
        calibrate(output_args.calibration_batches)
    if training_args.do_train or output_args.calibration_batches:
        trainer.save_model()
    if training_args.do_eval:
        metrics = {**trainer.evaluate(), "eval_samples": len(examples["eval"])}
        report(trainer, "eval", metrics)
        results.update(metrics)
    trainer.run = describe_run(model_args, data_args, training_args, results, fp32_metrics)
    card = {
        "finetuned_from": model_args.model_name_or_path,
        "tasks": "question-answering",
        "dataset": trainer.run.dataset,
    }
    if training_args.push_to_hub and not output_args.pack:
        trainer.push_to_hub(**card)
    elif training_args.do_train or output_args.pack:
        trainer.create_model_card(**card)
    if output_args.export_onnx:
        write_onnx(trainer)
    if output_args.pack:
        packed = write_packed(trainer)
        if training_args.do_eval:
            evaluate_again(packed.load(), "packed")
        if training_args.push_to_hub and trainer.is_world_process_zero():
            repo_id = training_args.hub_model_id or Path(str(training_args.output_dir)).name
            packed.push(repo_id, private=training_args.hub_private_repo, token=training_args.hub_token)
    for form in output_args.also_evaluate or []:
        model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
        if form == "float64":
            evaluate_again(model.double(), form)
        else:
            evaluate_again(octav_hf.convert_octav(model, reference=form == "reference"), form)
    return results


def random_batches(parts: dict[str, Any], count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Up to `count` batches of training questions of global batch size, the same in each process.

    Drawing them does not change the global random state.
    """
    args: TrainingArguments = parts["args"]
    loader = DataLoader(
        parts["train_dataset"],
        batch_size=args.train_batch_size * args.world_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(args.seed),
        collate_fn=parts["data_collator"],
    )
    return itertools.islice(iter(loader), count)


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Bytes of a checkpoint's tensors; in packed form if the model is quantized."""
    if getattr(model, "octav_config", None) is not None:
        model = octav_hf.pack_octav(copy.deepcopy(model))
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(tensors.values())


def describe_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    results: dict[str, float],
    fp32_metrics: dict[str, float],
) -> octav_hf.TrainingRun:
    """Facts about this run for the model card."""
    base, files = model_args.model_name_or_path, (data_args.train_file, data_args.validation_file)
    recipe = {
        "training questions": results.get("train_samples"),
        "epochs": results.get("epoch"),
        "learning rate": training_args.learning_rate,
        "schedule": str(training_args.lr_scheduler_type),
        "warm-up": training_args.warmup_steps,
        "optimizer": str(training_args.optim),
        "weight decay": training_args.weight_decay,
        "batch size": training_args.train_batch_size * training_args.gradient_accumulation_steps,
        "processes": training_args.world_size,
        "tokens of a window": data_args.max_seq_length,
        "seed": training_args.seed,
    }
    if model_args.distill_from:
        recipe["distilled from"] = without_path(model_args.distill_from)
    return octav_hf.TrainingRun(
        base_model=without_path(base),
        dataset=data_args.dataset_name or Path(next(file for file in files if file)).name,
        dataset_split="validation" if data_args.dataset_name else Path(data_args.validation_file or "").name or None,
        recipe=recipe if training_args.do_train else {},
        metrics={name: results[f"eval_{name}"] for name in METRICS if f"eval_{name}" in results},
        fp32_metrics=fp32_metrics,
    )


def without_path(model: str) -> str:
    """The name of a model's folder without the path, which the card should not publish."""
    return f"./{Path(model).name}" if Path(model).is_dir() else model


def write_packed(trainer: QuestionAnsweringTrainer) -> CheckpointFolder:
    """Write the packed form of the trained model, with tokenizer and card, to the subfolder `packed`."""
    source = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        with atomic_output_dir(source / "packed") as folder:
            octav_hf.pack_octav(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
            trainer.run.save(folder)
            CheckpointFolder(str(folder)).write_card(trainer.args.hub_model_id or source.name)
    trainer.accelerator.wait_for_everyone()
    return CheckpointFolder(str(source / "packed"))


def write_onnx(trainer: QuestionAnsweringTrainer) -> None:
    """Write the trained model as ONNX, with tokenizer and config, to the subfolder `onnx`."""
    if trainer.is_world_process_zero():
        tokenizer: Any = trainer.processing_class
        inputs = tokenizer(["Who?", "When was it?"], ["A person.", "Then."], padding=True, return_tensors="pt")
        model = trainer.accelerator.unwrap_model(trainer.model)
        to_onnx(model, Path(str(trainer.args.output_dir)) / "onnx", dict(inputs), tokenizer=tokenizer)
    trainer.accelerator.wait_for_everyone()


def parse_arguments(
    argv: list[str] | None,
) -> tuple[ModelArguments, DataArguments, OctavArguments, OutputArguments, TrainingArguments]:
    """Parse the command line, or the JSON file that it names, and refuse invalid combinations."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, OctavArguments, OutputArguments, TrainingArguments],  # type: ignore[list-item]
        description=RESUME_HELP,
    )
    parsed: tuple[Any, ...]
    if len(argv) == 1 and argv[0].endswith(".json"):
        parsed = parser.parse_json_file(argv[0])
    else:
        parsed = parser.parse_args_into_dataclasses(args=argv)
    model_args, data_args, octav_args, output_args, training_args = parsed
    if not training_args.do_train and not training_args.do_eval:
        raise ValueError("Nothing to do: pass --do_train, --do_eval or both.")
    if octav_args.quantize and not training_args.do_train:
        raise ValueError("--quantize starts quantization-aware training: add --do_train.")
    if output_args.also_evaluate and not training_args.do_eval:
        raise ValueError("--also_evaluate goes with --do_eval: add that, or leave it out.")
    if model_args.distill_from and not training_args.do_train:
        raise ValueError("--distill_from is for training: add --do_train, or leave it out.")
    if training_args.resume_from_checkpoint and not training_args.do_train:
        raise ValueError("--resume_from_checkpoint continues training: add --do_train, or leave it out.")
    needs_training_data = training_args.do_train or output_args.calibration_batches
    for wanted, name in ((needs_training_data, "train_file"), (training_args.do_eval, "validation_file")):
        if wanted and data_args.dataset_name is None and getattr(data_args, name) is None:
            raise ValueError(f"--{name} is missing: give it, or --dataset_name.")
    return parsed  # type: ignore[return-value]


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """The folder for `--resume_from_checkpoint`; None to start from the beginning.

    Raises:
        ValueError: the folder does not exist or is not a complete checkpoint.
    """
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint == LAST:
        checkpoint = octav_hf.last_whole_checkpoint(training_args.output_dir or "")
        logger.info("Training starts from %s", checkpoint or "the beginning: there is no complete checkpoint yet")
    elif checkpoint:
        try:
            check_checkpoint(checkpoint)
        except ValueError as error:
            raise ValueError(f"{error}. Pass another one, or --resume_from_checkpoint {LAST}.") from error
    return checkpoint or None


def check_output_dir(training_args: TrainingArguments, checkpoint: str | None) -> None:
    """Raise `FileExistsError` if training from the beginning would write into a folder that is not empty.

    With `--resume_from_checkpoint last`, the folder may contain leftovers of a run that was killed before its first
    complete checkpoint, but no trained model.
    """
    folder = Path(training_args.output_dir or "")
    if not training_args.do_train or checkpoint is not None or not folder.is_dir():
        return
    if training_args.resume_from_checkpoint == LAST:
        if (folder / "config.json").exists():
            raise FileExistsError(
                f"--output_dir {folder} contains a model but no complete checkpoint to continue from. Choose another "
                f"folder, or empty it to start from the beginning."
            )
    elif any(folder.iterdir()):
        raise FileExistsError(
            f"--output_dir {folder} is not empty. Choose another folder, empty it, or continue its run with "
            f"--resume_from_checkpoint CHECKPOINT, or with --resume_from_checkpoint {LAST}."
        )


def report(trainer: QuestionAnsweringTrainer, split: str, metrics: dict[str, float]) -> None:
    """Print the metrics and save them as `{split}_results.json` and in `all_results.json`."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


if __name__ == "__main__":
    main()
