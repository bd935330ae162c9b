"""DoRA: `y = m ⊙ (x (W + s A B)) / ‖W + s A B‖ + b` (Liu et al., 2024, arXiv 2402.09353, equations 5 and 11).

LoRA with a trained length for every column of the kernel; `magnitude.py` has the formula. Dropout acts on the input of
the update alone, as everywhere here.
"""

from __future__ import annotations

from typing import ClassVar

from mora_jax.adapters.lora import LoRA


class DoRA(LoRA):
    """LoRA under its own name for the configuration that always has a magnitude."""

    method: ClassVar[str] = "dora"
