"""LoRA+: LoRA whose B learns faster than A (Hayou et al., 2024, arXiv 2402.12354, section 4).

The function is LoRA's; `config.rates` says how many times the learning rate which array gets, and
`mora_jax.training.optimizer` applies it.
"""

from __future__ import annotations

from typing import ClassVar

from mora_jax.adapters.lora import LoRA


class LoRAPlus(LoRA):
    """LoRA under its own name for the configuration with a ratio of learning rates."""

    method: ClassVar[str] = "lora_plus"
