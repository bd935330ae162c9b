"""Whether published models fit TPU slices, and what a step costs: the table of `benchmarks/results/plan.md`.

    nice -n 10 python benchmarks/tpu/plan_table.py --compile 3

Every cell: rows of 2048 tokens, one a chip, bfloat16, `remat=full`, every array cut over all chips (`mesh.fsdp`).
Memory is by formula, and the compiler's for the cells that `plan_cells.json` holds: `--compile N` adds the next N of
those that are wanted (minutes each, on a machine without TPUs; needs libtpu). Run it again to go on. Wanted is, for
each model, method and kind of chip, the smallest slice that holds the run, and a few others (`TELLING`).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.measuring import stamped
from mora_jax.planning.model_shapes import PUBLISHED
from mora_jax.planning.plan import Plan, by_formula, with_figures
from mora_jax.planning.topology import read_topology
from mora_jax.planning.tpu_compile import Compiled, CompilerError, ask
from mora_jax.training.config.load import load_config
from mora_jax.training.config.schema import Config, lay_over

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--out {table}"
QUICK = ""
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ("smollm2-1.7b", "llama3-8b", "qwen3-14b", "gemma3-27b", "llama3-70b")
METHODS = ("lora", "mora", "full")
SLICES = (
    *("v5e-1", "v5e-4", "v5e-8", "v5e-16", "v5e-32", "v5e-64", "v5e-128", "v5e-256"),
    *("v5p-8", "v5p-16", "v5p-32", "v5p-64", "v5p-128"),
    *("v6e-1", "v6e-4", "v6e-8", "v6e-16", "v6e-32", "v6e-64", "v6e-128"),
)
#: Compiled besides the smallest slice of each kind that holds each run. Of a file in configs/ the model and the slice
#: are those that its head names.
TELLING = (
    "configs/tpu_v5e_8_llama3_8b_mora.py",
    "llama3-8b lora v5e-8",
    "llama3-8b mora v5e-8",
    "llama3-8b lora v5e-1",
    "llama3-8b mora v5e-1",
    "llama3-70b lora v5e-64",
    "llama3-70b lora v5p-32",
    "qwen3-14b lora v6e-8",
)


def configuration(method: str, chips: int) -> Config:
    """The run of a cell."""
    settings: dict[str, Any] = {
        "adapter.method": method,
        "data.max_length": 2048,
        "data.packing": True,
        "mesh.data": 1,
        "mesh.fsdp": chips,
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "train.batch_size": chips,
    }
    if method == "mora":
        settings["adapter.kind"] = "rotation"
    return lay_over(Config(), [(name, value, "table") for name, value in settings.items()])


def model_and_slice(name: str) -> tuple[str, str]:
    """Those of a cell `MODEL METHOD SLICE`, or of a configuration."""
    if not name.startswith("configs/"):
        model, _, slice_ = name.split()
        return model, slice_
    found = re.search(r"--model\s+(\S+)\s+--accelerator\s+([\w-]+)", (ROOT / name).read_text())
    if found is None:
        raise SystemExit(f"{name} names no plan in its head")
    return found[1], found[2]


@functools.cache
def cell(name: str) -> Plan:
    """The plan of a cell or a configuration by formula."""
    model, slice_ = model_and_slice(name)
    topology = read_topology(slice_)
    if name.startswith("configs/"):
        config, _ = load_config(str(ROOT / name), (), {"data.train": ("x",), "out": "x", "model.path": model})
    else:
        config = configuration(name.split()[1], topology.chips)
    return by_formula(config, PUBLISHED[model], topology)


def wanted(known: dict[str, Any]) -> list[str]:
    """The cells to compile that aren't known. What the compiler has refused makes room for the next slice."""
    kinds = itertools.product(("v5e", "v5p", "v6e"), METHODS, MODELS)
    found = [(smallest(model, method, kind, known), f"{model} {method}") for kind, method, model in kinds]
    names = [f"{run} {slice_}" for (plan, slice_), run in found if plan is not None]
    return [name for name in dict.fromkeys((*names, *TELLING)) if name not in known]


def compile_cells(cells: Path, count: int) -> None:
    """Compiles the next `count` cells, and keeps what the compiler says."""
    failed: set[str] = set()
    for _ in range(count):
        known = read_cells(cells)
        name = next((name for name in wanted(known) if name not in failed), None)
        if name is None:
            return
        plan = cell(name)
        print(f"compiling {name}", file=sys.stderr, flush=True)
        try:
            known[name] = ask(plan.config, PUBLISHED[model_and_slice(name)[0]], plan.topology, plan.mesh)
        except CompilerError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.add(name)
            continue
        cells.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def read_cells(cells: Path) -> dict[str, Any]:
    """What the compiler said of each cell that was compiled."""
    return json.loads(cells.read_text()) if cells.exists() else {}


