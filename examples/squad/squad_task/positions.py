"""The number of positions of a model."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from transformers import MODEL_FOR_QUESTION_ANSWERING_MAPPING, PreTrainedConfig

# names of tables with a row per position: in BERT-like models, in BART-like ones and GPT-J, in GPT-2-like ones
_TABLES = {"position_embeddings", "embed_positions", "wpe"}


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest input of a question-answering model with `config`; None if it has no table of positions.

    The table decides, not `max_position_embeddings`: relative and rotary positions have no limit, and in RoBERTa-like
    models the first rows are not for tokens. The model is created without memory and without random numbers.
    """
    model_class = MODEL_FOR_QUESTION_ANSWERING_MAPPING.get(type(config), None)
    if model_class is None:  # AutoModelForQuestionAnswering refuses it later
        return None
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    limits = []
    for name, table in chain(model.named_parameters(), model.named_buffers()):
        if table.dim() < 2 or not _TABLES & {*name.split(".")}:
            continue
        embedding, _, _ = name.rpartition(".")
        owner, _, _ = embedding.rpartition(".")
        module = model.get_submodule(embedding)
        padding = getattr(module, "padding_idx", None)
        limits.append(len(table) - getattr(module, "offset", 0 if padding is None else padding + 1))
        # position ids are a slice of this buffer, which in models such as Nystromformer begins beyond the first row
        ids = getattr(model.get_submodule(owner), "position_ids", None)
        if ids is not None:
            limits.append(ids.shape[-1])
    return min(limits, default=None)
