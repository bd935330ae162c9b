"""Loads a tokenizer without the notices that `transformers` prints on import."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError
from mora_jax.paths import expanded

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
#: Characters of another library's error that are shown.
_LONGEST = 240
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str | Path) -> Any:
    """Loads the tokenizer of a model folder or hub id.

    Args:
      path: a HuggingFace folder with tokenizer files, or a hub id.

    Raises:
      InputError: if there is none that can be loaded.
    """
    folder = expanded(path)
    local = folder.exists()
    if local:
        _check_folder(folder)
    elif folder.is_absolute() or str(path).count("/") > 1:
        raise InputError(f"no such model folder: {path}")
    try:
        name = str(folder if local else path)
        tokenizer = _auto_tokenizer().from_pretrained(name, local_files_only=local, trust_remote_code=False)
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    except Exception as error:  # noqa: BLE001
        # What is wrong in a folder's files comes as whatever the code that meets it raises: bare Exceptions of the
        # tokenizers library, TypeErrors and AttributeErrors of transformers for a value of the wrong kind.
        raise InputError(_why(error, path)) from None
    if absent := [token for token, number in special.items() if number is None]:
        raise InputError(
            f"{path}: the tokenizer has no token {absent[0]!r}, which tokenizer_config.json names as a special one"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise InputError(
            f"{path}: tokenizer_config.json: model_max_length must be a number, found {tokenizer.model_max_length!r}"
        )
    return tokenizer


def _why(error: Exception, path: str | Path) -> str:
    from huggingface_hub.errors import StrictDataclassError

    reason = " ".join(str(error).split()).partition(". Errors:")[0] or type(error).__name__
    if isinstance(error, StrictDataclassError):
        return f"{path}: transformers, which reads config.json for the tokenizer, refuses it: {reason[:_LONGEST]}"
    if not isinstance(error, OSError | ValueError) and type(error) is not Exception:
        reason = f"{type(error).__name__}: {reason}"
    return f"cannot load a tokenizer from {path}: {reason[:_LONGEST]}"


def _check_folder(folder: Path) -> None:
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise InputError(f"cannot load a tokenizer from {folder}: there is none of {', '.join(VOCABULARIES)}")
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
