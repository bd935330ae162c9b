"""The TPU's own compiler, where libtpu is installed."""

import json
import math
import re
import subprocess
import sys

import pytest

from mora_jax.environment import has_libtpu
from mora_jax.planning.model_shapes import PUBLISHED
from mora_jax.planning.plan import Plan, by_formula
from mora_jax.planning.topology import read_topology
from mora_jax.planning.tpu_compile import Compiled, compile_elsewhere
from mora_jax.training.config.schema import Config, lay_over
from tests.planning.test_memory_model import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed")]

# Sizes that fill tiles of 8 × 128: what layouts add for others is not in the formula.
WIDE = MODEL | {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128, "vocab_size": 4096}
LAYERS, WIDTH, LENGTH = 6, 1024, 1024
LAYER = WIDTH * (2 * 4 + 8) * 128 + 8 * 128 * WIDTH + 3 * WIDTH * 2048  # numbers in a layer's matrices
HEAD = 4096 * WIDTH


def planned(slice_: str, model: dict, **settings) -> Plan:
    """A run whose every array is cut over all chips, one row a chip, unless the settings say otherwise."""
    topology = read_topology(slice_)
    given = {
        "data.max_length": LENGTH,
        "mesh.data": 1,
        "mesh.fsdp": topology.chips,
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "train.batch_size": topology.chips,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    config = lay_over(Config(), [(name, value, "test") for name, value in given.items()])
    return by_formula(config, model, topology)


def compiled_for(slice_: str, model: dict = WIDE, **settings) -> Compiled:
    plan = planned(slice_, model, **settings)
    return compile_elsewhere(plan.config, model, plan.topology, plan.mesh)


@pytest.mark.parametrize("slice_", ["v5e-8", "v5p-8", "v6e-4"])
def test_formula_against_the_compiler(slice_):
    plan = planned(slice_, WIDE)
    found = compile_elsewhere(plan.config, WIDE, plan.topology, plan.mesh)
    assert found.fits and found.total is not None
    assert plan.memory.arguments == pytest.approx(found.arguments, rel=0.1)
    # Arrays as small as these may stay in the chip's fast memory, which is not counted: far less is possible.
    assert found.temp < 1.35 * (plan.memory.activations + plan.memory.temp)
    sent = {entry.kind: entry.bytes for entry in found.collectives or ()}
    own = {entry.kind: entry.bytes for entry in plan.collectives}
    assert own["all-gather"] == pytest.approx(sent["all-gather"], rel=0.15)


def test_too_large_a_step_is_found_out():
    model = MODEL | {"hidden_size": 8192, "intermediate_size": 28672, "head_dim": 128, "num_hidden_layers": 24}
    found = compiled_for("v5e-1", model, data__max_length=128)
    assert not found.fits
    assert found.total is None or found.total > read_topology("v5e-1").usable_bytes


def test_weights_stay_cut_and_are_gathered_a_layer_at_a_time():
    plan = planned("v5e-8", WIDE)
    program, held = program_of(plan, WIDE)
    base = 2 * (LAYERS * LAYER + 2 * HEAD)  # bytes, in bfloat16
    assert base / 8 < held < 1.5 * base / 8
    gathered = [line for line in program.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    assert gathered
    assert max(map(largest_array, gathered)) <= max(LAYER, HEAD)
    # A loop holds its layer's matrices alone: nothing of their shape is there six times over.
    assert largest_array(program) < LAYERS * LAYER


def largest_array(text: str) -> int:
    """Numbers in the largest array that a piece of HLO names."""
    shapes = re.findall(r"\b(?:bf16|f32|s32|u32|pred)\[([\d,]*)\]", text)
    return max(math.prod(int(size) for size in sizes.split(",") if size) for sizes in shapes)


def program_of(plan: Plan, model: dict) -> tuple[str, int]:
    """The compiled step's HLO, and the bytes of its arguments on a chip. In a process of its own, as libtpu stays."""
    task = {
        "config": plan.config.to_dict(),
        "decoder": model,
        "topology": plan.topology.tpu,
        "mesh": plan.mesh,
    }
    code = (
        "import json, sys; from mora_jax.planning.compile_worker import lower_step; "
        "step = lower_step(json.load(sys.stdin))[0].compile(); "
        "print(json.dumps([step.as_text(), step.memory_analysis().argument_size_in_bytes]))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=True)
    text, held = json.loads(done.stdout.strip().splitlines()[-1])
    return text, held


def test_moments_move_to_the_host():
    settings = {"adapter__method": "full", "optimizer__offload": False}
    here = compiled_for("v5e-8", **settings)
    there = compiled_for("v5e-8", **settings | {"optimizer__offload": True})
    moments = 2 * 4 * (LAYERS * LAYER + 2 * HEAD) / 8  # two float32 for each trained number, an eighth of them
    assert here.host == 0
    assert there.host >= moments
    assert here.arguments - there.arguments == pytest.approx(moments, rel=0.05)
    assert there.arguments + there.temp < here.arguments + here.temp - moments / 3  # gradients need room of their own


def test_layers_inputs_move_to_the_host():
    layers = 48  # so many that their inputs outweigh what one layer computes
    model = WIDE | {"num_hidden_layers": layers}
    here, there = (compiled_for("v5e-8", model, model__remat=remat) for remat in ("full", "offload"))
    inputs = layers * LENGTH * WIDTH * 2
    assert here.host == 0
    assert there.host == pytest.approx(inputs, rel=0.1)
    assert there.temp < here.temp - inputs / 2


def test_a_row_that_is_shared_needs_less_memory():
    settings = {"train__batch_size": 1, "data__max_length": 16384, "mesh__fsdp": 1}
    alone = compiled_for("v5e-1", **settings)
    shared = compiled_for("v5e-8", **settings | {"mesh__context": 8})
    assert shared.temp < alone.temp / 4


@pytest.mark.parametrize(("method", "rank"), [("lora", 8), ("lora", 128), ("mora", 8)])
def test_adapters_of_many_experts(method, rank):
    """In the shapes of Qwen3-30B-A3B: libtpu refuses a product with B as it stands for a lack of fast memory."""
    model = PUBLISHED["qwen3-30b-a3b"] | {"num_hidden_layers": 2, "vocab_size": 4096}
    settings = {"mesh.fsdp": 1, "mesh.expert": 8, "data.max_length": 2048, "adapter.method": method}
    found = compiled_for("v5e-8", model, **settings, adapter__rank=rank)
    assert found.fits and found.total is not None


def test_gathered_experts():
    """Gradients of A with the rank as their last axis would take as much again as all of it: tiles are 128 wide."""
    model = PUBLISHED["qwen3-30b-a3b"] | {"vocab_size": 4096}
    plan = planned("v5e-8", model, data__max_length=2048)
    found = compile_elsewhere(plan.config, model, plan.topology, plan.mesh)
    assert found.fits and found.temp < 1.4 * (plan.memory.activations + plan.memory.temp)
