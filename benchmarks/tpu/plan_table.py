"""Whether published models fit TPU slices, and what a step costs: the table of `benchmarks/results/plan.md`.

    nice -n 10 python benchmarks/tpu/plan_table.py --compile 3
    nice -n 10 python benchmarks/tpu/plan_table.py --experts --compile 1

Every cell: rows of 2048 tokens, one a chip, bfloat16, `remat=full`, every array cut over all chips (`mesh.fsdp`),
unless its name says otherwise. Memory is by formula, and the compiler's for the cells that `plan_cells.json` holds:
`--compile N` adds the next N of `CELLS` (minutes each, on a machine without TPUs; needs libtpu). Run it again to go on.
Cells of another commit or another libtpu are thrown away first: all that a file holds are of one state. With
`--experts` the tables are those of `benchmarks/results/experts.md`, the cells those of `expert_cells.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.measuring import stamp, stamped, table
from mora_jax.planning.model_shapes import PUBLISHED
from mora_jax.planning.plan import Plan, by_formula, with_figures
from mora_jax.planning.topology import read_topology
from mora_jax.planning.tpu_compile import Compiled, CompilerError, ask
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
#: What is compiled, the most telling first.
CELLS = (
    *(f"llama3-8b {method} {name}" for name in ("v5e-8", "v6e-8") for method in ("lora", "mora")),
    *(f"llama3-8b {method} v5e-8 model.remat={remat}" for remat in ("dots", "none") for method in ("lora", "mora")),
    "llama3-8b lora v5e-8 mesh.fsdp=2 mesh.tensor=4",
    "llama3-8b lora v5e-8 mesh.fsdp=1 mesh.context=8 data.max_length=32768 train.batch_size=1",
    *(f"llama3-8b {method} v6e-8 model.remat={remat}" for remat in ("dots", "none") for method in ("lora", "mora")),
    *("llama3-8b lora v5e-4", "llama3-8b full v5e-16", "llama3-70b lora v5e-32", "smollm2-1.7b lora v5e-1"),
    *("qwen3-14b lora v5e-4", "gemma3-27b lora v5e-8", "smollm2-1.7b full v5e-4", "llama3-70b mora v5e-32"),
    *("qwen3-14b mora v5e-4", "gemma3-27b mora v5e-8", "smollm2-1.7b mora v5e-1", "qwen3-14b full v5e-32"),
)
#: Models with experts, of which the first are compiled.
EXPERTS = tuple(
    f"qwen3-30b-a3b lora {mesh}"
    for mesh in (
        *("v5e-8 mesh.fsdp=1 mesh.expert=8", "v5e-8", "v5e-16 mesh.fsdp=2 mesh.expert=8"),
        "v5e-8 mesh.fsdp=2 mesh.expert=2 mesh.tensor=2 train.batch_size=4",
    )
)
#: Large models on many chips, LoRA of rank 16, 128 rows a step.
LARGE = tuple(
    f"{model} lora {chips} adapter.rank=16 train.batch_size=128 train.micro_batch_size={others}"
    for model, chips, others in (
        ("llama3-70b", "v5p-256", "128"),
        ("llama3-70b", "v5p-256", "128 mesh.data=16 mesh.fsdp=8 model.remat=none"),
        ("llama3-70b", "h100x32", "32"),
        ("llama3-70b", "h100x32", "128"),
        ("llama3-70b", "h100x32", "16 mesh.data=4 mesh.fsdp=2 mesh.tensor=4 model.remat=dots"),
        ("qwen3-235b-a22b", "v5p-256", "128"),
        ("qwen3-235b-a22b", "v5p-256", "128 mesh.data=4 mesh.fsdp=32 model.remat=dots"),
        ("qwen3-235b-a22b", "v5p-256", "128 mesh.data=16 mesh.fsdp=1 mesh.expert=8"),
        ("qwen3-235b-a22b", "h100x32", "32"),
        ("qwen3-235b-a22b", "h100x32", "128"),
        ("qwen3-235b-a22b", "h100x32", "128 mesh.data=2 mesh.fsdp=4 mesh.expert=4"),
    )
)


@functools.cache
def cell(name: str) -> Plan:
    """The plan of a cell by formula."""
    model, method, slice_, *others = name.split()
    topology = read_topology(slice_)
    settings: dict[str, Any] = {
        "adapter.method": method,
        "data.max_length": 2048,
        "data.packing": True,
        "mesh.data": 1,
        "mesh.fsdp": topology.chips,
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "train.batch_size": topology.chips,
    }
    if method == "mora":
        settings["adapter.kind"] = "rotation"
    for key, value in (setting.split("=") for setting in others):
        settings[key] = int(value) if value.isdigit() else value
    config = lay_over(Config(), [(key, value, "table") for key, value in settings.items()])
    return by_formula(config, PUBLISHED[model], topology)


def compile_cells(names: tuple[str, ...], cells: Path, count: int) -> None:
    """Compiles the next `count` of some cells, and keeps what the compiler says."""
    known = read_cells(cells) if cells.exists() and json.loads(cells.read_text())["made"] == stamp() else {}
    for name in [name for name in names if name not in known][:count]:
        plan = cell(name)
        print(f"compiling {name}", file=sys.stderr, flush=True)
        try:
            known[name] = ask(plan.config, PUBLISHED[name.split()[0]], plan.topology, plan.mesh)
        except CompilerError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        cells.write_text(json.dumps({"made": stamp(), "cells": known}, indent=1, sort_keys=True) + "\n")


def read_cells(cells: Path) -> dict[str, Any]:
    """What the compiler said of each cell that was compiled."""
    return json.loads(cells.read_text())["cells"] if cells.exists() else {}


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


def shown(name: str) -> str:
    """A cell's name for a table, settings as code."""
    model, method, slice_, *others = name.split()
    return " ".join([model, method, slice_, *(f"`{setting}`" for setting in others)])


