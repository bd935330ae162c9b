"""Keeps what orbax and clients of buckets say to themselves away from a run's stderr."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """They report every file and every error a second time; a run's stderr is for the run."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "gcsfs", "root")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except BaseException:
        # Coroutines that were left behind complain when they are collected.
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
