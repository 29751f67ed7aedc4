"""The card says what the config, the modules and the run say, and its example loads the model."""

import copy
import pickle
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import BertForQuestionAnswering, PreTrainedModel, ResNetForImageClassification

from octav_hf import (
    OctavConfig,
    TrainingRun,
    apply_octav,
    calibrate_octav,
    coverage_report,
    model_card,
    pack_octav,
    remove_octav,
)
from octav_hf.integrations.upload import UploadWithCard
from octav_hf.model_card import renewed_card

MakeBert = Callable[..., BertForQuestionAnswering]

RUN = TrainingRun(
    base_model="me/bert",
    dataset="squad",
    dataset_split="validation",
    recipe={"learning_rate": 5e-5, "epochs": 2},
    metrics={"f1": 87.654, "exact_match": 80.1},
    fp32_metrics={"f1": 88.5, "exact_match": 81.25},
)


def test_metadata_can_be_read_back(small_bert: MakeBert, tmp_path: Path) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    model_card(model, RUN, name="me/bert-4bit", license="apache-2.0").save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "me/bert"
    assert data.datasets == ["squad"]
    assert data.library_name == "transformers"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "question-answering"
    assert {"octav", "quantization-aware-training"} <= set(data.tags)
    assert data.model_name == "bert-4bit"
    results = {result.metric_type: result for result in data.eval_results}
    assert {metric: result.metric_value for metric, result in results.items()} == RUN.metrics
    assert {result.dataset_split for result in results.values()} == {"validation"}
    assert {result.task_type for result in results.values()} == {"question-answering"}


def test_it_says_what_the_config_says(small_bert: MakeBert, padded_batch: dict) -> None:
    config = OctavConfig(
        weight_bits=3,
        activation_bits=5,
        weight_clip="max",
        weight_gradient="ste",
        exclude_modules=["qa_outputs"],
        module_overrides={"*.query": {"weight_bits": 8}},
        activation_clip="percentile",
        activation_clip_options={"percentile": 99.5},
    )
    model = apply_octav(small_bert(), config)
    dynamic = model_card(model).text
    for fact in (
        "weights at 3 bits, activations at 5 bits",
        "| weights | 3 bits, clip `max` per row |",
        "| activations | 5 bits, clip `percentile`, percentile=99.5 per tensor, recomputed at every forward pass |",
        "| embeddings | floating point |",
        "| gradients | `ste` for weights, `pwl` for activations |",
        "| form | training form |",
        "| excluded | `qa_outputs` |",
        "| override for `*.query` | weight_bits=8 |",
        "loads the plain floating-point model",
        *coverage_report(model).summary().splitlines(),
    ):
        assert fact in dynamic, fact
    packed = model_card(pack_octav(calibrate_octav(model, [padded_batch], progress_bar=False), embedding_bits=8)).text
    for fact in ("frozen after calibration", "| form | packed |", "refuses to load it", "| embeddings | 8 bits |"):
        assert fact in packed, fact
    assert "3 of 3 embedding operands quantized" in packed


def test_what_is_not_known_is_left_out(small_bert: MakeBert) -> None:
    card = model_card(apply_octav(small_bert(), OctavConfig()))
    assert "## Evaluation" not in card.text
    assert "## Training" not in card.text
    assert "fine-tuned" not in card.text
    data = card.data.to_dict()
    assert not {"base_model", "datasets", "model-index", "metrics", "license"} & set(data)


def test_evaluation_stands_beside_fp32(small_bert: MakeBert) -> None:
    text = model_card(apply_octav(small_bert(), OctavConfig()), RUN).text
    assert "| metric | this model | FP32 |" in text
    assert "| F1 | 87.65 | 88.50 |" in text
    assert "| exact match | 80.10 | 81.25 |" in text
    assert "| learning_rate | 5e-05 |" in text
    alone = model_card(apply_octav(small_bert(), OctavConfig()), TrainingRun(metrics={"f1": 1})).text
    assert "FP32" not in alone
    assert "| F1 | 1.00 |" in alone


