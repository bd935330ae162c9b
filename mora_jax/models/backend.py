"""The machine that code is traced for, and the dtype to compute in there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax.errors import InputError

NAMES = ("float32", "bfloat16")
_FAST_FLAGS = {"amx_bf16", "avx512_bf16"}


def default_dtype() -> jnp.dtype:
    """bfloat16 where its matrix products are fast: on accelerators, and on CPUs with instructions for it."""
    if backend() != "cpu" or cpu_flags() & _FAST_FLAGS:
        return jnp.dtype("bfloat16")
    return jnp.dtype("float32")


def read_dtype(dtype: Any) -> jnp.dtype:
    """The compute dtype that `dtype` names, None for the default; InputError for anything but `NAMES`."""
    if dtype is None:
        return default_dtype()
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in NAMES:
        raise InputError(f"dtype {name!r} is not supported; give one of {', '.join(NAMES)}")
    return jnp.dtype(name)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The instruction sets of the first processor; empty where the system does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


def backend() -> str:
    """`cpu`, `gpu` or `tpu`: where what is traced now will run."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """What is traced inside is meant for the backend `name`, which this machine may not have."""
    token = _TARGET.set(name)
    try:
        yield
    finally:
        _TARGET.reset(token)
