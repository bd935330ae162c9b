"""A user's own language model as the step and the evaluations take one: its call gives logits, not hidden states."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder, Head
from mora_jax.models.partitioning import Partitioner
from mora_jax.models.segments import default_positions


@dataclass(frozen=True)
class OwnConfig:
    """The sizes of a model that are read beside its arrays.

    Attributes:
        kind: the name of its class.
        vocab_size: logits of a token.
        max_positions: its context, which nothing says here.
    """

    kind: str
    vocab_size: int
    max_positions: int = 2**31 - 1


@dataclass(frozen=True)
class OwnModel:
    """Any NNX module with `(input_ids, segment_ids, positions) → logits`, as `Decoder` is used in compiled functions.

    The three are int `[B, T]` as in `Decoder.__call__`, logits `[B, T, V]` of any floating dtype. Random numbers of the
    module's streams (`nnx.Dropout`, the adapters' dropout) follow from the step's key; without one the module is in
    evaluation mode. What else a call changes is not kept.

    Attributes:
        model: the module.
    """

    model: nnx.Module
    quantize = "none"
    attention = None

    @property
    def dtype(self) -> jnp.dtype:
        """In which most of its numbers are stored."""
        sizes: dict[Any, int] = {}
        for leaf in jax.tree.leaves(nnx.state(self.model, nnx.Param)):
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + leaf.size
        return max(sizes, key=lambda dtype: sizes[dtype], default=jnp.dtype("float32"))

    @property
    def config(self) -> OwnConfig:
        """The model's sizes, by a call without values.

        Raises:
            InputError: it takes other arguments, or gives something else.
        """
        name, ids = type(self.model).__name__, jax.ShapeDtypeStruct((2, 8), jnp.int32)
        takes = f"a model of your own takes (input_ids, segment_ids, positions), int [B, T]: {name}"
        if jax.tree.leaves(nnx.state(self.model, nnx.BatchStat)):
            raise InputError(f"{name} has batch statistics, which tokens of one row would share with those of others")
        try:
            logits = jax.eval_shape(self.forward, ids, ids, ids)
        except Exception as error:  # noqa: BLE001 - it is somebody else's code
            first = next(iter(str(error).splitlines()), "")
            raise InputError(f"{takes} refused them ({type(error).__name__}: {first})") from error
        if getattr(logits, "shape", ())[:2] != ids.shape or logits.ndim != 3:
            shape = getattr(logits, "shape", type(logits).__name__)
            raise InputError(f"{takes} gives {shape} for ids {ids.shape}, and should give logits [B, T, V]")
        return OwnConfig(name, logits.shape[-1])

    def forward(
        self,
        input_ids: Array,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        *,
        dropout_key: Array | None = None,
        row_numbers: Array | None = None,
        partitioner: Partitioner | None = None,
        embedding_noise: None = None,
        packed: bool = True,
    ) -> Array:
        """The logits `[B, T, V]`; see `Decoder.forward`."""
        segments = jnp.ones(input_ids.shape, jnp.int32) if segment_ids is None else segment_ids
        places = default_positions(segments) if positions is None else positions
        model: Any = nnx.merge(*nnx.split(self.model), copy=True)  # a call may change it
        if dropout_key is None:
            model.eval()
        else:
            model.train()  # whatever mode its last call was made in
            key = dropout_key if row_numbers is None else jax.random.fold_in(dropout_key, row_numbers[0])
            _reseed(model, key)
        logits = model(input_ids, segments, places)
        return logits if partitioner is None else partitioner.rows(logits)

    def head(self, partitioner: Partitioner | None = None) -> Head:
        """None is left to do."""
        return Head(None, None)

    def head_with_dropout(self, hidden: Array, *others: Any) -> tuple[Head, Array]:
        """See `Decoder.head_with_dropout`."""
        return self.head(), hidden


def language_model(model: Any) -> Any:
    """A decoder itself, and another module as `OwnModel`."""
    return model if isinstance(model, Decoder) else OwnModel(model)


def draws(model: Any) -> bool:
    """Whether a call of a module draws random numbers, such as masks of dropout."""
    return model is not None and any(isinstance(node, nnx.RngStream) for _, node in nnx.iter_graph(model))


def _reseed(model: nnx.Module, key: Array) -> None:
    """Gives each stream of random numbers a key of its own, one for each layer of a stack."""
    for number, (_, stream) in enumerate(nnx.iter_graph(model)):
        if isinstance(stream, nnx.RngStream):
            stack, fresh = stream.count.get_value().shape, jax.random.fold_in(key, number)
            stream.key.set_value(jax.random.split(fresh, stack) if stack else fresh)
            stream.count.set_value(jnp.zeros(stack, stream.count.get_value().dtype))
