"""What a conversion did: one row a matrix, with the error that it made; printed by the types of modules."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from mora_jax.adapters.naming import star

LOSSY = 0.1  # a relative error above it is warned of


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
    """The rows of a conversion; prints as a table with a line for each type of module, layers together.

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
    def warning(self) -> str | None:
        """A sentence where the new adapter lacks more than a tenth of the change (`LOSSY`), else None."""
        if self.error <= LOSSY:
            return None
        return (
            f"what was written differs from the change by {self.error:.3g} of its norm (more than {LOSSY:g}), so it "
            "will answer otherwise"
        )

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
        cells = [("matrix", "layers", "in", "out", "size", "norm", "error", "worst")]
        types: dict[tuple[str, int, int], list[Row]] = {}
        for row in self.rows:
            types.setdefault((star(row.path), row.in_features, row.out_features), []).append(row)
        for (path, inputs, outputs), rows in types.items():
            together, sizes = Conversion("", tuple(rows)), sorted({row.size for row in rows})
            cells.append(
                (
                    path,
                    str(len(rows)),
                    str(inputs),
                    str(outputs),
                    str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}",
                    f"{math.hypot(*(row.norm for row in rows)):.3g}",
                    f"{together.error:.3g}",
                    f"{max(row.relative for row in rows):.3g}",
                )
            )
        widths = [max(len(row[i]) for row in cells) for i in range(8)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 8))]).rstrip()
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
