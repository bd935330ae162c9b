"""PEFT's LORA: LoRA and its relatives, MoRA with the two fields that its authors add, and BitFit."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.config import (
    BitFitConfig,
    DoRAConfig,
    LoRAConfig,
    MoRAConfig,
    OLoRAConfig,
    PiSSAConfig,
    RsLoRAConfig,
)
from mora_jax.adapters.config.common import CommonConfig
from mora_jax.adapters.config.limits import NUMBERS
from mora_jax.adapters.config.patterns import exactly, pattern_for, value_at
from mora_jax.adapters.methods.mora import KINDS, square_rank
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues
from mora_jax.interop.peft.format import Format, Target, check_regex, plain, require, require_truth, same

MORA_TYPES = {1: "sharing", 2: "grouped", 3: "grouped_tile", 4: "strided_interleave", 6: "rotation"}
KIND_FIELD = "mora_jax_kind"  # for the kinds that the authors' format has no number for

# Starts that leave the base weights alone, and those that PEFT takes from them again whenever it loads the folder.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_FROM_BASE = {"pissa": PiSSAConfig, "olora": OLoRAConfig}


class LoraFormat(Format):
    peft_type = "LORA"
    convolutions = True
    config: ClassVar[type[CommonConfig]] = LoRAConfig
    settings: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 8),
        "lora_alpha": ("alpha", 8),
        "lora_dropout": ("dropout", 0.0),
    }
    init_name: ClassVar[str] = "init_lora_weights"
    methods: ClassVar[tuple[str, ...]] = ("lora", "rslora", "mora")
    tensor_names: ClassVar[Mapping[str, str]] = {
        "a": "lora_A.weight",
        "b": "lora_B.weight",
        "magnitude": "lora_magnitude_vector",
    }
    embedding_names: ClassVar[Mapping[str, str]] = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
    refused: ClassVar[tuple[str, ...]] = (
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "monteclora_config",
        "use_bdlora",
        "use_qalora",
    )
    fields = frozenset(
        {
            *refused,
            KIND_FIELD,
            "alpha_pattern",
            "corda_config",
            "eva_config",
            "loftq_config",
            "lora_ga_config",
            "megatron_config",
            "megatron_core",
            "mora_type",
            "qalora_group_size",
            "rank_pattern",
            "target_parameters",
            "trainable_token_indices",
            "use_dora",
            "use_mora",
            "use_rslora",
            "velora_config",
        }
    )

    def check_values(self, values: dict[str, Any], where: str) -> None:
        super().check_values(values, where)
        for name in ("use_rslora", "use_dora", "use_mora"):
            require_truth(values, where, name)
        for setting in ("rank", "alpha"):
            name, limits = f"{setting}_pattern", NUMBERS[setting]
            pattern = values.get(name) or {}
            good = isinstance(pattern, dict) and all(map(limits.takes, pattern.values()))
            require(values, where, name, good, f"names, each with {limits.describe()}")
            for key in pattern:
                check_regex(where, name, key)

    def check(self, values: dict[str, Any], where: str) -> None:
        init = values.get("init_lora_weights", True)
        known = init is None or isinstance(init, bool | str | int)
        if not known or (init not in _HARMLESS_INITS and init not in _FROM_BASE):
            raise InputError(
                f"{where}: init_lora_weights {init!r} changes the base weights in a way that can't be repeated; "
                "convert it to plain LoRA (in PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
            )
        kind = mora_kind(values, where)
        super().check(values, where)
        tokens = values.get("trainable_token_indices")
        good = tokens is None or (
            isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)
        )
        require(values, where, "trainable_token_indices", good, "a list of ids of tokens")
        if kind is not None and values.get("bias", "none") != "none":
            raise InputError(f"{where}: bias {values['bias']!r} beside MoRA is not supported")

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        more = {"magnitude"} if values.get("use_dora") else set()
        return {"a"} | more | (set() if mora_kind(values, "") else {"b"}), {"a", "b"} | more

    def needs_base(self, values: dict[str, Any]) -> bool:
        start = values.get("init_lora_weights") in _FROM_BASE
        return bool(values.get("use_dora")) or start or super().needs_base(values)

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        config, place = lora_config(values, target.setting_path), target.place
        arrays: dict[str, np.ndarray] = {}
        if isinstance(config, MoRAConfig):
            side = square_rank(place.in_features, place.out_features, config.rank, config.kind)
            arrays["m"] = target.read("a", (side, side))
            if "b" in target.names and not np.array_equal(arrays["m"], target.read("b", (side, side))):
                both = f"{target.names['a']} and {target.names['b']}"
                raise InputError(f"{target.files.folder}: {both} differ, but MoRA has one matrix")
        else:
            arrays["lora_a"] = target.read("a", (config.rank, place.in_features)).T
            arrays["lora_b"] = target.read("b", (place.out_features, config.rank)).T
            arrays["scaling"] = np.asarray(scaling_at(values, target.setting_path))
        if "magnitude" in target.names:
            arrays["magnitude"] = target.read("magnitude", (place.out_features,))
        return AdapterValues(config, arrays)

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        params = entry.params
        tensors: dict[str, np.ndarray] = {}
        if "m" in params:
            tensors |= {"a": params["m"], "b": params["m"]}
        if "lora_a" in params:
            tensors |= {"a": params["lora_a"].T, "b": params["lora_b"].T}
        if "magnitude" in params:
            tensors["magnitude"] = params["magnitude"]
        return tensors

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        """PEFT 0.21's fields for LoRA; for MoRA those of PEFT 0.9, `use_mora` and `mora_type`.

        Ranks below the highest and alphas that differ go into the patterns: `r` is the highest rank, and `lora_alpha`
        gives the commonest scaling there, since loaders that read no patterns make room by the one and scale by the
        other. A kind that MoRA's authors don't have is named in a field of its own and claims no `mora_type`, so their
        code refuses the file instead of computing something else.
        """
        config, rank = entries[0].config, max(entry.config.rank for entry in entries)
        if len({entry.config.use_dora for entry in entries}) > 1:
            raise InputError("one folder holds LoRA with or without DoRA's magnitude, but the model has both")
        alpha, alphas = float(rank), dict[str, float]()
        fields: dict[str, Any]
        if isinstance(config, MoRAConfig):
            kind = same(entries, "kind")
            numbers = {kind: number for number, kind in MORA_TYPES.items()}
            fields = {"use_mora": True, "mora_type": numbers[kind]} if kind in numbers else {KIND_FIELD: kind}
        else:
            # From the scaling that is really used, which may differ by layer.
            scalings = [entry.params["scaling"][()] for entry in entries]
            alpha = alpha_for(collections.Counter(scalings).most_common(1)[0][0], rank, config.scale_power)
            alphas = {
                entry.path: alpha_for(scaling, entry.config.rank, config.scale_power)
                for entry, scaling in zip(entries, scalings, strict=True)
            }
            fields = {"exclude_modules": None, "lora_bias": self.biases_alone}
        return fields | {
            "alpha_pattern": {path: plain(value) for path, value in pattern_for(alphas, alpha).items()},
            "bias": config.bias,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "loftq_config": {},
            "lora_alpha": plain(alpha),
            "lora_dropout": max(entry.config.dropout for entry in entries),
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "r": rank,
            "rank_pattern": pattern_for({entry.path: entry.config.rank for entry in entries}, rank),
            "target_modules": targets,
            "use_dora": config.use_dora,
            "use_rslora": isinstance(config, RsLoRAConfig),
        }


def alpha_for(scaling: np.ndarray | np.floating, rank: int, power: float) -> float:
    """The shortest alpha whose scaling, `alpha / rank ** power`, is this one in its own dtype."""
    alpha = float(scaling) * math.pow(rank, power)
    shortened = (float(f"{alpha:.{digits}g}") for digits in range(1, 18))
    dtype = scaling.dtype.type
    return next((short for short in shortened if dtype(short / math.pow(rank, power)) == scaling), alpha)


def lora_config(values: dict[str, Any], path: str) -> LoRAConfig | MoRAConfig:
    """The configuration at `path`, which is a target."""
    rank = rank_at(values, path)
    dropout = values.get("lora_dropout", 0.0)
    use_dora = bool(values.get("use_dora"))
    kind = mora_kind(values, "")
    if kind is not None:
        return MoRAConfig(rank=rank, kind=kind, dropout=dropout, targets=exactly((path,)), use_dora=use_dora)
    alpha = float(_alpha_at(values, path))
    init = values.get("init_lora_weights")
    start = init if init in _FROM_BASE else "kaiming"
    plain_kind = _FROM_BASE.get(start, DoRAConfig if use_dora else LoRAConfig)
    method = RsLoRAConfig if values.get("use_rslora") else plain_kind
    settings = {"targets": exactly((path,)), "bias": values.get("bias", "none"), "use_dora": use_dora, "init": start}
    return method(rank=rank, alpha=alpha, dropout=dropout, **settings)


def scaling_at(values: dict[str, Any], path: str) -> float:
    """The factor on LoRA's update at `path`, as PEFT means it."""
    rank, alpha = rank_at(values, path), _alpha_at(values, path)
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def rank_at(values: dict[str, Any], path: str) -> int:
    """The rank of LoRA at `path`."""
    return value_at((values.get("rank_pattern") or {}).items(), path, values.get("r") or 8)


