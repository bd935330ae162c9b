"""What libtpu says of a program that doesn't fit a chip's memory."""

from __future__ import annotations

import re
from typing import Any

_SIZE = r"([\d.]+)([KMGT]?)"
_WORDS = (  # of newer and of older versions
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_shortage(message: str) -> dict[str, Any]:
    """`total`, the bytes that it needs, and `limit`, what a program can have; else the message's first line."""
    found = next(filter(None, (words.search(message) for words in _WORDS)), None)
    if found is None:
        return {"message": message.splitlines()[0][:300]}
    total, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
    return {"total": total, "limit": limit}
