"""The script from end to end, on a tiny random BERT and the generated questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import compare_rules
import measure_clips
import pytest
import torch
from huggingface_hub import ModelCard
from run_squad import main
from safetensors.torch import load_file
from squad_files import DATA, question, write_squad
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, BertForQuestionAnswering

from octav_hf.export import verify_onnx
from tests.twins import octav_clip_twin

SIZES = ["--max_seq_length", "128", "--doc_stride", "32", "--use_cpu"]


def arguments(model: str, folder: Path, *words: str) -> list[str]:
    data = ["--train_file", str(DATA / "train.json"), "--validation_file", str(DATA / "dev.json")]
    training = ["--per_device_train_batch_size", "4", "--max_train_samples", "24", "--max_eval_samples", "12"]
    return ["--model_name_or_path", model, "--output_dir", str(folder), *data, *SIZES, *training, *words]


def test_train_and_evaluate(tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    metrics = main(arguments(tiny_model, folder, "--do_train", "--do_eval", "--max_steps", "4"))
    saved = json.loads((folder / "all_results.json").read_text())
    assert saved["eval_f1"] == metrics["eval_f1"]
    assert saved["train_step_seconds_median"] > 0
    assert (saved["train_samples"], saved["eval_samples"]) == (24, 12)
    for name in ("train_results.json", "eval_results.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert (folder / name).is_file()
    texts = json.loads((folder / "eval_predictions.json").read_text())
    assert len(texts) == 12
    again = main(arguments(str(folder), tmp_path / "again", "--do_eval"))
    assert again["eval_f1"] == metrics["eval_f1"]
    assert json.loads((tmp_path / "again/eval_predictions.json").read_text()) == texts


def test_grouping_by_length_does_not_mix_up_the_answers(tiny_model: str, tmp_path: Path) -> None:
    plain = arguments(tiny_model, tmp_path / "a", "--do_eval")
    grouped = arguments(tiny_model, tmp_path / "b", "--do_eval", "--train_sampling_strategy", "group_by_length")
    main(plain)
    main([*grouped, "--pad_to_max_length", "false", "--per_device_eval_batch_size", "2"])
    texts = [json.loads((tmp_path / name / "eval_predictions.json").read_text()) for name in "ab"]
    assert texts[0] == texts[1]


def test_resume_gives_the_uninterrupted_weights(tiny_model: str, tmp_path: Path) -> None:
    steps = ["--do_train", "--max_steps", "4", "--save_steps", "2"]
    main(arguments(tiny_model, tmp_path / "out", *steps))
    whole = load_file(tmp_path / "out/model.safetensors")
    (tmp_path / "out/model.safetensors").unlink()
    checkpoint = str(tmp_path / "out/checkpoint-2")
    metrics = main(arguments(tiny_model, tmp_path / "out", *steps, "--resume_from_checkpoint", checkpoint))
    resumed = load_file(tmp_path / "out/model.safetensors")
    assert metrics["epoch"] == pytest.approx(4 / 6)
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


def test_last_goes_on_from_the_newest_whole_checkpoint(
    tiny_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same command launched three times: first, after a kill while saving step 4, and after the end."""
    folder = tmp_path / "out"
    words = ["--do_train", "--max_steps", "4", "--save_steps", "1", "--resume_from_checkpoint", "last", "--quantize"]
    main(arguments(tiny_model, folder, *words))
    finished = load_file(folder / "model.safetensors")
    for name in ("model.safetensors", "config.json", "checkpoint-4/trainer_state.json"):
        (folder / name).unlink()
    caplog.clear()
    for start in (3, 4):
        with caplog.at_level("INFO"):
            main(arguments(tiny_model, folder, *words))
        assert f"Training starts from {folder / f'checkpoint-{start}'}" in caplog.text
        resumed = load_file(folder / "model.safetensors")
        for name, weight in finished.items():
            torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)
    assert caplog.text.count("Skipped") == 1


