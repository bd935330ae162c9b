"""Models and adapters in the ecosystem's file formats."""

from mora_jax.interop.base import load_pretrained

__all__ = ["load_pretrained"]
