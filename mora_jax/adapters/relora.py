"""ReLoRA: LoRA whose product is folded into the base again and again (Lialin et al., 2023, arXiv 2307.05695).

Between restarts it is LoRA. `W ← W + (alpha / rank) · A B`, then A is drawn anew and B is zero (algorithm 1); the
training loop says when (see `mora_jax.training.restarts`).
"""

from __future__ import annotations

from typing import ClassVar

import jax

from mora_jax.adapters.lora import LoRA, init

Array = jax.Array


class ReLoRA(LoRA):
    """LoRA that can be started anew."""

    method: ClassVar[str] = "relora"
    on_embeddings: ClassVar[bool] = False

    def renew(self, key: Array) -> None:
        """Fresh factors; what was trained must have been folded into the base before."""
        rank = self.lora_a.shape[-1]
        lora_a, lora_b = init(key, self.in_features, self.out_features, rank, layers=self.layers)
        self.lora_a[...], self.lora_b[...] = lora_a, lora_b
