"""Memory of long inputs on TPUs, from compiling the real training step without a TPU.

    pip install libtpu
    python benchmarks/tpu/long_context.py --out benchmarks/results/long_context.md

Llama-3-8B's shapes, LoRA of rank 16 on all linear layers, bfloat16 base, full recomputation, 131,072 tokens a row. For
each mesh the compiler's own figures a chip: what stays there (base, adapters, optimizer), what a step needs beside, and
the collectives in the program. The last row is without `mesh.context`, for comparison.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import time
from pathlib import Path
from typing import Any

# Read before jax is imported: libtpu asks the machine about itself unless it is told not to.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}

import jax
from jax.experimental import topologies

from benchmarks.measuring import stamped
from mora_jax.backend import compiling_for
from mora_jax.models.families import read_config
from mora_jax.planning.abstract_step import abstract_model, assemble_abstract
from mora_jax.planning.model_shapes import read_model
from mora_jax.planning.tpu_compile import read_shortage
from mora_jax.training.config.schema import Config, lay_over

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--out {table}"
QUICK = "--length 2048 --cases 0"
NEEDS = ("libtpu",)

#: Topology, chips, rows of 131,072 tokens, and the mesh (data, fsdp, tensor, context).
CASES = [
    ("v5e:8x8", 64, 1, (1, 1, 1, 64)),
    ("v5e:8x8", 64, 4, (1, 4, 1, 16)),
    ("v5p:4x4x2", 32, 2, (1, 2, 1, 16)),
    ("v5p:4x4x2", 32, 4, (1, 4, 1, 8)),
    ("v5p:4x4x2", 32, 4, (1, 4, 8, 1)),
]
COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def compiled_step(
    name: str, topology: str, rows: int, mesh: tuple[int, ...], length: int, settings: dict[str, Any]
) -> Any:
    """The training step of a published model, compiled for a topology."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    given = {"model.dtype": "bfloat16", "data.max_length": length, "train.batch_size": rows, **settings}
    config = lay_over(Config(), [(key, value, "benchmark") for key, value in given.items()])
    decoder = read_config(read_model(name), name)
    with compiling_for("tpu"):
        made, arguments = assemble_abstract(abstract_model(decoder, config), config, mesh, devices)
        lowered = made.runner.lower(*arguments)
    return lowered.compile()


def collectives_of(compiled: Any) -> str:
    """The collectives in a program, in words; nothing where this jax can't read what libtpu wrote."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return "not readable"
    counts = collections.Counter(COLLECTIVE.findall(text))
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def row(topology: str, chips: int, rows: int, mesh: tuple[int, ...], length: int) -> str:
    """One line of the table."""
    start = time.perf_counter()
    compiled = compiled_step("llama3-8b", topology, rows, mesh, length, {"model.remat": "full", "adapter.rank": 16})
    memory = compiled.memory_analysis()
    seconds, temp = time.perf_counter() - start, memory.temp_size_in_bytes / 2**30
    print(f"{topology} {mesh}: {seconds:.0f} s to compile, {temp:.2f} GiB temp", flush=True)
    held = memory.argument_size_in_bytes / 2**30
    found = collectives_of(compiled)
    where = " × ".join(str(size) for size in mesh)
    return f"| {topology} ({chips} chips) | {where} | {rows} | {held:.2f} | {temp:.2f} | {held + temp:.2f} | {found} |"


def main() -> None:
    """Prints the table, and writes it where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write.")
    parser.add_argument("--length", type=int, default=131072, help="Tokens a row.")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="Which rows of the table.")
    options = parser.parse_args()
    lines = [
        f"# Rows of {options.length:,} tokens on TPUs",
        "",
        "Llama-3-8B, LoRA of rank 16, bfloat16 base, `model.remat=full`. Compiled by",
        "`python benchmarks/tpu/long_context.py`; nothing was run. GiB a chip: *held* is base, adapters and optimizer,",
        "*temp* what a step needs beside. A v5e chip has 16 GiB, a v5p chip 95 GiB.",
        "",
        "| topology | data × fsdp × tensor × context | rows | held | temp | sum | collectives in the program |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number in options.cases:
        try:
            lines.append(row(*CASES[number], options.length))
        except jax.errors.JaxRuntimeError as error:
            shortage = read_shortage(str(error))
            if "total" not in shortage:
                raise
            needed = f"{shortage['total'] / 2**30:.1f} of {shortage['limit'] / 2**30:.1f}"
            topology, chips, rows, mesh = CASES[number]
            where = " × ".join(str(size) for size in mesh)
            lines.append(f"| {topology} ({chips} chips) | {where} | {rows} | | | doesn't fit: {needed} | |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(stamped(text))


if __name__ == "__main__":
    main()
