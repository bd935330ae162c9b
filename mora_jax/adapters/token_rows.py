"""Single rows of an embedding table that are trained beside the adapters, as PEFT's `trainable_token_indices`.

What is trained is the change of each row, which starts at zero; files hold the rows themselves. A tied output head uses
the changed table too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax.adapters.base import Adapter, AdapterParam, AdapterState, Params, constant
from mora_jax.adapters.config.common import CommonConfig, Targets
from mora_jax.adapters.matrices import weight_of
from mora_jax.adapters.products.matmul import dot
from mora_jax.adapters.sites import Site


@dataclass(frozen=True)
class TokenRowsConfig(CommonConfig):
    """Which rows of a table are trained.

    Attributes:
        tokens: their ids.
        targets: the table's path.
    """

    tokens: tuple[int, ...] = ()
    targets: Targets = "embed_tokens"


class TokenRows(Adapter):
    """`token_delta [n, D]`, the changes of n rows of a table `[V, D]`, and `token_slots [V]`, which of them a row has.

    A row without one has the slot n.
    """

    method: ClassVar[str] = "trainable_tokens"
    on_embeddings: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int, config: TokenRowsConfig, *, rngs: Any, **placing: Any):
        """Takes what every adapter takes; nothing is drawn."""
        super().__init__(in_features, out_features, config, **placing)
        slots = np.full(in_features, len(config.tokens), np.int32)
        slots[list(config.tokens)] = np.arange(len(config.tokens))
        self.token_slots = AdapterState(constant(slots), axes=("rank",))
        self.token_delta = AdapterParam(
            jnp.zeros((len(config.tokens), out_features), jnp.float32), axes=("rank", "embed")
        )

    @classmethod
    def for_embedding(cls, num_embeddings: int, features: int, config: TokenRowsConfig, **placing: Any) -> TokenRows:
        """The only form that there is."""
        return cls(num_embeddings, features, config, **placing)

    @classmethod
    def rows(cls, ids: Array, dtype: Any, params: Params) -> Array:
        """What is added to looked-up rows, float32 `[..., D]`."""
        slots = jnp.take(params["token_slots"], ids, mode="fill", fill_value=len(params["token_delta"]))
        return _or_zero(params["token_delta"], slots, axis=0)

    @classmethod
    def scores(cls, query: Array, params: Params) -> Array:
        """What is added to products of `query [..., D]` with every row of the table, `[..., V]`."""
        products = dot(query.reshape(-1, query.shape[-1]), params["token_delta"].T)
        wide = _or_zero(products, params["token_slots"], axis=1)
        return wide.reshape(*query.shape[:-1], len(params["token_slots"]))

    @classmethod
    def dense(cls, config: Any, in_features: int, out_features: int, params: Params) -> Array:
        return _or_zero(params["token_delta"], params["token_slots"], axis=0)


def _or_zero(array: Array, slots: Array, axis: int) -> Array:
    """What lies at each slot, zero beyond the last."""
    return jnp.take(array, slots, axis=axis, mode="fill", fill_value=0.0)


def table_for_tokens(sites: list[Site], tokens: tuple[int, ...]) -> Site:
    """The one embedding table of a model, or that of them which is marked so, whose rows `trainable_tokens` names.

    Raises:
        ValueError: there is none, there are several, it has an adapter, or fewer rows.
    """
    tables = [site for site in sites if site.is_embedding and not site.stack]
    tables = [site for site in tables if getattr(site.layer, "of_model", False)] or tables
    if len(tables) != 1:
        names = ", ".join(site.title for site in tables) or "none"
        raise ValueError(f"trainable_tokens takes a model with one embedding table, and this one has {names}")
    (site,) = tables
    if site.adapter is not None:
        raise ValueError(
            f"{site.title} is among the targets, and trainable_tokens trains rows of it: choose one of both"
        )
    if isinstance(weight_of(site.layer), AdapterParam):
        raise ValueError(f"{site.title} is trained whole (modules_to_save), so trainable_tokens has nothing to add")
    if outside := [token for token in tokens if token >= site.in_features]:
        raise ValueError(f"trainable_tokens names {outside[0]}, and {site.title} has {site.in_features} rows")
    return site


def trained_tokens(sites: list[Site]) -> tuple[int, ...] | None:
    """The tokens whose rows the adapters on these sites train, or None."""
    rows = [site.adapter for site in sites if isinstance(site.adapter, TokenRows)]
    return rows[0].config.tokens if rows else None
