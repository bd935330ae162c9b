"""LoRA under the path that programs import; see `mora_jax/adapters/methods/lora.py`."""

from mora_jax.adapters.methods.lora import (
    LoRA as LoRA,
    LoRALinear as LoRALinear,
    apply as apply,
    delta_weight as delta_weight,
    init as init,
)
