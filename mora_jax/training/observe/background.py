"""Writers in a thread of their own, so that no step waits for a disk or another process."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mora_jax.training.observe.writers import Writer


class Background:
    """Hands rows to writers, in order, without waiting for them.

    Args:
        writers: they are used by one thread alone until `close`.
    """

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._waiting: deque[Future[None]] = deque()

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `metrics.jsonl`.

        Raises:
            Exception: whatever a writer raised on an earlier row.
        """
        if not self._writers:
            return
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, dict(row)))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Waits until all is written, and closes the writers, every one of them; raises as `write`."""
        self._pool.shutdown()
        try:
            for future in self._waiting:
                future.result()
        finally:
            for writer in self._writers:
                writer.close(summary)

    def _write(self, row: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(row)
