"""The names under which writers group a run's numbers."""

from collections.abc import Mapping
from typing import Any

_SPEED = frozenset(
    {"tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", "host_seconds", "device_seconds"}
)  # fmt: skip


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers under the names that plots are grouped by: `train/loss`, `eval/loss`, `speed/mfu`, ..."""
    found = {}
    for name, value in row.items():
        if name == "step" or value is None:
            continue
        if name.startswith("eval_"):
            tag = f"eval/{name.removeprefix('eval_')}"
        elif name in _SPEED:
            tag = f"speed/{name}"
        else:
            tag = f"memory/{name}" if name.endswith("_bytes") else f"train/{name}"
        found[tag] = float(value)
    return found
