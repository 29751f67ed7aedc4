"""``OctavConfig``: what is quantized, to how many bits, with which clips and gradients."""

import copy
import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._version import __version__
from .functional import CLIP_RULES, GRADIENTS
from .functional.grid import MAX_BITS, MIN_BITS
from .functional.registry import RULE_ARGUMENTS, rules_for_all_ranks
from .nn.granularity import FINEST, GRANULARITIES, refusal
from .nn.stored_clips import ActivationClips, validate_activation_clips

QUANT_METHOD = "octav"
WEIGHT_GRANULARITIES = ("row", "tensor")

FORMAT_VERSION = 1
"""Of checkpoints: their config, tensor names and layout. A later version reads the earlier ones."""

_SIDES = ("weight", "activation", "embedding")


@dataclass(frozen=True)
class ModuleSettings:
    """How one module is quantized: the config's fields after the overrides that match the module's name."""

    weight_bits: int | None
    activation_bits: int | None
    embedding_bits: int | None
    weight_clip: str
    activation_clip: str
    weight_clip_options: Mapping[str, Any]
    activation_clip_options: Mapping[str, Any]
    weight_granularity: str
    activation_granularity: Mapping[str, str]
    weight_gradient: str
    activation_gradient: str
    unsigned_activations: bool
    shifted_activations: bool
    quantize_attention: bool

    def granularity(self, operand: str) -> str:
        """What a clip of this activation is for."""
        return self.activation_granularity.get(operand, "tensor")


_SETTINGS = tuple(field.name for field in fields(ModuleSettings))

_PAPER: dict[str, Any] = {
    "weight_clip": "octav",
    "activation_clip": "octav",
    "weight_granularity": "row",
    "activation_granularity": {},
    "weight_gradient": "mad",
    "activation_gradient": "pwl",
    "unsigned_activations": True,
    "shifted_activations": False,
    "quantize_attention": True,
}
_ACCURATE: dict[str, Any] = {
    "weight_clip": "mse",
    "activation_clip": "mse",
    "activation_granularity": FINEST,
    "shifted_activations": True,
}


