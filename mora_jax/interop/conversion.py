"""What a conversion did: one row a matrix, with the error that it made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One converted matrix.

    Attributes:
        path: its module path.
        in_features, out_features: its sizes.
        size: the rank of the LoRA, or the side of MoRA's matrix.
        norm: Frobenius norm of the update before.
        error: Frobenius norm of what the new update lacks of it.
    """

    path: str
    in_features: int
    out_features: int
    size: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """`error / norm`; 0 for an update of zero."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Conversion:
    """The rows of a conversion; prints as a table.

    Attributes:
        method: what came out, in words.
        rows: one a matrix.
        left_out: tensors that changed too but that no adapter of these targets holds, with the norm of their change.
    """

    method: str
    rows: tuple[Row, ...]
    left_out: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Relative Frobenius error over all matrices together."""
        norm = math.hypot(*(row.norm for row in self.rows))
        return math.hypot(*(row.error for row in self.rows)) / norm if norm else 0.0

    @property
    def left_out_share(self) -> float:
        """Norm of what was left out, relative to the norm of the whole change."""
        left = math.hypot(*self.left_out.values())
        whole = math.hypot(left, *(row.norm for row in self.rows))
        return left / whole if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        rows = [asdict(row) | {"relative_error": row.relative} for row in self.rows]
        return {
            "method": self.method,
            "relative_error": self.error,
            "matrices": rows,
            "left_out": dict(self.left_out),
            "left_out_share": self.left_out_share,
        }

    def __str__(self) -> str:
        cells = [("matrix", "in", "out", "size", "norm", "error")]
        cells += [
            (r.path, str(r.in_features), str(r.out_features), str(r.size), f"{r.norm:.4g}", f"{r.relative:.3g}")
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 6))]).rstrip()
            for row in cells
        ]
        lines.append(f"{self.method}, {len(self.rows)} matrices: relative Frobenius error {self.error:.3g} in total")
        if self.left_out:
            names = sorted(self.left_out, key=lambda name: -self.left_out[name])
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            lines.append(
                f"left out: {len(names)} other tensors changed too ({shown}), {self.left_out_share:.3g} of the whole "
                "change's norm"
            )
        return "\n".join(lines)
