"""Which loss mode the literature supports for a data set, and how sure that is.

Masked loss is the default, and the rules below leave it only where several studies point the same way. The figures
are quoted, not measured here; `LIMITS` says what they can't carry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mora_jax.data.inspect.report import Report

#: Instruction tokens a response token from which answers count as short beside their prompts.
LONG_PROMPTS = 3.0
#: Fewer examples than this are few.
FEW_EXAMPLES = 15_000
#: The share of rows with an instruction that an earlier row has, from which prompts count as repeated.
REPEATED = 0.1
#: The share of rows over `max_length` from which the numbers of whole rows say little.
MANY_LONG = 0.05
#: The prompt weight that is proposed: close to the best one that the study of prompt loss weights fitted.
PROMPT_WEIGHT = 0.25

_IM = "Instruction Modelling (Shi et al., NeurIPS 2024, arXiv 2405.14394)"
_PLW = "Does Prompt Loss Matter? (Huerta-Enochian and Ko, EMNLP 2024, arXiv 2401.13586)"
_WIT = "WIT (Chatterjee et al., TACL 2025, arXiv 2507.07817)"

IM_LONG_PROMPTS = (
    f"{_IM}, main results, Llama-2-7B: unmasked against masked loss raises AlpacaEval 1.0 from 36.20 to 44.15 (LESS "
    "BBH-ICL, ratio 3.3), 5.12 to 10.10 (LESS TyDiQA, 5.9) and 4.42 to 9.78 (LESS MMLU-Chat, 26.3)"
)
IM_SHORT_PROMPTS = (
    f"{_IM}, Figure 2 left: the gain of unmasked loss falls with the ratio, and the fit over data sets is zero near "
    "a ratio of 0.25; LIMA (ratio 0.09) goes from 33.06 to 32.94 on AlpacaEval 1.0"
)
IM_BETWEEN = (
    f"{_IM}, main results, Llama-2-7B: at ratios of 0.3 to 0.6 unmasked loss gives AlpacaEval 1.0 of 30.77 against "
    "21.54 (Dolly 9k), 19.52 against 16.29 (Alpaca 5k) and 15.11 against 13.42 (Dolly 3k); the points of Figure 2 at "
    "one ratio lie 80 % and more apart"
)
IM_MANY_EXAMPLES = (
    f"{_IM}, Figure 2 right: on subsets of Tülu v2 near ratio 10 the gain falls with the number of examples; its fit "
    "is zero near 58,000"
)
PLW_SHORT_ANSWERS = (
    f"{_PLW}: of three Alpaca variants only the one with short answers (about 179 prompt and 15 answer tokens) "
    "responds to the prompt's weight (p < 0.001), with the best one near 0.24; the others: p = 0.24 and 0.09"
)
WIT_WEIGHTS = (
    f"{_WIT}: the best prompt weight is above 0 in 56 % of 75 cases and at most 0.6 in 81 %; its mean by benchmark "
    "is 0.17 to 0.48"
)
WIT_MIXED = (
    f"{_WIT}, heat map: equal weights on prompt and answer beat masked loss in 7 of 15 settings, by 0.5 points in the "
    "mean (worst -9.0, best +7.1)"
)
REPEATED_PROMPTS = (
    "a report from practice (unslothai/unsloth issue 3041): with long documents shared by many rows, unmasked "
    "training overfits the documents within an epoch"
)
CHAT_MASKED = (
    "nanochat (karpathy/nanochat pull request 582): putting a lost mask back raised ChatCORE from 0.315 to 0.355 on "
    "a large chat mixture"
)

LIMITS: tuple[str, ...] = (
    "the published evidence is of single runs and mixed (unmasked better in 7 of WIT's 15 settings); cells of WIT "
    "that differ by a constant factor alone lie 2 to 6 points apart, so smaller differences show nothing",
    "it comes from full fine-tuning; with LoRA and MoRA there is this library's study of a toy alone (instruct quick, "
    "ten seeds, ratios of 3.7 and 10.3), where unmasked loss made answers no better and some worse",
    "only instructions that are equal token by token count as repeated; a document shared under different questions "
    "isn't noticed",
)
OPPOSITE = (
    f"{_WIT} finds the opposite direction: its best prompt weight rises with longer answers and falls with longer "
    "prompts"
)


@dataclass(frozen=True)
class Advice:
    """A proposed loss mode.

    Attributes:
      mode: a key of `MODES`.
      prompt_weight: the weight to go with it; None where the mode takes none.
      confidence: `high` only where the modes train the same tokens or one of them trains nothing, else `moderate`
        or `low`.
      reason: why, in one sentence about this data.
      evidence: what was published, with its source.
      limits: what that doesn't show.
    """

    mode: str
    prompt_weight: float | None
    confidence: str
    reason: str
    evidence: tuple[str, ...]
    limits: tuple[str, ...]

    @property
    def text(self) -> str:
        """The advice in one line, which begins with the mode."""
        return f"{self.mode}: {self.reason}; confidence: {self.confidence}"

    def __str__(self) -> str:
        lines = [self.text, *(f"  evidence: {line}" for line in self.evidence)]
        return "\n".join(lines + [f"  limit: {line}" for line in self.limits])


def advise(
    examples: int, ratio: float | None, median_ratio: float | None, duplicated: float, over_length: float
) -> Advice:
    """Proposes a loss mode.

    Args:
      examples: how many there are.
      ratio: instruction tokens for each response token, of the sums over all rows; None without any response.
      median_ratio: the same, the median of the rows.
      duplicated: share of rows whose instruction an earlier row has too, in [0, 1].
      over_length: share of rows longer than `max_length`, in [0, 1].

    >>> advise(3000, 0.6, 0.4, 0.0, 0.0).mode
    'masked'
    >>> advise(3000, 20.0, 15.0, 0.0, 0.0).mode
    'weighted'
    >>> advise(3000, 20.0, 15.0, 0.6, 0.0).mode
    'masked'
    """
    limits = LIMITS
    if over_length > MANY_LONG:
        limits += (
            f"{over_length:.0%} of the rows are longer than max_length; the ratio is that of whole rows, and cutting "
            "them changes it",
        )
    if ratio is None or median_ratio is None:
        reason = "no row holds an answer, so that masked loss would train nothing"
        return Advice("unmasked", None, "high", reason, (), limits)
    if ratio == 0:
        reason = "no row holds an instruction, so that masked, unmasked and weighted loss train the same tokens"
        return Advice("masked", None, "high", reason, (), limits)
    shape = f"{ratio:.2g} instruction tokens a response token (median of rows {median_ratio:.2g})"
    if duplicated >= REPEATED:
        reason = (
            f"{duplicated:.0%} of the rows repeat an instruction, and loss on repeated prompts invites learning them "
            f"by heart: don't use unmasked; {shape}"
        )
        return Advice("masked", None, "moderate", reason, (REPEATED_PROMPTS, WIT_MIXED), limits)
    if min(ratio, median_ratio) > LONG_PROMPTS:
        return _long_prompts(examples, ratio, shape, limits)
    if max(ratio, median_ratio) > LONG_PROMPTS:
        reason = f"{shape}: some rows have long prompts and short answers, others not, which no study covers"
        return Advice("masked", None, "low", reason, (IM_LONG_PROMPTS, WIT_MIXED), limits)
    if ratio < LONG_PROMPTS / 12:
        reason = f"{shape}: answers are long beside their prompts, where loss on prompts gained nothing"
        return Advice("masked", None, "moderate", reason, (IM_SHORT_PROMPTS, WIT_MIXED, CHAT_MASKED), limits)
    reason = f"{shape}: answers aren't short beside their prompts, which begins at about {LONG_PROMPTS:g}"
    return Advice("masked", None, "moderate", reason, (IM_BETWEEN, WIT_MIXED, CHAT_MASKED), limits)


def _long_prompts(examples: int, ratio: float, shape: str, limits: tuple[str, ...]) -> Advice:
    if examples >= FEW_EXAMPLES:
        reason = f"{shape} speak for loss on prompts, but {examples:,} examples are many, and the gain falls with them"
        return Advice("masked", None, "low", reason, (IM_MANY_EXAMPLES, IM_LONG_PROMPTS, WIT_MIXED), limits)
    reason = (
        f"{shape} and only {examples:,} examples with different prompts: try a prompt weight of {PROMPT_WEIGHT} "
        "(0.1 to 0.5), or unmasked, beside masked, and keep what does better on held-out answers"
    )
    share = 1 / (1 + PROMPT_WEIGHT * ratio)
    trap = (
        f"with the normalisers `token` and `nonzero` prompts then get part of each step: here answers keep {share:.0%} "
        "of the weight under `token`; loss.normalize=response leaves the answers' gradient as it is"
    )
    evidence = (IM_LONG_PROMPTS, PLW_SHORT_ANSWERS, WIT_WEIGHTS, WIT_MIXED)
    return Advice("weighted", PROMPT_WEIGHT, "low", reason, evidence, (*limits, OPPOSITE, trap))


def advise_on(report: Report) -> Advice:
    """Proposes a loss mode for the rows of a report.

    Args:
      report: of a data set, `EncodedDataset.report`.

    Returns:
      The mode with its confidence, evidence and limits.
    """
    if report.judged_words:
        reason = "rows judge answers, whose own tokens alone count under an objective of preferences (loss.objective)"
        return Advice("masked", None, "high", reason, (), ())
    return advise(report.kept, report.ratio, report.median_ratio, report.duplicated_share, report.over_length_share)


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
