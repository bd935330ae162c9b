"""EVA: LoRA's A starts from the principal directions of what a layer reads (Paischer et al., 2024, arXiv 2410.07170).

The directions are the right singular vectors of the layer's inputs X, which are the eigenvectors of `Xᵀ X`. B starts at
zero, so the base is untouched. (The paper also moves ranks between layers; `rank_pattern` can be given here.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mora_jax.adapters.attach import detach, partition, put_adapter
from mora_jax.adapters.base import Adapter, AdapterParam, Params
from mora_jax.adapters.config.common import CommonConfig, Targets
from mora_jax.adapters.methods.lora import LoRA
from mora_jax.adapters.products.matmul import Dot, dot
from mora_jax.adapters.sites import Site, sites


def start_from_inputs(model: nnx.Module, run: Callable[[Any], Array]) -> None:
    """Sets A of every LoRA of `model` to the principal directions of its layer's inputs, and B to zero.

    Args:
        model: with fresh LoRA adapters (`LoRAConfig(init="eva")`); embeddings and heads keep their start.
        run: calls a model on data, and returns its output: `lambda model: model(input_ids)`. Every token counts,
            padding too, so give it none.

    Raises:
        ValueError: the model carries no LoRA, or a rank is larger than its layer's input.
    """
    if not any(map(_has_lora, sites(model))):
        raise ValueError("the model carries no LoRA that could start from its inputs")
    set_directions(model, input_grams(model, run))


def set_directions(model: nnx.Module, grams: Mapping[str, np.ndarray | Array]) -> None:
    """As `start_from_inputs`, from the matrices `Xᵀ X [in, in]` (or covariances) of layers by module path."""
    for place in sites(model):
        if not _has_lora(place) or not set(place.paths) & set(grams):
            continue
        adapter: Any = place.adapter
        rank = adapter.lora_a.shape[-1]
        if rank > place.in_features:
            raise ValueError(f"{place.title} reads {place.in_features} features, fewer than the rank {rank}")
        lora_a = np.array(adapter.lora_a[...])
        for i, path in enumerate(place.paths):
            if path in grams:
                _, vectors = np.linalg.eigh(np.asarray(grams[path], np.float64))
                lora_a[place.index(i)] = vectors[:, ::-1][:, :rank]
        adapter.lora_a[...] = jnp.asarray(lora_a)
        adapter.lora_b[...] = jnp.zeros_like(adapter.lora_b[...])


def input_grams(model: nnx.Module, run: Callable[[Any], Array]) -> dict[str, np.ndarray]:
    """`Xᵀ X`, float32 `[in, in]`, of the inputs X `[tokens, in]` of every layer with LoRA, by module path.

    Found as a gradient: a probe that adds nothing has `Xᵀ X` as the gradient of its array, so this works wherever
    training does, through scans and fused projections. It takes `[in, in]` for each layer; add up several batches.
    """
    chosen = {(place.paths, place.part) for place in sites(model) if _has_lora(place)}
    probed = nnx.clone(model)
    detach(probed)
    for place in list(sites(probed)):
        if (place.paths, place.part) in chosen:
            put_adapter(place, (ProbeConfig(),) * len(place.paths), Probe, nnx.Rngs(0))
    graphdef, arrays, rest = partition(probed)

    @jax.jit
    def total(arrays, rest):
        return jnp.sum(run(nnx.merge(graphdef, arrays, rest)).astype(jnp.float32))

    nnx.update(probed, jax.grad(total)(arrays, rest))
    grams: dict[str, np.ndarray] = {}
    for place in sites(probed):
        if isinstance(place.adapter, Probe):
            gram = np.asarray(place.adapter.gram[...])
            grams |= {path: gram[place.index(i)] for i, path in enumerate(place.paths)}
    return grams


def _has_lora(place: Site) -> bool:
    return isinstance(place.adapter, LoRA) and place.is_linear and not place.is_head


@dataclass(frozen=True)
class ProbeConfig(CommonConfig):
    """A probe has no settings."""

    targets: Targets = "all-linear"


class Probe(Adapter):
    """Adds nothing; the gradient of `gram [*layers, in, in]` is `Xᵀ X`."""

    method: ClassVar[str] = "probe"

    def __init__(self, in_features: int, out_features: int, config: ProbeConfig, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        self.gram = AdapterParam(jnp.zeros((*self.layers, in_features, in_features), jnp.float32))

    @classmethod
    def delta(cls, config: ProbeConfig, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        return _probe(out_features, x, params["gram"])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(out_features: int, x: Array, gram: Array) -> Array:
    return jnp.zeros((x.shape[0], out_features), jnp.float32)


def _probe_fwd(out_features, x, gram):
    return _probe(out_features, x, gram), x


def _probe_bwd(out_features, x, dy):
    wide = x.astype(jnp.float32)
    return jnp.zeros_like(x), jnp.matmul(wide.T, wide, precision=jax.lax.Precision.HIGHEST)


_probe.defvjp(_probe_fwd, _probe_bwd)
