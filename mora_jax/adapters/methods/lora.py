"""LoRA: `y = x W + (alpha / rank) · (x A) B` (Hu et al., 2021, arXiv 2106.09685, section 4.1).

A maps in → rank and B maps rank → out. A starts uniform in ±1/√in (Kaiming with a = √5), B at zero, so a fresh
adapter changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mora_jax.adapters.base import Adapter, AdapterParam, AdapterState, Params, as_rngs, constant, over_layers
from mora_jax.adapters.config.common import BIASES, CommonConfig, Pattern, Targets
from mora_jax.adapters.config.limits import positive
from mora_jax.adapters.layers import AdaptedLinear
from mora_jax.adapters.methods import lora_init
from mora_jax.adapters.products.explicit_mesh import whole
from mora_jax.adapters.products.matmul import Delta, Dot, FusedLayout, dot, dot32, dot32_nt, dot32_tn, widened

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva")  # the last needs data, see adapters/eva.py


@dataclass(frozen=True)
class LoRAConfig(CommonConfig):
    """LoRA (Hu et al., 2021, arXiv 2106.09685): a product of two thin factors, scaled by alpha / rank.

    `ΔW = (alpha / rank) · A B` with A `[in, rank]` and B `[rank, out]`.

    Attributes:
        rank: inner size of the update.
        alpha: numerator of the scaling alpha / rank, above 0.
        dropout: probability of dropping a feature at the input of the adapter path.
        targets: which layers: names, a regular expression or `"all-linear"`, see `mora_jax.adapters.config`.
        rank_pattern: other ranks for some layers, by the end of a module path or a regular expression for it; the first
            key that matches counts. Layers of one stack may have different ranks.
        alpha_pattern: other alphas, likewise.
        bias: which existing biases are trained too: `"none"`, `"lora_only"` (of adapted layers) or `"all"`.
        use_dora: whether the columns of the adapted kernel get DoRA's trained magnitude.
        init: where the factors start, see `mora_jax.adapters.methods.lora_init`.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.LoRAConfig(rank=2), rngs=1).trainable  # A [6, 2] and B [2, 4]
        20
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    rank_pattern: Pattern = field(default=(), kw_only=True)
    alpha_pattern: Pattern = field(default=(), kw_only=True)
    bias: str = field(default="none", kw_only=True, metadata={"choices": BIASES})
    use_dora: bool = field(default=False, kw_only=True)
    init: str = field(default="kaiming", kw_only=True, metadata={"choices": INITS, "run_choices": INITS[:-1]})
    grows_with_rank = True
    combinable_as = "LoRA"

    @property
    def tree_refusal(self) -> str:
        if self.init != "eva":
            return super().tree_refusal
        return "init='eva' takes its start from data, which is not seen here; fill lora_a yourself"

    def highest_rank(self, in_features: int, out_features: int) -> int:
        return min(in_features, out_features)

    @property
    def starts_from_base(self) -> bool:
        return self.init in lora_init.FROM_BASE


def init(
    key: Array, in_features: int, out_features: int, rank: int, *, layers: tuple[int, ...] = ()
) -> tuple[Array, Array]:
    """Fresh factors: A uniform in ±1/√in, B zero.

    Args:
        key: of JAX's random numbers.
        in_features: inputs of the adapted matrix.
        out_features: outputs of it.
        rank: inner size of the update.
        layers: axes in front, where several layers are stacked.

    Returns:
        float32 `(lora_a [*layers, in, rank], lora_b [*layers, rank, out])`.

    Raises:
        ValueError: a size or the rank is not a positive integer.
    """
    positive(in_features=in_features, out_features=out_features, rank=rank)
    bound = 1.0 / math.sqrt(in_features)
    lora_a = jax.random.uniform(key, (*layers, in_features, rank), jnp.float32, -bound, bound)
    return lora_a, jnp.zeros((*layers, rank, out_features), jnp.float32)


def _check(lora_a: Array, lora_b: Array, in_features: int | None = None) -> None:
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[1] != lora_b.shape[0]:
        raise ValueError(
            f"lora_a must be [in, rank] and lora_b [rank, out] with one rank; got {lora_a.shape} and {lora_b.shape}"
        )
    if in_features is not None and in_features != lora_a.shape[0]:
        raise ValueError(f"x has {in_features} features, lora_a takes {lora_a.shape[0]} (shape {lora_a.shape})")


