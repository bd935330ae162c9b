"""VeRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from mora_jax.adapters.config.common import CommonConfig, Targets, check_rank


@dataclass(frozen=True)
class VeRAConfig(CommonConfig):
    """VeRA (Kopiczko et al., 2023, arXiv 2310.11454): two trained vectors around random factors that layers share.

    Attributes:
        rank: inner size of the frozen factors; far higher than LoRA's.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers, see the module's docstring.
        d_initial: what the inner vector starts from.
        projection_prng_key: seed of the frozen factors.
    """

    rank: int = 256
    dropout: float = 0.0
    targets: Targets = "all-linear"
    d_initial: float = field(default=0.1, kw_only=True)
    projection_prng_key: int = field(default=0, kw_only=True)

    def __post_init__(self):
        check_rank(self.rank)
        super().__post_init__()
