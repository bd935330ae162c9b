"""What jax will find on this machine, looked at before jax is imported: versions, platforms, TPUs.

Nothing here imports jax.
"""

import functools
import glob
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path

from mora_jax.errors import InputError

#: The oldest versions that this package runs with, those that Colab has, as in pyproject.toml.
FLOORS = {"jax": "0.7.2", "flax": "0.12.0"}
#: From these versions on jax and flax need each other: neither imports beside an older one of the other.
TOGETHER = {"jax": "0.11.1", "flax": "0.12.9"}
# Plugins of jax, which have its version: with one of them the new jax has to be installed as this extra.
_EXTRAS = {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13", "libtpu": "tpu"}
_GPUS = {"cuda", "rocm"}
_INSTALL = {
    "cuda": "pip install 'mora-jax[cuda]', or 'mora-jax[cuda13]' for CUDA 13",
    "tpu": "pip install 'mora-jax[tpu]', on a machine with TPUs",
    "rocm": "pip install -U 'jax[rocm7-local]', on a machine with ROCm 7",
}
# PCI's number of Google, and the classes of its virtual disks and network cards, which machines without TPUs have.
_GOOGLE, _OTHERS = "0x1ae0", ("0x01", "0x02")


#: Whether transformers may import torch where it is installed, which takes seconds; commands have no use for it.
torch_allowed = True


@functools.cache
def check_versions() -> None:
    """Refuses a jax and a flax that this package doesn't run with.

    Raises:
        ImportError: one line that says what was found and what to install.
    """
    versions = {name: _version(name) for name in FLOORS}
    releases = {name: _release(version or "") for name, version in versions.items()}
    wanted = {name: f">={floor}" for name, floor in FLOORS.items() if releases[name] < _release(floor)}
    new = {name for name, bound in TOGETHER.items() if releases[name] >= _release(bound)}
    if len(new) == 1 and not wanted:
        name = next(iter(TOGETHER.keys() - new))
        wanted = {name: f">={TOGETHER[name]}"}
        if sys.version_info < (3, 12):  # for which there is no newer flax
            wanted = {name: f"<{bound}" for name, bound in TOGETHER.items() if name in new}
    if not wanted:
        return
    listed = " and ".join(f"{name} {version}" if version else f"no {name}" for name, version in versions.items())
    extra = next((f"[{extra}]" for plugin, extra in _EXTRAS.items() if _version(plugin)), "")
    packages = " ".join(f"'{name}{extra if name == 'jax' else ''}{bound}'" for name, bound in wanted.items())
    restart = ", then restart the notebook's kernel" if "ipykernel" in sys.modules else ""
    raise ImportError(f"mora_jax doesn't run with {listed}, found here: pip install -U {packages}{restart}")


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """What a command does before jax starts a platform: checks those named, and keeps libtpu out where no TPU is.

    Args:
        environ: the process's environment variables; `JAX_PLATFORMS` is set where that is needed.

    Raises:
        InputError: a platform that can't be had, and how to fix it.
    """
    if "PJRT_NAMES_AND_LIBRARY_PATHS" in environ:  # whoever adds platforms by hand knows what is there
        return
    setting, platforms = environ.get("JAX_PLATFORMS", ""), plugins()
    if setting:
        _check_platforms(setting, platforms)
    elif has_libtpu() and not may_have_tpu() and "JAX_FORCE_TPU_INIT" not in environ and platforms <= _GPUS:
        # jax would try libtpu, here for planning, which prints lines of errors before jax goes on without it.
        environ["JAX_PLATFORMS"] = ",".join([*sorted(platforms), "cpu"])


def explain(error: RuntimeError) -> str | None:
    """The line for a platform that jax could not start; None where the error is about something else."""
    start = re.match(r"Unable to initialize backend '([^']*)'", str(error))
    if start is None:
        return None
    how = _INSTALL.get(start[1])
    return f"{' '.join(str(error).split())}{f'; to have it: {how}' if how else ''}"


def _check_platforms(setting: str, installed: set[str]) -> None:
    """Refuses what jax fails at with a traceback that says less, or after errors of libtpu."""
    names = [name.strip() for name in setting.split(",")]
    for name, present in (("cuda", "cuda" in installed), ("tpu", has_libtpu())):
        if name in names and not present and (name == "tpu" or has_nvidia_gpu() or names == ["cuda"]):
            raise InputError(f"JAX_PLATFORMS={setting}: jax's plugin for {name} is not installed: {_INSTALL[name]}")
    if names == ["cuda"] and not has_nvidia_gpu():  # beside another platform jax passes over it
        raise InputError(f"JAX_PLATFORMS={setting}: no NVIDIA GPU is visible here; set it to cpu or leave it out")
    if "tpu" in names and not may_have_tpu():
        raise InputError(f"JAX_PLATFORMS={setting}: no TPU is visible here; set it to cpu or leave it out")
    if "gpu" in names:  # jax takes it for all kinds of GPUs at once, and fails where one's plugin is absent
        raise InputError(f"JAX_PLATFORMS={setting}: name the GPU's platform, cuda or rocm")


def plugins() -> set[str]:
    """The platforms of jax's plugins that are installed, by the plugins' names; libtpu is none of them."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    spec = importlib.util.find_spec("jax_plugins")
    if spec is not None:
        names |= {module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)}
    return {next((gpu for gpu in _GPUS if gpu in name), name) for name in names}


def has_libtpu() -> bool:
    """Whether the TPU's runtime and compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None or os.path.isfile(os.environ.get("TPU_LIBRARY_PATH", ""))


def may_have_tpu() -> bool:
    """Whether a TPU may be attached: a device file, or a PCI device of Google's that is no network card and no disk."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            if vendor.read_text().strip() == _GOOGLE and vendor.with_name("class").read_text()[:4] not in _OTHERS:
                return True
        except OSError:
            return True
    return False


def has_nvidia_gpu() -> bool:
    """Whether jax would look for an NVIDIA GPU here."""
    return any(os.path.exists(f"/dev/{name}") for name in ("nvidia0", "nvidiactl", "dxg"))


def _version(name: str) -> str | None:
    """The version of a package: of the loaded one, which an installation in a running notebook leaves as it was."""
    loaded = getattr(sys.modules.get(name), "__version__", None)
    try:
        return loaded or importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with."""
    match = re.search(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