@register_quantization_config(QUANT_METHOD)
class OctavConfig(QuantizationConfigMixin):
    """Quantization-aware training with OCTAV clips; the defaults are the paper's recipe "MPH" at 4 bits.

    Weights of linear layers and convolutions have one clip per output feature or channel (row), everything else one
    clip per tensor (Appendix E.2) unless ``activation_granularity`` says otherwise. "Activations" are the inputs of
    those layers and the four operands of the attention matmuls (query, key, probabilities, value; probabilities on the
    unsigned grid).

    Args:
        weight_bits: 2 to 8; ``None`` leaves weights in float.
        activation_bits: 2 to 8; ``None`` leaves activations, attention operands included, in float.
        embedding_bits: 2 to 8 quantizes embedding tables too, of tokens, positions and whatever else is an
            ``nn.Embedding``, with one clip per row, by the clipping rule and gradient of weights; ``None`` leaves them
            in float, as the paper does.
        weight_clip, activation_clip: ``"octav"``, ``"mse"``, ``"max"``, ``"percentile"`` or ``"mse_sweep"``, or another
            rule registered in ``octav_hf.functional.CLIP_RULES``.
        weight_clip_options, activation_clip_options: further keyword arguments of that rule, for instance
            ``{"max_iterations": 10}`` for octav or ``{"percentile": 99.99}`` for percentile.
        weight_granularity: ``"row"``, or ``"tensor"`` for one clip for a whole weight, which the paper uses for the
            linear layers of ResNets and MobileNets.
        activation_granularity: operand -> which of its elements share a clip; an operand that is left out has one clip
            per tensor, as in the paper. Allowed is that for which the scale factors out of the matmul, so that integers
            can be multiplied and the result scaled:

            - ``"input"`` of linear layers (``nn.Linear``, Transformers' ``Conv1D``): ``"tensor"``, or ``"token"`` for
              one per row, that is over the last dimension. A convolution's input always has one per tensor: the scale
              of a position does not factor out of a sum over positions.
            - ``"query"``, ``"key"``, ``"probabilities"``: ``"tensor"``; ``"head"``, one per batch element and head; or
              ``"token"``, one per token and head.
            - ``"value"``: ``"tensor"``, ``"head"``, or ``"channel"``, one per batch element, head and channel. Tokens
              are what its product sums over.

            Which dimensions those are follows from the product that an operand is in: batch and heads are those that
            both operands have and the result keeps, so that a module which merges both has one clip for each pair.
            For instance ``{"input": "token", "query": "token", "key": "token", "value": "channel"}``. Frozen clips:
            see ``calibrate_octav``.
        weight_gradient, activation_gradient: ``"mad"``, ``"pwl"`` or ``"ste"`` (section 4). MAD for weights and PWL for
            activations is the paper's MPH.
        unsigned_activations: whether a layer input without a negative value, such as the output of a ReLU, is quantized
            on the unsigned grid, whose steps are half as wide. It is decided from the tensor at every forward pass, so
            one negative value makes it signed. False keeps every layer input signed.
        shifted_activations: whether the input of a linear layer whose negative values all lie inside its signed clip,
            such as the output of a GELU, which is never below -0.17, is quantized on the unsigned grid shifted to its
            lowest value m: ``m + Q(x - m)``. The signed grid spends half of its levels on those values. The shift
            factors out: the product has ``m`` times the sum of a weight's row more, which an integer kernel adds as it
            adds the bias. Decided from the tensor at every forward pass; False in the paper. Convolutions, whose
            padding is not shifted, do not take part.
        quantize_attention: whether the attention matmuls are quantized. A model whose attention matmuls cannot be
            reached is refused unless this is False.
        sync_activation_clips: whether activation clips are computed from the batches of all processes, instead of from
            each process's own: then one step of N data-parallel processes is that of one process on the whole batch.
            The sums behind each clip (and sign and lowest value, where the grid goes by them) go around all ranks of
            the default process group, about five small messages for an octav clip, nine for mse and one for max, so all
            ranks have to run the same forward passes, in evaluation too. Only for these clips. Without a process group,
            and for frozen clips, it changes nothing.
        first_last_bits: 2 to 8 bits for weight and input of the first and the last layer, whatever the other layers
            have (a side that is ``None`` stays in float); the paper uses 8 for ResNets and MobileNets. The layers are
            found by the order in which modules are defined, and a model that is not clearly an image classifier, from
            a convolution to a linear head, is refused. ``None``: they are as the others.
        exclude_modules: name patterns of modules left in float, with all that is below them.
        module_overrides: name pattern -> fields (of those above, except ``sync_activation_clips``, ``first_last_bits``
            and ``exclude_modules``) that differ for the modules it matches and all that is below them:
            ``{"qa_outputs": {"weight_bits": 8, "activation_bits": 8}}``. A field that is a dict is replaced as a whole.
            An exact name wins over a pattern with wildcards; two patterns of one kind must not disagree.
        packed: whether the weights are stored as integers. Set by ``pack_octav``, and refused elsewhere.
        frozen_weight_clips: whether the clips of weights are stored with the weights, instead of following them. Set by
            ``freeze_weight_clips``, and refused elsewhere.
        activation_clips: frozen clips, module name -> operand -> ``{"signed": bool, "clips": [float, ...]}``, written
            by ``calibrate_octav``: one for a layer's ``"input"``, and for an operand of an attention module one for
            each time that its forward multiplies it. Each is a number, or with ``activation_granularity`` a list of one
            for each head, or for each head a list of one for each channel. A shifted grid has ``"lowest": float`` too.
            Operands that are not in it have dynamic clips.

    A name pattern is a module's full dotted name, or a shell-style pattern for it
    (``"bert.encoder.layer.0.*"``, ``"*.attention.self"``). One that matches no module is refused by ``apply_octav``.

    Raises:
        ValueError: an unknown field, clip, gradient or option, or an impossible value; the message says what to write.
    """

    def __init__(
        self,
        weight_bits: int | None = 4,
        activation_bits: int | None = 4,
        embedding_bits: int | None = None,
        weight_clip: str = "octav",
        activation_clip: str = "octav",
        weight_clip_options: dict[str, Any] | None = None,
        activation_clip_options: dict[str, Any] | None = None,
        weight_granularity: str = "row",
        activation_granularity: dict[str, str] | None = None,
        weight_gradient: str = "mad",
        activation_gradient: str = "pwl",
        unsigned_activations: bool = True,
        shifted_activations: bool = False,
        quantize_attention: bool = True,
        sync_activation_clips: bool = False,
        first_last_bits: int | None = None,
        exclude_modules: Iterable[str] = (),
        module_overrides: dict[str, dict[str, Any]] | None = None,
        packed: bool = False,
        frozen_weight_clips: bool = False,
        activation_clips: ActivationClips | None = None,
        **unknown: Any,
    ):
        if unknown:
            known = [name for name in inspect.signature(OctavConfig).parameters if name != "unknown"]
            raise ValueError(_unknown("OctavConfig has no field", unknown, known))
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.embedding_bits = embedding_bits
        self.weight_clip = weight_clip
        self.activation_clip = activation_clip
        self.weight_clip_options = {} if weight_clip_options is None else weight_clip_options
        self.activation_clip_options = {} if activation_clip_options is None else activation_clip_options
        self.weight_granularity = weight_granularity
        self.activation_granularity = {} if activation_granularity is None else activation_granularity
        self.weight_gradient = weight_gradient
        self.activation_gradient = activation_gradient
        self.unsigned_activations = unsigned_activations
        self.shifted_activations = shifted_activations
        self.quantize_attention = quantize_attention
        self.sync_activation_clips = sync_activation_clips
        self.first_last_bits = first_last_bits
        is_list = isinstance(exclude_modules, Iterable) and not isinstance(exclude_modules, str | Mapping)
        self.exclude_modules = list(exclude_modules) if is_list else exclude_modules
        self.module_overrides = {} if module_overrides is None else module_overrides
        self.packed = packed
        self.frozen_weight_clips = frozen_weight_clips
        self.activation_clips = {} if activation_clips is None else activation_clips
        self.validate()

    @classmethod
    def paper(cls, **fields: Any) -> "OctavConfig":
        """The paper's clips, granularity, grids and gradients, whatever the defaults are; ``fields`` add to them."""
        return cls(**copy.deepcopy(_PAPER) | fields)

    @classmethod
    def accurate(cls, **fields: Any) -> "OctavConfig":
        """What loses least at few bits, by the measurements in ``examples/squad/README.md``; ``fields`` add to it.

        The clip ``"mse"`` for weights and activations, as many clips as scales factor out of the products, and shifted
        grids. A step takes longer than the paper's, and clips per token cannot be frozen as such.
        """
        return cls(**copy.deepcopy(_ACCURATE) | fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that ``to_dict`` wrote; keyword arguments named like a field replace its value.

        Raises:
            ValueError: a later version of the format, another quantization method, or a field that ``OctavConfig``
                refuses.
        """
        values = dict(config_dict)
        _check_version(values.pop("format_version", FORMAT_VERSION), values.pop("octav_hf_version", "unknown"))
        method = values.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(
                f"this is a config of quant_method {method!r}, not {QUANT_METHOD!r}; load it with its own class"
            )
        replaced = {name: kwargs.pop(name) for name in list(kwargs) if name in inspect.signature(cls).parameters}
        config = cls(**(values | replaced))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The fields, and by which version of the format and of this package they were written."""
        return super().to_dict() | {"format_version": FORMAT_VERSION, "octav_hf_version": __version__}

    def with_fields(self, **fields: Any) -> "OctavConfig":
        """A copy with those fields."""
        return OctavConfig.from_dict(self.to_dict() | fields)

    def validate(self) -> None:
        """Check every field; ``apply_octav`` does so again, since fields can be assigned."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        _validate_settings(settings, "OctavConfig")
        _validate_bits("OctavConfig: first_last_bits", self.first_last_bits, "to treat those layers as the others")
        if not any(settings[f"{side}_bits"] for side in _SIDES) and not self.module_overrides:
            raise ValueError(
                "weight_bits, activation_bits and embedding_bits are all None, so nothing would be quantized; set one"
            )
        for name in ("packed", "frozen_weight_clips", "sync_activation_clips"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_rule_for_all_ranks(settings, "OctavConfig")
        patterns = self.exclude_modules
        if not isinstance(patterns, list) or not all(isinstance(name, str) for name in patterns):
            raise ValueError(f"exclude_modules must be a list of name patterns, got {self.exclude_modules!r}")
        if not isinstance(self.module_overrides, dict):
            raise ValueError(f"module_overrides must map name patterns to fields, got {self.module_overrides!r}")
        for pattern, override in self.module_overrides.items():
            where = f"module_overrides[{pattern!r}]"
            if not isinstance(override, dict):
                raise ValueError(f"{where} must map fields to values, such as {{'weight_bits': 8}}, got {override!r}")
            unknown = [name for name in override if name not in _SETTINGS]
            if unknown:
                raise ValueError(_unknown(f"{where} cannot set", unknown, _SETTINGS))
            _validate_settings(settings | override, where)
            self._check_rule_for_all_ranks(settings | override, where)
        validate_activation_clips(self.activation_clips)

    def _check_rule_for_all_ranks(self, settings: dict[str, Any], where: str) -> None:
        supported, clip = rules_for_all_ranks(), settings["activation_clip"]
        if self.sync_activation_clips and settings["activation_bits"] is not None and clip not in supported:
            raise ValueError(
                f"{where}: sync_activation_clips is for the activation clips {', '.join(map(repr, supported))}, not "
                f"for {clip!r}, which each process can only compute from its own batch; change one of the two"
            )

    def excluded_by(self, module_name: str) -> str | None:
        """The pattern of ``exclude_modules`` that leaves this module in float, if there is one."""
        return next((pattern for pattern in self.exclude_modules if matches(pattern, module_name)), None)

    def settings_for(self, module_name: str) -> ModuleSettings:
        """The settings of the module with this full name.

        Raises:
            ValueError: two overrides of one kind (exact names, or patterns with wildcards) set a field differently.
        """
        values = {name: getattr(self, name) for name in _SETTINGS}
        matching = [pattern for pattern in self.module_overrides if matches(pattern, module_name)]
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
        return ModuleSettings(**values)


def matches(pattern: str, module_name: str) -> bool:
    """Whether ``pattern`` names the module or one of those that contain it."""
    parts = module_name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _check_version(version: Any, written_by: Any) -> None:
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version of a checkpoint's quantization_config must be 1 or more, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this checkpoint has format version {version}, written by octav_hf {written_by}; octav_hf {__version__} "
            f"reads versions up to {FORMAT_VERSION}: pip install --upgrade 'octav-hf>={written_by}'"
        )


def _validate_settings(settings: dict[str, Any], where: str) -> None:
    for side in _SIDES:
        _validate_bits(f"{where}: {side}_bits", settings[f"{side}_bits"], "to leave it in float")
    for side in ("weight", "activation"):
        clip = settings[f"{side}_clip"]
        if not isinstance(clip, str) or clip not in CLIP_RULES:
            raise ValueError(_unknown(f"{where}: {side}_clip cannot be", [clip], CLIP_RULES))
        gradient = settings[f"{side}_gradient"]
        if not isinstance(gradient, str) or gradient not in GRADIENTS:
            raise ValueError(_unknown(f"{where}: {side}_gradient cannot be", [gradient], GRADIENTS))
        options = settings[f"{side}_clip_options"]
        if not isinstance(options, dict):
            raise ValueError(f"{where}: {side}_clip_options must be a dict of keyword arguments, got {options!r}")
        accepted = [name for name in inspect.signature(CLIP_RULES[clip]).parameters if name not in RULE_ARGUMENTS]
        unknown = [name for name in options if name not in accepted]
        if unknown:
            problem = f"{where}: {side}_clip_options: the clip {clip!r} has no option"
            raise ValueError(_unknown(problem, unknown, accepted))
        try:
            # On the CPU whatever the default device: from_pretrained builds models on meta.
            CLIP_RULES[clip](torch.ones(1, device="cpu"), settings[f"{side}_bits"] or MAX_BITS, **options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {side}_clip_options: {error}") from error
    if settings["weight_granularity"] not in WEIGHT_GRANULARITIES:
        raise ValueError(
            _unknown(f"{where}: weight_granularity cannot be", [settings["weight_granularity"]], WEIGHT_GRANULARITIES)
        )
    _validate_activation_granularity(settings["activation_granularity"], f"{where}: activation_granularity")
    for name in ("unsigned_activations", "shifted_activations", "quantize_attention"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"{where}: {name} must be True or False, got {settings[name]!r}")
    if settings["shifted_activations"] and not settings["unsigned_activations"]:
        raise ValueError(
            f"{where}: shifted_activations=True needs unsigned_activations=True: what is shifted is the unsigned grid"
        )


def _validate_activation_granularity(granularities: Any, where: str) -> None:
    if not isinstance(granularities, dict):
        raise ValueError(
            f"{where} must map operands to granularities, such as {{'input': 'token'}}, got {granularities!r}"
        )
    for operand, granularity in granularities.items():
        if operand not in GRANULARITIES:
            raise ValueError(_unknown(f"{where} has no operand", [operand], GRANULARITIES))
        allowed = GRANULARITIES[operand]
        if granularity in allowed:
            continue
        reason = refusal(operand, granularity) if isinstance(granularity, str) else ""
        if reason:
            instead = " or ".join(repr(name) for name in allowed[::-1])
            raise ValueError(f"{where} of {operand!r} cannot be {granularity!r}: {reason}; write {instead}")
        raise ValueError(_unknown(f"{where} of {operand!r} cannot be", [granularity], allowed))


def _validate_bits(field: str, bits: Any, none: str) -> None:
    if bits is not None and (type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS):
        raise ValueError(f"{field} must be an integer from {MIN_BITS} to {MAX_BITS}, or None {none}; got {bits!r}")


def _unknown(problem: str, names: Iterable[Any], known: Iterable[str]) -> str:
    """``problem``, the names, what is close to them and what there is."""
    names, known = list(names), list(known)
    close = difflib.get_close_matches(str(names[0]), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{problem} {', '.join(map(repr, names))}{hint} choose from {', '.join(map(repr, known)) or 'nothing'}"
