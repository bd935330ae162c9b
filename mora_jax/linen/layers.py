"""`nn.Dense` with an adapter, for models that are written with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import Array

from mora_jax.adapters.config import LoRAConfig, MoRAConfig, RsLoRAConfig
from mora_jax.linen.matrices import product_of
from mora_jax.linen.update import adapted_output

_SETTINGS = tuple(field.name for field in dataclasses.fields(nn.Dense) if field.name not in ("parent", "name"))


class _AdaptedDense(nn.Module, kw_only=True):
    """What both have: the other attributes of `nn.Dense`, and the call."""

    features: int
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

    def _config(self) -> Any:
        raise NotImplementedError  # abstract: each method has its own

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """Applies the layer.

        Args:
            inputs: `[..., in]`.
            deterministic: whether dropout is off; None takes the attribute of the layer.

        Returns:
            `[..., features]`, in the dtype of `nn.Dense`.
        """
        # A real nn.Dense in the module's own scope: the same numbers as without adapter, whatever its fields say.
        settings = {name: getattr(self, name) for name in _SETTINGS}
        base = nn.Dense(**settings, name="base")
        nn.share_scope(self, base)
        product = product_of(base, inputs, None)
        assert not isinstance(product, str), "nn.Dense is a product with its kernel"
        if deterministic is None:
            deterministic = self.deterministic
        bias = "bias" if self.use_bias else None
        return adapted_output(self, self._config(), product, base, inputs, deterministic, bias)


class LoRADense(_AdaptedDense):
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

    The other attributes are those of `nn.Dense`, by name. The factors are used in the dtype of the computation and
    accumulated in float32.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from mora_jax.linen import LoRADense
        >>> variables = LoRADense(4, rank=2, alpha=16.0).init(jax.random.key(0), jnp.ones((1, 6)))
        >>> jax.tree.map(jnp.shape, variables["adapters"])
        {'lora_a': (6, 2), 'lora_b': (2, 4)}
    """

    features: int
    rank: int
    alpha: float
    use_rslora: bool = dataclasses.field(default=False, kw_only=True)

    def _config(self) -> Any:
        method = RsLoRAConfig if self.use_rslora else LoRAConfig
        return method(rank=self.rank, alpha=self.alpha, dropout=self.dropout, use_dora=self.use_dora)


class MoRADense(_AdaptedDense):
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

    The other attributes are those of `nn.Dense`, by name.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from mora_jax.linen import MoRADense
        >>> variables = MoRADense(4, rank=2).init(jax.random.key(0), jnp.ones((1, 6)))
        >>> jax.tree.map(jnp.shape, variables["adapters"])
        {'m': (4, 4)}
    """

    features: int
    rank: int
    kind: str = "sharing"

    def _config(self) -> Any:
        return MoRAConfig(rank=self.rank, kind=self.kind, dropout=self.dropout, use_dora=self.use_dora)
