"""Memory and traffic of a step by formula, for chips whose compiler isn't here.

Per chip:

- *weights, adapters, optimizer, batch*: exact, from every array's shape and the sharding that training gives it;
- *activations*: what the forward pass keeps for the backward pass, read from the traced step (see jaxpr_cost.py);
- *temp*: the gradients of what is trained (twice with several micro-batches), and the larger of two moments. In a
  layer's backward pass: what is alive in the layer, and under `fsdp` the weights of two layers gathered (this one and
  the next). In the loss: what is alive there. The output head is gathered before and stays. Under `tensor` also a copy
  of the frozen kernels that hold several matrices: TPUs turn them once a step, so that the axis that is sharded leads.
  (Under `fsdp` alone they may too: docs/plan.md says what that leaves out, and what makes up for it.)

Along `tensor` everything is sharded but arrays as wide as the residual stream, the rows of experts (each device sorts
and keeps those of all experts, though it computes its own alone) and what MoRA makes of its inputs, along `context`
everything. MoRA mixes all features, so what is sharded along `tensor` is sent to all who share it: inputs and the
outputs' gradients in the compute dtype, updates and the inputs' gradients as float32. Along `expert` a device has room
for the rows of all devices that share experts with it, as any of them may go to its own; it is taken to compute as many
as if all experts were used alike. What is offloaded to the host counts nothing. What compilers pad arrays to (8 × 128
on TPUs), and how they order operations, is not in it: `benchmarks/results/plan.md` has a table of how far off that
leaves it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from mora_jax.adapters.attach import partition
from mora_jax.adapters.base import AdapterParam
from mora_jax.adapters.expert_projection import ExpertProjection
from mora_jax.adapters.methods.mora import MoRA
from mora_jax.adapters.products.quantization import QuantizedParam
from mora_jax.adapters.projection import Projection
from mora_jax.adapters.report import count
from mora_jax.backend import compiling_for
from mora_jax.models.attention.causal import Rows
from mora_jax.models.attention.kernels import AttentionChoice
from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.planning.abstract_step import STEPS, abstract_batch, abstract_model, assemble_abstract, loss_chunks
from mora_jax.planning.collectives import Collective
from mora_jax.planning.jaxpr_cost import Traced, read_traced
from mora_jax.training.config.schema import AdapterConfig, Config, ModelConfig, lay_over
from mora_jax.training.optimizer import make_optimizer
from mora_jax.training.sharding.mesh import AXES
from mora_jax.training.sharding.rules import Placement, axes_of
from mora_jax.training.sharding.runner import JitRunner, places
from mora_jax.training.state import dotted, flat_arrays


@dataclass(frozen=True)
class Memory:
    """Bytes on each chip.

    Attributes:
        weights: of frozen arrays.
        adapters: of what is trained: with full fine-tuning the whole model, as float32.
        optimizer: its moments.
        batch: of one step.
        activations: kept between the forward and the backward pass.
        temp: everything else that is alive at the fullest moment; under a compiler its own figure less `activations`.
        padding: what the compiler's layouts add to the arguments; 0 by formula.
    """

    weights: float
    adapters: float
    optimizer: float
    batch: float
    activations: float
    temp: float
    padding: float = 0.0

    @property
    def arguments(self) -> float:
        """Of what is there before the step starts."""
        return self.weights + self.adapters + self.optimizer + self.batch + self.padding

    @property
    def total(self) -> float:
        """At the fullest moment."""
        return self.arguments + self.activations + self.temp


@dataclass(frozen=True)
class Step:
    """One step on each chip, by formula.

    Attributes:
        memory: see `Memory`.
        flops, bytes: of matrix products, in a whole step on one chip.
        collectives: of a step.
        trainable, parameters: numbers that are trained, and that the model has, over all chips.
        attention: what computes it.
    """

    memory: Memory
    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    trainable: int
    parameters: int
    attention: str


def estimate_memory(config: Config, values: dict[str, Any], mesh: tuple[int, ...], backend: str) -> Step:
    """The formula for a model and a mesh.

    Args:
        config: of the run.
        values: the model's HuggingFace config.
        mesh: devices along each of its axes.
        backend: what the step is for, `tpu` or `gpu`.
    """
    decoder = read_config(values, "the model")
    axes = dict(zip(AXES, mesh, strict=True))
    tensor, context, expert = axes["tensor"], axes["context"], axes["expert"]
    sharing = axes["data"] * axes["fsdp"] * expert
    with compiling_for(backend):
        model = _model(config.model, config.adapter, decoder, backend)
        _, adapters, frozen = partition(model)
        # It has the axes of a mesh and no devices, which is all that shapes of shards need.
        abstract: Any = AbstractMesh(mesh, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        placement = Placement.of(abstract, adapters, frozen)
        shardings = placement.table(adapters, frozen)
        trained, base = flat_arrays(adapters), flat_arrays(frozen)
        batch = abstract_batch(config)
        micro, rows, *_, length = batch["input_ids"].shape
        sequences = batch["input_ids"].size // (micro * rows * length)  # both answers of a pair
        layout = Rows(decoder, model.dtype, rows * sequences, length, placement.partitioner, config.data.packing)
        attention = AttentionChoice(config.model.attention).implementation(layout)

    def held(tree: Any) -> float:
        """Bytes of a tree on each chip."""
        leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(places(tree, shardings, placement.sharding())), strict=True)
        return sum(_size(place.shard_shape(leaf.shape), leaf.dtype) for leaf, place in leaves)

    moments = jax.eval_shape(make_optimizer(config.optimizer, config.train.steps or STEPS).init, trained)
    local = rows // sharing
    traced = _traced(config, decoder, local, backend)
    width = jnp.dtype(model.dtype).itemsize
    layers, received = _gathered(placement, (adapters, frozen), width)
    head = decoder.vocab_size * decoder.hidden_size * width / tensor
    gradients = held(trained) * (2 if micro > 1 else 1)
    tokens = local * sequences * length // context
    saved = (traced.saved - traced.uncut - traced.routed) / tensor + traced.uncut + expert * traced.routed
    cut = axes["fsdp"] * expert * context > 1
    layer = max(traced.layer / tensor, traced.beside / tensor + expert * traced.fullest)
    backward = layer / context + (2 * layers / decoder.num_layers if cut else 0)
    memory = Memory(
        weights=held(base),
        adapters=held(trained),
        optimizer=0.0 if config.optimizer.offload else held(moments),
        batch=sum(_size(value.shape, value.dtype) for value in batch.values()) / sharing,
        activations=0.0 if config.model.remat == "offload" else saved / context,
        temp=gradients + max(backward, traced.head / tensor + (head if cut else 0)) + _turned(placement, model, base),
    )
    # Ranks along `tensor` are neighbours: where the others span hosts of eight GPUs, their groups share the cards.
    beside = tensor if backend == "gpu" and axes["fsdp"] * expert * tensor * context > 8 else 1
    summed = _summed(placement, adapters)
    collectives = _collectives(decoder, axes, micro, tokens, received, head, summed, width, config, beside)
    mixed = micro * decoder.num_layers * tokens * _mixed(placement, model, width, config.model.remat)
    if mixed:
        collectives = (*collectives, Collective("all-to-all", 4 * micro * decoder.num_layers, mixed))
    trainable = sum(math.prod(array.shape) for array in trained.values())
    parameters = trainable + count(model, nnx.Not(AdapterParam))
    flops, size = (micro * amount / tensor / context for amount in (traced.flops, traced.bytes))
    return Step(memory, flops, size, collectives, trainable, parameters, attention)


def _size(shape: tuple[int, ...], dtype: Any) -> float:
    # Typed keys have a dtype that numpy doesn't know.
    return math.prod(shape) * getattr(dtype, "itemsize", 8)


def _gathered(placement: Placement, states: tuple[nnx.State, ...], width: int) -> tuple[float, float]:
    """Bytes of all layers' matrices as layers use them, and those of them that a device gets from others. Quantised
    ones are gathered as they are."""
    used, received = 0.0, 0.0
    for state in states:
        for path, variable in nnx.to_flat_state(state):
            axes, shape = variable.get_metadata().get("axes") or (), tuple(variable.get_value().shape)
            if dotted(path).startswith("layers.") and len(axes) > 2:
                packed = isinstance(variable, QuantizedParam)
                places = placement.used(axes, shape), placement.stored(axes, shape)
                size = variable.get_value().dtype.itemsize if packed else width
                there, here = (math.prod(place.shard_shape(shape)) * size for place in places)
                used, received = used + there, received + there - here
    return used, received


def _summed(placement: Placement, adapters: nnx.State) -> float:
    """Bytes that a device sends to sum the gradients of one micro-batch over those that have other rows."""
    sizes, total = placement.mesh.shape, 0.0
    for _, variable in nnx.to_flat_state(adapters):
        axes, shape = axes_of(variable), tuple(variable.get_value().shape)
        sharing = placement.mesh.size // sizes["tensor"] // (sizes["expert"] if "experts" in axes else 1)
        total += 8 * math.prod(placement.used(axes, shape).shard_shape(shape)) * (sharing - 1) / sharing
    return total


def _projections(model: Decoder) -> list[tuple[str, Projection]]:
    """The layers' projections with their dotted paths; without those of experts, which `tensor` shares whole."""
    nodes = [(dotted(path), node) for path, node in nnx.iter_graph(model) if isinstance(node, Projection)]
    return [(path, node) for path, node in nodes if not isinstance(node, ExpertProjection)]


