"""Memory: of the devices during a run, and of a compiled step as the compiler planned it."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax


def device_memory(devices: Sequence[jax.Device]) -> dict[str, int | None]:
    """Bytes on the fullest device now, and at most so far; None on backends without the statistic, such as CPU's."""
    statistics = [stats for stats in map(_stats, devices) if stats]
    used = [int(stats["bytes_in_use"]) for stats in statistics if "bytes_in_use" in stats]
    peak = [int(stats["peak_bytes_in_use"]) for stats in statistics if "peak_bytes_in_use" in stats]
    return {"device_bytes": max(used, default=None), "device_peak_bytes": max(peak, default=None)}


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """The most on one device where devices have the statistic, else the peak resident size of this process."""
    peak = device_memory(devices)["device_peak_bytes"]
    if peak is not None:
        return {"peak_memory_bytes": peak, "peak_memory_of": "device"}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resident * scale, "peak_memory_of": "process"}


def planned_memory(compiled: Any) -> dict[str, int] | None:
    """Bytes a device that a compiled program takes, by what for; None where the backend doesn't tell.

    `arguments` are weights, state and batch; `outputs` that reuse them (`aliased`) take none of their own; `temporary`
    is activations and everything else that comes and goes. `total` is what must fit.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    sizes = {
        "arguments": int(analysis.argument_size_in_bytes),
        "outputs": int(analysis.output_size_in_bytes),
        "aliased": int(analysis.alias_size_in_bytes),
        "temporary": int(analysis.temp_size_in_bytes),
        "code": int(analysis.generated_code_size_in_bytes),
    }
    total = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporary"] + sizes["code"]
    return sizes | {"total": total}


def _stats(device: jax.Device) -> dict[str, Any] | None:
    # A backend without the statistic returns None or raises, depending on its plugin.
    with contextlib.suppress(NotImplementedError, AttributeError):
        return device.memory_stats()
    return None
