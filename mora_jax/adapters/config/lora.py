"""LoRA and those that change its start, its scaling or its learning rates."""

from __future__ import annotations

from dataclasses import dataclass, field

from mora_jax.adapters.config.common import CommonConfig, Pattern, Targets, check_bias

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva")


@dataclass(frozen=True)
class LoRAConfig(CommonConfig):
    """LoRA (Hu et al., 2021, arXiv 2106.09685): a product of two thin factors, scaled by alpha / rank.

    Attributes:
        rank: inner size of the update.
        alpha: numerator of the scaling alpha / rank, above 0.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        rank_pattern: other ranks for some layers, by the end of a module path or a regular expression for it; the first
            key that matches counts. Layers of one stack may have different ranks.
        alpha_pattern: other alphas, likewise.
        bias: which existing biases are trained too: `"none"`, `"lora_only"` (of adapted layers) or `"all"`.
        use_dora: whether the columns of the adapted kernel get DoRA's trained magnitude.
        init: where the factors start: `"kaiming"`, `"gaussian"`, `"orthogonal"`, `"pissa"`, `"olora"` or `"eva"`
            (see `mora_jax.adapters.methods.lora_init`).
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
        super().__post_init__()
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, not {self.init!r}")
        check_bias(self.bias)


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

    @property
    def rates(self) -> dict[str, float]:
        return dict.fromkeys(("lora_b", "magnitude", "bias"), self.lr_ratio)


@dataclass(frozen=True)
class LoRAFAConfig(LoRAConfig):
    """LoRA-FA (Zhang et al., 2023, arXiv 2308.03303): LoRA with A frozen; the attributes are those of `LoRAConfig`."""
