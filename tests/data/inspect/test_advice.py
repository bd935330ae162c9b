"""Advice on the loss mode: every branch, and that it says what it rests on."""

from __future__ import annotations

import pytest

from mora_jax.data.inspect.advice import FEW_EXAMPLES, LIMITS, LONG_PROMPTS, PROMPT_WEIGHT, REPEATED, advise
from mora_jax.data.loss_weights import MODES, LossWeights


@pytest.mark.parametrize(
    ("facts", "mode", "weight", "confidence", "words"),
    [
        # Examples, ratio, median ratio, repeated, over length.
        ((3000, 0.6, 0.4, 0.0, 0.0), "masked", None, "moderate", "aren't short"),
        ((1000, 0.09, 0.1, 0.0, 0.0), "masked", None, "moderate", "long beside their prompts"),
        ((3000, 20.0, 15.0, 0.0, 0.0), "weighted", PROMPT_WEIGHT, "low", "try a prompt weight"),
        ((FEW_EXAMPLES - 1, 3.1, 3.1, 0.0, 0.0), "weighted", PROMPT_WEIGHT, "low", "held-out"),
        ((FEW_EXAMPLES, 20.0, 15.0, 0.0, 0.0), "masked", None, "low", "15,000 examples are many"),
        ((3000, 20.0, 15.0, REPEATED, 0.0), "masked", None, "moderate", "don't use unmasked"),
        ((3000, 20.0, 15.0, REPEATED - 0.01, 0.0), "weighted", PROMPT_WEIGHT, "low", "different prompts"),
        ((3000, 20.0, 1.0, 0.0, 0.0), "masked", None, "low", "no study covers"),
        ((3000, 1.0, 20.0, 0.0, 0.0), "masked", None, "low", "no study covers"),
        ((3000, LONG_PROMPTS, LONG_PROMPTS, 0.0, 0.0), "masked", None, "moderate", "aren't short"),
        ((3000, 0.0, 0.0, 0.0, 0.0), "masked", None, "high", "no row holds an instruction"),
        ((3000, None, None, 0.0, 0.0), "unmasked", None, "high", "no row holds an answer"),
    ],
)
def test_branches(facts, mode, weight, confidence, words):
    advice = advise(*facts)
    assert (advice.mode, advice.prompt_weight, advice.confidence) == (mode, weight, confidence)
    assert advice.text.startswith(f"{mode}: ")
    assert "\n" not in advice.text
    assert words in advice.text
    assert advice.mode in MODES
    LossWeights(advice.mode, advice.prompt_weight or 0.0)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("repeated", [0.0, 0.5])
def test_evidence_has_a_source_and_limits_are_always_said(ratio, repeated):
    advice = advise(1000, ratio, ratio, repeated, 0.0)
    assert advice.evidence
    assert all("arXiv" in line or "issue" in line or "pull request" in line for line in advice.evidence)
    assert advice.limits[: len(LIMITS)] == LIMITS
    said = " ".join(advice.limits)
    for words in ("single runs", "7 of WIT's 15", "full fine-tuning", "LoRA"):
        assert words in said
    assert str(advice).count("\n") == len(advice.evidence) + len(advice.limits)


def test_long_rows_are_a_limit():
    assert "25% of the rows" in advise(1000, 1.0, 1.0, 0.0, 0.25).limits[-1]
    assert advise(1000, 1.0, 1.0, 0.0, 0.01).limits == LIMITS


def test_share_of_the_answers_under_the_token_normaliser():
    # At ratio 12 and weight 0.25 prompts weigh 3 where answers weigh 1.
    assert any("keep 25%" in line for line in advise(1000, 12.0, 12.0, 0.0, 0.0).limits)
