"""From a configuration and chips to what is reported: the plan asked for, the one advised, why, and hints.

Meshes, micro-batches and remat are tried, and where nothing fits a quantised base too; the fastest that fits is
advised.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mora_jax.data.inspect.advice import BITS_A_PARAMETER, BITS_A_TOKEN, EVIDENCE, bits_to_learn, smallest_rank
from mora_jax.environment import has_libtpu
from mora_jax.errors import InputError
from mora_jax.models.decoder import REMAT
from mora_jax.models.families import read_config
from mora_jax.planning.plan import Plan, by_formula, compiled
from mora_jax.planning.topology import Topology, larger
from mora_jax.planning.tpu_compile import CompilerError
from mora_jax.training.config.load import check_quantize
from mora_jax.training.config.schema import QUANTIZE, Config, adapter_config, lay_over
from mora_jax.training.sharding.mesh import AXES

Note = Callable[[str], None]

_MEASURED = (
    "by ten seeds of study rates (the embedded model, 64 steps; docs/studies/rates/quick, in brackets how far it "
    "lies elsewhere when seeds are drawn again)"
)
#: By method: how its best rates lay to those of others, and who says so.
_RATES = {
    "lora": f"the best rates of LoRA with alpha 32 were about 10 times full fine-tuning's, by {EVIDENCE}, and 1.5 "
    f"(0.75 to 6) to 3 (0.75 to 12) times {_MEASURED}",
    "full": f"the best rates of full fine-tuning were about a tenth of LoRA's, by {EVIDENCE}, and a third to two "
    f"thirds, {_MEASURED}",
    "mora": "the best rates of MoRA were 0.5 (0.25 to 4) to 1 (0.5 to 4) times those of LoRA with alpha 32 for "
    f"sharing, and 1 (0.25 to 4) to 2 (1 to 8) times for rotation, {_MEASURED}; nothing is published",
}
_UNKNOWN_RATE = "how its best rates lie to LoRA's was not measured here; choose one by mora-jax sweep"


@dataclass(frozen=True)
class Advice:
    """What is reported.

    Attributes:
        asked: the configuration as it is.
        advised: the fastest way that fits; None where none does.
        tried: how many ways were looked at by formula and fit.
        smallest: where none fits, the smallest slice or host of the kind that would hold it; None where none does.
        notes: what the reader has to know.
        hints: on rank and learning rate.
    """

    asked: Plan
    advised: Plan | None
    tried: int
    smallest: str | None
    notes: tuple[str, ...]
    hints: tuple[str, ...]


def advise(config: Config, values: dict[str, Any], topology: Topology, tries: int, note: Note) -> Advice:
    """Looks at a configuration and at the other ways to run it.

    Args:
        config: of the run.
        values: the model's HuggingFace config.
        topology: the chips.
        tries: how many ways may be compiled besides the configuration's own; 0 compiles nothing.
        note: is told what takes a while.

    Raises:
        InputError: the configuration doesn't fit these chips, whatever their memory.
    """
    notes: list[str] = []
    asked = by_formula(config, values, topology)
    used = math.prod(asked.mesh)
    if used < topology.chips:
        why = f"more can't share micro-batches of {asked.config.train.micro_batch} evenly"
        if -1 not in (getattr(config.mesh, axis) for axis in AXES):
            why = f"the mesh names {used}"
        notes.append(f"as configured, {used} of the {topology.chips} chips work: {why}")
    compiler = bool(tries) and topology.tpu is not None and has_libtpu()
    if not compiler:
        notes.append(_why_formula(tries, topology))

    def checked(plan: Plan) -> Plan:
        note(f"compiling for {topology.tpu}, mesh {plan.mesh}, remat {plan.config.model.remat}: a minute or two")
        try:
            return compiled(plan, values)
        except CompilerError as error:
            notes.append(f"the compiler failed, so this is by formula: {error}")
            return plan

    if compiler:
        asked = checked(asked)
    note("trying other meshes, micro-batches and remat by formula")
    ways = recommend(config, values, topology)
    advised = None
    for way in ways[: tries if compiler else 1]:
        if way.settings() == asked.settings():
            way = asked
        elif compiler:
            way = checked(way)
        if way.fits:
            advised = way
            break
    smallest = None if ways else _smallest(config, values, topology)
    return Advice(asked, advised, len(ways), smallest, tuple(notes), hints(asked))


def _why_formula(tries: int, topology: Topology) -> str:
    if topology.tpu is None:
        return "memory is by formula: no compiler for GPUs without a GPU"
    if not tries:
        return "memory is by formula, as asked for"
    return "memory is by formula: libtpu, the TPU's compiler, is not installed (pip install 'mora-jax[plan]')"


def _smallest(config: Config, values: dict[str, Any], topology: Topology) -> str | None:
    """The smallest larger slice that holds the run with every array sharded over all chips, one row a chip."""
    for other in larger(topology):
        settings: dict[str, Any] = {f"mesh.{axis}": 1 for axis in AXES} | {"mesh.fsdp": other.chips}
        settings |= {"model.remat": "full", "train.batch_size": other.chips, "train.micro_batch_size": other.chips}
        plan = by_formula(lay_over(config, [(name, value, "plan") for name, value in settings.items()]), values, other)
        if plan.fits:
            return other.name
    return None


def hints(plan: Plan) -> tuple[str, ...]:
    """The lines for a plan: what its parameters can hold, and the method's learning rate."""
    rate = _RATES.get(plan.config.adapter.method, _UNKNOWN_RATE)
    return f"capacity: {_capacity(plan)}", f"learning rate: {rate}"


