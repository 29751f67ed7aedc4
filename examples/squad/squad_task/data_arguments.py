"""Command-line arguments for the data. This file does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import numpy as np
from datasets import Dataset

from squad_task.dataset import load_squad_dataset, read_squad_file, sample
from squad_task.features import Windows
from squad_task.predictions import Predictions, predict_answers

# HfArgumentParser reads the annotations at run time and takes `Optional` fields only in this form.
# ruff: noqa: UP045
EVAL_SAMPLE_SEED = 0


@dataclass
class DataArguments:
    """The questions to use, and how they become features and answers. Lengths are in tokens."""

    dataset_name: Optional[str] = field(
        default=None, metadata={"help": "Dataset for datasets.load_dataset, with splits train and validation."}
    )
    dataset_config_name: Optional[str] = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    train_file: Optional[str] = field(default=None, metadata={"help": "SQuAD JSON file to train on."})
    validation_file: Optional[str] = field(default=None, metadata={"help": "SQuAD JSON file to evaluate on."})
    max_train_samples: Optional[int] = field(
        default=None, metadata={"help": "Train on this many questions, drawn with --data_seed (else --seed)."}
    )
    max_eval_samples: Optional[int] = field(
        default=None, metadata={"help": "Evaluate on this many questions, drawn with a fixed seed."}
    )
    max_seq_length: int = field(default=384, metadata={"help": "Length of a feature, special tokens included."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows of a context share."})
    max_query_length: int = field(default=64, metadata={"help": "Longer questions are truncated."})
    pad_to_max_length: bool = field(
        default=True, metadata={"help": "Pad to --max_seq_length; false pads each batch to its longest feature."}
    )
    n_best_size: int = field(default=20, metadata={"help": "Candidates kept for each question."})
    max_answer_length: int = field(default=30, metadata={"help": "Longest answer."})
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some questions have no answer (SQuAD v2)."})
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "Predict no answer if its score exceeds that of the best span by more than this. v2.0 only."},
    )

    def __post_init__(self) -> None:
        from_files = self.train_file is not None or self.validation_file is not None
        if from_files == (self.dataset_name is not None):
            raise ValueError("Give either --dataset_name or --train_file and/or --validation_file.")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError("--dataset_config_name belongs to --dataset_name: give that too.")
        if self.null_score_diff_threshold != 0.0 and not self.version_2_with_negative:
            raise ValueError("--null_score_diff_threshold has an effect only with --version_2_with_negative.")
        for name in ("max_train_samples", "max_eval_samples", "n_best_size", "max_answer_length", "max_query_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}.")

    def windows(self) -> Windows:
        """How contexts are split into windows."""
        return Windows(self.max_seq_length, self.doc_stride, self.max_query_length, self.pad_to_max_length)

    def load(self, split: str) -> Dataset:
        """The checked questions of `split` ("train" or "validation")."""
        if self.dataset_name is not None:
            return load_squad_dataset(self.dataset_name, split, self.dataset_config_name, self.version_2_with_negative)
        path = self.train_file if split == "train" else self.validation_file
        return read_squad_file(str(path), self.version_2_with_negative)

    def evaluation_examples(self) -> Dataset:
        """The questions to evaluate on, the same in every run."""
        return sample(self.load("validation"), self.max_eval_samples, EVAL_SAMPLE_SEED)

    def predict(
        self, examples: Dataset, features: Dataset, start_logits: np.ndarray, end_logits: np.ndarray
    ) -> Predictions:
        """The answers for (F, T) logits; see `predict_answers`."""
        return predict_answers(
            examples,
            features,
            start_logits,
            end_logits,
            self.n_best_size,
            self.max_answer_length,
            self.version_2_with_negative,
            self.null_score_diff_threshold,
        )
