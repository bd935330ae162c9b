"""Floating-point operations of a training step, by two named conventions, and the utilisation that follows.

PaLM's convention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) counts 6N + 12·L·H·Q·T a token: N weights that
multiply activations, each with one multiplication and one addition (2N) forward, for the gradient of the activations
and for the gradient of the weights; L layers, H heads of size Q, T tokens in sight. Remat's second forward pass,
optimizer and elementwise work don't count, nor does a causal mask halve the attention.

Adapters need less: frozen weights have no gradient, so `needed` counts 2N + 2N + 2·(trained N) + 12·L·H·Q·T, and the
output head only for tokens that carry loss, the only ones whose logits are computed. Where every weight is trained
and every token carries loss, it is PaLM's number.

What accelerators can do is from their makers' data sheets: one table, for utilisation and for planning. A device that
is not in the table has no figures here, and whatever needs them says so instead of guessing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mora_jax.models.config import DecoderConfig
from mora_jax.training.update_rules import decays

_GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One kind of chip; JAX counts each as one device.

    Attributes:
        name: short name, as in `v5e-8` or `h100x8`.
        kinds: what JAX calls it (`jax.Device.device_kind`).
        bf16_flops: peak dense bfloat16 FLOP/s; sparsity, which data sheets of GPUs often include, does not count.
        memory_bytes: high-bandwidth memory.
        memory_bandwidth: of that memory, bytes/s.
    """

    name: str
    kinds: tuple[str, ...]
    bf16_flops: float
    memory_bytes: int
    memory_bandwidth: float


# TPUs: Google Cloud's page of each version; v4 and v5p with both cores as one device, which is the default.
# GPUs: NVIDIA's data sheets of A100, H100, H200, L4 and L40S.
_TABLE = (
    Accelerator("v4", ("TPU v4",), 275e12, 32 * _GIB, 1.2e12),
    Accelerator("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 8.19e11),
    Accelerator("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2.765e12),
    Accelerator("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1.64e12),
    Accelerator("a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 40 * _GIB, 1.555e12),
    Accelerator("a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 312e12, 80 * _GIB, 2.039e12),
    Accelerator("h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 80 * _GIB, 3.35e12),
    Accelerator("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80 * _GIB, 2e12),
    Accelerator("h200", ("NVIDIA H200",), 989.4e12, 141 * 10**9, 4.8e12),
    Accelerator("l4", ("NVIDIA L4",), 121e12, 24 * _GIB, 3e11),
    Accelerator("l40s", ("NVIDIA L40S",), 362e12, 48 * _GIB, 8.64e11),
)

#: By short name.
ACCELERATORS = {entry.name: entry for entry in _TABLE}


def by_device_kind(kind: str) -> Accelerator | None:
    """The accelerator that JAX calls `kind`, or None where the table has no such entry."""
    return next((entry for entry in _TABLE if kind in entry.kinds), None)


#: The convention of `mfu`, in words.
CONVENTION = "4N + 2N_trained + 12LHQT a token, head for tokens with loss; against dense bf16 peak"


@dataclass(frozen=True)
class StepFlops:
    """What decides the FLOPs of a step, for the whole run, all devices together.

    Attributes:
        body: N without the output head: numbers in matrices that multiply activations, adapters' too; of experts those
            that a token has.
        body_trained: those of them that are trained.
        head: numbers in the output head; where embeddings are tied, the embedding.
        head_trained: those of them that are trained.
        attention: forward FLOPs of scores and values a token: 4·H·Q·(tokens in sight), summed over layers.
        base_passes, tuned_passes: further forward passes of a step, of the frozen base and of the tuned model: for a
            divergence, a reference, KTO's estimate.
    """

    body: int
    body_trained: int
    head: int
    head_trained: int
    attention: float
    base_passes: int = 0
    tuned_passes: int = 0

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        trained: Mapping[str, jax.Array],
        frozen: Mapping[str, jax.Array],
        lengths: Sequence[int] | np.ndarray,
        *,
        base_passes: int = 0,
        tuned_passes: int = 0,
        packed: Mapping[str, int] | None = None,
    ) -> StepFlops:
        """Counts a model's weights.

        Args:
            config: of the decoder.
            trained, frozen: its arrays (or their shapes) by dotted path, as `partition` splits them.
            lengths: tokens of each training example; a token sees no other example than its own.
            base_passes, tuned_passes: see the attributes.
            packed: how many numbers arrays of quantised kernels stand for (`packed_sizes`).
        """
        packed = packed or {}
        body = {True: 0, False: 0}
        head = {True: 0, False: 0}
        for arrays, is_trained in ((trained, True), (frozen, False)):
            for name, array in arrays.items():
                if not decays(name, array):
                    continue  # vectors: no matrix product
                first = name.partition(".")[0]
                size = packed.get(name, array.size)
                experts = _stack_of(config, name).experts
                if experts is not None and re.match(r"layers(\.\d+)?\.mlp\.(experts\.)?(gate_up|down)", name):
                    size = size * experts.per_token // experts.count  # those that a token has
                if first == "lm_head" or (first == "embed_tokens" and config.tie_embeddings):
                    head[is_trained] += size
                elif not name.startswith(("embed_", "layer_inputs.table.")):  # rows are looked up
                    body[is_trained] += size
        attention = 0.0
        for layer, window in zip(config.by_layer, config.windows, strict=True):
            if (delta := layer.delta) is not None:  # the state is read twice and written once
                attention += 6 * delta.value_heads * delta.key_dim * delta.value_dim
            else:
                attention += 4 * layer.num_heads * layer.head_dim * span(lengths, window)
        passes = base_passes, tuned_passes
        return cls(sum(body.values()), body[True], sum(head.values()), head[True], attention, *passes)

    def needed(self, tokens: int, trained_tokens: int) -> float:
        """FLOPs that a step needs.

        Args:
            tokens: all that are not padding.
            trained_tokens: those that carry loss.
        """
        body = 4 * self.body + 2 * self.body_trained + 3 * self.attention
        head = 4 * self.head + 2 * self.head_trained
        passes = self.base_passes + self.tuned_passes
        body += passes * (2 * self.body + self.attention) - self.base_passes * 2 * self.body_trained
        head += passes * 2 * self.head
        return tokens * body + trained_tokens * head

    def palm(self, tokens: int) -> float:
        """FLOPs of a step that would train every weight on every token, by PaLM's convention."""
        return tokens * (6 * (self.body + self.head) + 3 * self.attention)


def _stack_of(config: DecoderConfig, name: str) -> DecoderConfig:
    """The description of the stack of layers that an array is in; that of the model for others."""
    first, second, *_ = (*name.split("."), "")
    stacks = [stack for run in config.runs for stack in run]
    return stacks[int(second)] if first == "layers" and second.isdigit() else config


def span(lengths: Sequence[int] | np.ndarray, window: int | None = None) -> float:
    """Tokens in sight of a token, on average: the T of PaLM's formula for examples of any length.

    Args:
        lengths: tokens of each example.
        window: how far a layer sees; None: the whole example.
    """
    tokens = np.asarray(lengths, np.float64)
    seen = tokens if window is None else np.minimum(tokens, window)
    return float((tokens * seen).sum() / max(tokens.sum(), 1.0))


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Peak dense bfloat16 FLOP/s of devices together; None where one of them is not in the table."""
    accelerators = [by_device_kind(device.device_kind) for device in devices]
    known = [entry.bf16_flops for entry in accelerators if entry is not None]
    return sum(known) if len(known) == len(accelerators) else None
