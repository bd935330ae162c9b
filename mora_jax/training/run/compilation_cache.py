"""What XLA compiles, kept on disk, so that the next start of a run, or its resumption, need not compile it again."""

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from mora_jax.backend import cpu_flags
from mora_jax.paths import OFF, cache_folder, is_local, local_path, writable

#: Bytes beyond which the programs that were not used for the longest time go.
LARGEST = 4 << 30
_SETTINGS = {
    # A limit makes jax lock the folder, too: without one, a process may read what another has half written.
    "jax_compilation_cache_max_size": LARGEST,
    # A run compiles a step and some dozens of small programs, which together take seconds as well.
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}


@contextlib.contextmanager
def persistent_compilation_cache(folder: str | None) -> Iterator[None]:
    """Compiled programs are kept while the context lasts; afterwards jax's settings are what they were.

    Nothing happens where jax has a folder already, by `JAX_COMPILATION_CACHE_DIR` or `jax.config`, where the folder
    can't be written, or where jax's cache is turned off.

    Args:
        folder: where to; None: in the user's cache folder; `off`: nowhere.
    """
    directory = None if folder == OFF or _has_one() else _folder(folder)
    if directory is None:
        yield
        return
    before = {name: _read(name) for name in ("jax_compilation_cache_dir", *_SETTINGS)}
    _use({"jax_compilation_cache_dir": directory, **_SETTINGS})
    try:
        yield
    finally:
        _use(before)


def _has_one() -> bool:
    return _read("jax_compilation_cache_dir") is not None or not _read("jax_enable_compilation_cache")


def _read(name: str) -> Any:
    return getattr(jax.config, name)


def _use(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # jax looks at its folder once; what it has compiled stays in memory


def _folder(given: str | None) -> str | None:
    """The folder, ready for use; None where it can't be written."""
    if given is not None and not is_local(given):
        return given
    # Programs for a CPU use what it has; a home folder may be shared by machines that differ in it.
    machine = hashlib.sha256(" ".join([platform.machine(), *sorted(cpu_flags())]).encode()).hexdigest()[:8]
    folder = cache_folder() / "programs" / machine if given is None else local_path(given)
    if not writable(folder):
        return None
    _mend(folder)
    return str(folder)


def _mend(folder: Path) -> None:
    """Removes programs that a process left half written: jax notes the time of use of whole ones beside them."""
    with contextlib.suppress(Timeout, OSError), FileLock(folder / ".lockfile", timeout=1):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()