def _turned(placement: Placement, model: Decoder, frozen: dict[str, Any]) -> float:
    """Bytes of the frozen kernels of several matrices, which are copied where `tensor` shards them."""
    total = 0.0
    for path, projection in _projections(model) if placement.mesh.shape["tensor"] > 1 else ():
        kernel, axes = frozen.get(f"{path}.kernel"), ("layers", *projection.axes)  # None: trained, or quantised
        several = len(projection.layout.out_shape) > 1
        if kernel is not None and several and any(placement.used(axes, kernel.shape).spec):
            total += _size(placement.stored(axes, kernel.shape).shard_shape(kernel.shape), kernel.dtype)
    return total


def _mixed(placement: Placement, model: Decoder, width: int, remat: str) -> float:
    """Bytes a token that a device sends in a layer because MoRA mixes features which `tensor` shards."""
    tensor = placement.mesh.shape["tensor"]
    inputs, outputs = 0, 0
    for _, projection in _projections(model):
        shape = (projection.in_features, *projection.layout.out_shape)
        first, *others = placement.used(projection.axes, shape).spec
        for i, part in enumerate(projection.parts):
            if isinstance(projection.adapters.get(part.name), MoRA):
                inputs += projection.in_features if first else 0
                outputs += projection.layout.part_features(i) if any(others) else 0
    # Forward once, or twice where remat repeats it; backward once.
    forward_in, forward_out = {"none": (1, 1), "dots": (2, 1)}.get(remat, (2, 2))
    numbers = inputs * (forward_in * width + 4) + outputs * (forward_out * 4 + width)
    return numbers / tensor * (tensor - 1) / tensor


