"""An optax optimizer that trains adapters and leaves everything else as it is.

For those who hand optax a whole model. Cheaper, where it can be had, is to differentiate the adapters alone:
the tree of `mora_jax.partition`, or `variables["adapters"]` of a Linen model; then no wrapper is needed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

from mora_jax.adapters.base import AdapterParam

TRAINED, FROZEN = "trained", "frozen"


def adapter_labels(tree: Any) -> Any:
    """Which parts of a tree are adapters, as labels for `optax.partition`.

    Args:
        tree: the variables of a Linen model, a dictionary with a collection "adapters" at the top; or an NNX
            state such as `nnx.state(model, nnx.Param)`, with its variables or, as `nnx.Optimizer` hands it
            on, with bare arrays, of which those below a module's `adapter` or `adapters` count.

    Returns:
        "trained" or "frozen" for every array of a Linen tree, for every variable of an NNX tree.

    Raises:
        ValueError: there is no adapter in the tree.
    """
    linen = isinstance(tree, Mapping) and not {"adapters", "params"}.isdisjoint(tree)

    def label(path: tuple[Any, ...], node: Any) -> str:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if isinstance(node, nnx.Variable):
            trained = isinstance(node, AdapterParam)
        elif linen:
            trained = names[0] == "adapters"
        else:
            trained = not {"adapter", "adapters"}.isdisjoint(names)
        return TRAINED if trained else FROZEN

    labels = jax.tree.map_with_path(label, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    if TRAINED not in jax.tree.leaves(labels):
        raise ValueError(
            "no adapter among the parameters: give a Linen model's variables with a collection 'adapters', "
            "or an nnx.State that holds AdapterParam variables"
        )
    return labels


def train_adapters(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes of `optimizer` one that takes whole models: adapters are trained, everything else gets no update.

    The optimizer's state holds moments for the adapters only, and norms (as in clipping) are those of the
    adapters' gradients. Works with the variables of Linen models and with NNX states, also inside
    `nnx.Optimizer`.

    Args:
        optimizer: what updates the adapters.

    Returns:
        An optimizer for the whole tree. Its `init` and `update` raise ValueError where the tree has no adapter.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mora_jax.linen import LoRADense
        >>> from mora_jax.training.freeze import train_adapters
        >>> layer, x = LoRADense(features=4, rank=2, alpha=4.0), jnp.ones((3, 8))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> gradients = jax.grad(lambda v: (layer.apply(v, x) ** 2).mean())(variables)
        >>> optimizer = train_adapters(optax.adamw(1e-3))
        >>> updates, _ = optimizer.update(gradients, optimizer.init(variables), variables)
        >>> bool((updates["params"]["kernel"] == 0).all()), bool((updates["adapters"]["lora_b"] != 0).all())
        (True, True)
    """
    return optax.partition({TRAINED: optimizer, FROZEN: optax.set_to_zero()}, adapter_labels)
