"""Numbered slots for several adapters on one matrix, and which slot each row of a batch uses.

Choosing slots changes arrays and no structure, so nothing is compiled again. What a slot holds is its method's matter
(bank.py); slot −1 is the base alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mora_jax.adapters.base import Adapter, AdapterParam, AdapterState, Params

NO_SLOT = -1


class Bank(Adapter):
    """The slots of one matrix, or of a stack of matrices.

    Rows of a batch lie along the first axis of a layer's input.

    Attributes:
        slots: how many there are, N.
        scaling: `[*layers, N]`, of the factors' dtype; 0 where an adapter leaves the matrix alone and for empty slots.
        chosen: int32 `[*layers]`, the slot of all rows, or `[*layers, B]`, the slot of each.
    """

    factors: ClassVar[tuple[str, ...]]

    def __init__(
        self, in_features: int, out_features: int, config: Any, *, slots: int, dtype: Any = jnp.float32, **placing: Any
    ):
        """Takes what every adapter takes (see `Adapter`), how many slots there are, and the dtype of what they hold."""
        super().__init__(in_features, out_features, config, **placing)
        self.slots = slots
        layers, names = self.scaling.shape, ("layers",) * self.scaling.ndim
        self.scaling = AdapterState(jnp.zeros((*layers, slots), dtype), axes=(*names, "slots"))
        self.chosen = AdapterState(jnp.full(layers, NO_SLOT, jnp.int32), axes=self.stacked())

    @property
    def layers(self) -> tuple[int, ...]:
        """The axes of stacked layers in front, `()` for a single layer."""
        return tuple(self.scaling.shape[:-1])

    def _factor(self, *shape: int, axes: tuple[str, str]) -> AdapterParam:
        return self.filled(0.0, (self.slots, *shape), "slots", *axes, dtype=self.scaling.dtype)

    def arrays(self) -> dict[str, nnx.Variable]:
        """What a slot holds, by name: `[*layers, N, …]`."""
        return {name: getattr(self, name) for name in (*self.factors, "scaling")}

    def read(self, slot: int) -> dict[str, np.ndarray]:
        """The arrays of one slot, `[*layers, …]`."""
        return {name: np.asarray(value[...].take(slot, len(self.layers))) for name, value in self.arrays().items()}

    def write(self, slot: int, values: Mapping[str, np.ndarray]) -> None:
        """Fills one slot with arrays `[*layers, …]`; names that are absent become zero."""
        axis = len(self.layers)
        for name, variable in self.arrays().items():
            array = variable[...]
            value = values.get(name, np.zeros(np.delete(array.shape, axis)))
            variable.set_value(_put(array, jnp.asarray(value, array.dtype), slot, axis))

    def copy_from(self, other: Bank) -> None:
        """Takes the contents of a bank of the same matrix that has no more slots and no higher rank."""
        theirs = other.arrays()
        for name, variable in self.arrays().items():
            array = theirs[name][...]
            variable.set_value(variable[...].at[tuple(slice(size) for size in array.shape)].set(array))

    def choose(self, ids: Array) -> None:
        """Says which slot all rows use, `[]`, or each row, `[B]`."""
        rows = ("rows",) * ids.ndim
        self.chosen = AdapterState(jnp.broadcast_to(ids, (*self.layers, *ids.shape)), axes=self.stacked(*rows))

    @property
    def rows(self) -> int | None:
        """For how many rows slots are chosen; None where all rows use one."""
        return None if self.chosen.ndim == len(self.layers) else self.chosen.shape[-1]

    @classmethod
    def pick(cls, params: Params, name: str) -> Array:
        """The factor `name` of the chosen slot, `[…]`, or of each row's, `[B, …]`; zeros for the base alone."""
        stored = params[name]
        return stored.at[params["chosen"]].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    @classmethod
    def pick_scaling(cls, params: Params) -> Array:
        """`[]` or `[B]`. A slot that there isn't gives NaN: never the base by mistake."""
        chosen, stored = params["chosen"], params["scaling"]
        return jnp.where(chosen < stored.shape[0], Bank.pick(params, "scaling"), jnp.nan)


@partial(jax.jit, static_argnums=3)
def _put(array: Array, value: Array, slot: Any, axis: int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(array, value, slot, axis)


def banks(model: nnx.Module) -> Iterator[Bank]:
    """Every bank of `model`."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Bank):
            yield node


def refuse_banks(model: nnx.Module, what: str) -> None:
    """Raises `ValueError` where `model` has banks, of whose adapters it is not clear which to `what`."""
    if any(True for _ in banks(model)):
        raise ValueError(f"the model carries several named adapters; {what} one of them by its name")


def use(model: nnx.Module, ids: Any) -> None:
    """Chooses, in place, which slots of the banks of `model` the rows of a batch use.

    Inside a compiled function it acts on the model that `nnx.merge` made there, and `ids` may be one of the
    function's arguments.

    Args:
        model: a model with banks.
        ids: int, `[B]` for the slot of each row, `[]` for one slot of all rows; −1 for the base alone.

    Raises:
        ValueError: the model has no bank, `ids` has another shape, or there is no such slot.
    """
    model_banks = list(banks(model))
    ids = checked_ids(model_banks, ids)
    for bank in model_banks:
        bank.choose(ids)


def checked_ids(banks: list[Bank], ids: Any, rows: int | None = None) -> Array:
    """`ids` as an int32 array.

    Args:
        banks: the banks of a model.
        ids: as in `use`.
        rows: of the batch, which then must be as many.

    Raises:
        ValueError: as `use`; ids that a compiled function gets are not looked at.
    """
    if not banks:
        raise ValueError("adapter ids need a model with named adapters (mj.NamedAdapters), and this one has none")
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim > 1 or (rows is not None and ids.shape != (rows,)):
        wanted = "[B] or []" if rows is None else f"[{rows}], one for each row"
        raise ValueError(f"adapter ids must be integers {wanted}, not {ids.dtype} {list(ids.shape)}")
    if not isinstance(ids, jax.core.Tracer):
        bad = [int(slot) for slot in np.ravel(ids) if not NO_SLOT <= slot < banks[0].slots]
        if bad:
            raise ValueError(f"adapter id {bad[0]} is none of the {banks[0].slots} slots; {NO_SLOT} is the base alone")
    return jnp.asarray(ids, jnp.int32)


def choose_rows(model: nnx.Module, ids: Any, rows: int) -> None:
    """`use(model, ids)` for a batch of `rows` rows; with None, what was chosen before must fit such a batch."""
    if ids is not None:
        use(model, ids)
        return
    for bank in banks(model):
        if bank.rows not in (None, rows):
            raise ValueError(f"adapters are active for {bank.rows} rows, but the batch has {rows}")