def _traced(config: Config, decoder: DecoderConfig, rows: int, backend: str) -> Traced:
    """A micro-batch of `rows` on one device: everything in it grows evenly with the rows."""
    one, two = (astuple(_traced_rows(_for_trace(config, backend), decoder, count, backend)) for count in (1, 2))
    return Traced(*(first + (rows - 1) * (second - first) for first, second in zip(one, two, strict=True)))


def _for_trace(config: Config, backend: str) -> Config:
    """The configuration without what a micro-batch doesn't depend on, so that like ones are traced once."""
    settings: list[tuple[str, Any, str]] = [("out", None, ""), ("train.micro_batch_size", None, "")]
    if backend == "gpu":  # cuDNN can't be traced without a GPU: XLA's blocks stand for it
        settings.append(("model.attention", "xla", ""))
    settings += [(f"mesh.{axis}", 1, "") for axis in AXES]
    return lay_over(config, settings)


@functools.lru_cache(maxsize=64)
def _model(model: ModelConfig, adapter: AdapterConfig, decoder: DecoderConfig, backend: str) -> Decoder:
    """The shapes, once for all meshes and batches."""
    with compiling_for(backend):
        return abstract_model(decoder, Config(model=model, adapter=adapter))


@functools.lru_cache(maxsize=256)
def _traced_rows(config: Config, decoder: DecoderConfig, rows: int, backend: str) -> Traced:
    config = lay_over(config, [("train.batch_size", rows, "")])
    with compiling_for(backend):
        # A copy: a step puts the kernels into the form that its mesh wants.
        model = nnx.merge(*nnx.split(_model(config.model, config.adapter, decoder, backend)))
        assembly, arguments = assemble_abstract(model, config, (1,) * len(AXES))
        assert isinstance(assembly.runner, JitRunner), "pmap is refused before"
        program = assembly.runner.trace(*arguments).jaxpr
        tokens = arguments[-1]["input_ids"].size
        chunks = loss_chunks(model, config, tokens)
    flat = nnx.to_flat_state(nnx.state(model, AdapterParam))
    squares = (variable for _, variable in flat if "square_in" in (variable.get_metadata().get("axes") or ()))
    sides = frozenset(variable.get_value().shape[-1] for variable in squares)
    turns = tuple(run[0].num_layers for run in decoder.runs if run[0].keys_used is None)
    experts = (stack.experts for stack in decoder.by_layer)
    routed = frozenset((tokens, stack.per_token) for stack in experts if stack is not None)
    return read_traced(program, turns, chunks, decoder.hidden_size, sides, routed)


