"""Folders that appear whole or not at all."""

import contextlib
import fnmatch
import glob
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from mora_jax.errors import InputError
from mora_jax.paths import local_path

_PREFIX = ".mora-jax-"
# A folder of what is being replaced; a file in it lists the names that come in addition.
_OLD, _ADDED = f"{_PREFIX}old-", f"{_PREFIX}added"
# What an empty disk holds.
_NOTHING = "lost+found"


@contextlib.contextmanager
def new_folder(out: str | os.PathLike[str], *, ours: Collection[str] = (), overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, whose content becomes that of `out` when the block ends without an error.

    A folder that isn't there yet appears as a whole. One that is there, perhaps through a link or as the place where a
    disk is mounted, gets the files one after the other, all of them written before. What stops that in between, a
    signal or a full disk, leaves it as it was; after a kill `repair` does so.

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
        prefix = f"{_PREFIX}{target.name[:100]}-"
        repair(parent, prefix)
        staged = Path(tempfile.mkdtemp(prefix=prefix, dir=os.path.realpath(parent)))
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror}") from None
    try:
        with _held(staged):
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
        reason, separator, _ = str(error).partition(" (os error ")
        if type(error) is not Exception or not separator:
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
    repair(target)
    try:
        names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    except OSError as error:
        raise InputError(f"{given} cannot be read: {error.strerror}") from None
    names = [name for name in names if name != _NOTHING and not name.startswith(_PREFIX)]
    if names and not overwrite:
        raise InputError(
            f"{given} is not empty ({', '.join(names[:3])}); give another folder, or replace what is there with "
            "overwrite=True (--overwrite on the command line)"
        )
    return target


def _open_to_others(folder: Path) -> None:
    """Gives the usual modes: temporary folders, and files by safetensors, are for their owner alone."""
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    os.chmod(folder, 0o777 & ~mask)
    for path in folder.rglob("*"):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)


def repair(folder: Path, prefix: str = _PREFIX) -> None:
    """Undoes what a process that was killed in `new_folder` left half done in `folder`: what it held comes back.

    Args:
        folder: the target, or what is around one that is new.
        prefix: of the names of what may be left.
    """
    for left in folder.glob(f"{glob.escape(prefix)}*"):
        # Where it can't be undone, on a disk that may only be read, readers say what is missing.
        with contextlib.suppress(OSError), _held(left) as dead:
            if dead:
                _put_back(left, folder)
                shutil.rmtree(left)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Holds a folder for as long as this process lives; false where another one does, or where there are no locks."""
    if fcntl is None:
        yield False
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        yield alone
    finally:
        os.close(opened)


def _move_into(staged: Path, target: Path, ours: Collection[str]) -> None:
    """Puts what is in one folder into another, in place of what a folder of the same kind left there.

    The configuration goes first and comes last: without it nobody takes for whole what a kill leaves in between.
    """
    new = sorted(path.name for path in staged.iterdir())
    old = [path.name for path in target.iterdir()]
    replaced = [name for name in old if name in new or any(fnmatch.fnmatchcase(name, one) for one in ours)]
    aside = Path(tempfile.mkdtemp(prefix=_OLD, dir=os.path.realpath(target)))
    with _held(aside):
        try:
            (aside / _ADDED).write_text("\n".join(set(new) - set(old)), encoding="utf-8")
            for name in sorted(replaced, key=_is_config, reverse=True):
                (target / name).rename(aside / name)
            for name in sorted(new, key=_is_config):
                (staged / name).rename(target / name)
            (aside / _ADDED).unlink()  # from here on it is done
        except BaseException:  # a signal's, too
            _put_back(aside, target)
            shutil.rmtree(aside)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside: Path, target: Path) -> None:
    """Makes a folder again what it was before `_move_into`, unless that was done."""
    if not (aside / _ADDED).exists():
        return
    for name in (aside / _ADDED).read_text(encoding="utf-8").splitlines():
        _remove(target / name)
    for path in sorted(aside.iterdir(), key=lambda path: _is_config(path.name)):
        if path.name != _ADDED:
            _remove(target / path.name)
            path.rename(target / path.name)
    (aside / _ADDED).unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_config(name: str) -> bool:
    return name.endswith("config.json")
