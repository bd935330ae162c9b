"""ReMoRA: MoRA folded into the base again and again, each time with the next kind (Jiang et al., 2024, section 5.3).

The kind is data, not structure: one compiled step serves all of them. The kinds in question differ only in how they
sum inputs into groups (strided or contiguous) and how they spread outputs (tiled or repeated); both sides are cheap
beside the product with M, so where the cycle has both forms of a side, both are computed and one is selected.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mora_jax.adapters.base import AdapterState, Params
from mora_jax.adapters.config.common import RestartConfig
from mora_jax.adapters.config.limits import Number
from mora_jax.adapters.methods.mora import SHARED, STRIDED, TILED, MoRA, MoRAConfig, compress, decompress, delta_weight
from mora_jax.adapters.products.matmul import Dot, FusedLayout, dot, widened


@dataclass(frozen=True)
class ReMoRAConfig(RestartConfig, MoRAConfig):
    """ReMoRA (Jiang et al., 2024, arXiv 2405.12130, section 5.3): MoRA, merged and reinitialised as another kind.

    One kind can only reach updates that its groups allow; the next kind groups differently. The attributes are those of
    `MoRAConfig`, with `kinds` in place of `kind`, those of `RestartConfig`, and:

    Attributes:
        kinds: the kinds in turn, the first again after the last: some of `sharing`, `grouped`, `grouped_tile` and
            `strided_interleave`, which share one M among groups and have the same side q.
        prune: as in `RestartConfig`; the authors reset all of the moments.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> mj.attach(model, mj.ReMoRAConfig(rank=2, restart_every=1000), rngs=1).trainable  # as MoRA's, at any time
        16
    """

    kind: ClassVar[str] = "sharing"  # type: ignore[misc]  # for sizes and reports alone: all kinds agree in them
    kinds: tuple[str, ...] = field(default=("sharing", "grouped", "grouped_tile", "strided_interleave"), kw_only=True)
    prune: float = field(default=1.0, kw_only=True, metadata={"limits": Number(at_least=0, at_most=1)})

    def __post_init__(self):
        super().__post_init__()
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        if not kinds or any(kind not in SHARED for kind in kinds):
            raise ValueError(f"kinds must be some of {', '.join(SHARED)}, not {self.kinds!r}")
        object.__setattr__(self, "kinds", kinds)


class ReMoRA(MoRA):
    """MoRA that can be reinitialised with the next of its kinds.

    Attributes:
        turn: float32 `[*layers]`, the number of the current kind in `config.kinds`.
    """

    method: ClassVar[str] = "remora"
    on_experts: ClassVar[bool] = False
    file_method: ClassVar[str] = "mora"
    config: ReMoRAConfig

    def __init__(self, in_features: int, out_features: int, config: ReMoRAConfig, **options: Any):
        super().__init__(in_features, out_features, config, **options)
        self.turn = AdapterState(jnp.zeros(self.layers, jnp.float32), axes=self.stacked())

    @classmethod
    def delta(cls, config: Any, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        m, kinds = params["m"] * params["scaling"], config.kinds
        choose = partial(_choose, kinds, params["turn"])
        sums = choose(STRIDED, lambda kind: compress(widened(x), m.shape[0], kind))
        y = product(sums.astype(x.dtype), m.T)
        return choose(TILED, lambda kind: decompress(y, out_features, kind))

    @classmethod
    def dense(cls, config: Any, in_features: int, out_features: int, params: Params) -> Array:
        forms = [
            partial(delta_weight, in_features=in_features, out_features=out_features, kind=k) for k in config.kinds
        ]
        return jax.lax.switch(params["turn"].astype(jnp.int32), forms, params["m"] * params["scaling"])

    @classmethod
    def in_file(cls, config: ReMoRAConfig, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The MoRA of the kind whose turn it is."""
        same = {name: getattr(config, name) for name in ("rank", "dropout", "targets", "use_dora")}
        arrays = {name: value for name, value in params.items() if name != "turn"}
        return MoRAConfig(kind=config.kinds[int(params["turn"])], **same), arrays

    @classmethod
    def fuse(cls, layout: FusedLayout, configs: tuple[Any, ...]) -> None:
        """None: which kind it is, data decides."""

    def renew(self, key: Array) -> None:
        """A zero M of the next kind; what was trained must have been folded into the base before."""
        self.m[...] = jnp.zeros_like(self.m[...])
        self.turn[...] = (self.turn[...] + 1) % len(self.config.kinds)


def _choose(kinds: tuple[str, ...], turn: Array, group: tuple[str, ...], form: Any) -> Array:
    """`form(kind)` of the current kind, where kinds in `group` agree in it and so do the others."""
    inside = [kind for kind in kinds if kind in group]
    outside = [kind for kind in kinds if kind not in group]
    if not inside or not outside:
        return form(kinds[0])
    member = jnp.asarray([kind in group for kind in kinds])[turn.astype(jnp.int32)]
    return jnp.where(member, form(inside[0]), form(outside[0]))
