"""Memory of long inputs on TPUs, from compiling the real training step without a TPU.

    pip install libtpu
    python benchmarks/long_context.py --out benchmarks/results/long_context.md

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

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling only: no chip that a process has to itself

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

import mora_jax as mj
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training.assembly import assemble, shapes_in_place
from mora_jax.training.config import Config, lay_over

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
}
#: Topology, chips, rows of 131,072 tokens, and the mesh (data, fsdp, tensor, context).
CASES = [
    ("v5e:8x8", 64, 1, (1, 1, 1, 64)),
    ("v5e:8x8", 64, 4, (1, 4, 1, 16)),
    ("v5p:4x4x2", 32, 2, (1, 2, 1, 16)),
    ("v5p:4x4x2", 32, 4, (1, 4, 1, 8)),
    ("v5p:4x4x2", 32, 4, (1, 4, 8, 1)),
]
COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def compiled_step(topology: str, rows: int, mesh: tuple[int, ...], length: int, settings: dict[str, Any]) -> Any:
    """The training step, compiled for a topology."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    given = {"model.path": "-", "data.train": ("-",), "out": "-", "adapter.rank": 16, **settings}
    config = lay_over(Config(), [(name, value, "benchmark") for name, value in given.items()])

    shapes, remat = read_config(LLAMA_3_8B, "config.json"), config.model.remat
    model = nnx.eval_shape(lambda: Decoder(shapes, dtype=jnp.bfloat16, rngs=None, unroll=1, remat=remat))
    mj.attach(model, mj.LoRAConfig(rank=16), rngs=nnx.Rngs(0))
    made = assemble(model, config, 100, mesh, devices)
    state = shapes_in_place(made.runner, jax.eval_shape(lambda: made.initial_state(0)))
    frozen = shapes_in_place(made.runner, made.frozen)
    places = {"input_ids": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}
    sharding = made.placement.batch(1)
    shape = (1, rows, length)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in places.items()}
    return made.runner.lower(state, frozen, batch).compile()


def row(topology: str, chips: int, rows: int, mesh: tuple[int, ...], length: int) -> str:
    """One line of the table."""
    start = time.perf_counter()
    compiled = compiled_step(topology, rows, mesh, length, {"model.remat": "full"})
    memory = compiled.memory_analysis()
    counts = collections.Counter(COLLECTIVE.findall(compiled.as_text()))
    print(f"{topology} {mesh}: {time.perf_counter() - start:.0f} s to compile")
    held = memory.argument_size_in_bytes / 2**30
    temp = memory.temp_size_in_bytes / 2**30
    found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
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
        "`python benchmarks/long_context.py`; nothing was run. GiB a chip: *held* is base, adapters and optimizer,",
        "*temp* what a step needs beside. A v5e chip has 16 GiB, a v5p chip 95 GiB.",
        "",
        "| topology | data × fsdp × tensor × context | rows | held | temp | sum | collectives in the program |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number in options.cases:
        try:
            lines.append(row(*CASES[number], options.length))
        except jax.errors.JaxRuntimeError as error:
            reason = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm", str(error))
            if reason is None:
                raise
            topology, chips, rows, mesh = CASES[number]
            where = " × ".join(str(size) for size in mesh)
            lines.append(f"| {topology} ({chips} chips) | {where} | {rows} | | | doesn't fit: {reason[0]} | |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
