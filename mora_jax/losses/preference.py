"""Preference losses: what a judged answer costs, from its log-probability and that of the answer it stands beside.

`logp` is the sum of weight · log p over the tokens of an answer, and `reference` the same under the model that training
began from. A pair's log-ratio is `logp − reference` of the chosen answer, less that of the rejected one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Answers(NamedTuple):
    """The answers of some examples, float32 `[B, 2, K]`: of pairs the chosen and the rejected one.

    Of labelled answers (`[B, 1, K]`) each is an example.

    Attributes:
        logp: log-probability of each answer.
        reference: that under the reference; None for objectives without one.
        length: the sum of the weights of its tokens.
        desired: `[B, K]`, 1 where the first answer is wanted.
        reference_point: scalar, KTO's estimate of the divergence from the reference, not negative; None without.
    """

    logp: Array
    reference: Array | None
    length: Array
    desired: Array
    reference_point: Array | None = None

    @property
    def ratio(self) -> Array:
        """`logp − reference`, or without one `logp`."""
        return self.logp if self.reference is None else self.logp - self.reference

    def by_token(self, values: Array) -> Array:
        """Values of answers as means over their tokens."""
        return values / jnp.maximum(self.length, 1e-9)


class Settings(NamedTuple):
    """Numbers of an objective; each uses those that its entry of `OBJECTIVES` names.

    Attributes:
        beta: how strongly differences of log-probabilities count.
        label_smoothing: the probability that a pair is judged the wrong way round, in [0, 0.5).
        length_normalize: whether log-ratios are means over an answer's tokens.
        gamma: SimPO's target margin.
        desirable_weight, undesirable_weight: what KTO's wanted and unwanted answers count.
    """

    beta: float
    label_smoothing: float = 0.0
    length_normalize: bool = False
    gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def _rewards(answers: Answers, settings: Settings) -> Array:
    """β · log-ratio of each answer, whose order and difference between answers are reported."""
    ratio = answers.by_token(answers.ratio) if settings.length_normalize else answers.ratio
    return settings.beta * ratio


def _margin(answers: Answers, settings: Settings) -> Array:
    rewards = _rewards(answers, settings)
    return rewards[:, 0] - rewards[:, 1]


def _smoothed(margin: Array, settings: Settings) -> Array:
    """−log σ(margin), and the other way round with the probability of a wrong label."""
    epsilon = settings.label_smoothing
    return -(1 - epsilon) * jax.nn.log_sigmoid(margin) - epsilon * jax.nn.log_sigmoid(-margin)


def _dpo(answers: Answers, settings: Settings) -> Array:
    return _smoothed(_margin(answers, settings), settings)


def _ipo(answers: Answers, settings: Settings) -> Array:
    return (_margin(answers, settings) / settings.beta - 1 / (2 * settings.beta)) ** 2


def _simpo(answers: Answers, settings: Settings) -> Array:
    return _smoothed(_margin(answers, settings) - settings.gamma, settings)


def _orpo(answers: Answers, settings: Settings) -> Array:
    mean = answers.by_token(answers.logp)
    log_odds = mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -1e-7)))
    return -settings.beta * jax.nn.log_sigmoid(log_odds[:, 0] - log_odds[:, 1])


def _kto(answers: Answers, settings: Settings) -> Array:
    assert answers.reference_point is not None, "labelled answers have one"
    above = settings.beta * (answers.ratio[:, 0] - answers.reference_point)
    wanted = settings.desirable_weight * jax.nn.sigmoid(-above)
    unwanted = settings.undesirable_weight * jax.nn.sigmoid(above)
    return jnp.where(answers.desired > 0, wanted, unwanted)


@dataclass(frozen=True)
class Objective:
    """An objective of preferences.

    Attributes:
        doc: what it is, in a few words.
        loss: `(answers, settings)` → float32 `[B, K]`, of each example.
        beta: the usual one.
        settings: which other settings it has, beside `beta` and `sft_weight`.
        referenced: whether it has a reference.
        labelled: whether its examples are single answers with a label.
        length_normalize: whether log-ratios are means over tokens unless another is asked for.
        sft_weight: the usual weight of the SFT term.
    """

    doc: str
    loss: Callable[[Answers, Settings], Array]
    beta: float
    settings: tuple[str, ...] = ()
    referenced: bool = False
    labelled: bool = False
    length_normalize: bool = False
    sft_weight: float = 0.0


#: By the name that `loss.objective` has.
OBJECTIVES = {
    # Rafailov et al., 2023 (arXiv 2305.18290); with label smoothing the conservative form of E. Mitchell's note.
    "dpo": Objective("pairs against a reference", _dpo, 0.1, ("label_smoothing", "length_normalize"), referenced=True),
    # Azar et al., 2023 (arXiv 2310.12036), equation 17, over means as its authors have it.
    "ipo": Objective(
        "pairs towards a fixed margin", _ipo, 0.1, ("length_normalize",), referenced=True, length_normalize=True
    ),
    # Hong et al., 2024 (arXiv 2403.07691).
    "orpo": Objective("odds of pairs beside SFT, no reference", _orpo, 0.1, length_normalize=True, sft_weight=1.0),
    # Meng et al., 2024 (arXiv 2405.14734).
    "simpo": Objective(
        "means over tokens of pairs, no reference", _simpo, 2.0, ("label_smoothing", "gamma"), length_normalize=True
    ),
    # Ethayarajh et al., 2024 (arXiv 2402.01306).
    "kto": Objective(
        "single answers with a label, against a reference",
        _kto,
        0.1,
        ("desirable_weight", "undesirable_weight"),
        referenced=True,
        labelled=True,
    ),
    # Xu et al., 2024 (arXiv 2401.08417).
    "cpo": Objective("pairs beside SFT, no reference", _dpo, 0.1, ("label_smoothing",), sft_weight=1.0),
}


def example_metrics(answers: Answers, settings: Settings) -> dict[str, Array]:
    """What is reported of each example, float32 `[B, K]`.

    Returns:
        `reward` and `logp` of the first answer, `other_reward` and `other_logp` of a pair's rejected one, and `right`:
        1 where the chosen answer has the higher reward, or a labelled one lies on its side of the reference point.
    """
    rewards = _rewards(answers, settings)
    values: dict[str, Any] = {"reward": rewards[:, 0], "logp": answers.logp[:, 0]}
    if answers.reference_point is None:
        values |= {"other_reward": rewards[:, 1], "other_logp": answers.logp[:, 1]}
        right = rewards[:, 0] > rewards[:, 1]
    else:
        above = rewards[:, 0] - settings.beta * answers.reference_point
        right = jnp.where(answers.desired > 0, above > 0, above < 0)
    return {**values, "right": right.astype(jnp.float32)}
