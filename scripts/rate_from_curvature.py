"""Does the curvature at the start tell a learning rate, as arXiv 2602.04998 finds? Asked of study `rates` quick.

    python scripts/rate_from_curvature.py            writes docs/studies/rates/quick/curvature.csv

For every arm and some of the reported seeds: the largest eigenvalue of the Hessian of the loss over what is trained,
before the first step, on `--rows` of the rows that the arm is trained on. Products of the Hessian and a vector are
central differences of gradients in float32 (a step ten times as small moves eigenvalues by 4 % at most); eigenvalues
come of Lanczos' method. LoRA+ trains B at 16 times the rate, so its Hessian is that in coordinates with one rate.
scripts/studies_page.py sets the table against the rates that were chosen.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh

from mora_jax import demo
from mora_jax.studies.cells import cell_config
from mora_jax.studies.results import Results
from mora_jax.studies.run import STUDIES
from mora_jax.studies.study import REPORTED, Cell, Sources
from mora_jax.training.build_step import assemble
from mora_jax.training.config.schema import Config
from mora_jax.training.setup import prepare
from mora_jax.training.step import Keys, TokenLoss

FOLDER = Path(__file__).parents[1] / "docs/studies/rates/quick"
STEP = 1e-3  # of a difference, in norms of the weights


def largest_eigenvalue(config: Config, rows: int) -> float:
    """Of the Hessian at the start of a run, over the trained arrays, on its first rows."""
    setup = prepare(config)
    assembly = assemble(setup.model, config, setup.plan.steps, setup.mesh)
    batch = setup.batches.dataset.batch([np.array([row]) for row in range(rows)], rows, setup.batches.length)
    batch = {name: jnp.asarray(value)[None] for name, value in batch.items()}
    loss_of, settings, frozen = TokenLoss(), assembly.settings, assembly.frozen
    start, unravel = ravel_pytree(assembly.adapters)
    scale, _ = ravel_pytree(
        {
            name: jnp.full_like(value, math.sqrt(_rate_of(assembly.rates, name)))
            for name, value in assembly.adapters.items()
        }
    )

    @jax.jit
    def gradient(weights: jax.Array, frozen: Any) -> jax.Array:
        def loss(weights: jax.Array) -> jax.Array:
            adapters = unravel(weights)
            stacked, _, _ = loss_of.rows(settings, assembly.structure, adapters, frozen, batch)
            one = jax.tree.map(lambda x: x[0], stacked)
            return loss_of(settings, assembly.structure.model(adapters, frozen), frozen, one, Keys(None, None))[0]

        return jax.grad(loss)(weights)

    def product(vector: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(vector)
        direction = scale * jnp.asarray(vector.ravel() / length, jnp.float32)
        step = STEP * max(float(jnp.linalg.norm(start)), 1.0)
        difference = gradient(start + step * direction, frozen) - gradient(start - step * direction, frozen)
        return np.asarray(scale * difference, np.float64) / (2 * step) * length

    operator = LinearOperator((start.size, start.size), matvec=product, dtype=np.float64)
    first = np.random.default_rng(0).standard_normal(start.size)
    return float(eigsh(operator, k=1, which="LA", v0=first, tol=1e-2, return_eigenvectors=False)[0])


def _rate_of(rates: Any, name: str) -> float:
    return 1.0 if rates is None else next((rate for end, rate in rates.items() if name.endswith(end)), 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER / "curvature.csv")
    options = parser.parse_args()
    study = STUDIES["rates"]
    results = Results.read(FOLDER / "cells.csv", study)
    model = str(demo.model_path())
    lines = [["arm", "seed", "largest_eigenvalue"]]
    with tempfile.TemporaryDirectory() as folder:
        for level, arm in results.preset.pairs():
            if level.values != results.preset.levels[0].values:
                continue  # the same rows and the same batch size for all
            for seed in range(1, options.seeds + 1):
                data = study.write_data(results.preset, level, seed, Path(folder), Sources(model))
                config = cell_config(Cell(level, arm, 1e-3, seed, REPORTED), results.preset, model, data, folder)
                value = largest_eigenvalue(config, options.rows)
                print(f"{arm.name}, seed {seed}: {value:.4g}", flush=True)
                lines.append([arm.name, str(seed), f"{value:.6g}"])
    with options.out.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


if __name__ == "__main__":
    main()
