"""Variable types that say what a value is for: trained, or only carried along."""

from flax import nnx


class AdapterParam(nnx.LoRAParam):
    """A trainable float32 array of an adapter.

    A subclass of `nnx.LoRAParam`, so code that filters on `nnx.LoRAParam` finds it too. `partition` puts exactly
    the variables of this type into the trainable tree.
    """


class FullParam(AdapterParam):
    """A base weight that is trained itself (full fine-tuning): a float32 master, cast to the compute dtype at use."""


# Arrays of adapters that hold one number a feature; a stack's leading axis doesn't make matrices of them.
VECTORS = frozenset({"bias", "magnitude", "ia3_l", "vera_d", "vera_b_scale", "lora_e"})


class AdapterState(nnx.Variable):
    """An array that an adapter reads and the optimizer never sees: scalings and layer masks."""
