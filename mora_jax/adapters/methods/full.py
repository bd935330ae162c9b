"""Full fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

from mora_jax.adapters.config.common import MethodConfig


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """Full fine-tuning: every parameter of the model is trained as a float32 master.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.FullConfig(), rngs=1).trainable  # W [6, 4] and b [4]
        28
    """

    changes_base: ClassVar[bool] = True
    tree_refusal = "full fine-tuning has no adapter: train the parameters themselves"
