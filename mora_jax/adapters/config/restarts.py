"""ReLoRA and ReMoRA, which are merged and reinitialised during training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mora_jax.adapters.config.lora import LoRAConfig
from mora_jax.adapters.config.mora import SHARED, MoRAConfig


@dataclass(frozen=True)
class ReLoRAConfig(LoRAConfig):
    """ReLoRA (Lialin et al., 2023, arXiv 2307.05695): LoRA, merged into the base and reinitialised repeatedly.

    The sum of low-rank updates has a higher rank than each. The attributes are those of `LoRAConfig`, and:

    Attributes:
        restart_every: steps between restarts.
        prune: share of the optimizer's moments that a restart sets to zero, the smallest in magnitude of each matrix.
        restart_warmup: steps over which the learning rate rises again after a restart.
    """

    restart_every: int = field(default=1000, kw_only=True)
    prune: float = field(default=0.99, kw_only=True)
    restart_warmup: int = field(default=50, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.init != "kaiming":
            raise ValueError(f"ReLoRA draws its factors anew at each restart, as init='kaiming', not {self.init!r}")
        _check_restarts(self)


@dataclass(frozen=True)
class ReMoRAConfig(MoRAConfig):
    """ReMoRA (Jiang et al., 2024, arXiv 2405.12130, section 5.3): MoRA, merged and reinitialised as another kind.

    One kind can only reach updates that its groups allow; the next kind groups differently. The attributes are those of
    `MoRAConfig`, with `kinds` in place of `kind`, and:

    Attributes:
        kinds: the kinds in turn, the first again after the last: of those that share one M among groups
            (`mora_jax.adapters.methods.mora.SHARED`), which have the same side q.
        restart_every: as in `ReLoRAConfig`.
        prune: as in `ReLoRAConfig`; the authors reset all of the moments.
        restart_warmup: as in `ReLoRAConfig`.
    """

    kind: ClassVar[str] = "sharing"  # type: ignore[misc]  # for sizes and reports alone: all kinds agree in them
    kinds: tuple[str, ...] = field(default=("sharing", "grouped", "grouped_tile", "strided_interleave"), kw_only=True)
    restart_every: int = field(default=1000, kw_only=True)
    prune: float = field(default=1.0, kw_only=True)
    restart_warmup: int = field(default=50, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _check_restarts(self)
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        if not kinds or any(kind not in SHARED for kind in kinds):
            raise ValueError(f"kinds must be some of {', '.join(SHARED)}, not {self.kinds!r}")
        object.__setattr__(self, "kinds", kinds)


def _check_restarts(config: ReLoRAConfig | ReMoRAConfig) -> None:
    every, warmup = config.restart_every, config.restart_warmup
    if warmup > every:
        raise ValueError(f"restart_warmup must be an integer from 0 to restart_every={every}, not {warmup!r}")
