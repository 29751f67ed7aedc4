"""``OctavConfig``: what to quantize, to how many bits, with which clips and gradient estimators."""
# ruff: noqa: RUF009  # _field returns a dataclass field

import copy
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from functools import partial
from typing import Any, ClassVar

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._utils.escaping import escaped, shown
from ._utils.name_patterns import NamePatterns, validate_patterns
from ._version import __version__
from .functional import CLIP_RULES, GradientEstimator
from .functional.grid import MAX_BITS, MIN_BITS
from .functional.registry import OPTION_CHECKS, RULE_ARGUMENTS, poolable_rules
from .nn.clips_of_version_1 import ClipsOfVersion1, validate_activation_clips
from .nn.granularity import (
    ACTIVATION_GRANULARITIES,
    FINEST,
    GROUP_SIZES,
    WEIGHT_GRANULARITIES,
    Granularity,
    unsupported_reason,
)

QUANT_METHOD = "octav"

FORMAT_VERSION = 2
"""Version of the checkpoint format: config, tensor names and layout. Earlier versions can be read."""

# Field -> what None means, for the error message.
_BITS = {
    "weight_bits": "to leave weights in float",
    "activation_bits": "to leave activations in float",
    "embedding_bits": "to leave embeddings in float",
    "first_last_bits": "to treat the first and the last layer like the others",
}

# Closed choices; clip rules are not among them, because others can be registered.
_CHOICES: dict[str, tuple[StrEnum, ...]] = {
    "weight_granularity": WEIGHT_GRANULARITIES,
    "weight_gradient_estimator": tuple(GradientEstimator),
    "activation_gradient_estimator": tuple(GradientEstimator),
}
WRITTEN_FIELDS = ("packed", "frozen_weight_clips")
"""Fields that are written from the modules of a model; users do not set them."""
_PATTERN_LISTS = ("exclude_modules", "target_modules", "attention_modules")
_MAX_NAMES = 5  # listed in a message
_MAX_INTEGER_BITS = 64
_MAX_DEPTH = 32  # of nested lists and dicts
_VERSION_NUMBER = re.compile(r"\d{1,4}(\.\d{1,8}){0,4}((a|b|rc)\d{1,4})?(\.post\d{1,4})?(\.dev\d{1,8})?", re.ASCII)


def _field(default: Any, help: str) -> Any:
    """A config field with its help text, which the documentation's table and ``run_squad.py --help`` show too."""
    metadata = {"help": help}
    if isinstance(default, dict | list):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(repr=False)
