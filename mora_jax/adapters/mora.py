"""MoRA under the path that programs import; see `mora_jax/adapters/methods/mora.py`."""

from mora_jax.adapters.methods.mora import (
    KINDS as KINDS,
    MoRA as MoRA,
    MoRALinear as MoRALinear,
    apply as apply,
    compress as compress,
    decompress as decompress,
    delta_weight as delta_weight,
    square_rank as square_rank,
    unused_inputs as unused_inputs,
)
