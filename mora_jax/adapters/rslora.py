"""Rank-stabilised LoRA: `y = x W + (alpha / √rank) · (x A) B` (Kalajdzievski, 2023, arXiv 2312.03732, theorem 3.2)."""

from __future__ import annotations

import math
from typing import ClassVar

from mora_jax.adapters.config import LoRAConfig
from mora_jax.adapters.lora import LoRA


class RsLoRA(LoRA):
    """LoRA whose scaling keeps the size of the update whatever the rank."""

    method: ClassVar[str] = "rslora"

    @classmethod
    def scale(cls, config: LoRAConfig) -> float:
        return config.alpha / math.sqrt(config.rank)
