"""Models and adapters in the ecosystem's file formats."""

from mora_jax.interop.load import load_pretrained
from mora_jax.interop.peft.load import load_adapter
from mora_jax.interop.peft.save import save_adapter
from mora_jax.interop.save import save_pretrained

__all__ = ["load_adapter", "load_pretrained", "save_adapter", "save_pretrained"]
