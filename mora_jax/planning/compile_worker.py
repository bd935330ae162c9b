"""Compiles one step for TPUs that this machine needn't have: a process of its own, since libtpu stays loaded.

    python -m mora_jax.planning.compile_worker < task.json

The task is a JSON object: `config` (as `Config.to_dict`), `decoder` (a HuggingFace config), `topology` (as libtpu calls
it), `mesh` (devices along each axis). The answer is the last line of stdout.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from typing import Any

# Read before jax is imported. libtpu asks the machine about itself unless it is told not to, and lets one process in
# unless it is told that several don't mind: here nobody touches a chip.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
from jax.experimental import topologies

from mora_jax.backend import compiling_for
from mora_jax.models.families import read_config
from mora_jax.planning.abstract_step import abstract_model, assemble_abstract, loss_chunks
from mora_jax.planning.collectives import Loops, collectives
from mora_jax.planning.tpu_compile import read_shortage
from mora_jax.training.config.schema import Config, flatten, lay_over


def lower_step(task: dict[str, Any]) -> tuple[Any, Loops]:
    """The step of a task, lowered for its topology, and how often its loops run."""
    config = lay_over(Config(), [(name, value, "plan") for name, value in flatten(task["config"])])
    decoder = read_config(task["decoder"], "the model")
    # A host has four chips unless libtpu is told otherwise: it refuses a slice of one.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(task["mesh"]) == 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=task["topology"], **alone).devices
    with compiling_for("tpu"):
        model = abstract_model(decoder, config)
        assembly, arguments = assemble_abstract(model, config, tuple(task["mesh"]), devices)
        lowered = assembly.runner.lower(*arguments)
        micro, *_ = arguments[2]["input_ids"].shape
        shards = assembly.placement.row_shards if assembly.placement is not None else 1
        tokens = arguments[2]["input_ids"].size // (micro * shards)
        chunks = loss_chunks(model, config, tokens)
    turns = max(run[0].num_layers for run in decoder.runs)
    return lowered, Loops(turns, micro, chunks, turns=task["mesh"][-1])


def compile_step(task: dict[str, Any]) -> dict[str, Any]:
    """Compiles the step of a task and says what the compiler says of it."""
    lowered, loops = lower_step(task)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "space vmem" in str(error):  # which is no question of how much a step needs
            sys.exit("an operation of the step gets too little of the chip's fast memory (E1001)")
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "seconds": time.perf_counter() - start} | read_shortage(str(error))
    memory: Any = compiled.memory_analysis()
    return {
        "fits": True,
        "seconds": time.perf_counter() - start,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        "collectives": _collectives(compiled, math.prod(task["mesh"]), loops),
    }


def _collectives(compiled: Any, devices: int, loops: Loops) -> list[dict[str, Any]] | None:
    """Those of a step; None where this jax can't read what a newer libtpu writes (its asynchronous updates)."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        print(f"no HLO: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return [dataclasses.asdict(one) for one in collectives(text, devices, loops)]


if __name__ == "__main__":
    print(json.dumps(compile_step(json.load(sys.stdin))))
