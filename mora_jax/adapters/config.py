"""What to adapt and how: one frozen dataclass a method.

`targets` is the same for every method: a sequence of layer names (`("q_proj", "v_proj")`; a name matches the last
components of a module path), one regular expression that must match the whole path (`r".*attn.*"`), or `"all-linear"`
(every linear layer but the output head). `layers_to_transform` keeps some numbered layers of those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

Targets = str | tuple[str, ...]
Pattern = Mapping[str, Any] | tuple[tuple[str, Any], ...]
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva")
BIASES = ("none", "lora_only", "all")


def _freeze_targets(targets) -> Targets:
    if isinstance(targets, str):
        if not targets:
            raise ValueError("targets is empty; give layer names, a regular expression or 'all-linear'")
        return targets
    names = tuple(targets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"targets must be layer names, a regular expression or 'all-linear', not {targets!r}")
    return names


def _check_rank(rank: Any, name: str = "rank") -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{name} must be a positive integer, not {rank!r}")


def _check_positive(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, not {value!r}")


def _freeze_pattern(pattern: Pattern, name: str, check) -> tuple[tuple[str, Any], ...]:
    """A pattern as pairs, which can be hashed; keys are regular expressions."""
    pairs = tuple((key, value) for key, value in (pattern.items() if isinstance(pattern, Mapping) else pattern))
    for key, value in pairs:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{name} {key!r} is no regular expression: {error}") from None
        check(value, f"{name}[{key!r}]")
    return pairs


def _names(names: Any, what: str) -> tuple[str, ...]:
    given = (names,) if isinstance(names, str) else tuple(names or ())
    if not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"{what} must be module names, not {names!r}")
    return given


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every method has.

    Attributes:
        layers_to_transform: numbers of the layers that are adapted, one number or several; None for all. The number
            of a layer is the first number in its module path; layers without one are left out.
        modules_to_save: names of modules (`"lm_head"`, `"embed_tokens"`, `"norm"`) that are trained whole, as
            float32 masters, and never adapted.
    """

    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()

    # Of methods without such a field. Not annotated: an annotation would fix their place among a subclass's fields.
    dropout = 0.0
    bias = "none"

    @property
    def rates(self) -> dict[str, float]:
        """How many times the learning rate arrays of some names get."""
        return {}

    def at_path(self, path: str) -> CommonConfig:
        """The configuration for one module path."""
        return self

    def __post_init__(self):
        object.__setattr__(self, "targets", _freeze_targets(self.targets))  # type: ignore[attr-defined]
        object.__setattr__(self, "modules_to_save", _names(self.modules_to_save, "modules_to_save"))
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout!r}")
        layers = self.layers_to_transform
        if layers is not None:
            numbers = (layers,) if isinstance(layers, int) else tuple(layers)
            if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError(f"layers_to_transform must be layer numbers, not {layers!r}")
            object.__setattr__(self, "layers_to_transform", numbers)


