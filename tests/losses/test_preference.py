"""Each preference loss against its formula, written out for one example in plain Python."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.losses.preference import OBJECTIVES, Answers, Settings, example_metrics

CHOSEN, REJECTED = (-12.0, -11.0, 6.0), (-9.5, -10.5, 4.0)  # log-probability, the reference's, tokens


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def answers(objective, *, desired=1.0, point=None) -> Answers:
    used = [CHOSEN] if objective.labelled else [CHOSEN, REJECTED]
    logp, reference, length = (jnp.array(values)[None, :, None] for values in zip(*used, strict=True))
    return Answers(logp, reference if objective.referenced else None, length, jnp.full((1, 1), desired), point)


def by_hand(name: str, s: Settings, desired: bool = True, point: float = 0.0) -> float:
    (c, rc, nc), (r, rr, nr) = CHOSEN, REJECTED
    per = (nc, nr) if s.length_normalize else (1, 1)
    ratio = (c - rc) / per[0] - (r - rr) / per[1]
    if name == "kto":
        z = s.beta * (c - rc - point)
        return s.desirable_weight * (1 - sigmoid(z)) if desired else s.undesirable_weight * (1 - sigmoid(-z))
    if name == "ipo":
        return (ratio - 1 / (2 * s.beta)) ** 2
    if name == "orpo":
        odds = [math.exp(x / n) / (1 - math.exp(x / n)) for x, n in ((c, nc), (r, nr))]
        return -s.beta * math.log(sigmoid(math.log(odds[0] / odds[1])))
    x = {"dpo": s.beta * ratio, "cpo": s.beta * (c - r), "simpo": s.beta * (c / nc - r / nr) - s.gamma}[name]
    return -(1 - s.label_smoothing) * math.log(sigmoid(x)) - s.label_smoothing * math.log(sigmoid(-x))


CASES = {
    "dpo": [{}, {"beta": 0.7, "label_smoothing": 0.2}, {"beta": 2.0, "length_normalize": True}],
    "ipo": [{}, {"beta": 0.3, "length_normalize": False}],
    "orpo": [{}, {"beta": 0.5}],
    "simpo": [{}, {"beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1}],
    "cpo": [{}, {"beta": 0.4, "label_smoothing": 0.3}],
    "kto": [{}, {"beta": 0.4, "desirable_weight": 2.0, "undesirable_weight": 1.5}],
}


def settings(name: str, changes: dict) -> Settings:
    entry = OBJECTIVES[name]
    return Settings(**{"beta": entry.beta, "length_normalize": entry.length_normalize} | changes)


def test_every_objective_has_cases():
    assert CASES.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize(("name", "changes"), [(name, changes) for name, many in CASES.items() for changes in many])
def test_formulas(name, changes):
    objective, numbers = OBJECTIVES[name], settings(name, changes)
    for desired in (True, False) if objective.labelled else (True,):
        point = 0.75 if objective.labelled else None
        found = objective.loss(answers(objective, desired=float(desired), point=point), numbers)
        assert found.shape == (1, 1)
        np.testing.assert_allclose(found[0, 0], by_hand(name, numbers, desired, point or 0.0), rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_setting_is_idle(name):
    """What an entry names changes its loss."""
    objective, numbers = OBJECTIVES[name], settings(name, {})
    others = {
        "label_smoothing": 0.3,
        "length_normalize": not numbers.length_normalize,
        "gamma": 2.0,
        "desirable_weight": 3.0,
        "undesirable_weight": 3.0,
    }
    for setting in objective.settings:
        value, changed = others[setting], False
        for desired in (1.0, 0.0):
            these = answers(objective, desired=desired, point=0.3 if objective.labelled else None)
            before, after = (objective.loss(these, n) for n in (numbers, numbers._replace(**{setting: value})))
            changed |= bool(abs(before - after)[0, 0] > 1e-6)
        assert changed, setting


def test_metrics_of_pairs_and_of_labels():
    dpo = example_metrics(answers(OBJECTIVES["dpo"]), settings("dpo", {"beta": 0.5}))
    assert {name: float(value[0, 0]) for name, value in dpo.items()} == {
        "reward": -0.5,
        "logp": -12.0,
        "other_reward": 0.5,
        "other_logp": -9.5,
        "right": 0.0,
    }
    for desired, right in ((1.0, 0.0), (0.0, 1.0)):
        kto = example_metrics(answers(OBJECTIVES["kto"], desired=desired, point=0.0), settings("kto", {}))
        assert float(kto["right"][0, 0]) == right


def test_odds_of_certain_answers_are_finite():
    sure = Answers(jnp.zeros((1, 2, 1)), None, jnp.ones((1, 2, 1)), jnp.ones((1, 1)))
    assert np.isfinite(OBJECTIVES["orpo"].loss(sure, settings("orpo", {}))).all()
