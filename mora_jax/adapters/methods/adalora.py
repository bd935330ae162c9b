"""AdaLoRA: `y = x W + s · ((x P) ⊙ λ) Q + b`, ranks by budget (Zhang et al., 2023, arXiv 2303.10512).

P and Q stand for singular vectors, λ for singular values; λ starts at zero, so a fresh adapter changes nothing. Two
things belong to training, as pure functions of flat dictionaries (dotted name → array) such as a training step has
(`mora_jax.training.adalora` puts them there):

- `orthogonality` (the paper's "SVD-based adaptation"), to be added to the loss times `config.orth_weight`;
- `allocate` (its "Importance-aware rank allocation"), to be called after each update with its gradients: it keeps
  smoothed importances, and zeroes the λ of the least important triplets (column of P, λ, row of Q) over all matrices,
  as many as the budget of the step leaves out. Shapes stay as they are, so a step that contains it is compiled once.

Between two allocations λ that were zeroed are trained on, and may win their place back; when the budget has reached its
end they stay zero. Steps, masks and the end are those of PEFT's `RankAllocator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mora_jax.adapters.base import Adapter, AdapterParam, Params, host
from mora_jax.adapters.config.common import BIASES, CommonConfig, Targets
from mora_jax.adapters.config.limits import COUNT, POSITIVE, Number
from mora_jax.adapters.methods.lora import delta_weight, thin_products
from mora_jax.adapters.products.matmul import Dot, dot

Arrays = dict[str, Array]
Masks = Mapping[str, np.ndarray]

_FACTORS = ("lora_a", "lora_e", "lora_b")


_TRAINING = {"training": True}
_SHARE = Number(above=0, below=1)


@dataclass(frozen=True)
class AdaLoRAConfig(CommonConfig):
    """AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): a budget of singular values goes to where they matter.

    `ΔW = s · (P ⊙ λ) Q`; the λ of the least important columns become zero.

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

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.AdaLoRAConfig(rank=3, target_rank=2), rngs=1).trainable  # P [6, 3], λ [3], Q [3, 4]
        33
    """

    rank: int = 12
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    target_rank: int = field(
        default=8, kw_only=True, metadata=_TRAINING | {"limits": POSITIVE, "unset": "two thirds of rank"}
    )
    tinit: int = field(default=0, kw_only=True, metadata=_TRAINING | {"limits": COUNT})
    tfinal: int = field(default=0, kw_only=True, metadata=_TRAINING | {"limits": COUNT})
    total_steps: int = field(default=1000, kw_only=True, metadata={"by_run": True, "limits": POSITIVE})
    delta_t: int = field(default=1, kw_only=True, metadata=_TRAINING | {"limits": POSITIVE})
    beta1: float = field(default=0.85, kw_only=True, metadata=_TRAINING | {"limits": _SHARE})
    beta2: float = field(default=0.85, kw_only=True, metadata=_TRAINING | {"limits": _SHARE})
    orth_weight: float = field(default=0.5, kw_only=True, metadata=_TRAINING | {"limits": Number(at_least=0)})
    bias: str = field(default="none", kw_only=True, metadata={"choices": BIASES})
    derived_fields = ("total_steps",)
    tree_refusal = "AdaLoRA takes ranks away while it trains, for which a plain tree of parameters has no place"

    def __post_init__(self):
        super().__post_init__()
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank is {self.target_rank}, more than rank {self.rank}")
        if self.tinit + self.tfinal >= self.total_steps:
            plateaus = self.tinit + self.tfinal
            raise ValueError(
                f"tinit + tfinal is {plateaus}, which must be less than total_steps {self.total_steps}, so that ranks "
                "have time to fall"
            )

    @classmethod
    def for_run(cls, settings: Mapping[str, Any], steps: int | None) -> AdaLoRAConfig:
        values = dict(settings)
        values["total_steps"] = values.get("tinit", 0) + values.get("tfinal", 0) + 1 if steps is None else steps
        if "rank" in values:
            values.setdefault("target_rank", max(1, 2 * values["rank"] // 3))
        return cls(**values)

    def highest_rank(self, in_features: int, out_features: int) -> int:
        return min(in_features, out_features)

    @property
    def details(self) -> tuple[str, ...]:
        return (f"mean rank {self.target_rank} at the end",)


class AdaLoRA(Adapter):
    """`lora_a [*layers, in, rank]` (P), `lora_e [*layers, rank]` (λ) and `lora_b [*layers, rank, out]` (Q)."""

    method: ClassVar[str] = "adalora"
    by_products: ClassVar[bool] = True
    vectors: ClassVar[frozenset[str]] = Adapter.vectors | {"lora_e"}

    def __init__(self, in_features: int, out_features: int, config: AdaLoRAConfig, *, rngs: nnx.Rngs, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        rank = config.rank
        lora_a = 0.02 * jax.random.normal(rngs.params(), (*self.layers, in_features, rank), jnp.float32)
        lora_b = 0.02 * jax.random.normal(rngs.params(), (*self.layers, rank, out_features), jnp.float32)
        self.lora_a = AdapterParam(lora_a, axes=self.stacked(self.axes[0], "rank"))
        self.lora_e = self.filled(0.0, (rank,), "rank")
        self.lora_b = AdapterParam(lora_b, axes=self.stacked("rank", self.axes[1]))

    @classmethod
    def scale(cls, config: AdaLoRAConfig) -> float:
        return config.alpha / (config.rank + 1e-5)  # as in PEFT

    @classmethod
    def delta(cls, config: AdaLoRAConfig, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        return thin_products(x, params["lora_a"], params["lora_b"], params["lora_e"] * params["scaling"], product)

    @classmethod
    def dense(cls, config: AdaLoRAConfig, in_features: int, out_features: int, params: Params) -> Array:
        return delta_weight(params["lora_a"] * (params["lora_e"] * params["scaling"]), params["lora_b"])

    @classmethod
    def low_rank(
        cls, config: AdaLoRAConfig, in_features: int, out_features: int, params: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Without triplets that were pruned."""
        used = params["lora_e"] != 0
        used[0] |= not used.any()
        return (params["lora_a"] * params["lora_e"])[:, used], params["lora_b"][used]


