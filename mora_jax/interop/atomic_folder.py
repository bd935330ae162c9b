"""Folders that appear whole or not at all."""

import contextlib
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from mora_jax.errors import InputError
from mora_jax.paths import local_path

_PREFIX = ".mora-jax-"
# What an empty disk holds.
_NOTHING = "lost+found"


@contextlib.contextmanager
def new_folder(out: str | os.PathLike[str], *, ours: Collection[str] = (), overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, whose content becomes that of `out` when the block ends without an error.

    A folder that isn't there yet appears as a whole. One that is there, perhaps through a link or as the place where a
    disk is mounted, gets the files one after the other, all of them written before.

    Args:
        out: must not exist, or be empty.
        ours: names, or patterns of names, that a folder of this kind holds.
        overwrite: let `out` hold something: what is named in `ours` is replaced, other files stay.

    Raises:
        InputError: when `out` holds something, or cannot be made or written.
    """
    target = check_out(out, overwrite=overwrite)
    inside = target.is_dir()
    try:
        parent = target if inside else target.parent
        parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror}") from None
    try:
        yield staged
        _open_to_others(staged)
        if inside:
            _move_into(staged, target, ours)
        else:
            staged.rename(target)
    except OSError as error:
        where = "" if error.filename is None or str(error.filename).startswith(str(staged)) else f"{error.filename}: "
        raise InputError(f"{target} cannot be written: {where}{error.strerror or error}") from None
    except Exception as error:
        # The tokenizers library has no class for what the disk says.
        reason, found, _ = str(error).partition(" (os error ")
        if type(error) is not Exception or not found:
            raise
        raise InputError(f"{target} cannot be written: {reason}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_out(out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Refuses a path that can't become a new folder; returns where it leads, links followed.

    Raises:
        InputError: it is a file, or holds something that is not to be overwritten.
    """
    given = local_path(out)
    target = Path(os.path.realpath(given)) if given.is_symlink() else given
    if target.exists() and not target.is_dir():
        raise InputError(f"{given} is a file; give a folder that does not exist yet")
    try:
        found = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    except OSError as error:
        raise InputError(f"{given} cannot be read: {error.strerror}") from None
    found = [name for name in found if name != _NOTHING and not name.startswith(_PREFIX)]
    if found and not overwrite:
        raise InputError(
            f"{given} is not empty ({', '.join(found[:3])}); give another folder, or replace what is there with "
            "overwrite=True (--overwrite on the command line)"
        )
    return target


def _open_to_others(folder: Path) -> None:
    """Gives the usual modes: temporary folders, and files by safetensors, are for their owner alone."""
    mask = _umask()
    os.chmod(folder, 0o777 & ~mask)
    for path in folder.rglob("*"):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    """The process's mask for new files; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _move_into(staged: Path, target: Path, ours: Collection[str]) -> None:
    """Puts what is in one folder into another, in place of what a folder of the same kind left there.

    The configuration goes first and comes last: without it nobody takes for whole what a kill leaves in between.
    """
    new = sorted(path.name for path in staged.iterdir())
    old = [path.name for path in target.iterdir()]
    replaced = [name for name in old if name in new or any(fnmatch.fnmatchcase(name, one) for one in ours)]
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=target) as aside:
        for name in sorted(replaced, key=_is_config, reverse=True):
            (target / name).rename(Path(aside) / name)
        for name in sorted(new, key=_is_config):
            (staged / name).rename(target / name)


def _is_config(name: str) -> bool:
    return name.endswith("config.json")