def _collectives(
    decoder: DecoderConfig,
    axes: dict[str, int],
    micro: int,
    tokens: int,
    received: float,
    head: float,
    summed: float,
    width: int,
    config: Config,
    beside: int,
) -> tuple[Collective, ...]:
    """Gathers of weights along `fsdp`, `expert` and `context`, forward and backward; sums of gradients; sums of
    activations along `tensor`, float32, one for each product over a sharded axis; rows of other devices to experts
    along `expert`, whose results come back as float32; keys and values around the ring of `context`, forward and
    backward, there with their gradients."""
    tensor, context, expert = axes["tensor"], axes["context"], axes["expert"]
    gathering = axes["fsdp"] * context * expert
    sharing = axes["data"] * gathering
    count, sent = decoder.num_layers, []
    # So that what is summed or sent around forward is not made again backward.
    keeps_results = config.model.remat in ("none", "dots")
    if gathering > 1:
        size = micro * 2 * received + head * (gathering - 1) / gathering
        sent.append(Collective("all-gather", micro * 2 * count + 1, size, beside))
    if sharing > 1:
        sent.append(Collective("all-reduce", micro * count, micro * summed, beside))
    if tensor > 1:
        # Two forward and two backward. The last projection's isn't made again: the backward pass has no use for it.
        passes = 4 if keeps_results else 5
        size = micro * passes * count * tokens * decoder.hidden_size * 4 * 2 * (tensor - 1) / tensor
        sent.append(Collective("all-reduce", micro * passes * count, size))
    if expert > 1:
        others = micro * sum(stack.experts is not None for stack in decoder.by_layer) * (expert - 1)
        # The rows once more where the backward pass makes them again; there also the results' gradients.
        gathers = (width if config.model.remat == "none" else 2 * width) + 4
        for kind, numbers in (("all-gather", gathers), ("reduce-scatter", width + 4)):
            sent.append(Collective(kind, 2 * others // (expert - 1), others * tokens * decoder.hidden_size * numbers))
    if context > 1:
        forward = 1 if keeps_results else 2
        keys = 2 * tokens * decoder.num_kv_heads * decoder.head_dim / tensor
        queries = tokens * decoder.num_heads * decoder.head_dim / tensor
        turned = context * keys * (width * (forward + 1) + 4)
        dealt = (forward + 1) * width * (2 * queries + keys) + 4 * (queries + keys)
        times = context * (4 * forward + 8) + 8 * forward + 14
        sent.append(Collective("collective-permute", micro * count * times, micro * count * (turned + dealt)))
    return tuple(sent)
