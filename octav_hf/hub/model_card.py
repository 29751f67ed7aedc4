"""The model card of a quantized model: what it is, how it was made, how good it is, how to load it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .._utils.transformers_compat import task_mapping
from ..config import OctavConfig
from ..coverage.report import Operand, coverage_report
from ..nn.granularity import ACTIVATION_GRANULARITIES
from .training_run import TrainingRun

TAGS = ("octav", "quantization-aware-training", "quantized")
# In the card of a model that was pushed without one, and in Trainer's.
_TRANSFORMERS_TEMPLATES = (
    "This model card has been automatically generated.",
    "This model card has been generated automatically",
)
# Of which a new card knows whether they still hold.
_OWN_METADATA = ("base_model", "datasets", "metrics", "model-index", "model_name", "pipeline_tag")
_METRIC_NAMES = {"f1": "F1", "exact_match": "exact match", "accuracy": "accuracy"}

_CITATION = """\
@inproceedings{sakr2022octav,
  title = {Optimal Clipping and Magnitude-aware Differentiation for Improved Quantization-aware Training},
  author = {Sakr, Charbel and Dai, Steve and Venkatesan, Rangharajan and Zimmer, Brian and Dally, William J. and
            Khailany, Brucek},
  booktitle = {International Conference on Machine Learning},
  year = {2022},
  note = {arXiv:2206.06501}
}"""


def model_card(
    model: PreTrainedModel, run: TrainingRun | None = None, *, name: str | None = None, license: str | None = None
) -> ModelCard:
    """The card of a model that ``apply_octav`` quantized, in either form; the same model and run give the same text.

    Args:
        model: quantized; only its config and modules are read, not its weights.
        run: what is known about training and evaluation. With a dataset, its metrics are in the card's metadata too,
            as ``model-index``.
        name: the repository, such as ``me/bert-4bit``, or folder that the card's example loads.
        license: its identifier.

    Raises:
        ValueError: ``model`` is not a Transformers model that ``apply_octav`` quantized.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, OctavConfig):
        raise ValueError(f"{type(model).__name__} is not a Transformers model that apply_octav quantized")
    run, name = run or TrainingRun(), name or "PATH_OR_REPOSITORY"
    base_model = run.base_model or _loaded_from(model)
    metadata = _metadata(model, run, base_model, name, license).to_yaml()
    text = _text(model, config, run, base_model, name)
    return ModelCard(f"---\n{metadata}\n---\n\n{text}\n\n{_mark(text)}\n")


def renewed_card(card: ModelCard | None, new: ModelCard) -> ModelCard:
    """``new`` in the place of ``card``, unless somebody has written that.

    A text that ``model_card`` or Transformers generated is replaced, and what the metadata has beyond the new ones
    stays; any other card is returned as it is.
    """
    if card is None:
        return new
    text, _, mark = card.text.rstrip().rpartition("\n")
    if mark != _mark(text.strip()) and not any(template in card.text for template in _TRANSFORMERS_TEMPLATES):
        return card
    old_data, new_data = card.data.to_dict(), new.data.to_dict()
    merged = {name: value for name, value in old_data.items() if name not in _OWN_METADATA} | new_data
    merged["tags"] = list(dict.fromkeys([*new_data.get("tags", []), *old_data.get("tags", [])]))
    return ModelCard(f"---\n{ModelCardData(**merged).to_yaml()}\n---\n{new.text}")


def write_card(folder: Path, new: ModelCard) -> None:
    """Write ``new`` as ``README.md`` into ``folder``, unless somebody has written that."""
    path = folder / "README.md"
    renewed_card(ModelCard.load(path) if path.is_file() else None, new).save(path)


