"""The kind of machine that code is traced for: that of this process, unless it is compiled here for another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

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
