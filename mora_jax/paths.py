"""Paths as people give them: relative to where the program was started, or below a home folder, as `~/models`."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mora_jax.errors import InputError

#: In place of a folder of a cache: keep nothing.
OFF = "off"


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of this machine's, not of a bucket."""
    return "://" not in os.fspath(path)


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with its `~` replaced, relative where it was.

    Raises:
        InputError: `~name` names nobody.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no such home folder; write the path out") from None


def local_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path. Links and `..` stay in it, since where they lead may change.

    Raises:
        InputError: `~name` names nobody, or the working directory is gone.
    """
    try:
        return expanded(path).absolute()
    except FileNotFoundError:
        raise InputError(f"{path}: the working directory is gone; change to another one") from None


def cache_folder() -> Path:
    """What runs keep for later ones: `$MORA_JAX_CACHE`, else `mora_jax` in the user's cache folder."""
    given = os.environ.get("MORA_JAX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return local_path(given or os.path.join(base, "mora_jax"))


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def glob_pattern(text: str) -> str:
    """A glob as an absolute one. Brackets in the names of the home and the working directory are no pattern."""
    first, *rest = Path(text).parts
    if not first.startswith("~"):
        first, rest = ".", list(Path(text).parts)
    return str(Path(glob.escape(str(local_path(first)))).joinpath(*rest))


def found_path(text: str) -> str:
    """A text that may name files or a folder here, absolute if it does; else as it is, such as a hub id."""
    if not is_local(text):
        return text
    if local_path(text).exists():
        return str(local_path(text))
    return glob_pattern(text) if glob.has_magic(text) else text


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file to write beside `target`, whose place it takes when the block ends without an error or a signal."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield beside
        beside.replace(target)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends without an error: nobody meets half of it.

    Raises:
        InputError: it can't be written.
    """
    try:
        with replacing(Path(os.path.realpath(local_path(path)))) as beside:
            yield beside
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
