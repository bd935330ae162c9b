"""Split a model into what is trained and what is frozen."""

from __future__ import annotations

from flax import nnx

from mora_jax.adapters.variables import AdapterParam


def partition(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits `model` into its structure, its trainable float32 arrays and everything else.

    Differentiate with respect to the second, give the second to optax, and pass the third through unchanged;
    `nnx.merge(graphdef, adapters, frozen)` puts the model together again, inside a compiled function too.

    The third holds what a call may change too: counters of dropout, batch statistics, caches. Where a model has such
    state and is in training mode, take it out as a part of its own that the step returns:
    `nnx.split(model, mj.AdapterParam, mj.mutable_state, ...)`, see `mutable_state`.

    Returns:
        `(graphdef, adapters, frozen)`.

    Raises:
        ValueError: the model has no adapter and wasn't prepared for full fine-tuning.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> graphdef, adapters, frozen = mj.partition(model)
        >>> loss = lambda adapters, x: (nnx.merge(graphdef, adapters, frozen)(x) ** 2).mean()
        >>> gradients = jax.jit(jax.grad(loss))(adapters, jnp.ones((3, 4)))
        >>> optimizer = optax.adamw(1e-3)
        >>> updates, _ = optimizer.update(gradients, optimizer.init(adapters), adapters)
        >>> adapters = optax.apply_updates(adapters, updates)
    """
    graphdef, *states = nnx.split(model, AdapterParam, ...)
    adapters, frozen = states
    if not adapters:
        raise ValueError("the model has nothing to train; call attach(model, config, rngs=…) first")
    return graphdef, adapters, frozen
