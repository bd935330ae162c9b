"""The section `adapter` of the configuration: its keys, and which of them each method reads."""

import dataclasses
from collections.abc import Mapping

from mora_jax.adapters.config.limits import NUMBERS
from mora_jax.adapters.methods.mora import KINDS
from mora_jax.adapters.methods.mora import SHARED as RESTARTED_KINDS
from mora_jax.errors import InputError
from mora_jax.training.config.key import key

# What says which adapter a run starts from; methods know nothing of it.
START = frozenset({"path", "strict"})
# The keys of the section `adapter` that each method reads.
_COMMON = START | {"targets", "layers_to_transform", "modules_to_save"}
_LORA = _COMMON | {"rank", "alpha", "dropout", "rank_pattern", "alpha_pattern", "bias", "use_dora", "init"}
_RESTARTS = frozenset({"restart_every", "restart_warmup", "prune"})
BUDGET = frozenset({"target_rank", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_weight"})
METHOD_KEYS: Mapping[str, frozenset[str]] = {
    "lora": _LORA,
    "rslora": _LORA,
    "dora": _LORA - {"use_dora"},
    "pissa": _LORA - {"init"},
    "olora": _LORA - {"init"},
    "lora_plus": _LORA | {"lr_ratio"},
    "lora_fa": _LORA,
    "mora": _COMMON | {"rank", "kind", "dropout", "rank_pattern", "use_dora"},
    "relora": _LORA - START - {"init"} | _RESTARTS,
    "remora": _COMMON - START | {"rank", "kinds", "dropout", "rank_pattern", "use_dora"} | _RESTARTS,
    "vera": _COMMON | {"rank", "dropout", "d_initial", "projection_prng_key", "bias"},
    "adalora": _COMMON | {"rank", "alpha", "dropout", "bias"} | BUDGET,
    "ia3": _COMMON | {"feedforward"},
    "bitfit": _COMMON,
    "full": frozenset(),
}
# Keys that say how a method is trained; an adapter to start from does not say them.
HOW = BUDGET | {"lr_ratio"}
RESTARTED = ("relora", "remora")
# Methods that change the base itself, so that their result is a whole model.
RESULT_IS_MODEL = (*RESTARTED, "full")
# Methods, and values of adapter.init, that take their start from the base's numbers.
START_FROM_BASE = ("pissa", "olora")


def limits(name: str) -> dict[str, float]:
    """The range of a setting, which is that of the methods' own configurations."""
    return NUMBERS[name].bounds


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Section `adapter`: what is trained."""

    method: str = key("lora", "The fine-tuning method.", choices=tuple(METHOD_KEYS))
    rank: int | None = key(
        None,
        "Rank r; MoRA gets the square matrix with about as many parameters, adalora starts from it; none: the "
        "method's own, 8 (vera 256, adalora 12).",
        **limits("rank"),
    )
    alpha: float = key(16.0, "LoRA scaling: the update is multiplied by alpha / rank.", **limits("alpha"))
    dropout: float = key(0.0, "Dropout on the adapter's input.", **limits("dropout"))
    targets: str | tuple[str, ...] | None = key(
        None,
        "Layers to adapt: a list of names, one regex for the whole path, or all-linear; none: the method's own, "
        "all-linear (ia3: k_proj, v_proj, down_proj).",
    )
    kind: str = key("sharing", "How MoRA compresses and decompresses.", choices=KINDS)
    rank_pattern: tuple[str, ...] | None = key(None, "Other ranks for some layers, as REGEX=RANK.")
    alpha_pattern: tuple[str, ...] | None = key(None, "Other alphas for some layers, as REGEX=ALPHA.")
    bias: str = key("none", "Biases that are trained too.", choices=("none", "lora_only", "all"))
    use_dora: bool = key(False, "Whether columns get DoRA's trained magnitude, as in method dora.")
    init: str = key(
        "kaiming", "How LoRA's factors start.", choices=("kaiming", "gaussian", "orthogonal", "pissa", "olora")
    )
    lr_ratio: float = key(16.0, "How many times A's learning rate B gets, in lora_plus.", **limits("lr_ratio"))
    layers_to_transform: tuple[int, ...] | None = key(
        None, "Numbers of the layers to adapt; none: all.", **limits("layers_to_transform")
    )
    modules_to_save: tuple[str, ...] | None = key(None, "Modules that are trained whole, such as lm_head.")
    kinds: tuple[str, ...] = key(RESTARTED_KINDS, f"ReMoRA's kinds in turn, of {', '.join(RESTARTED_KINDS)}.")
    restart_every: int = key(
        1000, "relora, remora: steps after which adapters are merged and reinitialised.", **limits("restart_every")
    )
    restart_warmup: int = key(
        50, "Steps over which the learning rate rises again after a restart.", **limits("restart_warmup")
    )
    prune: float | None = key(
        None,
        "Share of the optimizer's moments that a restart sets to zero, the smallest; none: 0.99 (relora), 1 (remora).",
        **limits("prune"),
    )
    d_initial: float = key(0.1, "vera: what the inner vector starts from.")
    projection_prng_key: int = key(0, "vera: seed of the frozen factors, as in PEFT.", **limits("projection_prng_key"))
    feedforward: tuple[str, ...] | None = key(
        None, "ia3: names of targets whose inputs are scaled, not their outputs; none: down_proj."
    )
    target_rank: int | None = key(
        None, "adalora: mean rank at the end; none: two thirds of rank.", **limits("target_rank")
    )
    tinit: int = key(0, "adalora: steps at the start with all of the ranks.", **limits("tinit"))
    tfinal: int = key(0, "adalora: steps at the end in which ranks stay.", **limits("tfinal"))
    delta_t: int = key(1, "adalora: steps between two allocations.", **limits("delta_t"))
    beta1: float = key(0.85, "adalora: smoothing of importances.", **limits("beta1"))
    beta2: float = key(0.85, "adalora: smoothing of their uncertainty.", **limits("beta2"))
    orth_weight: float = key(0.5, "adalora: factor on the orthogonality penalty in the loss.", **limits("orth_weight"))
    path: str | None = key(None, "An adapter folder to start from; it says rank, targets and the rest.")
    strict: bool = key(
        False, "Whether an adapter.path that names another base model is refused; it is warned of otherwise."
    )


def check_adapter(adapter: AdapterConfig) -> None:
    """Refuses keys that are fine alone and impossible together.

    Raises:
        InputError: naming the keys and what is allowed.
    """
    if unknown := [kind for kind in adapter.kinds if kind not in RESTARTED_KINDS]:
        raise InputError(
            f"config: adapter.kinds: {unknown[0]!r} is none of ReMoRA's kinds; choose from {', '.join(RESTARTED_KINDS)}"
        )
    targets = ("k_proj", "v_proj", "down_proj") if adapter.targets is None else adapter.targets
    stray = [name for name in adapter.feedforward or () if not isinstance(targets, str) and name not in targets]
    if adapter.method == "ia3" and stray:
        raise InputError(
            f"config: adapter.feedforward: {stray[0]!r} is none of adapter.targets, which are {', '.join(targets)}"
        )
    if adapter.method in RESTARTED and adapter.restart_warmup > adapter.restart_every:
        raise InputError(
            f"config: adapter.restart_warmup={adapter.restart_warmup} must be at most "
            f"adapter.restart_every={adapter.restart_every}"
        )
