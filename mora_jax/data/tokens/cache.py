"""Tokens kept on disk between runs, under a name that says all they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from mora_jax.data.tokens.encode import Encoded, RawRow, RowEncoder, encode_chunks
from mora_jax.data.tokens.store import TokenStore, write
from mora_jax.errors import InputError

#: Raise it when the same rows become other tokens or another layout.
VERSION = 4
_REASONS = 5


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides what a tokenizer makes of a conversation."""
    described = (
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        str(tokenizer.special_tokens_map),
        str(tokenizer.split_special_tokens),
    )
    return hashlib.sha256("\0".join(described).encode()).hexdigest()


def fingerprint(parts: dict[str, Any]) -> str:
    """A hash of JSON values, under which tokens are kept."""
    return hashlib.sha256(json.dumps({"version": VERSION, **parts}, sort_keys=True).encode()).hexdigest()[:32]


def build_store(
    encoder: RowEncoder,
    rows: Iterable[RawRow],
    facts: dict[str, Any],
    *,
    workers: int = 1,
    folder: Path | None = None,
    key: str | None = None,
) -> TokenStore:
    """Encodes rows, or finds the tokens that an earlier run left.

    Several processes may ask for the same at the same time: one encodes, the others wait for it. What is
    there under the key is whole, since it is written beside and renamed.

    Args:
      encoder: what to do with the rows.
      rows: sources and raw rows; not read if the tokens are there.
      facts: what is to be remembered with the tokens; JSON values.
      workers: see `encode_chunks`.
      folder: where tokens are kept; None: in memory alone.
      key: see `fingerprint`; needed with `folder`.
    """
    if folder is None or key is None:
        collected = _Collected(encode_chunks(encoder, rows, workers))
        batches = list(collected)
        return TokenStore(batches, facts | collected.facts())
    place = folder / key
    with FileLock(folder / f"{key}.lock"):
        if not (place / "facts.json").is_file():
            _fill(place, _Collected(encode_chunks(encoder, rows, workers)), facts)
    known = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    return TokenStore.open(place / "tokens.arrow", known)


def _fill(place: Path, collected: _Collected, facts: dict[str, Any]) -> None:
    # The real path: from Python 3.12 on mkdtemp cuts "link/.." out of what it returns, which is another folder.
    beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=os.path.realpath(place.parent)))
    try:
        write(beside / "tokens.arrow", collected)
        known = facts | collected.facts()
        (beside / "facts.json").write_text(json.dumps(known), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)
    except OSError as error:
        raise InputError(
            f"cannot keep tokens in {place.parent} ({error.strerror or str(error).rpartition('] ')[2]}): set data.cache"
            " to a folder with room, or to `off`"
        ) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(beside)


class _Collected:
    """The batches of encoded chunks, with sums over what is reported beside them."""

    def __init__(self, chunks: Iterable[Encoded]):
        self._chunks = chunks
        self.counts: Counter[str] = Counter()
        self.reasons: list[str] = []

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for chunk in self._chunks:
            self.counts += chunk.counts
            self.reasons = (self.reasons + chunk.reasons)[:_REASONS]
            yield chunk.batch

    def facts(self) -> dict[str, Any]:
        return {"reasons": self.reasons, "counts": dict(self.counts)}
