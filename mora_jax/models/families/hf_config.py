"""Reading values out of a HuggingFace `config.json`, with one clear line for each bad one."""

import reprlib
import sys
from typing import Any

from mora_jax.errors import InputError

_MISSING = object()
#: The largest whole number: that of int32, in which sizes and ids are kept.
_LARGEST = 2**31 - 1
#: The most layers; a description has some fields of every layer, before any tensor is looked at.
_MOST_LAYERS = 10_000


class Fields:
    """A `config.json` as checked values by name. A null counts as absent, except in `nullable_…`."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        """Takes the parsed JSON object; `where` begins every error message."""
        self.values = values
        self.where = where

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise InputError(f"{self.where}: {name} is missing")
        return default

    def bad(self, name: str, wanted: str) -> InputError:
        """The error for a value that is not what it should be."""
        return InputError(f"{self.where}: {name} must be {wanted}, found {reprlib.repr(self.values.get(name))}")

    def integer(self, name: str, default: Any = _MISSING) -> int:
        """A positive whole number."""
        return self._at_least(1, name, default, "a positive whole number")

    def whole(self, name: str, default: Any = _MISSING) -> int:
        """A whole number, 0 or more."""
        return self._at_least(0, name, default, "a whole number, 0 or more")

    def _at_least(self, least: int, name: str, default: Any, wanted: str) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.bad(name, wanted)
        return self._bounded(name, value, _LARGEST)

    def layers(self) -> int:
        """The number of layers."""
        return self._bounded("num_hidden_layers", self.integer("num_hidden_layers"), _MOST_LAYERS)

    def _bounded(self, name: str, value: int, largest: int) -> int:
        if value > largest:
            raise self.bad(name, f"at most {largest}")
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A positive number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise self.bad(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def text(self, name: str, default: Any = _MISSING) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.bad(name, "a string")
        return value

    def table(self, name: str) -> "Fields | None":
        """A JSON object, or None when there is none."""
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def nullable_integer(self, name: str, default: int | None) -> int | None:
        """A positive whole number, None where the file says null, `default` where it says nothing."""
        if name in self.values and self.values[name] is None:
            return None
        return None if default is None and name not in self.values else self.integer(name, default)

    def nullable_number(self, name: str, default: float | None) -> float | None:
        """A positive number, None where the file says null, `default` where it says nothing."""
        if name in self.values and self.values[name] is None:
            return None
        return None if default is None and name not in self.values else self.number(name, default)
