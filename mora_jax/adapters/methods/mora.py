"""MoRA: a square matrix M in place of LoRA's two thin factors (Jiang et al., 2024, arXiv 2405.12130).

`y = x W + decompress(compress(x) Mᵀ)`, where compression and decompression have no parameters. The kinds:

| kind                 | compress                         | decompress          | where                          |
|----------------------|----------------------------------|---------------------|--------------------------------|
| `sharing`            | strided groups, cyclic padding   | tile                | equation 6, reference type 1   |
| `grouped`            | contiguous groups                | repeat each entry   | ReMoRA, reference type 2       |
| `grouped_tile`       | contiguous groups                | tile                | ReMoRA, reference type 3       |
| `strided_interleave` | strided groups, cyclic padding   | repeat each entry   | ReMoRA, reference type 4       |
| `rotation`           | blocks, block k rotated by kθ    | concatenate, tile   | equation 9, reference type 6   |
| `decouple`           | blocks                           | concatenate, tile   | section 4                      |
| `truncation`         | the first q features             | zeros after         | section 4                      |

M starts at zero, so a fresh adapter changes nothing. Neither alpha nor 1/rank scales MoRA. Where paper and the authors'
code differ (rounding of q, pairing in the rotation, cyclic padding), files made by the authors' code decide.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mora_jax.adapters.base import Adapter, AdapterParam, Params, as_rngs
from mora_jax.adapters.config.common import CommonConfig, Pattern, Targets
from mora_jax.adapters.config.limits import positive
from mora_jax.adapters.layers import AdaptedLinear
from mora_jax.adapters.methods.mora_fused import FusedMoRA
from mora_jax.adapters.methods.mora_maps import (
    BLOCK_KINDS as BLOCK_KINDS,
    KINDS as KINDS,
    SHARED as SHARED,
    STRIDED as STRIDED,
    TILED as TILED,
    FeatureMaps,
    compression,
    decompression,
    rotated_features,
    rotated_squares,
    used_blocks,
)
from mora_jax.adapters.products.matmul import Delta, Dot, FusedLayout, dot, row_dot, widened


def check_kind(kind: str) -> None:
    """Raises `ValueError` unless `kind` is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")


