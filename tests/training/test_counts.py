"""What a training step is made of, by counting: a slower step shows here, whatever the machine and its load.

A row of `TABLE` says what is counted and what it is. What jax traces is looked at with a bfloat16 base, what XLA
compiles with a float32 one: a CPU's XLA makes float32 of small bfloat16 matrices, where accelerators don't. Adapters
have random values. Other files count more closely in their own places:
`tests/training/sharding/test_rules.py` what is gathered where, `tests/models/test_layer_scan.py` what a stack of layers
copies, `tests/adapters/test_conformance.py` the products of every method.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import mora_jax as mj
from mora_jax.backend import multiplies_bfloat16
from mora_jax.losses import chunked_sum
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import Placement
from mora_jax.training.sharding.runner import JitRunner
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import StepConfig, make_step
from tests.models.tiny import LLAMA, fill_randomly

ROWS, LENGTH, STEPS = 4, 24, 2
#: Every size is its own, so that a shape tells what an array is; all divide by 2.
SIZES = LLAMA | {
    "vocab_size": 640,
    "hidden_size": 72,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 14,
}
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "LoRA": (mj.LoRAConfig(rank=2), (1, 1, 1)),
    "LoRA, fsdp 2 × tensor 2": (mj.LoRAConfig(rank=2), (1, 2, 2)),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was run, with what it is made of.

    Attributes:
        runner: ran it, with a float32 base.
        equations: its operations as traced, with a bfloat16 base; those inside loops once.
        trained, frozen: arrays by path.
    """

    runner: JitRunner
    equations: list[Any]
    trained: dict[str, jax.Array]
    frozen: dict[str, jax.Array]

    @property
    def memory(self) -> Any:
        return self.runner.compiled[0].memory_analysis()

    @property
    def text(self) -> str:
        return self.runner.compiled[0].as_text()

    @property
    def dots(self) -> list[Any]:
        return [equation for equation in self.equations if equation.primitive.name == "dot_general"]

    @property
    def kernels(self) -> list[tuple[int, ...]]:
        """Shapes of the base's matrices, those of layers without their stack."""
        big = {name: array.shape for name, array in self.frozen.items() if name.endswith(("kernel", "embedding"))}
        return [shape[1:] if name.startswith("layers.") else shape for name, shape in big.items()]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def made(
    config: Any,
    mesh: tuple[int, ...],
    dtype: Any,
    length: int = LENGTH,
    sizes: dict[str, Any] = SIZES,
) -> tuple[JitRunner, Any, Any, Any]:
    """A runner, a state, the frozen arrays and a batch, placed."""
    model = Decoder(read_config(sizes, "config.json"), dtype=dtype, rngs=nnx.Rngs(0))
    mj.attach(model, config, rngs=nnx.Rngs(1))
    fill_randomly(model)
    graphdef, adapters, frozen = mj.partition(model)
    devices, settings = make_mesh(*mesh), OptimizerConfig()
    placement = Placement.of(devices, adapters, frozen)
    optimizer = make_optimizer(settings, STEPS)
    options = StepConfig(partitioner=placement.partitioner)
    structure = Structure(graphdef, adapters, frozen)
    step = make_step(structure, optimizer, make_schedule(settings, STEPS), options)
    runner = JitRunner(step, devices, placement.table(adapters, frozen))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, sizes["vocab_size"], (1, ROWS, length)).astype(np.int32)
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids), "weights": rng.random(ids.shape).astype(np.float32)}
    state = runner.place(initial_state(flat_arrays(adapters), optimizer, 0))
    return runner, state, runner.place(flat_arrays(frozen)), runner.place_batch(batch)


def traced(config: Any, mesh: tuple[int, ...] = (1, 1, 1)) -> list[Any]:
    """The operations of a step with a bfloat16 base."""
    runner, *arguments = made(config, mesh, jnp.bfloat16)
    return list(_equations(runner.trace(*arguments).jaxpr.jaxpr))


