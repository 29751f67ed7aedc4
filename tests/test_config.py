"""``OctavConfig``: JSON, errors with advice, and the settings of a module."""

import functools
import inspect
import json

import pytest
import torch
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig

from octav_hf import OctavConfig, apply_octav
from octav_hf._utils.escaping import shown
from octav_hf.functional import CLIP_RULES, mse_sweep_clip, octav_clip, percentile_clip
from octav_hf.functional.registry import ClipRule


def clips(operand: str, signed: object = True, clips: object = (1.0,)) -> dict:
    """A config's fields of format version 1 with frozen clips of one operand."""
    values = list(clips) if isinstance(clips, tuple) else clips
    return {"activation_clips": {"head": {operand: {"signed": signed, "clips": values}}}}


def granularity(operand: str, value: object) -> dict:
    """A config's field with the granularity of one operand."""
    return {"activation_granularity": {operand: value}}


def sweep(num_points: object) -> dict:
    """A config's fields with the rule that takes a number of points."""
    return {"weight_clip": "mse_sweep", "weight_clip_options": {"num_points": num_points}}


def percentile(value: object) -> dict:
    """A config's fields with a percentile for activations."""
    return {"activation_clip": "percentile", "activation_clip_options": {"percentile": value}}


def nested(depth: int) -> list:
    """An empty list in a list in a list."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_presets() -> None:
    assert OctavConfig.paper().to_dict() == OctavConfig().to_dict()
    accurate = OctavConfig.accurate(weight_bits=3, activation_clip="octav")
    assert (accurate.weight_bits, accurate.weight_clip, accurate.activation_clip) == (3, "mse", "octav")
    assert accurate.asymmetric_activations
    finest = {"input": "token", "query": "token", "key": "token", "probabilities": "token", "value": "channel"}
    assert accurate.activation_granularity == finest
    accurate.activation_granularity["value"] = "tensor"
    assert OctavConfig.accurate().activation_granularity == finest


def test_presets_of_groups() -> None:
    groups, ggml = OctavConfig.groups(), OctavConfig.ggml()
    accurate = OctavConfig.accurate()
    assert groups.weight_granularity == "group"
    assert groups.activation_granularity == {
        "input": "group",
        "query": "token",
        "key": "token",
        "probabilities": "group",
        "value": "group",
    }
    assert (groups.group_size, groups.weight_clip, groups.asymmetric_activations) == (64, "mse", True)
    assert (groups.weight_bits, groups.activation_bits) == (accurate.weight_bits, accurate.activation_bits) == (4, 4)
    assert (ggml.weight_bits, ggml.activation_bits, ggml.group_size) == (4, 8, 32)
    assert {*ggml.activation_granularity.values(), ggml.weight_granularity} == {"group"}
    assert not ggml.unsigned_activations
    assert not ggml.asymmetric_activations


def test_the_preset_for_onnxruntime_has_a_clip_per_tensor() -> None:
    config = OctavConfig.onnxruntime()
    assert (config.weight_bits, config.activation_bits, config.activation_clip) == (4, 8, "mse")
    assert config.activation_granularity == {}
    assert config.weight_granularity == "channel"
    assert OctavConfig.onnxruntime(activation_bits=4).activation_bits == 4


def test_defaults_are_the_papers_recipe() -> None:
    config = OctavConfig()
    assert (config.weight_bits, config.activation_bits) == (4, 4)
    assert (config.weight_clip, config.activation_clip) == ("octav", "octav")
    assert (config.weight_gradient_estimator, config.activation_gradient_estimator) == ("mad", "pwl")
    assert config.embedding_bits is None
    assert config.unsigned_activations
    assert not config.sync_activation_clips
    assert config.weight_granularity == "channel"
    assert config.first_last_bits is None
    assert config.activation_granularity == {}
    assert config.quantize_attention


def test_survives_json() -> None:
    config = OctavConfig(
        weight_bits=8,
        activation_bits=None,
        weight_clip="percentile",
        weight_clip_options={"percentile": 99.99},
        weight_gradient_estimator="ste",
        embedding_bits=6,
        weight_granularity="tensor",
        activation_granularity={"input": "token", "value": "channel"},
        unsigned_activations=False,
        sync_activation_clips=True,
        first_last_bits=8,
        quantize_attention=False,
        exclude_modules=["qa_outputs"],
        module_overrides={
            "encoder.*": {"weight_bits": 3},
            "encoder.1": {"activation_granularity": {"query": "attn_head"}},
        },
    )
    loaded = OctavConfig.from_dict(json.loads(config.to_json_string()))
    assert loaded.to_dict() == config.to_dict()
    assert loaded.to_dict()["quant_method"] == "octav"


def test_transformers_finds_it_by_quant_method() -> None:
    config = AutoQuantizationConfig.from_dict({"quant_method": "octav", "weight_bits": 5})
    assert isinstance(config, OctavConfig)
    assert config.weight_bits == 5


def test_from_dict_takes_changes_and_returns_the_rest() -> None:
    config, rest = OctavConfig.from_dict({"weight_bits": 5}, return_unused_kwargs=True, activation_bits=6, device="cpu")
    assert (config.weight_bits, config.activation_bits, rest) == (5, 6, {"device": "cpu"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unsigned_activations": "auto"}, "unsigned_activations must be True or False, got 'auto'"),
        ({"sync_activation_clips": 1}, "sync_activation_clips must be True or False, got 1"),
        (
            {"sync_activation_clips": True, "activation_clip": "mse_sweep"},
            "supports the activation clips 'max', 'mse', 'octav', 'percentile', but 'mse_sweep' cannot be",
        ),
        (
            {"sync_activation_clips": True, "module_overrides": {"head": {"activation_clip": "mse_sweep"}}},
            r"module_overrides\['head'\]: sync_activation_clips supports .* but 'mse_sweep' cannot be",
        ),
        ({"module_overrides": {"a": {"sync_activation_clips": True}}}, "cannot set 'sync_activation_clips'"),
        ({"activation_clip_options": {"skip": None}}, "'octav' has no option 'skip'"),
        ({"first_last_bits": 9}, "first_last_bits must be an integer from 2 to 8, or None"),
        ({"weight_granularity": "token"}, "weight_granularity cannot be 'token'; choose from 'channel', 'tensor'"),
        ({"activation_granularity": "token"}, r"activation_granularity must map operands to granularities, .*'token'"),
        (granularity("valeu", "attn_head"), "activation_granularity has no operand 'valeu'; did you mean 'value'"),
        (granularity("weight", "tensor"), "no operand 'weight'; choose from 'input', 'query', 'key'"),
        (
            granularity("value", "token"),
            "matmul with the probabilities sums over tokens, .*; write 'channel' or 'attn_head'",
        ),
        (granularity("input", "channel"), "matmul with the weight sums over channels, .*; write 'token' or 'tensor'"),
        (granularity("input", "attn_head"), "matmul with the weight .* different heads, .*; write 'token'"),
        (granularity("query", "channel"), "matmul with the key sums over channels, .*; write 'token' or 'attn_head'"),
        (granularity("key", "channel"), "matmul with the query sums over channels, .*; write 'token' or 'attn_head'"),
        (
            granularity("probabilities", "channel"),
            "matmul with the value sums over tokens, .*; write 'token' or 'attn_head'",
        ),
        (granularity("query", "tokens"), "of 'query' cannot be 'tokens'; did you mean 'token'"),
        (granularity("input", "row"), "of 'input' cannot be 'row'.* choose from 'tensor', 'token', 'group'"),
        ({"group_size": 48}, "group_size must be 32, 64 or 128, got 48"),
        ({"group_size": 64.0}, "group_size must be 32, 64 or 128, got 64.0"),
        ({"group_size": None}, "group_size must be 32, 64 or 128, got None"),
        (granularity("input", None), "of 'input' cannot be None"),
        (granularity("input", ["token"]), r"of 'input' cannot be \['token'\]"),
        (
            {"module_overrides": {"a": granularity("value", "token")}},
            r"module_overrides\['a'\]: .*of 'value' cannot be",
        ),
        ({"module_overrides": {"a": {"first_last_bits": 8}}}, "cannot set 'first_last_bits'"),
        ({"embedding_bits": 1}, "embedding_bits must be an integer from 2 to 8"),
        ({"weight_bit": 4}, "did you mean 'weight_bits'"),
        ({"weight_bits": 1}, "integer from 2 to 8"),
        ({"weight_bits": 9}, "integer from 2 to 8"),
        ({"activation_bits": 4.0}, "integer from 2 to 8"),
        ({"activation_bits": True}, "integer from 2 to 8"),
        ({"weight_bits": "4"}, "integer from 2 to 8"),
        ({"weight_bits": None, "activation_bits": None}, "nothing would be quantized"),
        ({"weight_clip": "octave"}, "did you mean 'octav'"),
        ({"activation_clip": "minmax"}, "choose from 'octav', 'mse', 'max', 'mse_sweep', 'percentile'"),
        ({"weight_gradient_estimator": "lsq"}, "choose from 'ste', 'pwl', 'mad'"),
        ({"weight_clip_options": {"percentile": 99}}, "'octav' has no option 'percentile'"),
        ({"activation_clip": "max", "activation_clip_options": {"x": 1}}, "'max' has no option 'x'"),
        ({"weight_clip_options": 3}, "dict of keyword arguments"),
        ({"weight_clip": "percentile", "weight_clip_options": {"percentile": 0}}, "above 0 and at most 100, got 0"),
        (
            {"activation_clip_options": {"max_iterations": -1}},
            "activation_clip_options: max_iterations must be",
        ),
        ({"activation_clip_options": {"max_iterations": 1001}}, "from 0 to 1000, or None .* got 1001; the paper uses"),
        ({"weight_clip_options": {"max_iterations": True}}, "max_iterations must be an integer .* got True"),
        (
            {"weight_clip_options": {"max_iterations": 10**5000}},
            "weight_clip_options: an integer of 16610 bits is too large; write",
        ),
        (sweep(10**9), "num_points must be an integer from 1 to 10000, got 1000000000; the paper uses 100"),
        (sweep(0), "num_points must be an integer from 1 to 10000, got 0"),
        (sweep(1e2), "num_points must be an integer from 1 to 10000, got 100.0"),
        (
            {"module_overrides": {"a": sweep(10**9)}},
            r"module_overrides\['a'\]: weight_clip_options: num_points must be",
        ),
        (percentile(float("nan")), "percentile must be above 0 and at most 100, got nan; a usual value is 99.9"),
        (percentile(float("inf")), "at most 100, got inf"),
        (percentile("99"), "at most 100, got '99'"),
        (percentile(True), "at most 100, got True"),
        (percentile(10**400), "activation_clip_options: 1000.*000 is too large; write an integer below"),
        ({"weight_clip_options": {3: 1}}, "'octav' has no option 3; choose from 'max_iterations'"),
        ({"weight_clip_options": {"max_iterations": nested(33)}}, "nested more than 32 deep; write them flatter"),
        ({"module_overrides": nested(100_000)}, "module_overrides: lists and dicts are nested more than 32 deep"),
        ({"module_overrides": {3: {}}}, "module_overrides: a name pattern must be a string, got 3"),
        ({f"field{index}": 1 for index in range(1000)}, "no field 'field0', .*, 'field4', ...; choose from"),
        ({"weight_clip": "\x1b[2J"}, r"weight_clip cannot be '\\x1b\[2J'"),
        ({"quantize_attention": "no"}, "True or False"),
        ({"exclude_modules": "qa_outputs"}, "list of name patterns"),
        ({"module_overrides": {"qa_outputs": 8}}, "must map fields to values"),
        ({"module_overrides": {"qa_outputs": {"bits": 8}}}, "cannot set 'bits'"),
        ({"module_overrides": {"qa_outputs": {"weight_bits": 16}}}, r"module_overrides\['qa_outputs'\].*2 to 8"),
        ({"activation_clips": {}}, "OctavConfig has no field 'activation_clips'; did you mean 'activation_clip'"),
    ],
    ids=shown,
)
def test_refuses_what_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OctavConfig(**fields)


def lowest(operand: str = "input", signed: bool = False, lowest: object = -0.1) -> dict:
    """The same of an asymmetric grid."""
    return {"activation_clips": {"head": {operand: {"signed": signed, "clips": [1.0], "lowest": lowest}}}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_clips": [1.0]}, r"activation_clips must be of the form \{'MODULE NAME'"),
        ({"activation_clips": {3: {}}}, r"activation_clips\[3\]: .*must be of the form"),
        ({"activation_clips": {"head": 1.0}}, r"activation_clips\['head'\]: .*must be of the form .*got 1.0"),
        (clips("weight"), "choose from input, query, key, probabilities, value"),
        ({"activation_clips": {"head": {"input": [1.0]}}}, r"\['head'\]\['input'\] must be \{'signed'"),
        ({"activation_clips": {"head": {"input": {"signed": True}}}}, r"must be \{'signed': True or False, 'clips'"),
        (clips("input", signed=None), "signed must be True or False, got None"),
        (clips("input", clips=1.0), "list of finite numbers >= 0, got 1.0"),
        (clips("query", clips=[]), r"list of finite numbers >= 0, got \[\]"),
        (clips("input", clips=[-1.0]), "list of finite numbers >= 0"),
        (clips("input", clips=[float("inf")]), "list of finite numbers >= 0"),
        (clips("input", clips=[float("nan")]), "list of finite numbers >= 0"),
        (clips("input", clips=[10**400]), "activation_clips: 1000.*000 is too large; write an integer below"),
        (clips("input", clips=[True]), "list of finite numbers >= 0"),
        (clips("query", clips=[[]]), "list of finite numbers >= 0"),
        (clips("query", clips=[[1.0, -1.0]]), "list of finite numbers >= 0"),
        (clips("query", clips=[[[1.0, 2.0], [3.0]]]), "lists of equal length"),
        (clips("query", clips=[[[1.0, 2.0], 3.0]]), "lists of equal length"),
        (clips("query", clips=[[1.0, 2.0], 3.0]), r"clips of all calls must have one shape, got \[\(\), \(2,\)\]"),
        (clips("query", clips=[("1.0",)]), "list of finite numbers >= 0"),
        (clips("input", clips=[[1.0, 2.0]]), r"a layer's input has one clip, got clips of shape \(2,\)"),
        (clips("input", clips=[1.0, 2.0]), "a layer's input has one clip, got 2"),
        (clips("probabilities", signed=True), "signed is True, but probabilities are always unsigned"),
        (clips("key", signed=False), "signed is False, but .*query, key and value signed"),
        (lowest(signed=True, lowest=-0.1), "offset is the lowest value of the unsigned grid of a layer's input"),
        (lowest(lowest=0.1), "a finite number below 0, got 0.1"),
        (lowest(lowest="low"), "got 'low'"),
        (lowest("query", signed=True, lowest=-0.1), "got -0.1 for 'query'"),
    ],
    ids=shown,
)
def test_clips_of_version_1_that_cannot_be_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OctavConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("rule", "option", "bad", "message"),
    [
        (octav_clip, "max_iterations", 1001, "max_iterations must be an integer from 0 to 1000"),
        (octav_clip, "max_iterations", True, "max_iterations must be an integer from 0 to 1000"),
        (mse_sweep_clip, "num_points", 10_001, "num_points must be an integer from 1 to 10000"),
        (mse_sweep_clip, "num_points", True, "num_points must be an integer from 1 to 10000"),
        (percentile_clip, "percentile", 100.5, "percentile must be above 0 and at most 100"),
        (percentile_clip, "percentile", None, "percentile must be above 0 and at most 100"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_rule_refuses_what_the_config_refuses(rule: ClipRule, option: str, bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(torch.ones(3), 4, **{option: bad})


def test_options_are_checked_without_running_the_rules_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("octav", "percentile", "mse_sweep"):
        rule = functools.wraps(CLIP_RULES[name])(lambda *_, **__: pytest.fail("it ran"))
        monkeypatch.setitem(CLIP_RULES, name, rule)
    OctavConfig(**sweep(10_000), **percentile(99))
    OctavConfig(weight_clip_options={"max_iterations": 1000})


def test_a_rule_of_ones_own_is_called_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(x: torch.Tensor, num_bits: int, *, signed: bool = True, dim: object = None, power: float) -> torch.Tensor:
        return x.abs().amax() / (1 - power)

    monkeypatch.setitem(CLIP_RULES, "mine", mine)
    assert OctavConfig(weight_clip="mine", weight_clip_options={"power": 2}).weight_clip == "mine"
    with pytest.raises(ValueError, match="weight_clip_options: .*'power'"):
        OctavConfig(weight_clip="mine")

    def broken(x: torch.Tensor, num_bits: int, **options: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(CLIP_RULES, "mine", broken)
    with pytest.raises(ValueError, match="weight_clip_options: no such kernel"):
        OctavConfig(weight_clip="mine")


@pytest.mark.parametrize(
    ("written_by", "quoted"),
    [
        ("0.9.0", True),
        ("1.2rc1.dev20260101", True),
        ("1; rm -rf ~", False),
        ("1' && curl evil", False),
        ("1\n", False),
        ("9" * 5, False),
        ("\u0661.0", False),
        (17, False),
        (None, False),
        (["1.0"], False),
    ],
    ids=ascii,
)
def test_a_version_is_quoted_if_it_is_one(written_by: object, quoted: bool) -> None:
    with pytest.raises(ValueError, match="format version 3") as caught:
        OctavConfig.from_dict({"format_version": 3, "octav_hf_version": written_by})
    remedy = str(caught.value).rpartition(": ")[2]
    assert remedy == (f"pip install --upgrade 'octav-hf>={written_by}'" if quoted else "pip install --upgrade octav-hf")
    assert (str(written_by) in str(caught.value).partition(";")[0]) is quoted


@pytest.mark.parametrize("version", [True, 0, -1, 1.0, "2", None, [2]], ids=str)
def test_a_format_version_that_is_none(version: object) -> None:
    with pytest.raises(ValueError, match="format_version .* must be an integer >= 1, got"):
        OctavConfig.from_dict({"format_version": version})


def test_a_format_version_of_many_digits() -> None:
    with pytest.raises(ValueError, match="format_version: an integer of 16610 bits is too large;"):
        OctavConfig.from_dict({"format_version": 10**5000})


OLD = {
    "weight_gradient": "ste",
    "activation_gradient": "mad",
    "shifted_activations": True,
    "weight_granularity": "row",
    "activation_granularity": {"query": "head", "value": "channel"},
    "module_overrides": {"a": {"weight_gradient": "pwl", "activation_granularity": {"key": "head"}}},
    "activation_clips": {"lowest": {"input": {"signed": False, "clips": [1.0], "lowest": -0.5}}},
}


@pytest.mark.parametrize("version", [{"format_version": 1}, {}], ids=["version 1", "before versions"])
def test_names_of_version_1_are_read_from_checkpoints(version: dict) -> None:
    config = OctavConfig.from_dict(OLD | version)
    assert config == OctavConfig(
        weight_gradient_estimator="ste",
        activation_gradient_estimator="mad",
        asymmetric_activations=True,
        weight_granularity="channel",
        activation_granularity={"query": "attn_head", "value": "channel"},
        module_overrides={"a": {"weight_gradient_estimator": "pwl", "activation_granularity": {"key": "attn_head"}}},
    )
    assert config.clips_of_version_1 == {"lowest": {"input": {"signed": False, "clips": [1.0], "offset": -0.5}}}
    assert "clips_of_version_1" not in config.to_dict()
    with pytest.raises(ValueError, match=r"format version 1 with frozen clips.* from_pretrained"):
        apply_octav(nn.Sequential(nn.Linear(2, 2)), config)


@pytest.mark.parametrize("field", list(OLD))
def test_names_of_version_1_are_refused_elsewhere(field: str) -> None:
    for make in (lambda: OctavConfig(**{field: OLD[field]}), lambda: OctavConfig.from_dict({field: OLD[field]} | V2)):
        with pytest.raises(ValueError, match="choose from"):
            make()


V2 = {"format_version": 2}


def test_a_config_keeps_nothing_of_what_it_is_made_from() -> None:
    overrides = {"a": {"weight_bits": 8}}
    config = OctavConfig(module_overrides=overrides)
    overrides["a"]["weight_bits"] = 2
    assert config.module_overrides == {"a": {"weight_bits": 8}}


def test_its_signature_is_that_of_its_fields() -> None:
    arguments = inspect.signature(OctavConfig).bind(3, activation_bits=8).arguments
    assert arguments == {"weight_bits": 3, "activation_bits": 8}


def test_another_methods_config_is_refused() -> None:
    with pytest.raises(ValueError, match="'gptq'"):
        OctavConfig.from_dict({"quant_method": "gptq"})


def test_override_reaches_a_module_and_all_below_it() -> None:
    config = OctavConfig(module_overrides={"encoder.layer.0": {"weight_bits": 8}})
    assert config.settings_for(["encoder.layer.0.attention.query"])["encoder.layer.0.attention.query"].weight_bits == 8
    assert config.settings_for(["encoder.layer.0"])["encoder.layer.0"].weight_bits == 8
    assert config.settings_for(["encoder.layer.01"])["encoder.layer.01"].weight_bits == 4
    assert config.settings_for(["encoder.layer.1"])["encoder.layer.1"].weight_bits == 4


def test_operands_that_are_left_out_have_one_clip() -> None:
    config = OctavConfig(
        activation_granularity={"value": "attn_head"}, module_overrides={"a": granularity("key", "token")}
    )
    operands = ("input", "query", "key", "probabilities", "value")
    assert [config.settings_for(["b"])["b"].granularity(operand) for operand in operands] == ["tensor"] * 4 + [
        "attn_head"
    ]
    assert [config.settings_for(["a"])["a"].granularity(operand) for operand in operands] == [
        *("tensor", "tensor", "token", "tensor", "tensor")
    ]


def test_exact_name_wins_over_a_pattern() -> None:
    overrides = {"head": {"weight_bits": 8}, "h*": {"weight_bits": 2, "activation_bits": 3}}
    for order in (1, -1):
        config = OctavConfig(module_overrides=dict(list(overrides.items())[::order]))
        settings = config.settings_for(["head"])["head"]
        assert (settings.weight_bits, settings.activation_bits) == (8, 3)


def test_contradicting_patterns_are_refused() -> None:
    config = OctavConfig(module_overrides={"enc*": {"weight_bits": 8}, "*.query": {"weight_bits": 2}})
    with pytest.raises(ValueError, match=r"'enc\*' and '\*\.query' both match 'encoder.query'"):
        config.settings_for(["encoder.query"])["encoder.query"]
