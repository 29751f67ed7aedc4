"""The coverage report is complete and has a reason for every operand in float."""

from collections.abc import Callable

from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, coverage_report

MakeBert = Callable[..., BertForQuestionAnswering]


def test_lists_every_operand_with_its_quantizer(small_bert: MakeBert) -> None:
    config = OctavConfig(weight_bits=3, activation_bits=5, weight_clip="max", activation_gradient_estimator="ste")
    report = coverage_report(apply_octav(small_bert(), config))
    rows = {(row.module, row.operand): row for row in report}
    weight = rows["bert.encoder.layer.0.attention.self.query", "weight"]
    assert (weight.bits, weight.clip, weight.gradient_estimator, weight.granularity, weight.signed) == (
        3,
        "max",
        "mad",
        "channel",
        True,
    )
    probabilities = rows["bert.encoder.layer.1.attention.self", "probabilities"]
    assert (probabilities.bits, probabilities.clip, probabilities.gradient_estimator) == (5, "octav", "ste")
    assert (probabilities.granularity, probabilities.signed) == ("tensor", False)
    assert len(report.quantized("linear")) == 2 * (2 * 6 + 1)
    assert len(report.quantized("attention")) == 2 * 4
    assert {(row.kind, row.reason) for row in report.left_in_float()} == {("embedding", "embedding_bits is None")}


def test_gives_the_reason_for_what_is_left_in_float(small_bert: MakeBert) -> None:
    config = OctavConfig(
        exclude_modules=["qa_*"],
        module_overrides={
            "bert.encoder.layer.0.attention.self": {"quantize_attention": False},
            "bert.encoder.layer.1.attention": {"activation_bits": None},
            "bert.encoder.layer.1.output": {"activation_bits": None, "weight_bits": None},
        },
    )
    rows = {(row.module, row.operand): row for row in coverage_report(apply_octav(small_bert(), config))}
    assert rows["qa_outputs", "weight"].reason == "excluded by 'qa_*'"
    assert rows["bert.encoder.layer.0.attention.self", "key"].reason == "quantize_attention is False"
    assert rows["bert.encoder.layer.1.attention.self", "key"].reason == "activation_bits is None"
    assert rows["bert.encoder.layer.1.attention.self.query", "input"].reason == "activation_bits is None"
    assert rows["bert.encoder.layer.1.attention.self.query", "weight"].bits == 4
    assert rows["bert.encoder.layer.1.output.dense", "weight"].reason == "weight_bits and activation_bits are None"
    assert all(row.reason for row in rows.values() if row.bits is None)


def test_of_a_float_model_says_so(small_bert: MakeBert) -> None:
    report = coverage_report(small_bert())
    assert report.summary().startswith("0 of 26 linear operands quantized\n0 of 8 attention operands quantized")
    assert "apply_octav was not called" in report.summary()


def test_prints_a_table(small_bert: MakeBert) -> None:
    text = str(coverage_report(apply_octav(small_bert(), OctavConfig(exclude_modules=["qa_outputs"]))))
    lines = [line.split() for line in text.splitlines()]
    assert [
        "bert.encoder.layer.0.attention.self",
        "probabilities",
        "4",
        "unsigned",
        "octav",
        "per",
        "tensor",
        "pwl",
    ] in lines
    assert ["qa_outputs", "input", "float", "excluded", "by", "'qa_outputs'"] in lines
    assert "24 of 26 linear operands quantized" in text
