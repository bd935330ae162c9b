"""Which numbers a setting takes: one rule for configurations made in Python and for keys of the command line."""

import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any

_ORDERS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A range of numbers.

    Attributes:
        at_least: smallest value allowed.
        at_most: largest value allowed.
        above: values must be greater than this.
        below: values must be less than this.
    """

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """Those that are set, by name."""
        return {name: bound for name in _ORDERS if (bound := getattr(self, name)) is not None}

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        return all(_ORDERS[name](value, bound) for name, bound in self.bounds.items())

    def words(self) -> str:
        """The range in words, such as `at least 0 and below 1`; empty where it has no end."""
        return " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in self.bounds.items())


def number(value: Any, *, whole: bool) -> int | float | None:
    """`value` as a plain integer or finite float; None where it is none, as booleans and texts aren't."""
    if isinstance(value, bool):
        return None
    if whole:
        return int(value) if isinstance(value, numbers.Integral) else None
    return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Number(Limits):
    """A range of integers (`whole`) or of finite numbers."""

    whole: bool = False

    def check(self, value: Any, name: str) -> Any:
        """`value` as a plain int or float; numpy's scalars are taken too.

        Raises:
            ValueError: it is no such number.
        """
        if not self.takes(value):
            shown = repr(value)
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise ValueError(f"{name} must be {self.describe()}, not {shown}")
        return number(value, whole=self.whole)

    def takes(self, value: Any) -> bool:
        """Whether `value` is such a number."""
        value = number(value, whole=self.whole)
        return value is not None and self.holds(value)

    def describe(self) -> str:
        """What is allowed, in words."""
        kind = "integer" if self.whole else "number"
        if self.bounds == ({"at_least": 1} if self.whole else {"above": 0}):
            return f"a positive {kind}"
        return ", ".join(part for part in ("an integer" if self.whole else "a finite number", self.words()) if part)


POSITIVE = Number(whole=True, at_least=1)
COUNT = Number(whole=True, at_least=0)
# Of the settings that many methods have. A negative alpha would only turn the sign of the factor that starts at zero,
# and has no root for PiSSA to take; with 0 nothing is trained.
NUMBERS = {"rank": POSITIVE, "alpha": Number(above=0), "dropout": Number(at_least=0, below=1)}


def positive(**sizes: int) -> None:
    """Raises `ValueError` with the name and the number of the first size that is no positive integer."""
    for name, size in sizes.items():
        POSITIVE.check(size, name)
