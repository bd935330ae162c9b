"""What came of one run of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mora_jax.models.decoder import Decoder
from mora_jax.training.config.schema import Config


@dataclass
class RunResult:
    """One run of a sweep.

    Attributes:
        name: of the run, and of its folder.
        values: of the swept keys.
        summary: what its `summary.json` holds; empty for a run that failed or was stopped.
        metrics: the rows of its `metrics.jsonl`.
        failed: why it ended before its last step; None for a run that didn't.
        out: its run directory; None where nothing was written.
        model: as trained, where nothing was written; else None (`mora_jax.load_adapter` reads `out`).
        config: its whole configuration.
    """

    name: str
    values: Mapping[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]] = field(repr=False)
    failed: str | None
    out: str | None
    config: Config = field(repr=False)
    model: Decoder | None = field(default=None, repr=False)

    @property
    def score(self) -> float:
        """What runs are compared by, lower is better: the evaluation loss, or without one the loss of the last step;
        NaN for a run that did not come to its end."""
        loss = self.summary.get("eval_loss")
        loss = self.summary.get("final_loss") if loss is None else loss
        return math.nan if loss is None or self.failed else loss
