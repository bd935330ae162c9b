"""Loss modes: how much the prediction of each token counts, by the segment and the turn it belongs to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mora_jax.data.segments import CONTENT, INSTRUCTION, RESPONSE, ROLE_SEGMENT, TEMPLATE_TEXT, Segment
from mora_jax.data.tokens.tokenize import Tokens
from mora_jax.errors import InputError


@dataclass(frozen=True)
class Mode:
    """A loss mode.

    Attributes:
      doc: what it trains, in a few words.
      table: prompt weight -> weight of each segment; what is not named weighs 0. BOS and padding always do.
      normalize: the normaliser that belongs to it, unless another is asked for.
      roles: whether `LossWeights.roles` chooses whose turns are trained.
      last: whether only the last of the trained turns counts.
    """

    doc: str
    table: Callable[[float], dict[Segment, float]]
    normalize: str = "token"
    roles: bool = False
    last: bool = False

    @property
    def uses_prompt_weight(self) -> bool:
        """Whether the prompt weight changes anything."""
        return self.table(0.0) != self.table(1.0)


_RESPONSE = dict.fromkeys(RESPONSE, 1.0)
_ALL = _RESPONSE | dict.fromkeys(INSTRUCTION, 1.0) | dict.fromkeys(TEMPLATE_TEXT, 1.0)

MODES = {
    "masked": Mode("responses", lambda w: _RESPONSE, roles=True),
    "unmasked": Mode("responses and instructions", lambda w: _RESPONSE | dict.fromkeys(INSTRUCTION, 1.0)),
    "full": Mode("every token but BOS", lambda w: _ALL),
    "weighted": Mode("instructions at the prompt weight", lambda w: _RESPONSE | dict.fromkeys(INSTRUCTION, w)),
    "last_turn": Mode("the last response", lambda w: _RESPONSE, roles=True, last=True),
    # What the released code of Instruction Modelling did (its exclusion of template tokens fails but for the first).
    "im_paper": Mode("as the released code of Instruction Modelling", lambda w: _ALL, normalize="example"),
    # Chatterjee et al., TACL 2025: everything before the response has the prompt weight.
    "wit": Mode(
        "as Weighted Instruction Tuning",
        lambda w: _RESPONSE | dict.fromkeys(INSTRUCTION, w) | dict.fromkeys(TEMPLATE_TEXT, w),
        normalize="nonzero",
    ),
}

#: Which ends of turns are trained: those of trained turns, all, that of the last trained turn, none.
ENDS = ("turn", "all", "last", "none")
#: Which headers are trained: none, those of trained turns, all.
HEADERS = ("none", "turn", "all")


@dataclass(frozen=True)
class LossWeights:
    """Which tokens carry loss, and how much.

    Attributes:
      mode: a key of `MODES`.
      prompt_weight: weight of instructions under `weighted` and `wit`, in [0, 1].
      roles: whose turns `masked` and `last_turn` train.
      end_of_turn: one of `ENDS`; None leaves it to the mode's table.
      headers: one of `HEADERS`; None leaves it to the mode's table.

    Raises:
      InputError: for a name that is not known or a weight outside [0, 1].
    """

    mode: str = "masked"
    prompt_weight: float = 0.0
    roles: tuple[str, ...] = ("assistant",)
    end_of_turn: str | None = None
    headers: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"unknown loss mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if not 0.0 <= self.prompt_weight <= 1.0:
            raise InputError(f"prompt_weight is {self.prompt_weight}: it must be between 0 and 1")
        if unknown := [role for role in self.roles if role not in ROLE_SEGMENT]:
            raise InputError(f"unknown role {unknown[0]!r}: choose from {', '.join(ROLE_SEGMENT)}")
        for name, choices in (("end_of_turn", ENDS), ("headers", HEADERS)):
            if (value := getattr(self, name)) not in (None, *choices):
                raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")

    @property
    def table(self) -> dict[Segment, float]:
        """The weight of every segment, before single turns are looked at."""
        mode = MODES[self.mode]
        weights = mode.table(self.prompt_weight)
        if mode.roles:
            trained = {ROLE_SEGMENT[role] for role in self.roles}
            others = dict.fromkeys(trained - {Segment.ASSISTANT}, 1.0)
            weights = weights | others if Segment.ASSISTANT in trained else others
        return {segment: weights.get(segment, 0.0) for segment in Segment}

    @property
    def words(self) -> str:
        """The loss mode, with those of its settings that count and are not the defaults."""
        text, mode = self.mode, MODES[self.mode]
        if mode.uses_prompt_weight:
            text += f", prompt_weight {self.prompt_weight:g}"
        if mode.roles and self.roles != ("assistant",):
            text += f", roles {' and '.join(self.roles)}"
        for name in ("end_of_turn", "headers"):
            if (value := getattr(self, name)) is not None:
                text += f", {name} {value}"
        return text

    def __str__(self) -> str:
        mode = MODES[self.mode]
        lines = [f"{self.mode}: {mode.doc}", *(f"{s.name.lower():>12}  {w:g}" for s, w in self.table.items())]
        ends = self.end_of_turn or ("turn" if mode.roles else None)
        if ends is not None:
            lines.append(f"ends of turns: {ends}")
        if self.headers is not None:
            lines.append(f"headers: {self.headers}")
        return "\n".join(lines)


def token_weights(tokens: Tokens, loss: LossWeights = LossWeights()) -> np.ndarray:
    """Weights of predicting each token.

    What the data says wins over the mode: a row's own token weights, then the weights of single messages. The
    weight of the whole row is not in here: see `Tokens.weight`.

    Args:
      tokens: a row.
      loss: the mode and its policies.

    Returns:
      `[T]` float32; the first is 0, because nothing precedes the first token that could predict it.
    """
    if tokens.weights is not None:
        weights = tokens.weights.astype(np.float32)
    else:
        count = max(int(tokens.turns.max(initial=-1)) + 1, len(tokens.turn_weights))
        turn_weights = np.full(count + 1, np.nan, np.float32)
        turn_weights[: len(tokens.turn_weights)] = tokens.turn_weights
        weights = segment_weights(tokens.segments, tokens.turns, turn_weights, np.zeros(count + 1, np.intp), loss)
    weights[:1] = 0.0
    return weights


def segment_weights(
    segments: np.ndarray, turns: np.ndarray, said: np.ndarray, rows: np.ndarray, loss: LossWeights
) -> np.ndarray:
    """Weights by the mode's table, the weights of single messages and the policies, for many rows at once.

    Args:
      segments: `[T]` values of `Segment`, of all rows one after the other.
      turns: `[T]` numbers of turns, no two rows sharing one; -1 for none.
      said: `[turns + 1]` float32, what the data says that a turn counts, else NaN. The last entry is for -1.
      rows: `[turns + 1]`, the row of each turn.
      loss: the mode and its policies.

    Returns:
      `[T]` float32.
    """
    mode, table = MODES[loss.mode], loss.table
    segments = segments.astype(np.intp)
    weights = np.array([table[segment] for segment in Segment], np.float32)[segments]
    is_said = _IS_SAID[segments]
    explicit = ~np.isnan(said)
    if explicit.any():
        weights = np.where(is_said & explicit[turns], said[turns], weights)
    ends = loss.end_of_turn or ("turn" if mode.roles else None)
    if not (mode.last or ends or loss.headers):
        return weights
    # What a turn counts: the most that any of its words, or its end, counts.
    value = np.zeros(len(said), np.float32)
    np.maximum.at(value, turns[is_said], weights[is_said])
    value[-1] = 0.0
    last = np.full(int(rows.max(initial=0)) + 1, -1)
    np.maximum.at(last, rows[value > 0], np.flatnonzero(value))
    is_last = np.arange(len(value)) == last[rows]
    if mode.last:
        dropped = ~explicit & ~is_last
        value[dropped] = 0.0
        weights = np.where(dropped[turns], 0.0, weights)
    if ends is not None:
        weights = np.where(_IS_END[segments], _choose(ends, value, is_last)[turns], weights)
    if loss.headers is not None:
        weights = np.where(segments == Segment.HEADER, _choose(loss.headers, value, is_last)[turns], weights)
    return weights.astype(np.float32)


def _choose(policy: str, value: np.ndarray, is_last: np.ndarray) -> np.ndarray:
    """What an end or a header counts, by the turn it belongs to."""
    if policy == "none":
        return np.zeros_like(value)
    if policy == "all":
        return np.where(value > 0, value, 1.0)
    return np.where(is_last, value, 0.0) if policy == "last" else value


_IS_SAID = np.isin(list(Segment), (*CONTENT, Segment.END_OF_TURN))
_IS_END = np.isin(list(Segment), (Segment.END_OF_TURN, Segment.CLOSING))


def response_tokens(segments: np.ndarray) -> np.ndarray:
    """Which tokens are part of a response: `[T]` bool."""
    return _IS_RESPONSE[segments.astype(np.intp)]


_IS_RESPONSE = np.isin(list(Segment), RESPONSE)
#: What `unmasked` trains.
_IS_WORDS = np.isin(list(Segment), (*RESPONSE, *INSTRUCTION))


#: `(weights [T], segments [T], weight of the row)` -> the weights that the sum is made with, and the row's count.
Normalizer = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, float]]


def _token(weights: np.ndarray, segments: np.ndarray, row: float) -> tuple[np.ndarray, float]:
    weighted = weights * np.float32(row)
    return weighted, float(weighted.sum(dtype=np.float64))


def _example(weights: np.ndarray, segments: np.ndarray, row: float) -> tuple[np.ndarray, float]:
    total = weights.sum(dtype=np.float64)
    return (weights * (row / total)).astype(np.float32), float(row)


def _share(weights: np.ndarray, segments: np.ndarray, row: float) -> tuple[np.ndarray, float]:
    """The share of responses in the row's tokens of responses and instructions, the first token left out."""
    answers, tokens = response_tokens(segments[1:]).sum(), _IS_WORDS[segments[1:].astype(np.intp)].sum()
    return _token(weights, segments, row * float(answers / tokens) if tokens else 0.0)


