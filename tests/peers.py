"""torch and peft, imported at their first use: only the tests marked `peers` need them."""

import importlib
from typing import Any


class _Later:
    """Stands for a package."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what tools ask of every name in a module
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)


torch, peft = _Later("torch"), _Later("peft")
