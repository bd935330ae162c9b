"""Rows to tokens: chunk by chunk, in this process or in several, so that memory holds a few chunks only."""

import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from math import isfinite, nan
from typing import Any

import numpy as np
import pyarrow as pa

from mora_jax.data.conversation import Conversation, Passage, Row, TokenRow
from mora_jax.data.formats.load import or_skip
from mora_jax.data.segments import Rendered, Segment
from mora_jax.data.templates.render import Renderer
from mora_jax.data.tokens.store import make_batch
from mora_jax.data.tokens.tokenize import Tokens, tokenize
from mora_jax.errors import InputError

# Rows that are handed to the tokenizer at once: enough to use every core, little enough to keep in memory.
CHUNK = 512
# Chunks that one process encodes before others are started: starting one costs seconds.
ALONE = 16
# Reasons of skipped rows that are kept.
REASONS = 5

#: Where a row comes from, and the row as it was read.
RawRow = tuple[str, Any]


@dataclass
class Encoded:
    """What became of a chunk.

    Attributes:
      batch: the rows' tokens.
      reasons: why rows were skipped, for the first of them.
      counts: rows that were `skipped`, that `fell_back` to another template, of which the template leaves out
        `tools` or `reasoning`, or that are odd (see `ODDITIES`).
    """

    batch: pa.RecordBatch
    reasons: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


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
        self.renderer = Renderer(tokenizer, template, fallback)
        self._convert, self._skip = convert, skip

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
        origins: list[int] = []  # of each row, the raw one that it comes from
        errors: list[InputError] = []
        for number, (source, raw) in enumerate(chunk):
            try:
                converted = [raw] if self._convert is None else list(self._convert(source, raw))
                rows += converted
                origins += [number] * len(converted)
            except InputError as error:
                if not self._skip:
                    raise or_skip(error) from None
                errors.append(error)
        before = _rendered(self.renderer)
        tokens: list[tuple[Tokens, str]] = []
        results = tokenize_rows(rows, self.renderer)
        refused = {origin for origin, result in zip(origins, results, strict=True) if isinstance(result, InputError)}
        for row, origin, result in zip(rows, origins, results, strict=True):
            if isinstance(result, InputError):
                if not self._skip:
                    raise or_skip(result)
                errors.append(result)
            elif not (result.side and origin in refused):  # an answer whose other half is refused compares with nothing
                tokens.append((result, row.source))
        reasons = [str(error) for error in errors[:REASONS]]
        counts = _rendered(self.renderer) - before
        counts["skipped"] = len(errors)
        for row in rows:
            counts.update(oddities(row))
        return Encoded(make_batch(tokens), reasons, +counts)


def _rendered(renderer: Renderer) -> Counter[str]:
    """What the renderer has counted so far."""
    return renderer.unshown + Counter({"fell_back": renderer.fell_back})


def encode_chunks(encoder: RowEncoder, rows: Iterable[RawRow], workers: int = 1) -> Iterator[Encoded]:
    """Encodes rows in their order.

    Args:
      encoder: what to do with a chunk.
      rows: as they are read; only a few chunks of them are held.
      workers: processes. More than one are started only when many rows come.
    """
    remaining = iter(rows)
    chunks = iter(lambda: list(islice(remaining, CHUNK)), [])
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


_LARGEST_ID = np.iinfo(np.int32).max


def tokenize_rows(rows: Sequence[Row], renderer: Renderer) -> list[Tokens | InputError]:
    """Tokenises rows, all that have text in one call.

    Args:
      rows: conversations, passages and rows of ids, in any mixture.
      renderer: template and tokenizer.

    Returns:
      For each row its tokens, or what is wrong with it: the caller raises the first or skips and counts them.
    """
    results: dict[int, Tokens | InputError] = {}
    rendered: dict[int, Rendered] = {}
    for place, row in enumerate(rows):
        try:
            if isinstance(row, TokenRow):
                results[place] = _from_ids(row, renderer.tokenizer.bos_token_id)
            else:
                rendered[place] = renderer.render(row)
        except InputError as error:
            results[place] = error
    for place, tokens in zip(rendered, tokenize(list(rendered.values()), renderer.tokenizer), strict=True):
        results[place] = _weighed(tokens, rows[place])
    return [results[place] for place in range(len(rows))]


