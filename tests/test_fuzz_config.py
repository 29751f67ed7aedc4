"""Hypothesis tests of the config parser: any JSON gives a config that round-trips, or an error with the field."""

from __future__ import annotations

import json
from dataclasses import fields

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octav_hf import OctavConfig

fuzz = settings(
    max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

FIELDS = [entry.name for entry in fields(OctavConfig) if entry.init]
NAMES = [*FIELDS, "format_version", "octav_hf_version", "quant_method", "no_such_field"]


def nested(value: list) -> list:
    """In more lists than a config may have."""
    for _ in range(40):
        value = [value]
    return value


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10)
    | st.sampled_from([10**9, -(2**63), 10**400])
    | st.floats()
    | st.just([]).map(nested)
    | st.text(max_size=5)
    | st.sampled_from(["octav", "max", "channel"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=6,
)
rules = ["octav", "max", "mse", "percentile", "mse_sweep"]
options = st.dictionaries(
    st.sampled_from(["max_iterations", "percentile", "num_points", "x"]),
    st.integers(-1, 101) | st.integers() | st.floats() | st.none() | st.booleans(),
    max_size=1,
)
bits = st.none() | st.integers(0, 9)
names = st.sampled_from(["qa_outputs", "*.query", "bert.*", "", "[", "[z-a]", "*?" * 17, "a" * 501, "\x1b[2J"])
numbers = st.floats(-1, 5) | st.just(float("nan"))
frozen = st.fixed_dictionaries(
    {
        "signed": st.booleans(),
        "clips": st.lists(numbers | st.lists(numbers | st.lists(numbers), max_size=2), max_size=2),
    }
)
# Values that are nearly right go deeper than any JSON.
PLAUSIBLE = {
    "weight_bits": bits,
    "activation_bits": bits,
    "embedding_bits": bits,
    "first_last_bits": bits,
    "weight_clip": st.sampled_from([*rules, "ocatv"]),
    "weight_clip_options": options,
    "activation_clip": st.sampled_from(rules),
    "activation_clip_options": options,
    "activation_gradient_estimator": st.sampled_from(["mad", "pwl", "ste", "none"]),
    "module_overrides": st.dictionaries(names, st.dictionaries(st.sampled_from(FIELDS), bits, max_size=2), max_size=2),
    "exclude_modules": st.lists(names, max_size=2) | names,
    "activation_clips": st.dictionaries(
        names,
        st.dictionaries(st.sampled_from(["input", "query", "probabilities", "weight"]), frozen, max_size=2),
        max_size=2,
    ),
    "activation_granularity": st.dictionaries(
        st.sampled_from(["input", "query", "value", "weight"]),
        st.sampled_from(["tensor", "token", "attn_head", "channel", "group"]) | st.none(),
        max_size=2,
    ),
    "packed": st.booleans(),
    "format_version": st.integers(0, 3),
}


def parse(values: dict) -> OctavConfig | ValueError:
    """The config or the error; other exceptions fail the test."""
    try:
        return OctavConfig.from_dict(values)
    except ValueError as error:
        refused = error
    assert str(refused).isprintable()
    assert len(str(refused)) < 5000
    return refused


def check(values: dict) -> None:
    """An accepted config round-trips, also through JSON."""
    config = parse(values)
    if not isinstance(config, OctavConfig):
        return
    written = json.loads(json.dumps(config.to_dict()))
    again = OctavConfig.from_dict(written)
    assert again.to_dict() == config.to_dict() == OctavConfig.from_dict(config.to_dict()).to_dict()
    for name, value in values.items():
        if name in FIELDS and value is not None:
            assert written[name] == json.loads(json.dumps(value)), name


@fuzz
@given(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=4))
def test_any_json(values: dict) -> None:
    check(values)


@fuzz
@given(st.fixed_dictionaries({}, optional=PLAUSIBLE))
def test_what_is_nearly_right(values: dict) -> None:
    check(values)


@fuzz
@given(st.sampled_from(FIELDS), json_values)
def test_an_error_names_the_field(field: str, value: object) -> None:
    result = parse({field: value})
    assert isinstance(result, OctavConfig) or field in str(result)
