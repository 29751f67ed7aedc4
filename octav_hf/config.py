"""``OctavConfig``: what is quantized, to how many bits, with which clips and gradients."""
# ruff: noqa: RUF009  # _field makes a field, not a default

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
"""Of checkpoints: their config, tensor names and layout. A later version reads the earlier ones."""

# What None means for the bits.
_BITS = dict.fromkeys(("weight_bits", "activation_bits", "embedding_bits"), "to leave it in float") | {
    "first_last_bits": "to treat those layers as the others"
}

# Closed choices; clip rules can be registered.
_CHOICES: dict[str, tuple[StrEnum, ...]] = {
    "weight_granularity": WEIGHT_GRANULARITIES,
    "weight_gradient_estimator": tuple(GradientEstimator),
    "activation_gradient_estimator": tuple(GradientEstimator),
}
WRITTEN_FIELDS = ("packed", "frozen_weight_clips")
"""What the modules of a model say, and its record with them: not for users to set."""
_PATTERN_LISTS = ("exclude_modules", "target_modules", "attention_modules")
_MAX_NAMES = 5  # that a message lists
_MAX_INTEGER_BITS = 64
_MAX_DEPTH = 32  # of lists and dicts in each other
_VERSION_NUMBER = re.compile(r"\d{1,4}(\.\d{1,8}){0,4}((a|b|rc)\d{1,4})?(\.post\d{1,4})?(\.dev\d{1,8})?", re.ASCII)


def _field(default: Any, help: str) -> Any:
    """A field of a config with its help, which the README's table and ``run_squad.py``'s arguments show too."""
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
        "2 to 8 quantizes embedding tables too (every `nn.Embedding`), with one clip per row, by the clip rule and "
        "gradient estimator of weights; a tied head still quantizes its own view. `None` leaves them in float, as the "
        "paper does.",
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
        'What one clip of a weight is for: `"channel"`, an output feature or channel, or `"tensor"`, the whole weight, '
        "which the paper uses for the linear layers of ResNets and MobileNets. "
        '`"group"`: each `group_size` neighbours in a row, of linear layers; convolutions have one clip per channel '
        "then, whose sums run over windows.",
    )
    activation_granularity: dict[str, str] = _field(
        {},
        "Operand → what one clip of it is for; an operand that is left out has one clip per tensor, as in the paper. "
        '`"input"` of linear layers: `"token"`, one per row; `"query"`, `"key"`, `"probabilities"`: `"attn_head"`, one '
        'per batch element and head, or `"token"`, one per token and head; `"value"`: `"attn_head"` or `"channel"`, '
        'one per batch element, head and channel. `"group"`, for any of them: one for each `group_size` neighbours '
        "along the dimension that the matmul sums over. Allowed is that for which the scale factors out of the matmul, "
        "or of that of each group; anything else is refused with the reason. The input of a convolution has one clip "
        "per tensor.",
    )
    group_size: int = _field(
        64,
        '32, 64 or 128: elements of a group where a granularity is `"group"`; the last group of a row has what is '
        "left over.",
    )
    weight_gradient_estimator: GradientEstimator = _field(
        GradientEstimator.MAD,
        '`"mad"`, `"pwl"` or `"ste"` (section 4). MAD for weights and PWL for activations is MPH.',
    )
    activation_gradient_estimator: GradientEstimator = _field(
        GradientEstimator.PWL, "The same for activations, attention operands included."
    )
    unsigned_activations: bool = _field(
        True,
        "Whether layer inputs without a negative value, such as the output of a ReLU, use the unsigned grid, whose "
        "steps are half as wide; decided from the tensor at every forward pass. `False` keeps them signed.",
    )
    asymmetric_activations: bool = _field(
        False,
        "Whether inputs of linear layers whose negative values all lie inside the signed clip, such as the output of a "
        "GELU, use the unsigned grid that begins at their lowest value m: `m + Q(x - m)`; decided from the tensor at "
        "every forward pass. The offset factors out of the matmul. Not for convolutions, whose padding has no offset.",
    )
    quantize_attention: bool = _field(
        True,
        "Whether attention matmuls are quantized. A model whose attention matmuls cannot be reached is refused unless "
        "this is `False`.",
    )

    frozen_weight_clips: bool = _field(
        False,
        "Whether clips of weights are frozen and stored with the weights; written by `calibrate_octav(model, "
        "weights=True)`.",
    )

    def granularity(self, operand: str) -> str:
        """What one clip of this activation is for."""
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


