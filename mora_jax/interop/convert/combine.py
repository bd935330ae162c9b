"""Weighted combinations of several adapters into one of the same method.

| combination | for  | what comes out                                                             |
|-------------|------|----------------------------------------------------------------------------|
| `cat`       | LoRA | the weighted sum Σ wᵢ ΔWᵢ, exactly: factors side by side, rank Σ rᵢ        |
| `svd`       | LoRA | the LoRA of a given rank nearest to that sum (Eckart and Young, 1936)      |
| `linear`    | LoRA | A = Σ ±√(wᵢ sᵢ) Aᵢ, B = Σ √(wᵢ sᵢ) Bᵢ, as in PEFT; equal ranks only        |
| `sum`       | MoRA | M = Σ wᵢ sᵢ Mᵢ: the weighted sum, exactly: every kind's update is linear |

`linear` is not the weighted sum: its product has the cross terms Aᵢ Bⱼ too. Scalings sᵢ go into the factors, and what
comes out has scaling 1.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.methods import mora
from mora_jax.adapters.sites import sites
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues, lora_of
from mora_jax.interop.convert.convert import Conversion, Row, lora_values
from mora_jax.interop.convert.low_rank import best_factors_of_product
from mora_jax.interop.convert.updates import Update
from mora_jax.interop.read_adapter import ValuesByPath, same_form

COMBINATIONS = ("linear", "cat", "svd", "sum")
Terms = list[tuple[float, AdapterValues]]
Combined = tuple[dict[str, AdapterValues], Conversion]


def combine(
    model: nnx.Module,
    adapters: Mapping[str, ValuesByPath],
    weights: Mapping[str, float],
    combination: str,
    rank: int | None = None,
) -> Combined:
    """One adapter out of several.

    Args:
        model: what they are for; only its sizes are read.
        adapters: values by name, each by module path. A module that an adapter leaves alone gets nothing from it.
        weights: of each adapter, any sign.
        combination: one of `COMBINATIONS`.
        rank: for `svd`; None for the highest among the adapters.

    Returns:
        The values of the combination, and its error against the weighted sum of the updates.

    Raises:
        InputError: the adapters are of different methods or sizes, or the combination is not for theirs.
    """
    form = same_form(adapters)
    fitting = ("linear", "cat", "svd") if form == "LoRA" else ("sum",)
    if combination not in fitting:
        raise InputError(f"adapters of {form} are combined by {' or '.join(fitting)}, not by {combination}")
    if rank is not None and combination != "svd":
        raise InputError(f"a rank is for svd; what {combination} gives has its own")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise InputError(f"the weight of {name} is {weight}; give a finite number")
    paths = dict.fromkeys(path for by_path in adapters.values() for path in by_path)
    terms = {
        path: [(weights[name], by_path[path]) for name, by_path in adapters.items() if path in by_path]
        for path in paths
    }
    what = f"{combination} of " + " and ".join(f"{weights[name]:g} {name}" for name in adapters)
    # One for all: the layers of a stack can't have several, and adapters that differ in it may be for some of them.
    dropout = max(adapter_values.config.dropout for term in terms.values() for _, adapter_values in term)
    if combination in ("linear", "sum"):
        sizes = {path: (place.in_features, place.out_features) for place in sites(model) for path in place.paths}
        make = _linear if combination == "linear" else _sum
        parts = {path: make(path, *sizes[path], term, dropout) for path, term in terms.items()}
        rows = tuple(row for _, row in parts.values())
        return {path: adapter_values for path, (adapter_values, _) in parts.items()}, Conversion(what, rows)
    chosen = None
    if combination == "svd":
        chosen = rank or max(adapter_values.config.rank for term in terms.values() for _, adapter_values in term)
    by_path, conversion = lora_values([_sum_of_loras(path, term, dropout) for path, term in terms.items()], chosen)
    return by_path, replace(conversion, method=what)


def _factors(terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Σ wᵢ sᵢ Aᵢ Bᵢ as one product `a [in, Σ r] @ b [Σ r, out]`."""
    a = [float(weight * one.values["scaling"]) * one.values["lora_a"] for weight, one in terms]
    return np.concatenate(a, axis=1), np.concatenate([one.values["lora_b"] for _, one in terms])


def _sum_of_loras(path: str, terms: Terms, dropout: float) -> Update:
    a, b = _factors(terms)
    rank = a.shape[1]
    return Update(
        path, a.shape[0], b.shape[1], False, "LoRA", lambda: a @ b, lambda: (a, b), rank, rank, dropout=dropout
    )


def _linear(path: str, in_features: int, out_features: int, terms: Terms, dropout: float) -> tuple[AdapterValues, Row]:
    ranks = sorted({adapter_values.config.rank for _, adapter_values in terms})
    if len(ranks) > 1:
        raise InputError(f"{path}: linear needs equal ranks, not {' and '.join(map(str, ranks))}; use cat or svd")
    factors = [weight * float(adapter_values.values["scaling"]) for weight, adapter_values in terms]
    # Python's numbers leave arrays their precision.
    roots = np.sqrt(np.abs(factors)).tolist()
    signs = np.sign(factors).tolist()
    lora_a = np.sum([s * r * x.values["lora_a"] for s, r, (_, x) in zip(signs, roots, terms, strict=True)], axis=0)
    lora_b = np.sum([r * x.values["lora_b"] for r, (_, x) in zip(roots, terms, strict=True)], axis=0)
    a, b = _factors(terms)
    rest = np.concatenate([a, lora_a], axis=1), np.concatenate([b, -lora_b])
    norm, error = (best_factors_of_product(*pair, pair[0].shape[1]).norm for pair in ((a, b), rest))
    return lora_of(lora_a, lora_b, dropout=dropout), Row(path, in_features, out_features, ranks[0], norm, error)


def _sum(path: str, in_features: int, out_features: int, terms: Terms, dropout: float) -> tuple[AdapterValues, Row]:
    sides = sorted({len(adapter_values.values["m"]) for _, adapter_values in terms})
    if len(sides) > 1:
        raise InputError(f"{path}: MoRA's matrices have sides {' and '.join(map(str, sides))}, which can't be added")
    m = np.sum([float(weight * x.values["scaling"]) * x.values["m"] for weight, x in terms], axis=0)
    config = replace(terms[0][1].config, dropout=dropout)
    norm = float(jnp.linalg.norm(mora.delta_weight(jnp.asarray(m), in_features, out_features, config.kind)))
    values = {"m": m, "scaling": np.ones((), np.float32)}
    return AdapterValues(config, values), Row(path, in_features, out_features, len(m), norm, 0.0)
