"""Rows to tokens: chunk by chunk, in this process or in several, so that memory holds a few chunks only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from mora_jax.data.conversation import Row
from mora_jax.data.formats.rows import or_skip
from mora_jax.data.templates.render import Renderer
from mora_jax.data.tokens.row_warnings import oddities
from mora_jax.data.tokens.rows import tokenize_rows
from mora_jax.data.tokens.store import make_batch
from mora_jax.data.tokens.tokenize import Tokens
from mora_jax.errors import InputError

# Rows that are handed to the tokenizer at once: enough to use every core, little enough to keep in memory.
CHUNK = 512
# Chunks that one process encodes before others are started: starting one costs seconds.
ALONE = 16
# Reasons of skipped rows that are kept.
_REASONS = 5

#: Where a row comes from, and the row as it was read.
RawRow = tuple[str, Any]


@dataclass
class Encoded:
    """What became of a chunk.

    Attributes:
      batch: the rows' tokens.
      reasons: why rows were skipped, for the first of them.
      counts: rows that were `skipped`, that `fell_back` to another template, of which the template leaves out
        `tools` or `reasoning`, or that are odd (see `oddities.ODDITIES`).
    """

    batch: pa.RecordBatch
    reasons: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def no_conversion(source: str, row: Row) -> list[Row]:
    """For rows that are converted already."""
    del source
    return [row]


class RowEncoder:
    """Raw rows to tokens. Can be sent to another process.

    Args:
      tokenizer: a fast `transformers` tokenizer.
      template: see `Renderer`.
      fallback: see `Renderer`.
      convert: `(source, raw row)` -> rows; None for rows that are converted already.
      skip: whether rows that break the format are counted and left out, instead of raised.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        fallback: str | None = None,
        convert: Callable[[str, Any], Iterable[Row]] | None = None,
        *,
        skip: bool = False,
    ):
        self._arguments = (tokenizer, template, fallback, convert, skip)
        self.renderer = Renderer(tokenizer, template, fallback)
        self._convert = convert or no_conversion
        self._skip = skip

    def __reduce__(self) -> Any:
        *positional, skip = self._arguments
        return _make_encoder, (tuple(positional), skip)

    def __call__(self, chunk: list[RawRow]) -> Encoded:
        """Encodes a chunk.

        Args:
          chunk: rows as they were read.

        Returns:
          Their tokens, segments and turns, one row after the other.

        Raises:
          InputError: for the first row that cannot be used, unless such rows are skipped.
        """
        rows: list[Row] = []
        errors: list[InputError] = []
        for source, raw in chunk:
            try:
                rows.extend(self._convert(source, raw))
            except InputError as error:
                if not self._skip:
                    raise or_skip(error) from None
                errors.append(error)
        renderer = self.renderer
        before = _rendered(renderer)
        kept: list[tuple[Tokens, str]] = []
        for row, result in zip(rows, tokenize_rows(rows, self.renderer), strict=True):
            if isinstance(result, Tokens):
                kept.append((result, row.source))
            elif self._skip:
                errors.append(result)
            else:
                raise or_skip(result)
        reasons = [str(error) for error in errors[:_REASONS]]
        counts = _rendered(renderer) - before
        counts["skipped"] = len(errors)
        for row in rows:
            counts.update(oddities(row))
        return Encoded(make_batch(kept), reasons, +counts)


def _rendered(renderer: Renderer) -> Counter[str]:
    """What the renderer has counted so far."""
    return renderer.unshown + Counter({"fell_back": renderer.fell_back})


def _make_encoder(arguments: tuple[Any, ...], skip: bool) -> RowEncoder:
    return RowEncoder(*arguments, skip=skip)


def encode_chunks(encoder: RowEncoder, rows: Iterable[RawRow], workers: int = 1) -> Iterator[Encoded]:
    """Encodes rows in their order.

    Args:
      encoder: what to do with a chunk.
      rows: as they are read; only a few chunks of them are held.
      workers: processes. More than one are started only when many rows come.
    """
    chunks = iter(_chunked(rows))
    for chunk in islice(chunks, ALONE if workers > 1 else None):
        yield encoder(chunk)
    first = next(chunks, None)
    if first is None:
        return
    # Not forked: a copy of a process with JAX's threads in it can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,)) as pool:
        pending: deque[Future[Encoded]] = deque([_submit(pool, first)])
        try:
            for chunk in chunks:
                pending.append(_submit(pool, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _submit(pool: ProcessPoolExecutor, chunk: list[RawRow]) -> Future[Encoded]:
    """Gives a chunk to the pool, which may start a process for it: one that no Ctrl-C reaches.

    A terminal sends it to all processes. The parent stops the others; they would only add their tracebacks.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return pool.submit(_work, chunk)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it
    try:
        return pool.submit(_work, chunk)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _chunked(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


_worker: RowEncoder | None = None


def _start_worker(encoder: RowEncoder) -> None:
    global _worker
    _worker = encoder
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)


def _work(chunk: list[RawRow]) -> Encoded:
    assert _worker is not None, "the pool's initializer sets it"
    return _worker(chunk)
