"""Claims: Holm's correction and power against oracles, and what a table with numbers put by hand comes to."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mora_jax.studies.claims import claims, to_json
from mora_jax.studies.conclusion import arms_table, claims_text
from mora_jax.studies.intervals import Interval, holm, interval
from mora_jax.studies.memorize import Memorize
from mora_jax.studies.results import PERTURBED, Results
from mora_jax.studies.study import Arm, Level, Preset


def test_p_values_are_those_of_the_t_test():
    values = [0.3, 0.5, -0.1, 0.4]
    assert interval(values).p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    assert interval([0.2, 0.2]).p == 0.0
    assert interval([0.0, 0.0]).p == 1.0
    assert interval([0.2]).p is None


def test_holm_rejects_what_its_definition_does():
    """Step down: the k-th smallest of m is rejected while all before it are, at α / (m - k + 1)."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ps = (rng.random(6) ** 4).tolist()
        for alpha in (0.01, 0.05, 0.2):
            rejected = set()
            for rank, index in enumerate(np.argsort(ps)):
                if ps[index] > alpha / (len(ps) - rank):
                    break
                rejected.add(int(index))
            assert {index for index, p in enumerate(holm(ps)) if p <= alpha} == rejected


@pytest.mark.parametrize("n", [3, 10])
def test_a_detectable_difference_is_detected_in_four_of_five_studies(n):
    spread = 0.7
    detectable = Interval(0.0, spread / math.sqrt(n), n).detectable
    drawn = np.random.default_rng(0).normal(detectable, spread, size=(40_000, n))
    # The interval goes with the spread of each study, which is drawn too.
    power = (stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean()
    assert power == pytest.approx(0.8, abs=0.01)


ARMS = (
    Arm("LoRA r2", {}, (1e-3, 2e-3)),
    Arm("MoRA r2", {}, (1e-3, 2e-3)),
    Arm("MoRA r2, x", {}, (1e-3,), "", "MoRA r2"),
)


def table(*, perturbed: float | None = None, diverged: bool = False) -> Results:
    """LoRA at 0.2, MoRA 0.5 above it, with a spread of 0.01; the control 0.1 above MoRA at its own rate only."""
    preset = Preset("", ARMS, {}, {"length": 2}, (Level("4 pairs", {"pairs": 4}),), seeds=4)
    rows = []
    for seed in (1, 2, 3, 4):
        wobble = 0.01 * (seed % 2)
        values = {
            ("LoRA r2", "reported", 1e-3): 0.2,
            ("MoRA r2", "reported", 2e-3): 0.7 + wobble,
            ("MoRA r2, x", "reported", 1e-3): 0.8 + 2 * wobble,
            ("MoRA r2, x", "equal_rate", 2e-3): 0.7 + 2 * wobble,
        }
        again = {"LoRA r2": 0.2, "MoRA r2": 0.2 + (perturbed or 0.0) + wobble}
        for (arm, stage, rate), value in values.items():
            head = {"arm": arm, "stage": stage, "learning_rate": rate, "level": "4 pairs", "seed": seed, "note": None}
            head |= {"cell": f"{arm} {stage} {seed}", "parameters": 10, "versions": "", "pairs": 4}
            value = math.nan if diverged and seed == 4 and arm == "MoRA r2" else value
            for step, share in ((0, 0.0), (2, 0.5), (4, 1.0)):
                measured = value * share
                rows.append({**head, "step": step, "metric": "generated_accuracy", "value": measured})
                rows.append({**head, "step": step, "metric": "loss", "value": 1.0 + wobble * (arm == "MoRA r2")})
            if perturbed is not None and arm in again and stage == "reported":
                head |= {"stage": "exploratory", "note": PERTURBED, "cell": head["cell"] + " again"}
                rows.append({**head, "step": 4, "metric": "generated_accuracy", "value": again[arm]})
    return Results(pd.DataFrame(rows), Memorize(), preset)


def test_claims_are_paired_and_corrected():
    stated = claims(table())
    by_name = {(claim.claim, claim.metric): claim for claim in stated}
    first = by_name["MoRA r2 − LoRA r2", "generated accuracy"]
    assert first.effect == pytest.approx(0.505)
    half = 3.182446 * np.std([0.51, 0.5, 0.51, 0.5], ddof=1) / 2
    assert (first.low, first.high) == pytest.approx((0.505 - half, 0.505 + half), rel=1e-5)
    assert first.halfway == pytest.approx(0.7 / 2 - 0.1 + 0.0025)
    assert first.decided and first.verdict == "better" and first.n == 4 and first.robust is None
    assert "MoRA r2 reported 3" in first.cells and "LoRA r2 reported 1" in first.cells
    # Of the first metric there are MoRA − LoRA, the control − LoRA, and the control − MoRA at equal rates.
    family = [claim for claim in stated if claim.metric == "generated accuracy"]
    raw = stats.ttest_1samp([0.51, 0.5, 0.51, 0.5], 0.0).pvalue
    assert [claim.claim for claim in family][-1] == "MoRA r2, x − MoRA r2, both at 0.002"
    assert first.p == pytest.approx(raw * sum(claim.p >= first.p for claim in family), rel=1e-6)
    equal = family[-1]
    assert equal.effect == pytest.approx(0.005) and not equal.decided and equal.verdict == "no difference shown"
    loss = by_name["MoRA r2 − LoRA r2", "loss, nats a symbol"]
    assert loss.effect == pytest.approx(0.005) and not loss.decided


def test_a_claim_is_robust_where_it_comes_out_again():
    for again, robust in ((0.3, True), (-0.3, False), (0.0, False)):
        first = claims(table(perturbed=again))[0]
        assert first.decided and first.robust is robust
    assert {claim.robust for claim in claims(table()) if claim.metric == "loss, nats a symbol"} == {None}


def test_what_diverged_is_counted_in_every_table():
    results = table(diverged=True)
    stated = claims(results)
    assert (stated[0].n, stated[0].diverged) == (3, 1)
    assert "| MoRA r2 − LoRA r2, 4 pairs | +0.507 ± 0.014 | 3 (1 diverged) |" in claims_text(stated)
    assert "| MoRA r2 | 10 | 0.002 | 3 (1 diverged) | 0.707 ± 0.014 |" in arms_table(
        results, results.study.metrics, "4 pairs"
    )


def test_the_file_of_claims_has_what_a_page_needs():
    stated = json.loads(to_json(claims(table())))
    assert all({"claim", "effect", "low", "high", "n", "p", "decided", "robust", "cells"} <= set(one) for one in stated)
    assert "NaN" not in to_json(claims(table(diverged=True)))