def _mark(text: str) -> str:
    """The last line of a card, by which one that was edited can be told."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"<!-- written by octav_hf, which replaces it until the text is edited: {digest} -->"


def _loaded_from(model: PreTrainedModel) -> str | None:
    """What a float model was loaded from before it was quantized; unknown for one that was loaded quantized."""
    quantizer = model.__dict__.get("hf_quantizer")
    return None if quantizer is None or quantizer.pre_quantized else model.name_or_path or None


def _is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).is_dir()


def _metadata(
    model: PreTrainedModel, run: TrainingRun, base_model: str | None, name: str, license: str | None
) -> ModelCardData:
    task = _task(model)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=run.dataset,
            dataset_name=run.dataset,
            dataset_split=run.dataset_split,
            metric_type=metric,
            metric_name=_METRIC_NAMES.get(metric, metric),
            metric_value=value,
        )
        for metric, value in run.metrics.items()
        if task and run.dataset
    ]
    return ModelCardData(
        base_model=None if base_model is None or _is_local(base_model) else base_model,
        datasets=[run.dataset] if run.dataset else None,
        eval_results=results or None,
        library_name="transformers",
        license=license,
        metrics=list(run.metrics) or None,
        model_name=name.rpartition("/")[2],
        pipeline_tag=task,
        tags=list(TAGS),
    )


def _task(model: PreTrainedModel) -> str | None:
    architecture = type(model).__name__
    for task, names in task_mapping().items():
        if any(architecture in ([name] if isinstance(name, str) else name) for name in names.values()):
            return task
    return None


def _text(model: PreTrainedModel, config: OctavConfig, run: TrainingRun, base_model: str | None, name: str) -> str:
    architecture = type(model).__name__
    sections = [
        f"# {name.rpartition('/')[2]}",
        _introduction(architecture, config, run, base_model),
        f"## Load it\n\n```sh\npip install octav-hf\n```\n\n```python\nimport octav_hf\n"
        f"from transformers import {architecture}\n"
        f'model = {architecture}.from_pretrained("{name}")\n```\n\n{_without_the_plugin(config)}',
        f"## Quantization\n\n{_table(('setting', 'value'), _settings(model, config))}\n\n{_coverage(model)}",
    ]
    if run.metrics:
        sections.append(f"## Evaluation\n\n{_evaluation(run)}")
    if run.recipe:
        sections.append(f"## Training\n\n{_table(('hyperparameter', 'value'), dict(run.recipe))}")
    sections.append(f"## Citation\n\n```bibtex\n{_CITATION}\n```")
    return "\n\n".join(sections)


def _introduction(architecture: str, config: OctavConfig, run: TrainingRun, base_model: str | None) -> str:
    if base_model is not None and _is_local(base_model):
        base_model = Path(base_model).name  # a path is nobody's business
    made_from = f", fine-tuned from `{base_model}`" if base_model else ""
    data = f" on {run.dataset}" if run.dataset else ""
    form = (
        "its weights are stored as integers of their own width with one scale per row"
        if config.packed
        else "its weights are stored in full precision, for training on, and quantized when it runs"
    )
    return (
        f"A `{architecture}`{made_from}{data} with quantization-aware training by octav_hf: weights at "
        f"{bits_in_words(config.weight_bits)}, activations at {bits_in_words(config.activation_bits)}; {form}."
    )


def _without_the_plugin(config: OctavConfig) -> str:
    if config.packed:
        return (
            "Without `import octav_hf` Transformers refuses to load it: the weights have another shape than it expects."
        )
    return "Without `import octav_hf` Transformers warns and loads the plain floating-point model."


def _settings(model: PreTrainedModel, config: OctavConfig) -> dict[str, str]:
    weight_clip = _clip(config.weight_clip, config.weight_clip_options)
    activation_clip = _clip(config.activation_clip, config.activation_clip_options)
    activations = f"{activation_clip} {_granularity(model)}, {_frozen(model)}"
    settings = {
        "weights": f"{bits_in_words(config.weight_bits)}, {weight_clip} per {config.weight_granularity}"
        + (", frozen" if config.frozen_weight_clips else ""),
        "activations": f"{bits_in_words(config.activation_bits)}, {activations}",
        "embeddings": bits_in_words(config.embedding_bits),
        "attention matmuls": "quantized" if config.quantize_attention and config.activation_bits else "floating point",
        "gradients": f"`{config.weight_gradient_estimator}` for weights, "
        f"`{config.activation_gradient_estimator}` for activations",
        "form": "packed" if config.packed else "training form",
    }
    if config.first_last_bits is not None:
        settings["first and last layer"] = bits_in_words(config.first_last_bits)
    if config.exclude_modules:
        settings["excluded"] = ", ".join(f"`{pattern}`" for pattern in config.exclude_modules)
    for pattern, override in config.module_overrides.items():
        settings[f"override for `{pattern}`"] = ", ".join(f"{field}={value}" for field, value in override.items())
    return settings


def _clip(rule: str, options: Mapping[str, Any]) -> str:
    given = "".join(f", {name}={value}" for name, value in options.items())
    return f"clip `{rule}`{given}"


def _granularity(model: PreTrainedModel) -> str:
    """What a clip of an activation is for, as it really is."""
    of_operands: dict[str, dict[str, None]] = {operand: {} for operand in ACTIVATION_GRANULARITIES}
    for row in _activations(model):
        of_operands[row.operand][row.granularity] = None
    if all(set(found) <= {"tensor"} for found in of_operands.values()):
        return "per tensor"
    words = (f"{operand} per {' or '.join(found)}" for operand, found in of_operands.items() if found)
    return f"({', '.join(words)})"


def _activations(model: PreTrainedModel) -> list[Operand]:
    return [row for row in coverage_report(model) if row.bits is not None and row.operand != "weight"]


def _frozen(model: PreTrainedModel) -> str:
    activations = _activations(model)
    frozen = sum(row.frozen for row in activations)
    if not frozen:
        return "recomputed at every forward pass"
    if frozen == len(activations):
        return "frozen after calibration"
    return f"frozen after calibration for {frozen} of {len(activations)} activations, recomputed for the others"


def _coverage(model: PreTrainedModel) -> str:
    return "\n".join(f"- {line}" for line in coverage_report(model).summary().splitlines())


def _evaluation(run: TrainingRun) -> str:
    header = ("metric", "this model") + (("FP32",) if run.fp32_metrics else ())
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for metric, value in run.metrics.items():
        cells = [_METRIC_NAMES.get(metric, metric), f"{value:.2f}"]
        if run.fp32_metrics:
            cells.append(f"{run.fp32_metrics[metric]:.2f}" if metric in run.fp32_metrics else "")
        lines.append(f"| {' | '.join(cells)} |")
    split = f", {run.dataset_split}" if run.dataset_split else ""
    where = f"On {run.dataset}{split}, computed with the quantized model:\n\n" if run.dataset else ""
    return where + "\n".join(lines)


def _table(header: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)


def bits_in_words(bits: int | None) -> str:
    """Such as ``4 bits``; ``None`` is floating point."""
    return "floating point" if bits is None else f"{bits} bits"
