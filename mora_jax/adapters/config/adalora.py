"""AdaLoRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from mora_jax.adapters.config.common import CommonConfig, Targets, check_bias


@dataclass(frozen=True)
class AdaLoRAConfig(CommonConfig):
    """AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): a budget of singular values goes to where they matter.

    Attributes:
        rank: inner size of every update at the start.
        alpha: numerator of the scaling alpha / rank.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        target_rank: mean rank that is left at the end.
        tinit: steps at the start with the whole budget.
        tfinal: steps at the end with the final one; with `tinit` fewer than `total_steps`, so that ranks have time to
            fall.
        total_steps: of the training run.
        delta_t: steps between two allocations.
        beta1: smoothing of importances.
        beta2: smoothing of their uncertainty.
        orth_weight: factor on the orthogonality penalty in the loss.
        bias: which existing biases are trained too, as in `LoRAConfig`.
    """

    rank: int = 12
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    target_rank: int = field(default=8, kw_only=True)
    tinit: int = field(default=0, kw_only=True)
    tfinal: int = field(default=0, kw_only=True)
    total_steps: int = field(default=1000, kw_only=True)
    delta_t: int = field(default=1, kw_only=True)
    beta1: float = field(default=0.85, kw_only=True)
    beta2: float = field(default=0.85, kw_only=True)
    orth_weight: float = field(default=0.5, kw_only=True)
    bias: str = field(default="none", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank is {self.target_rank}, more than rank {self.rank}")
        check_bias(self.bias)
        if self.tinit + self.tfinal >= self.total_steps:
            plateaus = self.tinit + self.tfinal
            raise ValueError(
                f"tinit + tfinal is {plateaus}, which must be less than total_steps {self.total_steps}, so that ranks "
                "have time to fall"
            )