def test_v2_questions(tiny_model: str, tmp_path: Path) -> None:
    empty = {"id": "q2", "question": "Who?", "answers": [], "is_impossible": True}
    path = str(write_squad(tmp_path / "v2.json", question(), empty))
    words = [
        "--model_name_or_path",
        tiny_model,
        "--output_dir",
        str(tmp_path / "out"),
        *SIZES,
        "--do_train",
        "--do_eval",
    ]
    words += ["--train_file", path, "--validation_file", path, "--max_steps", "1", "--version_2_with_negative"]
    metrics = main([*words, "--null_score_diff_threshold=-1e9"])
    assert (metrics["eval_NoAns_exact"], metrics["eval_HasAns_exact"]) == (100.0, 0.0)
    assert set(json.loads((tmp_path / "out/eval_null_odds.json").read_text())) == {"q1", "q2"}


def test_best_model_by_f1(tiny_model: str, tmp_path: Path) -> None:
    words = ["--do_train", "--do_eval", "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1"]
    words += ["--save_steps", "1", "--load_best_model_at_end", "--metric_for_best_model", "f1"]
    main(arguments(tiny_model, tmp_path / "out", *words))
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    scores = [entry["eval_f1"] for entry in state["log_history"] if "eval_f1" in entry]
    assert state["best_metric"] == max(scores[:2])


