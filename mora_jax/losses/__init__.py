"""Losses over the vocabulary, masked, unmasked or weighted, and what a step divides them by.

Every token has a weight. `weighted_loss` takes hidden states and an output head, and never makes the logits of a whole
batch; `weighted_loss_of_logits` takes logits. The public names are those of `losses/cross_entropy.py`.
"""

from typing import Any

PUBLIC = ("next_token_targets", "normalized", "token_weights", "weighted_loss", "weighted_loss_of_logits")


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'mora_jax.losses' has no attribute {name!r}")
    from mora_jax.losses import cross_entropy

    return getattr(cross_entropy, name)


def __dir__() -> list[str]:
    return [*PUBLIC]