def _weighed(tokens: Tokens, row: Row) -> Tokens:
    """The tokens with what the data says of their weights."""
    turn_weights: tuple[float, ...] = ()
    if isinstance(row, Passage):
        turn_weights = tuple(weight for _, weight in row.parts)
    elif isinstance(row, Conversation) and any(message.weight is not None for message in row.messages):
        turn_weights = tuple(nan if m.weight is None else m.weight for m in row.messages)
    side, answer = (0, 0) if isinstance(row, TokenRow) else (int(row.side), row.answer)
    if not turn_weights and row.weight == 1.0 and not side:
        return tokens
    return replace(tokens, turn_weights=turn_weights, weight=row.weight, side=side, answer=answer)


def _from_ids(row: TokenRow, bos: int | None) -> Tokens:
    """The tokens of a row that was tokenised elsewhere."""
    where = f"{row.source}: " if row.source else ""
    wrong = next((i for i, token in enumerate(row.input_ids) if not 0 <= token <= _LARGEST_ID), None)
    if wrong is not None:
        raise InputError(
            f"{where}`input_ids[{wrong}]` is {row.input_ids[wrong]}, which is no token's id; ids are 0 or more"
        )
    given = row.weights if row.weights is not None else (1.0,) * len(row.input_ids)
    if len(given) != len(row.input_ids):
        raise InputError(
            f"{where}there are {len(row.input_ids)} `input_ids` and {len(given)} weights; give one weight an id"
        )
    wrong = next((i for i, weight in enumerate(given) if not (isfinite(weight) and weight >= 0)), None)
    if wrong is not None:
        raise InputError(f"{where}`weights[{wrong}]` is {given[wrong]}; a weight is a number of 0 or more")
    weights = np.array(given, np.float32)
    segments = np.where(weights > 0, Segment.ASSISTANT, Segment.USER).astype(np.int8)
    turns = np.zeros(len(given), np.int16)
    if bos is not None and row.input_ids[:1] == (bos,):
        segments[0], turns[0] = Segment.BOS, -1
    return Tokens(np.array(row.input_ids, np.int32), segments, turns, weights=weights, weight=row.weight)


#: What may be odd about a row, in words that follow a number of rows.
ODDITIES = {
    "unanswered": "rows do not end with an assistant's turn; what follows the last answer is not trained",
    "repeated_role": "rows have two turns of one role in a row",
    "late_system": "rows have a system message that is not the first",
    "empty_turn": "rows have a turn without a word",
    "tools": "rows have tool descriptions, which the template does not show",
    "reasoning": "rows have reasoning, which the template does not show",
    "chat_markup": "rows of plain text hold the markup of a chat and are trained whole, questions too; rows of"
    " `messages` train answers alone",
    "fell_back": "rows could not be tracked and were rendered by the fallback template",
}

#: How the turn of a user begins in texts that were rendered elsewhere.
_MARKUP = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|prompter)\|>|\[INST\]|"
    r"### (?:Human|Instruction|User):"
)
#: Characters of a text in which it is looked for.
_BEGINNING = 4096


def oddities(row: Row) -> Iterator[str]:
    """The keys of `ODDITIES` that a row deserves by its own turns, each once."""
    if not isinstance(row, Conversation):
        return
    if row.text is not None:
        if _MARKUP.search(row.text, 0, _BEGINNING):
            yield "chat_markup"
        return
    roles = [message.role for message in row.messages]
    if "assistant" in roles and roles[-1] != "assistant":
        yield "unanswered"
    if any(one == other != "tool" for one, other in pairwise(roles)):
        yield "repeated_role"
    if "system" in roles[1:]:
        yield "late_system"
    if any(not (message.text.strip() or message.tool_calls) for message in row.messages):
        yield "empty_turn"


def notes(counts: dict[str, int]) -> list[str]:
    """One line for each kind of row that was counted."""
    return [f"{counts[name]} {oddity}" for name, oddity in ODDITIES.items() if counts.get(name)]