def _counted(count: Callable[[np.ndarray, np.ndarray], Any]) -> Normalizer:
    """The weights as they are, beside a count of (weights, segments)."""
    return lambda weights, segments, row: (weights * np.float32(row), float(count(weights, segments)))


NORMALIZERS: dict[str, Normalizer] = {
    "token": _token,
    "example": _example,
    "share": _share,
    "response": _counted(lambda weights, segments: np.count_nonzero(weights[response_tokens(segments)])),
    "nonzero": _counted(lambda weights, segments: np.count_nonzero(weights)),
    "constant": _counted(lambda weights, segments: 0.0),  # the step divides by the constant itself
}
#: What each of them divides by, in words.
DIVISORS = {
    "token": "the sum of weights",
    "example": "the number of examples",
    "share": "the sum of weights, each row's times the share of its answer in answer and instruction",
    "response": "the number of response tokens",
    "nonzero": "the number of tokens with a weight",
    "constant": "a constant",
}


def normalize(
    weights: np.ndarray, segments: np.ndarray, row: float = 1.0, how: str = "token"
) -> tuple[np.ndarray, float]:
    """Prepares the weights of one example for a normaliser.

    Args:
      weights: `[T]` float32, the weight of predicting each token.
      segments: `[T]` values of `Segment`.
      row: what the whole example counts beside the others, at least 0.
      how: a key of `DIVISORS`. `example` gives each the mean over its own tokens; for `response` the prompt's weight
        doesn't count; `constant` is a number that the step is given.

    Returns:
      The weights of the sum, `[T]` float32, and what the example adds to the denominator.
    """
    if not weights.any() or row == 0:
        return np.zeros_like(weights), 0.0
    return NORMALIZERS[how](weights, segments, row)
