"""What became of the rows: the numbers that are shown before a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mora_jax.data.encoding import CAUSES, Encoded
from mora_jax.data.segments import CONTENT, INSTRUCTION, Segment

_IS_CONTENT = np.isin(list(Segment), CONTENT)
_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass
class Report:
    """Counts over the rows of a data set. Tokens are those of the kept examples, after any cut.

    Attributes:
      rows: conversations read.
      kept: examples.
      dropped: rows left out, by cause (keys of `encoding.CAUSES`).
      truncated: kept examples that lost their end.
      tokens: tokens of all examples.
      trained_tokens: tokens whose weight is not 0.
      instruction_tokens: of system, user and tool messages, in all rows before any cut.
      response_tokens: of answers, in all rows before any cut.
      seam_rows: rows in which a token joins an answer's characters to others.
      special_rows: rows whose own words hold a special token's text.
      lengths: tokens of every row before any cut.
      format: the name of the rows' format, if they come from files.
      template: the name of the template.
      mode: the loss mode.
      notes: what a user should know.
    """

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    instruction_tokens: int = 0
    response_tokens: int = 0
    seam_rows: int = 0
    special_rows: int = 0
    lengths: list[int] = field(default_factory=list)
    format: str = ""
    template: str = ""
    mode: str = "masked"
    notes: list[str] = field(default_factory=list)

    @property
    def trained_fraction(self) -> float:
        """The share of tokens that carry loss."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def ratio(self) -> float | None:
        """Instruction tokens for each response token; None if there is no response."""
        return self.instruction_tokens / self.response_tokens if self.response_tokens else None

    @property
    def quantiles(self) -> dict[str, int]:
        """Lengths before any cut."""
        names = ("shortest", "median", "p90", "p99", "longest")
        if not self.lengths:
            return dict.fromkeys(names, 0)
        values = np.quantile(self.lengths, _QUANTILES, method="higher")
        return {name: int(value) for name, value in zip(names, values, strict=True)}

    @property
    def recommended_max_length(self) -> int:
        """The multiple of 64 into which 99 of 100 rows fit whole."""
        return max(64, -(-self.quantiles["p99"] // 64) * 64)

    def add(self, row: Encoded, special_ids: frozenset[int] = frozenset()) -> None:
        """Counts one encoded row."""
        tokens, example = row.tokens, row.example
        self.rows += 1
        self.lengths.append(len(tokens.input_ids))
        self.seam_rows += tokens.seams > 0
        words = tokens.input_ids[_IS_CONTENT[tokens.segments]]
        self.special_rows += not special_ids.isdisjoint(words.tolist())
        by_segment = np.bincount(tokens.segments, minlength=len(Segment))
        self.instruction_tokens += int(by_segment[list(INSTRUCTION)].sum())
        self.response_tokens += int(by_segment[Segment.ASSISTANT])
        if example is None:
            assert row.cause is not None
            self.dropped[row.cause] = self.dropped.get(row.cause, 0) + 1
            return
        self.kept += 1
        self.truncated += len(example) < len(tokens.input_ids)
        self.tokens += len(example)
        self.trained_tokens += int(np.count_nonzero(example.weights))

    def lines(self) -> list[tuple[str, str]]:
        """Names and values, ready to print."""
        shape = ", ".join(f"{name} {value}" for name, value in self.quantiles.items())
        dropped = ", ".join(f"{n} {CAUSES[cause]}" for cause, n in self.dropped.items()) or "none"
        ratio = (
            "no response" if self.ratio is None else f"{self.ratio:.2f} instruction tokens a response token"
        )
        lines = [("format", self.format)] if self.format else []
        lines += [
            ("rows", f"{self.rows} read, {self.kept} kept, {self.truncated} of them cut"),
            ("dropped", dropped),
            ("template", self.template),
            ("loss mode", self.mode),
            ("tokens", f"{self.tokens}, {self.trained_fraction:.1%} of them trained"),
            ("ratio", ratio),
            ("lengths", shape),
        ]
        if self.seam_rows:
            lines.append(
                ("seams", f"{self.seam_rows} rows with a token that joins an answer to what is around it")
            )
        if self.special_rows:
            lines.append(("special", f"{self.special_rows} rows whose own words hold a special token"))
        return lines + [("note", note) for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(f"{name:>10}  {value}" for name, value in self.lines())