def apply(x: Array, lora_a: Array, lora_b: Array, scaling: Array | float = 1.0) -> Array:
    """The update that LoRA adds: `scaling · (x A) B`.

    Args:
        x: `[..., in]`, any number of leading dimensions.
        lora_a: `[in, rank]`.
        lora_b: `[rank, out]`.
        scaling: alpha / rank.

    Returns:
        `[..., out]` in the dtype of `x`; both products accumulate in float32.

    Raises:
        ValueError: the shapes don't fit.
    """
    _check(lora_a, lora_b, x.shape[-1])
    flat = x.reshape(-1, x.shape[-1])
    return thin_products(flat, lora_a, lora_b, scaling).astype(x.dtype).reshape(*x.shape[:-1], lora_b.shape[1])


def thin_products(x: Array, lora_a: Array, lora_b: Array, scaling: Array | float, product: Dot = dot) -> Array:
    """`x [N, in]` by one thin factor and then the other, with a factor on the features between them."""
    hidden = product(x, lora_a) * scaling  # [N, in] @ [in, rank] → [N, rank], thin
    return product(hidden.astype(x.dtype), lora_b)  # [N, rank] @ [rank, out] → [N, out]


def delta_weight(lora_a: Array, lora_b: Array, scaling: Array | float = 1.0) -> Array:
    """The dense update `scaling · A B` as a Flax kernel.

    Args:
        lora_a: `[in, rank]`.
        lora_b: `[rank, out]`.
        scaling: alpha / rank.

    Returns:
        float32 `[in, out]`.

    Raises:
        ValueError: the shapes don't fit.
    """
    _check(lora_a, lora_b)
    product = jnp.matmul(widened(lora_a), widened(lora_b), precision=jax.lax.Precision.HIGHEST)
    return product * scaling


def _grouped(x: Array, params: Params, product: Dot) -> Array:
    """`thin_products` with each expert's factors, `[E, in, rank]` and `[E, rank, out]`."""
    scaling = params["scaling"][:, None] * params.get("rank_mask", 1.0)  # [E, rank] or [E, 1]
    hidden = product(x, params["lora_a"] * scaling[:, None])
    return product(hidden.astype(x.dtype), params["lora_b"])


def _dense(params: Params) -> Array:
    scaling = scaling_of(params)
    if scaling.ndim:
        return delta_weight(params["lora_a"] * scaling, params["lora_b"])
    return delta_weight(params["lora_a"], params["lora_b"], scaling)


def scaling_of(params: Params) -> Array:
    """The factor on the hidden features: `[]`, or `[rank]` where layers of a stack have their own ranks."""
    mask = params.get("rank_mask")
    return params["scaling"] if mask is None else params["scaling"] * mask


def initial_of(params: Params | None) -> Params | None:
    """The factors that the update is counted from, in place of the trained ones; None where it starts at zero."""
    if params is None or "initial_a" not in params:
        return None
    return params | {"lora_a": params["initial_a"], "lora_b": params["initial_b"]}


def _from_start(params: Params, update: Callable[[Params], Array]) -> Array:
    """The update, counted from that of the initial factors where there are such."""
    first = initial_of(params)
    return update(params) if first is None else update(params) - update(first)


