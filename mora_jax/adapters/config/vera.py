"""VeRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from mora_jax.adapters.config.common import CommonConfig, Targets, check_bias
from mora_jax.adapters.config.limits import POSITIVE


@dataclass(frozen=True)
class VeRAConfig(CommonConfig):
    """VeRA (Kopiczko et al., 2023, arXiv 2310.11454): two trained vectors around random factors that layers share.

    Attributes:
        rank: inner size of the frozen factors; far higher than LoRA's.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
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
        super().__post_init__()
        check_bias(self.bias)
        if self.widths is not None:
            if not isinstance(self.widths, tuple | list) or len(self.widths) != 2:
                raise ValueError(f"widths must be a number of inputs and one of outputs, not {self.widths!r}")
            inputs, outputs = (POSITIVE.check(width, f"widths[{i}]") for i, width in enumerate(self.widths))
            object.__setattr__(self, "widths", (inputs, outputs))
