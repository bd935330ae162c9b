"""Loads a tokenizer without the notices that `transformers` prints on import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def load_tokenizer(path: str | Path) -> Any:
    """Loads the tokenizer of a model folder or hub id.

    Args:
      path: a HuggingFace folder with tokenizer files, or a hub id.

    Raises:
      InputError: if there is none that can be loaded.
    """
    before = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"  # It would say that torch is missing, which nothing here needs.
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = before
    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load a tokenizer from {path}: {reason}") from None
