"""MoRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from mora_jax.adapters.config.common import CommonConfig, Pattern, Targets

KINDS = ("sharing", "rotation", "grouped", "grouped_tile", "strided_interleave", "decouple", "truncation")
SHARED = ("sharing", "grouped", "grouped_tile", "strided_interleave")  # kinds with one M for groups of both sides


def check_kind(kind: str) -> None:
    """Raises `ValueError` unless `kind` is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")


@dataclass(frozen=True)
class MoRAConfig(CommonConfig):
    """MoRA (Jiang et al., 2024, arXiv 2405.12130): a square matrix between fixed compression and decompression.

    MoRA has no alpha and no factor that depends on the rank, so there is no rank-stabilised form of it.

    Attributes:
        rank: the LoRA rank whose parameter count the square matrix takes; its side follows from `square_rank`.
        kind: how inputs are compressed and outputs restored, one of `KINDS`.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        rank_pattern: as in `LoRAConfig`, but layers of one stack have one rank: it fixes the square's side.
        use_dora: as in `LoRAConfig`.
    """

    rank: int = 8
    kind: str = "sharing"
    dropout: float = 0.0
    targets: Targets = "all-linear"
    rank_pattern: Pattern = field(default=(), kw_only=True)
    use_dora: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.kind)
