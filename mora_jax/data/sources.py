"""From files to a store of tokens: reading, converting, rendering and tokenising, with all their settings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_jax.data.formats.column_mapping import Mapping
from mora_jax.data.formats.load import open_rows
from mora_jax.data.tokens.cache import build_store, fingerprint, tokenizer_fingerprint
from mora_jax.data.tokens.encode import RowEncoder
from mora_jax.data.tokens.store import TokenStore
from mora_jax.paths import OFF, cache_folder, local_path, writable


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
        stream = open_rows(
            self.paths,
            self.format,
            mapping=Mapping.parse(self.columns, self.roles),
            on_error=self.on_error,
            split=self.split,
            subset=self.subset,
            streaming=self.streaming,
            max_rows=self.max_rows,
        )
        skip = self.on_error == "skip"
        encoder = RowEncoder(tokenizer, self.template, self.fallback, stream.converter, skip=skip)
        facts = {
            "format": stream.format,
            "files": list(stream.files),
            "template": encoder.renderer.template,
            "notes": list(encoder.renderer.notes),
        }
        folder: Path | None = cache_folder() if self.cache is None else local_path(self.cache)
        key = None
        if self.cache == OFF or folder is None or not writable(folder):
            folder = None
        else:
            key = fingerprint(
                {
                    "rows": stream.fingerprint(),
                    "tokenizer": tokenizer_fingerprint(tokenizer),
                    "template": encoder.renderer.program,
                    "fallback": self.fallback,
                    "skip": skip,
                }
            )
        store = build_store(encoder, stream.raw(), facts, workers=self._workers(), folder=folder, key=key)
        # Kept tokens may come from files of the same rows elsewhere.
        store.facts |= {"files": facts["files"], "notes": [*stream.notes, *store.facts["notes"]]}
        return store

    def _workers(self) -> int:
        return self.workers or min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
