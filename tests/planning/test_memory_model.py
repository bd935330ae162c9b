"""The formula against what XLA says of the same step, compiled here for simulated CPU devices.

How far it may be off: nothing in the arguments; in what is alive besides up to 35 % too low and never too high, 15 to
30 % here (a CPU's compiler fuses and orders differently from a TPU's, for which benchmarks/results/plan.md has the
comparison).
"""

import jax
import numpy as np
import pytest

from mora_jax.backend import compiling_for
from mora_jax.models.families import read_config
from mora_jax.planning.abstract_step import abstract_model, assemble_abstract
from mora_jax.planning.collectives import Loops, collectives
from mora_jax.planning.jaxpr_cost import read_traced
from mora_jax.planning.memory_model import estimate_memory
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.sharding.mesh import AXES

# Wide and long enough for activations to outweigh what is constant.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LENGTH = 256


def run_of(method: str, mesh: tuple[int, ...], remat: str = "none", micro_batches: int = 1) -> Config:
    rows = 8
    settings = {
        "model.dtype": "float32",
        "model.remat": remat,
        "adapter.method": method,
        "data.max_length": LENGTH,
        "train.batch_size": rows * micro_batches,
        "train.micro_batch_size": rows,
        **dict(zip((f"mesh.{axis}" for axis in AXES), mesh, strict=True)),
    }
    return lay_over(Config(), [(name, value, "test") for name, value in settings.items()])


def compiled_and_reckoned(config: Config, mesh: tuple[int, ...], model=MODEL):
    # Both with the blocks of an accelerator.
    with compiling_for("tpu"):
        made, arguments = assemble_abstract(abstract_model(read_config(model), config), config, mesh)
        compiled = made.runner.lower(*arguments).compile()
    return compiled, estimate_memory(config, model, mesh, "tpu")


EXPERTS = MODEL | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
}


@pytest.mark.slow
def test_what_an_expert_axis_holds_and_sends():
    mesh = (1, 1, 1, 1, 4)
    compiled, found = compiled_and_reckoned(run_of("lora", mesh, "full"), mesh, EXPERTS)
    assert found.memory.arguments == pytest.approx(compiled.memory_analysis().argument_size_in_bytes, rel=0.01)
    parsed = {entry.kind: entry.bytes for entry in collectives(compiled.as_text(), 4, Loops(6, 1, 1))}
    for kind in ("all-gather", "reduce-scatter"):  # of weights and rows; of results and rows' gradients
        sent = sum(entry.bytes for entry in found.collectives if entry.kind == kind)
        assert sent == pytest.approx(parsed[kind], rel=0.01)
    # Adapters of experts, which fsdp alone leaves whole on every device, are a quarter.
    before = estimate_memory(run_of("lora", (1, 4, 1, 1, 1), "full"), EXPERTS, (1, 4, 1, 1, 1), "tpu")
    assert found.memory.adapters < 0.55 * before.memory.adapters
    assert found.flops == before.flops


def test_rows_of_experts_are_whole_along_tensor_and_those_of_all_along_expert():
    """Against a count by hand, without remat, in float32; no device knows beforehand which rows are its own."""
    kept = {}
    for mesh in ((1, 1, 1, 1, 1), (1, 1, 4, 1, 1), (1, 4, 1, 1, 1), (1, 1, 1, 1, 4)):
        kept[mesh] = estimate_memory(run_of("lora", mesh), EXPERTS, mesh, "tpu").memory.activations
    width, wide, rank, layers, rows = 128, 96, 8, 6, 2 * 8 * LENGTH  # two experts a token
    # Inputs, gate and up, their product, outputs, what three A give; owner and order.
    routed = layers * rows * 4 * (width + 2 * wide + wide + width + 3 * rank + 2)
    alone, tensor, fsdp, expert = kept.values()
    assert fsdp == pytest.approx(alone / 4, rel=0.02)
    assert expert - fsdp == pytest.approx(3 / 4 * routed, rel=0.01)
    stream = layers * rows // 2 * 4 * (4 * width)  # four arrays as wide as the residual stream, of each token
    assert tensor == pytest.approx(routed + stream + (alone - routed - stream) / 4, rel=0.01)