def test_quantized_run_and_reload(tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = ["--do_train", "--do_eval", "--max_steps", "2"]
    metrics = main(arguments(tiny_model, folder, *words, "--quantize", "--activation_bits", "8"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["weight_bits"], config["activation_bits"]) == ("octav", 4, 8)
    again = main(arguments(str(folder), tmp_path / "again", "--do_eval"))
    assert again["eval_f1"] == metrics["eval_f1"]
    with pytest.raises(ValueError, match="already quantized"):
        main(arguments(str(folder), tmp_path / "twice", *words, "--quantize"))


@pytest.mark.parametrize("words", [[], ["--log_quantization", "false"]], ids=["by-default", "off"])
def test_a_quantized_run_logs_what_quantization_does(tiny_model: str, tmp_path: Path, words: list[str]) -> None:
    logging = ["--logging_steps", "1", "--save_strategy", "no"]
    main(arguments(tiny_model, tmp_path / "out", "--do_train", "--max_steps", "1", "--quantize", *logging, *words))
    (first, *_) = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert "loss" in first
    assert ("octav/weight_sqnr_db_mean" in first) is not bool(words)


def test_pack_writes_what_scores_the_same_and_a_card(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "fp32.json").write_text(json.dumps({"eval_f1": 90.125, "eval_exact_match": 80.0}))
    words = ["--do_train", "--do_eval", "--max_steps", "2", "--quantize", "--pack"]
    folder = tmp_path / "out"
    metrics = main(arguments(tiny_model, folder, *words, "--fp32_results", str(tmp_path / "fp32.json")))
    assert metrics["packed_f1"] == metrics["eval_f1"]
    assert metrics["packed_exact_match"] == metrics["eval_exact_match"]
    for prefix in ("", "nbest_"):
        texts = [json.loads((folder / f"{name}_{prefix}predictions.json").read_text()) for name in ("eval", "packed")]
        assert texts[0] == texts[1]
    names = {path.name for path in (folder / "packed").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "octav_run.json"} <= names
    for where, form in ((folder, "training form"), (folder / "packed", "packed")):
        card = ModelCard.load(where / "README.md")
        assert f"| form | {form} |" in card.text
        assert f"| F1 | {metrics['eval_f1']:.2f} | 90.12 |" in card.text
        assert {r.metric_type: r.metric_value for r in card.data.eval_results}["f1"] == metrics["eval_f1"]
        assert "| learning rate | 5e-05 |" in card.text
        assert "base_model" not in card.data.to_dict()  # a folder is no repository
    again = main(arguments(str(folder / "packed"), tmp_path / "again", "--do_eval"))
    assert again["eval_f1"] == metrics["eval_f1"]


def test_integers_give_the_scores_of_their_exact_products(tiny_model: str, tmp_path: Path) -> None:
    words = ["--do_train", "--max_steps", "2", "--quantize", "--activation_bits", "8", "--static_clip_batches", "2"]
    main(arguments(tiny_model, tmp_path / "out", *words))
    with pytest.raises(ValueError, match="--also_evaluate goes with --do_eval"):
        main(arguments(tiny_model, tmp_path / "out2", *words, "--also_evaluate", "integer"))
    folder = tmp_path / "evaluated"
    metrics = main(arguments(str(tmp_path / "out"), folder, "--do_eval", "--also_evaluate", "integer", "reference"))
    assert metrics["integer_f1"] == metrics["reference_f1"]
    integer, reference, simulated = (
        json.loads((folder / f"{name}_nbest_predictions.json").read_text()) for name in ("integer", "reference", "eval")
    )
    assert {name: [each["offsets"] for each in lists] for name, lists in integer.items()} == {
        name: [each["offsets"] for each in lists] for name, lists in reference.items()
    }
    assert integer != simulated  # which rounds the sums that these two have exactly


def frozen_clips(folder: Path) -> dict[str, list[float]]:
    """The frozen clips of activations in a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    return {name: clip.tolist() for name, clip in tensors.items() if name.endswith("clips") and "weight_" not in name}


def test_calibration_freezes_clips_before_evaluation(tiny_model: str, tmp_path: Path) -> None:
    words = ["--do_train", "--do_eval", "--max_steps", "2", "--quantize"]
    dynamic = main(arguments(tiny_model, tmp_path / "dynamic", *words))
    frozen = main(arguments(str(tmp_path / "dynamic"), tmp_path / "a", "--do_eval", "--calibration_batches", "3"))
    with pytest.raises(ValueError, match="--export_onnx needs static clips"):
        main(arguments(tiny_model, tmp_path / "b", *words, "--export_onnx"))
    words += ["--calibration_batches", "3", "--export_onnx", "--pack"]
    at_once = main(arguments(tiny_model, tmp_path / "b", *words))
    words = ["--do_eval", "--calibration_batches", "3", "--calibration_observer", "histogram"]
    main(arguments(str(tmp_path / "dynamic"), tmp_path / "c", *words))
    found = [frozen_clips(tmp_path / name) for name in ("dynamic", "a", "b", "b/packed", "c")]
    assert [len(clips) for clips in found] == [0, *[13 + 2 * 4] * 4]
    assert found[4] != found[1]
    assert found[2] == found[3]
    assert {"eval_f1", "eval_exact_match"} <= set(frozen) & set(dynamic)
    assert at_once["packed_f1"] == at_once["eval_f1"]
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "b")
    inputs = dict(AutoTokenizer.from_pretrained(tmp_path / "b/onnx")("Who?", "Ada, in London.", return_tensors="pt"))
    assert verify_onnx(model, tmp_path / "b/onnx", inputs).integer_products == 13 + 2 * 2


def test_static_clips_come_from_before_training(tiny_model: str, tmp_path: Path) -> None:
    words = ["--do_train", "--quantize", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "0.01"]
    static = [*words, "--static_clip_batches", "3"]
    main(arguments(tiny_model, tmp_path / "out", *static))
    start, end = (load_file(Path(folder) / "model.safetensors") for folder in (tiny_model, tmp_path / "out"))
    layer = "bert.encoder.layer.1.output.dense"
    assert not torch.equal(start[f"{layer}.weight"], end[f"{layer}.weight"])
    for row, clip in zip(start[f"{layer}.weight"], end[f"{layer}.weight_quantizer.clips"], strict=True):
        assert clip.item() == pytest.approx(octav_clip_twin(row, 4), rel=1e-5)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["frozen_weight_clips"]
    assert len(frozen_clips(tmp_path / "out")) == 13 + 2 * 4

    # resumed, the run calibrates again, from the weights that it began with
    (tmp_path / "out/model.safetensors").unlink()
    main(
        arguments(tiny_model, tmp_path / "out", *static, "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-2"))
    )
    resumed = load_file(tmp_path / "out/model.safetensors")
    assert resumed.keys() == end.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in end.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == config


def test_static_clips_leave_the_order_of_questions_alone(tiny_model: str, tmp_path: Path) -> None:
    """At learning rate 0, the losses of the first steps identify the questions; 8 bits hardly change them."""
    words = ["--do_train", "--quantize", "--weight_bits", "8", "--activation_bits", "8", "--learning_rate", "0"]
    words += ["--max_steps", "4", "--logging_steps", "1"]
    losses = []
    for name, more in (("dynamic", []), ("static", ["--static_clip_batches", "2"])):
        main(arguments(tiny_model, tmp_path / name, *words, *more))
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert max(losses[0]) - min(losses[0]) > 2e-2  # the batches differ by far more than that


def test_static_clips_that_are_refused(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--static_clip_batches must be at least 1, not 0"):
        main(arguments(tiny_model, tmp_path / "out", "--do_train", "--quantize", "--static_clip_batches", "0"))
    with pytest.raises(ValueError, match="--static_clip_batches would be ignored: add --quantize"):
        main(arguments(tiny_model, tmp_path / "out", "--do_train", "--static_clip_batches", "3"))
    with pytest.raises(ValueError, match="--calibration_observer would be ignored: add --calibration_batches or"):
        main(arguments(tiny_model, tmp_path / "out", "--do_train", "--quantize", "--calibration_observer", "mean"))


def test_output_without_a_quantized_model_is_refused(tiny_model: str, tmp_path: Path) -> None:
    for words in (["--pack"], ["--calibration_batches", "2"]):
        with pytest.raises(ValueError, match=f"{words[0]} needs a quantized model"):
            main(arguments(tiny_model, tmp_path / "out", "--do_train", *words))
    with pytest.raises(ValueError, match="must be at least 1"):
        main(arguments(tiny_model, tmp_path / "out", "--do_train", "--calibration_batches", "0"))
    for content in ("{", "{}", '{"eval_f1": 1}', None):
        path = tmp_path / "results.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match=r"results\.json is not an all_results\.json"):
            main(arguments(tiny_model, tmp_path / "out", "--do_train", "--fp32_results", str(path)))
    assert not (tmp_path / "out").exists()


def test_distilled_from_itself_a_float_model_does_not_change(tiny_model: str, tmp_path: Path) -> None:
    """Labels would change the float model; a quantized model does learn, and its card names the teacher."""
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    without_dropout = tmp_path / "start"
    shutil.copytree(tiny_model, without_dropout)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (without_dropout / "config.json").write_text(json.dumps(config | no_dropout))
    words = ["--do_train", "--do_eval", "--max_steps", "2", "--optim", "sgd", "--learning_rate", "0.1"]
    start = load_file(without_dropout / "model.safetensors")
    moved = {}
    for name, more in (
        ("answers", []),
        ("float", ["--distill_from", str(without_dropout)]),
        ("quantized", ["--distill_from", str(without_dropout), "--quantize"]),
    ):
        metrics = main(arguments(str(without_dropout), tmp_path / name, *words, *more))
        end = load_file(tmp_path / name / "model.safetensors")
        assert end.keys() == start.keys()
        moved[name] = max((end[key] - start[key]).abs().max().item() for key in start)
        assert "eval_f1" in metrics
    assert moved["float"] < 1e-6 < 1e-4 < moved["answers"]
    assert moved["quantized"] > 1e-6
    run = json.loads((tmp_path / "quantized/octav_run.json").read_text())
    assert run["recipe"]["distilled from"] == "./start"
    assert "| distilled from | ./start |" in (tmp_path / "quantized/README.md").read_text()


def test_features_groups_and_least_squares_in_one_run(tiny_model: str, tmp_path: Path) -> None:
    """The reported checkpoint size is that of the packed form."""
    groups = json.dumps({"input": "group", "probabilities": "group", "value": "group"})
    words = ["--do_train", "--do_eval", "--max_steps", "2", "--quantize", "--pack", "--reconstruct_batches", "2"]
    words += ["--weight_granularity", "group", "--group_size", "32", "--activation_granularity", groups]
    words += ["--distill_from", tiny_model, "--distill_weight", "0.5", "--distill_temperature", "1"]
    words += ["--distill_hidden_states", "1", "--distill_attentions", "1", "--distill_layers", "0", "-1"]
    metrics = main(arguments(tiny_model, tmp_path / "out", *words, "--distill_feature_steps", "0.5"))
    packed = load_file(tmp_path / "out/packed/model.safetensors")
    assert metrics["checkpoint_bytes"] == sum(tensor.nbytes for tensor in packed.values())
    assert metrics["packed_f1"] == metrics["eval_f1"]
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["weight_granularity"], config["group_size"]) == ("group", 32)


def test_learned_clips_are_learned(tiny_model: str, tmp_path: Path) -> None:
    words = ["--do_train", "--quantize", "--max_steps", "2", "--learning_rate", "0.01", "--static_clip_batches", "2"]
    main(arguments(tiny_model, tmp_path / "out", *words, "--learned_clips", "true"))
    corrections = [t for n, t in load_file(tmp_path / "out/model.safetensors").items() if n.endswith("clip_correction")]
    assert len(corrections) == 13 + 2 * 4
    assert any(tensor.abs().max() > 0 for tensor in corrections)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distill_attentions", "1"], "--distill_attentions would be ignored: add --distill_from"),
        (["--quantize", "--learned_clips", "true"], "--learned_clips corrects static clips: add --static_clip_batches"),
        (["--reconstruct_batches", "3"], "--reconstruct_batches would be ignored: add --quantize"),
        (["--quantize", "--reconstruct_batches", "0"], "--reconstruct_batches must be at least 1, not 0"),
    ],
)
def test_parts_of_a_recipe_that_do_not_go_together(
    tiny_model: str, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments(tiny_model, tmp_path / "out", "--do_train", *words))
    assert not (tmp_path / "out").exists()


def test_windows_longer_than_the_positions_are_refused_before_any_work(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For models whose tokenizer has no limit."""
    monkeypatch.setattr("squad_task.data_arguments.DataArguments.load", lambda *args: pytest.fail("the data were read"))
    for name, positions in (("long", 128), ("short", 64)):
        config = AutoConfig.from_pretrained(tiny_model, max_position_embeddings=positions)
        BertForQuestionAnswering(config).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_model, model_max_length=10**30).save_pretrained(tmp_path / name)
    long, short = str(tmp_path / "long"), str(tmp_path / "short")
    for words, message in (
        ([short, "--do_train", "--quantize"], "--max_seq_length 128 exceeds the 64 tokens that the model.*at most 64"),
        ([long, "--do_train", "--distill_from", short], "128 exceeds the 64 tokens that the teacher.*at most 64"),
        ([long, "--do_eval", "--max_seq_length", "129"], "129 exceeds the 128 tokens that the model.*at most 128"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments(words[0], tmp_path / "out", *words[1:]))
    batch = ["--model_name_or_path", short, "--train_file", str(DATA / "train.json"), "--max_seq_length", "65"]
    for script in (measure_clips, compare_rules):
        with pytest.raises(ValueError, match="--max_seq_length 65 exceeds the 64 tokens that the model"):
            script.main([*batch, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_another_vocabulary_is_refused(tiny_model: str, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["octav"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(ValueError, match="--distill_from .*teacher uses other token ids than .*same vocabulary"):
        main(arguments(tiny_model, tmp_path / "out", "--do_train", "--distill_from", str(teacher)))
    assert not (tmp_path / "out").exists()