@functools.cache
def step_of(case: str) -> Step:
    """The case, trained for some steps, with the loss in chunks of a quarter of the tokens."""
    config, mesh = CASES[case]
    with mock.patch.object(chunked_sum, "chunk_size", lambda vocab_size, tokens, heads: tokens // 4):
        runner, state, frozen, batch = made(config, mesh, jnp.float32)
        for _ in range(STEPS):
            state, metrics = runner(state, frozen, batch)
        assert np.isfinite(float(metrics.loss)) and float(metrics.grad_norm) > 0
        return Step(runner, traced(config, mesh), state.adapters, frozen)


def _numbers(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def promoted_products(step: Step) -> int:
    """Products of the step with an operand that is not bfloat16."""
    return sum(any(v.aval.dtype != jnp.bfloat16 for v in dot.invars) for dot in step.dots)


def weight_gradients(step: Step) -> int:
    """Products that give as many numbers as a matrix of the base has, contracting over tokens."""
    sizes, tokens = {_numbers(shape) for shape in step.kernels}, {LENGTH, ROWS * LENGTH}
    found = 0
    for dot in step.dots:
        (left, _), _ = dot.params["dimension_numbers"]
        contracted = _numbers(tuple(dot.invars[0].aval.shape[axis] for axis in left))
        found += contracted in tokens and _numbers(dot.outvars[0].aval.shape) in sizes
    return found


def whole_logits(step: Step) -> int:
    """Arrays with a number for each token and word."""
    words = SIZES["vocab_size"]
    shapes = [getattr(v.aval, "shape", ()) for equation in step.equations for v in equation.outvars]
    return sum(words in shape and _numbers(shape) >= ROWS * LENGTH * words for shape in shapes)


def copies_of_the_base(step: Step) -> int:
    """Instructions of the compiled module, its arguments and their parts aside, that give a whole stack of kernels."""
    stacks = {(SIZES["num_hidden_layers"], *shape) for shape in step.kernels}
    sizes = {_numbers(shape) for shape in stacks if shape[0] == SIZES["num_hidden_layers"]}
    given = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "optimization-barrier", "opt-barrier")
    found = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", step.text)
    return sum(_numbers(tuple(map(int, s.split(",")))) in sizes for s, name in found if name not in given)


def from_the_host(step: Step) -> int:
    """Instructions that reach the host or another memory while the step runs."""
    names = r"(infeed|outfeed|send|recv|send-done|recv-done)\("
    return len(re.findall(rf" {names}", step.text)) + len(re.findall("callback|MoveToHost|MoveToDevice", step.text))


def loops(step: Step) -> int:
    """Loops as traced: over the layers there and back, and over chunks of the loss."""
    return sum(equation.primitive.name in ("scan", "while") for equation in step.equations)


def exchanges(step: Step) -> int:
    """Exchanges between devices in the compiled module, those inside loops once."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return len(re.findall(rf" (?:{kinds})(?:-start)?\(", step.text))


def state_not_donated(step: Step) -> int:
    """Bytes of trained arrays and moments that the step does not write in place."""
    held = sum(array.addressable_shards[0].data.nbytes for array in step.trained.values())
    return max(0, 3 * held - step.memory.alias_size_in_bytes)


def memory_over(step: Step) -> int:
    """Bytes beside the arguments, on a device, over a limit: what each layer keeps for its backward pass, the loss's
    chunk of logits, and as much again for what is in flight. On a mesh the head is gathered besides."""
    tokens, width, inner = ROWS * LENGTH, SIZES["hidden_size"], SIZES["intermediate_size"]
    heads = (SIZES["num_attention_heads"] + 2 * SIZES["num_key_value_heads"]) * SIZES["head_dim"]
    kept = tokens * (6 * width + 3 * heads + 3 * inner) * SIZES["num_hidden_layers"]
    devices = len(step.runner.devices)
    limit = 2 * 4 * (kept + tokens * SIZES["vocab_size"] // 4) // devices
    limit += 4 * width * SIZES["vocab_size"] * (devices > 1)
    return max(0, step.memory.temp_size_in_bytes - limit)


#: What is counted: on one device, and on four.
TABLE: dict[str, tuple[Callable[[Step], int], int, int]] = {
    "compilations": (lambda step: step.runner.compilations, 1, 1),
    "promoted products": (promoted_products, 0, 0),
    "gradients of frozen weights": (weight_gradients, 0, 0),
    "arrays of all logits": (whole_logits, 0, 0),
    "copies of the base": (copies_of_the_base, 0, 0),
    "callbacks and transfers": (from_the_host, 0, 0),
    "loops": (loops, 3, 3),
    "bytes of state not written in place": (state_not_donated, 0, 0),
    "bytes over the limit": (memory_over, 0, 0),
    "exchanges between devices": (exchanges, 0, 44),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", TABLE)
def test_count(what, case):
    count, alone, together = TABLE[what]
    if CASES[case][1] == (1, 1, 1):
        assert count(step_of(case)) == alone, count.__doc__
    else:  # how many exchanges there are is the compiler's, and differs with its version
        assert count(step_of(case)) <= together, count.__doc__


#: Of a layer, once: the base's four there and back, attention's seven, and the adapters': six for each of LoRA's four,
#: three for each of MoRA's five sides and inputs (q; k and v; o; gate and up; down); and two of the loss.
PRODUCTS = {"LoRA": 41, "MoRA": 32}


@pytest.mark.parametrize(("name", "config"), [("LoRA", mj.LoRAConfig(rank=2)), ("MoRA", mj.MoRAConfig(rank=2))])
def test_products_of_a_step(name, config):
    assert sum(equation.primitive.name == "dot_general" for equation in traced(config)) == PRODUCTS[name]


def test_nothing_is_made_again_for_each_layer():
    """Angles are computed outside the loops, and bfloat16 needs less than float32."""
    runner, state, frozen, batch = made(mj.LoRAConfig(rank=2), (1, 1, 1), jnp.bfloat16)
    runner(state, frozen, batch)
    text = runner.compiled[0].as_text()
    cosines = re.findall(r" cosine\(.*op_name=\"(.*?)\"", text)
    assert cosines and not [name for name in cosines if "while" in name]
    if jax.__version_info__ < (0, 11):  # XLA of then widens a whole bfloat16 stack on CPUs before it is looped over
        return
    assert not re.findall(r"f32\[\d+,72,160\]|f32\[\d+,160,72\]", text), "the stack is never float32"
    step = Step(runner, [], state.adapters, frozen)
    assert step.memory.temp_size_in_bytes < step_of("LoRA").memory.temp_size_in_bytes


@pytest.mark.skipif(not multiplies_bfloat16(), reason="bfloat16 products are slow here")
@pytest.mark.parametrize("config", [mj.FullConfig(), mj.LoRAConfig(rank=4), mj.MoRAConfig(rank=4)])
def test_no_product_widens_a_bfloat16_operand(config):
    """XLA on CPUs takes operands that are transposed for something it has to make float32 first."""
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
    runner, state, frozen, batch = made(config, (1, 1, 1), jnp.bfloat16, length=256, sizes=sizes)
    runner(state, frozen, batch)
    text = runner.compiled[0].as_text()
    dtypes = re.findall(r" dot\(%?([\w.-]+), %?([\w.-]+)\)", text)
    found = dict(re.findall(r"%?([\w.-]+) = (\w+)\[[\d,]*\]", text))
    assert len(dtypes) > 20 and {found[name] for pair in dtypes for name in pair} == {"bf16"}


def test_moments_are_not_copied():
    """Weights and moments are written in place; a copy of a moment comes first where nothing orders the two."""
    runner, state, frozen, batch = made(mj.FullConfig(), (1, 1, 1), jnp.float32)
    sizes = {array.size for array in state.adapters.values() if array.ndim > 2}
    runner(state, frozen, batch)
    found = re.findall(r"= f32\[([\d,]+)\]\S* copy\(%?(?:state_)?optimizer", runner.compiled[0].as_text())
    assert sizes and not [shape for shape in found if _numbers(tuple(map(int, shape.split(",")))) in sizes]