@pytest.mark.parametrize(
    "method, mesh, remat",
    [
        ("lora", (1, 4, 1, 1, 1), "full"),
        pytest.param("full", (1, 4, 1, 1, 1), "none", marks=pytest.mark.slow),
        ("mora", (2, 1, 2, 1, 1), "none"),
    ],
)
def test_memory_and_gathers(method, mesh, remat):
    compiled, found = compiled_and_reckoned(run_of(method, mesh, remat), mesh)
    stats = compiled.memory_analysis()
    assert found.memory.arguments == pytest.approx(stats.argument_size_in_bytes, rel=0.01)
    estimated = found.memory.activations + found.memory.temp
    assert 0.65 < estimated / stats.temp_size_in_bytes < 1
    parsed = {entry.kind: entry for entry in collectives(compiled.as_text(), 4, Loops(6, 1, 1))}
    own = {entry.kind: entry for entry in found.collectives}
    if mesh[1] > 1:
        assert own["all-gather"].bytes == pytest.approx(parsed["all-gather"].bytes, rel=0.1)


def test_flops_are_those_of_the_layers():
    """Against a count by hand, of LoRA on every matrix without remat."""
    config = run_of("lora", (1, 1, 1, 1, 1))
    found = estimate_memory(config, MODEL, (1, 1, 1, 1, 1), "tpu")
    width, wide, layers, rank, heads, kv, head = 128, 384, 6, 8, 8, 4, 16
    sizes = [(width, heads * head), (width, kv * head), (width, kv * head), (heads * head, width)]
    sizes += [(width, wide), (width, wide), (wide, width)]
    base = sum(a * b for a, b in sizes)
    adapters = sum(rank * (a + b) for a, b in sizes)
    # Scores and mixture forward; five products of the same size backward. LENGTH is one block: nothing is left out.
    attention = 7 * LENGTH * heads * head
    # The head: logits forward, and again with their derivative backward.
    vocabulary = 512 * width
    tokens = 8 * LENGTH
    least = 2 * tokens * (layers * (2 * base + 3 * adapters + attention) + 2 * vocabulary)
    assert found.flops == pytest.approx(least, rel=0.06)
    more = estimate_memory(run_of("lora", (1, 1, 1, 1, 1), "full", 2), MODEL, (1, 1, 1, 1, 1), "tpu")
    # Remat repeats all but what nothing backward reads: the last product, and that with its B.
    repeated = base - wide * width + adapters - rank * width + 2 * LENGTH * heads * head
    assert more.flops == pytest.approx(2 * (found.flops + 2 * tokens * layers * repeated), rel=0.015)


def test_a_pair_costs_two_sequences_and_the_reference_a_forward_pass():
    def planned(rows: int, **loss):
        keys = {"train.batch_size": rows, "train.micro_batch_size": rows} | {f"loss.{k}": v for k, v in loss.items()}
        config = lay_over(run_of("lora", (1, 1, 1, 1, 1)), [(name, value, "test") for name, value in keys.items()])
        return estimate_memory(config, MODEL, (1, 1, 1, 1, 1), "tpu")

    sft, cached = planned(16), planned(8, objective="dpo", reference="cached")
    assert cached.flops == pytest.approx(sft.flops, rel=0.02)
    assert cached.memory.activations == pytest.approx(sft.memory.activations, rel=0.01)
    base = planned(8, objective="dpo")
    # A third of the attention's products and half of all others, but for the adapters'.
    assert 1.33 < base.flops / cached.flops < 1.5
    assert base.memory.activations == pytest.approx(cached.memory.activations, rel=0.01)


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_flops_of_a_large_head(target):
    """The loss's chunks are those of the machine that is planned for, not of this one."""
    config, model = run_of("lora", (1, 1, 1, 1, 1)), MODEL | {"vocab_size": 131072}
    config = lay_over(config, [("data.max_length", 4096, "test")])
    small, large = (estimate_memory(config, shapes, (1, 1, 1, 1, 1), target).flops for shapes in (MODEL, model))
    grown = 4 * 8 * 4096 * MODEL["hidden_size"] * (131072 - MODEL["vocab_size"])
    assert large - small == pytest.approx(grown, rel=0.1)  # the last chunk is filled up


