"""From a configuration and chips to what is reported: the plan asked for, the one advised, why, and hints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mora_jax.data.inspect.advice import BITS_A_PARAMETER, BITS_A_TOKEN, EVIDENCE, bits_to_learn, smallest_rank
from mora_jax.environment import has_libtpu
from mora_jax.planning.plan import Plan, by_formula, compiled
from mora_jax.planning.search import recommend
from mora_jax.planning.topology import Topology, larger
from mora_jax.planning.tpu_compile import CompilerError
from mora_jax.training.config.schema import Config, adapter_config, lay_over
from mora_jax.training.sharding.mesh import AXES

Note = Callable[[str], None]

_MEASURED = "on the embedded model, in 64 steps (docs/studies/rates)"
#: By method: how its best rates lay to those of others.
_RATES = {
    "lora": f"the best rates of LoRA with alpha 32 were about 10 times full fine-tuning's, by {EVIDENCE}, and 2.6 to 3 "
    f"times {_MEASURED}, ranks 1 to 16",
    "full": f"the best rates of full fine-tuning were about a tenth of LoRA's, by {EVIDENCE}, and a third {_MEASURED}",
    "mora": "the best rates of MoRA were 0.8 to 1.1 times those of LoRA with alpha 32, but of rotation at rank 4 three "
    f"times, {_MEASURED}; nothing is published",
}


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
        settings: dict[str, Any] = {"mesh.data": 1, "mesh.fsdp": other.chips, "mesh.tensor": 1, "mesh.context": 1}
        settings |= {"model.remat": "full", "train.batch_size": other.chips, "train.micro_batch_size": other.chips}
        plan = by_formula(lay_over(config, [(name, value, "plan") for name, value in settings.items()]), values, other)
        if plan.fits:
            return other.name
    return None


def hints(plan: Plan) -> tuple[str, ...]:
    """The lines for a plan: what its parameters can hold, and the method's learning rate."""
    method = plan.config.adapter.method
    lines = [f"capacity: {_capacity(plan)}"]
    if method in _RATES:
        lines.append(f"learning rate: {_RATES[method]}")
    return tuple(lines)


def _capacity(plan: Plan) -> str:
    held = BITS_A_PARAMETER * plan.trainable / BITS_A_TOKEN
    words = (
        f"{plan.trainable:,} trained parameters hold what about {held:,.0f} trained tokens can teach "
        f"({BITS_A_PARAMETER:g} bits a parameter, {BITS_A_TOKEN:g} a token)"
    )
    steps = plan.config.train.steps
    if steps is not None and plan.config.adapter.config_class.grows_with_rank:
        tokens = steps * plan.tokens
        rank = smallest_rank(bits_to_learn(tokens), plan.trainable / adapter_config(plan.config.adapter, steps).rank)
        words += f"; rank {rank} would hold all {tokens:,} tokens of the run, if each was new and trained"
    return f"{words}: an upper bound for what is needed, by {EVIDENCE}"
