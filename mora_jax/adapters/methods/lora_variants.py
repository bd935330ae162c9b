"""LoRA's relatives: the same two factors with another scale, start, learning rate or schedule, one class each."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax

from mora_jax.adapters.base import AdapterState, FusedLayout
from mora_jax.adapters.config import LoRAConfig
from mora_jax.adapters.methods.lora import FusedLoRA, LoRA, init
from mora_jax.adapters.products.matmul import Delta


class RsLoRA(LoRA):
    """Rank-stabilised LoRA: `y = x W + (alpha / √rank) · (x A) B` (Kalajdzievski, 2023, arXiv 2312.03732, theorem 3.2).

    LoRA whose scaling keeps the size of the update whatever the rank.
    """

    method: ClassVar[str] = "rslora"

    @classmethod
    def scale(cls, config: LoRAConfig) -> float:
        return config.alpha / math.sqrt(config.rank)


class DoRA(LoRA):
    """DoRA: `y = m ⊙ (x (W + s A B)) / ‖W + s A B‖ + b` (Liu et al., 2024, arXiv 2402.09353, equations 5 and 11).

    LoRA with a trained length for every column of the kernel; `base.py` has the formula. Dropout acts on the input of
    the update alone, as everywhere here.
    """

    method: ClassVar[str] = "dora"


class PiSSA(LoRA):
    """PiSSA: LoRA that starts from W's principal singular vectors.

    Meng et al., 2024, arXiv 2404.02948, equations 2 to 4.

    `y = x W + s · x (A B − A₀ B₀)` with `s A₀ B₀ = U_r Σ_r V_rᵀ`; see `lora_init.py`.
    """

    method: ClassVar[str] = "pissa"
    on_embeddings: ClassVar[bool] = False


class OLoRA(LoRA):
    """OLoRA: LoRA that starts from the QR decomposition of W (Büyükakyüz, 2024, arXiv 2406.01775, section 3).

    `y = x W + s · x (A B − A₀ B₀)` with `A₀ B₀ = (Q_r R_r)ᵀ`, `Wᵀ = Q R`; see `lora_init.py`.
    """

    method: ClassVar[str] = "olora"
    on_embeddings: ClassVar[bool] = False


class LoRAPlus(LoRA):
    """LoRA+: LoRA whose B learns faster than A (Hayou et al., 2024, arXiv 2402.12354, section 4).

    The function is LoRA's; `config.rates` says how many times the learning rate which array gets, and
    `mora_jax.training.optimizer` applies it.
    """

    method: ClassVar[str] = "lora_plus"


class LoRAFA(LoRA):
    """LoRA-FA: LoRA with A frozen (Zhang et al., 2023, arXiv 2308.03303, section 3).

    `y = x W + s · (x A₀) B`. Only B is trained, so the backward pass keeps the thin `x A₀` and never `x`.

    LoRA whose `lora_a` is an `AdapterState`.
    """

    method: ClassVar[str] = "lora_fa"
    # A of an embedding table starts at zero and would stay there.
    on_embeddings: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        lora_a = self.lora_a[...]
        del self.lora_a
        self.lora_a = AdapterState(lora_a, axes=self.stacked(self.axes[0], "rank"))

    @classmethod
    def fuse(cls, layout: FusedLayout, configs: tuple[LoRAConfig | None, ...]) -> Delta | None:
        return FusedLoRA(layout, tuple(config is not None for config in configs), frozen_a=True)


class ReLoRA(LoRA):
    """ReLoRA: LoRA whose product is folded into the base again and again (Lialin et al., 2023, arXiv 2307.05695).

    Between restarts it is LoRA. `W ← W + (alpha / rank) · A B`, then A is drawn anew and B is zero (algorithm 1); the
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