def test_an_image_classifier(small_resnet: Callable[..., ResNetForImageClassification]) -> None:
    card = model_card(apply_octav(small_resnet(), OctavConfig(first_last_bits=8)))
    assert card.data.pipeline_tag == "image-classification"
    assert "| first and last layer | 8 bits |" in card.text


@pytest.mark.parametrize("packed", [False, True])
def test_the_example_loads_the_model(small_bert: MakeBert, padded_batch: dict, tmp_path: Path, packed: bool) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    if packed:
        pack_octav(model)
    model.save_pretrained(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", model_card(model, name=str(tmp_path)).text, re.DOTALL)
    assert len(snippet.splitlines()) == 3
    names: dict[str, PreTrainedModel] = {}
    exec(snippet, names)
    with torch.no_grad():
        assert torch.equal(names["model"](**padded_batch).start_logits, model(**padded_batch).start_logits)


def test_the_same_model_and_run_give_the_same_text(small_bert: MakeBert) -> None:
    first, second = (str(model_card(apply_octav(small_bert(), OctavConfig()), RUN)) for _ in range(2))
    assert first == second


def test_a_model_that_is_not_quantized_has_no_card(small_bert: MakeBert) -> None:
    for model in (small_bert(), remove_octav(apply_octav(small_bert(), OctavConfig()))):
        with pytest.raises(ValueError, match="not a Transformers model that apply_octav quantized"):
            model_card(model)
    with pytest.raises(ValueError, match="Sequential is not a Transformers model"):
        model_card(apply_octav(nn.Sequential(nn.Linear(3, 3)), OctavConfig()))


def test_a_run_comes_back_from_its_file(tmp_path: Path) -> None:
    assert TrainingRun.load(tmp_path) == TrainingRun()
    RUN.save(tmp_path)
    assert TrainingRun.load(tmp_path) == RUN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "must be a JSON object with fields of base_model"),
        ('{"f1": 1}', "must be a JSON object with fields of base_model"),
        ('{"metrics": {"f1": "good"}}', r"metrics\['f1'\] must be a finite number, got 'good'"),
        ('{"metrics": {"f1": NaN}}', r"metrics\['f1'\] must be a finite number, got nan"),
        ('{"metrics": 3}', "octav_run.json"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "octav_run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        TrainingRun.load(tmp_path)


def test_a_generated_text_is_renewed_and_any_other_kept(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    old, new = model_card(model, license="mit"), model_card(pack_octav(model), RUN)
    old.data.tags.append("mine")
    renewed = renewed_card(ModelCard(str(old)), new)
    assert "| form | packed |" in renewed.text
    assert renewed.data.license == "mit"
    assert {"mine", "octav"} <= set(renewed.data.tags)
    assert renewed.data.eval_results == new.data.eval_results
    assert str(renewed_card(None, new)) == str(new)

    edited = ModelCard(str(old).replace("## Load it", "My own words.\n\n## Load it"))
    foreign = ModelCard("---\ntags:\n- octav\n---\n\nMy own words.\n")
    for card in (edited, foreign):
        assert renewed_card(card, new) is card
    transformers = ModelCard.from_template(
        ModelCardData(library_name="transformers"),
        model_description="This model card has been automatically generated.",
    )
    assert "| form | packed |" in renewed_card(transformers, new).text


def test_a_local_path_is_not_published(small_bert: MakeBert, tmp_path: Path) -> None:
    small_bert().save_pretrained(tmp_path / "secret" / "bert")
    model = BertForQuestionAnswering.from_pretrained(tmp_path / "secret" / "bert")
    text = str(model_card(apply_octav(model, OctavConfig())))
    assert "fine-tuned from `bert`" in text
    assert "secret" not in text
    assert model_card(model, TrainingRun(base_model=str(tmp_path / "secret"))).data.base_model is None
    model.name_or_path = "me/bert"
    assert model_card(model).data.base_model == "me/bert"


def test_uploading_belongs_to_the_model_and_its_copies_and_keeps_none_alive(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(one._upload_modified_files, UploadWithCard)
        assert one._upload_modified_files._model() is one
    assert not isinstance(remove_octav(model)._upload_modified_files, UploadWithCard)
    kept = weakref.ref(apply_octav(small_bert(), OctavConfig())._upload_modified_files)
    assert kept() is None
