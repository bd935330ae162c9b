"""LoRA under the path that programs import; see `mora_jax/adapters/methods/lora.py`."""

from mora_jax.adapters.methods.lora import LoRA as LoRA
from mora_jax.adapters.methods.lora import LoRALinear as LoRALinear
from mora_jax.adapters.methods.lora import apply as apply
from mora_jax.adapters.methods.lora import delta_weight as delta_weight
from mora_jax.adapters.methods.lora import init as init