class ModuleSettings:
    """How one module is quantized: the fields of ``OctavConfig`` that ``module_overrides`` can set."""

    weight_bits: int | None = _field(4, "2 to 8; `None` leaves weights in float.")
    activation_bits: int | None = _field(
        4, "2 to 8; `None` leaves activations, the operands of attention matmuls included, in float."
    )
    embedding_bits: int | None = _field(
        None,
        "2 to 8 also quantizes embedding tables (every `nn.Embedding`), with one clip per row and the clip rule and "
        "gradient estimator of weights; a tied head still quantizes the shared weight itself. `None` leaves them in "
        "float, as in the paper.",
    )
    weight_clip: str = _field(
        "octav",
        'Clip rule of weights: `"octav"`, `"mse"`, `"max"`, `"percentile"`, `"mse_sweep"`, or a rule of your own '
        "(`functional.register_clip_rule`).",
    )
    activation_clip: str = _field("octav", "Clip rule of activations; the same choices.")
    weight_clip_options: dict[str, Any] = _field(
        {}, 'Keyword arguments of the rule for weights, such as `{"max_iterations": 10}` for `"octav"`.'
    )
    activation_clip_options: dict[str, Any] = _field(
        {}, 'The same for activations, such as `{"percentile": 99.99}` for `"percentile"`.'
    )
    weight_granularity: Granularity = _field(
        Granularity.CHANNEL,
        'Which part of a weight shares a clip: `"channel"`, an output feature or channel; `"tensor"`, the whole '
        "weight, as in the paper for the linear layers of ResNets and MobileNets; "
        '`"group"`, `group_size` consecutive elements of a row. Groups are for linear layers; convolutions then have '
        "one clip per channel.",
    )
    activation_granularity: dict[str, str] = _field(
        {},
        "Operand → which part of it shares a clip; an operand that is not listed has one clip per tensor, as in the "
        'paper. `"input"` of linear layers: `"token"`, one clip per row. `"query"`, `"key"`, `"probabilities"`: '
        '`"attn_head"`, one per sample and head, or `"token"`, one per token and head. `"value"`: `"attn_head"`, or '
        '`"channel"`, one per sample, head and channel. Any of them: `"group"`, one per `group_size` consecutive '
        "elements along the contracted dimension of the matmul. The scale must factor out of the matmul, or out of the "
        "matmul of each group; other choices are refused with the reason. The input of a convolution has one clip per "
        "tensor.",
    )
    group_size: int = _field(
        64,
        'Elements per group where a granularity is `"group"`: 32, 64 or 128; the last group of a row may be shorter.',
    )
    weight_gradient_estimator: GradientEstimator = _field(
        GradientEstimator.MAD,
        '`"mad"`, `"pwl"` or `"ste"` (section 4). MAD for weights with PWL for activations is the paper\'s MPH.',
    )
    activation_gradient_estimator: GradientEstimator = _field(
        GradientEstimator.PWL, "The same for activations, including attention operands."
    )
    unsigned_activations: bool = _field(
        True,
        "Whether layer inputs without negative values, such as the output of a ReLU, use the unsigned grid, whose step "
        "is half as wide; decided from the tensor at every forward pass. `False` keeps them signed.",
    )
    asymmetric_activations: bool = _field(
        False,
        "Whether inputs of linear layers whose negative values all lie inside the signed clip, such as the output of a "
        "GELU, use the unsigned grid that begins at their lowest value m: `m + Q(x - m)`; decided from the tensor at "
        "every forward pass. The offset factors out of the matmul. Convolutions do not support it, because their "
        "padding has no offset.",
    )
    quantize_attention: bool = _field(
        True,
        "Whether attention matmuls are quantized. A model whose attention matmuls cannot be reached is refused unless "
        "this is `False`.",
    )

    frozen_weight_clips: bool = _field(
        False,
        "Whether the clips of weights are frozen and stored with the weights; set by `calibrate_octav(model, "
        "weights=True)`.",
    )

    def granularity(self, operand: str) -> str:
        """The granularity of this activation."""
        return self.activation_granularity.get(operand, Granularity.TENSOR)


MODULE_FIELDS = tuple(entry.name for entry in fields(ModuleSettings))

_PAPER: dict[str, Any] = {
    "weight_clip": "octav",
    "activation_clip": "octav",
    "weight_granularity": "channel",
    "activation_granularity": {},
    "weight_gradient_estimator": "mad",
    "activation_gradient_estimator": "pwl",
    "unsigned_activations": True,
    "asymmetric_activations": False,
    "quantize_attention": True,
}
_ACCURATE: dict[str, Any] = {
    "weight_clip": "mse",
    "activation_clip": "mse",
    "activation_granularity": FINEST,
    "asymmetric_activations": True,
}
_GROUPS = _ACCURATE | {
    "weight_granularity": "group",
    "activation_granularity": FINEST | dict.fromkeys(("input", "probabilities", "value"), "group"),
}
_ONNX_RUNTIME = _ACCURATE | {"activation_bits": 8, "activation_granularity": {}}
_GGML: dict[str, Any] = {
    "activation_bits": 8,
    "weight_clip": "mse",
    "activation_clip": "mse",
    "weight_granularity": "group",
    "activation_granularity": dict.fromkeys(ACTIVATION_GRANULARITIES, "group"),
    "group_size": 32,
    "unsigned_activations": False,
}


