"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: every parameter of the model is trained as a float32 master."""
