"""MoRA under the path that programs import; see `mora_jax/adapters/methods/mora.py`."""

from mora_jax.adapters.methods.mora import KINDS as KINDS
from mora_jax.adapters.methods.mora import MoRA as MoRA
from mora_jax.adapters.methods.mora import MoRALinear as MoRALinear
from mora_jax.adapters.methods.mora import apply as apply
from mora_jax.adapters.methods.mora import compress as compress
from mora_jax.adapters.methods.mora import decompress as decompress
from mora_jax.adapters.methods.mora import delta_weight as delta_weight
from mora_jax.adapters.methods.mora import square_rank as square_rank
from mora_jax.adapters.methods.mora import unused_inputs as unused_inputs
