"""Models and adapters in the ecosystem's file formats."""

from mora_jax.interop.load import load_pretrained as load_pretrained
from mora_jax.interop.peft.load import load_adapter as load_adapter
from mora_jax.interop.peft.save import save_adapter as save_adapter
from mora_jax.interop.save import save_pretrained as save_pretrained
