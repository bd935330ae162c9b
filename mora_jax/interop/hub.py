"""From a path or a hub id to a local folder."""

import os
import re
from pathlib import Path
from typing import Any

from mora_jax.data.tokens import tokenize as any_tokenizer
from mora_jax.errors import InputError
from mora_jax.interop.atomic_folder import repair
from mora_jax.paths import local_path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The folder's absolute path, or the local copy of the hub repository that `path` names (downloaded when needed).

    Raises:
        InputError: when it is neither.
    """
    folder = local_path(path)
    if folder.is_dir():
        repair(folder)
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file; give the folder that holds config.json")
    text = os.fspath(path)
    if not is_hub_id(text):
        raise InputError(f"{path} is not a folder (a hub id looks like owner/name)")
    return _download(text)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form OWNER/NAME."""
    return bool(_HUB_ID.fullmatch(text)) and "/" in text


def adapter_folder(path: str) -> str:
    """The adapter folder itself, also for the run directory around it, or a hub id's local copy.

    Raises:
        InputError: when there is no adapter.
    """
    if not path:
        raise InputError("the adapter is empty: give a folder, a run directory or a hub id")
    root = local_folder(path)
    for folder in (root, root / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return str(folder)
    if (root / "model" / "config.json").is_file():
        raise InputError(f"{path} holds no adapter but a model: give {root / 'model'} as the model")
    if (checkpoints := root / "checkpoints").is_dir():
        steps = sorted(int(step.name) for step in checkpoints.iterdir() if step.name.isdecimal())
        choice = f", or take its last checkpoint: {path}@{steps[-1]}" if steps else ""
        raise InputError(
            f"{path} is a run that has not ended, so it holds no adapter yet: continue it with mora-jax train --resume "
            f"{path}{choice}"
        )
    raise InputError(f"{path} is no adapter: there is no adapter_config.json in it or in its folder adapter/")


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, allow_patterns=_WANTED))
    except (OSError, ValueError, HfHubHTTPError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{repository} is not a local folder, and could not be fetched from the hub (that needs network): {cause}"
        ) from None


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