class Importance(NamedTuple):
    """What allocation remembers, by name of the factors.

    Attributes:
        sensitivity: smoothed |weight · gradient|.
        uncertainty: smoothed deviation of that from its smoothed value.
        kept: for each λ 1 where it is in use, else 0; by name of the λ.
    """

    sensitivity: Arrays
    uncertainty: Arrays
    kept: Arrays


def triplets(adapters: Arrays) -> tuple[str, ...]:
    """The prefixes of AdaLoRA's adapters among named arrays."""
    return tuple(sorted(name.removesuffix("lora_e") for name in adapters if name.rpartition(".")[2] == "lora_e"))


def existing(adapters: Arrays, states: Arrays) -> Masks:
    """Which triplets there are, bool by name of the λ: none in layers that are left out, none where P is zero.

    Args:
        adapters: the trained arrays; where they are shapes alone, all count as existing.
        states: the frozen ones, with the adapters' `scaling`.
    """
    masks = {}
    for prefix in triplets(adapters):
        if isinstance(adapters[prefix + "lora_a"], jax.ShapeDtypeStruct):
            masks[prefix + "lora_e"] = np.ones(adapters[prefix + "lora_e"].shape, bool)
            continue
        adapted = host(states[prefix + "scaling"]) != 0
        masks[prefix + "lora_e"] = adapted[..., None] & host(adapters[prefix + "lora_a"]).any(-2)
    return masks


def start_importance(adapters: Arrays, exists: Masks) -> Importance:
    """Nothing seen, every triplet in use that exists."""
    zeros = {
        prefix + name: jnp.zeros_like(adapters[prefix + name]) for prefix in triplets(adapters) for name in _FACTORS
    }
    in_use = {name: jnp.ones_like(adapters[name]) * mask for name, mask in exists.items()}
    return Importance(zeros, {name: jnp.zeros_like(value) for name, value in zeros.items()}, in_use)


