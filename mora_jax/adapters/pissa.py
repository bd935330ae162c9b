"""PiSSA: LoRA that starts from W's principal singular vectors (Meng et al., 2024, arXiv 2404.02948, equations 2 to 4).

`y = x W + s · x (A B − A₀ B₀)` with `s A₀ B₀ = U_r Σ_r V_rᵀ`; see `starts.py`.
"""

from __future__ import annotations

from typing import ClassVar

from mora_jax.adapters.lora import LoRA


class PiSSA(LoRA):
    """LoRA under its own name for the configuration that starts from singular vectors."""

    method: ClassVar[str] = "pissa"
    on_embeddings: ClassVar[bool] = False
