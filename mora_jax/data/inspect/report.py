"""What became of the rows: the numbers that are shown before a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mora_jax.data.conversation import Side
from mora_jax.data.examples import RowOutcomes, answer_weights
from mora_jax.data.segments import ANSWER, CONTENT, INSTRUCTION, Segment
from mora_jax.data.tokens.store import FlatRows

#: Why a row is left out, in words.
CAUSES = {
    "too_long": "longer than max_length",
    "answer_cut_off": "nothing trained within max_length",
    "no_answer": "no answer to train on",
    "no_weight": "no token with a weight",
    "tie": "of pairs whose answers are equal, as they are rendered and cut",
    "bad_row": "not of the format",
}
#: An answer of so few tokens hardly says anything.
NEAR_EMPTY = 2

_IS_CONTENT = np.isin(list(Segment), CONTENT)
_IS_ANSWER = np.isin(list(Segment), ANSWER)
_IS_INSTRUCTION = np.isin(list(Segment), INSTRUCTION)
_BY_ROW = ("lengths", "ratios", "prompts", "sides", "answer_tokens")
_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass
class Report(RowOutcomes):
    """Counts over the rows of a data set, with what became of them. Tokens are those of the examples, after any cut.

    Attributes:
      rows: rows read, with those that broke the format.
      kept: examples.
      instruction_tokens: of system, user and tool messages, in all rows before any cut.
      response_tokens: of answers, in all rows before any cut.
      seam_rows: rows in which a token joins an answer's characters to others.
      special_rows: rows whose own words hold a special token's text.
      near_empty: rows that are answered with `NEAR_EMPTY` tokens or fewer.
      lengths: `[N]`, tokens of every row before any cut.
      ratios: `[N]`, instruction tokens for each response token, of the rows that have an answer.
      prompts: `[N]`, equal for rows with the same instruction; 0 for rows without.
      format: the name of the rows' format, if they come from files.
      template: the name of the template.
      mode: the loss mode.
      max_length: the most tokens of an example; 0 if it isn't known.
      by_segment: `[len(Segment)]`, tokens of each segment in all rows before any cut.
      weight_by_segment: `[len(Segment)]`, the sum of their weights.
      sides: `[N]`, how each row's answer is judged, values of `Side`.
      answer_tokens: `[N]`, tokens of the judged answer of each row, 0 in other rows.
      files: where the rows come from.
      reasons: what was wrong with the first rows that broke the format.
      fell_back: rows that the fallback template rendered.
      notes: what a user should know.
    """

    rows: int = 0
    kept: int = 0
    instruction_tokens: int = 0
    response_tokens: int = 0
    seam_rows: int = 0
    special_rows: int = 0
    near_empty: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    ratios: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    prompts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    format: str = ""
    template: str = ""
    mode: str = "masked"
    max_length: int = 0
    by_segment: np.ndarray = field(default_factory=lambda: np.zeros(len(Segment), np.int64))
    weight_by_segment: np.ndarray = field(default_factory=lambda: np.zeros(len(Segment), np.float64))
    sides: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    answer_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    files: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    fell_back: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, Any]], outcomes: RowOutcomes, **known: Any) -> Report:
        """Sums up the counts of batches of rows, and what became of them.

        Args:
          parts: what `count` returned for each batch.
          outcomes: of the rows.
          **known: further fields, such as the name of the format.

        Returns:
          The report.
        """
        report = cls(**known, **vars(outcomes))
        for name in parts[0] if parts else ():
            values = [part[name] for part in parts]
            # Some have an entry for each row, the others are sums over them.
            setattr(report, name, np.concatenate(values) if name in _BY_ROW else sum(values))
        report.rows += report.dropped.get("bad_row", 0)
        return report

    @property
    def trained_fraction(self) -> float:
        """The share of tokens that carry loss."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def ratio(self) -> float | None:
        """Instruction tokens for each response token; None if there is no response."""
        return self.instruction_tokens / self.response_tokens if self.response_tokens else None

    @property
    def median_ratio(self) -> float | None:
        """The median of the rows' own ratios; None if no row has a response."""
        return float(np.median(self.ratios)) if len(self.ratios) else None

    @property
    def quantiles(self) -> dict[str, int]:
        """Lengths before any cut."""
        names = ("shortest", "median", "p90", "p99", "longest")
        if not len(self.lengths):
            return dict.fromkeys(names, 0)
        values = np.quantile(self.lengths, _QUANTILES, method="higher")
        return {name: int(value) for name, value in zip(names, values, strict=True)}

    @property
    def recommended_max_length(self) -> int:
        """The multiple of 64 into which 99 of 100 rows fit whole."""
        return max(64, -(-self.quantiles["p99"] // 64) * 64)

    @property
    def duplicated(self) -> int:
        """Rows whose instruction an earlier row has too."""
        asked = self.prompts[self.prompts != 0]
        return len(asked) - len(np.unique(asked))

    @property
    def duplicated_share(self) -> float:
        """The share of such rows among those with an instruction."""
        asked = int(np.count_nonzero(self.prompts))
        return self.duplicated / asked if asked else 0.0

    @property
    def over_length(self) -> int:
        """Rows longer than `max_length`."""
        return int(np.count_nonzero(self.lengths > self.max_length)) if self.max_length else 0

    @property
    def over_length_share(self) -> float:
        """The share of such rows."""
        return self.over_length / len(self.lengths) if len(self.lengths) else 0.0

    @property
    def lost_share(self) -> float:
        """The share of the tokens with a weight that `max_length` takes away."""
        return 1.0 - self.trained_tokens / self.trained_before if self.trained_before else 0.0

    def histogram(self, bins: int = 16) -> tuple[np.ndarray, np.ndarray]:
        """Lengths before any cut, in classes of one width; the last class also holds all that are longer.

        Args:
          bins: the most classes.

        Returns:
          The classes' lower ends and how many rows are in each; both have one entry a class.
        """
        low, high = self.quantiles["shortest"], self.quantiles["p99"]
        width = 1
        while high // width - low // width >= bins:
            width *= 2
        first, last = low // width, high // width
        classes = np.clip(self.lengths // width, first, last) - first
        return np.arange(first, last + 1) * width, np.bincount(classes, minlength=last - first + 1)

    def nothing_left(self, max_length: int) -> str:
        """Why no row is left, with the setting to change.

        Args:
          max_length: tokens that a row may have.

        Returns:
          A sentence for an error message.
        """
        if not self.rows:
            return "there are no rows to encode"
        causes = ", ".join(f"{n} {CAUSES[cause]}" for cause, n in self.dropped.items())
        needed = f"raise data.max_length (now {max_length}; half of the rows need at most {self.quantiles['median']})"
        advice = {
            "too_long": f"{needed} or set data.truncation=prompt_first",
            "answer_cut_off": f"{needed} or set data.truncation=prompt_first",
            "no_answer": "give the rows an assistant's turn, or set loss.mode=unmasked",
            "no_weight": "give the rows an answer and a weight above 0, or set loss.mode=full",
            "tie": "give the rows answers that differ, or raise data.max_length",
            "bad_row": "fix the rows, or name their format and columns",
        }
        main = max(self.dropped, key=lambda cause: self.dropped[cause])
        where = f"{', '.join(self.files[:3])}: " if self.files else ""
        return f"{where}none of the {self.rows} rows can be trained on ({causes}): {advice[main]}"

    def lines(self) -> list[tuple[str, str]]:
        """Names and values, ready to print."""
        dropped = ", ".join(f"{n} {CAUSES[cause]}" for cause, n in self.dropped.items()) or "none"
        lines = [("format", self.format)] if self.format else []
        lines += [
            ("rows", f"{self.rows} read, {self.kept} examples kept, {self.truncated} rows cut, {self.split} split"),
            ("dropped", dropped),
            ("template", self.template),
            ("loss mode", self.mode),
            ("tokens", f"{self.tokens}, {self.trained_fraction:.1%} of them trained"),
            ("ratio", self.ratio_words),
            ("lengths", ", ".join(f"{name} {value}" for name, value in self.quantiles.items())),
            ("max length", self.length_words),
            ("repeated", f"{self.duplicated} rows ask what an earlier row asks ({self.duplicated_share:.1%})"),
            ("near-empty", f"{self.near_empty} answers of at most {NEAR_EMPTY} tokens"),
        ]
        if self.judged_words:
            lines.append(("judged", self.judged_words))
        odd = [
            ("seams", self.seam_rows, "rows with a token that joins an answer to what is around it"),
            ("special", self.special_rows, "rows whose own words hold a special token"),
            ("fallback", self.fell_back, "rows rendered by the fallback template"),
        ]
        lines += [(name, f"{n} {meaning}") for name, n, meaning in odd if n]
        lines += [("bad row", reason) for reason in self.reasons]
        return lines + [("note", note) for note in self.notes]

    @property
    def judged_words(self) -> str | None:
        """How many answers are judged how, with the length of the median one; None where none is."""
        kinds = [
            (side.name.lower(), self.answer_tokens[self.sides == side]) for side in Side if side and side in self.sides
        ]
        counts = [f"{len(tokens):,} {name} of {np.median(tokens):,.0f} tokens" for name, tokens in kinds]
        return f"{' and '.join(counts)} in the median answer" if counts else None

    @property
    def ratio_words(self) -> str:
        """Instructions against responses."""
        if self.ratio is None or self.median_ratio is None:
            return "no response"
        return f"{self.ratio:.2f} instruction tokens a response token, {self.median_ratio:.2f} in the median row"

    @property
    def length_words(self) -> str:
        """What `max_length` costs, and the one to take."""
        advice = f"{self.recommended_max_length} recommended (99 of 100 rows fit)"
        if not self.max_length:
            return advice
        return (
            f"{self.max_length}: {self.over_length_share:.1%} of the rows are longer, which costs"
            f" {self.lost_share:.1%} of the trained tokens; {advice}"
        )

    def __str__(self) -> str:
        return "\n".join(f"{name:>10}  {value}" for name, value in self.lines())


def count(flat: FlatRows, weights: np.ndarray, chosen: np.ndarray, special_ids: np.ndarray) -> dict[str, Any]:
    """Counts over a batch of rows, before any cut: values of fields of `Report`, by name.

    Args:
      flat: the rows.
      weights: `[T]`, see `flat_weights`.
      chosen: `[R]` bool, those to count.
      special_ids: ids of special tokens.
    """
    segments = flat.segments.astype(np.intp)
    instructions = flat.per_row(_IS_INSTRUCTION[segments])[chosen]
    answers = flat.per_row(_IS_ANSWER[segments])[chosen]
    special = flat.per_row(_IS_CONTENT[segments] & np.isin(flat.input_ids, special_ids))[chosen]
    answered = answers > 0
    looked_at = np.repeat(chosen, flat.lengths)
    kinds, kinds_count = segments[looked_at], len(Segment)
    return {
        "rows": int(chosen.sum()),
        "instruction_tokens": int(instructions.sum()),
        "response_tokens": int(answers.sum()),
        "seam_rows": int(np.count_nonzero(flat.seams[chosen])),
        "special_rows": int(np.count_nonzero(special)),
        "near_empty": int(np.count_nonzero(answered & (answers <= NEAR_EMPTY))),
        "by_segment": np.bincount(kinds, minlength=kinds_count),
        "weight_by_segment": np.bincount(kinds, weights[looked_at], minlength=kinds_count),
        "lengths": flat.lengths[chosen].astype(np.int32),
        "ratios": (instructions[answered] / answers[answered]).astype(np.float32),
        # Both answers of a pair are to one prompt, which repeats nothing.
        "prompts": np.where(flat.side == Side.REJECTED, 0, flat.prompt)[chosen],
        "sides": flat.side[chosen],
        "answer_tokens": flat.per_row((answer_weights(flat) > 0) & (np.repeat(flat.side, flat.lengths) > 0))[chosen]
        if flat.side.any()
        else np.zeros(int(chosen.sum()), np.int64),
    }