def orthogonality(adapters: Arrays, exists: Masks) -> Array:
    """The mean over all P and Q of ‖Pᵀ P − I‖ and ‖Q Qᵀ − I‖ (Frobenius), a float32 scalar.

    Triplets that don't exist are no part of P, Q and I, nor is a matrix that has none.
    """
    norms, counted = [], []
    for prefix in triplets(adapters):
        p, q = adapters[prefix + "lora_a"], adapters[prefix + "lora_b"]
        exist = exists[prefix + "lora_e"]
        both = exist[..., :, None] & exist[..., None, :]
        eye = np.eye(p.shape[-1], dtype=np.float32) * both
        for gram in (jnp.einsum("...ir,...is->...rs", p, p), jnp.einsum("...ro,...so->...rs", q, q)):
            # The root of 0 has no slope: exact orthogonality would give NaN.
            total = jnp.sum(jnp.square(jnp.where(both, gram, 0) - eye), axis=(-2, -1))
            norms.append(jnp.sqrt(total + 1e-12).reshape(-1))
            counted.append(exist.any(-1).reshape(-1))
    used = np.concatenate(counted).astype(np.float32)
    return jnp.sum(jnp.concatenate(norms) * used) / max(float(used.sum()), 1.0)


def budget(config: AdaLoRAConfig, exists: Masks, step: int) -> int:
    """How many triplets are in use after `step` steps: a cubic fall between two plateaus.

    All that exist until step `tinit`, `config.target_rank` for each matrix that has any from `total_steps − tfinal` on.
    """
    total = int(sum(mask.sum() for mask in exists.values()))
    end = min(total, config.target_rank * int(sum(mask.any(-1).sum() for mask in exists.values())))
    last = config.total_steps - config.tfinal
    left = 1 - (min(max(step, config.tinit), last) - config.tinit) / (last - config.tinit)
    return int((total - end) * left**3 + end)


def allocate(
    config: AdaLoRAConfig, importance: Importance, adapters: Arrays, gradients: Arrays, step: Array, exists: Masks
) -> tuple[Importance, Arrays]:
    """Importances after one more step, and the arrays with the λ beyond the budget zeroed.

    Args:
        config: the schedule and the smoothing.
        importance: of the steps before.
        adapters: after the update; arrays of other methods pass through.
        gradients: of this step, by the same names.
        step: how many steps are done with this one. Which triplets are in use changes every `delta_t` steps after
            `tinit`, for the last time when `tfinal` steps are left.
        exists: see `existing`.
    """
    last = config.total_steps - config.tfinal
    sensitivity, uncertainty = _smoothed(config, importance, adapters, gradients, step < last)
    scores = [_scores(name, sensitivity, uncertainty, exists[name]) for name in exists]
    flat = jnp.concatenate([score.reshape(-1) for score in scores])
    places = jnp.argsort(jnp.argsort(-flat))  # 0 for the most important
    table = jnp.asarray([budget(config, exists, number) for number in range(config.total_steps + 1)], jnp.int32)
    within = places < table[jnp.clip(step, 0, config.total_steps)]
    changes = (step > config.tinit) & (step <= last) & ((step % config.delta_t == 0) | (step == last))
    in_use, zeroed, start = {}, dict(adapters), 0
    for name, mask in exists.items():
        here = within[start : start + mask.size].reshape(mask.shape) & mask
        in_use[name] = jnp.where(changes, here * 1.0, importance.kept[name])
        start += mask.size
        zeroed[name] = jnp.where((changes | (step > last)) & (in_use[name] == 0), 0.0, adapters[name])
    return Importance(sensitivity, uncertainty, in_use), zeroed


def _smoothed(
    config: AdaLoRAConfig, importance: Importance, adapters: Arrays, gradients: Arrays, counts: Array
) -> tuple[Arrays, Arrays]:
    """Sensitivity and uncertainty with this step's, if it `counts`."""
    sensitivity, uncertainty = {}, {}
    for name, before in importance.sensitivity.items():
        now = jnp.abs(adapters[name] * gradients[name])
        smoothed = config.beta1 * before + (1.0 - config.beta1) * now
        spread = config.beta2 * importance.uncertainty[name] + (1.0 - config.beta2) * jnp.abs(now - smoothed)
        sensitivity[name] = jnp.where(counts, smoothed, before)
        uncertainty[name] = jnp.where(counts, spread, importance.uncertainty[name])
    return sensitivity, uncertainty


def _scores(name: str, sensitivity: Arrays, uncertainty: Arrays, exists: np.ndarray) -> Array:
    """Importance of each triplet, `[*layers, rank]`: that of λ and the means over its column of P and row of Q.

    Those that don't exist come last, below any that does.
    """
    prefix = name.removesuffix("lora_e")
    p, value, q = (sensitivity[prefix + factor] * uncertainty[prefix + factor] for factor in _FACTORS)
    return jnp.where(exists, value + jnp.mean(p, axis=-2) + jnp.mean(q, axis=-1), -1.0)
