"""From one adapter method to another, several adapters into one, and an adapter out of two models."""

from mora_jax.interop.convert.convert import (
    Conversion as Conversion,
    convert_to_lora as convert_to_lora,
    convert_to_mora as convert_to_mora,
)
from mora_jax.interop.convert.difference import adapter_from_difference as adapter_from_difference