@register_quantization_config(QUANT_METHOD)
@dataclass(repr=False)
class OctavConfig(ModuleSettings, QuantizationConfigMixin):
    """Quantization-aware training with OCTAV clips; the defaults are the paper's recipe "MPH" at 4 bits.

    Weights of linear layers and convolutions have one clip per output feature or channel, everything else one clip per
    tensor (Appendix E.2) unless ``activation_granularity`` says otherwise. "Activations" are the inputs of those layers
    and the four operands of the attention matmuls (query, key, probabilities, value; probabilities on the unsigned
    grid).

    A name pattern is a module's full dotted name, or a shell-style pattern for it (``"bert.encoder.layer.0.*"``,
    ``"*.attention.self"``). It stands for the module and everything below it, in ``attention_modules`` for the
    module alone. A pattern that matches no module is refused.

    Raises:
        ValueError: an unknown field, clip, gradient estimator or option, or an impossible value; the message says what
            to write instead.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False, repr=False)  # type: ignore[assignment]
    sync_activation_clips: bool = _field(
        False,
        "Whether activation clips are computed from the batches of all processes, so that one step of N data-parallel "
        "ranks is that of one process on the whole batch. For octav, mse, max, percentile and rules of your own that "
        "are functions of a table. Each clip takes one message between all ranks of the default process group (1 MiB; "
        "asymmetric grids take two), so all ranks must run the same forward passes, in evaluation too. Clips per "
        "token, head or channel are of one rank's values, and only a sign or an offset that depends on the data is "
        "shared.",
    )
    first_last_bits: int | None = _field(
        None,
        "2 to 8 bits for weight and input of the first and the last layer of an image classifier, whatever the other "
        "layers have; the paper uses 8 for ResNets and MobileNets. A model that is not clearly one, from a convolution "
        "to a linear head, is refused.",
    )
    exclude_modules: list[str] = _field([], 'Name patterns of modules left in float, such as `["qa_outputs"]`.')
    target_modules: list[str] | None = _field(
        None,
        "Name patterns of the only modules to quantize; as in PEFT the last part of a name is enough, such as "
        '`["query", "value"]`. `None`: all modules.',
    )
    attention_modules: list[str] | None = _field(
        None,
        "Name patterns of the modules that compute attention, for models whose attention has an unusual name; they "
        "replace the search. `None`: the innermost modules whose class name contains `Attention`, and those that call "
        "Transformers' attention interface.",
    )
    module_overrides: dict[str, dict[str, Any]] = _field(
        {},
        'Name pattern → fields that differ there: `{"qa_outputs": {"weight_bits": 8, "activation_bits": 8}}`. Any '
        "field above down to `quantize_attention`; one that is a dict is replaced as a whole. An exact name wins over "
        "a pattern with wildcards; two patterns of one kind must not disagree.",
    )
    packed: bool = _field(False, "Whether weights are stored as integers; written by `pack_octav`.")

    clips_of_version_1: ClassVar[ClipsOfVersion1] = {}  # of an instance that was read from that format, until loaded

    def __new__(cls, *args: Any, **kwargs: Any) -> "OctavConfig":
        """Refuse unknown fields before ``__init__`` does, with an error that says what there is."""
        known = [entry.name for entry in fields(cls) if entry.init]
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise ValueError(_unknown("OctavConfig has no field", unknown, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Copy what is mutable, and validate."""
        self.quant_method = QUANT_METHOD  # of the instance too, whose __dict__ Transformers writes
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
        """The paper's clips, granularity, grids and gradients, whatever the defaults are; ``fields`` add to them."""
        return cls(**_PAPER | fields)

    @classmethod
    def accurate(cls, **fields: Any) -> "OctavConfig":
        """What loses least at few bits, by the measurements in ``examples/squad/README.md``; ``fields`` add to it.

        The clip ``"mse"`` for weights and activations, the finest granularity whose scales factor out of the matmuls,
        and asymmetric grids. A step takes longer than the paper's, and clips per token cannot be frozen as such.
        """
        return cls(**_ACCURATE | fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that ``to_dict`` wrote; keyword arguments named like a field replace its value.

        Raises:
            ValueError: a later version of the format, another quantization method, or a field that ``OctavConfig``
                refuses.
        """
        values = dict(config_dict)
        for name, value in values.items():
            if not isinstance(name, str):
                raise ValueError(f"the fields of a quantization_config must be strings, got {shown(name)}")
            _check_sizes(value, escaped(name))
        version = values.pop("format_version", 1)  # older than the field
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
        """The fields, and by which version of the format and of this package they were written."""
        values = super().to_dict()
        values.pop("clips_of_version_1", None)
        return _plain(values) | {"format_version": FORMAT_VERSION, "octav_hf_version": __version__}

    def validate(self) -> None:
        """Check every field. ``apply_octav`` does so again, since fields can be assigned.

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
        checked = set()  # many modules may have the same override
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
        """Full name -> reason, of the modules that ``exclude_modules`` and ``target_modules`` leave in float."""
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
        # Exact names come last, so that they win.
        for exact in (False, True):
            set_by: dict[str, str] = {}
            for pattern in (p for p in matching if (p == module_name) is exact):
                for name, value in self.module_overrides[pattern].items():
                    if name in set_by and self.module_overrides[set_by[name]][name] != value:
                        raise ValueError(
                            f"module_overrides {set_by[name]!r} and {pattern!r} both match {module_name!r} and set "
                            f"{name} differently; make one of them narrower, or give the module's exact name"
                        )
                    set_by[name] = pattern
                    values[name] = value
        return values


OctavConfig.__signature__ = inspect.signature(partial(OctavConfig.__init__, None))  # type: ignore[attr-defined, arg-type]
OctavConfig.__doc__ = f"{OctavConfig.__doc__}\n    Args:\n" + "\n".join(
    f"        {entry.name}: {entry.metadata['help']}" for entry in fields(OctavConfig) if entry.init
)


def _check_sizes(value: Any, field: str) -> None:
    """Raise ``ValueError`` for lists and dicts too deep for Python's recursion, and integers too large for a float."""
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
            f"format_version of a checkpoint's quantization_config must be an integer from 1 on, got {shown(version)}"
        )
    if version <= FORMAT_VERSION:
        return
    problem = f"this checkpoint has format version {shown(version)}; "
    remedy = "pip install --upgrade octav-hf"
    # For people to paste into a terminal: nothing but a version number.
    if isinstance(written_by, str) and _VERSION_NUMBER.fullmatch(written_by):
        problem = f"{problem[:-2]}, written by octav_hf {written_by}; "
        remedy = f"pip install --upgrade 'octav-hf>={written_by}'"
    raise ValueError(f"{problem}octav_hf {__version__} reads versions up to {FORMAT_VERSION}: {remedy}")


