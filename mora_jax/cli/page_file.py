"""The file that a command writes a web page into."""

from pathlib import Path

from mora_jax.errors import InputError
from mora_jax.paths import local_path


def page_file(given: str) -> Path:
    """Where the page is written; refuses what can't be, before the work begins.

    Raises:
        InputError: it is a folder, or a file that is no web page, or its folder isn't there.
    """
    path = local_path(given)
    if path.is_dir():
        raise InputError(f"--html {path}: is a folder; name a file")
    if path.exists() and not path.read_bytes()[:100].lstrip().lower().startswith(b"<!doctype html"):
        raise InputError(f"--html {path}: is no web page, and would be lost; name another file")
    if not path.parent.is_dir():
        raise InputError(f"--html {path}: there is no folder {path.parent}; make it first")
    return path