def _alpha_at(values: dict[str, Any], path: str) -> float:
    return value_at((values.get("alpha_pattern") or {}).items(), path, values.get("lora_alpha") or 8)


def mora_kind(values: dict[str, Any], where: str) -> str | None:
    """The MoRA kind; None for LoRA."""
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


class BitfitFormat(LoraFormat):
    """BitFit, as PEFT's LoRA with a bias of its own: `y = x W + s (x A B + β)`.

    With A and B zero nothing but β is left, and as the gradient of each of them is a product with the other, neither
    can be trained: such a LoRA is BitFit, in PEFT as here.
    """

    methods = ("bitfit",)
    tensor_names: ClassVar[Mapping[str, str]] = {**LoraFormat.tensor_names, "added": "lora_B.bias"}
    biases_alone = True
    refused = tuple(name for name in LoraFormat.refused if name != "lora_bias")

    def holds(self, values: dict[str, Any]) -> bool:
        return bool(values.get("lora_bias"))

    def check(self, values: dict[str, Any], where: str) -> None:
        super().check(values, where)
        require(values, where, "bias", values.get("bias", "none") == "none", "none beside lora_bias")
        for name in ("use_dora", "use_mora"):
            if values.get(name):
                raise InputError(f"{where}: {name} beside lora_bias is not supported")

    def tensors(self, values: dict[str, Any]) -> tuple[set[str], set[str]]:
        return {"a", "b", "added"}, {"a", "b", "added"}

    def read(self, values: dict[str, Any], target: Target) -> AdapterValues:
        lora = super().read(values, target).values
        if lora["lora_a"].any() or lora["lora_b"].any():
            raise InputError(
                f"{target.files.folder}: lora_bias beside a LoRA that is not zero, as in {target.names['a']}, is not "
                "supported; merge it in PEFT"
            )
        change = target.read("added", (target.place.out_features,)) * lora["scaling"]
        return AdapterValues(BitFitConfig(targets=exactly((target.path,))), {"bias": change})

    def write(self, entry: AdapterEntry) -> dict[str, np.ndarray]:
        zero_a = np.zeros((1, entry.in_features), np.float32)
        zero_b = np.zeros((entry.out_features, 1), np.float32)
        return {"a": zero_a, "b": zero_b, "added": entry.params["bias"]}

    def written(self, entries: list[AdapterEntry], targets: list[str] | str) -> dict[str, Any]:
        lora = LoRAConfig(rank=1, alpha=1.0)
        return super().written([dataclasses.replace(entry, config=lora) for entry in entries], targets)
