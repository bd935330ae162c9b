"""Draws the data flow, `docs/design.svg`: from rows, a checkpoint and a configuration to an adapter.

usage: python scripts/draw_design.py [FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

DEFAULT = Path(__file__).resolve().parent.parent / "docs" / "design.svg"
COLOURS = {"data": "#dceaf7", "frozen": "#ebebeb", "trained": "#fde3cf", "step": "#e3f1dc"}

# name: (centre x, centre y, title, second line, colour)
BOXES = {
    "rows": (1.3, 5, "rows", "JSONL, CSV, Parquet, hub", "data"),
    "text": (4.6, 5, "rendered chat", "each character has a segment", "data"),
    "tokens": (7.9, 5, "tokens and weights", "loss mode: segment → weight", "data"),
    "batches": (11.2, 5, "batches [B, T]", "packed or padded", "data"),
    "checkpoint": (1.3, 3, "checkpoint", "safetensors", "frozen"),
    "base": (4.6, 3, "base weights", "frozen, stacked [L, …]", "frozen"),
    "hidden": (7.9, 3, "hidden states [B, T, D]", "scan over layers", "step"),
    "loss": (11.2, 3, "weighted loss", "vocabulary in chunks", "step"),
    "config": (1.3, 1, "adapter configuration", "method, rank, targets", "trained"),
    "adapters": (4.6, 1, "adapters", "float32, trained", "trained"),
    "update": (11.2, 1, "gradients → optax", "of the adapters alone", "step"),
    "folder": (7.9, -0.9, "PEFT or HF folder", "adapter or merged model", "trained"),
}
ARROWS = [
    ("rows", "text"),
    ("text", "tokens"),
    ("tokens", "batches"),
    ("checkpoint", "base"),
    ("base", "hidden"),
    ("config", "adapters"),
    ("adapters", "hidden"),
    ("hidden", "loss"),
    ("batches", "loss"),
    ("batches", "hidden"),
    ("loss", "update"),
    ("update", "adapters"),
    ("adapters", "folder"),
]
WIDTH, HEIGHT = 2.6, 0.95


def edge(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """Where the line from the centre `start` to the centre `end` leaves the box around `start`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    scale = min(WIDTH / 2 / abs(dx) if dx else 9.0, HEIGHT / 2 / abs(dy) if dy else 9.0)
    return start[0] + dx * scale, start[1] + dy * scale


def draw(path: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "mora-jax"  # the same bytes every time
    figure, axes = plt.subplots(figsize=(10.5, 6))
    for x, y, title, line, colour in BOXES.values():
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=COLOURS[colour], edgecolor="#555555", linewidth=0.9,
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(x, y + 0.14, title, ha="center", va="center", fontsize=8.5, weight="bold", color="#222222")
        axes.text(x, y - 0.2, line, ha="center", va="center", fontsize=7.2, color="#444444")
    for start, end in ARROWS:
        a, b = BOXES[start][:2], BOXES[end][:2]
        style = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", xy=edge(b, a), xytext=edge(a, b), arrowprops=style)
    axes.set_xlim(-0.1, 12.6)
    axes.set_ylim(-1.5, 5.6)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=DEFAULT, help="picture to write (%(default)s)")
    draw(parser.parse_args().path)