def table(columns: list[str], words: int, rows: list[list[str]]) -> str:
    """A markdown table whose first columns are words and whose others are numbers."""
    rule = ["---"] * words + ["---:"] * (len(columns) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def gigabytes(value: float) -> str:
    """Two digits after the point, of 10⁹ bytes."""
    return f"{value / 1e9:.2f}"


def fits_table(known: dict[str, Any]) -> str:
    """For each model, method and slice: GB a chip, bold where it fits; the compiler's figure marked."""
    rows = []
    for model in MODELS:
        for method in METHODS:
            cells = []
            for slice_ in SLICES:
                name = f"{model} {method} {slice_}"
                plan = cell(name)
                answer = Compiled.read(known[name]) if name in known else None
                plan = plan if answer is None else with_figures(plan, answer)
                words = f"{plan.needed / 1e9:.1f}" + ("" if answer is None else " c")
                cells.append(f"**{words}**" if plan.fits else words)
            rows.append([model, method, *cells])
    return table(["model", "method", *SLICES], 2, rows)


def cost_table(known: dict[str, Any]) -> str:
    """For each model and method, on the smallest slice of each kind that it fits: what a step costs."""
    rows = []
    for model in MODELS:
        for method in METHODS:
            for kind in ("v5e", "v5p", "v6e"):
                plan, name = smallest(model, method, kind, known)
                if plan is None:
                    rows.append([model, method, f"no {kind} here", *[""] * 6])
                    continue
                cost = plan.estimate
                slow, fast = (rate / plan.topology.chips for rate in cost.tokens_per_second(plan.tokens))
                rows.append(
                    [
                        *(model, method, name, gigabytes(plan.needed), f"{cost.flops / 1e12:.0f}"),
                        *(f"{cost.intensity:.0f}", gigabytes(cost.sent)),
                        *(f"{cost.fastest:.2f} to {cost.slowest:.2f}", f"{slow:,.0f} to {fast:,.0f}"),
                    ]
                )
    names = ["model", "method", "slice", "GB a chip", "TFLOP", "FLOP per byte", "GB sent", "s a step"]
    return table([*names, "tokens/s a chip"], 3, rows)


def smallest(model: str, method: str, kind: str, known: dict[str, Any]) -> tuple[Plan | None, str]:
    """The first slice of a kind that holds a run, and its name."""
    for slice_ in SLICES:
        if slice_.startswith(kind):
            name = f"{model} {method} {slice_}"
            plan = cell(name)
            if name in known:
                plan = with_figures(plan, Compiled.read(known[name]))
            if plan.fits:
                return plan, slice_
    return None, ""


def order(name: str) -> tuple[int, ...]:
    """Where a cell stands in a list: as in the tables, configurations first."""
    if name.startswith("configs/"):
        return ()
    model, method, slice_ = name.split()
    return MODELS.index(model), METHODS.index(method), SLICES.index(slice_)


def check_table(known: dict[str, Any]) -> str:
    """Formula against compiler, for every cell that was compiled."""
    rows = []
    for name in sorted(known, key=order):
        plan, answer = cell(name), Compiled.read(known[name])
        own = plan.memory
        words = [name, gigabytes(own.arguments), "", gigabytes(own.activations + own.temp), "", gigabytes(plan.needed)]
        if answer.fits and answer.total:
            words[2], words[4] = gigabytes(answer.arguments), gigabytes(answer.temp + answer.outputs + answer.code)
            listed = answer.collectives
            sent = "" if listed is None else gigabytes(sum(entry.bytes for entry in listed))
            words += [gigabytes(answer.total), f"{plan.needed / answer.total - 1:+.0%}"]
            words += [gigabytes(plan.estimate.sent), sent]
        else:
            total = "does not fit" if answer.total is None else f"{gigabytes(answer.total)}, does not fit"
            words += [total, "" if answer.total is None else f"{plan.needed / answer.total - 1:+.0%}", "", ""]
        rows.append(words)
    names = ["cell", "arguments", "compiled", "rest", "compiled", "total", "compiled", "off by", "sent", "compiled"]
    return table(names, 1, rows)


def write(cells: Path, path: Path) -> None:
    """Writes the tables."""
    known = read_cells(cells)
    script = "`nice -n 10 python benchmarks/tpu/plan_table.py`"
    text = f"""# What fits which TPU slice

Written by {script}. Rows of 2048 tokens, one a chip, bfloat16, `model.remat=full`,
every array cut over all chips (`mesh.fsdp`). LoRA and MoRA (rotation) have rank 8 on every linear layer. These are not
the best settings: `mora-jax plan` looks for better ones.

## GB on each chip

Bold: it fits. A `c` marks figures of the TPU's own compiler (libtpu, on a machine without TPUs); all others are by the
formula of `mora_jax/planning/memory_model.py`. A chip has 16.9 (v5e), 101.7 (v5p) and 34.1 (v6e) GB that a program can
use. The number in a v5p slice's name counts TensorCores, two a chip.

{fits_table(known)}

## What a step costs on the smallest slice that holds it

Each chip, each step, one row a chip. Times are estimates, nothing was run: see `mora-jax plan` for what is assumed.

{cost_table(known)}

## The formula against the compiler

GB on each chip; `sent` is what a chip sends in the collectives of a step. Files in `configs/` have settings of their
own: that one has `remat=none`, a mesh of (2, 2, 2) and 16 micro-batches.

{check_table(known)}
"""
    path.write_text(stamped(text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, default=0, metavar="N", help="cells to compile before the tables")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan.md", help="Markdown file to write.")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu is for the compiling process
    compile_cells(RESULTS / "plan_cells.json", options.compile)
    write(RESULTS / "plan_cells.json", options.out)
