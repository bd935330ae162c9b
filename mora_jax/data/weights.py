"""Loss modes: how much the prediction of a token counts, by the segment the token belongs to."""

from __future__ import annotations

import numpy as np

from mora_jax.data.segments import Segment
from mora_jax.errors import InputError

_ANSWER = {Segment.ASSISTANT: 1.0, Segment.END_OF_TURN: 1.0}


def _instructed(weight: float) -> dict[Segment, float]:
    return {Segment.SYSTEM: weight, Segment.USER: weight, Segment.TOOL: weight}


#: Mode -> prompt weight -> weight of each segment. What is not named weighs 0: BOS and padding always do.
MODES = {
    "masked": lambda w: _ANSWER,
    "unmasked": lambda w: _ANSWER | _instructed(1.0),
    "full": lambda w: _ANSWER | _instructed(1.0) | {Segment.TEMPLATE: 1.0},
    "weighted": lambda w: _ANSWER | _instructed(w),
}


def weight_table(mode: str = "masked", prompt_weight: float = 0.0) -> dict[Segment, float]:
    """The weight of every segment under a loss mode.

    Args:
      mode: `masked` (answers and their end), `unmasked` (instructions too, nothing of the template), `full`
        (every token but BOS) or `weighted` (instructions at `prompt_weight`).
      prompt_weight: in [0, 1]; used by `weighted` alone.

    Raises:
      InputError: for a mode that is not known or a weight outside [0, 1].
    """
    if mode not in MODES:
        raise InputError(f"unknown loss mode {mode!r}: choose one of {', '.join(MODES)}")
    if not 0.0 <= prompt_weight <= 1.0:
        raise InputError(f"prompt_weight is {prompt_weight}: it must lie in [0, 1]")
    weights = MODES[mode](prompt_weight)
    return {segment: weights.get(segment, 0.0) for segment in Segment}


def token_weights(segments: np.ndarray, mode: str = "masked", prompt_weight: float = 0.0) -> np.ndarray:
    """Weights of predicting each token.

    Args:
      segments: `[T]` values of `Segment`.
      mode: see `weight_table`.
      prompt_weight: see `weight_table`.

    Returns:
      `[T]` float32; the first is 0, because nothing precedes the first token that could predict it.
    """
    table = weight_table(mode, prompt_weight)
    weights = np.array([table[segment] for segment in Segment], np.float32)[np.asarray(segments, np.intp)]
    weights[:1] = 0.0
    return weights