class LoRA(Adapter):
    """LoRA's factors for one matrix, or for one matrix a layer when they carry a leading layer axis."""

    method: ClassVar[str] = "lora"
    by_products: ClassVar[bool] = True
    file_method: ClassVar[str] = "lora"
    file_config: ClassVar[type[LoRAConfig]] = LoRAConfig
    frozen_a: ClassVar[bool] = False
    on_embeddings: ClassVar[bool] = True
    on_experts: ClassVar[bool] = True
    config: LoRAConfig

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig, *, rngs: nnx.Rngs, **placing: Any):
        """Takes what every adapter takes (see `Adapter`)."""
        super().__init__(in_features, out_features, config, **placing)
        lora_a, lora_b = init(rngs.params(), in_features, out_features, config.rank, layers=self.layers)
        if config.init == "gaussian":
            lora_a = jax.random.normal(rngs.params(), lora_a.shape, jnp.float32) / config.rank
        elif config.init == "orthogonal":
            if config.rank % 2:
                raise ValueError(f"orthogonal halves its rank, which must be even, not {config.rank}")
            keys = jax.random.split(rngs.params(), self.layers) if self.layers else rngs.params()
            draw = partial(lora_init.orthogonal, in_features=in_features, out_features=out_features, rank=config.rank)
            lora_a, lora_b = over_layers(len(self.layers), draw, (keys,))
        self.lora_a: nnx.Variable = AdapterParam(lora_a, axes=self.stacked(self.axes[0], "rank"))
        self.lora_b = AdapterParam(lora_b, axes=self.stacked("rank", self.axes[1]))

    def limit_ranks(self, ranks: np.ndarray) -> None:
        """Gives each layer of a stack its own rank: what is beyond it has no effect and gets no gradient."""
        used = np.arange(self.config.rank) < np.asarray(ranks).reshape(*self.layers, 1)
        self.rank_mask = AdapterState(constant(used.astype(np.float32)), axes=self.stacked("rank"))

    @classmethod
    def for_embedding(
        cls, num_embeddings: int, features: int, config: LoRAConfig, *, rngs: nnx.Rngs, **placing: Any
    ) -> LoRA:
        """LoRA on an embedding table `[V, D]`: A `[V, rank]` zero, B `[rank, D]` normal, as PEFT starts them."""
        adapter = cls(num_embeddings, features, config, rngs=rngs, axes=("vocab", "embed"), **placing)
        adapter.lora_a[...] = jnp.zeros_like(adapter.lora_a[...])
        adapter.lora_b[...] = jax.random.normal(rngs.params(), adapter.lora_b.shape, jnp.float32)
        return adapter

    def init_from_kernel(self, kernel: Callable[[], Array]) -> None:
        init = self.config.init
        if init in lora_init.FROM_BASE:
            rank = self.config.rank
            if rank > min(self.in_features, self.out_features):
                raise ValueError(
                    f"{init} takes its start from a kernel of {self.in_features} by {self.out_features}, which has no "
                    f"rank {rank}"
                )
            find = lora_init.pissa if init == "pissa" else lora_init.olora
            lora_a, lora_b = self.map_layers(lambda p, w: find(w, rank, p["scaling"]), whole(kernel()))
            self.lora_a[...], self.lora_b[...] = lora_a, lora_b
            # Copies: what is trained is donated to the step, what is frozen is not.
            self.initial_a = AdapterState(jnp.copy(lora_a), axes=self.stacked(self.axes[0], "rank"))
            self.initial_b = AdapterState(jnp.copy(lora_b), axes=self.stacked("rank", self.axes[1]))
        super().init_from_kernel(kernel)

    @classmethod
    def rows(cls, ids: Array, dtype: Any, params: Params) -> Array:
        """What is added to looked-up rows of an embedding table, float32 `[..., D]`."""
        picked = (jnp.take(params["lora_a"], ids, axis=0) * scaling_of(params)).astype(dtype)
        flat = dot(picked.reshape(-1, picked.shape[-1]), params["lora_b"])
        return flat.reshape(*ids.shape, flat.shape[-1])

    @classmethod
    def scores(cls, query: Array, params: Params) -> Array:
        """What is added to products of `query [..., D]` with every row of an embedding table, float32 `[..., V]`."""
        flat = query.reshape(-1, query.shape[-1])
        hidden = (dot(flat, params["lora_b"].T) * scaling_of(params)).astype(query.dtype)
        return dot(hidden, params["lora_a"].T).reshape(*query.shape[:-1], len(params["lora_a"]))

    @classmethod
    def scale(cls, config: LoRAConfig) -> float:
        return config.alpha / config.rank**config.scale_power

    @classmethod
    def delta(cls, config: LoRAConfig, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        return _from_start(params, lambda p: thin_products(x, p["lora_a"], p["lora_b"], scaling_of(p), product))

    @classmethod
    def grouped(cls, config: LoRAConfig, out_features: int, x: Array, params: Params, product: Dot) -> Array:
        return _from_start(params, lambda p: _grouped(x, p, product))

    @classmethod
    def dense(cls, config: LoRAConfig, in_features: int, out_features: int, params: Params) -> Array:
        return _from_start(params, _dense)

    @classmethod
    def in_file(cls, config: LoRAConfig, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """One pair of factors: `A B − A₀ B₀` is `[A A₀] [B; −B₀]`."""
        params = dict(params)
        first_a, first_b = params.pop("initial_a", None), params.pop("initial_b", None)
        rank = params["lora_a"].shape[1]
        if first_a is not None and first_b is not None:
            params["lora_a"] = np.concatenate([params["lora_a"], first_a[:, :rank]], axis=1)
            params["lora_b"] = np.concatenate([params["lora_b"], -first_b[:rank]], axis=0)
            rank *= 2
        same = {name: getattr(config, name) for name in ("alpha", "dropout", "targets", "use_dora", "bias")}
        return cls.file_config(rank=rank, **same), params

    @classmethod
    def low_rank(
        cls, config: LoRAConfig, in_features: int, out_features: int, params: dict[str, Any]
    ) -> tuple[Any, Any]:
        return params["lora_a"], params["lora_b"]

    @classmethod
    def continues(cls, config: LoRAConfig, given: Any) -> bool:
        return isinstance(given, LoRAConfig) and given.scale_power == config.scale_power

    @classmethod
    def fuse(cls, layout: FusedLayout, configs: tuple[LoRAConfig | None, ...]) -> Delta | None:
        return FusedLoRA(layout, cls.frozen_a)


@dataclass(frozen=True)
class FusedLoRA:
    """LoRA on several matrices with one input, as one pair of products: A side by side, B block-diagonal.

    The backward is written out: autodiff compiles the contractions over tokens into transposed copies of the large
    operand.
    """

    layout: FusedLayout
    frozen_a: bool = False

    def _factors(self, params, dtype) -> tuple[Array, Array, Array]:
        """A `[in, R]`, B `[R, features]` in `dtype` and the scaling `[R]`, R the sum of the ranks."""
        used = [p for p in params if p is not None]
        lora_a = jnp.concatenate([p["lora_a"].astype(dtype) for p in used], axis=1)
        scaling = jnp.concatenate([jnp.broadcast_to(scaling_of(p), p["lora_a"].shape[1:]) for p in used])
        if len(params) == 1:
            return lora_a, used[0]["lora_b"].astype(dtype), scaling
        rows = []
        for i, p in enumerate(params):
            if p is not None:
                rank = p["lora_b"].shape[0]
                blocks = [jnp.zeros((rank, self.layout.part_features(j)), dtype) for j in range(len(params))]
                blocks[i] = p["lora_b"].astype(dtype)
                rows.append(self.layout.join(blocks))
        return lora_a, jnp.concatenate(rows, axis=0), scaling

    def _product(self, x: Array, params) -> tuple[Array, Array]:
        lora_a, lora_b, scaling = self._factors(params, x.dtype)
        hidden = (dot32(x, lora_a) * scaling).astype(x.dtype)
        return dot32(hidden, lora_b), hidden

    def forward(self, x: Array, params):
        """As `Delta.forward`."""
        y, hidden = self._product(x, params)
        first = tuple(initial_of(p) for p in params)
        if any(p is not None for p in first):
            # As a product of its own, so that a fresh update cancels to the last bit.
            y = y - self._product(x, first)[0]
        return y, (None if self.frozen_a else x, hidden, params)

    def backward(self, residuals, dy: Array):
        """As `Delta.backward`."""
        x, hidden, params = residuals
        dtype = hidden.dtype
        lora_a, lora_b, scaling = self._factors(params, dtype)
        dhidden = (dot32_nt(dy, lora_b) * scaling).astype(dtype)
        dx = dot32_nt(dhidden, lora_a)
        first = tuple(initial_of(p) for p in params)
        if any(p is not None for p in first):
            first_a, first_b, scaling = self._factors(first, dtype)
            dx = dx - dot32_nt((dot32_nt(dy, first_b) * scaling).astype(dtype), first_a)
        da = None if x is None else dot32_tn(x, dhidden)
        db = dot32_tn(hidden, dy)
        gradients: list[dict[str, Array | None] | None] = []
        start = 0
        for i, p in enumerate(params):
            if p is None:
                gradients.append(None)
                continue
            rows = slice(start, start + p["lora_b"].shape[0])
            start = rows.stop
            part = self.layout.take(db[rows].reshape(-1, *self.layout.out_shape), i)
            gradients.append(dict.fromkeys(p) | {"lora_a": None if da is None else da[:, rows], "lora_b": part})
        return dx, tuple(gradients)


class LoRALinear(AdaptedLinear):
    """A Flax NNX linear layer with LoRA: `y = x W + b + (alpha / rank) · (x A) B`.

    The kernel `[in, out]` and bias are `nnx.Param` under the names of `nnx.Linear`; the factors are `AdapterParam`.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        rank: inner size of the update.
        alpha: numerator of the scaling alpha / rank.
        dropout: probability of dropping an input feature of the adapter path (never of the base path); it is on
            unless `layer.eval()` was called, as in `nnx.Dropout`.
        rngs: keys for the parameters, and for dropout when `dropout` > 0.
        **linear: whatever `nnx.Linear` takes: `use_bias`, `dtype`, `param_dtype`, `kernel_init`, …

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> layer = mj.LoRALinear(8, 4, rank=2, alpha=4.0, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8))).shape
        (3, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rngs: Any,
        **linear: Any,
    ):
        rngs = as_rngs(rngs)
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **linear)
        config = LoRAConfig(rank=rank, alpha=alpha, dropout=dropout)
        adapter = LoRA(in_features, out_features, config, rngs=rngs)
        adapter.fit(self.kernel.dtype)
        self.put_adapter(adapter, rngs)

    @property
    def lora_a(self) -> AdapterParam:
        """A, float32 `[in, rank]`."""
        return self.adapter.lora_a

    @property
    def lora_b(self) -> AdapterParam:
        """B, float32 `[rank, out]`."""
        return self.adapter.lora_b
