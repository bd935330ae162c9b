"""What a decoder and a training step ask of whoever lays their arrays over several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from flax import nnx
from jax import Array

from mora_jax.adapters.base import AdapterParam
from mora_jax.adapters.projection import Projection
from mora_jax.backend import backend

if TYPE_CHECKING:
    from mora_jax.models.attention.ring import HeadShards, Ring

Axes = tuple[str | None, ...]


class Partitioner(Protocol):
    """Where arrays lie on a mesh while a decoder computes. Hashable: it is part of a compiled function's key.

    `axes` are the logical names of an array's axes, as its metadata has them.
    """

    @property
    def row_shards(self) -> int:
        """Devices among which the rows of a micro-batch are laid."""

    @property
    def shards_weights(self) -> bool:
        """Whether weights are sharded at all, and not only rows."""

    def rows(self, x: Array, *, folded: bool = False) -> Array:
        """`x [B, …]` with its rows sharded over the devices that share the batch, and whole otherwise.

        With `folded` the rows are those of `fold`.
        """

    def head_shards(self, rows: int) -> HeadShards:
        """The devices that share the heads of so many rows, each of which is whole."""

    def ring(self, rows: int) -> Ring | None:
        """The devices that share so many rows along their length; None where each row is whole."""

    def fold(self, x: Array) -> Array:
        """`x [B, T, …]` as `[c · B, t, …]`: each row in c shares of t tokens, row `j · B + b` the j-th of row b.

        t is even; what is missing is filled up with zeros at the end. Without a ring `x` itself.
        """

    def unfold(self, x: Array, rows: int, length: int) -> Array:
        """The inverse of `fold` of `rows` rows of `length` tokens."""

    def stored(self, axes: Axes, shape: tuple[int, ...]) -> Any:
        """The sharding of a parameter where it is kept, and of its gradient."""

    def used(self, axes: Axes, shape: tuple[int, ...]) -> Any:
        """The sharding of a parameter where it is computed with."""

    def sharded_output_axis(self, axes: Axes, shape: tuple[int, ...]) -> int:
        """Which axis of a kernel `[in, …]` of several output axes has to come first: the one that is sharded."""

    def shards_features(self, axes: Axes, shape: tuple[int, ...]) -> bool:
        """Whether devices share the inputs or the outputs of a kernel `[in, …]`."""

    def flattens(self, axes: Axes, shape: tuple[int, ...]) -> bool:
        """Whether the output axes of a kernel `[in, …]` can be one axis: none but the first of them is sharded."""

    def by_experts(
        self,
        function: Callable[..., Array],
        rows: tuple[Array, ...],
        weights: list[tuple[Array, Axes]],
        *,
        folded: bool = False,
    ) -> Array:
        """`function(number, *rows, *weights)` of each device's rows and share of experts, `[B, …]` like the rows.

        `number` counts the devices that share experts; what they give for the same rows is summed. `weights` are arrays
        as they are used, with their axes. With `folded` rows are those of `fold`.
        """

    def gathered(self, array: Array, axes: Axes) -> Array:
        """A stored parameter as it is used; its gradient goes back to where it is stored."""

    def looked_up(self, axes: Axes, shape: tuple[int, int], ids: Array, table: Callable[[Array], Array]) -> Array:
        """`table(ids)` by rows, `[B, T, D]`, for a stored embedding of `axes` and `shape` `[V, D]`."""


def lay_kernels(model: nnx.Module, *, flat: bool | None = None) -> None:
    """Stores the frozen kernels of a model, or their shapes, as products take them where it is computed.

    Args:
        model: changed in place.
        flat: whether kernels of several matrices are stored as matrices; None: on TPUs, which would else make them so
            in every step.
    """
    flat = backend() == "tpu" if flat is None else flat
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, Projection) and not isinstance(node.kernel, AdapterParam):
            node.lay_kernel(flat=flat)
