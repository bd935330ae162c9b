"""VeRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from mora_jax.adapters.config.common import CommonConfig, Targets, check_bias, check_rank


@dataclass(frozen=True)
class VeRAConfig(CommonConfig):
    """VeRA (Kopiczko et al., 2023, arXiv 2310.11454): two trained vectors around random factors that layers share.

    Attributes:
        rank: inner size of the frozen factors; far higher than LoRA's.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers, see the module's docstring.
        d_initial: what the inner vector starts from.
        projection_prng_key: seed of the frozen factors, which are PEFT's for the same seed, rank and widths.
        widths: inputs and outputs of the frozen factors, of which every layer takes its first ones; None for those of
            the largest layers that `attach` adapts.
        bias: which existing biases are trained too, as in `LoRAConfig`.
    """

    rank: int = 256
    dropout: float = 0.0
    targets: Targets = "all-linear"
    d_initial: float = field(default=0.1, kw_only=True)
    projection_prng_key: int = field(default=0, kw_only=True)
    widths: tuple[int, int] | None = field(default=None, kw_only=True)
    bias: str = field(default="none", kw_only=True)

    def __post_init__(self):
        check_rank(self.rank)
        super().__post_init__()
        check_bias(self.bias)
        key = self.projection_prng_key
        if type(key) is not int or key < 0:
            raise ValueError(f"projection_prng_key must be an integer of at least 0, not {key!r}")
        if self.widths is not None:
            inputs, outputs = self.widths
            check_rank(inputs, "widths[0]")
            check_rank(outputs, "widths[1]")
            object.__setattr__(self, "widths", (inputs, outputs))
