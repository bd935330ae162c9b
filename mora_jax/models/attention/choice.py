"""Which implementation computes attention: the one rule, for the decoder, a run's start and `plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from mora_jax.backend import alone, backend, interpreted
from mora_jax.errors import InputError
from mora_jax.models.attention.causal import Kernel, Rows
from mora_jax.models.attention.cudnn import Cudnn
from mora_jax.models.attention.splash import Splash


class _Way(NamedTuple):
    """An implementation besides XLA's.

    Attributes:
        obstacle: why it can't be used, in words that go on from its name; None where it can.
        make: the kernel.
        pays: whether it is taken without being asked for.
    """

    obstacle: Callable[[Rows], str | None]
    make: Callable[[Rows], Kernel]
    pays: Callable[[Rows], bool]


def _splash_obstacle(rows: Rows) -> str | None:
    return None if backend() == "tpu" or interpreted() else f"needs a TPU, and this is for {backend()}"


def _splash(rows: Rows) -> Kernel:
    shards = None if rows.partitioner is None else rows.partitioner.head_shards(rows.rows)
    return Splash(rows.windows, shards, interpreted())


def _cudnn_obstacle(rows: Rows) -> str | None:
    config = rows.config
    if backend() != "gpu":
        return f"needs an NVIDIA GPU, and this is for {backend()}"
    if jnp.dtype(rows.dtype).name != "bfloat16":
        return f"computes in bfloat16, and model.dtype is {rows.dtype}"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"takes heads of up to 128 numbers, a multiple of 8, and this model has {config.head_dim}"
    if config.attention_softcap is not None:
        return "has no cap on scores, and this model has one"
    if len(rows.windows) > 1:
        return "has one window for all layers, and this model's differ"
    if rows.packed and rows.length % 2:
        return f"takes packed rows of an even length, not of {rows.length} tokens"
    return None


#: Names of `model.attention` besides `auto` and `xla`. The lengths below which XLA's blocks are taken without being
#: asked for: of splash attention by what the TPU's compiler says (benchmarks/results/attention.md); of cuDNN's assumed,
#: and its mask for packed rows shall not take more than 128 MiB a row.
WAYS = {
    "splash": _Way(
        _splash_obstacle, _splash, lambda rows: rows.length >= 1024 and (rows.partitioner is not None or alone())
    ),
    "cudnn": _Way(
        _cudnn_obstacle,
        lambda rows: Cudnn(rows.packed),
        lambda rows: rows.length >= 512 and not (rows.packed and rows.length > 8192),
    ),
}
NAMES = ("auto", "xla", *WAYS)


@dataclass(frozen=True)
class AttentionChoice:
    """`model.attention`, as a decoder holds it.

    Attributes:
        name: `auto` (the first that can be used and pays), `xla`, or a name of `WAYS`.

    Raises:
        InputError: no such name.
    """

    name: str = "auto"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"attention must be one of {', '.join(NAMES)}, got {self.name!r}")

    def check(self, rows: Rows) -> None:
        """Refuses an implementation that can't be had.

        Raises:
            InputError: one line that says why.
        """
        if self.name in WAYS and (obstacle := WAYS[self.name].obstacle(rows)):
            raise InputError(f"model.attention={self.name} {obstacle}; set model.attention=auto, which chooses")

    def implementation(self, rows: Rows) -> str:
        """The implementation by name.

        Raises:
            InputError: the one asked for can't be used; one line that says why.
        """
        if rows.ring() is not None:
            if self.name in WAYS:
                raise InputError(
                    f"model.attention={self.name} takes whole rows, and mesh.context shares each; leave one out"
                )
            return "xla"
        if self.name != "auto":
            self.check(rows)
            return self.name
        found = (name for name, way in WAYS.items() if way.obstacle(rows) is None and way.pays(rows))
        return next(found, "xla")

    def kernel(self, rows: Rows) -> Kernel | None:
        """What computes attention: the ring of `mesh.context`, a kernel, or None for XLA's blocks (attention.py).

        Raises:
            InputError: as `implementation`.
        """
        name = self.implementation(rows)
        return WAYS[name].make(rows) if name in WAYS else rows.ring()
