"""The tokenizer of a model folder, which may have none."""

from pathlib import Path
from typing import Any

from mora_jax.data import tokenizer as any_tokenizer

TOKENIZER_FILES = (
    *any_tokenizer.VOCABULARIES,
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
    if not any((folder / name).exists() for name in any_tokenizer.VOCABULARIES):
        return None
    return any_tokenizer.load_tokenizer(folder)
