"""`nn.Dense` with an adapter, for models that are written with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from mora_jax.adapters.config import LoRAConfig, MoRAConfig, RsLoRAConfig
from mora_jax.linen.matrices import product_of
from mora_jax.linen.update import adapted_output

Array = jax.Array


def _adapted_dense(module: LoRADense | MoRADense, config: Any, inputs: Array, deterministic: bool | None) -> Array:
    # A real nn.Dense in the module's own scope: the same numbers as without adapter, whatever its fields say.
    base = nn.Dense(
        module.features,
        use_bias=module.use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        precision=module.precision,
        kernel_init=module.kernel_init,
        bias_init=module.bias_init,
        promote_dtype=module.promote_dtype,
        dot_general=module.dot_general,
        dot_general_cls=module.dot_general_cls,
        name="base",
    )
    nn.share_scope(module, base)
    product = product_of(base, inputs, None)
    assert not isinstance(product, str), "nn.Dense is a product with its kernel"
    if deterministic is None:
        deterministic = module.deterministic
    return adapted_output(module, config, product, base, inputs, deterministic)


class LoRADense(nn.Module):
    """`nn.Dense` with LoRA: `y = x W + b + (alpha / rank) · (x A) B`.

    Variables: `params/kernel [in, features]`, `params/bias [features]`, and float32 `adapters/lora_a [in, rank]`,
    `adapters/lora_b [rank, features]`. B starts at zero, so a fresh layer computes what `nn.Dense` does.

    Attributes:
        features: size of the last axis of the output.
        rank: inner size of the update.
        alpha: numerator of the scaling alpha / rank.
        dropout: probability of dropping an input feature of the adapter path (never of the base path), with
            keys from the stream "dropout".
        deterministic: True switches dropout off. Needed, here or in the call, where `dropout` > 0.
        use_rslora: scale by alpha / √rank, as rsLoRA.
        use_dora: train a magnitude for each output too, `adapters/magnitude [features]`, as DoRA.

    The other attributes are those of `nn.Dense`. The factors are used in the dtype of the computation and
    accumulated in float32.
    """

    features: int
    rank: int
    alpha: float
    use_bias: bool = True
    dropout: float = 0.0
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
    bias_init: Callable[..., Array] = nn.initializers.zeros_init()
    promote_dtype: Any = promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None
    use_rslora: bool = False
    use_dora: bool = False

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """Applies the layer.

        Args:
            inputs: `[..., in]`.
            deterministic: whether dropout is off; None takes the attribute of the layer.

        Returns:
            `[..., features]`, in the dtype of `nn.Dense`.
        """
        method = RsLoRAConfig if self.use_rslora else LoRAConfig
        config = method(rank=self.rank, alpha=self.alpha, dropout=self.dropout, use_dora=self.use_dora)
        return _adapted_dense(self, config, inputs, deterministic)


class MoRADense(nn.Module):
    """`nn.Dense` with MoRA: `y = x W + b + decompress(compress(x) Mᵀ)`.

    Variables: `params/kernel [in, features]`, `params/bias [features]`, and float32 `adapters/m [q, q]` with q of
    `mora_jax.adapters.methods.mora.square_rank`. M starts at zero, so a fresh layer computes what `nn.Dense` does.

    Attributes:
        features: size of the last axis of the output.
        rank: LoRA rank of equal parameter count.
        kind: one of `mora_jax.adapters.methods.mora.KINDS`.
        dropout: as in `LoRADense`.
        deterministic: as in `LoRADense`.
        use_dora: as in `LoRADense`.

    The other attributes are those of `nn.Dense`.
    """

    features: int
    rank: int
    kind: str = "sharing"
    use_bias: bool = True
    dropout: float = 0.0
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
    bias_init: Callable[..., Array] = nn.initializers.zeros_init()
    promote_dtype: Any = promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None
    use_dora: bool = False

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """Applies the layer.

        Args:
            inputs: `[..., in]`.
            deterministic: whether dropout is off; None takes the attribute of the layer.

        Returns:
            `[..., features]`, in the dtype of `nn.Dense`.
        """
        config = MoRAConfig(rank=self.rank, kind=self.kind, dropout=self.dropout, use_dora=self.use_dora)
        return _adapted_dense(self, config, inputs, deterministic)
