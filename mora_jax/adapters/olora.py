"""OLoRA: LoRA that starts from the QR decomposition of W (Büyükakyüz, 2024, arXiv 2406.01775, section 3).

`y = x W + s · x (A B − A₀ B₀)` with `A₀ B₀ = (Q_r R_r)ᵀ`, `Wᵀ = Q R`; see `starts.py`.
"""

from __future__ import annotations

from typing import ClassVar

from mora_jax.adapters.lora import LoRA


class OLoRA(LoRA):
    """LoRA under its own name for the configuration that starts from a QR decomposition."""

    method: ClassVar[str] = "olora"
    on_embeddings: ClassVar[bool] = False