@dataclass(frozen=True)
class LoRAConfig(CommonConfig):
    """LoRA (Hu et al., 2021, arXiv 2106.09685): a product of two thin factors, scaled by alpha / rank.

    Attributes:
        rank: inner size of the update.
        alpha: numerator of the scaling alpha / rank.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers, see the module's docstring.
        rank_pattern, alpha_pattern: other ranks and alphas for some layers, by the end of a module path or a regular
            expression for it; the first key that matches counts. Layers of one stack may have different ranks.
        bias: which existing biases are trained too: `"none"`, `"lora_only"` (of adapted layers) or `"all"`.
        use_dora: whether the columns of the adapted kernel get DoRA's trained magnitude (see `magnitude.py`).
        init: where the factors start: `"kaiming"`, `"gaussian"`, `"orthogonal"`, `"pissa"`, `"olora"` or `"eva"`
            (see `starts.py`).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    rank_pattern: Pattern = field(default=(), kw_only=True)
    alpha_pattern: Pattern = field(default=(), kw_only=True)
    bias: str = field(default="none", kw_only=True)
    use_dora: bool = field(default=False, kw_only=True)
    init: str = field(default="kaiming", kw_only=True)

    def __post_init__(self):
        _check_rank(self.rank)
        super().__post_init__()
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, not {self.init!r}")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, not {self.bias!r}")
        ranks = _freeze_pattern(self.rank_pattern, "rank_pattern", _check_rank)
        alphas = _freeze_pattern(self.alpha_pattern, "alpha_pattern", _check_positive)
        object.__setattr__(self, "rank_pattern", ranks)
        object.__setattr__(self, "alpha_pattern", alphas)


@dataclass(frozen=True)
class RsLoRAConfig(LoRAConfig):
    """Rank-stabilised LoRA (Kalajdzievski, 2023, arXiv 2312.03732): LoRA scaled by alpha / √rank.

    With alpha / rank the update of a high rank learns ever more slowly; with alpha / √rank its size does not depend
    on the rank. The attributes are those of `LoRAConfig`.
    """


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """DoRA (Liu et al., 2024, arXiv 2402.09353): LoRA changes directions, a trained vector holds the magnitudes.

    The attributes are those of `LoRAConfig`. `use_dora=True` puts the same magnitude on `RsLoRAConfig` and
    `MoRAConfig`.
    """

    use_dora: bool = field(default=True, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not self.use_dora:
            raise ValueError("DoRA without its magnitude is LoRA; use LoRAConfig")


@dataclass(frozen=True)
class PiSSAConfig(LoRAConfig):
    """PiSSA (Meng et al., 2024, arXiv 2404.02948): LoRA that starts from the kernel's principal singular vectors.

    The attributes are those of `LoRAConfig`.
    """

    init: str = field(default="pissa", kw_only=True)


@dataclass(frozen=True)
class OLoRAConfig(LoRAConfig):
    """OLoRA (Büyükakyüz, 2024, arXiv 2406.01775): LoRA that starts from the kernel's QR decomposition.

    The attributes are those of `LoRAConfig`.
    """

    init: str = field(default="olora", kw_only=True)


@dataclass(frozen=True)
class LoRAPlusConfig(LoRAConfig):
    """LoRA+ (Hayou et al., 2024, arXiv 2402.12354): LoRA whose B has a higher learning rate than A.

    The other attributes are those of `LoRAConfig`.

    Attributes:
        lr_ratio: learning rate of B, of magnitudes and of biases over that of A.
    """

    lr_ratio: float = field(default=16.0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _check_positive(self.lr_ratio, "lr_ratio")

    @property
    def rates(self) -> dict[str, float]:
        return dict.fromkeys(("lora_b", "magnitude", "bias"), self.lr_ratio)


@dataclass(frozen=True)
class LoRAFAConfig(LoRAConfig):
    """LoRA-FA (Zhang et al., 2023, arXiv 2308.03303): LoRA with A frozen; the attributes are those of `LoRAConfig`."""


@dataclass(frozen=True)
class MoRAConfig(CommonConfig):
    """MoRA (Jiang et al., 2024, arXiv 2405.12130): a square matrix between fixed compression and decompression.

    MoRA has no alpha and no factor that depends on the rank, so there is no rank-stabilised form of it.

    Attributes:
        rank: the LoRA rank whose parameter count the square matrix takes; its side follows from `square_rank`.
        kind: how inputs are compressed and outputs restored, one of `mora_jax.adapters.mora.KINDS`.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers, see the module's docstring.
        rank_pattern: as in `LoRAConfig`, but layers of one stack have one rank: it fixes the square's side.
        use_dora: as in `LoRAConfig`.
    """

    rank: int = 8
    kind: str = "sharing"
    dropout: float = 0.0
    targets: Targets = "all-linear"
    rank_pattern: Pattern = field(default=(), kw_only=True)
    use_dora: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        from mora_jax.adapters.mora import check_kind

        _check_rank(self.rank)
        super().__post_init__()
        check_kind(self.kind)
        ranks = _freeze_pattern(self.rank_pattern, "rank_pattern", _check_rank)
        object.__setattr__(self, "rank_pattern", ranks)


@dataclass(frozen=True)
class VeRAConfig(CommonConfig):
    """VeRA (Kopiczko et al., 2023, arXiv 2310.11454): two trained vectors around random factors that layers share.

    Attributes:
        rank: inner size of the frozen factors; far higher than LoRA's.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers, see the module's docstring.
        d_initial: what the inner vector starts from.
        projection_prng_key: seed of the frozen factors.
    """

    rank: int = 256
    dropout: float = 0.0
    targets: Targets = "all-linear"
    d_initial: float = field(default=0.1, kw_only=True)
    projection_prng_key: int = field(default=0, kw_only=True)

    def __post_init__(self):
        _check_rank(self.rank)
        super().__post_init__()


@dataclass(frozen=True)
class AdaLoRAConfig(CommonConfig):
    """AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): a budget of singular values goes to where they matter.

    Attributes:
        rank: inner size of every update at the start.
        alpha: numerator of the scaling alpha / rank.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers, see the module's docstring.
        target_rank: mean rank that is left at the end.
        tinit, tfinal: steps at the start with the whole budget, and at the end with the final one.
        total_steps: of the training run.
        delta_t: steps between two allocations.
        beta1, beta2: smoothing of importances and of their uncertainty.
        orth_weight: factor on the orthogonality penalty in the loss.
    """

    rank: int = 12
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    target_rank: int = field(default=8, kw_only=True)
    tinit: int = field(default=0, kw_only=True)
    tfinal: int = field(default=0, kw_only=True)
    total_steps: int = field(default=1000, kw_only=True)
    delta_t: int = field(default=1, kw_only=True)
    beta1: float = field(default=0.85, kw_only=True)
    beta2: float = field(default=0.85, kw_only=True)
    orth_weight: float = field(default=0.5, kw_only=True)

    def __post_init__(self):
        for name in ("rank", "target_rank", "total_steps", "delta_t"):
            _check_rank(getattr(self, name), name)
        super().__post_init__()
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank is {self.target_rank}, more than rank {self.rank}")
        if min(self.tinit, self.tfinal) < 0 or self.tinit + self.tfinal > self.total_steps:
            plateaus = self.tinit + self.tfinal
            raise ValueError(f"tinit + tfinal is {plateaus}, more than total_steps {self.total_steps}, or one is < 0")
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in (0, 1), not {getattr(self, name)!r}")


@dataclass(frozen=True)
class IA3Config(CommonConfig):
    """(IA)³ (Liu et al., 2022, arXiv 2205.05638): learned vectors rescale keys, values and feed-forward inputs.

    Attributes:
        targets: which layers, see the module's docstring.
        feedforward: names of those layers whose inputs are scaled; outputs are scaled of the others.
    """

    targets: Targets = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = field(default=("down_proj",), kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        names = (self.feedforward,) if isinstance(self.feedforward, str) else tuple(self.feedforward)
        object.__setattr__(self, "feedforward", names)

    def at_path(self, path: str) -> IA3Config:
        found = any(path == name or path.endswith("." + name) for name in self.feedforward)
        return replace(self, feedforward=self.feedforward if found else ())


@dataclass(frozen=True)
class ReLoRAConfig(LoRAConfig):
    """ReLoRA (Lialin et al., 2023, arXiv 2307.05695): LoRA that is merged into the base and started anew, repeatedly.

    The sum of low-rank updates has a higher rank than each. The attributes are those of `LoRAConfig`, and:

    Attributes:
        restart_every: steps between restarts.
        prune: share of the optimizer's moments that a restart sets to zero, the smallest in magnitude of each matrix.
        restart_warmup: steps over which the learning rate rises again after a restart.
    """

    restart_every: int = field(default=1000, kw_only=True)
    prune: float = field(default=0.99, kw_only=True)
    restart_warmup: int = field(default=50, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.init != "kaiming":
            raise ValueError(f"ReLoRA draws its factors anew at each restart, as init='kaiming', not {self.init!r}")
        _check_restarts(self)


@dataclass(frozen=True)
class ReMoRAConfig(MoRAConfig):
    """ReMoRA (Jiang et al., 2024, arXiv 2405.12130, section 5.3): MoRA merged and started anew with another kind.

    One kind can only reach updates that its groups allow; the next kind groups differently.

    Attributes:
        rank, dropout, targets, rank_pattern, use_dora: as in `MoRAConfig`.
        kinds: the kinds in turn, the first again after the last: of those that share one M among groups
            (`mora_jax.adapters.mora.SHARED`), which have the same side q.
        restart_every, restart_warmup: as in `ReLoRAConfig`.
        prune: as in `ReLoRAConfig`; the authors reset all of the moments.
    """

    kind: ClassVar[str] = "sharing"  # type: ignore[misc]  # for sizes and reports alone: all kinds agree in them
    kinds: tuple[str, ...] = field(default=("sharing", "grouped", "grouped_tile", "strided_interleave"), kw_only=True)
    restart_every: int = field(default=1000, kw_only=True)
    prune: float = field(default=1.0, kw_only=True)
    restart_warmup: int = field(default=50, kw_only=True)

    def __post_init__(self):
        from mora_jax.adapters.mora import SHARED

        super().__post_init__()
        _check_restarts(self)
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        if not kinds or any(kind not in SHARED for kind in kinds):
            raise ValueError(f"kinds must be some of {', '.join(SHARED)}, not {self.kinds!r}")
        object.__setattr__(self, "kinds", kinds)


def _check_restarts(config: ReLoRAConfig | ReMoRAConfig) -> None:
    every, warmup, prune = config.restart_every, config.restart_warmup, config.prune
    if type(every) is not int or every < 1:
        raise ValueError(f"restart_every must be a positive integer, not {every!r}")
    if type(warmup) is not int or not 0 <= warmup <= every:
        raise ValueError(f"restart_warmup must be an integer from 0 to restart_every={every}, not {warmup!r}")
    if isinstance(prune, bool) or not isinstance(prune, (int, float)) or not 0 <= prune <= 1:
        raise ValueError(f"prune must be a share from 0 to 1, not {prune!r}")


@dataclass(frozen=True)
class BitFitConfig(CommonConfig):
    """BitFit (Ben Zaken et al., 2021, arXiv 2106.10199): the biases alone are trained.

    Attributes:
        targets: whose biases, see the module's docstring; a layer without a bias gets one that starts at zero.
    """

    targets: Targets = "all-linear"


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: every parameter of the model is trained as a float32 master."""


AdapterConfig = CommonConfig | FullConfig
