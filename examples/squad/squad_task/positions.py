"""How many tokens a model has positions for."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from transformers import MODEL_FOR_QUESTION_ANSWERING_MAPPING, PreTrainedConfig

# with a row for each position: in BERT's relatives, in BART's and GPT-J, in GPT-2's
_TABLES = {"position_embeddings", "embed_positions", "wpe"}


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest input of a question-answering model with `config`; None where its positions have no table.

    The tables say it, and not `max_position_embeddings`: relative and rotary positions have no limit, and in RoBERTa's
    relatives the first rows are not for tokens. The model is made without memory and without random numbers.
    """
    model_class = MODEL_FOR_QUESTION_ANSWERING_MAPPING.get(type(config), None)
    if model_class is None:  # which AutoModelForQuestionAnswering refuses
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
        # what is looked up is cut from this, and begins beyond the first row in Nystromformer and its like
        ids = getattr(model.get_submodule(owner), "position_ids", None)
        if ids is not None:
            limits.append(ids.shape[-1])
    return min(limits, default=None)
