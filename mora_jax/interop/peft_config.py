"""`adapter_config.json`: PEFT's fields for LoRA, and the MoRA authors' two more."""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from flax import nnx

from mora_jax.adapters.config import BIASES, DoRAConfig, LoRAConfig, MoRAConfig, RsLoRAConfig
from mora_jax.adapters.mora import KINDS
from mora_jax.errors import InputError

MORA_TYPES = {1: "sharing", 2: "grouped", 3: "grouped_tile", 4: "strided_interleave", 6: "rotation"}
KIND_FIELD = "mora_jax_kind"  # for the kinds that the authors' format has no number for

# Fields that, when set, change the function in a way that is not supported here.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
_KNOWN = {
    *_REFUSED,
    KIND_FIELD,
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # says how the base is stored; the factors are stored alike
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "mora_type",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_mora",
    "use_rslora",
    "velora_config",
}
# Starts that leave the base weights alone; the others subtract something from them.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_EXTRA = "peft_fields"  # the attribute of a model that holds them, as JSON
_DEFAULT_TARGETS = ["q_proj", "v_proj"]


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What an `adapter_config.json` says.

    Attributes:
        kind: the MoRA kind; None for LoRA.
        values: the file's fields.
        where: the file, for error messages.
    """

    kind: str | None
    values: dict[str, Any]
    where: str

    def matches(self, path: str) -> bool:
        """Whether PEFT would adapt the module at `path`."""
        if self.saves(path):
            return False
        targets = self.values.get("target_modules")
        excluded = self.values.get("exclude_modules")
        if excluded and _named(excluded, path):
            return False
        if targets is None:
            targets = _DEFAULT_TARGETS
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return path.rpartition(".")[2] not in ("lm_head", "embed_tokens")
        if not _named(targets, path):
            return False
        layers = self.values.get("layers_to_transform")
        if layers is None or isinstance(targets, str):
            return True
        patterns = self.values.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = re.match(rf".*?\.{pattern}\.(\d+)\.", path)
            if found:
                return int(found.group(1)) in ([layers] if isinstance(layers, int) else layers)
        return False

    def config(self, path: str) -> LoRAConfig | MoRAConfig:
        """The configuration at `path`, which is its target."""
        rank = pattern_value(self.values.get("rank_pattern"), path, self.values.get("r", 8))
        dropout = self.values.get("lora_dropout", 0.0)
        use_dora = bool(self.values.get("use_dora"))
        if self.kind is not None:
            return MoRAConfig(rank=rank, kind=self.kind, dropout=dropout, targets=(path,), use_dora=use_dora)
        alpha = float(pattern_value(self.values.get("alpha_pattern"), path, self.values.get("lora_alpha", 8)))
        plain = DoRAConfig if use_dora else LoRAConfig
        method = RsLoRAConfig if self.values.get("use_rslora") else plain
        bias = self.values.get("bias", "none")
        return method(rank=rank, alpha=alpha, dropout=dropout, targets=(path,), bias=bias, use_dora=use_dora)

    @property
    def bias(self) -> str:
        """Which biases the file holds: "none", "lora_only" or "all"."""
        return self.values.get("bias", "none")

    @property
    def unknown(self) -> dict[str, Any]:
        """Fields of a newer PEFT."""
        return {name: value for name, value in self.values.items() if name not in _KNOWN}

    def saves(self, path: str) -> bool:
        """Whether PEFT trains the module at `path`, or one around it, whole."""
        names = self.values.get("modules_to_save") or []
        parts = path.split(".")
        above = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(module.endswith(name) for name in names for module in above)


def _named(names: str | list[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def scaling_at(values: dict[str, Any], path: str) -> float:
    """The factor on LoRA's update at `path`, as PEFT means it."""
    rank = pattern_value(values.get("rank_pattern"), path, values.get("r", 8))
    alpha = pattern_value(values.get("alpha_pattern"), path, values.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def pattern_value(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `path`."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def read_adapter_config(values: dict[str, Any], where: str) -> AdapterFile:
    """Checks the fields of an `adapter_config.json`.

    Raises:
        InputError: for another kind of adapter, or a field that changes the function in an unsupported way.
    """
    if values.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type must be LORA, found {values.get('peft_type')!r}")
    for name in _REFUSED:
        if values.get(name):
            raise InputError(f"{where}: {name} is set, which is not supported")
    if values.get("init_lora_weights", True) not in _HARMLESS_INITS:
        raise InputError(
            f"{where}: init_lora_weights {values['init_lora_weights']!r} changes the base weights; convert "
            "it to plain LoRA first (in PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    _check_types(values, where)
    file = AdapterFile(_kind(values, where), values, where)
    if file.unknown:
        names = ", ".join(sorted(file.unknown))
        warnings.warn(f"{where}: unknown fields are kept, but have no effect: {names}", stacklevel=3)
    if file.kind is not None and file.bias != "none":
        raise InputError(f"{where}: bias {file.bias!r} beside MoRA is not supported")
    return file


def _kind(values: dict[str, Any], where: str) -> str | None:
    if KIND_FIELD in values:
        if values[KIND_FIELD] not in KINDS:
            raise InputError(f"{where}: {KIND_FIELD} must be one of {', '.join(KINDS)}, found {values[KIND_FIELD]!r}")
        return values[KIND_FIELD]
    if not values.get("use_mora"):
        return None
    number = values.get("mora_type", 1)
    if number not in MORA_TYPES:
        raise InputError(f"{where}: mora_type must be one of {sorted(MORA_TYPES)}, found {number!r}")
    return MORA_TYPES[number]


def _check_types(values: dict[str, Any], where: str) -> None:
    def require(name: str, good: bool, wanted: str) -> None:
        if not good:
            raise InputError(f"{where}: {name} must be {wanted}, found {values.get(name)!r}")

    def numbers(patterns: Any, kinds: tuple[type[float], ...]) -> bool:
        return isinstance(patterns, dict) and all(
            isinstance(value, kinds) and not isinstance(value, bool) and value > 0 for value in patterns.values()
        )

    def strings(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))

    require("r", numbers({"r": values.get("r", 8)}, (int,)), "a positive whole number")
    require("lora_alpha", numbers({"": values.get("lora_alpha", 8)}, (int, float)), "a positive number")
    dropout = values.get("lora_dropout", 0.0)
    require("lora_dropout", isinstance(dropout, (int, float)) and 0 <= dropout < 1, "a number in [0, 1)")
    saved = values.get("modules_to_save")
    require("modules_to_save", saved is None or (isinstance(saved, list) and strings(saved)), "a list of names")
    require("bias", values.get("bias", "none") in BIASES, f"one of {', '.join(BIASES)}")
    require("rank_pattern", numbers(values.get("rank_pattern") or {}, (int,)), "names with positive whole numbers")
    require(
        "alpha_pattern",
        numbers(values.get("alpha_pattern") or {}, (int, float)),
        "names with positive numbers",
    )
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        require(name, values.get(name) is None or strings(values[name]), "a list of names or a string")
        _check_regexes(where, name, values.get(name))
    for name in ("rank_pattern", "alpha_pattern"):
        for key in values.get(name) or {}:
            _check_regexes(where, name, key)
    layers = values.get("layers_to_transform")
    indices = layers if isinstance(layers, list) else [layers]
    good = layers is None or all(isinstance(index, int) and not isinstance(index, bool) for index in indices)
    require("layers_to_transform", good, "a layer's number or a list of them")


def _check_regexes(where: str, name: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise InputError(f"{where}: {name} {value!r} is not a regular expression: {error}") from None


def keep_extra_fields(model: nnx.Module, file: AdapterFile) -> None:
    """Notes the fields of a newer PEFT on the model, to be written back when its adapter is saved."""
    put_extra_fields(model, file.unknown)


def put_extra_fields(model: nnx.Module, fields: Mapping[str, Any]) -> None:
    """Makes `fields` those that a model's adapter is saved with, beside its own."""
    if fields or extra_fields(model):
        setattr(model, _EXTRA, json.dumps(dict(fields), sort_keys=True))


def extra_fields(model: nnx.Module) -> dict[str, Any]:
    """Fields that `keep_extra_fields` noted."""
    return json.loads(getattr(model, _EXTRA, "{}"))


def lora_fields(
    config: LoRAConfig,
    *,
    targets: list[str],
    alpha: float,
    ranks: dict[str, int],
    alphas: dict[str, float],
    base: str | None,
) -> dict[str, Any]:
    """The fields of a LoRA's `adapter_config.json`; the ones that PEFT 0.21 knows, and those alone."""
    return _shared_fields(config, targets, alpha, ranks, base) | {
        "alpha_pattern": {path: _plain(value) for path, value in alphas.items()},
        "bias": config.bias,
        "exclude_modules": None,
        "lora_bias": False,
        "use_rslora": isinstance(config, RsLoRAConfig),
    }


def mora_fields(config: MoRAConfig, *, targets: list[str], ranks: dict[str, int], base: str | None) -> dict[str, Any]:
    """The fields of a MoRA's `adapter_config.json`: PEFT 0.9's for LoRA, `use_mora` and `mora_type`.

    A kind that the authors' code does not have is named in a field of its own and claims no `mora_type`, so
    their code refuses the file instead of computing something else.
    """
    fields = _shared_fields(config, targets, config.rank, ranks, base) | {"alpha_pattern": {}}
    numbers = {kind: number for number, kind in MORA_TYPES.items()}
    if config.kind in numbers:
        return fields | {"use_mora": True, "mora_type": numbers[config.kind]}
    return fields | {KIND_FIELD: config.kind}


def _shared_fields(
    config: LoRAConfig | MoRAConfig, targets: list[str], alpha: float, ranks: dict[str, int], base: str | None
) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": _plain(alpha),
        "lora_dropout": config.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": ranks,
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": False,
    }


def _plain(value: float) -> int | float:
    """A whole number as int, as PEFT writes it."""
    return int(value) if float(value).is_integer() else float(value)
