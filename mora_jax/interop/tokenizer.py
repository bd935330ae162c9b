"""Loading a folder's tokenizer."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


def load_tokenizer(folder: Path) -> Any | None:
    """The transformers tokenizer of a local folder; None when it has no tokenizer files.

    Raises:
        InputError: when the files are there but cannot be read.
    """
    if not any((folder / name).exists() for name in _VOCABULARIES):
        return None
    _check_json(folder / "tokenizer.json")
    auto = _auto_tokenizer()
    try:
        return auto.from_pretrained(str(folder), use_fast=True, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder}: the tokenizer cannot be loaded: {cause}") from None


def _check_json(file: Path) -> None:
    """Refuses a file that was cut off: the tokenizers library raises nothing that can be told from a bug."""
    if file.exists():
        text = file.read_bytes().strip()
        if not (text.startswith(b"{") and text.endswith(b"}")):
            raise InputError(f"{file} is not a complete JSON file: download it again")


def _auto_tokenizer() -> Any:
    """`transformers.AutoTokenizer`, without the advice to install torch that the first import prints."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    if "transformers" not in sys.modules and name not in os.environ:
        os.environ[name] = "1"
        try:
            importlib.import_module("transformers")
        finally:
            del os.environ[name]
    from transformers import AutoTokenizer

    return AutoTokenizer
