"""OFT: `y = (x R) W + b`, R orthogonal and block-diagonal (Qiu et al., 2023, arXiv 2306.07280), in PEFT's form.

Each block of inputs is rotated by the Cayley transform of a trained skew-symmetric matrix Q, either exactly,
`R = (I - Q)(I + Q)⁻¹`, or by the first terms of the Neumann series of `(I + Q)(I - Q)⁻¹`, as PEFT has them; the two
turn in opposite directions. Q starts at zero, so a fresh adapter changes nothing.
"""

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax.adapters.base import Adapter, Params
from mora_jax.adapters.config.common import BIASES, CommonConfig, Targets
from mora_jax.adapters.config.limits import COUNT, POSITIVE, Number
from mora_jax.adapters.products.matmul import dot, row_dot, widened


@dataclass(frozen=True)
class OFTConfig(CommonConfig):
    """OFT (Qiu et al., 2023, arXiv 2306.07280): blocks of a layer's inputs are rotated.

    `y = (x R) W + b` with R orthogonal, a block for every `block_size` inputs (section 3).

    Attributes:
        block_size: inputs of a block. Where it doesn't divide a layer's inputs, the nearest divisor is taken.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        blocks: how many blocks a layer has, in place of a block size; 0 for as many as `block_size` makes.
        block_share: whether all blocks of a layer have one rotation.
        use_cayley_neumann: whether rotations are the first terms of a series, without a matrix inverse, and nearly
            orthogonal for small ones.
        num_cayley_neumann_terms: how many terms.
        bias: which existing biases are trained too, as in `LoRAConfig`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.OFTConfig(block_size=2), rngs=1).trainable  # three blocks of one angle
        3
    """

    block_size: int = field(default=32, metadata={"limits": POSITIVE})
    targets: Targets = "all-linear"
    blocks: int = field(default=0, kw_only=True, metadata={"limits": COUNT})
    block_share: bool = field(default=False, kw_only=True)
    use_cayley_neumann: bool = field(default=True, kw_only=True)
    num_cayley_neumann_terms: int = field(default=5, kw_only=True, metadata={"limits": Number(whole=True, at_least=2)})
    bias: str = field(default="none", kw_only=True, metadata={"choices": BIASES})


def block_shape(config: OFTConfig, in_features: int) -> tuple[int, int]:
    """How many blocks a layer of so many inputs has, and their size.

    Raises:
        ValueError: the blocks would hold one input each.
    """
    if config.blocks:
        count = _divisor(in_features, config.blocks)
        size = in_features // count
    else:
        size = _divisor(in_features, config.block_size)
        count = in_features // size
    if size == 1:
        asked = f"{config.blocks} blocks" if config.blocks else f"blocks of {config.block_size}"
        raise ValueError(f"{asked} of {in_features} inputs come to blocks of 1, which can't be rotated")
    return count, size


@functools.cache
def _divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`, of two the smaller, as PEFT takes it."""
    divisors = [one for one in range(1, number + 1) if number % one == 0]
    return min(divisors, key=lambda one: (abs(one - wanted), one))


class OFT(Adapter):
    """The upper triangles of Q row by row, `oft_r [*layers, blocks, size · (size - 1) / 2]`; one block if shared."""

    method: ClassVar[str] = "oft"
    additive: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, config: OFTConfig, **placing: Any):
        super().__init__(in_features, out_features, config, **placing)
        count, size = block_shape(config, in_features)
        rotations = 1 if config.block_share else count
        self.oft_r = self.filled(0.0, (rotations, size * (size - 1) // 2), "rank", "rank")

    @classmethod
    def configure_for_shapes(cls, config: OFTConfig, sizes: Iterable[tuple[int, int]]) -> OFTConfig:
        for features in sorted({in_features for in_features, _ in sizes}):
            count, size = block_shape(config, features)
            asked, taken = (config.blocks, count) if config.blocks else (config.block_size, size)
            if asked < features and asked != taken:
                name = "blocks" if config.blocks else "block_size"
                warnings.warn(f"{name} {asked} doesn't divide {features} inputs, so it is {taken} there", stacklevel=2)
        return config

    @classmethod
    def transform_input(cls, config: OFTConfig, params: Params, x: Array) -> Array:
        count, size = block_shape(config, x.shape[-1])
        change = rotation_change(config, params["oft_r"] * params["scaling"], size)
        if len(change) == 1:
            added = dot(x.reshape(-1, size), change[0])
        else:
            added = row_dot(x.reshape(-1, count, size).swapaxes(0, 1), change).swapaxes(0, 1)
        return (widened(x) + added.reshape(x.shape)).astype(x.dtype)


def rotation_change(config: OFTConfig, triangles: Array, size: int) -> Array:
    """`R - I` of each block, `[blocks, size, size]`: taken by itself, since a small one would round away beside I."""
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((len(triangles), size, size), triangles.dtype).at[:, rows, columns].set(triangles)
    skew = upper - upper.swapaxes(-1, -2)
    if not config.use_cayley_neumann:
        # (I - Q)(I + Q)⁻¹ - I = -2 (I + Q)⁻¹ Q, as Q commutes with it.
        return jnp.linalg.solve(jnp.eye(size, dtype=skew.dtype) + skew, -2.0 * skew)
    # 2 Q + 2 Q² + … + 2 Qⁿ⁻¹ + Qⁿ, in Horner's order; PEFT's series of 3 terms is that of 4, its series of 2 is 2 Q.
    terms = config.num_cayley_neumann_terms
    highest = max(terms - 1, 3) if terms > 2 else 1
    total = skew if highest > 1 else 2.0 * skew
    for _ in range(highest - 1):
        total = 2.0 * skew + jnp.matmul(skew, total, precision=jax.lax.Precision.HIGHEST)
    return total
