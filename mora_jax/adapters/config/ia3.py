"""(IA)³."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mora_jax.adapters.config.common import CommonConfig, Targets


@dataclass(frozen=True)
class IA3Config(CommonConfig):
    """(IA)³ (Liu et al., 2022, arXiv 2205.05638): learned vectors rescale keys, values and feed-forward inputs.

    Attributes:
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        feedforward: names of those layers whose inputs are scaled; outputs are scaled of the others.
    """

    targets: Targets = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = field(default=("down_proj",), kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        given = self.feedforward
        names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (None,)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"feedforward must be layer names, not {given!r}")
        object.__setattr__(self, "feedforward", names)

    def at_path(self, path: str) -> IA3Config:
        found = any(path == name or path.endswith("." + name) for name in self.feedforward)
        return replace(self, feedforward=self.feedforward if found else ())
