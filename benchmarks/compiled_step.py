"""What the compiler makes of the train step: counts of operations and the losses of a few steps, as JSON.

    python benchmarks/compiled_step.py [--out step.json] [--against earlier.json] [--only REGEX]

A small model of random weights is trained for a few steps with LoRA, MoRA, DoRA, fully, and with LoRA beside dropout,
noise and a KL term; on one device, on a mesh of 4 simulated devices (fsdp 2 × tensor 2) and under `pmap`. The numbers
of two states of the code, side by side, tell whether a change of the code changed the program. Also prints how long
tracing takes, and the host to send a compiled step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx

from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training.build_step import assemble
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.setup import put_adapter
from mora_jax.training.sharding.mesh import make_mesh

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--out {json}"
QUICK = "--only '^LoRA; 1 device; loop'"
STEPS, ROWS, LENGTH = 3, 4, 32
COLLECTIVES = ("all-", "reduce-scatter", "collective-")
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter.method": "lora"},
    "MoRA rotation": {"adapter.method": "mora", "adapter.kind": "rotation"},
    "DoRA": {"adapter.method": "dora"},
    "full": {"adapter.method": "full"},
    "LoRA, dropout, noise, KL": {
        "adapter.method": "lora",
        "adapter.dropout": 0.1,
        "train.neftune_alpha": 5.0,
        "loss.kl_weight": 0.1,
    },
}
PLACES: dict[str, dict[str, Any]] = {
    "1 device": {"mesh.data": 1},
    "fsdp 2 × tensor 2": {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2},
    "pmap of 2": {"mesh.data": 2, "mesh.pmap": True},
}


def count_equations(jaxpr: Any) -> Counter[str]:
    """The equations of a jaxpr and of those inside it, by primitive; calls of compiled functions left out."""
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name not in ("jit", "pjit"):
            found[equation.primitive.name] += 1
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += count_equations(inner)
    return found


def batch_of(step: int, kl: bool) -> dict[str, np.ndarray]:
    """Rows of two packed examples."""
    rng = np.random.default_rng(step)
    places = np.arange(LENGTH)[None]
    ends = rng.integers(8, LENGTH + 1, (ROWS, 1))
    segments = (places < ends).astype(np.int32) + ((places >= ends // 2) & (places < ends))
    batch = {
        "input_ids": rng.integers(0, MODEL["vocab_size"], (ROWS, LENGTH)).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "weights": rng.random((ROWS, LENGTH)).astype(np.float32),
        "counts": np.full(ROWS, LENGTH / 2, np.float32),
    }
    if kl:
        batch["kl_weights"] = rng.random((ROWS, LENGTH)).astype(np.float32)
    return {name: value[None] for name, value in batch.items()}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one step."""
    config = lay_over(Config(), [(name, value, "benchmark") for name, value in settings.items()])
    model = Decoder(read_config(MODEL, "config.json"), rngs=nnx.Rngs(0))
    put_adapter(model, config, STEPS)
    if config.adapter.method != "full":
        keys = iter(jax.random.split(jax.random.key(1), 1000))
        for _, node in nnx.iter_graph(model):
            if isinstance(node, nnx.LoRAParam):
                value = node.get_value()
                node.set_value(value + 0.02 * jax.random.normal(next(keys), value.shape, value.dtype))
    mesh = config.mesh
    made = assemble(model, config, STEPS, make_mesh(max(mesh.data, 1), mesh.fsdp, mesh.tensor, mesh.context))
    runner: Any = made.runner
    state, frozen = made.placed_state(0), runner.place(made.frozen)
    batches = [runner.place_batch(batch_of(step, config.loss.kl_weight > 0)) for step in range(STEPS)]
    started = time.perf_counter()
    traced = runner.trace(state, frozen, batches[0]) if hasattr(runner, "trace") else None
    tracing = time.perf_counter() - started
    losses, sends = [], []
    for batch in batches:
        state, metrics = runner(state, frozen, batch)
        losses.append([float(metrics.loss).hex(), float(metrics.grad_norm).hex()])
    compiled = runner.compiled[0]
    jax.block_until_ready(state)
    for _ in range(30):
        started = time.perf_counter()
        state, metrics = compiled(state, frozen, batches[0])
        sends.append(time.perf_counter() - started)
        jax.block_until_ready(state)
    digest = hashlib.sha256()
    for name, array in sorted(runner.unreplicate(state).adapters.items()):
        digest.update(name.encode() + np.asarray(array).tobytes())
    text = compiled.as_text()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    equations = Counter[str]() if traced is None else count_equations(traced.jaxpr)
    operations = Counter(re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = \S+(?: \S+)*? ([a-z][\w-]*)\(", text, re.MULTILINE))
    return {
        "jaxpr equations": sum(equations.values()),
        "jaxpr dot_general": equations["dot_general"],
        "HLO instructions": len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE)),
        "HLO dots": operations["dot"] + text.count("__onednn$matmul"),
        "HLO fusions": operations["fusion"],
        "HLO collectives": sum(
            n for name, n in operations.items() if name.startswith(("all-", "reduce-scatter", "collective"))
        ),
        "flops": cost.get("flops"),
        "bytes accessed": cost.get("bytes accessed"),
        "argument bytes": memory.argument_size_in_bytes,
        "temp bytes": memory.temp_size_in_bytes,
        "losses": losses,
        "trained arrays": digest.hexdigest()[:16],
        "tracing, s": round(tracing, 3),
        "send, ms": round(1e3 * statistics.median(sends), 3),
    }


def main() -> None:
    """Prints the numbers, beside those of an earlier state where there are some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON, after each case")
    parser.add_argument("--against", type=Path, help="numbers of an earlier state of the code to compare with")
    parser.add_argument("--only", default="", help="a regular expression for the cases to run")
    arguments = parser.parse_args()
    earlier = json.loads(arguments.against.read_text()) if arguments.against else {}
    found: dict[str, Any] = {}
    for place, mesh in PLACES.items():
        for method, settings in METHODS.items():
            name = f"{method}; {place}"
            if re.search(arguments.only, name):
                found[name] = measure(settings | mesh)
                show(name, found[name], earlier.get(name))
            if arguments.out:
                arguments.out.write_text(json.dumps(found, indent=1))


def show(name: str, numbers: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Prints the numbers of one case."""
    print(name)
    for what, value in numbers.items():
        old = None if before is None else before[what]
        mark = "" if before is None else " (same)" if old == value else f" (before: {old})"
        print(f"    {what}: {value}{mark}", flush=True)


if __name__ == "__main__":
    main()
