"""Draws the figures of README and of docs/mora.md.

    python scripts/draw_mora.py

- docs/memory.png: how much LoRA and MoRA write from memory, from the table docs/studies/memorize/quick/cells.csv
- docs/mora_shapes.svg: what the two train on a layer, to scale
- docs/mora_spectrum.png: singular values of both updates at equal parameters, by the library's own layers
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.patches import Rectangle

import mora_jax as mj
from mora_jax.display.figures import new_figure, plain_log, write_figure
from mora_jax.studies.figures import draw_curves, style
from mora_jax.studies.memorize import Memorize
from mora_jax.studies.results import Results

DOCS = Path(__file__).resolve().parent.parent / "docs"
MEMORY = DOCS / "studies" / "memorize" / "quick" / "cells.csv"
LEVEL, ARMS = "128 pairs", ("LoRA r2", "LoRA r8", "MoRA sharing r2", "MoRA rotation r2")
#: Of the layer whose update is drawn: an MLP's of SmolLM2-135M.
INPUTS, OUTPUTS, RANK = 576, 1536, 8


def memory() -> Any:
    """Symbols written from memory: over the steps, and at the end against the parameters that were trained."""
    results = Results.read(MEMORY, Memorize())
    figure = new_figure(10, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_curves(left, results, "generated_accuracy", LEVEL, arms=ARMS, markersize=6, linewidth=2)
    left.set(title="128 random pairs, learned by heart", ylabel="symbols right, written from memory")
    places = {"LoRA r2": (8, 0), "LoRA r8": (8, 0), "MoRA sharing r2": (8, -16), "MoRA rotation r2": (8, 4)}
    for arm in ARMS:
        parameters, mean = results.parameters(arm), results.mean("generated_accuracy", arm, LEVEL)
        look = style(arm, ARMS) | {"markersize": 9, "capsize": 4, "linestyle": "none"}
        right.errorbar(parameters, mean.mean, mean.half, **look)
        name = f"{arm}: {mean.mean:.2f}"
        right.annotate(name, (parameters, mean.mean), places[arm], textcoords="offset points", fontsize=9)
    plain_log(right, "x", ticks=(20_000, 40_000, 80_000))
    right.set(title="after 320 steps", xlabel="trained parameters", xlim=(14_000, 160_000))
    for panel in (left, right):
        panel.set_ylim(-0.04, 1.09)
        panel.axhline(1 / 16, color="0.5", linewidth=1, linestyle=":")
        panel.grid(alpha=0.3)
    left.annotate("guessing", (0, 1 / 16), (2, 3), textcoords="offset points", fontsize=8, color="0.4")
    left.legend(frameon=False)
    return figure


def shapes() -> Any:
    """The frozen matrix, LoRA's two thin ones and MoRA's square one, all to the same scale."""
    figure = new_figure(9, 3.6)
    panels = figure.subplots(1, 3, width_ratios=(1, 1.15, 1))
    scale = 1 / OUTPUTS
    side = round(((INPUTS + OUTPUTS) * RANK) ** 0.5)
    frozen, trained = {"facecolor": "#ebebeb", "edgecolor": "#555555"}, {"facecolor": "#fde3cf", "edgecolor": "#D55E00"}

    def box(panel: Any, x: float, y: float, rows: int, columns: int, look: dict[str, str], text: str) -> None:
        panel.add_patch(Rectangle((x, y - rows * scale), columns * scale, rows * scale, **look))
        panel.annotate(text, (x + columns * scale / 2, y - rows * scale), (0, -5), textcoords="offset points",
                       ha="center", va="top", fontsize=9)  # fmt: skip

    box(panels[0], 0, 0.4, INPUTS, OUTPUTS, frozen, f"W, frozen\n{INPUTS} × {OUTPUTS}")
    box(panels[1], 0, 0.4, INPUTS, RANK, trained, f"A\n{INPUTS} × {RANK}")
    box(panels[1], 0.18, 0.4, RANK, OUTPUTS, trained, f"B, {RANK} × {OUTPUTS}")
    box(panels[2], 0.45, 0.4, side, side, trained, f"M\n{side} × {side}")
    lora, mora = RANK * (INPUTS + OUTPUTS), side * side
    titles = (
        f"the layer\n{INPUTS * OUTPUTS:,} numbers",
        f"LoRA, rank {RANK}\n{lora:,} numbers: rank at most {RANK}",
        f"MoRA, rank {RANK}\n{mora:,} numbers: rank up to {side}",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.set(xlim=(-0.08, 1.22), ylim=(-0.3, 0.5), aspect="equal")
        panel.axis("off")
    return figure


def spectrum() -> Any:
    """Singular values of each update with random factors, the largest set to 1."""
    figure = new_figure(7, 3.6)
    panel = figure.subplots()
    configs = {
        "LoRA": mj.LoRAConfig(rank=RANK),
        "MoRA sharing": mj.MoRAConfig(rank=RANK, kind="sharing"),
        "MoRA rotation": mj.MoRAConfig(rank=RANK, kind="rotation"),
    }
    for name, config in configs.items():
        model = nnx.Sequential(nnx.Linear(INPUTS, OUTPUTS, use_bias=False, rngs=nnx.Rngs(0)))
        before = np.asarray(model.layers[0].kernel[...])
        mj.attach(model, config, rngs=nnx.Rngs(1))
        draws = nnx.Rngs(2)
        for _, node in nnx.iter_graph(model):
            if isinstance(node, mj.AdapterParam):
                node[...] = draws.normal(node.shape)
        mj.merge(model)
        values = np.linalg.svd(np.asarray(model.layers[0].kernel[...]) - before, compute_uv=False)
        values = values[values > 1e-4 * values[0]] / values[0]
        look = style(name) | {"markevery": max(1, len(values) // 10)}
        panel.plot(np.arange(1, len(values) + 1), values, label=f"{name}: rank {len(values)}", **look)
    plain_log(panel, "x", ticks=(1, 8, 32, 128, 576))
    panel.set(xlabel="number of the singular value", ylabel="singular value, relative", ylim=(0, 1.05))
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return figure


def main() -> None:
    for name, draw in (("memory.png", memory), ("mora_shapes.svg", shapes), ("mora_spectrum.png", spectrum)):
        write_figure(draw(), DOCS / name, dpi=110)
        print(f"docs/{name}")


if __name__ == "__main__":
    main()