@dataclass(frozen=True)
class MoRAConfig(CommonConfig):
    """MoRA (Jiang et al., 2024, arXiv 2405.12130): a square matrix between fixed compression and decompression.

    `y = x W + decompress(compress(x) Mᵀ)` with M `[q, q]`, q of `square_rank`.

    MoRA has no alpha and no factor that depends on the rank, so there is no rank-stabilised form of it.

    Attributes:
        rank: the LoRA rank whose parameter count the square matrix takes; its side follows from `square_rank`.
        kind: how inputs are compressed and outputs restored.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        rank_pattern: as in `LoRAConfig`, but layers of one stack have one rank: it fixes the square's side.
        use_dora: as in `LoRAConfig`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.MoRAConfig(rank=2), rngs=1).trainable  # as many as LoRA of rank 2, one square: M [5, 5]
        16
    """

    rank: int = 8
    kind: str = field(default="sharing", metadata={"choices": KINDS})
    dropout: float = 0.0
    targets: Targets = "all-linear"
    rank_pattern: Pattern = field(default=(), kw_only=True)
    use_dora: bool = field(default=False, kw_only=True)
    in_peft, grows_with_rank = False, True

    def highest_rank(self, in_features: int, out_features: int) -> int:
        """Up to which M has no more numbers than the matrix itself."""
        return max(1, in_features * out_features // (in_features + out_features))

    def warnings(self, title: str, in_features: int, out_features: int) -> list[str]:
        unused = unused_inputs(in_features, out_features, self.rank, self.kind)
        beyond = super().warnings(title, in_features, out_features)
        if not unused:
            return beyond
        why = "" if self.kind == "truncation" else " (in > out, as in the authors' code)"
        return [
            *beyond,
            f"{self.kind} at rank {self.rank} ignores {unused} of the {in_features} inputs of {title}{why}",
        ]

    @property
    def combinable_as(self) -> str:
        return f"MoRA of kind {self.kind}"


def square_rank(in_features: int, out_features: int, rank: int, kind: str = "sharing") -> int:
    """The side q of M that spends LoRA's parameters: `round(√((in + out) · rank))`, halves up.

    `rotation` and `decouple` take it down to an even number, since they pair features (2 at least).

    Args:
        in_features: inputs of the adapted matrix.
        out_features: outputs of it.
        rank: that of the LoRA with as many parameters.
        kind: one of `KINDS`.

    Returns:
        q, at least 1.

    Raises:
        ValueError: a size or the rank is not a positive integer, or the kind is unknown.
    """
    check_kind(kind)
    positive(in_features=in_features, out_features=out_features, rank=rank)
    q = int(math.sqrt((in_features + out_features) * rank) + 0.5)
    return max(2, q - q % 2) if kind in BLOCK_KINDS else q


def _check(m: Array, in_features: int, out_features: int, kind: str) -> int:
    check_kind(kind)
    positive(in_features=in_features, out_features=out_features)
    if m.ndim != 2 or m.shape[0] != m.shape[1] or m.shape[0] < 1:
        raise ValueError(f"m must be a square matrix [q, q], not {m.shape}")
    if kind in BLOCK_KINDS and m.shape[0] % 2:
        raise ValueError(f"kind {kind!r} pairs features, so the side of m must be even, not {m.shape[0]}")
    return m.shape[0]


def _delta(x: Array, m: Array, out_features: int, kind: str, product: Dot = dot) -> Array:
    """`x [N, in]` → `[N, out]`."""
    inner, outer, blocks = FeatureMaps.of(kind, x.shape[1], out_features, m.shape[0])
    features = inner(x).astype(x.dtype).reshape(len(x), blocks, m.shape[0])
    if kind == "rotation" and blocks > 1:
        y = row_dot(features.transpose(1, 0, 2), rotated_squares(m, blocks)).transpose(1, 0, 2)
    else:
        y = product(features.reshape(-1, m.shape[0]), m.T)
    return outer(y.reshape(len(x), blocks * m.shape[0]))


def update(x: Array, q: int, out_features: int, kind: str, product: Callable[[Array], Array]) -> Array:
    """What a kind makes of a product with M: sums and rotations in float32, the product in the dtype of `x`.

    For an M that differs from token to token; where it is one, M is rotated in place of the tokens' features.

    Args:
        x: `[N, in]`.
        q: side of M.
        out_features: size of the output.
        kind: one of `KINDS`.
        product: `[K, q]` → float32 `[K, q]`, the product with Mᵀ. K is N or a multiple of it, what belongs to one of
            the N then standing together.

    Returns:
        float32 `[N, out]`.
    """
    inner, outer, blocks = FeatureMaps.of(kind, x.shape[1], out_features, q)
    features = inner(x).reshape(len(x), blocks, q)
    if kind == "rotation" and blocks > 1:
        features = rotated_features(widened(features))
    return outer(product(features.astype(x.dtype).reshape(-1, q)).reshape(len(x), blocks * q))


def compress(x: Array, q: int, kind: str) -> Array:
    """Sums of groups of features, for the kinds that share rows and columns.

    Args:
        x: `[N, in]`.
        q: side of M.
        kind: `sharing`, `grouped`, `grouped_tile` or `strided_interleave`.

    Returns:
        `[N, q]`.
    """
    return compression(kind, x.shape[1], q)(x).astype(x.dtype)


def decompress(y: Array, out_features: int, kind: str) -> Array:
    """Tiled or repeated entries, for the kinds that share rows and columns.

    Args:
        y: `[N, q]`.
        out_features: size of the output.
        kind: as for `compress`.

    Returns:
        `[N, out]`.
    """
    return decompression(kind, out_features, y.shape[1])(y)


def apply(x: Array, m: Array, out_features: int, kind: str = "sharing") -> Array:
    """The update that MoRA adds: compress, multiply by `m`, decompress.

    Args:
        x: `[..., in]`, any number of leading dimensions.
        m: `[q, q]`, laid out as in the authors' files: a compressed input a becomes `a @ m.T`.
        out_features: size of the output.
        kind: one of `KINDS`.

    Returns:
        `[..., out_features]` in the dtype of `x`; the product accumulates in float32.

    Raises:
        ValueError: unknown kind, `m` not square, or of odd side where the kind pairs features.
    """
    if x.ndim < 1:
        raise ValueError("x must have at least one axis, the features; got a scalar")
    _check(m, x.shape[-1], out_features, kind)
    y = _delta(x.reshape(-1, x.shape[-1]), m, out_features, kind)
    return y.astype(x.dtype).reshape(*x.shape[:-1], out_features)


def _fold_rows(rows: Array, in_features: int) -> Array:
    """Adds the rows of cyclic padding back to the features that they repeat. `[S, out]` → `[in, out]`."""
    if rows.shape[0] == in_features:
        return rows
    return jax.ops.segment_sum(rows, np.arange(rows.shape[0]) % in_features, num_segments=in_features)


def contiguous_groups(features: int, q: int) -> np.ndarray:
    """To which of q contiguous groups each feature belongs, `[features]`; the first `features mod q` have one more."""
    size, longer = divmod(features, q)
    return np.repeat(np.arange(q), [size + 1] * longer + [size] * (q - longer))


def delta_weight(m: Array, in_features: int, out_features: int, kind: str = "sharing") -> Array:
    """The dense update as a Flax kernel: `x @ delta_weight(…)` equals `apply(x, …)`.

    Args:
        m: `[q, q]`.
        in_features: inputs of the adapted matrix.
        out_features: outputs of it.
        kind: one of `KINDS`.

    Returns:
        float32 `[in, out]`.

    Raises:
        ValueError: as `apply`.
    """
    q = _check(m, in_features, out_features, kind)
    mt = widened(m).T
    if kind == "truncation":
        kept_in, kept_out = min(q, in_features), min(q, out_features)
        return jnp.zeros((in_features, out_features), mt.dtype).at[:kept_in, :kept_out].set(mt[:kept_in, :kept_out])
    columns = np.arange(out_features)
    if kind in BLOCK_KINDS:
        count = -(-in_features // q)
        turned = rotated_squares(mt.T, count) if kind == "rotation" else jnp.broadcast_to(mt, (count, q, q))
        rows = np.arange(count * q)
        block_of_column = (columns % (count * q)) // q
        values = turned[(rows // q)[:, None], (rows % q)[:, None], (columns % q)[None, :]]
        return _fold_rows(jnp.where((rows // q)[:, None] == block_of_column[None, :], values, 0.0), in_features)
    wide = mt[:, columns % q] if kind in TILED else mt[:, contiguous_groups(out_features, q)]
    if kind in STRIDED:
        padded = -(-in_features // q) * q
        return _fold_rows(wide[np.arange(padded) % q], in_features)
    return wide[contiguous_groups(in_features, q)]


def unused_inputs(in_features: int, out_features: int, rank: int, kind: str) -> int:
    """How many input features have no effect, because the kind leaves out their block (in > out) or their tail.

    Args:
        in_features: inputs of the adapted matrix.
        out_features: outputs of it.
        rank: that of the LoRA with as many parameters.
        kind: one of `KINDS`.

    Returns:
        A number from 0 to `in_features`.

    Raises:
        ValueError: as `square_rank`.
    """
    q = square_rank(in_features, out_features, rank, kind)
    if kind == "truncation":
        return max(0, in_features - q)
    if kind not in BLOCK_KINDS:
        return 0
    return max(0, in_features - used_blocks(in_features, out_features, q) * q)


class MoRA(Adapter):
    """MoRA's square matrix for one matrix, or for one matrix a layer when it carries a leading layer axis."""

    method: ClassVar[str] = "mora"
    on_experts: ClassVar[bool] = True
    config: MoRAConfig

    def __init__(self, in_features: int, out_features: int, config: MoRAConfig, **placing: Any):
        """Takes what every adapter takes (see `Adapter`)."""
        super().__init__(in_features, out_features, config, **placing)
        q = square_rank(in_features, out_features, config.rank, config.kind)
        self.m = self.filled(0.0, (q, q), "square_out", "square_in")

    @classmethod
    def delta(cls, config: MoRAConfig, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        return _delta(x, params["m"] * params["scaling"], out_features, config.kind, product)

    @classmethod
    def grouped(cls, config: MoRAConfig, out_features: int, x: Array, params: Params, product: Dot) -> Array:
        squares = jnp.swapaxes(params["m"] * params["scaling"][:, None, None], 1, 2)  # [E, q, q]

        def products(sums: Array) -> Array:
            return product(sums, squares[:, : sums.shape[1]])

        return update(x, squares.shape[-1], out_features, config.kind, products)

    @classmethod
    def dense(cls, config: MoRAConfig, in_features: int, out_features: int, params: Params) -> Array:
        return delta_weight(params["m"] * params["scaling"], in_features, out_features, config.kind)

    @classmethod
    def fuse(cls, layout: FusedLayout, configs: tuple[MoRAConfig | None, ...]) -> Delta | None:
        return FusedMoRA(layout, tuple(None if config is None else config.kind for config in configs))


class MoRALinear(AdaptedLinear):
    """A Flax NNX linear layer with MoRA: `y = x W + b + decompress(compress(x) Mᵀ)`.

    The kernel `[in, out]` and bias are `nnx.Param` under the names of `nnx.Linear`; `m [q, q]` is an `AdapterParam`.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        rank: LoRA rank of equal parameter count; `square_rank` makes q of it.
        kind: one of `mora_jax.adapters.methods.mora.KINDS`.
        dropout: probability of dropping an input feature of the adapter path (never of the base path); it is on
            unless `layer.eval()` was called, as in `nnx.Dropout`.
        rngs: keys for the parameters, and for dropout when `dropout` > 0.
        **linear: whatever `nnx.Linear` takes: `use_bias`, `dtype`, `param_dtype`, `kernel_init`, …

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> layer = mj.MoRALinear(8, 4, rank=2, kind="rotation", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8))).shape
        (3, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        kind: str = "sharing",
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        rngs = as_rngs(rngs)
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **linear)
        config = MoRAConfig(rank=rank, kind=kind, dropout=dropout)
        adapter = MoRA(in_features, out_features, config)
        adapter.fit(self.kernel.dtype)
        self.put_adapter(adapter, rngs)

    @property
    def m(self) -> AdapterParam:
        """M, float32 `[q, q]`."""
        return self.adapter.m