@register_quantization_config(QUANT_METHOD)
@dataclass(repr=False)
class OctavConfig(ModuleSettings, QuantizationConfigMixin):
    """Config of quantization-aware training with OCTAV clips; the defaults are the paper's recipe "MPH" at 4 bits.

    Weights of linear layers and convolutions have one clip per output feature or channel. Activations have one clip per
    tensor (Appendix E.2), unless ``activation_granularity`` is set. Activations are the inputs of these layers and the
    four operands of the attention matmuls: query, key, probabilities (on the unsigned grid) and value.

    A name pattern is the full dotted name of a module, or a shell-style pattern (``"bert.encoder.layer.0.*"``,
    ``"*.attention.self"``). It matches the module and everything below it; in ``attention_modules``, only the module. A
    pattern that matches no module is refused.

    Raises:
        ValueError: an unknown field, clip, gradient estimator or option, or an invalid value; the message tells what to
            write instead.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False, repr=False)  # type: ignore[assignment]
    sync_activation_clips: bool = _field(
        False,
        "Whether activation clips are computed over the batches of all processes, so that a step on N data-parallel "
        "ranks equals a step of one process on the whole batch. Supported by the clip rules octav, mse, max and "
        "percentile, and by your own rules that can be computed from a magnitude table. Each clip takes one collective "
        "of 1 MiB over the default process group (asymmetric grids take two), so all ranks must run the same forward "
        "passes, also in evaluation. Clips per token, head or channel use the values of one rank; only a sign or an "
        "offset that depends on the data is shared.",
    )
    first_last_bits: int | None = _field(
        None,
        "Bits (2 to 8) of weight and input of the first and the last layer of an image classifier; the paper uses 8 "
        "for ResNets and MobileNets. The first layer must be a convolution and the last a linear layer; other models "
        "are refused.",
    )
    exclude_modules: list[str] = _field(
        [],
        'Name patterns of modules to leave in float, such as `["qa_outputs"]`. `""` is the model itself, without the '
        "modules in it.",
    )
    target_modules: list[str] | None = _field(
        None,
        "Name patterns of the only modules to quantize. As in PEFT, the last part of a name is enough, such as "
        '`["query", "value"]`. `None`: all modules.',
    )
    attention_modules: list[str] | None = _field(
        None,
        "Name patterns of the modules that compute attention, for models whose attention has an unusual name. `None`: "
        "the innermost modules whose class name contains `Attention` or whose forward calls Transformers' attention "
        "interface.",
    )
    module_overrides: dict[str, dict[str, Any]] = _field(
        {},
        'Name pattern → fields that differ for these modules: `{"qa_outputs": {"weight_bits": 8, "activation_bits": '
        "8}}`. All fields from `weight_bits` to `quantize_attention` can be set; a dict replaces the whole dict. Exact "
        "names take precedence over patterns with wildcards; two patterns of one kind must not disagree.",
    )
    packed: bool = _field(False, "Whether weights are stored as packed integers; set by `pack_octav`.")

    clips_of_version_1: ClassVar[ClipsOfVersion1] = {}  # set on an instance read from version 1, until the clips load

    def __new__(cls, *args: Any, **kwargs: Any) -> "OctavConfig":
        """Refuse unknown fields with an error that lists the known ones, which ``__init__`` would not."""
        known = [entry.name for entry in fields(cls) if entry.init]
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise ValueError(_unknown("OctavConfig has no field", unknown, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Copy mutable values, and validate."""
        self.quant_method = QUANT_METHOD  # an instance attribute, because Transformers writes the __dict__
        for entry in fields(self):
            value = getattr(self, entry.name)
            _check_sizes(value, entry.name)
            if entry.name in _PATTERN_LISTS:
                is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
                setattr(self, entry.name, list(value) if is_list else value)
            elif isinstance(value, dict) or (value is None and entry.default_factory is not MISSING):
                setattr(self, entry.name, copy.deepcopy(value or {}))
        self.validate()

    @classmethod
    def paper(cls, **fields: Any) -> "OctavConfig":
        """The paper's clips, granularity, grids and gradients, whatever the defaults are; ``fields`` override them.

        Each matmul is one integer matmul with one scale, which any integer kernel can run.
        """
        return cls(**_PAPER | fields)

    @classmethod
    def accurate(cls, **fields: Any) -> "OctavConfig":
        """The most accurate recipe at few bits without groups (``examples/squad/README.md``); ``fields`` override it.

        Clip rule ``"mse"`` for weights and activations, the finest granularity whose scales factor out of the matmuls,
        and asymmetric grids. Each matmul is one integer matmul with a scale per token and channel, as in kernels with
        per-token dynamic quantization. A step takes longer than with ``paper()``, and clips per token become clips per
        tensor when they are frozen.
        """
        return cls(**_ACCURATE | fields)

    @classmethod
    def groups(cls, **fields: Any) -> "OctavConfig":
        """``accurate()`` with groups of 64 in weights, linear inputs, probabilities and values; ``fields`` override it.

        The most accurate settings at 4 bits and below. They need kernels with a scale per group, such as those of Atom
        and QServe; ``convert_octav`` and ``to_onnx`` do not support them.
        """
        return cls(**_GROUPS | fields)

    @classmethod
    def onnxruntime(cls, **fields: Any) -> "OctavConfig":
        """4-bit weights and 8-bit activations with one clip per tensor, for ``to_onnx``; ``fields`` override it.

        ONNX Runtime, OpenVINO and ``convert_octav`` run these matmuls with 8-bit integers and a weight scale per
        channel. Activation clips must be static: call ``calibrate_octav(model, batches, learned=True)`` before
        training.
        """
        return cls(**_ONNX_RUNTIME | fields)

    @classmethod
    def ggml(cls, **fields: Any) -> "OctavConfig":
        """4-bit weights and 8-bit operands in groups of 32, as in GGML's Q4_0 x Q8_0; ``fields`` override it.

        GGML multiplies such blocks of signed integers; here, probabilities are unsigned. This package trains such
        models but does not write GGML files.
        """
        return cls(**_GGML | fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a dict that ``to_dict`` wrote; keyword arguments named like a field replace its value.

        Raises:
            ValueError: the dict has a later format version, another quantization method, or a field that
                ``OctavConfig`` refuses.
        """
        values = dict(config_dict)
        for name, value in values.items():
            if not isinstance(name, str):
                raise ValueError(f"the fields of a quantization_config must be strings, got {shown(name)}")
            _check_sizes(value, escaped(name))
        version = values.pop("format_version", 1)  # the first files had no such field
        _check_version(version, values.pop("octav_hf_version", "unknown"))
        clips: ClipsOfVersion1 = {}
        if version == 1:
            values = _from_version_1(values)
            clips = values.pop("activation_clips", {})
            validate_activation_clips(clips)
        method = values.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(
                f"this is a config of quant_method {shown(method)}, not {QUANT_METHOD!r}; load it with its own class"
            )
        names = {entry.name for entry in fields(cls) if entry.init}
        replaced = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        config = cls(**(values | replaced))
        if clips:
            config.__dict__["clips_of_version_1"] = copy.deepcopy(clips)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The fields, the format version and the version of this package."""
        values = super().to_dict()
        values.pop("clips_of_version_1", None)
        return _plain(values) | {"format_version": FORMAT_VERSION, "octav_hf_version": __version__}

    def validate(self) -> None:
        """Check every field. ``apply_octav`` repeats this, because fields can be assigned.

        Raises:
            ValueError: see ``OctavConfig``.
        """
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        _validate(values, "OctavConfig")
        for name, choices in _CHOICES.items():
            setattr(self, name, type(choices[0])(values[name]))
        for name in _PATTERN_LISTS:
            patterns = values[name]
            if isinstance(patterns, list):
                validate_patterns(patterns, name)
            elif patterns is not None or name == "exclude_modules":
                raise ValueError(f"{name} must be a list of name patterns, got {shown(patterns)}")
        if not isinstance(self.module_overrides, dict):
            raise ValueError(f"module_overrides must map name patterns to fields, got {shown(self.module_overrides)}")
        validate_patterns(self.module_overrides, "module_overrides")
        if not (self.weight_bits or self.activation_bits or self.embedding_bits or self.module_overrides):
            raise ValueError(
                "weight_bits, activation_bits and embedding_bits are all None, so nothing would be quantized; set one"
            )
        checked = set()  # check equal overrides once
        for pattern, override in self.module_overrides.items():
            where = f"module_overrides[{shown(pattern)}]"
            if not isinstance(override, dict):
                raise ValueError(
                    f"{where} must map fields to values, such as {{'weight_bits': 8}}, got {shown(override)}"
                )
            unknown = [name for name in override if name not in MODULE_FIELDS]
            if unknown:
                raise ValueError(_unknown(f"{where} cannot set", unknown, MODULE_FIELDS))
            if repr(override) not in checked:
                _validate(values | override, where)
            checked.add(repr(override))

    def left_out(self, module_names: Iterable[str]) -> dict[str, str]:
        """Full name -> reason, for the modules that ``exclude_modules`` and ``target_modules`` leave in float."""
        if not self.exclude_modules and self.target_modules is None:
            return {}
        excluded = NamePatterns(self.exclude_modules)
        targeted = None if self.target_modules is None else NamePatterns(self.target_modules, anywhere=True)
        reasons = {}
        for name in module_names:
            excluding = excluded.matching(name)
            if excluding:
                reasons[name] = f"excluded by {excluding[0]!r}"
            elif targeted is not None and not targeted.matching(name):
                reasons[name] = "not in target_modules"
        return reasons

    def settings_for(self, module_names: Iterable[str]) -> dict[str, ModuleSettings]:
        """Full name -> settings; modules without an override share one object.

        Raises:
            ValueError: two overrides of one kind (exact names, or patterns with wildcards) set a field differently.
        """
        shared = ModuleSettings(**{name: getattr(self, name) for name in MODULE_FIELDS})
        if not self.module_overrides:
            return dict.fromkeys(module_names, shared)
        patterns = NamePatterns(self.module_overrides)
        return {name: replace(shared, **self._override_of(name, patterns.matching(name))) for name in module_names}

    def _override_of(self, module_name: str, matching: Iterable[str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        # Exact names come last, so that they take precedence.
        for exact in (False, True):
            set_by: dict[str, str] = {}
            for pattern in (p for p in matching if (p == module_name) is exact):
                for name, value in self.module_overrides[pattern].items():
                    if name in set_by and self.module_overrides[set_by[name]][name] != value:
                        raise ValueError(
                            f"module_overrides {set_by[name]!r} and {pattern!r} both match {module_name!r} and set "
                            f"{name} differently; narrow one of them, or write the module's exact name"
                        )
                    set_by[name] = pattern
                    values[name] = value
        return values


OctavConfig.__signature__ = inspect.signature(partial(OctavConfig.__init__, None))  # type: ignore[attr-defined, arg-type]
OctavConfig.__doc__ = f"{OctavConfig.__doc__}\n    Args:\n" + "\n".join(
    f"        {entry.name}: {entry.metadata['help']}" for entry in fields(OctavConfig) if entry.init
)


def _check_sizes(value: Any, field: str) -> None:
    """Raise ``ValueError`` for lists and dicts too deep for recursion, and for integers too large for a float."""
    layer = [value]
    for _ in range(_MAX_DEPTH):
        large = next((part for part in layer if isinstance(part, int) and abs(part) >= 2**_MAX_INTEGER_BITS), None)
        if large is not None:
            raise ValueError(f"{field}: {shown(large)} is too large; write an integer below 2**{_MAX_INTEGER_BITS}")
        containers = [part for part in layer if isinstance(part, dict | list | tuple)]
        layer = [part for each in containers for part in (each.values() if isinstance(each, dict) else each)]
        if not layer:
            return
    raise ValueError(f"{field}: lists and dicts are nested more than {_MAX_DEPTH} deep; write them flatter")


def _check_version(version: Any, written_by: Any) -> None:
    if type(version) is not int or version < 1:
        raise ValueError(
            f"format_version of a checkpoint's quantization_config must be an integer >= 1, got {shown(version)}"
        )
    if version <= FORMAT_VERSION:
        return
    problem = f"this checkpoint has format version {shown(version)}; "
    remedy = "pip install --upgrade octav-hf"
    # People paste this into a terminal, so nothing but a version number may be inserted.
    if isinstance(written_by, str) and _VERSION_NUMBER.fullmatch(written_by):
        problem = f"{problem[:-2]}, written by octav_hf {written_by}; "
        remedy = f"pip install --upgrade 'octav-hf>={written_by}'"
    raise ValueError(f"{problem}octav_hf {__version__} reads versions up to {FORMAT_VERSION}: {remedy}")


def _from_version_1(values: Any) -> Any:
    """Rename the fields of a config, an override or frozen clips of format version 1."""
    if not isinstance(values, dict):
        return values  # validation refuses it
    new = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
    if new.get("weight_granularity") == "row":
        new["weight_granularity"] = "channel"
    for name, translate in _OLD_VALUES.items():
        if name in new:
            new[name] = _map_values(new[name], translate)
    return new


def _map_values(mapping: Any, function: Callable[[Any], Any]) -> Any:
    return {key: function(value) for key, value in mapping.items()} if isinstance(mapping, dict) else mapping


_OLD_NAMES = {
    "weight_gradient": "weight_gradient_estimator",
    "activation_gradient": "activation_gradient_estimator",
    "shifted_activations": "asymmetric_activations",
    "lowest": "offset",  # of activation_clips
}
_OLD_VALUES: dict[str, Callable[[Any], Any]] = {
    "activation_granularity": lambda name: "attn_head" if name == "head" else name,
    "module_overrides": _from_version_1,
    "activation_clips": lambda operands: _map_values(operands, _from_version_1),
}


def _plain(value: Any) -> Any:
    """``value`` with enums replaced by strings, for JSON."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return str(value) if isinstance(value, StrEnum) else value


def _validate(values: dict[str, Any], where: str) -> None:
    """Check all fields except patterns and overrides."""
    for entry in fields(OctavConfig):
        if isinstance(entry.default, bool) and not isinstance(values[entry.name], bool):
            raise ValueError(f"{where}: {entry.name} must be True or False, got {shown(values[entry.name])}")
    for name, none in _BITS.items():
        bits = values[name]
        if bits is not None and (type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS):
            raise ValueError(
                f"{where}: {name} must be an integer from {MIN_BITS} to {MAX_BITS}, or None {none}; got {shown(bits)}"
            )
    for side in ("weight", "activation"):
        _validate_clip(
            values[f"{side}_clip"], values[f"{side}_clip_options"], values[f"{side}_bits"], f"{where}: {side}_clip"
        )
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise ValueError(_unknown(f"{where}: {name} cannot be", [values[name]], map(str, choices)))
    _validate_activation_granularity(values["activation_granularity"], f"{where}: activation_granularity")
    size = values["group_size"]
    if type(size) is not int or size not in GROUP_SIZES:
        raise ValueError(f"{where}: group_size must be 32, 64 or 128, got {shown(size)}")
    if values["asymmetric_activations"] and not values["unsigned_activations"]:
        raise ValueError(
            f"{where}: asymmetric_activations=True needs unsigned_activations=True: an asymmetric grid is unsigned"
        )
    clip, supported = values["activation_clip"], poolable_rules()
    if values["sync_activation_clips"] and values["activation_bits"] is not None and clip not in supported:
        raise ValueError(
            f"{where}: sync_activation_clips supports the activation clips {', '.join(map(repr, supported))}, but "
            f"{clip!r} cannot be computed over several processes; set sync_activation_clips=False or another clip"
        )


def _validate_clip(clip: Any, options: Any, bits: int | None, where: str) -> None:
    if not isinstance(clip, str) or clip not in CLIP_RULES:
        raise ValueError(_unknown(f"{where} cannot be", [clip], CLIP_RULES))
    if not isinstance(options, dict):
        raise ValueError(f"{where}_options must be a dict of keyword arguments, got {shown(options)}")
    accepted = [name for name in inspect.signature(CLIP_RULES[clip]).parameters if name not in RULE_ARGUMENTS]
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise ValueError(_unknown(f"{where}_options: the clip {clip!r} has no option", unknown, accepted))
    try:
        if clip in OPTION_CHECKS:
            OPTION_CHECKS[clip](**options)
        else:
            # On the CPU, whatever the default device is: from_pretrained builds models on the meta device.
            CLIP_RULES[clip](torch.ones(1, dtype=torch.float32, device="cpu"), bits or MAX_BITS, **options)
    except Exception as error:  # a user's rule may raise anything
        raise ValueError(f"{where}_options: {error}") from error


def _validate_activation_granularity(granularities: Any, where: str) -> None:
    if not isinstance(granularities, dict):
        raise ValueError(
            f"{where} must map operands to granularities, such as {{'input': 'token'}}, got {shown(granularities)}"
        )
    for operand, granularity in granularities.items():
        if operand not in ACTIVATION_GRANULARITIES:
            raise ValueError(_unknown(f"{where} has no operand", [operand], ACTIVATION_GRANULARITIES))
        allowed = ACTIVATION_GRANULARITIES[operand]
        if granularity in allowed:
            continue
        reason = unsupported_reason(operand, granularity) if isinstance(granularity, str) else ""
        if reason:
            instead = " or ".join(repr(str(name)) for name in allowed[::-1] if name != Granularity.GROUP)
            raise ValueError(f"{where} of {operand!r} cannot be {shown(granularity)}: {reason}; write {instead}")
        raise ValueError(_unknown(f"{where} of {operand!r} cannot be", [granularity], map(str, allowed)))


def _unknown(problem: str, names: Iterable[Any], known: Iterable[str]) -> str:
    """A message with ``problem``, the unknown names, a close match and the known names."""
    names, known = list(names), list(known)
    close = difflib.get_close_matches(names[0], known, n=1) if isinstance(names[0], str) else ()
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    more = ", ..." if len(names) > _MAX_NAMES else ""
    listed = ", ".join(map(shown, names[:_MAX_NAMES]))
    return f"{problem} {listed}{more}{hint} choose from {', '.join(map(repr, known)) or 'nothing'}"
