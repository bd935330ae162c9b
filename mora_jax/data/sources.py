"""From files to a store of tokens: reading, converting, rendering and tokenising, with all their settings.

Tokens are kept on disk between runs, under a name that says all they depend on.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from mora_jax.data.formats.column_mapping import Mapping
from mora_jax.data.formats.load import open_rows
from mora_jax.data.tokens.encode import REASONS, Encoded, RawRow, RowEncoder, encode_chunks
from mora_jax.data.tokens.store import TokenStore, write
from mora_jax.errors import InputError
from mora_jax.paths import OFF, cache_folder, local_path, writable

#: Raise it when the same rows become other tokens or another layout.
VERSION = 5


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
    place: Path | None = None,
) -> TokenStore:
    """Encodes rows, or finds the tokens that an earlier run left.

    Several processes may ask for the same at the same time: one encodes, the others wait for it. What is
    there under the key is whole, since it is written beside and renamed.

    Args:
      encoder: what to do with the rows.
      rows: sources and raw rows; not read if the tokens are there.
      facts: what is to be remembered with the tokens; JSON values.
      workers: see `encode_chunks`.
      place: the folder where tokens are kept, named by their `fingerprint`; None: in memory alone.
    """
    facts = dict(facts)
    if place is None:
        return TokenStore(list(_batches(encode_chunks(encoder, rows, workers), facts)), facts)
    with FileLock(f"{place}.lock"):
        if not (place / "facts.json").is_file():
            _fill(place, encode_chunks(encoder, rows, workers), facts)
    facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    return TokenStore.open(place / "tokens.arrow", facts)


def _fill(place: Path, chunks: Iterable[Encoded], facts: dict[str, Any]) -> None:
    # The real path: from Python 3.12 on mkdtemp cuts "link/.." out of what it returns, which is another folder.
    beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=os.path.realpath(place.parent)))
    try:
        write(beside / "tokens.arrow", _batches(chunks, facts))
        (beside / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
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


def _batches(chunks: Iterable[Encoded], facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    """The batches of encoded chunks; what is reported beside them is summed up in `facts`."""
    counts: Counter[str] = Counter()
    facts |= {"reasons": [], "counts": {}}
    for chunk in chunks:
        counts += chunk.counts
        facts |= {"reasons": (facts["reasons"] + chunk.reasons)[:REASONS], "counts": dict(counts)}
        yield chunk.batch


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how they become tokens. What they count in the loss is decided later.

    Attributes:
      paths: files, globs, folders, or one hub id; or rows in memory.
      format: a name in `FORMATS`; None recognises it.
      template: see `Renderer`.
      fallback: see `Renderer`.
      columns: texts "ours=theirs": names of keys that differ from the format's.
      roles: texts "theirs=ours": names of roles that are not known.
      on_error: `raise`, or `skip`: count rows that break the format and go on.
      split: of a hub data set, of a folder that `datasets` saved, or of one whose files are named after several.
      subset: of a hub data set.
      streaming: read a hub data set without downloading it first.
      max_rows: read no more.
      workers: processes that tokenise; None: one a core, up to 16.
      cache: the folder where tokens are kept between runs; None: the user's cache folder; `off`: nowhere.
    """

    paths: Any
    format: str | None = None
    template: str | None = None
    fallback: str | None = None
    columns: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    on_error: str = "raise"
    split: str | None = None
    subset: str | None = None
    streaming: bool = False
    max_rows: int | None = None
    workers: int | None = None
    cache: str | None = None

    def load(self, tokenizer: Any) -> TokenStore:
        """Reads and tokenises all rows, or finds what an earlier run kept.

        Args:
          tokenizer: a fast `transformers` tokenizer.

        Raises:
          InputError: for rows, files or settings that cannot be used.
        """
        mapping = Mapping.parse(self.columns, self.roles)
        settings = {name: getattr(self, name) for name in ("on_error", "split", "subset", "streaming", "max_rows")}
        stream = open_rows(self.paths, self.format, mapping=mapping, **settings)
        skip = self.on_error == "skip"
        encoder = RowEncoder(tokenizer, self.template, self.fallback, stream.converter, skip=skip)
        facts = {
            "format": stream.format,
            "files": list(stream.files),
            "template": encoder.renderer.template,
            "notes": list(encoder.renderer.notes),
        }
        folder = cache_folder() if self.cache is None else local_path(self.cache)
        place = None
        if self.cache != OFF and writable(folder):
            parts = {
                "rows": stream.fingerprint(),
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "template": encoder.renderer.program,
                "fallback": self.fallback,
                "skip": skip,
            }
            place = folder / fingerprint(parts)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        workers = self.workers or min(16, cores)
        store = build_store(encoder, stream.raw(), facts, workers=workers, place=place)
        # Kept tokens may come from files of the same rows elsewhere.
        store.facts |= {"files": facts["files"], "notes": [*stream.notes, *store.facts["notes"]]}
        return store
