"""Metrics as TensorBoard event files, through tensorboardX."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from mora_jax.training.config.schema import Config
from mora_jax.training.observe.tags import tagged
from mora_jax.training.run.directory import RunDirectory

FOLDER = "tensorboard"


class TensorBoardWriter:
    """Event files in the run's folder `tensorboard`, a new one each time that the run is started or resumed.

    Args:
        directory: of the run.
        config: of the run; shown as text.
        first_step: steps that are done already. What an earlier process wrote of later ones is hidden.
    """

    name = "TensorBoard"

    def __init__(self, directory: RunDirectory, config: Config, first_step: int):
        self.how_to_open = f"tensorboard --logdir {directory.path / FOLDER}"
        self._inner = SummaryWriter(str(directory.files.on_disk(FOLDER)), purge_step=first_step + 1)
        if first_step == 0:
            self._text("config", config.to_dict())

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `metrics.jsonl`, as one event: `add_scalar` for each number takes eight times as long."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged(row).items()]
        self._inner.file_writer.add_summary(Summary(value=values), row["step"])
        self._inner.flush()  # a killed run keeps what its checkpoints cover

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Writes the summary as text, and the file to its end."""
        if summary is not None:
            self._text("summary", summary)
        self._inner.close()

    def _text(self, tag: str, values: Mapping[str, Any]) -> None:
        # Four spaces make it code in Markdown, which is what TensorBoard shows text as.
        lines = json.dumps(values, indent=2).splitlines()
        self._inner.add_text(tag, "\n".join(f"    {line}" for line in lines), 0)
