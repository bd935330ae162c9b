"""Attention's two forms on TPUs, as the TPU's compiler makes them, without a TPU.

    pip install libtpu
    python benchmarks/tpu/attention.py --out benchmarks/results/attention.md

One layer's attention in Llama-3-8B's shapes (32 query heads, 8 key/value heads of 128 numbers), forward and backward,
one packed row, on one chip: blocks in plain XLA, and the splash kernel. Each row of the table is added to the file as
soon as it is there, and rows that are there already aren't made again.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

# Read before jax is imported: libtpu asks the machine about itself unless it is told not to.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.measuring import stamped
from mora_jax.backend import compiling_for
from mora_jax.models.attention.causal import attention
from mora_jax.models.attention.flash import TILE
from mora_jax.models.attention.kernels import Splash
from mora_jax.planning.jaxpr_cost import matrix_products
from mora_jax.training.observe.flops import ACCELERATORS

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--out {table}"
QUICK = "--lengths 1024"
NEEDS = ("libtpu",)
GROUPS, QUERIES, SIZE = 8, 4, 128
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LENGTHS = (1024, 2048, 8192, 32768)
KERNELS = {"xla": None, "splash": Splash((None,))}
#: Cycles a second: a v5e's and a v5p's follow from the peak and the matrix units; a v6e's is taken to be a v5p's.
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
HEAD = """# Attention on TPUs

Written by `python benchmarks/tpu/attention.py`; nothing was run. One layer's attention in Llama-3-8B's shapes (32 query
heads, 8 key/value heads of 128 numbers), forward and backward, one packed row on one chip, bfloat16: blocks in plain
XLA, and the splash kernel.

*GFLOP* and *GB moved* are the matrix products' of the traced program, as `mora-jax plan` counts them: their operands
and results, of the kernel its tiles. *temp* is the compiler's figure. *ms outside* is its estimate (`estimated_cycles`)
for all operations but the kernel, which it doesn't estimate, loops by how often they run; *ms at peak* is what the
kernel's products take at the chip's peak. *sum* of both compares the two forms, in favour of the kernel by as much as
that stays below its peak.

| chip | tokens | form | GFLOP | GB moved | temp MiB | ms outside | ms at peak | sum |
| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def both_ways(form: str, length: int, device: Any) -> Any:
    """Attention with its backward, traced for a device."""
    place = jax.sharding.SingleDeviceSharding(device)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def run(query, key, value, segments, slope):
        def inner(query, key, value):
            options: dict[str, Any] = {"q_segments": segments, "kv_segments": segments, "kernel": KERNELS[form]}
            return attention(query, key, value, scale=SIZE**-0.5, **options)

        out, pull = jax.vjp(inner, query, key, value)
        return out, pull(slope)

    heads, groups = shape(1, length, GROUPS, QUERIES, SIZE), shape(1, length, GROUPS, SIZE)
    with compiling_for("tpu"):
        return jax.jit(run).trace(heads, groups, groups, shape(1, length, dtype=jnp.int32), heads)


def cycles(text: str, length: int) -> float:
    """The compiler's estimates of all operations, those in loops as often as these run: rows of tiles, and inside them
    the tiles of keys that a row sees, half of them on average."""
    inside: dict[str, str] = {}
    total: dict[str, float] = {}
    name = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.<>-]+) .*\{$", line):
            name = head[1]
            total[name] = 0.0
        if found := re.search(r'"estimated_cycles":"(\d+)"', line):
            total[name] += float(found[1])
        if body := re.search(r" while\(.*body=%?([\w.<>-]+)", line):
            inside[body[1]] = name
    tiles = length / TILE
    turns = (1.0, tiles, tiles * (tiles + 1) / 2)

    def depth(name: str) -> int:
        return 1 + depth(inside[name]) if name in inside else 0

    return sum(number * turns[depth(name)] for name, number in total.items())


def row(chip: str, length: int, form: str) -> str:
    """A row of the table."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    traced = both_ways(form, length, device)
    flops, moved = matrix_products(traced.jaxpr)
    with compiling_for("tpu"):
        compiled = traced.lower().compile()
    peak = ACCELERATORS[chip].bf16_flops
    outside = 1e3 * cycles(compiled.as_text(), length) / CLOCK[chip]
    at_peak = 1e3 * flops / peak if form == "splash" else 0.0
    temp = compiled.memory_analysis().temp_size_in_bytes / 2**20
    figures = f"{flops / 1e9:,.0f} | {moved / 1e9:.2f} | {temp:,.0f} | {outside:.2f} | {at_peak:.2f}"
    return f"| {chip} | {length} | {form} | {figures} | {outside + at_peak:.2f} |"


def main() -> None:
    """Makes the rows that aren't there, and writes the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write.")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="Tokens of the row.")
    options = parser.parse_args()
    known = {}
    if options.out.exists():
        lines = options.out.read_text().partition("| ---: |\n")[2].splitlines()
        known = {tuple(line.split(" | ")[:3]): line for line in lines if line.startswith("| v")}
    wanted = [(chip, length, form) for chip in CHIPS for length in LENGTHS for form in KERNELS]
    for chip, length, form in wanted:
        key = (f"| {chip}", str(length), form)
        if key not in known and length in options.lengths:
            known[key] = row(chip, length, form)
            print(known[key], flush=True)
            order = [(f"| {chip}", str(length), form) for chip, length, form in wanted]
            before = options.out.read_text() if options.out.exists() else ""
            rows = "".join(f"{known[key]}\n" for key in order if key in known)
            options.out.write_text(stamped(f"{HEAD}{rows}", before))


if __name__ == "__main__":
    main()
