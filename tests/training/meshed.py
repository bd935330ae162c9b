"""Short runs of a tiny decoder on any mesh, for comparison with one device. `python -m tests.training.meshed` prints
losses as JSON, for meshes larger than the devices of the tests."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import mora_jax as mj
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import Placement
from mora_jax.training.sharding.runner import JitRunner
from mora_jax.training.state import Structure, TrainState, flat_arrays, initial_state
from mora_jax.training.step import StepConfig, make_step
from tests.models.quantized import quantized_copy
from tests.models.tiny import LLAMA, fill_randomly

METHODS = {
    # Each kind of matrix once: heads of queries and of keys and values, and of the MLP into it and out of it.
    "lora": mj.LoRAConfig(rank=2, targets=("q_proj", "v_proj", "up_proj", "down_proj")),
    "mora": mj.MoRAConfig(rank=2, kind="rotation"),
    "sharing": mj.MoRAConfig(rank=2, kind="sharing"),
    "full": mj.FullConfig(),
}
EVEN = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
GEMMA = {
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
#: Inputs of whole blocks of quantised kernels: 4 of them, and 8.
BLOCKS = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 16, "num_hidden_layers": 2}
#: Two key/value heads and 97 tokens divide by nothing; in the second every size divides by 8; in the third layers see
#: a window and the whole row in turn, and scores are capped.
SIZES = {"odd": LLAMA, "even": LLAMA | EVEN, "gemma": LLAMA | GEMMA, "blocks": LLAMA | EVEN | BLOCKS} | {
    "experts": LLAMA | EVEN | EXPERTS,
    "three_experts": LLAMA | EVEN | EXPERTS | {"num_experts": 3},
    "six_experts": LLAMA | EVEN | EXPERTS | {"num_experts": 6},
}
#: With the usual eps, Adam's first step is the sign of a gradient however small it is: one of 2,048 that rounding turns
#: moved the losses by 1e-5.
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.01, eps=1e-5)
ROWS, LENGTH, STEPS = 16, 16, 10


class Run(NamedTuple):
    """What a run left behind."""

    losses: np.ndarray
    norms: np.ndarray
    state: TrainState
    frozen: dict[str, jax.Array]
    compiled: Any
    placement: Placement


def batches(packed: bool) -> list[dict[str, np.ndarray]]:
    """Ragged rows of one example, or with `packed` of two."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STEPS):
        ends = rng.integers(3, LENGTH + 1, (ROWS, 1))
        places = np.arange(LENGTH)[None]
        segments = (places < ends).astype(np.int32)
        if packed:
            segments += ((places >= ends // 2) & (places < ends)).astype(np.int32)
        weights = (rng.random((ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) > 0.4)).astype(np.float32)
        ids = rng.integers(0, 96, (ROWS, LENGTH)).astype(np.int32)
        made.append({"input_ids": ids, "segment_ids": segments, "weights": weights})
    return made


@functools.cache
def run(
    method: str,
    mesh: tuple[int, ...] = (1, 1, 1),
    *,
    sizes: str = "odd",
    packed: bool = True,
    micro_batches: int = 1,
    remat: str = "none",
    offload: bool = False,
    quantize: str = "none",
    dropout: float = 0.0,
) -> Run:
    """Trains a few steps; `offload` is the optimizer's."""
    model = Decoder(read_config(SIZES[sizes], "config.json"), rngs=nnx.Rngs(0), remat=remat)
    if quantize != "none":
        model = quantized_copy(model, quantize)
    chosen = dataclasses.replace(METHODS[method], dropout=dropout) if dropout else METHODS[method]
    mj.attach(model, chosen, rngs=nnx.Rngs(1))
    if method != "full":
        fill_randomly(model)
    graphdef, adapters, frozen = mj.partition(model)
    devices = make_mesh(*mesh)
    placement = Placement.of(devices, adapters, frozen)
    config = dataclasses.replace(OPTIMIZER, offload=offload)
    optimizer, schedule = make_optimizer(config, STEPS), make_schedule(config, STEPS)
    structure = Structure(graphdef, adapters, frozen)
    step = make_step(structure, optimizer, schedule, StepConfig(partitioner=placement.partitioner, dropout=dropout > 0))
    runner = JitRunner(step, devices, placement.table(adapters, frozen))
    state = runner.place(initial_state(flat_arrays(adapters), optimizer, 0))
    held = runner.place(flat_arrays(frozen))
    found = []
    for batch in batches(packed):
        split = {name: value.reshape(micro_batches, -1, LENGTH) for name, value in batch.items()}
        state, metrics = runner(state, held, runner.place_batch(split))
        found.append([float(metrics.loss), float(metrics.grad_norm)])
    assert runner.compilations == 1
    losses, norms = np.array(found).T
    return Run(losses, norms, state, held, runner.compiled[0], placement)


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    print(json.dumps([run(method, tuple(mesh), **options).losses.tolist() for method, mesh, options in cases]))
