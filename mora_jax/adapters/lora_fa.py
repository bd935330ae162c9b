"""LoRA-FA: LoRA with A frozen (Zhang et al., 2023, arXiv 2308.03303, section 3).

`y = x W + s · (x A₀) B`. Only B is trained, so the backward pass keeps the thin `x A₀` and never `x`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mora_jax.adapters.adapter import Layout
from mora_jax.adapters.config import LoRAConfig
from mora_jax.adapters.dense import Delta
from mora_jax.adapters.lora import FusedLoRA, LoRA
from mora_jax.adapters.variables import AdapterState


class LoRAFA(LoRA):
    """LoRA whose `lora_a` is an `AdapterState`."""

    method: ClassVar[str] = "lora_fa"
    # A of an embedding table starts at zero and would stay there.
    on_embeddings: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        lora_a = self.lora_a[...]
        del self.lora_a
        self.lora_a = AdapterState(lora_a, axes=self.stacked(self.axes[0], "rank"))

    @classmethod
    def fuse(cls, layout: Layout, configs: tuple[LoRAConfig | None, ...]) -> Delta | None:
        return FusedLoRA(layout, tuple(config is not None for config in configs), frozen_a=True)
