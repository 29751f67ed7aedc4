"""Small random models in every form, and a tokenizer for the example's questions."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerFast

from octav_hf import OctavConfig, apply_octav, calibrate_octav, pack_octav

SQUAD = Path(__file__).parents[2] / "examples" / "squad"
FORMS = ("training", "packed")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two sequences; the second one is padded."""
    ids = torch.randint(4, 100, (2, 16), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def small_config(vocabulary: int = 100) -> BertConfig:
    """Sizes of all the models."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertConfig(vocab_size=vocabulary, max_position_embeddings=128, **sizes)


def make(
    form: str,
    bits: int = 4,
    dtype: torch.dtype = torch.float32,
    frozen: bool = False,
    seed: int = 0,
    vocabulary: int = 100,
) -> PreTrainedModel:
    """A small random BERT, quantized, in one of ``FORMS``."""
    torch.manual_seed(seed)
    model = BertForQuestionAnswering(small_config(vocabulary)).eval().to(dtype)
    apply_octav(model, OctavConfig(weight_bits=bits, activation_bits=bits))
    if frozen:
        calibrate_octav(model, [batch(1)], progress_bar=False)
    return pack_octav(model) if form == "packed" else model


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Start and end logits of ``batch()``."""
    with torch.no_grad():
        output = model(**batch())
    return torch.cat([output.start_logits, output.end_logits])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the example's dev questions, of which it knows the first thousand."""
    text = (SQUAD / "data" / "dev.json").read_text(encoding="utf-8").lower()
    words = list(dict.fromkeys(re.findall(r"[a-z]+|[0-9]", text)))[:1000]
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)


def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: int = 24) -> dict[str, float]:
    """F1 and EM on the first of the example's dev questions, by the example's own code."""
    sys.path.insert(0, str(SQUAD))
    from squad_task.dataset import read_squad_file
    from squad_task.features import Windows, evaluation_features
    from squad_task.metric import score_answers
    from squad_task.predictions import predict_answers

    examples = read_squad_file(SQUAD / "data" / "dev.json").select(range(questions))
    features = evaluation_features(examples, tokenizer, Windows(max_seq_length=128, doc_stride=32))
    inputs = {name: torch.tensor(features[name][:]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model(**inputs)
    start, end = (values.float().numpy() for values in (output.start_logits, output.end_logits))
    predictions = predict_answers(examples, features, start, end)
    return score_answers(examples, predictions.texts, predictions.null_probability)
