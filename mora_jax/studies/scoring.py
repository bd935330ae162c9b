"""What studies measure on a model: losses on rows, losses on texts, and answers."""

from __future__ import annotations

import os
from typing import Any

from mora_jax import demo
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.data.loss_weights import LossWeights
from mora_jax.evaluation.perplexity import DatasetScores, score
from mora_jax.studies.study import Measuring, Sources

BATCH_SIZE = 64


def is_embedded(model: str) -> bool:
    """Whether a folder is that of the embedded model."""
    return os.path.realpath(model) == os.path.realpath(demo.model_path())


def texts_of(sources: Sources) -> str | None:
    """A file of texts like those that the base was pretrained on; None where none is known."""
    if sources.texts is not None:
        return sources.texts
    return demo.TEXTS if is_embedded(sources.model) else None


def score_rows(
    settings: Measuring,
    tokenizer: Any,
    model: Any,
    path: str,
    *,
    mode: str = "masked",
    end_of_turn: str | None = None,
    max_length: int | None = None,
) -> DatasetScores:
    """The scores on a file of rows or texts; the file is read and encoded once.

    Args:
        settings: of the cell.
        tokenizer, model: of the cell.
        path: the file.
        mode: which tokens count, as `loss.mode`.
        end_of_turn: as `loss.end_of_turn`.
        max_length: tokens at which rows are cut; None for the cell's own.
    """
    length = max_length or {**settings.preset.settings, **settings.data}["data.max_length"]
    key = path, mode, end_of_turn, length
    if key not in settings.cache:
        rows = EncodedDataset.build(load_rows(path), tokenizer, settings.preset.template, max_length=length)
        settings.cache[key] = rows.with_loss(LossWeights(mode, end_of_turn=end_of_turn))
    rows = settings.cache[key]
    return score(model, rows, batch_size=min(BATCH_SIZE, len(rows)))
