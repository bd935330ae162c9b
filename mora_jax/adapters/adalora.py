"""AdaLoRA: `y = x W + s · ((x P) ⊙ λ) Q + b`, ranks by budget (Zhang et al., 2023, arXiv 2303.10512, equation 3).

P and Q stand for singular vectors, λ for singular values; λ starts at zero, so a fresh adapter changes nothing. Two
things belong to training, as pure functions of flat dictionaries (dotted name → array) such as a training step has:

- `orthogonality` (equation 4), to be added to the loss times `config.orth_weight`;
- `allocate` (equations 6 to 12), to be called after each update with its gradients: it keeps smoothed importances, and
  zeroes the λ of the least important triplets (column of P, λ, row of Q) over all matrices, as many as the budget of
  the step leaves out. Shapes stay as they are, so a step that contains it is compiled once.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.adapter import Adapter
from mora_jax.adapters.config import AdaLoRAConfig
from mora_jax.adapters.dense import trained_dot
from mora_jax.adapters.variables import AdapterParam

Array = jax.Array
Arrays = dict[str, Array]

_FACTORS = ("lora_a", "lora_e", "lora_b")


class AdaLoRA(Adapter):
    """`lora_a [*layers, in, rank]` (P), `lora_e [*layers, rank]` (λ) and `lora_b [*layers, rank, out]` (Q)."""

    method: ClassVar[str] = "adalora"

    def __init__(self, in_features: int, out_features: int, config: AdaLoRAConfig, *, rngs: nnx.Rngs, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        rank = config.rank
        lora_a = 0.02 * jax.random.normal(rngs.params(), (*self.layers, in_features, rank), jnp.float32)
        lora_b = 0.02 * jax.random.normal(rngs.params(), (*self.layers, rank, out_features), jnp.float32)
        self.lora_a = AdapterParam(lora_a, axes=self.stacked(self.axes[0], "rank"))
        self.lora_e = AdapterParam(jnp.zeros((*self.layers, rank), jnp.float32), axes=self.stacked("rank"))
        self.lora_b = AdapterParam(lora_b, axes=self.stacked("rank", self.axes[1]))

    @staticmethod
    def scale(config: AdaLoRAConfig) -> float:
        return config.alpha / (config.rank + 1e-5)  # as in PEFT

    @staticmethod
    def delta(config: AdaLoRAConfig, out_features: int, x: Array, params: dict[str, Array]) -> Array:
        hidden = trained_dot(x, params["lora_a"]) * (params["lora_e"] * params["scaling"])
        return trained_dot(hidden.astype(x.dtype), params["lora_b"])

    @staticmethod
    def dense(config: AdaLoRAConfig, in_features: int, out_features: int, params: dict[str, Array]) -> Array:
        left = params["lora_a"] * (params["lora_e"] * params["scaling"])
        return jnp.matmul(left, params["lora_b"], precision=jax.lax.Precision.HIGHEST)


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


def start_importance(adapters: Arrays) -> Importance:
    """Nothing seen, everything in use."""
    zeros = {
        prefix + name: jnp.zeros_like(adapters[prefix + name]) for prefix in triplets(adapters) for name in _FACTORS
    }
    kept = {prefix + "lora_e": jnp.ones_like(adapters[prefix + "lora_e"]) for prefix in triplets(adapters)}
    return Importance(zeros, dict(zeros), kept)


def orthogonality(adapters: Arrays) -> Array:
    """The mean over all P and Q of ‖Pᵀ P − I‖ and ‖Q Qᵀ − I‖ (Frobenius), a float32 scalar."""
    norms = []
    for prefix in triplets(adapters):
        p, q = adapters[prefix + "lora_a"], adapters[prefix + "lora_b"]
        eye = jnp.eye(p.shape[-1], dtype=jnp.float32)
        for gram in (jnp.einsum("...ir,...is->...rs", p, p), jnp.einsum("...ro,...so->...rs", q, q)):
            # The root of 0 has no slope: exact orthogonality would give NaN.
            norms.append(jnp.sqrt(jnp.sum(jnp.square(gram - eye), axis=(-2, -1)) + 1e-12).reshape(-1))
    return jnp.mean(jnp.concatenate(norms))


def budget(config: AdaLoRAConfig, step: Array, triplet_count: int) -> Array:
    """How many triplets are in use after `step`, of `triplet_count`: a cubic fall between two plateaus (equation 12).

    `config.rank` of each matrix until `tinit`, `config.target_rank` in the last `tfinal` of `total_steps`.
    """
    target = triplet_count * config.target_rank // config.rank
    span = max(1, config.total_steps - config.tfinal - config.tinit)
    left = 1.0 - jnp.clip((step - config.tinit) / span, 0.0, 1.0)
    return jnp.floor(target + (triplet_count - target) * left**3).astype(jnp.int32)


def allocate(
    config: AdaLoRAConfig, importance: Importance, adapters: Arrays, gradients: Arrays, step: Array
) -> tuple[Importance, Arrays]:
    """Importances after one more step, and the arrays with the λ beyond the budget zeroed.

    Args:
        config: the schedule and the smoothing.
        importance: of the steps before.
        adapters: after the update; arrays of other methods pass through.
        gradients: of this step, by the same names.
        step: its number, from 0. Which triplets are in use changes every `delta_t` steps, and no more in the last
            `tfinal` steps.
    """
    prefixes = triplets(adapters)
    sensitivity, uncertainty = {}, {}
    for name, before in importance.sensitivity.items():
        now = jnp.abs(adapters[name] * gradients[name])
        smoothed = config.beta1 * before + (1.0 - config.beta1) * now
        deviation = jnp.abs(now - smoothed)
        sensitivity[name] = smoothed
        uncertainty[name] = config.beta2 * importance.uncertainty[name] + (1.0 - config.beta2) * deviation
    scores = {prefix: _scores(prefix, sensitivity, uncertainty) for prefix in prefixes}
    flat = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
    wanted = budget(config, step, flat.size)
    least = flat[jnp.clip(flat.size - wanted, 0, flat.size - 1)]
    changes = (step % config.delta_t == 0) & (step > config.tinit) & (step <= config.total_steps - config.tfinal)
    kept = {
        prefix + "lora_e": jnp.where(changes, (scores[prefix] >= least) * 1.0, importance.kept[prefix + "lora_e"])
        for prefix in prefixes
    }
    pruned = adapters | {name: adapters[name] * mask for name, mask in kept.items()}
    return Importance(sensitivity, uncertainty, kept), pruned


def _scores(prefix: str, sensitivity: Arrays, uncertainty: Arrays) -> Array:
    """Importance of each triplet, `[*layers, rank]`: that of λ and the means over its column of P and row of Q."""
    p, value, q = (sensitivity[prefix + name] * uncertainty[prefix + name] for name in _FACTORS)
    return value + jnp.mean(p, axis=-2) + jnp.mean(q, axis=-1)
