"""LoRA's relatives: the same two factors with another scale, start, learning rate or schedule, one class each."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax

from mora_jax.adapters.base import AdapterState
from mora_jax.adapters.config.common import RestartConfig
from mora_jax.adapters.config.limits import Number
from mora_jax.adapters.methods.lora import INITS, LoRA, LoRAConfig, init


@dataclass(frozen=True)
class RsLoRAConfig(LoRAConfig):
    """Rank-stabilised LoRA (Kalajdzievski, 2023, arXiv 2312.03732): LoRA scaled by alpha / √rank.

    `ΔW = (alpha / √rank) · A B` (theorem 3.2).

    With alpha / rank the update of a high rank learns ever more slowly; with alpha / √rank its size does not depend
    on the rank. The attributes are those of `LoRAConfig`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.RsLoRAConfig(rank=2), rngs=1).trainable  # as LoRA's
        20
    """

    scale_power = 0.5


class RsLoRA(LoRA):
    """Rank-stabilised LoRA: `y = x W + (alpha / √rank) · (x A) B` (Kalajdzievski, 2023, arXiv 2312.03732, theorem 3.2).

    LoRA whose scaling keeps the size of the update whatever the rank.
    """

    method: ClassVar[str] = "rslora"
    file_method: ClassVar[str] = "rslora"
    file_config: ClassVar[type[LoRAConfig]] = RsLoRAConfig

    @classmethod
    def continues(cls, config: LoRAConfig, given: Any) -> bool:
        return False  # LoRA has another scaling, and rsLoRA is written as itself


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """DoRA (Liu et al., 2024, arXiv 2402.09353): LoRA changes directions, a trained vector holds the magnitudes.

    `W' = m ⊙ V / ‖V‖` by columns, with `V = W + (alpha / rank) · A B` (equation 5).

    The attributes are those of `LoRAConfig`. `use_dora=True` puts the same magnitude on `RsLoRAConfig` and
    `MoRAConfig`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.DoRAConfig(rank=2), rngs=1).trainable  # LoRA's 20 and a magnitude for each output
        24
    """

    use_dora: bool = field(default=True, kw_only=True)
    derived_fields, grows_with_rank = ("use_dora",), False

    def __post_init__(self):
        super().__post_init__()
        if not self.use_dora:
            raise ValueError("DoRA without its magnitude is LoRA; use LoRAConfig")


class DoRA(LoRA):
    """DoRA: `y = m ⊙ (x (W + s A B)) / ‖W + s A B‖ + b` (Liu et al., 2024, arXiv 2402.09353).

    LoRA with a trained length for every column of the kernel; `base.py` has the formula. Dropout acts on the input of
    the update alone, as everywhere here.
    """

    method: ClassVar[str] = "dora"

    @classmethod
    def continues(cls, config: LoRAConfig, given: Any) -> bool:
        return False  # written as itself


@dataclass(frozen=True)
class PiSSAConfig(LoRAConfig):
    """PiSSA (Meng et al., 2024, arXiv 2404.02948): LoRA that starts from the kernel's principal singular vectors.

    `A = U √S` and `B = √S Vᵀ` of the first `rank` singular values of W, which W then lacks.

    The attributes are those of `LoRAConfig`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.PiSSAConfig(rank=2), rngs=1).trainable  # as LoRA's
        20
    """

    init: str = field(default="pissa", kw_only=True, metadata={"choices": INITS})
    derived_fields = ("init",)


class PiSSA(LoRA):
    """PiSSA: LoRA that starts from W's principal singular vectors.

    Meng et al., 2024, arXiv 2404.02948, section 3.

    `y = x W + s · x (A B − A₀ B₀)` with `s A₀ B₀ = U_r Σ_r V_rᵀ`; see `lora_init.py`.
    """

    method: ClassVar[str] = "pissa"
    start_in_file: ClassVar[bool] = True
    on_embeddings: ClassVar[bool] = False


@dataclass(frozen=True)
class OLoRAConfig(LoRAConfig):
    """OLoRA (Büyükakyüz, 2024, arXiv 2406.01775): LoRA that starts from the kernel's QR decomposition.

    `A = Q` and `B = R` of the first `rank` columns and rows of `W = Q R`, which W then lacks.

    The attributes are those of `LoRAConfig`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.OLoRAConfig(rank=2), rngs=1).trainable  # as LoRA's
        20
    """

    init: str = field(default="olora", kw_only=True, metadata={"choices": INITS})
    derived_fields = ("init",)


class OLoRA(LoRA):
    """OLoRA: LoRA that starts from the QR decomposition of W (Büyükakyüz, 2024, arXiv 2406.01775).

    `y = x W + s · x (A B − A₀ B₀)` with `A₀ B₀ = (Q_r R_r)ᵀ`, `Wᵀ = Q R`; see `lora_init.py`.
    """

    method: ClassVar[str] = "olora"
    start_in_file: ClassVar[bool] = True
    on_embeddings: ClassVar[bool] = False


@dataclass(frozen=True)
class LoRAPlusConfig(LoRAConfig):
    """LoRA+ (Hayou et al., 2024, arXiv 2402.12354): LoRA whose B has a higher learning rate than A.

    The other attributes are those of `LoRAConfig`.

    Attributes:
        lr_ratio: learning rate of B, of magnitudes and of biases over that of A.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.LoRAPlusConfig(rank=2, lr_ratio=16.0), rngs=1).trainable  # as LoRA's
        20
    """

    lr_ratio: float = field(default=16.0, kw_only=True, metadata={"training": True, "limits": Number(above=0)})

    tree_refusal = (
        "LoRA+ is LoRA with two learning rates, and with a plain tree those are your optimizer's: take LoRAConfig"
    )

    @property
    def rates(self) -> dict[str, float]:
        return dict.fromkeys(("lora_b", "magnitude", "bias"), self.lr_ratio)


class LoRAPlus(LoRA):
    """LoRA+: LoRA whose B learns faster than A (Hayou et al., 2024, arXiv 2402.12354).

    The function is LoRA's; `config.rates` says how many times the learning rate which array gets, and
    `mora_jax.training.optimizer` applies it.
    """

    method: ClassVar[str] = "lora_plus"

    @classmethod
    def continues(cls, config: LoRAConfig, given: Any) -> bool:
        return isinstance(given, LoRAConfig)  # of either scaling


@dataclass(frozen=True)
class LoRAFAConfig(LoRAConfig):
    """LoRA-FA (Zhang et al., 2023, arXiv 2308.03303): LoRA with A frozen; the attributes are those of `LoRAConfig`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.LoRAFAConfig(rank=2), rngs=1).trainable  # B [2, 4] alone
        8
    """


class LoRAFA(LoRA):
    """LoRA-FA: LoRA with A frozen (Zhang et al., 2023, arXiv 2308.03303).

    `y = x W + s · (x A₀) B`. Only B is trained, so the backward pass keeps the thin `x A₀` and never `x`.

    LoRA whose `lora_a` is an `AdapterState`.
    """

    method: ClassVar[str] = "lora_fa"
    frozen_a: ClassVar[bool] = True
    # A of an embedding table starts at zero and would stay there.
    on_embeddings: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        lora_a = self.lora_a[...]
        del self.lora_a
        self.lora_a = AdapterState(lora_a, axes=self.stacked(self.axes[0], "rank"))

    @classmethod
    def continues(cls, config: LoRAConfig, given: Any) -> bool:
        return isinstance(given, LoRAConfig)  # of either scaling


@dataclass(frozen=True)
class ReLoRAConfig(RestartConfig, LoRAConfig):
    """ReLoRA (Lialin et al., 2023, arXiv 2307.05695): LoRA, merged into the base and reinitialised repeatedly.

    The sum of low-rank updates has a higher rank than each. The attributes are those of `LoRAConfig` and
    `RestartConfig`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.ReLoRAConfig(rank=2, restart_every=1000), rngs=1).trainable  # as LoRA's, at any time
        20
    """

    derived_fields = ("init",)

    def __post_init__(self):
        super().__post_init__()
        if self.init != "kaiming":
            raise ValueError(f"ReLoRA redraws its factors at each restart, as init='kaiming', not {self.init!r}")


class ReLoRA(LoRA):
    """ReLoRA: LoRA whose product is folded into the base again and again (Lialin et al., 2023, arXiv 2307.05695).

    Between restarts it is LoRA. `W ← W + (alpha / rank) · A B`, then A is redrawn and B is zero (algorithm 1); the
    training loop says when (see `mora_jax.training.relora`).

    LoRA that can be reinitialised.
    """

    method: ClassVar[str] = "relora"
    on_embeddings: ClassVar[bool] = False

    def renew(self, key: jax.Array) -> None:
        """Fresh factors; what was trained must have been folded into the base before."""
        rank = self.lora_a.shape[-1]
        lora_a, lora_b = init(key, self.in_features, self.out_features, rank, layers=self.layers)
        self.lora_a[...], self.lora_b[...] = lora_a, lora_b
