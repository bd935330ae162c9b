"""Variable types that say what a value is for: trained, carried along, or changed by the model's own call."""

from __future__ import annotations

from typing import Any

from flax import nnx

from mora_jax.environment import check_versions

check_versions()  # every layer's module comes this way


class AdapterParam(nnx.LoRAParam):
    """A trainable float32 array of an adapter.

    A subclass of `nnx.LoRAParam`, so code that filters on `nnx.LoRAParam` finds it too. `partition` puts exactly
    the variables of this type into the trainable tree.
    """


class FullParam(AdapterParam):
    """A base weight that is trained itself (full fine-tuning): a float32 master, cast to the compute dtype at use."""


# Arrays of adapters that hold one number a feature; a stack's leading axis doesn't make matrices of them.
VECTORS = frozenset({"bias", "magnitude", "ia3_l", "vera_d", "vera_b_scale", "lora_e"})


class AdapterState(nnx.Variable):
    """An array that an adapter reads and the optimizer never sees: scalings and layer masks."""


def mutable_state(path: tuple[Any, ...], value: Any) -> bool:
    """A filter of Flax NNX: the variables that a model changes while it is called.

    These are the counters of random streams (dropout), batch statistics, caches, and every other `nnx.Variable` that is
    neither an `nnx.Param` nor a constant of an adapter. A compiled training step has to return them, or each
    step draws the same dropout mask and forgets its statistics; the base weights don't need to be returned.

    Example:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> rngs = nnx.Rngs(0)
        >>> layers = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        >>> model = nnx.Sequential(*layers)
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=rngs)
        >>> graphdef, adapters, state, frozen = nnx.split(model, mj.AdapterParam, mj.mutable_state, ...)
        >>> [".".join(map(str, path[2:])) for path, _ in nnx.to_flat_state(state)]
        ['mean', 'var', 'rngs.count', 'rngs.key']
    """
    kind = getattr(value, "type", type(value))
    return issubclass(kind, nnx.Variable) and not issubclass(kind, nnx.Param | AdapterState)