def _capacity(plan: Plan) -> str:
    held = BITS_A_PARAMETER * plan.trainable / BITS_A_TOKEN
    text = (
        f"{plan.trainable:,} trained parameters hold what about {held:,.0f} trained tokens can teach "
        f"({BITS_A_PARAMETER:g} bits a parameter, {BITS_A_TOKEN:g} a token)"
    )
    steps = plan.config.train.steps
    if steps is not None and plan.config.adapter.config_class.grows_with_rank:
        tokens = steps * plan.tokens
        rank = smallest_rank(bits_to_learn(tokens), plan.trainable / adapter_config(plan.config.adapter, steps).rank)
        text += f"; rank {rank} would hold all {tokens:,} tokens of the run, if each was new and trained"
    return f"{text}: an upper bound for what is needed, by {EVIDENCE}"


#: What is tried first, and where nothing of it fits: the layers' inputs on the host, rows split along their length.
_REMAT, _LAST_REMAT = ("none", "dots", "full"), ("full", "offload")
_ROWS = (1, 2, 4, 8, 16)  # of a micro-batch, on the devices that share one row's place
#: Room that a plan by formula leaves before it is recommended: as much as the formula is off at most (docs/plan.md).
MARGIN = 0.8


def formats(config: Config) -> list[str]:
    """How the base may be held, in the order in which it is tried: each only where nothing fits with those before."""
    first = QUANTIZE.index(config.model.quantize)
    return [held for held in QUANTIZE[first:] if held == config.model.quantize or _can_hold(config, held)]


def _can_hold(config: Config, held: str) -> bool:
    try:
        check_quantize(lay_over(config, [("model.quantize", held, "plan")]))
    except InputError:
        return False
    return True


def candidates(config: Config, topology: Topology, *, last: bool = False, experts: int = 1) -> Iterator[Config]:
    """The ways to lay a run's batch over the chips: those whose rows come out even. The batch stays as it is, unless
    it has fewer rows than devices that share rows: then it is that many.

    Args:
        config: of the run.
        topology: the chips.
        last: whether to try what costs more than it saves unless nothing else fits.
        experts: of a layer of the model.
    """
    for mesh in _meshes(topology.chips, experts, long_rows=last):
        sharing = mesh["data"] * mesh["fsdp"] * mesh["expert"]
        batch = max(config.train.batch_size, sharing)
        for rows, remat in itertools.product(_ROWS, _LAST_REMAT if last else _REMAT):
            micro = sharing * rows
            if batch % micro:
                continue
            settings: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.items()}
            settings |= {"train.batch_size": batch, "train.micro_batch_size": micro, "model.remat": remat}
            yield lay_over(config, [(name, value, "plan") for name, value in settings.items()])


def _meshes(chips: int, experts: int, *, long_rows: bool) -> Iterator[dict[str, int]]:
    """Meshes of all the chips, every axis a power of two: `tensor` up to 8, `expert` a divisor of the experts, and no
    `context` but for long rows."""
    powers = [1 << i for i in range(chips.bit_length()) if chips % (1 << i) == 0]
    tensors = [size for size in powers if size <= 8]
    shares = [size for size in powers if experts % size == 0]
    for context, tensor, expert, fsdp in itertools.product(powers if long_rows else [1], tensors, shares, powers):
        data, rest = divmod(chips, context * tensor * expert * fsdp)
        if not rest:
            yield {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context, "expert": expert}


def recommend(config: Config, values: dict[str, Any], topology: Topology) -> list[Plan]:
    """Every way that fits by formula with some room, the fastest first.

    A base in fewer bits than was asked for is looked at only where nothing else fits: `int8` first, then `nf4`.
    Of ways that come out alike to two digits the simpler one leads: fewer sharded axes, less remat, fewer rows.
    """
    stacks = read_config(values, "the model").by_layer
    experts = math.gcd(*(stack.experts.count for stack in stacks if stack.experts)) or 1
    for held, last in itertools.product(formats(config), (False, True)):
        fitting = []
        quantized = lay_over(config, [("model.quantize", held, "plan")])
        for candidate in candidates(quantized, topology, last=last, experts=experts):
            try:
                plan = by_formula(candidate, values, topology)
            except InputError:
                continue
            if plan.needed <= MARGIN * topology.usable_bytes:
                fitting.append(plan)
        if fitting:
            return sorted(fitting, key=_rank)
    return []


def _rank(plan: Plan) -> tuple[Any, ...]:
    middle = (plan.estimate.fastest + plan.estimate.slowest) / 2 / plan.tokens
    axes = sum(size > 1 for size in plan.mesh)
    # Two significant digits: figures closer together than the formula can tell counts as equal.
    return float(f"{middle:.1e}"), axes, REMAT.index(plan.config.model.remat), plan.config.train.micro_batch
