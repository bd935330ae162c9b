"""The table at the end of a run: where the time and the memory went, and what opens what was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PARTS = ("device", "data_wait", "host")


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, words) of whatever the summary holds beyond its headline."""
    rows = [
        ("time", _time(summary)),
        ("steps", _steps(summary)),
        ("compute", _compute(summary)),
        ("memory", _memory(summary)),
        ("result", summary.get("result") or ""),
        *summary.get("open", {}).items(),
    ]
    return [(name, words) for name, words in rows if words]


def bytes_words(number: float) -> str:
    """`3.2 GB`, `12 MB`: in powers of 1000, as makers of memory count."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _time(summary: Mapping[str, Any]) -> str:
    if "step_seconds" not in summary:
        return ""
    steps, compiling = summary["step_seconds"], summary["compile_seconds"]
    others = summary["other_compile_seconds"]
    rest = max(summary["wall_seconds"] - steps - compiling - others, 0.0)
    return (
        f"steps {steps:,.1f} s, compiling {compiling + others:,.1f} s (the step {compiling:,.1f} s), "
        f"evaluating, saving and other {rest:,.1f} s"
    )


def _steps(summary: Mapping[str, Any]) -> str:
    if not summary.get("step_seconds"):
        return ""
    device, data, host = (summary[f"{part}_seconds"] / summary["step_seconds"] for part in _PARTS)
    return f"{device:.1%} waiting for the device, {data:.1%} waiting for data, {host:.1%} the loop itself"


def _compute(summary: Mapping[str, Any]) -> str:
    if not summary.get("flops_per_token") or not summary["tokens_per_second"]:
        return ""
    flops = summary["flops_per_token"] * summary["tokens_per_second"]
    rate = f"{flops / 1e12:,.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.3g} GFLOP/s"
    if summary.get("mfu") is None:
        return f"{rate}; no MFU, as this device's peak isn't known"
    return f"{rate}, MFU {summary['mfu']:.1%} ({summary['mfu_convention']})"


def _memory(summary: Mapping[str, Any]) -> str:
    if "peak_memory_of" not in summary:
        return ""
    words = f"at most {bytes_words(summary['peak_memory_bytes'])} in this {summary['peak_memory_of']}"
    planned = summary.get("step_memory_bytes")
    return words + (f"; the compiled step takes {bytes_words(planned['total'])} a device" if planned else "")
