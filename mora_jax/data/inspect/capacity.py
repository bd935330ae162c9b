"""How many trained parameters a data set can need: an upper bound by a yardstick, not a measurement.

A parameter of an adapter holds about 2 bits, and a token on which there is loss brings at most what the model is
surprised by when it sees it first: its loss of the first epoch, or about 1 bit where that isn't known (LoRA Without
Regret, Thinking Machines, 2025). Most of a data set needs far less: what generalises is held once.
"""

from __future__ import annotations

import math

BITS_A_PARAMETER = 2.0
BITS_A_TOKEN = 1.0
EVIDENCE = "LoRA Without Regret (Thinking Machines, 2025)"


def bits_to_learn(trained_tokens: float, first_epoch_loss: float | None = None) -> float:
    """The most that can be learned from a data set, in bits.

    Args:
      trained_tokens: tokens with loss, each counted once however many epochs there are.
      first_epoch_loss: their mean loss in the first epoch, in nats; None for the rule of thumb.

    >>> bits_to_learn(1000)
    1000.0
    >>> round(bits_to_learn(1000, 2 * math.log(2)), 6)
    2000.0
    """
    return trained_tokens * (BITS_A_TOKEN if first_epoch_loss is None else first_epoch_loss / math.log(2))


def parameters_for(bits: float) -> int:
    """The trained parameters that hold so many bits.

    >>> parameters_for(1001)
    501
    """
    return math.ceil(bits / BITS_A_PARAMETER)


def smallest_rank(bits: float, parameters_a_rank: float) -> int:
    """The smallest rank that holds so many bits.

    Args:
      bits: see `bits_to_learn`.
      parameters_a_rank: trained at rank 1: the sum of inputs and outputs over all layers for LoRA.

    >>> smallest_rank(1000, 100), smallest_rank(1001, 100)
    (5, 6)
    """
    return max(1, math.ceil(parameters_for(bits) / parameters_a_rank))


def advise_on_capacity(trained_tokens: int) -> str:
    """The hint for a data set, in one line."""
    bits = bits_to_learn(trained_tokens)
    return (
        f"at most about {bits:,.0f} bits to learn ({BITS_A_TOKEN:g} a trained token), which {parameters_for(bits):,} "
        f"trained parameters hold ({BITS_A_PARAMETER:g} bits each): an upper bound, as most data need far fewer (by "
        f"{EVIDENCE}; mora-jax plan says how many parameters a rank trains)"
    )
