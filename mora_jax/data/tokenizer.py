"""Loads a tokenizer without the notices that `transformers` prints on import."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str | Path) -> Any:
    """Loads the tokenizer of a model folder or hub id.

    Args:
      path: a HuggingFace folder with tokenizer files, or a hub id.

    Raises:
      InputError: if there is none that can be loaded.
    """
    folder = Path(path)
    local = folder.exists()
    if local:
        _check_folder(folder)
    elif folder.is_absolute() or str(path).count("/") > 1:
        raise InputError(f"no such model folder: {path}")
    try:
        return _auto_tokenizer().from_pretrained(str(path), local_files_only=local, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises bare Exceptions for a file of the wrong form; any other kind is a bug.
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | KeyError | ImportError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot load a tokenizer from {path}: {reason}") from None


def _check_folder(folder: Path) -> None:
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise InputError(
            f"cannot load a tokenizer from {folder}: there is none of {', '.join(VOCABULARIES)}"
        )
    file = folder / "tokenizer.json"
    if file.exists():
        # The tokenizers library raises a bare Exception for a file that was cut off.
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            raise InputError(f"{file} is broken JSON ({error}): get it again") from None


def _auto_tokenizer() -> Any:
    before = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"  # It would say that torch is missing, which nothing here needs.
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = before
    return AutoTokenizer
