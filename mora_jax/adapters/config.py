"""What to adapt and how: one frozen dataclass a method.

`targets` is the same for every method: a sequence of layer names (`("q_proj", "v_proj")`; a name matches the last
components of a module path), one regular expression that must match the whole path (`r".*attn.*"`), or `"all-linear"`
(every linear layer but the output head).
"""

from __future__ import annotations

from dataclasses import dataclass

Targets = str | tuple[str, ...]


def _freeze_targets(targets) -> Targets:
    if isinstance(targets, str):
        if not targets:
            raise ValueError("targets is empty; give layer names, a regular expression or 'all-linear'")
        return targets
    names = tuple(targets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"targets must be layer names, a regular expression or 'all-linear', not {targets!r}")
    return names


def _check(config) -> None:
    if isinstance(config.rank, bool) or not isinstance(config.rank, int) or config.rank < 1:
        raise ValueError(f"rank must be a positive integer, not {config.rank!r}")
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), not {config.dropout!r}")
    object.__setattr__(config, "targets", _freeze_targets(config.targets))


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA (Hu et al., 2021, arXiv 2106.09685): a product of two thin factors, scaled by alpha / rank.

    Attributes:
        rank: inner size of the update.
        alpha: numerator of the scaling alpha / rank.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers, see the module's docstring.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "all-linear"

    def __post_init__(self):
        _check(self)


@dataclass(frozen=True)
class MoRAConfig:
    """MoRA (Jiang et al., 2024, arXiv 2405.12130): a square matrix between fixed compression and decompression.

    Attributes:
        rank: the LoRA rank whose parameter count the square matrix takes; its side follows from `square_rank`.
        kind: how inputs are compressed and outputs restored, one of `mora_jax.adapters.mora.KINDS`.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers, see the module's docstring.
    """

    rank: int = 8
    kind: str = "sharing"
    dropout: float = 0.0
    targets: Targets = "all-linear"

    def __post_init__(self):
        from mora_jax.adapters.mora import check_kind

        _check(self)
        check_kind(self.kind)


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: every parameter of the model is trained as a float32 master."""


AdapterConfig = LoRAConfig | MoRAConfig | FullConfig