def check_table(names: tuple[str, ...], known: dict[str, Any]) -> str:
    """Formula against compiler, for every cell of these that was compiled."""
    rows = []
    for name in (name for name in names if name in known):
        plan, answer = cell(name), Compiled.read(known[name])
        own = plan.memory
        words = [
            shown(name),
            gigabytes(own.arguments),
            "",
            gigabytes(own.activations + own.temp),
            "",
            gigabytes(plan.needed),
        ]
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
    heads = ["cell", "arguments", "compiled", "rest", "compiled", "total", "compiled", "off by", "sent", "compiled"]
    return table(heads, 1, rows)


def large_table() -> str:
    """Large models by formula, a row each."""
    rows = []
    for name in LARGE:
        plan, (model, _, chips, *_) = cell(name), name.split()
        settings, memory, cost = plan.settings(), plan.memory, plan.estimate
        slow, fast = cost.tokens_per_second(plan.tokens)
        rows.append(
            [
                *(
                    model,
                    chips,
                    " × ".join(str(settings[f"mesh.{axis}"]) for axis in ("data", "fsdp", "tensor", "expert")),
                ),
                *(str(settings["train.micro_batch_size"]), settings["model.remat"], gigabytes(memory.weights)),
                *(gigabytes(memory.adapters + memory.optimizer), gigabytes(plan.needed), f"{cost.sent / 1e9:,.0f}"),
                *(f"{cost.fastest:.1f} to {cost.slowest:.1f}", f"{slow:,.0f} to {fast:,.0f}"),
            ]
        )
    heads = ["model", "chips", "data × fsdp × tensor × expert", "rows at once", "remat", "base", "adapters, moments"]
    return table([*heads, "GB a chip", "GB sent", "s a step", "tokens/s"], 3, rows)


def made_of(cells: Path) -> str:
    """Of which state the cells of a file are, in words."""
    return json.loads(cells.read_text())["made"].replace("Made at", "Compiled at") if cells.exists() else ""


def write_experts(cells: Path, path: Path) -> None:
    """Writes the tables of models with experts."""
    held = {held: cell(f"qwen3-30b-a3b lora h200 model.quantize={held}") for held in ("none", "int8", "nf4")}
    sizes = ", ".join(f"{gigabytes(plan.memory.weights)} with `{name}`" for name, plan in held.items())
    known, compared = read_cells(cells), ""
    if known:
        compared = f"""## The formula against the compiler

One row a chip unless the settings say otherwise, `model.remat=full`, rank 8. GB on each chip; `sent` is what a chip
sends in the collectives of a step. {made_of(cells)}

{check_table(EXPERTS, known)}

"""
    text = f"""# Models with experts, and large ones

Written by `nice -n 10 python benchmarks/tpu/plan_table.py --experts`; nothing was run. Rows of 2048 tokens,
bfloat16, LoRA on every linear layer and every expert.

Frozen arrays of Qwen3-30B-A3B by `model.quantize`, GB: {sizes}.

{compared}## Many chips, by formula

Rank 16, steps of 128 rows. GB on each chip: the base, the adapters with their moments, and all.

{large_table()}
"""
    path.write_text(stamped(text))


def write(cells: Path, path: Path) -> None:
    """Writes the tables."""
    known, made = read_cells(cells), made_of(cells)
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

GB on each chip; `sent` is what a chip sends in the collectives of a step. {made}

{check_table(CELLS, known)}
"""
    path.write_text(stamped(text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, default=0, metavar="N", help="cells to compile before the tables")
    parser.add_argument("--experts", action="store_true", help="the tables of models with experts")
    parser.add_argument("--out", type=Path, help="Markdown file to write.")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu is for the compiling process
    cells = RESULTS / ("expert_cells.json" if options.experts else "plan_cells.json")
    compile_cells(EXPERTS if options.experts else CELLS, cells, options.compile)
    target = options.out or RESULTS / ("experts.md" if options.experts else "plan.md")
    (write_experts if options.experts else write)(cells, target)