def test_what_a_program_keeps():
    """A scan whose two kept arrays and inner product are counted by hand."""
    weights = jax.ShapeDtypeStruct((5, 8, 8), np.float32)

    def layer(x, w):
        y = x @ w
        return jax.numpy.tanh(y) @ w, (y, x)

    program = jax.make_jaxpr(lambda x, w: jax.lax.scan(layer, x, w))(jax.ShapeDtypeStruct((4, 8), np.float32), weights)
    found = read_traced(program, layers=(5,), chunks=1, width=8)
    assert found.flops == 5 * 2 * 2 * 4 * 8 * 8
    assert found.bytes == 5 * 2 * 4 * (4 * 8 + 8 * 8 + 4 * 8)
    assert found.saved == found.uncut == 5 * 2 * 4 * 8 * 4
    assert found.layer == 2 * 4 * 8 * 4  # both products: the first is kept


def test_what_tensor_makes_devices_send():
    """Against a count by hand: sums of the residual stream, and of MoRA's inputs and updates what is cut."""
    mesh = (1, 1, 4, 1, 1)
    tokens, layers, width, wide, qkv = 8 * LENGTH, 6, 128, 384, 256
    sums = 4 * layers * tokens * width * 4 * 2 * 3 / 4  # forward after the output and down projections; two backward
    lora = estimate_memory(run_of("lora", mesh), MODEL, mesh, "tpu")
    assert {entry.kind for entry in lora.collectives} == {"all-reduce"}
    assert sum(entry.bytes for entry in lora.collectives if entry.count == 4 * layers) == sums
    mora = estimate_memory(run_of("mora", mesh), MODEL, mesh, "tpu")
    # Float32 forward and backward. Of what a device has, a quarter, three quarters go to others.
    cut = (width + wide) + (qkv + 2 * wide)
    (mixed,) = [entry for entry in mora.collectives if entry.kind == "all-to-all"]
    assert mixed.bytes == layers * tokens * cut * (4 + 4) / 4 * 3 / 4


def test_what_a_ring_sends():
    """Against a count by hand, in float32: keys and values go around, all else is dealt once each way."""
    mesh = (1, 1, 1, 4, 1)
    found = estimate_memory(run_of("lora", mesh), MODEL, mesh, "tpu")
    (sent,) = [entry for entry in found.collectives if entry.kind == "collective-permute"]
    queries, keys = 8 * 16, 2 * 4 * 16  # numbers a token; keys with their values
    around = 4 * (keys + 2 * keys)  # forward; backward with their gradients
    dealt = (queries + keys + queries) + (queries + keys + queries) + (queries + keys)  # outputs or their gradients too
    assert sent.bytes == 6 * 8 * LENGTH / 4 * 4 * (around + dealt)


def test_fused_kernels_are_held_twice_where_tensor_cuts_them():
    meshes = (1, 2, 1, 1, 1), (1, 2, 2, 1, 1)
    before, after = (estimate_memory(run_of("lora", mesh), MODEL, mesh, "tpu").memory.temp for mesh in meshes)
    kernels = 6 * 128 * (256 + 2 * 384) * 4 / 4
    # Everything else that is temporary halves.
    assert after - before / 2 == pytest.approx(kernels, rel=0.1)
