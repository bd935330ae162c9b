"""LoRA, MoRA and their relatives for Flax Linen.

`LoRADense` and `MoRADense` replace `flax.linen.Dense`. Kernel and bias stay in the collection
`params` under the names of `nn.Dense`, so a trained tree loads; the factors are float32 in the collection
`adapters`. A model that should stay as it is gets its adapters by interception, see `adapted`. Everything
computed here is in the adapters' own classes, see `mora_jax.adapters.methods.registry`.

Examples:
    >>> import jax, jax.numpy as jnp
    >>> from mora_jax.linen import LoRADense
    >>> layer = LoRADense(features=4, rank=2, alpha=4.0)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((3, 8)))
    >>> jax.tree.map(jnp.shape, variables)
    {'adapters': {'lora_a': (8, 2), 'lora_b': (2, 4)}, 'params': {'bias': (4,), 'kernel': (8, 4)}}
"""

from mora_jax.linen.folders import load_adapter as load_adapter, save_adapter as save_adapter
from mora_jax.linen.interception import adapted as adapted
from mora_jax.linen.layers import LoRADense as LoRADense, MoRADense as MoRADense
from mora_jax.linen.merging import merge as merge
from mora_jax.linen.names import rename_layers as rename_layers
from mora_jax.linen.registered import register_layer as register_layer
from mora_jax.linen.update import COLLECTION as COLLECTION
