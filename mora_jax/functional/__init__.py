"""Adapters for any tree of arrays: Equinox, Haiku, Linen's variables, nested dictionaries of one's own.

Adapters are a plain tree of float arrays beside the parameters, `{path: {"lora_a": …, "lora_b": …}}`: differentiate by
it, give it to optax, save it. `merge` makes the parameters with the adapters in them, `apply` a function that has the
low-rank update beside each of its products in place of a dense one.

Examples:
    >>> import jax, jax.numpy as jnp
    >>> import mora_jax as mj
    >>> params = {"hidden": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}, "out": jnp.ones((4, 2))}
    >>> config = mj.LoRAConfig(rank=2)
    >>> adapters = mj.functional.init(params, config, rngs=0)
    >>> jax.tree.map(jnp.shape, adapters)
    {'hidden': {'lora_a': (8, 2), 'lora_b': (2, 4)}, 'out': {'lora_a': (4, 2), 'lora_b': (2, 2)}}
    >>> def model(params, x):
    ...     return jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["out"]
    >>> mj.functional.apply(model, params, adapters, config)(jnp.ones((3, 8))).shape
    (3, 2)
"""

from mora_jax.functional.apply import apply as apply
from mora_jax.functional.folders import load as load, save as save
from mora_jax.functional.tree import init as init, merge as merge, report as report, trainable as trainable
