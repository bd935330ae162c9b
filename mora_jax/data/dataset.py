"""The encoded data set: examples, what became of the rows, and padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.data.conversation import Conversation, Rows
from mora_jax.data.encoding import CAUSES, Encoder, Example
from mora_jax.data.loading import load_rows
from mora_jax.data.rendering import Renderer
from mora_jax.data.report import Report
from mora_jax.errors import InputError

_LENGTH_STEP = 64


class EncodedDataset:
    """Examples that a model can be trained on.

    Attributes:
      examples: the kept rows.
      report: counts over all rows.
      max_length: no example is longer.
    """

    def __init__(self, examples: Sequence[Example], report: Report, max_length: int):
        self.examples = list(examples)
        self.report = report
        self.max_length = max_length

    @classmethod
    def build(
        cls,
        rows: Iterable[Conversation],
        tokenizer: Any,
        template: str | None = None,
        mode: str = "masked",
        prompt_weight: float = 0.0,
        max_length: int = 512,
        *,
        truncation: str = "right",
        vocab_size: int | None = None,
    ) -> EncodedDataset:
        """Encodes conversations.

        Args:
          rows: `N` conversations, such as `load_rows` gives.
          tokenizer: a fast `transformers` tokenizer.
          template: a built-in template's name, `tokenizer`, or None: the tokenizer's own, else `alpaca`.
          mode: `masked`, `unmasked`, `full` or `weighted`.
          prompt_weight: weight of instruction tokens in `weighted`, in [0, 1].
          max_length: the most tokens of an example.
          truncation: `right` cuts the end of longer rows off, `drop` leaves them out.
          vocab_size: the model's number of ids; larger ones are refused.

        Returns:
          The data set; rows without any trained token are dropped and counted in its report.

        Raises:
          InputError: for unusable settings or rows, and if no row is left.
        """
        renderer = Renderer(tokenizer, template)
        encoder = Encoder(renderer, mode, prompt_weight, max_length, truncation, vocab_size)
        report = Report(
            format=rows.format if isinstance(rows, Rows) else "",
            template=renderer.template,
            mode=mode,
            notes=list(renderer.notes),
        )
        special = frozenset(tokenizer.all_special_ids)
        examples = []
        for row in encoder.encode(rows):
            report.add(row, special)
            if row.example is not None:
                examples.append(row.example)
        if not examples:
            raise InputError(_nothing_left(report, encoder))
        return cls(examples, report, max_length)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def batch_length(self) -> int:
        """A length for every example: the longest, rounded up to a multiple of 64 (at most `max_length`)."""
        longest = max(map(len, self.examples))
        return min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, self.max_length)

    def batch(
        self, indices: Sequence[int] | np.ndarray, batch_size: int | None = None, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Pads examples to one shape.

        Args:
          indices: which examples, at most `batch_size`.
          batch_size: rows; a short batch is filled with empty rows. None: as many as indices.
          length: tokens a row; None: `batch_length`.

        Returns:
          `input_ids` int32 `[B, T]`, `segment_ids` int32 `[B, T]` (1 for tokens, 0 for padding) and `weights`
          float32 `[B, T]`.
        """
        batch_size = len(indices) if batch_size is None else batch_size
        length = self.batch_length if length is None else length
        chosen = [self.examples[int(index)] for index in indices]
        longest = max(map(len, chosen), default=0)
        if len(chosen) > batch_size or longest > length:
            raise ValueError(
                f"{len(chosen)} examples of up to {longest} tokens do not fit [{batch_size}, {length}]"
            )
        batch = {
            "input_ids": np.zeros((batch_size, length), np.int32),
            "segment_ids": np.zeros((batch_size, length), np.int32),
            "weights": np.zeros((batch_size, length), np.float32),
        }
        for row, example in enumerate(chosen):
            used = slice(0, len(example))
            batch["input_ids"][row, used] = example.input_ids
            batch["segment_ids"][row, used] = 1
            batch["weights"][row, used] = example.weights
        return batch

    def __str__(self) -> str:
        return str(self.report)


def load_examples(
    paths: str | Path | Iterable[str | Path], tokenizer: Any, *, format: str | None = None, **settings: Any
) -> EncodedDataset:
    """Reads data files and encodes them: `load_rows`, then `EncodedDataset.build`.

    Args:
      paths: one file or several.
      tokenizer: a fast `transformers` tokenizer.
      format: see `load_rows`.
      **settings: see `EncodedDataset.build`.
    """
    return EncodedDataset.build(load_rows(paths, format), tokenizer, **settings)


def split_rows(rows: Sequence[Conversation], fraction: float, seed: int = 0) -> tuple[Rows, Rows]:
    """Sets a part of the rows aside for evaluation.

    Args:
      rows: `N` conversations.
      fraction: the share to set aside, in (0, 1); at least one row.
      seed: the same seed gives the same split.

    Returns:
      Rows to train on and rows to evaluate on, each in their old order.
    """
    if not 0.0 < fraction < 1.0:
        raise InputError(f"eval_fraction is {fraction}: it must lie between 0 and 1")
    held_out = max(1, round(fraction * len(rows)))
    if held_out >= len(rows):
        raise InputError(f"eval_fraction {fraction} of {len(rows)} rows leaves nothing to train on")
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:held_out].tolist())
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for index, row in enumerate(rows):
        parts[index in chosen].append(row)
    origin = (rows.format, rows.files) if isinstance(rows, Rows) else ("", ())
    return Rows(parts[0], *origin), Rows(parts[1], *origin)


def _nothing_left(report: Report, encoder: Encoder) -> str:
    if not report.rows:
        return "there are no rows to encode"
    causes = ", ".join(f"{n} {CAUSES[cause]}" for cause, n in report.dropped.items())
    advice = {
        "too_long": f"raise max_length (now {encoder.max_length}; half of the rows need at most"
        f" {report.quantiles['median']}) or set truncation to `right`",
        "answer_cut_off": f"raise max_length (now {encoder.max_length}; half of the rows need at most"
        f" {report.quantiles['median']})",
        "no_answer": "give the rows an assistant's turn, or set loss mode to `unmasked`",
        "no_weight": "give the rows an answer of at least one token, or set loss mode to `full`",
    }
    main = max(report.dropped, key=lambda cause: report.dropped[cause])
    return f"none of the {report.rows} rows can be trained on ({causes}): {advice[main]}"