def _from_version_1(values: Any) -> Any:
    """The fields of a config, an override or frozen clips of format version 1 by their later names."""
    if not isinstance(values, dict):
        return values  # refused by validation
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
    """``value`` with plain strings in the place of enums, as JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return str(value) if isinstance(value, StrEnum) else value


def _validate(values: dict[str, Any], where: str) -> None:
    """Check all fields but the patterns and overrides."""
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
            f"{where}: sync_activation_clips is for the activation clips {', '.join(map(repr, supported))}, not for "
            f"{clip!r}, which each process can only compute from its own batch; change one of the two"
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
            # On the CPU whatever the default device: from_pretrained builds models on meta.
            CLIP_RULES[clip](torch.ones(1, dtype=torch.float32, device="cpu"), bits or MAX_BITS, **options)
    except Exception as error:  # whatever a rule of the user's own makes of them
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
    """``problem``, the names, what is close to them and what there is."""
    names, known = list(names), list(known)
    close = difflib.get_close_matches(names[0], known, n=1) if isinstance(names[0], str) else ()
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    more = ", ..." if len(names) > _MAX_NAMES else ""
    listed = ", ".join(map(shown, names[:_MAX_NAMES]))
    return f"{problem} {listed}{more}{hint} choose from {', '.join(map(repr, known)) or 'nothing'}"
