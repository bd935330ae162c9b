"""Updates of weight matrices, whatever holds them: an adapter, or the difference of two checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.attach import AdapterEntry, adapters_of
from mora_jax.adapters.config import MoRAConfig
from mora_jax.adapters.methods.mora import BLOCK_KINDS
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.adapters.sites import Site, by_path, sites
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import plain
from mora_jax.interop.convert.mora_fit import exact_factors, exact_rank
from mora_jax.interop.tensor_map import trained_weights


@dataclass(frozen=True)
class Update:
    """The change of one matrix, read or computed only when it is asked for.

    Attributes:
        path: module path.
        in_features, out_features: sizes of the matrix.
        is_embedding: whether it is an embedding table.
        what: the method and kind that it comes from, for messages.
        kernel: gives the dense change `[in, out]`, float32, or float64 where the adapter is.
        product: gives `a [in, k]` and `b [k, out]`, whose product times `scaling` is the change; None where the change
            has full rank.
        exact_rank: the smallest rank of a LoRA that is exact whatever the values; None where the change has full rank.
        rank: of the adapter that it comes from; 0 for none.
        scaling: the factor on `product`.
        dropout: of the adapter that it comes from.
    """

    path: str
    in_features: int
    out_features: int
    is_embedding: bool
    what: str
    kernel: Callable[[], np.ndarray]
    product: Callable[[], tuple[np.ndarray, np.ndarray]] | None
    exact_rank: int | None
    rank: int = 0
    scaling: float = 1.0
    dropout: float = 0.0


def updates_of(model: nnx.Module) -> Iterator[Update]:
    """The updates of the adapters of `model`, one a matrix and layer.

    Raises:
        InputError: an adapter does what no update of a matrix does.
    """
    if next(trained_weights(model), None) is not None:
        raise InputError("modules that are trained whole can't be converted with an adapter; merge the adapter instead")
    where = by_path(sites(model))
    for entry in adapters_of(model):
        if not all(np.isfinite(value).all() for value in entry.params.values()):
            raise InputError(f"{entry.path} has values that are no finite numbers, which nothing can be made of")
        if "bias" in entry.params:
            raise InputError(f"{entry.path} trains its bias, which can't be converted; merge the adapter instead")
        place, layer = where[entry.path]
        if adapter_class(entry.config).scales_bias and place.has_bias:
            raise InputError(f"{entry.path} scales its bias, which can't be converted; merge the adapter instead")
        yield _update(plain(entry), place, layer)


def _update(entry: AdapterEntry, place: Site, layer: int) -> Update:
    config, params = entry.config, entry.params
    sizes = entry.in_features, entry.out_features
    product: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    exact, scaling, what = None, 1.0, entry.method

    def kernel() -> np.ndarray:
        return _change_of_kernel(config, {name: jnp.asarray(value) for name, value in params.items()}, place, layer)

    if "magnitude" in params:
        # The gain multiplies the base too, so the change has full rank.
        what = f"{entry.method} with a magnitude"
    elif isinstance(config, MoRAConfig):
        what = f"MoRA of kind {config.kind}"
        if config.kind not in BLOCK_KINDS:
            exact = exact_rank(*sizes, config.rank, config.kind)
            product = lambda: thin(exact_factors(params["m"] * params["scaling"], *sizes, config.kind))  # noqa: E731
    elif (factors := adapter_class(config).low_rank(config, *sizes, params)) is not None:
        reduced = thin(factors)
        exact, scaling, product = reduced[0].shape[1], float(params["scaling"]), lambda: reduced
    rank = getattr(config, "rank", 0)
    return Update(entry.path, *sizes, entry.is_embedding, what, kernel, product, exact, rank, scaling, config.dropout)


def _change_of_kernel(config: Any, params: dict[str, jax.Array], place: Site, layer: int) -> np.ndarray:
    """The merged kernel minus the base's, `[in, out]`; an update that is only added needs no base."""
    method, sizes = adapter_class(config), (place.in_features, place.out_features)
    transforms = method.transforms_kernel or method.transforms_input(config, params, place.in_features)
    if method.additive and "magnitude" not in params and not transforms:
        return np.asarray(method.dense(config, *sizes, params))
    kernel = place.kernel()[place.index(layer)]
    base = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return np.asarray(method.merged_kernel(config, params, base) - base)


def thin(factors: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
    """The same product with an inner size of at most the smaller outer one."""
    assert factors is not None, "asked only of kinds that are products"
    a, b = factors
    (n_in, inner), n_out = a.shape, b.shape[1]
    if inner <= min(n_in, n_out):
        return a, b
    return (np.eye(n_in, dtype=np.float32), a @ b) if n_in <= n_out else (a @ b, np.eye(n_out, dtype=np.float32))
