"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mora_jax.errors import InputError


@contextlib.contextmanager
def new_folder(out: str | os.PathLike[str], *, replace: frozenset[str] = frozenset()) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends without an error.

    Args:
        out: must not exist, or be empty, or hold nothing but files in `replace`.
        replace: names of files that an earlier folder of the same kind may hold.

    Raises:
        InputError: when `out` holds something else, or cannot be made.
    """
    target = Path(out).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder that does not exist yet")
    found = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if set(found) - replace:
        raise InputError(f"{target} is not empty ({', '.join(found[:3])}); give a folder that does not exist yet")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror}") from None
    try:
        yield beside
        # Temporary folders, and files by safetensors, are for their owner alone.
        mask = _umask()
        os.chmod(beside, 0o777 & ~mask)
        for path in beside.rglob("*"):
            os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)
        if target.exists():
            old = beside.with_name(beside.name + ".old")
            target.rename(old)
            beside.rename(target)
            shutil.rmtree(old)
        else:
            beside.rename(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _umask() -> int:
    """The process's mask for new files; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
