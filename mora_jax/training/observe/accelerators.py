"""What accelerators can do, from their makers' data sheets: one table, for utilisation and for planning.

A device that is not in the table has no figures here, and whatever needs them says so instead of guessing.
"""

from __future__ import annotations

from dataclasses import dataclass

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
